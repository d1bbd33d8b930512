"""Dipoles and polarizabilities of the whole cell, bead by bead, from ``dipoles.h5`` or i-PI's extras.

``dipoles.h5`` (doors.record) names its unit. An extras file of i-PI, ``<trajectory extra_type='dipole'>
extras </trajectory>``, holds what the force side sent and names no unit: the caller must say it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.beads import bead_files, bead_number
from nnqmd_server.spectra.series import MINIMUM_FRAMES, check_enough, first_frame
from nnqmd_server.spectra.trajectory import Progress
from nnqmd_server.units import BOHR, DEBYE

Array = np.ndarray

DIPOLE_FORMAT = "nnqmd dipoles 1"
DIPOLE_UNIT = "e Angstrom"
DIPOLE_UNITS = {"eang": 1.0, DIPOLE_UNIT: 1.0, "debye": DEBYE, "atomic_unit": BOHR}
"""Units of a dipole in e Angstrom; "eang" is i-PI's name."""

POLARIZABILITY_UNITS = {"angstrom3": 1.0, "atomic_unit": BOHR**3}
"""Units of a polarizability volume in Angstrom^3."""

_HEAD = re.compile(r"#EXTRAS\w*\((.*)\)#\s*Step:\s*(\d+)")


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
        first = first_frame(skip, self.interval, len(self.dipole))
        return replace(self, dipole=self.dipole[first:], cell=self.cell[first:])


@dataclass(frozen=True)
class Polarizabilities:
    """Polarizabilities of the whole cell, bead by bead, at even times.

    Parameters
    ----------
    polarizability : Array
        Symmetric tensor, as a volume [Angstrom^3], shape (n_frames, n_beads, 3, 3).
    interval : float
        Time between frames [fs].
    """

    polarizability: Array
    interval: float

    @property
    def duration(self) -> float:
        """Time from the first to the last frame [fs]."""
        return (len(self.polarizability) - 1) * self.interval

    def after(self, skip: float) -> Polarizabilities:
        """The same without the first ``skip`` [fs]."""
        first = first_frame(skip, self.interval, len(self.polarizability))
        return replace(self, polarizability=self.polarizability[first:])


def read_dipoles(path: Path, timestep: float | None = None) -> Dipoles:
    """Dipoles that the force door wrote during a run, or `nnqmd dipole` after it.

    Parameters
    ----------
    path : Path
        ``dipoles.h5``; force set 0 is the initial configuration and force set k is step k.
    timestep : float
        Molecular-dynamics time step [fs]; a file of `nnqmd dipole` says its interval itself.

    Raises
    ------
    DataError
        Not such a file, no time step, another version, another unit, missing force sets, too few force sets.
    """
    import h5py

    if not path.is_file():
        raise DataError(
            f"There is no file {path}.", "Give the directory of a run whose model predicts dipoles."
        )
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
            timestep = float(file.attrs.get("interval_fs", timestep or 0.0))
            force_set, dipole, cell = (np.asarray(file[k]) for k in ("force_set", "dipole", "cell"))
    except (OSError, KeyError) as error:
        raise DataError(
            f"{path} is not a readable dipole file ({error}).",
            "If the run was killed while writing, use a copy from before, or run again.",
        ) from error
    if not timestep > 0:
        raise DataError(
            f"{path} does not say the time between its force sets.",
            "Give the folder of the run, whose input.xml says it.",
        )
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


def read_dipole_extras(
    path: str | Path,
    timestep: float,
    cell: Array,
    unit: str | None = None,
    n_beads: int | None = None,
    drop_cut: bool = False,
    progress: Progress | None = None,
) -> Dipoles:
    """Dipoles of the cell from i-PI's extras files, ``simulation.dip_00`` and so on.

    Parameters
    ----------
    path : path
        Any of the bead files, or their name without the number.
    timestep : float
        Simulation time step [fs].
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3), or (n_frames, 3, 3) when the cell changes; extras
        do not hold it.
    unit : str
        One of `DIPOLE_UNITS`: what the force side sent, which i-PI passes on as it is.
    n_beads, drop_cut, progress
        As for `trajectory.open_beads`.

    Raises
    ------
    DataError
        No unit, a missing or cut file, another number of values, uneven steps.
    """
    scale = _scale_of(path, "dipoles", unit, DIPOLE_UNITS)
    values, steps = _read_extras(Path(path), 3, n_beads, drop_cut, progress)
    cells = np.asarray(cell, dtype=float)
    if cells.shape == (3, 3):
        cells = np.broadcast_to(cells, (len(steps), 3, 3))
    if cells.shape != (len(steps), 3, 3):
        raise DataError(
            f"{len(cells)} cells were given for the {len(steps)} frames of {path}.",
            "Write cell and extras with the same stride, or give one cell.",
        )
    return Dipoles(scale * values, cells, _even_stride(steps, Path(path)) * timestep)


def read_polarizability_extras(
    path: str | Path,
    timestep: float,
    unit: str | None = None,
    n_beads: int | None = None,
    drop_cut: bool = False,
    progress: Progress | None = None,
) -> Polarizabilities:
    """Polarizabilities of the cell from i-PI's extras files: nine numbers per frame, in rows or on one line.

    Parameters and errors as for `read_dipole_extras`; ``unit`` is one of `POLARIZABILITY_UNITS`. The
    tensor is symmetrised; a large antisymmetric part is an error, since then the order must be wrong.
    """
    scale = _scale_of(path, "polarizabilities", unit, POLARIZABILITY_UNITS)
    values, steps = _read_extras(Path(path), 9, n_beads, drop_cut, progress)
    tensors = scale * values.reshape(*values.shape[:2], 3, 3)
    turned = tensors.transpose(0, 1, 3, 2)
    if np.abs(tensors - turned).max() > 0.05 * np.abs(tensors).max():
        raise DataError(
            f"The polarizabilities in {path} are not symmetric.", "Nine numbers xx xy xz yx ... are expected."
        )
    return Polarizabilities(0.5 * (tensors + turned), _even_stride(steps, Path(path)) * timestep)


def _scale_of(path: str | Path, what: str, unit: str | None, known: dict[str, float]) -> float:
    if unit in known:
        return known[unit]
    said = f"The unit {unit!r} is not known for" if unit else f"{path} does not say the unit of"
    raise DataError(
        f"{said} its {what}: i-PI writes extras as the force side sent them.",
        f"Say it with unit= (--unit), one of {', '.join(known)}.",
    )


def _read_extras(
    path: Path, width: int, n_beads: int | None, drop_cut: bool, progress: Progress | None
) -> tuple[Array, Array]:
    files = (
        [path]
        if path.is_file() and n_beads in (None, 1) and bead_number(path) is None
        else bead_files(path, n_beads)
    )
    series, known = [], None
    for k, file in enumerate(files):
        steps, values = _read_one(file, width, drop_cut)
        if known is not None and (len(steps) != len(known) or (steps != known).any()):
            raise DataError(
                f"{file} has {len(steps)} frames at other steps than {files[0]} with {len(known)}.",
                "All bead files must be of one run; if it was killed, cut all of them to the same length.",
            )
        known = steps
        series.append(values)
        if progress is not None:
            progress((k + 1) / len(files))
    assert known is not None
    check_enough(path, len(known))
    return np.stack(series, axis=1), known


def _read_one(path: Path, width: int, drop_cut: bool) -> tuple[Array, Array]:
    steps: list[int] = []
    rows: list[list[float]] = []
    whole = True
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            whole = line.endswith("\n")
            head = _HEAD.search(line)
            if head and whole:
                _check_row(rows, width, path)
                steps.append(int(head[2]))
                rows.append([])
            elif line.strip() and whole:
                try:
                    rows[-1].extend(float(word) for word in line.split())
                except (ValueError, IndexError) as error:
                    raise DataError(
                        f"Frame {max(0, len(rows) - 1)} of {path} is not made of numbers: "
                        f"{line.strip()[:40]!r}.",
                        "Write one numerical property, such as "
                        "<trajectory filename='dip' extra_type='dipole'> extras </trajectory>.",
                    ) from error
    if rows and (not whole or len(rows[-1]) < width):
        if not drop_cut:
            raise DataError(
                f"Frame {len(rows) - 1} of {path}, the last one, is cut off: the run was stopped there.",
                "Leave it out with drop_cut=True (--drop-cut), or use the output of a run that ended.",
            )
        rows.pop()
        steps.pop()
    _check_row(rows, width, path)
    values = np.array(rows, dtype=float).reshape(-1, width)
    _check_finite(values, path)
    return np.array(steps, dtype=np.int64), values


def _check_row(rows: list[list[float]], width: int, path: Path) -> None:
    if rows and len(rows[-1]) != width:
        raise DataError(
            f"Frame {len(rows) - 1} of {path} has {len(rows[-1])} numbers, not {width}.",
            "Give the extras of the whole cell: 3 numbers for a dipole, 9 for a polarizability.",
        )


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
