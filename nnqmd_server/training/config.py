"""The short training configuration: what it may say, and how it is read."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from nnqmd_server.errors import InputError

SCHEDULES = ("cosine", "plateau", "constant")


@dataclass(frozen=True)
class SplitChoice:
    """How frames are divided, within every run; runs of fewer than ``join_below`` frames count as one."""

    group: str = "config_type"
    validation: float = 0.1
    test: float = 0.16
    join_below: int = 0


@dataclass(frozen=True)
class Wannier:
    """Wannier centroids: what carries them, and the ion charges that make dipoles of them.

    ``centres`` is a file with all centres (atoms X in the same frames); they are then assigned to the
    carriers. With ``optional``, frames without centroids train the rest alone. ``backbone`` is a trained
    model whose network stays as it is while the read-out alone is trained.
    """

    carriers: dict[str, float]
    ion_charges: dict[str, float]
    hidden_width: int = 32
    optional: bool = False
    centres: Path | None = None
    backbone: Path | None = None


@dataclass(frozen=True)
class Network:
    """Size of the Allegro network."""

    cutoff: float = 5.0
    l_max: int = 1
    layers: int = 2
    scalar_features: int = 32
    tensor_features: int = 16
    hidden_width: int = 32
    n_bessel: int = 8
    precision: str = "float32"


@dataclass(frozen=True)
class Aims:
    """Errors that weigh the same in the loss."""

    energy: float = 5.0  # meV/atom
    forces: float = 50.0  # meV/Angstrom
    stress: float = 0.3  # GPa
    wannier_centroid: float = 0.01  # Angstrom


@dataclass(frozen=True)
class Optimization:
    """How long, how fast and how flat."""

    epochs: int = 300
    batch_size: int = 4
    learning_rate: float = 0.005
    schedule: str = "cosine"
    rho: float = 0.005
    adaptive: bool = False
    sam_start_epoch: int = 0
    sam_every: int = 1
    ema_decay: float = 0.99
    gradient_clip: float | None = None
    patience: int | None = None
    compile: bool = False
    seed: int = 1


@dataclass(frozen=True)
class TrainingConfig:
    """One training, as its YAML file says it; units in the shipped example.

    ``start`` is a trained model of the same sizes whose weights are where this training begins.
    ``data`` are one or several files, read one after the other. ``notes`` and ``not_for`` are sentences
    for the model card that no program can know.
    """

    name: str
    data: tuple[Path, ...]
    elements: tuple[str, ...]
    start: Path | None = None
    max_force: float | None = None
    device: str = "auto"
    processes: int = 1
    tensorboard: bool = False
    split: SplitChoice = field(default_factory=SplitChoice)
    wannier: Wannier | None = None
    network: Network = field(default_factory=Network)
    loss: Aims = field(default_factory=Aims)
    training: Optimization = field(default_factory=Optimization)
    notes: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()

    @property
    def carriers(self) -> tuple[str, ...]:
        """Elements that carry a Wannier centroid."""
        return tuple(self.wannier.carriers) if self.wannier else ()


def read_config(path: Path) -> TrainingConfig:
    """Read a training configuration; ``data`` is taken relative to the file.

    Raises
    ------
    InputError
        For a key that does not exist, is missing, or has an impossible value.
    """
    if not path.is_file():
        raise InputError(f"There is no training configuration {path}.", "Give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}", "Correct it at the place named.") from error
    config = _build(TrainingConfig, raw, path.name)
    _validate(config)
    wannier = config.wannier
    if wannier:
        files = {name: getattr(wannier, name) for name in ("centres", "backbone")}
        found = {name: (path.parent / file).resolve() for name, file in files.items() if file is not None}
        wannier = replace(wannier, **found)
    start = None if config.start is None else (path.parent / config.start).resolve()
    files = tuple((path.parent / file).resolve() for file in config.data)
    return replace(config, data=files, start=start, wannier=wannier)


def plain(config: TrainingConfig) -> TrainingConfig:
    """The same training without sharpness-aware steps; its name gets the ending ``-plain``."""
    return replace(config, name=f"{config.name}-plain", training=replace(config.training, rho=0.0))


def _build(cls: type, raw: Any, where: str) -> Any:
    """A dataclass from plain YAML, refusing keys it does not have."""
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be a table of keys and values.", "See examples/ammonia/small.yaml.")
    known = {f.name: f for f in fields(cls)}
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean `{near[0]}`?" if near else f"Keys here are: {', '.join(known)}."
            raise InputError(f"{where} has an unknown key `{key}`.", fix)
    for name, f in known.items():
        if name not in raw and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where} lacks the key `{name}`.", "See examples/ammonia/small.yaml.")
    hints = get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = getattr(hint, "__args__", ()) if type(None) in getattr(hint, "__args__", ()) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if is_dataclass(kind):
        return _build(kind, value, where)
    try:
        if kind is float or kind is int:
            number = kind(value)
            if isinstance(value, bool) or number != float(value):
                raise ValueError(value)
            return number
        if (kind is str and not isinstance(value, str)) or (kind is bool and not isinstance(value, bool)):
            raise ValueError(value)
        if getattr(kind, "__origin__", None) is dict:
            return {_text(k): float(v) for k, v in value.items()}
        if kind == tuple[Path, ...]:  # one file needs no brackets
            return tuple(Path(_text(v)) for v in ([value] if isinstance(value, str) else value))
        if getattr(kind, "__origin__", None) is tuple and not isinstance(value, str):
            return tuple(_text(v) for v in value)
        return kind(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{where} cannot be {value!r}.", "Give the kind of value that the example shows."
        ) from error


def _text(value: Any) -> str:
    # YAML takes a bare No (nobelium) for a truth value: better an error than the element "False"
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _has_tensorboard() -> bool:
    return any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))


def _validate(config: TrainingConfig) -> None:
    def require(true: bool, what: str, fix: str) -> None:
        if not true:
            raise InputError(what, fix)

    net, opt, parts = config.network, config.training, config.split
    require(
        net.precision in ("float32", "float64"), f"precision is {net.precision!r}.", "Use float32 or float64."
    )
    require(net.cutoff > 0, "cutoff must be positive.", "5 Angstrom is usual.")
    require(
        min(net.l_max, net.layers, opt.epochs, opt.batch_size) >= 1, "A size is below 1.", "Use 1 or more."
    )
    require(opt.rho >= 0, "rho cannot be negative.", "Use 0 for plain training, 0.005 to begin with.")
    require(opt.learning_rate > 0, "learning_rate must be positive.", "0.005 is usual.")
    require(
        opt.schedule in SCHEDULES, f"schedule is {opt.schedule!r}.", f"Use one of {', '.join(SCHEDULES)}."
    )
    require(
        opt.sam_every >= 1 and opt.sam_start_epoch >= 0,
        "sam_every must be 1 or more, sam_start_epoch 0 or more.",
        "1 and 0 make every step sharpness-aware.",
    )
    require(opt.gradient_clip is None or opt.gradient_clip > 0, "gradient_clip must be positive.", "Or null.")
    require(opt.patience is None or opt.patience >= 1, "patience must be 1 epoch or more.", "Or null.")
    require(
        config.processes >= 1 and opt.batch_size % config.processes == 0,
        f"batch_size {opt.batch_size} cannot be shared by {config.processes} processes.",
        "batch_size counts the frames of a step over all processes: make it a multiple of `processes`.",
    )
    require(
        not opt.compile or opt.batch_size >= 2 * config.processes,
        "compile needs steps of two frames or more in each process; nequip computes single ones uncompiled.",
        "Raise batch_size, or set compile: false.",
    )
    require(
        not config.tensorboard or _has_tensorboard(),
        "tensorboard is asked for, and no package can write its files.",
        "Install it (pip install tensorboard), or set tensorboard: false; epochs.csv is always written.",
    )
    require(0 <= opt.ema_decay < 1, "ema_decay must lie in [0, 1).", "0.99 is usual.")
    require(
        0 < parts.validation < 1 and 0 < parts.test < 1 and parts.validation + parts.test < 1,
        "validation and test are fractions of each run that leave something to train on.",
        "Use 0.1 and 0.16, for instance.",
    )
    require(
        len(config.data) == len(set(config.data)) > 0,
        "data names no file, or one of them twice.",
        "Give each file once.",
    )
    require(parts.join_below >= 0, "join_below cannot be negative.", "0 joins no runs.")
    require(
        all(aim > 0 for aim in vars(config.loss).values()),
        "Errors under `loss` must be positive.",
        "A larger error gives the quantity a smaller weight.",
    )
    if config.wannier:
        require(
            set(config.wannier.ion_charges) == set(config.elements),
            f"ion_charges must name exactly the elements {list(config.elements)}.",
            "Give the charge of every ion core, such as {N: 5, H: 1}.",
        )
        require(
            set(config.wannier.carriers) <= set(config.elements) and len(config.wannier.carriers) > 0,
            f"carriers must be some of the elements {list(config.elements)}.",
            "Give the electrons of every carrier, such as {N: 8}.",
        )
        require(
            not (config.wannier.backbone and (config.start or config.wannier.optional)),
            "A read-out is trained alone: `backbone` goes with neither `start` nor `optional`.",
            "Remove the one or the other.",
        )
