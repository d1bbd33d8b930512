"""One training from configuration to packaged model: nequip's own trainer does the work.

A run directory holds everything: the frames of each set, nequip's configuration, the trainer's log, one
line per epoch (epochs.csv), checkpoints, the packaged model, its card and the learning curve.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from ase import Atoms

from nnqmd_server.errors import DataError, InputError, OutputError, ProgramError
from nnqmd_server.potentials.compiled import find_compiler
from nnqmd_server.potentials.package import PACKAGE_SUFFIX, file_hash
from nnqmd_server.training import data
from nnqmd_server.training.centres import assign_centres, read_centres
from nnqmd_server.training.config import TrainingConfig, plain, read_config
from nnqmd_server.training.expansion import expand
from nnqmd_server.training.plausibility import check_sizes
from nnqmd_server.training.progress import OWNER, Epoch, read_epochs

POLL = 0.5
"""Time between looks at the trainer [s]."""

PATIENCE = 30.0
"""How long a trainer that is told to end may take before it is killed [s]."""

STATISTICS = "backbone.json"
"""In the run directory: what the backbone took from its own data."""

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
    config_path: Path,
    directory: Path | None = None,
    epochs: int | None = None,
    resume: bool = False,
    without_sam: bool = False,
    start: Path | None = None,
    rho: float | None = None,
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
    without_sam
        Train plainly, whatever rho the configuration has.
    start
        Begin with the weights of this model, whatever the configuration says.
    rho
        Length of the sharpness-aware step, instead of the configured one.

    Raises
    ------
    InputError, DataError, ModelError, OutputError
        Before anything is computed.
    """
    config = _changed(read_config(config_path), epochs, without_sam, start, rho)
    if config.training.compile and find_compiler() is None:
        raise InputError(
            "`compile` is asked for, and this machine has no C++ compiler.",
            "Install g++ (Debian: apt install g++), or set compile: false.",
        )
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
    frames = [frame for file in config.data for frame in data.read_frames(file)]
    if config.wannier and config.wannier.centres:
        frames = assign_centres(frames, read_centres(config.wannier.centres), config.wannier.carriers)
    optional = config.wannier is not None and config.wannier.optional
    data.check(frames, config.elements, config.carriers, optional)
    kept, left_out = data.filter_forces(frames, config.max_force)
    check_sizes([frames[k] for k in kept], kept, config.carriers)
    parts = _split(config, frames, kept)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trained = config.wannier.backbone if config.wannier and config.wannier.backbone else config.start
        if trained:
            _take_backbone(config, trained, directory)
        data.write_sets(frames, parts, directory, config.carriers, config.split.group)
        shutil.copy(config_path, directory / "training.yaml")
        (directory / "config.yaml").write_text(_as_yaml(config, directory))
        split = {"data": _data_files(config), **asdict(parts), "left_out": left_out}
        (directory / "split.json").write_text(json.dumps(split, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error}", "Choose another --out.") from error
    return replace(plan, warnings=_warnings(frames, kept, left_out, config.max_force))


def _changed(
    config: TrainingConfig, epochs: int | None, without_sam: bool, start: Path | None, rho: float | None
) -> TrainingConfig:
    """What the user asked for instead of what the file says."""
    if without_sam:
        if rho is not None:
            raise InputError("--plain is rho = 0, and --rho says another.", "Give one of the two.")
        config = plain(config)
    if rho is not None:
        if not 0 <= rho < float("inf"):
            raise InputError(f"rho cannot be {rho:g}.", "Use 0 for plain training, 0.005 to begin with.")
        config = replace(config, training=replace(config.training, rho=rho))
    if start is not None:
        config = replace(config, start=start.resolve())
    if epochs is not None:
        if epochs < 1:
            raise InputError(f"{epochs} epochs cannot be trained.", "Ask for 1 or more.")
        config = replace(config, training=replace(config.training, epochs=epochs))
    return config


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
    settings = {}
    if plan.config.processes > 1:
        # Each process would take all cores.
        settings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // plan.config.processes))
    more = ["hydra.output_subdir=null"]
    config = plan.directory / "config.yaml"
    return follow(plan.directory, config, plan.directory, more, plan.resumed, on_epoch, settings)


def follow(
    directory: Path,
    config: Path,
    present: Path,
    overrides: Sequence[str],
    resumed: bool,
    on_epoch: Callable[[Sequence[Epoch]], None],
    settings: Mapping[str, str],
) -> list[Epoch]:
    """Run nequip's trainer on a configuration of its own and watch ``epochs.csv`` of the run directory grow.

    Parameters
    ----------
    directory
        Run directory: log, checkpoints, epochs.csv.
    config
        Hydra's YAML file.
    present
        The present directory of the trainer, to which the configuration's file names are relative.
    overrides
        Further words for Hydra.
    resumed
        Go on from last.ckpt.
    on_epoch
        Called with all finished epochs whenever there are more of them.
    settings
        Environment variables that are set unless the user has.

    Raises
    ------
    ProgramError
        If the trainer fails; with the end of its log.
    """
    command = [sys.executable, "-m", "nequip.scripts.train", "-cp", str(config.parent), "-cn", config.stem]
    where = "." if present == directory else str(directory)
    command += [f"hydra.run.dir='{where}'", "hydra/job_logging=stdout", *overrides]
    if resumed:
        command.append(f"++ckpt_path='{'last.ckpt' if present == directory else directory / 'last.ckpt'}'")
    table = directory / "epochs.csv"
    log = directory / "trainer.log"
    with log.open("a" if resumed else "w") as output:
        environment = {**settings, **os.environ, OWNER: str(os.getpid())}
        process = subprocess.Popen(
            command, cwd=present, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
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
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
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
    return package_checkpoint(plan.directory / "best.ckpt", plan.package, plan.directory)


def package_checkpoint(checkpoint: Path, target: Path, present: Path) -> Path:
    """Package a checkpoint; ``present`` is the directory that its file names are relative to.

    Raises
    ------
    ProgramError
        If nequip cannot; with the end of its log.
    """
    log = target.parent / "package.log"
    draft = target.with_name(f"draft{PACKAGE_SUFFIX}")
    command = [sys.executable, "-m", "nequip.scripts.package", "build", str(checkpoint), str(draft)]
    if present == target.parent == checkpoint.parent:  # a package keeps no paths of this machine
        command[-2:] = [checkpoint.name, draft.name]
    with log.open("w") as output:
        done = subprocess.run(command, cwd=present, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0 or not draft.is_file():
        raise ProgramError(
            f"The model could not be packaged. The end of {log}:\n{_tail(log)}",
            f"The checkpoint {checkpoint.name} stands; mend what the log names and run again with --resume.",
        )
    draft.replace(target)
    return target


def describe(plan: Plan, epochs: Sequence[Epoch]) -> dict[str, Any]:
    """Draw the learning curve and write the model card; returns the card."""
    from nnqmd_server.training.card import build_card, write_card
    from nnqmd_server.training.curve import plot_learning_curve

    plot_learning_curve(epochs, plan.directory / "learning_curve.png")
    split = json.loads((plan.directory / "split.json").read_text())
    numbers = {name: split[name] for name in ("train", "validation", "test", "left_out")}
    card = build_card(plan.config, plan.directory, plan.package, epochs, split["data"], numbers)
    write_card(card, plan.directory)
    return card


def _data_files(config: TrainingConfig) -> list[dict[str, str]]:
    """The data files, for the card and to know them again."""
    return [{"file": file.name, "sha256": file_hash(file)} for file in config.data]


def _split(config: TrainingConfig, frames: Sequence[Atoms], kept: Sequence[int]) -> data.Split:
    """The split of the kept frames, in frame numbers of all files one after the other."""
    groups = data.groups_of([frames[k] for k in kept], config.split.group)
    parts = data.split(groups, config.split.validation, config.split.test, config.split.join_below)
    return data.Split(*(tuple(kept[k] for k in part) for part in (parts.train, parts.validation, parts.test)))


def _take_backbone(config: TrainingConfig, trained: Path, directory: Path) -> None:
    from nnqmd_server.training.frozen import save_backbone

    found, statistics = save_backbone(trained, directory / "backbone.pt", trained == config.start)
    (directory / STATISTICS).write_text(json.dumps(statistics, indent=1) + "\n")
    wanted = {
        "type_names": " ".join(config.elements),
        "model_dtype": config.network.precision,
        "r_max": config.network.cutoff,
    }
    for name, value in wanted.items():
        theirs = float(found[name]) if name == "r_max" else found[name]
        if theirs != value:
            raise InputError(
                f"The trained model {trained} has {name} {theirs}, this configuration {value}.",
                "Under `network` and `elements` give what the backbone was trained with (its card says it).",
            )


def _as_yaml(config: TrainingConfig, directory: Path) -> str:
    file = directory / STATISTICS
    statistics = json.loads(file.read_text()) if file.is_file() else None
    return yaml.safe_dump(expand(config, config.training.epochs, statistics), sort_keys=False)


def _check_unchanged(plan: Plan) -> None:
    """A checkpoint carries its own settings: a changed configuration would be ignored silently."""
    present = (plan.directory / "config.yaml").read_text()
    if present != _as_yaml(plan.config, plan.directory):
        raise InputError(
            f"The configuration differs from the one that the training in {plan.directory} began with.",
            "Put it back (training.yaml there is a copy; mind --epochs), or train afresh in another --out.",
        )
    begun_with = json.loads((plan.directory / "split.json").read_text())["data"]
    if _data_files(plan.config) != begun_with:
        names = ", ".join(map(str, plan.config.data))
        raise DataError(
            f"The data have changed since the training in {plan.directory} began: {names}.",
            "Put the files back, or train afresh in another --out.",
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
