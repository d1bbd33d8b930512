"""What a run left on disk: velocities from i-PI's xyz files and dipoles from ``dipoles.h5``.

Units are read from the files and never guessed: i-PI writes ``v_centroid{atomic_unit}`` or
``v_centroid{m/s}`` in every frame's comment line, ``dipoles.h5`` names them in attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.units import ATOMIC_TIME, BOHR

Array = np.ndarray

MINIMUM_FRAMES = 64
"""Fewer frames than this are not a time series that a spectrum could come from."""

DIPOLE_FORMAT = "nnqmd dipoles 1"
DIPOLE_UNIT = "e Angstrom"

# i-PI's velocity units (ipi/utils/units.py), in Angstrom/fs.
_VELOCITY_UNITS = {"atomic_unit": BOHR / ATOMIC_TIME, "automatic": BOHR / ATOMIC_TIME, "m/s": 1e-5}
_VELOCITIES = ("v_centroid", "velocities")
_STEP = re.compile(r"Step:\s*(\d+)")
_QUANTITY = re.compile(r"(?<![\w{])(\w+)\{([^}]*)\}")


@dataclass(frozen=True)
class Velocities:
    """Velocities at even times.

    Parameters
    ----------
    symbols : tuple of str
        i-PI's atom labels, length n_atoms.
    velocities : Array
        Velocities [Angstrom/fs], shape (n_frames, n_atoms, 3).
    steps : Array
        Molecular-dynamics step of each frame, int64, shape (n_frames,).
    interval : float
        Time between frames [fs].
    quantity : str
        What i-PI calls them: ``v_centroid`` or ``velocities``.
    warnings : tuple of str
        What the reader tolerated.
    """

    symbols: tuple[str, ...]
    velocities: Array
    steps: Array
    interval: float
    quantity: str
    warnings: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Time from the first to the last frame [fs]."""
        return (len(self.steps) - 1) * self.interval

    def after(self, skip: float) -> Velocities:
        """The same trajectory without its first ``skip`` [fs]."""
        first = _first_frame(skip, self.interval, len(self.steps))
        return replace(self, velocities=self.velocities[first:], steps=self.steps[first:])


@dataclass(frozen=True)
class Dipoles:
    """Dipoles of the whole cell, bead by bead, at even times.

    Parameters
    ----------
    dipole : Array
        Dipole moment of the cell [e Angstrom], shape (n_frames, n_beads, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (n_frames, 3, 3).
    interval : float
        Time between frames [fs].
    """

    dipole: Array
    cell: Array
    interval: float

    @property
    def duration(self) -> float:
        """Time from the first to the last frame [fs]."""
        return (len(self.dipole) - 1) * self.interval

    def after(self, skip: float) -> Dipoles:
        """The same dipoles without the first ``skip`` [fs]."""
        first = _first_frame(skip, self.interval, len(self.dipole))
        return Dipoles(self.dipole[first:], self.cell[first:], self.interval)


def read_velocities(
    path: Path,
    timestep: float,
    declared_unit: str = "",
    progress: Callable[[float], None] | None = None,
) -> Velocities:
    """Velocities from an i-PI trajectory in xyz format.

    A last frame that was cut off in writing is left out with a warning; anything else that i-PI
    would not have written is an error.

    Parameters
    ----------
    path : Path
        The trajectory.
    timestep : float
        Molecular-dynamics time step [fs].
    declared_unit : str
        Unit that the i-PI input asked for, if it did; it must agree with the file.
    progress : callable, optional
        Called now and then with the fraction of the file that has been read.

    Raises
    ------
    DataError
        Unreadable file, missing, unknown or contradicting unit, uneven steps, too few frames.
    """
    frames: list[Array] = []
    steps: list[int] = []
    warnings: list[str] = []
    known: tuple[list[str], str, str] | None = None
    size = max(1, _size_of(path))
    read = 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        while block := _frame_lines(stream, path, len(frames)):
            read += sum(map(len, block))
            if not block[-1].endswith("\n"):
                warnings.append(f"the last frame of {path.name} is cut off and was left out")
                break
            step, symbols, quantity, unit, values = _parse_frame(block, path, len(frames))
            if known is None:
                known = (symbols, quantity, unit)
                scale = _velocity_scale(path, quantity, unit, declared_unit)
            elif known != (symbols, quantity, unit):
                raise DataError(
                    f"Frame {len(frames)} of {path} has other atoms, another quantity or another unit "
                    f"({quantity}{{{unit}}}) than the first frame ({known[1]}{{{known[2]}}}).",
                    "Two runs seem to have written into this file. Run again into an empty directory.",
                )
            steps.append(step)
            frames.append(values)
            if progress is not None and len(frames) % 256 == 0:
                progress(min(1.0, read / size))
    if known is None or len(frames) < MINIMUM_FRAMES:
        raise DataError(
            f"{path} holds {len(frames)} whole frames; a spectrum needs at least {MINIMUM_FRAMES}.",
            "Run longer, or write the velocities more often (smaller stride).",
        )
    velocities = np.array(frames)
    velocities *= scale
    _check_finite(velocities, path)
    stride = _even_stride(np.array(steps), path)
    symbols, quantity, _ = known
    return Velocities(
        tuple(symbols), velocities, np.array(steps), stride * timestep, quantity, tuple(warnings)
    )


def read_dipoles(path: Path, timestep: float) -> Dipoles:
    """Dipoles that the force door wrote during a run.

    Parameters
    ----------
    path : Path
        ``dipoles.h5``; force set 0 is the initial configuration and force set k is step k.
    timestep : float
        Molecular-dynamics time step [fs].

    Raises
    ------
    DataError
        Not such a file, another version, another unit, missing force sets, too few force sets.
    """
    import h5py

    _size_of(path)
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("format", "nothing")
            if found != DIPOLE_FORMAT:
                raise DataError(
                    f"{path} says its format is {found!r}, not {DIPOLE_FORMAT!r}.",
                    "Give a dipoles.h5 that this version of `nnqmd run` wrote.",
                )
            unit = file["dipole"].attrs.get("unit", "no unit")
            if unit != DIPOLE_UNIT:
                raise DataError(
                    f"The dipoles in {path} are in {unit!r}, not {DIPOLE_UNIT!r}.",
                    f"Convert them and set the attribute unit = {DIPOLE_UNIT!r}.",
                )
            force_set, dipole, cell = (np.asarray(file[k]) for k in ("force_set", "dipole", "cell"))
    except (OSError, KeyError) as error:
        raise DataError(
            f"{path} is not a readable dipole file ({error}).",
            "If the run was killed while writing, use a copy from before, or run again.",
        ) from error
    if len(force_set) < MINIMUM_FRAMES:
        raise DataError(
            f"{path} holds {len(force_set)} force sets; a spectrum needs at least {MINIMUM_FRAMES}.",
            "Run longer.",
        )
    if dipole.shape != (len(force_set), dipole.shape[1], 3) or cell.shape != (len(force_set), 3, 3):
        raise DataError(
            f"The arrays in {path} do not fit together (dipole {dipole.shape}, cell {cell.shape}).",
            "Run again.",
        )
    _check_finite(dipole, path)
    return Dipoles(dipole, cell, _even_stride(force_set, path) * timestep)


def masses_of(symbols: tuple[str, ...]) -> Array:
    """Masses that i-PI gives to these labels [amu], shape (n_atoms,).

    A ``<masses>`` override in the i-PI input is not seen here.
    """
    from ipi.utils.units import Elements

    masses = {}
    for symbol in dict.fromkeys(symbols):
        try:
            masses[symbol] = Elements.mass_list[symbol]
        except KeyError as error:
            raise DataError(
                f"i-PI knows no atom called {symbol!r}.", "Use element symbols (D and T for heavy hydrogen)."
            ) from error
    return np.array([masses[s] for s in symbols])


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(
            f"There is no file {path}.",
            "Give the directory of a finished run, and check the <output> part of its input.xml.",
        ) from error


def _first_frame(skip: float, interval: float, n_frames: int) -> int:
    first = int(np.ceil(skip / interval - 1e-9))
    if skip < 0 or n_frames - first < MINIMUM_FRAMES:
        raise DataError(
            f"Skipping {skip:g} fs of a run of {(n_frames - 1) * interval:g} fs leaves "
            f"{max(0, n_frames - first)} frames; at least {MINIMUM_FRAMES} are needed.",
            "Skip less, or run longer.",
        )
    return first


def _frame_lines(stream: TextIO, path: Path, frame: int) -> list[str]:
    head = stream.readline()
    if not head:
        return []
    if not head.endswith("\n"):
        return [head]
    try:
        n_atoms = int(head)
    except ValueError as error:
        raise _not_a_frame(
            path, frame, f"expected the number of atoms, found {head.strip()[:40]!r}"
        ) from error
    if n_atoms < 1:
        raise _not_a_frame(path, frame, f"{n_atoms} atoms")
    return [head, *(stream.readline() for _ in range(n_atoms + 1))]


def _parse_frame(lines: list[str], path: Path, frame: int) -> tuple[int, list[str], str, str, Array]:
    comment = lines[1]
    step = _STEP.search(comment)
    if step is None:
        raise _not_a_frame(path, frame, "no 'Step:' in the comment line")
    named = [(q, u) for q, u in _QUANTITY.findall(comment) if q != "cell"]
    if len(named) != 1:
        raise DataError(
            f"Frame {frame} of {path} does not say what it holds and in which unit.",
            "Use the file as i-PI wrote it: the comment line must hold e.g. v_centroid{atomic_unit}.",
        )
    tokens = "".join(lines[2:]).split()
    symbols = tokens[::4]
    del tokens[::4]
    try:
        if len(symbols) != len(lines) - 2:
            raise ValueError(f"{len(symbols) + len(tokens)} words on {len(lines) - 2} lines")
        values = np.array([float(t) for t in tokens]).reshape(len(lines) - 2, 3)
    except ValueError as error:
        raise _not_a_frame(path, frame, f"every line must be a label and three numbers ({error})") from error
    return int(step[1]), symbols, *named[0], values


def _not_a_frame(path: Path, frame: int, why: str) -> DataError:
    return DataError(
        f"Frame {frame} of {path} is not an i-PI xyz frame: {why}.",
        "Use the file as i-PI wrote it (format='xyz'); after a kill and restart, cut the broken part out.",
    )


def _velocity_scale(path: Path, quantity: str, unit: str, declared: str) -> float:
    if quantity not in _VELOCITIES:
        raise DataError(
            f"{path} holds {quantity}, not velocities.",
            "Add <trajectory filename='vc' stride='2'> v_centroid </trajectory> to the i-PI input.",
        )
    if unit not in _VELOCITY_UNITS:
        raise DataError(
            f"The velocity unit {unit!r} in {path} is not known.",
            "Write v_centroid without a unit (i-PI then uses atomic_unit) or v_centroid{m/s}.",
        )
    if declared and _VELOCITY_UNITS.get(declared) != _VELOCITY_UNITS[unit]:
        raise DataError(
            f"{path} says its velocities are in {unit!r}, but the i-PI input asks for {declared!r}.",
            "The input and the trajectory are from different runs: put the matching pair into the directory.",
        )
    return _VELOCITY_UNITS[unit]


def _check_finite(values: Array, path: Path) -> None:
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if not finite.all():
        raise DataError(
            f"Frame {int(np.argmin(finite))} of {path} holds values that are not finite.",
            "The run has failed there: look at its energies, shorten the time step or mend the model.",
        )


def _even_stride(steps: Array, path: Path) -> int:
    strides = np.diff(steps)
    if strides[0] < 1 or (strides != strides[0]).any():
        odd = int(np.argmax(strides != strides[0])) if strides[0] >= 1 else 0
        raise DataError(
            f"The steps in {path} are not even: {steps[odd]} is followed by {steps[odd + 1]}, "
            f"but the run began with a stride of {strides[0]}.",
            "A continued run repeats or omits steps: cut the file to one even stretch.",
        )
    return int(strides[0])
