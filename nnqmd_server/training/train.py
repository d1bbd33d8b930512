"""One training from configuration to packaged model: nequip's own trainer does the work.

A run directory holds everything: the frames of each set, nequip's configuration, the trainer's log, one
line per epoch (epochs.csv), checkpoints, the packaged model, its card and the learning curve.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from ase import Atoms

from nnqmd_server.errors import DataError, InputError, OutputError, ProgramError
from nnqmd_server.potentials.package import PACKAGE_SUFFIX, file_hash
from nnqmd_server.training import data
from nnqmd_server.training.config import TrainingConfig, expand, read_config
from nnqmd_server.training.progress import Epoch, read_epochs

POLL = 0.5
"""Time between looks at the trainer [s]."""

LOG_TAIL = 12
"""Lines of a failed program's log that its error shows."""


@dataclass(frozen=True)
class Plan:
    """A training whose run directory is ready."""

    config: TrainingConfig
    directory: Path
    resumed: bool
    warnings: tuple[str, ...] = ()

    @property
    def package(self) -> Path:
        """Where the packaged model will stand."""
        return self.directory / f"{self.config.name}{PACKAGE_SUFFIX}"


def prepare(
    config_path: Path, directory: Path | None = None, epochs: int | None = None, resume: bool = False
) -> Plan:
    """Check configuration and data, and lay out the run directory.

    Parameters
    ----------
    config_path
        The short YAML configuration.
    directory
        Run directory; by default ``runs/NAME`` in the present directory.
    epochs
        Instead of the configured number.
    resume
        Continue the training that the directory holds.

    Raises
    ------
    InputError, DataError, OutputError
        Before anything is computed.
    """
    config = read_config(config_path)
    if epochs is not None:
        if epochs < 1:
            raise InputError(f"{epochs} epochs cannot be trained.", "Ask for 1 or more.")
        config = replace(config, training=replace(config.training, epochs=epochs))
    directory = (directory or Path("runs") / config.name).resolve()
    plan = Plan(config, directory, resumed=resume and (directory / "last.ckpt").is_file())
    if plan.resumed:
        _check_unchanged(plan)
        return plan
    if directory.exists() and any(directory.iterdir()) and not resume:
        raise OutputError(
            f"{directory} is not empty.",
            "Continue the training there with --resume, or choose another --out.",
        )
    frames = data.read_frames(config.data)
    data.check(frames, config.elements, config.carriers)
    kept, left_out = data.filter_forces(frames, config.max_force)
    parts = _split(config, frames, kept)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        data.write_sets(frames, parts, directory, config.carriers, config.split.group)
        shutil.copy(config_path, directory / "training.yaml")
        (directory / "config.yaml").write_text(_as_yaml(config))
        split = {"data_sha256": file_hash(config.data), **asdict(parts), "left_out": left_out}
        (directory / "split.json").write_text(json.dumps(split, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error}", "Choose another --out.") from error
    return replace(plan, warnings=_warnings(frames, kept, left_out, config.max_force))


def fit(plan: Plan, on_epoch: Callable[[Sequence[Epoch]], None] = lambda epochs: None) -> list[Epoch]:
    """Run nequip's trainer in the run directory until it ends.

    Parameters
    ----------
    plan
        What :func:`prepare` gave.
    on_epoch
        Called with all finished epochs whenever there are more of them.

    Raises
    ------
    ProgramError
        If the trainer fails; with the end of its log.
    """
    # File names are relative to the run directory, so that no package carries this machine's paths.
    command = [sys.executable, "-m", "nequip.scripts.train", "-cp", str(plan.directory), "-cn", "config"]
    command += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    if plan.resumed:
        command.append("++ckpt_path=last.ckpt")
    table = plan.directory / "epochs.csv"
    log = plan.directory / "trainer.log"
    with log.open("a" if plan.resumed else "w") as output:
        process = subprocess.Popen(command, cwd=plan.directory, stdout=output, stderr=subprocess.STDOUT)
        try:
            seen = 0
            while process.poll() is None:
                time.sleep(POLL)
                epochs = read_epochs(table)
                if len(epochs) != seen:
                    seen = len(epochs)
                    on_epoch(epochs)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise ProgramError(
            f"The trainer failed (exit code {process.returncode}). The end of {log}:\n{_tail(log)}",
            "Mend what the last line names; a training that ran can be continued with --resume.",
        )
    epochs = read_epochs(table)
    on_epoch(epochs)
    return epochs


def package(plan: Plan) -> Path:
    """Package the best checkpoint (its averaged weights) as a ``.nequip.zip`` file."""
    log = plan.directory / "package.log"
    draft = plan.directory / f"draft{PACKAGE_SUFFIX}"
    command = [sys.executable, "-m", "nequip.scripts.package", "build", "best.ckpt", draft.name]
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=plan.directory, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0 or not draft.is_file():
        raise ProgramError(
            f"The model could not be packaged. The end of {log}:\n{_tail(log)}",
            "The checkpoint best.ckpt stands; mend what the log names and run again with --resume.",
        )
    draft.replace(plan.package)
    return plan.package


def describe(plan: Plan, epochs: Sequence[Epoch]) -> dict[str, Any]:
    """Draw the learning curve and write the model card; returns the card."""
    from nnqmd_server.training.card import build_card, write_card
    from nnqmd_server.training.curve import plot_learning_curve

    plot_learning_curve(epochs, plan.directory / "learning_curve.png")
    split = json.loads((plan.directory / "split.json").read_text())
    numbers = {name: split[name] for name in ("train", "validation", "test", "left_out")}
    card = build_card(plan.config, plan.directory, plan.package, epochs, split["data_sha256"], numbers)
    write_card(card, plan.directory)
    return card


def _split(config: TrainingConfig, frames: Sequence[Atoms], kept: Sequence[int]) -> data.Split:
    """The split of the kept frames, in frame numbers of the whole file."""
    groups = data.groups_of([frames[k] for k in kept], config.split.group)
    parts = data.split(groups, config.split.validation, config.split.test)
    return data.Split(*(tuple(kept[k] for k in part) for part in (parts.train, parts.validation, parts.test)))


def _as_yaml(config: TrainingConfig) -> str:
    return yaml.safe_dump(expand(config, config.training.epochs), sort_keys=False)


def _check_unchanged(plan: Plan) -> None:
    """A checkpoint carries its own settings: a changed configuration would be ignored silently."""
    present = (plan.directory / "config.yaml").read_text()
    if present != _as_yaml(plan.config):
        raise InputError(
            f"The configuration differs from the one that the training in {plan.directory} began with.",
            "Put it back (training.yaml there is a copy; mind --epochs), or train afresh in another --out.",
        )
    begun_with = json.loads((plan.directory / "split.json").read_text())["data_sha256"]
    if file_hash(plan.config.data) != begun_with:
        raise DataError(
            f"{plan.config.data} has changed since the training in {plan.directory} began.",
            "Put the file back, or train afresh in another --out.",
        )


def _warnings(
    frames: Sequence[Atoms], kept: Sequence[int], left_out: Sequence[int], max_force: float | None
) -> tuple[str, ...]:
    found = []
    if left_out:
        numbers = ", ".join(map(str, left_out))
        found.append(f"Left out, with a force above {max_force:g} eV/A: frames {numbers} (counted from 0).")
    for k, force in data.outliers([frames[k] for k in kept]).items():
        found.append(
            f"Frame {kept[k]} (counted from 0) has a force of {force:.1f} eV/A, far above the others."
        )
    return tuple(found)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
