"""LAMMPS text dumps (``dump custom``), positions or velocities.

A dump says its unit style only after ``dump_modify ... units yes`` and its time only after
``dump_modify ... time yes``; without them the caller must say so. Atoms are put in the order of their
ids, which LAMMPS itself changes from frame to frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.readers.numbers import words_to_table
from nnqmd_server.spectra.readers.source import (
    Array,
    Frames,
    Source,
    cut_frame,
    empty_file,
    not_a_frame,
    other_contents,
)
from nnqmd_server.units import BOHR

# docs.lammps.org/units.html: length [Angstrom], time [fs], and the unit of a velocity's time [fs]
STYLES = {
    "metal": (1.0, 1e3, 1e3),
    "real": (1.0, 1.0, 1.0),
    "electron": (BOHR, 1.0, 1.03275),
    "si": (1e10, 1e15, 1e15),
    "cgs": (1e8, 1e15, 1e15),
    "micro": (1e4, 1e9, 1e9),
    "nano": (10.0, 1e6, 1e6),
}
"""Length, time, and the time in a velocity, of LAMMPS' unit styles in Angstrom and fs."""

_POSITIONS = {"unwrapped": ("xu", "yu", "zu"), "scaled": ("xsu", "ysu", "zsu"), "wrapped": ("x", "y", "z")}
_WRAPPED_SCALED = ("xs", "ys", "zs")
_IMAGES = ("ix", "iy", "iz")
_VELOCITIES = ("vx", "vy", "vz")


@dataclass(frozen=True)
class _Frame:
    step: int
    time: float | None
    units: str
    cell: Array
    origin: Array
    names: tuple[str, ...]
    rows: list[str]
    whole: bool


def open_lammps(
    path: Path,
    quantity: str = "",
    unit: str = "",
    symbols: tuple[str, ...] = (),
    drop_cut: bool = False,
) -> Source:
    """Open a dump; velocities unless ``quantity`` says positions or only positions are there.

    Parameters
    ----------
    path : Path
        The file.
    quantity : str
        "positions", "velocities" or "" for what there is.
    unit : str
        LAMMPS' unit style, where the file does not say it.
    symbols : tuple of str
        Element of type 1, 2, ..., where the file has no column ``element``.
    drop_cut : bool
        Leave out a last frame that is cut off.
    """
    with path.open(encoding="utf-8", errors="replace") as stream:
        first, second = _read(stream, path, 0), None
        if first is None:
            raise empty_file(path)
        if not first.whole:
            raise empty_file(path, "its first frame is cut off") if drop_cut else cut_frame(path, 0)
        about = round(path.stat().st_size / stream.tell())
        second = _read(stream, path, 1)
    style = _style(path, first.units, unit)
    length, time, velocity_time = STYLES[style]
    has_velocities = set(_VELOCITIES) <= set(first.names)
    quantity = quantity or ("velocities" if has_velocities else "positions")
    if quantity not in ("positions", "velocities"):
        raise DataError(
            f"{path} is a LAMMPS dump, which has no {quantity!r}.",
            "Ask for 'positions' or 'velocities' (--quantity).",
        )
    names = _VELOCITIES if quantity == "velocities" else _position_columns(path, first.names)
    if not set(names) <= set(first.names):
        raise DataError(
            f"{path} has no columns {' '.join(names)}, only {' '.join(first.names)}.",
            "Add them to the dump command (dump custom ... id element xu yu zu vx vy vz).",
        )
    labels = _labels(path, first, symbols)
    interval = None
    if first.time is not None and second is not None and second.time is not None:
        interval = (second.time - first.time) * time
    factor = length / velocity_time if quantity == "velocities" else length
    warnings: list[str] = []
    frames = partial(_frames, path, first, names, labels, symbols, factor, length, drop_cut, warnings)
    return Source(
        path,
        labels,
        quantity,
        # scaled here, since the style is the unit of everything at once
        "angstrom/fs" if quantity == "velocities" else "angstrom",
        "angstrom",
        frames,
        True,
        warnings,
        about=about,
        interval=interval,
        scaled=True,
    )


def _style(path: Path, said: str, given: str) -> str:
    if said and given and said != given:
        raise DataError(
            f"{path} says its units are {said!r}, but {given!r} was asked for.",
            "Leave out unit= (--unit): the file knows.",
        )
    style = said or given
    if style not in STYLES:
        what = (
            f"The unit style {style!r} of {path} is not known" if style else f"{path} does not say its units"
        )
        raise DataError(
            f"{what}.",
            f"Give the `units` of the LAMMPS input with unit= (--unit), one of {', '.join(STYLES)}, "
            "or write them with `dump_modify ID units yes`.",
        )
    return style


def _position_columns(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    for columns in _POSITIONS.values():
        if set(columns) <= set(names):
            return columns
    if set(_WRAPPED_SCALED) <= set(names):
        return _WRAPPED_SCALED
    raise DataError(
        f"{path} holds neither positions nor velocities, only {' '.join(names)}.",
        "Add xu yu zu or vx vy vz to the dump command.",
    )


def _labels(path: Path, frame: _Frame, symbols: tuple[str, ...]) -> tuple[str, ...]:
    _, words, _ = _table(frame, (0,), path, 0)
    width = len(frame.names)
    order = _order(frame, words, path, 0)
    if "element" in frame.names:
        labels = words[frame.names.index("element") :: width]
    elif "type" in frame.names and symbols:
        kinds = [int(k) for k in words[frame.names.index("type") :: width]]
        if max(kinds) > len(symbols) or min(kinds) < 1:
            raise DataError(
                f"{path} has atoms of type {max(kinds)}, but symbols names only {len(symbols)} elements.",
                "Name the element of every type, in order, with symbols= (--symbols).",
            )
        labels = [symbols[k - 1] for k in kinds]
    else:
        raise DataError(
            f"{path} does not say which elements its atoms are.",
            "Name the element of every LAMMPS type, in order, with symbols= (--symbols O,H), or write them "
            "with `dump_modify ID element O H` and a column `element`.",
        )
    return tuple(labels[k] for k in order)


def _order(frame: _Frame, words: list[str], path: Path, number: int) -> Array:
    if "id" not in frame.names:
        raise DataError(
            f"{path} has no column 'id', so its atoms may be in another order in every frame.",
            "Add id to the dump command.",
        )
    ids = np.array(words[frame.names.index("id") :: len(frame.names)], dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    if (np.diff(ids[order]) == 0).any():
        raise not_a_frame(path, number, "a LAMMPS", "an id appears twice")
    return order


def _table(
    frame: _Frame, columns: tuple[int, ...], path: Path, number: int
) -> tuple[int, list[str], Array | None]:
    text = "".join(frame.rows)
    try:
        if columns == (0,):
            words = text.split()
            if len(words) != len(frame.rows) * len(frame.names):
                raise ValueError(f"{len(words)} words on {len(frame.rows)} lines")
            return len(frame.names), words, None
        width, words, table = words_to_table(text, len(frame.rows), columns)
        if width != len(frame.names):
            raise ValueError(f"{width} words on a line, but {len(frame.names)} columns")
    except ValueError as error:
        raise not_a_frame(path, number, "a LAMMPS", str(error)) from error
    return width, words, table


def _frames(
    path: Path,
    first: _Frame,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    symbols: tuple[str, ...],
    factor: float,
    length: float,
    drop_cut: bool,
    warnings: list[str],
    n: int,
    atoms: Array | None,
) -> Iterator[Frames]:
    size = max(1, path.stat().st_size)
    count = 0
    has_images = set(_IMAGES) <= set(first.names) and names in (_POSITIONS["wrapped"], _WRAPPED_SCALED)
    wanted = (*names, *_IMAGES) if has_images else names
    columns = tuple(first.names.index(c) for c in wanted)
    with path.open(encoding="utf-8", errors="replace") as stream:
        while frame := _read(stream, path, count):
            if not frame.whole:
                if not drop_cut:
                    raise cut_frame(path, count)
                warnings.append(f"the last frame of {path.name} is cut off and was left out")
                return
            if frame.names != first.names or frame.units != first.units:
                raise other_contents(path, count, " ".join(frame.names), " ".join(first.names))
            _, words, table = _table(frame, columns, path, count)
            assert table is not None
            order = _order(frame, words, path, count)
            if len(order) != len(labels) or (count and _labels(path, frame, symbols) != labels):
                raise other_contents(path, count, f"{len(order)} atoms", f"{len(labels)} atoms, by label")
            table = table[order]
            values = table[:, :3]
            if names in (_POSITIONS["scaled"], _WRAPPED_SCALED):
                values = frame.origin + values @ frame.cell
            if has_images:
                values = values + table[:, 3:] @ frame.cell
            count += 1
            yield Frames(
                factor * (values if atoms is None else values[atoms])[None, None],
                np.array([frame.step], dtype=np.int64),
                length * frame.cell[None],
                stream.tell() / size,
            )


def _read(stream: TextIO, path: Path, number: int) -> _Frame | None:
    step, time, units, n_atoms = None, None, "", None
    cell, origin = np.zeros((3, 3)), np.zeros(3)
    line = stream.readline()
    if not line.strip():
        return None
    try:
        while not line.startswith("ITEM: ATOMS"):
            if not line.endswith("\n"):
                return _Frame(0, None, "", cell, origin, (), [], False)
            if line.startswith("ITEM: TIMESTEP"):
                step = int(stream.readline())
            elif line.startswith("ITEM: TIME"):
                time = float(stream.readline())
            elif line.startswith("ITEM: UNITS"):
                units = stream.readline().strip()
            elif line.startswith("ITEM: NUMBER OF ATOMS"):
                n_atoms = int(stream.readline())
            elif line.startswith("ITEM: BOX BOUNDS"):
                cell, origin = _box(line, [stream.readline() for _ in range(3)])
            else:
                raise not_a_frame(path, number, "a LAMMPS", f"the line {line.strip()[:40]!r}")
            line = stream.readline()
    except (ValueError, IndexError) as error:
        if not stream.readline():
            return _Frame(0, None, "", cell, origin, (), [], False)
        raise not_a_frame(path, number, "a LAMMPS", str(error)) from error
    if step is None or n_atoms is None or n_atoms < 1:
        raise not_a_frame(path, number, "a LAMMPS", "no TIMESTEP or no atoms")
    names = tuple(line.split()[2:])
    rows = [stream.readline() for _ in range(n_atoms)]
    return _Frame(step, time, units, cell, origin, names, rows, rows[-1].endswith("\n"))


def _box(header: str, lines: list[str]) -> tuple[Array, Array]:
    """Cell vectors as rows and the origin; a tilted box has its bounds around the whole parallelepiped."""
    words = header.split()
    bounds = np.array([[float(x) for x in line.split()] for line in lines])
    if "abc" in words:  # general triclinic: each line is a cell vector and a coordinate of the origin
        return bounds[:, :3], bounds[:, 3]
    if bounds.shape == (3, 2):
        return np.diag(bounds[:, 1] - bounds[:, 0]), bounds[:, 0]
    xy, xz, yz = bounds[:, 2]
    low = bounds[:, 0] - np.array([min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0])
    high = bounds[:, 1] - np.array([max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0])
    size = high - low
    return np.array([[size[0], 0, 0], [xy, size[1], 0], [xz, yz, size[2]]]), low
