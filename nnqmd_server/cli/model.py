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


EXAMPLES = """
Examples:

  nnqmd model info ammonia.nequip.zip

  nnqmd model info best.ckpt

  nnqmd model info deployed.pth
"""


@app.command(epilog=EXAMPLES)
def info(
    model: Annotated[
        Path,
        typer.Argument(help="model file: .nequip.zip, .ckpt, .nequip.pt2 or .pth"),
    ],
) -> None:
    """Print what a model says of itself; nothing in it is executed."""
    from nnqmd_server.potentials.package import FORMS, compiled_texts, form_of, read_card, torchscript_texts

    card, form = read_card(model), form_of(model)
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "file": card.name,
        "form": FORMS[form],
        "sha256": card.sha256,
        "elements": " ".join(card.elements),
        "cutoff": f"{card.cutoff:g} Angstrom",
        "precision": card.dtype,
        "gives": " ".join(("energy", "forces", "virial", *card.properties)),
    }
    if card.carriers:
        rows["Wannier centroids on"] = ", ".join(f"{k} ({v:g} electrons)" for k, v in card.carriers.items())
    if form == "compiled":
        texts = compiled_texts(model)
        kind = ("AOTI_DEVICE_KEY", "AOTI_MACHINE", "AOTI_CPU_ISA", "AOTI_COMPUTE_CAPABILITY")
        rows["compiled for"] = " ".join(texts[k] for k in kind if texts.get(k))
    if form == "torchscript":
        texts = torchscript_texts(model)
        made = ("nequip_version", "torch_version", "e3nn_version")
        rows["deployed by"] = ", ".join(f"{k.partition('_')[0]} {texts[k]}" for k in made if texts.get(k))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
