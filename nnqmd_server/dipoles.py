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
    taken about the carrier atom: mu = sum_i Z_i (r_i - r_N) - n_e w_N.

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
        (n, 3); rows of other atoms are not read.
    ion_charges : dict
        Charge of each element's ion core [e].
    carriers : dict
        Electrons that the centroid of each carrier element stands for.

    Returns
    -------
    dipoles : Array
        [e Angstrom], shape (n_carriers, 3).
    charges : Array
        Net charge of each molecule [e], shape (n_carriers,); zero unless a proton has moved over.
    """
    electrons = _of_elements(carriers, numbers)
    cores = _of_elements(ion_charges, numbers)
    at = np.flatnonzero(electrons)
    others = np.flatnonzero(electrons == 0)
    dipoles = -electrons[at, None] * centroids[at]
    charges = cores[at] - electrons[at]
    if len(others) and len(at):
        for some in np.array_split(others, -(-len(others) * len(at) // _PAIRS)):
            apart = positions[some][:, None, :] - positions[at][None, :, :]
            apart -= np.round(apart @ np.linalg.inv(cell)) @ cell
            home = np.argmin(np.einsum("ijk,ijk->ij", apart, apart), axis=1)
            arms = apart[np.arange(len(some)), home]
            np.add.at(dipoles, home, cores[some, None] * arms)
            np.add.at(charges, home, cores[some])
    return dipoles, charges


def total_dipoles(
    structures: Structures, centroids: Array, ion_charges: dict[str, float], carriers: dict[str, float]
) -> Array:
    """Total dipole of every structure [e Angstrom], shape (n_structures, 3).

    The sum of the molecular dipoles, plus q R for a molecule that carries a net charge q: together
    sum_i Z_i R_i - sum_w 2 r_w on unwrapped positions, up to a constant of whole lattice vectors that
    keeps each molecule in one piece.
    """
    totals = np.zeros((len(structures), 3))
    for k in range(len(structures)):
        atoms = structures.atoms_of(k)
        numbers, positions = structures.numbers[atoms], structures.positions[atoms]
        dipoles, charges = molecular_dipoles(
            numbers, positions, structures.cells[k], centroids[atoms], ion_charges, carriers
        )
        centres = positions[_of_elements(carriers, numbers) != 0]
        totals[k] = dipoles.sum(axis=0) + charges @ centres
    return totals
