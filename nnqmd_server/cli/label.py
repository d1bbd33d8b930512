"""``nnqmd label``: structures in, a labelled data set out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from nnqmd_server.labels.crew import Done
    from nnqmd_server.labels.label import Outcome, Plan

EXAMPLES = """
Examples:

  nnqmd label structures.xyz --with cp2k --out labels.xyz
      energy, forces, stress and Wannier centres (optPBE-vdW, TZV2P-GTH); the same command again goes on

  nnqmd label runs/ammonia/simulation.pos_*.xyz --every 100 --with cp2k --workers 8 --out beads.xyz
      every 100th step of all beads of a run

  nnqmd label --write-inputs inputs
      CP2K inputs to change; then --input inputs/cp2k_forces.inp --wannier-input inputs/cp2k_wannier.inp

  nnqmd label structures.xyz --with tblite,method=GFN2-xTB --out cheap.xyz

  nnqmd label structures.xyz --with calculator.py:make --out labels.xyz
"""


def label(
    structures: Annotated[
        list[Path] | None,
        typer.Argument(metavar="STRUCTURES...", help="i-PI trajectories, bead files, or what ASE reads"),
    ] = None,
    code: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="CODE",
            help="cp2k, tblite[,method=GFN1-xTB], ase:MODULE.CLASS[,key=value]..., or FILE.py:MAKER",
        ),
    ] = "cp2k",
    out: Annotated[Path, typer.Option(help="data set to write (extxyz)")] = Path("labels.xyz"),
    every: Annotated[int, typer.Option(min=1, help="take every n-th frame of each file")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="frames at the beginning of each file to leave out")] = 0,
    name: Annotated[
        str, typer.Option(help="name of the run (config_type); that of the file by default")
    ] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="frames at once; one per core by default")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="threads of each frame")] = 1,
    timeout: Annotated[float, typer.Option(min=1.0, help="longest time for one frame, in minutes")] = 120.0,
    retry: Annotated[bool, typer.Option("--retry", help="try frames again that failed before")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="keep the code's files of every frame")] = False,
    command: Annotated[str, typer.Option(help="how CP2K is started; cp2k.psmp by default")] = "",
    input_file: Annotated[
        Path | None, typer.Option("--input", help="CP2K input for energy, forces and stress")
    ] = None,
    wannier_input: Annotated[Path | None, typer.Option(help="CP2K input for Wannier centres (Gamma)")] = None,
    no_wannier: Annotated[bool, typer.Option("--no-wannier", help="CP2K: no Wannier centres")] = False,
    k_length: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="CP2K: k-points x height of the cell [Angstrom]; 10 with our input, else as yours"
        ),
    ] = None,
    carriers: Annotated[
        str, typer.Option(help='elements that carry Wannier centres, such as "N O"; all but H by default')
    ] = "",
    write_inputs: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="write our CP2K inputs there and stop"),
    ] = None,
) -> None:
    """Label structures with an electronic-structure code: energy, forces, stress, Wannier centres.

    A killed or interrupted run goes on with the same command; a frame that fails is listed at the end
    and stops no other. OUT gets what `nnqmd train` reads; OUT with the ending .json says how it was made.
    """
    from nnqmd_server.errors import InputError
    from nnqmd_server.labels import label as labelling
    from nnqmd_server.labels.codes import parse_code
    from nnqmd_server.labels.structures import read_structures

    if write_inputs is not None:
        _write_inputs(write_inputs)
        return
    if not structures:
        raise InputError("No structures were given.", "Name a file; see nnqmd label --help.")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    minutes = 60.0 * timeout
    chosen = parse_code(
        code,
        command=command,
        forces=input_file,
        wannier=wannier_input,
        with_wannier=not no_wannier,
        k_length=k_length,
        carriers=tuple(carriers.replace(",", " ").split()),
        timeout=minutes,
        threads=threads,
    )
    chosen.prepare()  # an option that does not exist is found now, not in every worker
    frames = read_structures(structures, skip, every, name)
    work = labelling.plan(frames, chosen, out, retry)
    _say(work)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end: as Ctrl-C
    count = workers or max(1, len(os.sched_getaffinity(0)) // threads)
    try:
        outcome = _run_with_bar(work, count, minutes, keep)
    except KeyboardInterrupt:
        console.print(f"Interrupted. {out} has what is done; the same command goes on.")
        raise typer.Exit(130) from None
    _show(outcome, work)
    if outcome.failures:
        raise typer.Exit(1 if not outcome.frames else 3)


def _write_inputs(folder: Path) -> None:
    from nnqmd_server.errors import OutputError
    from nnqmd_server.labels.cp2k_input import FORCES, WANNIER, shipped

    for name in (FORCES, WANNIER):
        path = folder / name
        if path.exists():
            raise OutputError(f"{path} is there already.", "Choose another folder, or remove it.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(shipped(name))
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror}).", "Choose another folder."
            ) from error
        console.print(f"wrote [bold]{path}[/]")


def _say(work: Plan) -> None:
    parts = [f"{len(work.frames)} frames with {work.code.name}"]
    if work.ready:
        parts.append(f"{len(work.ready)} labelled before")
    if work.failed:
        parts.append(f"{len(work.failed)} failed before (--retry tries them again)")
    console.print("; ".join(parts))
    if work.repeats:
        console.print(f"{work.repeats} structures are the same as earlier ones and left out", style="yellow")


def _run_with_bar(work: Plan, workers: int, limit: float, keep: bool) -> Outcome:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from nnqmd_server.labels import label as labelling

    columns = (
        TextColumn("{task.completed}/{task.total} frames"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    failed = 0
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        task = bar.add_task("", total=len(work.todo), state="")

        def tell(done: Done) -> None:
            nonlocal failed
            failed += bool(done.reason)
            state = f"{done.seconds:.0f} s the last" + (f", {failed} failed" if failed else "")
            bar.update(task, advance=1, state=state)

        return labelling.run(work, workers, limit, keep, tell)


def _show(outcome: Outcome, work: Plan) -> None:
    from nnqmd_server.labels.label import note_path, work_folder

    if outcome.frames:
        console.print(f"wrote [bold]{work.out}[/]: {len(outcome.frames)} frames")
        console.print(f"how it was made: {note_path(work.out)}")
    if outcome.failures:
        console.print(f"{len(outcome.failures)} frames failed:", style="red")
        for name, reason in outcome.failures[:20]:
            console.print(f"  {name}: {reason}")
        if len(outcome.failures) > 20:
            console.print(f"  and {len(outcome.failures) - 20} more, in {note_path(work.out)}")
        console.print(f"Their files: {work_folder(work.out) / 'failed'}")
