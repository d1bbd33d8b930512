"""Training with a configuration of nequip's own (Hydra): used as it is, run, followed and packaged.

What is added is a line per epoch for the progress bar and the learning curve, and a checkpoint callback
where there is none. A configuration that Hydra composes of several files (``defaults``) is not touched at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nnqmd_server.errors import InputError, OutputError, ProgramError
from nnqmd_server.potentials.package import PACKAGE_SUFFIX
from nnqmd_server.training.curve import plot_learning_curve
from nnqmd_server.training.progress import Epoch, read_epochs
from nnqmd_server.training.train import follow, package_checkpoint

SECTIONS = {"run", "data", "trainer", "training_module"}
"""What nequip requires."""


@dataclass(frozen=True)
class NequipPlan:
    """A training of nequip's own whose run directory is ready; ``epochs`` where the file says it."""

    name: str
    config: Path
    directory: Path
    resumed: bool
    epochs: int | None


def is_nequip_config(path: Path) -> bool:
    """Whether a YAML file is a configuration of nequip's rather than one of ours."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False  # reading it as ours says what is wrong
    return isinstance(raw, dict) and len(SECTIONS & set(raw)) >= 3


def prepare(path: Path, directory: Path | None, resume: bool) -> NequipPlan:
    """Lay out the run directory.

    Raises
    ------
    InputError, OutputError
        Sections are missing; the directory is in use, or cannot be written.
    """
    raw = yaml.safe_load(path.read_text())
    composed = "defaults" in raw
    missing = sorted(SECTIONS - set(raw))
    if missing and not composed:
        raise InputError(f"{path} lacks the sections {', '.join(missing)}.", "nequip needs them.")
    directory = (directory or Path("runs") / path.stem).resolve()
    resumed = resume and (directory / "last.ckpt").is_file()
    if resume and not resumed and directory.exists() and any(directory.iterdir()):
        raise InputError(
            f"{directory} holds no last.ckpt to go on from.",
            "In trainer.callbacks give ModelCheckpoint `dirpath: ${hydra:runtime.output_dir}` and "
            "`filename: last` (or `save_last: true`).",
        )
    if not resumed and directory.exists() and any(directory.iterdir()):
        raise OutputError(
            f"{directory} is not empty.",
            "Continue the training there with --resume, or choose another --out.",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        used = path.resolve()
        if not composed:
            used = directory / "config.yaml"
            used.write_text(yaml.safe_dump(_followed(raw, directory), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error}", "Choose another --out.") from error
    most = (raw.get("trainer") or {}).get("max_epochs")
    epochs = most if isinstance(most, int) and most > 0 else None
    return NequipPlan(path.stem, used, directory, resumed, epochs)


def fit(plan: NequipPlan, on_epoch: Callable[[Sequence[Epoch]], None]) -> list[Epoch]:
    """Run nequip's trainer in the present directory, as ``nequip-train`` would; see `train.follow`."""
    return follow(plan.directory, plan.config, Path.cwd(), (), plan.resumed, on_epoch, {})


def finish(plan: NequipPlan) -> tuple[Path, Path | None]:
    """Package the best checkpoint and draw the learning curve.

    Raises
    ------
    ProgramError
        There is no checkpoint, or it cannot be packaged.
    """
    found = sorted(
        plan.directory.rglob("*.ckpt"), key=lambda file: (file.name != "last.ckpt", file.stat().st_mtime)
    )
    if not found:
        raise ProgramError(
            f"The training left no checkpoint in {plan.directory}.",
            "In trainer.callbacks give ModelCheckpoint `dirpath: ${hydra:runtime.output_dir}`.",
        )
    package = package_checkpoint(found[-1], plan.directory / f"{plan.name}{PACKAGE_SUFFIX}", Path.cwd())
    epochs = read_epochs(plan.directory / "epochs.csv")
    if not epochs:
        return package, None
    curve = plan.directory / "learning_curve.png"
    plot_learning_curve(epochs, curve)
    return package, curve


def _followed(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    trainer = dict(raw["trainer"])
    callbacks = list(trainer.get("callbacks") or [])
    if not any("ModelCheckpoint" in str(callback.get("_target_")) for callback in callbacks):
        callbacks.append(
            {
                "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                "dirpath": str(directory),
                "filename": "last",
                "enable_version_counter": False,
            }
        )
    callbacks.append(
        {"_target_": "nnqmd_server.training.progress.EpochLog", "path": str(directory / "epochs.csv")}
    )
    return {**raw, "trainer": {**trainer, "callbacks": callbacks}}
