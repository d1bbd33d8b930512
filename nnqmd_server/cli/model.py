"""``nnqmd model``: look at a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nnqmd_server.cli.sharpness import measure_sharpness, parse_noise, sharpness_table
from nnqmd_server.cli.terminal import console

Frames = Annotated[Path, typer.Option(metavar="FILE", help="labelled frames (extxyz), see docs/data.md")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="all numbers as JSON")]

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


ERRORS_EXAMPLES = """
Examples:

  nnqmd model errors ammonia.nequip.zip --frames new-labels.xyz

  nnqmd model errors plain.nequip.zip legato.nequip.zip --frames new-labels.xyz --json errors.json
"""


@app.command(epilog=ERRORS_EXAMPLES)
def errors(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]MODEL...", help="one or several, as for nnqmd serve")
    ],
    frames: Frames,
    group: Annotated[str, typer.Option(help="key that names the run a frame comes from")] = "config_type",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Print the errors of models on labelled frames, such as ones that were labelled after the training.

    The frames are checked as `nnqmd train` checks its data; some may have no centroids. mae and rmse are
    over Cartesian components; of centroids and dipoles, over the lengths of the error vectors.
    """
    from nnqmd_server.potentials.load import load, parse_models
    from nnqmd_server.training import data
    from nnqmd_server.training.accuracy import errors_on

    labelled = data.read_frames(frames)
    any_centroid = any(data.WANNIER_CENTROID in frame.arrays for frame in labelled)
    found: dict[str, Any] = {}
    for name, source in parse_models(models).items():
        with console.status(f"{name}: {len(labelled)} frames"):
            potential = load(source, device, compiled=False)
            carriers = potential.card.carriers or () if any_centroid else ()
            data.check(labelled, potential.card.elements, carriers, optional=True)
            found[name] = errors_on(potential, labelled, data.groups_of(labelled, group))
    console.print(f"{len(labelled)} frames of {frames}")
    _print_errors(found)
    if json_file is not None:
        _write_json(json_file, found)


_QUANTITIES = (
    ("energy", "meV/atom", "energy_meV_per_atom", 2),
    ("forces", "meV/A", "forces_meV_per_A", 1),
    ("stress", "GPa", "stress_GPa", 3),
    ("Wannier centroid", "A", "wannier_centroid_A", 4),
    ("molecular dipole", "D", "molecular_dipole_D", 3),
)


def _print_errors(found: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("quantity")
    for name in found:
        for kind in ("mae", "rmse"):
            table.add_column(f"{name} {kind}", justify="right")
    table.add_column("labels", justify="right")
    for quantity, unit, key, digits in _QUANTITIES:
        here = [one[key] for one in found.values() if key in one]
        if len(here) == len(found):
            numbers = [f"{one[kind]:.{digits}f}" for one in here for kind in ("mae", "rmse")]
            table.add_row(f"{quantity} ({unit})", *numbers, f"{here[0]['label_rms']:.{digits}f}")
    console.print(table)
    console.print("labels: rms of the labels; of the energy, their standard deviation")
    runs = Table(box=None, pad_edge=False, header_style="dim")
    runs.add_column("run")
    runs.add_column("frames", justify="right")
    for name in found:
        runs.add_column(f"{name} energy mae (meV/atom)", justify="right")
        runs.add_column(f"{name} forces mae (meV/A)", justify="right")
    first = next(iter(found.values()))["by_run"]
    for run, one in first.items():
        numbers = []
        for errors_of in found.values():
            here = errors_of["by_run"][run]
            numbers += [f"{here['energy_meV_per_atom']['mae']:.2f}", f"{here['forces_meV_per_A']['mae']:.1f}"]
        runs.add_row(run, str(one["frames"]), *numbers)
    console.print(runs)


SHARPNESS_EXAMPLES = """
Examples:

  nnqmd model sharpness plain.nequip.zip legato.nequip.zip --frames train.xyz
"""


@app.command(epilog=SHARPNESS_EXAMPLES)
def sharpness(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]MODEL...", help="packaged models (.nequip.zip)")
    ],
    frames: Frames,
    noise: Annotated[str, typer.Option(help="relative noise on weights")] = "0.01,0.02,0.05",
    draws: Annotated[int, typer.Option(min=2, max=1000, help="draws of the noise")] = 10,
    json_file: JsonFile = None,
) -> None:
    """Print how much the loss of models rises when their weights are shaken.

    Gaussian noise, relative to the root mean square of each weight tensor, the same draws for all models;
    docs/fidelity.md says what the loss is, and `nnqmd fidelity` whether a flat model lives longer.
    """
    from nnqmd_server.potentials.load import parse_models

    found = measure_sharpness(parse_models(models), frames, parse_noise(noise), draws)
    console.print(sharpness_table(found))
    if json_file is not None:
        _write_json(json_file, [one.as_dict() for one in found])


def _write_json(path: Path, found: Any) -> None:
    import json

    from nnqmd_server.errors import OutputError

    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}.", "Give another --json FILE.") from None
