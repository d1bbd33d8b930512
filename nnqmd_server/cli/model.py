"""``nnqmd model``: look at a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from nnqmd_server.cli.terminal import console

app = typer.Typer(help="Look at a model.", no_args_is_help=True)


@app.callback()
def _model() -> None:
    """Look at a model."""


@app.command()
def info(model: Annotated[Path, typer.Argument(help="packaged model (.nequip.zip)")]) -> None:
    """Print what a packaged model says of itself; nothing in it is executed."""
    from nnqmd_server.potentials.package import read_card

    card = read_card(model)
    table = Table(show_header=False, box=None)
    rows = {
        "file": card.name,
        "sha256": card.sha256,
        "elements": " ".join(card.elements),
        "cutoff": f"{card.cutoff:g} Angstrom",
        "precision": card.dtype,
        "gives": " ".join(("energy", "forces", "virial", *card.properties)),
    }
    if card.carriers:
        rows["Wannier centroids on"] = ", ".join(f"{k} ({v:g} electrons)" for k, v in card.carriers.items())
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
