"""The cell of which supercells are made."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.geometry import cellpar_to_cell
from ase.io import read

from nnqmd_server.errors import InputError

_CELL = re.compile(r"CELL\(abcABC\):((?:\s+[-+.\deE]+){6})")


def read_structure(source: str) -> Atoms:
    """Read a periodic structure.

    Parameters
    ----------
    source : str
        A file that ASE reads, ``FILE@INDEX`` for one frame of several (the first unless given), or an xyz
        file whose comment has i-PI's ``CELL(abcABC)`` in Angstrom.

    Raises
    ------
    InputError
        It is missing, unreadable, or not periodic in all directions.
    """
    name, at, index = source.rpartition("@")
    name, index = (name, index) if at and re.fullmatch(r"-?\d+", index) else (source, "0")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"There is no structure file {path}.", "Check the path.")
    try:
        atoms = read(path, int(index), parallel=False)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as a structure: {error}.", "Give a file that ASE reads."
        ) from error
    if not atoms.cell.rank and path.suffix == ".xyz":
        with path.open() as file:
            comment = [file.readline() for _ in range(2)][1]
        if found := _CELL.search(comment):
            atoms.set_cell(cellpar_to_cell([float(x) for x in found[1].split()]))
            atoms.pbc = True
    if atoms.cell.rank < 3 or not atoms.pbc.all():
        raise InputError(
            f"{path} has no periodic cell.", "Give one in the file: extended xyz with Lattice, cif, POSCAR."
        )
    return Atoms(atoms.numbers, np.array(atoms.positions), cell=atoms.cell, pbc=True)
