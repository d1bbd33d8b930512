"""From Wannier centroids to molecular and total dipoles."""

from __future__ import annotations

import numpy as np
from ase.data import atomic_numbers

from nnqmd_server.structures import Array, Structures

_PAIRS = 1_000_000
"""Pairs of atoms whose distances are in memory at once, about 100 MB: large structures have many."""


def _of_elements(values: dict[str, float], numbers: Array) -> Array:
    table = np.zeros(119)
    for symbol, value in values.items():
        table[atomic_numbers[symbol]] = value
    return table[numbers]


def is_head(numbers: Array, carriers: dict[str, float]) -> Array:
    """Which atoms have a molecule about them: carriers, but for hydrogen that stands beside heavy ones."""
    heavy = {symbol: count for symbol, count in carriers.items() if symbol != "H"}
    return _of_elements(heavy or carriers, numbers) != 0


def molecular_dipoles(
    numbers: Array,
    positions: Array,
    cell: Array,
    centroids: Array,
    ion_charges: dict[str, float],
    carriers: dict[str, float],
) -> tuple[Array, Array]:
    """Dipole and charge of every molecule of one structure.

    A molecule is a carrier atom (the N of ammonia) with all atoms that are nearest to it, taken
    through the minimum image, so molecules that cross the cell boundary stay whole. The dipole is
    taken about the carrier atom: mu = sum_i (Z_i - n_i) (r_i - r_N) - n_i w_i. Hydrogen that carries the
    centre of its bond belongs to the molecule of the heavy carrier that is nearest.

    Parameters
    ----------
    numbers : Array
        Atomic numbers, shape (n,).
    positions : Array
        Positions [Angstrom], shape (n, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    centroids : Array
        Mean of the Wannier centres of each carrier minus the carrier's position [Angstrom], shape
        (n, 3); rows of other atoms do not count.
    ion_charges : dict
        Charge of each element's ion core [e].
    carriers : dict
        Electrons that the centroid of each carrier element stands for.

    Returns
    -------
    dipoles : Array
        [e Angstrom], shape (n_molecules, 3).
    charges : Array
        Net charge of each molecule [e], shape (n_molecules,); zero unless a proton has moved over.
    """
    electrons = _of_elements(carriers, numbers)
    charge = _of_elements(ion_charges, numbers) - electrons
    at = np.flatnonzero(is_head(numbers, carriers))
    others = np.setdiff1d(np.arange(len(numbers)), at)
    clouds = -electrons[:, None] * np.where(electrons[:, None] != 0, centroids, 0.0)
    dipoles = clouds[at]
    charges = charge[at]
    if len(others) and len(at):
        for some in np.array_split(others, -(-len(others) * len(at) // _PAIRS)):
            apart = positions[some][:, None, :] - positions[at][None, :, :]
            apart -= np.round(apart @ np.linalg.inv(cell)) @ cell
            home = np.argmin(np.einsum("ijk,ijk->ij", apart, apart), axis=1)
            arms = apart[np.arange(len(some)), home]
            np.add.at(dipoles, home, charge[some, None] * arms + clouds[some])
            np.add.at(charges, home, charge[some])
    return dipoles, charges


def total_dipoles(
    structures: Structures, centroids: Array, ion_charges: dict[str, float], carriers: dict[str, float]
) -> Array:
    """Total dipole of every structure [e Angstrom], shape (n_structures, 3).

    The sum of the molecular dipoles, plus q R for a molecule that carries a net charge q: together
    sum_i Z_i R_i - sum_w 2 r_w on unwrapped positions, up to a constant of whole lattice vectors that
    keeps each molecule in one piece.
    """
    count = len(structures)
    totals = np.zeros((count, 3))
    alike = count > 1 and len(set(np.diff(structures.offsets).tolist())) == 1
    if alike:
        rows = structures.numbers.reshape(count, -1)
        alike = bool((rows == rows[0]).all())
    for first, last in [(0, count)] if alike else [(k, k + 1) for k in range(count)]:
        low, high = int(structures.offsets[first]), int(structures.offsets[last])
        shape = last - first, -1, 3
        totals[first:last] = _totals(
            structures.numbers[structures.atoms_of(first)],
            structures.positions[low:high].reshape(shape),
            structures.cells[first:last],
            centroids[low:high].reshape(shape),
            ion_charges,
            carriers,
        )
    return totals


def _totals(
    numbers: Array,
    positions: Array,
    cells: Array,
    centroids: Array,
    ion_charges: dict[str, float],
    carriers: dict[str, float],
) -> Array:
    """Of structures with the same atoms; positions and centroids of shape (n_structures, n, 3).

    The same sum as that over molecules, but every atom is only put beside the head of its molecule.
    """
    electrons = _of_elements(carriers, numbers)
    charge = _of_elements(ion_charges, numbers) - electrons
    heads = is_head(numbers, carriers)
    at, others = np.flatnonzero(heads), np.flatnonzero(~heads)
    if not len(at):
        return np.zeros((len(positions), 3))
    bound = np.flatnonzero(electrons)
    totals = np.einsum("i,pia->pa", charge[at], positions[:, at])
    totals -= np.einsum("i,pia->pa", electrons[bound], centroids[:, bound])
    inverses = np.linalg.inv(cells)
    each = max(1, _PAIRS // len(positions) // len(at))
    for first in range(0, len(others), each):
        some = others[first : first + each]
        apart = positions[:, some, None, :] - positions[:, None, at, :]
        flat = apart.reshape(len(positions), -1, 3)
        flat -= np.round(flat @ inverses) @ cells
        home = np.argmin(np.einsum("pija,pija->pij", apart, apart), axis=2)
        arms = np.take_along_axis(apart, home[:, :, None, None], axis=2)[:, :, 0]
        beside = np.take_along_axis(positions[:, at], home[:, :, None], axis=1) + arms
        totals += np.einsum("i,pia->pa", charge[some], beside)
    return totals


def obey_sum_rule(charges: Array, offsets: Array, total: Array) -> Array:
    """Born charges that add up to the charge of each structure to the last bit or so (acoustic sum rule).

    Centroids do not change when all atoms move together, so the sum holds but for round-off: a network in
    single precision leaves 1e-6 e per atom, and i-PI refuses more than 1e-8: the rest is taken from all
    atoms alike.

    Parameters
    ----------
    charges : Array
        [e], shape (n_atoms, 3, 3).
    offsets : Array
        Structure ``k`` owns atoms ``offsets[k]:offsets[k + 1]``.
    total : Array
        Charge of each structure [e], shape (n_structures,).
    """
    counts = np.diff(offsets)
    sums = np.add.reduceat(charges, offsets[:-1], axis=0)
    surplus = (sums - total[:, None, None] * np.eye(3)) / counts[:, None, None]
    return charges - np.repeat(surplus, counts, axis=0)


def structure_charges(
    structures: Structures, ion_charges: dict[str, float], carriers: dict[str, float]
) -> Array:
    """Charge of every structure [e]: ion cores less the electrons of the carriers, shape (n_structures,)."""
    charge = _of_elements(ion_charges, structures.numbers) - _of_elements(carriers, structures.numbers)
    return np.add.reduceat(charge, structures.offsets[:-1])
