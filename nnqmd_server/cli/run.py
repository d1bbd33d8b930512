"""``nnqmd run``: a pool and i-PI together, from start to end."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from nnqmd_server.inputs.run import Finished, Run
    from nnqmd_server.pool.launch import LocalPool

EXAMPLES = """
Examples:

  nnqmd run ipi_inputs/ammonia-solid-trpmd/input.xml --model MODEL.nequip.zip

  nnqmd run input.xml --model MODEL.nequip.zip --out runs/first --steps 200 --workers 2
"""


def run(
    source: Annotated[Path, typer.Argument(metavar="INPUT.xml", help="i-PI input")],
    model: Annotated[Path, typer.Option(help="packaged model (.nequip.zip)")],
    out: Annotated[Path | None, typer.Option(help="folder for everything; runs/NAME by default")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="another number of steps than the input says")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="worker processes; one per core or GPU by default")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    extras: Annotated[
        str, typer.Option(help="properties that i-PI gets as extras over a socket, for example dipole")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="replace a run that is in the folder")] = False,
    remove_stale: Annotated[
        bool, typer.Option("--remove-stale", help="remove the socket file of an i-PI that was killed")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the model")] = False,
) -> None:
    """Start a pool, run an i-PI input with it, stop both, and say where everything is."""
    from nnqmd_server.inputs.run import Run, check, make_folder
    from nnqmd_server.pool.launch import LocalPool

    plan = check(source, model, remove_stale)
    folder = out or Path("runs") / (source.resolve().parent.name if source.stem == "input" else source.stem)
    make_folder(folder, force)
    with LocalPool(model, folder / "logs", workers=workers, device=device, eager=eager) as pool:
        length = f"{steps or plan.n_steps} steps of {plan.timestep:g} fs"
        if plan.first_step:
            length += f", from step {plan.first_step} on"
        console.print(f"{plan.n_beads} beads, {length} at {plan.temperature:g} K")
        with console.status("starting the workers") as shown:
            pool.wait_ready(tell=lambda line: shown.update(line))
        for worker in pool.status().workers:
            console.print(f"worker {worker['index']}: {worker['form']}")
        job = Run(source, folder, pool.address, steps, tuple(extras.split()))
        try:
            finished = _follow(job, pool)
        except KeyboardInterrupt:
            job.stop()
            again = f"nnqmd run {folder / 'RESTART'} --model {model} --out {folder}-2"
            console.print(f"stopped; this goes on from here: {again}")
            raise typer.Exit(130) from None
        finally:
            job.stop()
    _report(finished)


def _follow(job: Run, pool: LocalPool) -> Finished:
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
            pool.check()
            status = pool.status()
            # One force set before the first step, then one per step.
            done = max(0, status.structures // job.plan.n_beads - 1)
            recent.append((time.monotonic(), done))
            (first, before), (last, now) = recent[0], recent[-1]
            pace = f"{1e3 * (last - first) / (now - before):.1f} ms/step" if now > before else "- ms/step"
            kelvin = job.temperature()
            batch = f"{status.structures / status.force_sets:.1f} beads/batch" if status.force_sets else ""
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
