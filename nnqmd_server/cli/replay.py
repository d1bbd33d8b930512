"""``nnqmd replay``: play a recording at a pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nnqmd_server.cli.screen import number, span
from nnqmd_server.cli.status import Address, find_address
from nnqmd_server.cli.terminal import console
from nnqmd_server.pool.watch import plain

if TYPE_CHECKING:
    from nnqmd_server.pool.replay import Differences, Report

EXAMPLES = """
Examples:

  nnqmd serve MODEL.nequip.zip --record real.nnqmd
      records what simulations ask while it serves; stop it with Ctrl-C

  nnqmd replay real.nnqmd --compare
      plays it at the pool that is running, as fast as it can, and compares forces

  nnqmd replay real.nnqmd --pool tcp://127.0.0.1:5555 --pace recorded --json replay.json

  nnqmd replay bug.nnqmd --compare --tolerance 1e-4 || echo "forces have changed"
"""

DIFFERENT = 3
"""Exit status when forces differ from the recorded ones by more than the tolerance."""


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="recording of nnqmd serve --record")],
    address: Address = "",
    pace: Annotated[
        str, typer.Option(help="fast: as fast as it can; recorded: at the recorded times")
    ] = "fast",
    compare: Annotated[
        bool, typer.Option("--compare", help="compare energies, forces and all else with the recorded ones")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0, help="with --compare: largest difference of a force, in eV/Angstrom; exit status 3"
        ),
    ] = 1e-3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write all figures as one flat JSON object")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.1, max=86400, help="longest wait for an answer, in s")
    ] = 600.0,
) -> None:
    """Ask a pool again for everything in a recording: how fast it is, and whether it answers the same."""
    from nnqmd_server.errors import InputError, OutputError
    from nnqmd_server.pool import replay as player
    from nnqmd_server.pool.recording import read_recording

    if pace not in {"fast", "recorded"}:
        raise InputError(f"There is no pace {pace!r}.", "Use --pace fast or --pace recorded.")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        reading = progress.add_task("reading", total=1.0)
        recording = read_recording(file, lambda part: progress.update(reading, completed=part))
        playing = progress.add_task("playing", total=1.0)
        report = player.replay(
            recording,
            find_address(address),
            recorded_pace=pace == "recorded",
            compare=compare,
            patience=patience,
            progress=lambda part: progress.update(playing, completed=part),
        )
    if recording.cut_off:
        console.print(f"{file} ends in the middle of a message; what is whole was played", style="yellow")
    for name in report.other_models:
        console.print(f"{name} is another model here than in the recording", style="yellow")
    console.print(_table(report))
    console.print(_sum(report))
    if report.differences is not None:
        console.print(_differences(report.differences))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.figures(), indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"Cannot write {json_file}: {error.strerror}.", "Choose another.") from error
    if report.differences is not None and not report.differences.forces <= tolerance:
        console.print(f"forces differ by more than {tolerance:g} eV/Angstrom", style="bold red")
        raise typer.Exit(DIFFERENT)


def _table(report: Report) -> Table:
    import numpy as np

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("simulation", overflow="fold")
    for name in ("force sets", "failed", "median ms", "95 % ms", "recorded ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.simulations:
        now = 1e3 * np.quantile(one.seconds, [0.5, 0.95]) if one.seconds else (None, None)
        then = 1e3 * float(np.median(one.recorded)) if one.recorded else None
        failed = str(one.failed)
        figures = [number(None if x is None else float(x)) for x in (*now, then)]
        table.add_row(Text(plain(one.name, 64)), str(len(one.seconds)), failed, *figures)
    return table


def _sum(report: Report) -> Text:
    found = report.figures()
    words = (
        f"{found['force_sets']} force sets ({found['structures']} structures) in {span(found['seconds'])}:"
        f" {number(found['force_sets_per_second'])} force sets/s,"
        f" {number(found['structures_per_second'])} structures/s;"
        f" recorded in {span(found['recorded_seconds'])}"
    )
    failures = [one.first_failure for one in report.simulations if one.first_failure]
    if failures:
        words += f"\nfailed as when recorded: {found['failed']}, first: {plain(failures[0])}"
    return Text(words)


def _differences(found: Differences) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("largest difference", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("unit")
    table.add_row("energy", f"{found.energy:.3g}", "eV")
    table.add_row("energy per atom", f"{found.energy_per_atom:.3g}", "eV")
    table.add_row("force component", f"{found.forces:.3g}", "eV/Angstrom")
    table.add_row("  root mean square", f"{found.forces_rms:.3g}", "eV/Angstrom")
    table.add_row("virial component", f"{found.virial:.3g}", "eV")
    for name, value in found.properties.items():
        table.add_row(name, f"{value:.3g}", "")
    if found.forces:
        table.add_row("  in", "", Text(plain(found.worst)))
    table.add_row("identical to the last bit", f"{found.identical} of {found.force_sets}", "force sets")
    return table
