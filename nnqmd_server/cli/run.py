"""``nnqmd run``: a pool and i-PI together, from start to end."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nnqmd_server.cli.terminal import EXTRAS_HELP, Restarts, console

if TYPE_CHECKING:
    from nnqmd_server.inputs.run import Finished, Run
    from nnqmd_server.pool.launch import LocalPool

EXAMPLES = """
Examples:

  nnqmd run ipi_inputs/ammonia-solid-trpmd/input.xml --model MODEL.nequip.zip

  nnqmd run input.xml --model MODEL.nequip.zip --out runs/first --steps 200 --workers 2

  nnqmd run input.xml --model full=MODEL.nequip.zip --model cheap=springs.py:maker
      two force fields, named full and cheap in the input: multiple time steps, ring-polymer contraction

  nnqmd run input.xml --model MODEL.nequip.zip --leave lammps
      the socket of the force field lammps is answered by a program that you start
"""


def run(
    source: Annotated[Path, typer.Argument(metavar="INPUT.xml", help="i-PI input")],
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]MODEL",
            help="packaged model (.nequip.zip), or file.py:maker for a Python potential, or another program's"
            " (docs/potentials.md); several, each named like the force field that asks for it",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="folder for everything; runs/NAME by default")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="another number of steps than the input says")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="worker processes; one per core or GPU by default")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    extras: Annotated[str, typer.Option(help=f"over a socket: {EXTRAS_HELP}")] = "",
    leave: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a force field that you answer yourself")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a run that is in the folder")] = False,
    remove_stale: Annotated[
        bool, typer.Option("--remove-stale", help="remove the socket file of an i-PI that was killed")
    ] = False,
    restarts: Restarts = 3,
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the model")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="same input, same batches, whatever the workers do")
    ] = False,
) -> None:
    """Start a pool, run an i-PI input with it, stop both, and say where everything is."""
    from nnqmd_server.errors import InputError
    from nnqmd_server.inputs.mpi_run import MpiRun, RankOptions, is_over_mpi
    from nnqmd_server.inputs.run import Run, check, make_folder
    from nnqmd_server.pool.launch import LocalPool
    from nnqmd_server.potentials.load import parse_models

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop softly and clear up
    models = parse_models(model)
    left = leave or []
    plan, parts = check(source, models, remove_stale, left)
    over_mpi = is_over_mpi(parts)
    if over_mpi and deterministic:
        raise InputError(
            "--deterministic is not known over MPI.", "Use <ffdirect> or <ffsocket>, or leave it out."
        )
    folder = out or Path("runs") / (source.resolve().parent.name if source.stem == "input" else source.stem)
    make_folder(folder, force)
    length = f"{steps or plan.n_steps} steps of {plan.timestep:g} fs"
    if plan.first_step:
        length += f", from step {plan.first_step} on"
    several = f"{len(plan.systems)} systems of " if len(plan.systems) > 1 else ""
    console.print(f"{several}{plan.n_beads} beads, {length} at {plan.temperature:g} K")
    with contextlib.ExitStack() as stack:
        pool = None
        if over_mpi:
            job = MpiRun(
                source,
                folder,
                models,
                steps,
                left,
                RankOptions(workers, device, eager, tuple(extras.split())),
            )
        else:
            pool = stack.enter_context(
                LocalPool(
                    models, folder / "logs", None, workers, device, eager, deterministic, restarts=restarts
                )
            )
            with console.status("starting the workers") as shown:
                pool.wait_ready(tell=lambda line: shown.update(line))
            for worker in pool.status().workers:
                forms = "; ".join(f"{name}: {form}" for name, form in worker["forms"].items())
                console.print(f"worker {worker['index']}: {forms}")
            job = Run(source, folder, pool.address, steps, tuple(extras.split()), left, pool.client)
        _tell_parts(job)
        try:
            finished = _follow(job, pool)
        except KeyboardInterrupt:
            job.stop()
            again = shlex.join(
                ["nnqmd", "run", str(folder / "RESTART")]
                + [word for text in model for word in ("--model", text)]
                + [word for name in left for word in ("--leave", name)]
                + ["--out", f"{folder}-2"]
            )
            console.print(f"stopped; this goes on from here: {again}")
            raise typer.Exit(130) from None
        finally:
            job.stop()
    _report(finished)


def _tell_parts(job: Run) -> None:
    """Which force field asks for what, when there are several, and whose dipoles are not kept."""
    for part, record in zip(job.parts, job.records, strict=True):
        lost = record is None and part.force.per_step > 1 and part.potential in job.with_dipoles
        if len(job.parts) == 1 and not lost:
            continue
        words = [f"{part.force.n_beads} beads", f"{len(part.numbers)} atoms"]
        if part.force.per_step != 1:
            words.append(f"{part.force.per_step} times per step")
        if lost:
            words.append("dipoles not kept, since its force sets are not steps")
        if record:
            words.append(f"dipoles in {record.name}")
        console.print(f"force field {part.field.name}: {part.potential}, {', '.join(words)}")


def _follow(job: Run, pool: LocalPool | None) -> Finished:
    columns = (
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TextColumn("{task.fields[pace]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    recent: deque[tuple[float, int]] = deque(maxlen=40)
    with Progress(*columns, console=console, expand=True) as progress:
        bar = progress.add_task("i-PI", total=job.plan.n_steps, pace="")

        def tell() -> None:
            done, batch = job.steps_printed(), ""
            if pool:
                pool.check()
                status = pool.status()
                done = job.steps_done(status.structures)
                if status.force_sets:
                    batch = f"{status.structures / status.force_sets:.1f} beads/batch"
            recent.append((time.monotonic(), done))
            (first, before), (last, now) = recent[0], recent[-1]
            pace = f"{1e3 * (last - first) / (now - before):.1f} ms/step" if now > before else "- ms/step"
            kelvin = job.temperature()
            words = [pace, f"{kelvin:.0f} K" if kelvin is not None else "", batch]
            done = min(job.plan.first_step + done, job.plan.n_steps)
            progress.update(bar, completed=done, pace="  ".join(w for w in words if w))

        return job.wait(tell)


def _report(finished: Finished) -> None:
    per_step = 1e3 * finished.seconds / max(1, finished.steps)
    console.print(f"{finished.steps} steps in {finished.seconds:.0f} s ({per_step:.1f} ms per step)")
    console.print(f"everything is in [bold]{finished.folder}[/]:")
    for path in sorted(finished.folder.iterdir()):
        if path.is_file():
            console.print(f"  {path.name}")
    console.print(f"next: nnqmd spectrum ins {finished.folder}")
