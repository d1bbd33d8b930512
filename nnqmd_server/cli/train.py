"""``nnqmd train``: from labelled frames to a packaged model."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnqmd_server.training.progress import Epoch


EXAMPLES = """
Examples:

  nnqmd train examples/ammonia/small.yaml --out runs/ammonia

  nnqmd train examples/ammonia/small.yaml --plain
      plain Allegro from the same file, to compare with

  nnqmd train examples/ammonia/small.yaml --rho 0.02 --out runs/rho-0.02
      one of a scan; `nnqmd model errors` and `nnqmd model sharpness` compare what comes out

  nnqmd train examples/ammonia/small.yaml --out runs/ammonia --resume

  nnqmd train my-nequip-config.yaml
      a configuration of nequip's own (Hydra), used as it is
"""


def train(
    config: Annotated[Path, typer.Argument(help="Training configuration (YAML).", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/NAME if not given.", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs, instead of those in the configuration.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a training that was interrupted.")] = False,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Train without sharpness-aware steps (rho = 0), as NAME-plain."),
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of this trained model of the same sizes.", show_default=False
        ),
    ] = None,
    rho: Annotated[
        float | None,
        typer.Option(
            help="Length of the sharpness-aware step, instead of that in the configuration.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a network, package it, and write its model card with the errors on data it never saw.

    The configuration says what every key means; `processes: 2` uses two cores of a CPU, or two GPUs. A
    configuration of nequip's own is used as it is: its best checkpoint is packaged, without a card.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end: as Ctrl-C
    # The room imports torch; `nnqmd --help` must not wait for it.
    from nnqmd_server.training import train as training
    from nnqmd_server.training.nequip_config import is_nequip_config

    if is_nequip_config(config):
        if epochs is not None or plain or start is not None or rho is not None:
            raise InputError(
                f"{config} is a configuration of nequip's own: --epochs, --plain, --rho and --start "
                "do not change it.",
                "Set trainer.max_epochs, rho, or what the model is in it.",
            )
        _train_with_nequip(config, out, resume)
        return
    plan = training.prepare(config, out, epochs, resume, plain, start, rho)
    for warning in plan.warnings:
        console.print(f"Warning: {warning}", style="yellow")
    verb = "Continuing in" if plan.resumed else "Training in"
    console.print(f"{verb} {plan.directory} (log: trainer.log, one line per epoch: epochs.csv)")
    finished = _fit_with_bar(plan.config.training.epochs, lambda tell: training.fit(plan, tell))
    with console.status("Packaging the model"):
        package = training.package(plan)
    with console.status("Computing errors on unseen frames"):
        card = training.describe(plan, finished)
    _show(card, package)


def _train_with_nequip(config: Path, out: Path | None, resume: bool) -> None:
    from nnqmd_server.training import nequip_config

    plan = nequip_config.prepare(config, out, resume)
    verb = "Continuing in" if resume else "Training in"
    console.print(f"{verb} {plan.directory} with nequip's configuration {config} (log: trainer.log)")
    _fit_with_bar(plan.epochs, lambda tell: nequip_config.fit(plan, tell))
    with console.status("Packaging the model"):
        package, curve = nequip_config.finish(plan)
    console.print(f"Model:          {package} ({package.stat().st_size / 1e6:.1f} MB)")
    if curve is not None:
        console.print(f"Learning curve: {curve}")


def _fit_with_bar(total: int | None, fit: Callable[[Callable], list[Epoch]]) -> list[Epoch]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, speed_estimate_period=300) as bar:
            task = bar.add_task("", total=total, state="starting")

            def show(epochs: Sequence[Epoch]) -> None:
                if epochs:
                    bar.update(task, completed=epochs[-1].epoch + 1, state=_state(epochs[-1]))

            return fit(show)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command with --resume goes on from the last finished epoch.")
        raise typer.Exit(130) from None


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
