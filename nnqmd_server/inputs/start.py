"""The structure that a command is given: a file that ASE or i-PI reads, or an i-PI input."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnqmd_server.doors.template import to_numbers
from nnqmd_server.errors import InputError
from nnqmd_server.inputs.xml import describe, parse
from nnqmd_server.structures import Structures, from_ase

if TYPE_CHECKING:
    from ase import Atoms

_FIX = "Give a file that ASE reads (extxyz, cif, POSCAR ...), i-PI's own xyz or pdb, or an i-PI input (xml)."


@dataclass(frozen=True)
class Start:
    """A structure, and what an i-PI input says besides; None where a structure file cannot tell.

    ``structure`` is one of :class:`~nnqmd_server.structures.Structures`; ``timestep`` in fs, ``temperature``
    in K.
    """

    structure: Structures
    n_beads: int | None = None
    timestep: float | None = None
    temperature: float | None = None


def read_start(path: str | Path) -> Start:
    """Read a structure.

    Parameters
    ----------
    path : str or Path
        A structure file, of which the last frame is taken, or an i-PI input with the file that
        initialises its first system.

    Raises
    ------
    InputError
        The file is missing, cannot be read, holds no elements or no cell.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no structure {path}.", _FIX)
    if path.suffix == ".xml":
        root = parse(path)
        plan = describe(root, path)
        system = root.find("system")
        for file in [] if system is None else system.iter("file"):
            name, mode = (file.text or "").strip(), file.get("mode", "").strip()
            if mode in {"xyz", "pdb", "ase"} and name:
                structure = read_structure(path.resolve().parent / name)
                return Start(structure, plan.n_beads, plan.timestep, plan.temperature)
        raise InputError(
            f"{path} names no structure file (<initialize><file mode='xyz'>).",
            "Give the structure itself, and --beads, --timestep and --temperature.",
        )
    return Start(read_structure(path))


def read_structure(path: Path) -> Structures:
    """The last frame of a structure file, i-PI's own or any that ASE reads; see :func:`read_start`."""
    if not path.is_file():
        raise InputError(f"There is no structure {path}.", _FIX)
    try:
        atoms = _from_ipi(path) if _is_ipi(path) else _from_ase(path)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - ASE has hundreds of readers, each with errors of its own
        # Cut by letters: what ASE says of a binary file may hold all of it.
        said = f"{error.__class__.__name__}: {str(error)[:300]}"
        raise InputError(f"{path} is not a structure: {said}.", _FIX) from None
    if not len(atoms):
        raise InputError(f"{path} holds no atoms.", _FIX)
    if not (atoms.numbers > 0).all():
        raise InputError(f"{path} holds X, a place without an atom.", "Take it out.")
    if not np.isfinite(atoms.positions).all():
        raise InputError(f"{path} has positions that are not numbers.", "Correct them.")
    if atoms.pbc.any() and np.linalg.det(atoms.cell.array) == 0:
        raise InputError(f"{path} is periodic but its cell has no volume.", "Correct the cell.")
    return from_ase([atoms])


def _is_ipi(path: Path) -> bool:
    """Whether the comment of an xyz or pdb file has i-PI's cell, which other readers do not see."""
    if path.suffix not in {".xyz", ".pdb"}:
        return False
    with path.open(errors="replace") as file:
        return re.search(r"CELL *[({]", file.readline(1000) + file.readline(1000)) is not None


def _from_ase(path: Path) -> Atoms:
    from ase.io import read

    # In an MPI job ASE would wait for all ranks to read with it.
    return read(path, parallel=False)


def _from_ipi(path: Path) -> Atoms:
    from ase import Atoms
    from ipi.utils.io import iter_file
    from ipi.utils.units import unit_to_user

    with path.open() as file:
        frame = None
        for frame in iter_file(path.suffix[1:], file):  # noqa: B007 - the last one counts
            pass
    if frame is None:
        raise InputError(f"{path} holds no atoms.", _FIX)
    numbers = to_numbers([str(name) for name in frame["atoms"].names], path)
    # i-PI's own conversion, so that what the file says in Angstrom comes out again.
    positions = unit_to_user("length", "angstrom", frame["atoms"].q.reshape(-1, 3))
    cell = unit_to_user("length", "angstrom", frame["cell"].h.T)
    return Atoms(numbers=numbers, positions=positions, cell=cell, pbc=True)
