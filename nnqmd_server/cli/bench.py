"""``nnqmd bench``: what to expect of a model on this machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import InputError, NnqmdError, OutputError

if TYPE_CHECKING:
    from nnqmd_server.inputs.forecast import Forecast, Question

EXAMPLES = """
Examples:

  nnqmd bench MODEL.nequip.zip ipi_inputs/ammonia-solid-trpmd/input.xml
      beads, timestep and temperature are those of the i-PI input

  nnqmd bench MODEL.nequip.zip cell.extxyz --beads 32 --timestep 0.25 --json bench.json

  nnqmd bench springs.py:maker POSCAR --beads 8 --seconds 20 --no-plot
"""

PICTURES = (".png", ".svg", ".pdf")


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="packaged model (.nequip.zip), or file.py:maker")
    ],
    structure: Annotated[
        Path, typer.Argument(metavar="STRUCTURE", help="a file that ASE or i-PI reads, or an i-PI input")
    ],
    beads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="beads of the ring polymer; an i-PI input tells them")
    ] = None,
    timestep: Annotated[
        float | None, typer.Option(min=1e-3, max=100.0, help="in fs; that of the input, else 0.5")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=1.0, max=1e5, help="in K; that of the input, else 300")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, max=3600.0, help="how long to measure, about; compilation comes on top")
    ] = 60.0,
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="try no more; one per core or two per GPU by default")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the model")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="picture (png, svg, pdf); nnqmd-bench.png by default")
    ] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="draw nothing")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write all figures as one flat JSON object")
    ] = None,
) -> None:
    """Measure in about a minute what a model costs on this machine, and how many workers to take.

    The beads that are evaluated are drawn at random: every atom is bound to its place in STRUCTURE by a
    spring on which hydrogen would have 1500 cm^-1, at the given temperature, and moves from one force set to
    the next as in ring-polymer dynamics. The widths are printed.
    """
    from nnqmd_server.inputs.forecast import Question
    from nnqmd_server.inputs.start import read_start
    from nnqmd_server.potentials.load import parse_models

    start = read_start(structure)
    n_beads = beads or start.n_beads
    if n_beads is None:
        raise InputError(f"{structure} does not say how many beads.", "Add --beads 32.")
    (source,) = parse_models([model]).values()
    question = Question(
        source,
        start.structure,
        n_beads,
        timestep or start.timestep or 0.5,
        temperature or start.temperature or 300.0,
        device,
        eager,
        seconds,
        workers,
    )
    picture = None if no_plot else plot or Path("nnqmd-bench.png")
    _check_outputs(picture, json_file)
    found = _measure(question)
    _report(found)
    if picture is not None:
        from nnqmd_server.inputs.forecast_picture import plot_forecast

        plot_forecast(found, picture)
        console.print(f"picture: {picture}")
    if json_file is not None:
        _write(found, json_file)


def _check_outputs(picture: Path | None, json_file: Path | None) -> None:
    """Nobody should lose a minute to a folder that is not there."""
    if picture is not None and picture.suffix not in PICTURES:
        raise OutputError(f"{picture} is not a picture's name.", f"Let it end in {', '.join(PICTURES)}.")
    for path in (picture, json_file):
        if path is not None and (path.is_dir() or not os.access(path.resolve().parent, os.W_OK)):
            raise OutputError(f"Cannot write {path}.", "Choose a file in a folder that you may write.")


def _measure(question: Question) -> Forecast:
    from nnqmd_server.inputs.forecast import forecast

    # Kept when something fails, since the message then names a log in it.
    logs = Path(tempfile.mkdtemp(prefix="nnqmd-bench-"))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=1.0)
            tell = lambda line, part: progress.update(bar, description=line, completed=part)  # noqa: E731
            for found in forecast(question, logs, tell):
                last = found
    except NnqmdError:
        if not any(logs.iterdir()):
            logs.rmdir()
        raise
    shutil.rmtree(logs, ignore_errors=True)
    return last


def _report(found: Forecast) -> None:
    asked = found.question
    console.print(
        f"{found.loaded.name}, {found.loaded.form}, {found.loaded.dtype}: {asked.structure.n_atoms} atoms,"
        f" {asked.n_beads} beads, {asked.temperature:g} K, {asked.timestep:g} fs; loaded in"
        f" {found.loaded.seconds:.1f} s"
    )
    widths = ", ".join(f"{name} {width:.3f} ({ring:.3f})" for name, (width, ring) in found.spreads().items())
    console.print(
        f"beads drawn about the atoms' places with a width in Angstrom (about the centroid) of {widths}"
    )
    console.print(_batches(found))
    if found.left_out:
        console.print(
            f"left out, would take too long: batches of {', '.join(map(str, found.left_out))} (--seconds)"
        )
    if not any(one.shares for one in found.batches):
        console.print("this potential does not tell its list building, copies and model apart")
    console.print(_workers(found))
    _sum(found)


def _batches(found: Forecast) -> Table:
    from nnqmd_server.inputs.forecast import shares

    table = Table(box=None, pad_edge=False, header_style="dim")
    gpu = any(one.gpu_mb for one in found.batches)
    names = ["batch", "ms/bead", "lists %", "copies %", "model %", "rest %", "memory MB"] + ["GPU MB"] * gpu
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.batches:
        parts = shares(one)
        words = [f"{100 * parts[k]:.1f}" if k in parts else "-" for k in ("lists", "copies", "model", "rest")]
        sizes = [f"{one.memory_mb:.0f}"] + [f"{one.gpu_mb:.0f}"] * gpu
        table.add_row(str(one.batch), f"{one.per_bead:.3g}", *words, *sizes)
    return table


def _workers(found: Forecast) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("workers", "ms/force set", "ms/bead", "speed-up", "ns/day"):
        table.add_column(name, justify="right", no_wrap=True)
    first = found.workers[0]
    for one in found.workers:
        gain = first.per_set / one.per_set
        pace = found.ns_per_day * found.step_ms / (one.per_set + (found.ipi_ms or 0.0))
        row = [
            f"{one.per_set:.3g}",
            f"{one.per_set / found.question.n_beads:.3g}",
            f"{gain:.2f}",
            f"{pace:.3g}",
        ]
        table.add_row(str(one.workers), *row, style="bold" if one is found.best else "")
    return table


def _sum(found: Forecast) -> None:
    count = found.best.workers
    most = max(one.memory_mb for one in found.batches)
    console.print(
        f"best: [bold]{count} worker{'s' * (count > 1)}[/] on this machine, about {count * most / 1e3:.1f} GB"
        " of memory together"
    )
    if found.ipi_ms is None:
        console.print(f"i-PI's own time is not known ({found.ipi_trouble}) and not in these figures")
        own = ""
    else:
        own = f" (forces {found.best.per_set:.3g}, i-PI itself {found.ipi_ms:.3g})"
    console.print(
        f"expect [bold]{found.step_ms:.3g} ms per step[/]{own}, [bold]{found.ns_per_day:.3g} ns per day[/]"
    )


def _write(found: Forecast, path: Path) -> None:

    try:
        path.write_text(json.dumps(found.figures(), indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror}.", "Choose another --json.") from error
