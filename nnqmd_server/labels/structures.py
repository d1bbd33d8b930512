"""Structures to label: i-PI's trajectories and bead files, or whatever ASE reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from ase.io.formats import UnknownFileTypeError

from nnqmd_server.errors import DataError
from nnqmd_server.labels.frames import GROUP, SOURCE
from nnqmd_server.spectra.readers.opening import open_source
from nnqmd_server.spectra.readers.units import factor, quantity_of

_BEAD = re.compile(r"(.+)_(\d+)")
_MOST = 1_000_000
"""Frames at once: everything stays in memory, about 1 kB per atom."""


def read_structures(paths: Sequence[Path], skip: int = 0, every: int = 1, group: str = "") -> list[Atoms]:
    """Structures of some files, each with the run that it belongs to and a name.

    Bead files (``simulation.pos_0.xyz``, ``simulation.pos_1.xyz``, ...) are one run, named after its folder
    and in the order of time, so that a split in time keeps the beads of a step together.

    Parameters
    ----------
    paths : sequence of Path
        i-PI's xyz (units as its comment lines say), or any format of ASE.
    skip : int
        Frames at the beginning of every file to leave out.
    every : int
        Take every n-th frame of what is left.
    group : str
        Name of the run; by default the frames' own ``config_type``, or that of the file.

    Raises
    ------
    DataError
        A file cannot be read, has no cell, or nothing is left.
    """
    found: list[tuple[int, int, Atoms]] = []
    runs: dict[str, int] = {}
    taken: dict[str, Path] = {}
    for path in paths:
        of_ipi = _is_ipi(path)
        frames = _ipi(path) if of_ipi else _ase(path)
        run = _run_name(path, of_ipi, taken)
        for number in range(skip, len(frames), every):
            atoms = frames[number]
            name = group or str(atoms.info.get(GROUP, run))
            if atoms.cell.rank < 3 or not atoms.pbc.all():
                raise DataError(
                    f"Frame {number} (counted from 0) of {path} has no periodic cell.",
                    "Put molecules into a periodic box; training needs a cell for stress.",
                )
            if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
                raise DataError(
                    f"Frame {number} (counted from 0) of {path} holds positions that are not finite.",
                    "The run has failed there: leave these frames out.",
                )
            plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
            own = f"{run}_{path.stem}" if of_ipi else path.stem
            plain.info = {GROUP: name, SOURCE: str(atoms.info.get(SOURCE, f"{own}_f{number:06d}"))}
            found.append((runs.setdefault(name, len(runs)), number, plain))
            if len(found) > _MOST:
                raise DataError(f"More than {_MOST} frames were given.", "Take fewer with --every.")
    if not found:
        raise DataError("No frames are left to label.", "Lower --skip and --every, or give other files.")
    found.sort(key=lambda item: item[:2])  # stable: beads of a step stay in the order of the files
    return [atoms for _, _, atoms in found]


def _run_name(path: Path, of_ipi: bool, taken: dict[str, Path]) -> str:
    """The folder of an i-PI run, which all its beads share; otherwise the name of the file."""
    bead = _BEAD.fullmatch(path.stem)
    folder = path.resolve().parent
    name = folder.name if of_ipi else path.stem
    home = folder / (bead[1] if of_ipi and bead else path.stem)
    if taken.setdefault(name, home) != home:
        # another file of this name, or another output of this run
        name = f"{folder.name}_{home.name}"
        taken.setdefault(name, home)
    return name


def _is_ipi(path: Path) -> bool:
    if path.suffix == ".h5":
        return True
    try:
        with path.open("rb") as stream:
            head = stream.read(4096).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error
    return len(head) > 1 and ("CELL{" in head[1] or "CELL(" in head[1])


def _ipi(path: Path) -> list[Atoms]:
    source = open_source(path, "", "", (), drop_cut=False)
    if quantity_of(source, "") not in {"positions", "x_centroid"}:
        raise DataError(f"{path} holds {source.quantity}, not positions.", "Give a trajectory of positions.")
    scale = factor(path, source.quantity, "positions", source.unit, "", "unit")
    frames: list[Atoms] = []
    for block in source.frames(100, None):
        if block.cells is None:
            raise DataError(f"{path} has no cell.", "Use i-PI's positions{angstrom} with their cell.")
        lattice = block.cells * factor(path, "cell", "positions", source.cell_unit, "", "cell_unit")
        for beads, cell in zip(block.values * scale, lattice, strict=True):
            frames.extend(Atoms(source.symbols, bead, cell=cell, pbc=True) for bead in beads)
    return frames


def _ase(path: Path) -> list[Atoms]:
    try:
        return list(read(path, ":", parallel=False))
    except (ValueError, KeyError, IndexError, OSError, UnknownFileTypeError, SyntaxError) as error:
        raise DataError(
            f"{path} cannot be read as structures: {error}.",
            "Give extxyz, an i-PI trajectory, or a file whose format ASE sees from its name.",
        ) from error
