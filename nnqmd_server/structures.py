"""Structures and Results: the one noun that flows through the house.

Both are ragged batches: structures of different size stand one behind another, and
``offsets`` says where each begins. eV and Angstrom, float64 and numpy at every border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nnqmd_server.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

Array = np.ndarray


@dataclass(frozen=True)
class Structures:
    """A ragged batch of periodic structures (see :func:`from_ase` for others).

    Parameters
    ----------
    numbers : Array
        Atomic numbers, int64, shape (n_atoms,).
    positions : Array
        Unwrapped Cartesian positions [Angstrom], float64, shape (n_atoms, 3).
    cells : Array
        Cell vectors as rows [Angstrom], float64, shape (n_structures, 3, 3).
    offsets : Array
        Structure ``k`` owns atoms ``offsets[k]:offsets[k + 1]``; int64, shape (n_structures + 1,).
    """

    numbers: Array
    positions: Array
    cells: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def n_atoms(self) -> int:
        """Atoms of all structures together."""
        return len(self.numbers)

    @property
    def volumes(self) -> Array:
        """Cell volumes [Angstrom^3], shape (n_structures,)."""
        return np.abs(np.linalg.det(self.cells))

    def atoms_of(self, k: int) -> slice:
        """Where the atoms of structure ``k`` stand."""
        return slice(int(self.offsets[k]), int(self.offsets[k + 1]))

    def __getitem__(self, part: slice) -> Structures:
        """A run of neighbouring structures, as views (no copy)."""
        first, last, step = part.indices(len(self))
        if step != 1:
            raise IndexError("structures are taken in runs: step must be 1")
        last = max(first, last)
        low, high = int(self.offsets[first]), int(self.offsets[last])
        return Structures(
            self.numbers[low:high],
            self.positions[low:high],
            self.cells[first:last],
            self.offsets[first : last + 1] - low,
        )


def replicas(numbers: Array, positions: Array, cells: Array) -> Structures:
    """Structures of equal size, such as the beads of a ring polymer.

    Parameters
    ----------
    numbers : Array
        Atomic numbers of one structure, shape (n,).
    positions : Array
        Positions [Angstrom], shape (n_structures, n, 3).
    cells : Array
        Cell vectors as rows [Angstrom], shape (n_structures, 3, 3).
    """
    count, n = positions.shape[:2]
    return Structures(
        np.tile(np.asarray(numbers, dtype=np.int64), count),
        np.ascontiguousarray(positions, dtype=np.float64).reshape(count * n, 3),
        np.ascontiguousarray(cells, dtype=np.float64).reshape(count, 3, 3),
        np.arange(count + 1, dtype=np.int64) * n,
    )


def concatenate(parts: Sequence[Structures]) -> Structures:
    """Batches one behind another, in the order given; one batch is not copied."""
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    return Structures(
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.cells for part in parts]),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def plain(structures: Structures) -> Structures:
    """The same structures as arrays that compiled code can read: float64 and int64, native, C-contiguous.

    Arrays that are so already are not copied.
    """
    return Structures(
        np.ascontiguousarray(structures.numbers, dtype=np.int64),
        np.ascontiguousarray(structures.positions, dtype=np.float64),
        np.ascontiguousarray(structures.cells, dtype=np.float64),
        np.ascontiguousarray(structures.offsets, dtype=np.int64),
    )


VACUUM = 50.0
"""Free space along directions that are not periodic [Angstrom]; wider than any cutoff."""


def from_ase(frames: Sequence[Atoms]) -> Structures:
    """Structures from ASE atoms.

    Structures are periodic. Directions in which ASE's are not get cell vectors across the periodic ones that
    leave at least :data:`VACUUM` between images: no atom has a neighbour there, so nothing is approximated.

    Parameters
    ----------
    frames : sequence of Atoms
        Molecules, chains, slabs and crystals, mixed as they come.

    Raises
    ------
    InputError
        A periodic direction has no cell vector, or the periodic cell vectors are parallel.
    """
    counts = [len(frame) for frame in frames]
    return Structures(
        np.concatenate([frame.numbers for frame in frames]).astype(np.int64),
        np.concatenate([frame.positions for frame in frames]).astype(np.float64),
        np.array([_whole_cell(f.cell.array, f.pbc, f.positions) for f in frames], dtype=np.float64),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _whole_cell(cell: Array, periodic: Array, positions: Array) -> Array:
    """The cell with long vectors in the directions that are not periodic, across those that are."""
    given = cell[periodic]
    # Rows of a full orthogonal basis: first those that span the periodic vectors, then those across them.
    _, lengths, basis = np.linalg.svd(given)
    if len(given) and lengths.min() < 1e-6:
        raise InputError(
            "A structure is periodic in a direction in which its cell has no vector of its own.",
            "Give the cell, or say in which directions it is periodic (pbc='T T F' in extxyz).",
        )
    if periodic.all():
        return cell
    whole = np.array(cell)
    across = basis[len(given) :]
    # Rounded up, so that the cell stays the same while the atoms move.
    extents = np.ptp(positions @ across.T, axis=0) if len(positions) else np.zeros(len(across))
    whole[~periodic] = across * (VACUUM * (np.ceil(extents / VACUUM) + 1))[:, None]
    return whole


@dataclass(frozen=True)
class Results:
    """What a potential says about a batch of structures.

    Parameters
    ----------
    energy : Array
        Potential energy [eV], shape (n_structures,).
    forces : Array
        Forces [eV/Angstrom], shape (n_atoms, 3).
    virial : Array
        Virial = -stress * volume [eV], shape (n_structures, 3, 3).
    properties : dict of Array
        Further properties of whole structures, each (n_structures, ...); ``dipole`` is in e Angstrom.
    atom_properties : dict of Array
        Further properties of atoms, each (n_atoms, ...); ``wannier_centroid`` is in Angstrom.
    """

    energy: Array
    forces: Array
    virial: Array
    properties: dict[str, Array] = field(default_factory=dict)
    atom_properties: dict[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.energy)


def join(parts: Sequence[Results]) -> Results:
    """Results of consecutive batches as one, in the order given."""
    if len(parts) == 1:
        return parts[0]
    return Results(
        np.concatenate([p.energy for p in parts]),
        np.concatenate([p.forces for p in parts]),
        np.concatenate([p.virial for p in parts]),
        {k: np.concatenate([p.properties[k] for p in parts]) for k in parts[0].properties},
        {k: np.concatenate([p.atom_properties[k] for p in parts]) for k in parts[0].atom_properties},
    )
