"""``nnqmd train``: from labelled frames to a packaged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnqmd_server.training.progress import Epoch


def train(
    config: Annotated[Path, typer.Argument(help="Training configuration (YAML).", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/NAME if not given.", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs, instead of those in the configuration.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a training that was interrupted.")] = False,
) -> None:
    """Train a network, package it, and write its model card with the errors on data it never saw.

    Example: [bold]nnqmd train examples/ammonia/small.yaml --out runs/ammonia[/bold]

    The configuration says what every key means. On a CPU, set OMP_NUM_THREADS to the number of cores to use.
    """
    # The room imports torch; `nnqmd --help` must not wait for it.
    from nnqmd_server.training import train as training

    plan = training.prepare(config, out, epochs, resume)
    for warning in plan.warnings:
        console.print(f"Warning: {warning}", style="yellow")
    verb = "Continuing in" if plan.resumed else "Training in"
    console.print(f"{verb} {plan.directory} (log: trainer.log, one line per epoch: epochs.csv)")
    try:
        finished = _fit_with_bar(plan)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command with --resume goes on from the last finished epoch.")
        raise typer.Exit(130) from None
    with console.status("Packaging the model"):
        package = training.package(plan)
    with console.status("Computing errors on unseen frames"):
        card = training.describe(plan, finished)
    _show(card, package)


def _fit_with_bar(plan) -> list[Epoch]:  # noqa: ANN001 - its type lives behind the import of torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from nnqmd_server.training.train import fit

    columns = (
        TextColumn("epoch {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=300) as bar:
        task = bar.add_task("", total=plan.config.training.epochs, state="starting")

        def show(epochs: Sequence[Epoch]) -> None:
            if epochs:
                bar.update(task, completed=len(epochs), state=_state(epochs[-1]))

        return fit(plan, show)


def _state(epoch: Epoch) -> str:
    parts = [f"val E {epoch.energy_rmse * 1e3:.1f} meV/atom", f"F {epoch.forces_rmse * 1e3:.0f} meV/A"]
    if epoch.wannier_centroid_rmse == epoch.wannier_centroid_rmse:  # not NaN: it is trained
        parts.append(f"Wannier {epoch.wannier_centroid_rmse:.4f} A")
    return ", ".join([*parts, f"lr {epoch.learning_rate:.1e}"])


def _show(card: dict, package: Path) -> None:
    test = card["errors"]["test"]
    console.print(f"Errors on {test['frames']} frames never seen (mae / rmse):")
    rows = [("energy", "energy_meV_per_atom", "meV/atom", 2), ("forces", "forces_meV_per_A", "meV/A", 1)]
    rows += [("stress", "stress_GPa", "GPa", 3), ("Wannier centroid", "wannier_centroid_A", "A", 4)]
    rows.append(("molecular dipole", "molecular_dipole_D", "D", 3))
    for name, key, unit, digits in rows:
        if key in test:
            values = test[key]
            console.print(f"  {name:<17} {values['mae']:.{digits}f} / {values['rmse']:.{digits}f} {unit}")
    console.print(f"Model:          {package} ({package.stat().st_size / 1e6:.1f} MB)")
    console.print(f"Card:           {package.parent / 'CARD.md'} (card.json for programs)")
    console.print(f"Learning curve: {package.parent / 'learning_curve.png'}")
