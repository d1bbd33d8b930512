"""One line per epoch: what the trainer writes, and what the progress bar and the learning curve read."""

from __future__ import annotations

import csv
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

OWNER = "NNQMD_TRAIN_OWNER"
"""Environment variable with the process that follows the training."""

COLUMNS = (
    "epoch",
    "seconds",
    "learning_rate",
    "train_loss",
    "energy_rmse",
    "forces_rmse",
    "stress_rmse",
    "wannier_centroid_rmse",
    "score",
)


@dataclass(frozen=True)
class Epoch:
    """One finished epoch; validation errors in eV/atom, eV/Angstrom, eV/Angstrom^3 and Angstrom.

    ``seconds`` counts from the beginning of the training, interruptions left out.
    """

    epoch: int
    seconds: float
    learning_rate: float
    train_loss: float
    energy_rmse: float
    forces_rmse: float
    stress_rmse: float
    wannier_centroid_rmse: float
    score: float


class EpochLog(lightning.Callback):
    """Appends a line to a CSV file after every epoch.

    Parameters
    ----------
    path : str
        The file; an existing one is continued when the training is.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._seconds_before = 0.0
        self._begun = 0.0
        self._rate = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the epochs that the checkpoint includes; begin the clock."""
        done = [e for e in read_epochs(self.path) if e.epoch < trainer.current_epoch]
        self._begun = time.monotonic()
        if done:
            _catch_up(trainer, done[-1].score)
        if not trainer.is_global_zero:
            return
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([getattr(e, name) for name in COLUMNS] for e in done)
        self._seconds_before = done[-1].seconds if done else 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remember the learning rate: when the epoch ends, the scheduler has made its step."""
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, *_: Any) -> None:
        """End a training that nobody follows any more: a second one may begin in its directory."""
        owner = os.environ.get(OWNER)
        if owner and not _is_alive(int(owner)):
            raise RuntimeError(f"nnqmd train (process {owner}), which started this training, is gone")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the line of this epoch; stop a training that has diverged."""
        logged = trainer.callback_metrics
        # The module logs its own epoch loss only after this hook. All processes take part in this sum.
        loss = float(pl_module.loss.compute()["weighted_sum"])
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} in epoch {trainer.current_epoch}: "
                "lower learning_rate or rho, or set gradient_clip"
            )

        if not trainer.is_global_zero:
            return

        def value(*names: str) -> float:
            found = (logged[f"val0_epoch/{name}"] for name in names if f"val0_epoch/{name}" in logged)
            return float(next(found, torch.tensor(float("nan"))))

        row = [
            trainer.current_epoch,
            self._seconds_before + time.monotonic() - self._begun,
            self._rate,
            loss,
            value("energy_rmse", "per_atom_energy_rmse"),  # ours, and what nequip's own metrics are called
            *(value(f"{name}_rmse") for name in ("forces", "stress", "wannier_centroid")),
            value("weighted_sum"),
        ]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # the number may be somebody else's by now
        return False
    return True


def _catch_up(trainer: lightning.Trainer, score: float) -> None:
    """Show a plateau scheduler the last score: a checkpoint is written before the scheduler sees it."""
    for entry in trainer.lr_scheduler_configs:
        if entry.reduce_on_plateau and entry.scheduler.last_epoch < trainer.current_epoch and score == score:
            entry.scheduler.step(score)


def read_epochs(path: Path) -> list[Epoch]:
    """The epochs logged so far; a line still being written is left out."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
    return [Epoch(int(row[0]), *(float(v) for v in row[1:])) for row in rows[1:]]
