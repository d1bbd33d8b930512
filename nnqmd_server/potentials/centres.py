"""One large structure over several processes: who owns which atoms, and which neighbours these see.

In a strictly local model the energy is a sum of atoms' energies, E = sum_i E_i, and E_i depends only on the
edges whose centre is i. So a process that has the edges of its own centres, all of them and no others, has
its part of the energy exactly; the gradient of that part with respect to all atoms, neighbours included, is
its part of the forces, and the parts of all processes add up to the whole.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.spatial import KDTree

from nnqmd_server.structures import Array


def split_centres(positions: Array, cell: Array, parts: int) -> Array:
    """Which part owns each atom: compact parts with equal numbers of atoms.

    The atoms, wrapped into the cell, are cut in two across the longest extent, again and again; compact
    parts have few neighbours in other parts.

    Parameters
    ----------
    positions : Array
        Positions [Angstrom], shape (n_atoms, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    parts : int
        How many parts.

    Returns
    -------
    Array
        Number of the part of each atom, int64, shape (n_atoms,); the parts' sizes differ by one at most.
    """
    inside = _wrapped(positions, cell)[0]
    owner = np.empty(len(positions), dtype=np.int64)
    # Atom k of n in the order of the cuts belongs to part k * parts // n, so the sizes are even.
    pending = [(np.arange(len(positions)), 0, parts)]
    while pending:
        atoms, first, count = pending.pop()
        if count == 1 or not len(atoms):
            owner[atoms] = first
            continue
        low = count // 2
        here = inside[atoms]
        axis = int(np.argmax(np.ptp(here, axis=0)))
        order = atoms[np.argsort(here[:, axis], kind="stable")]
        at = _share(len(positions), first, first + low, parts)
        pending.append((order[:at], first, low))
        pending.append((order[at:], first + low, count - low))
    return owner


def _share(n_atoms: int, first: int, last: int, parts: int) -> int:
    """How many of ``n_atoms`` the parts ``first:last`` have together."""
    return last * n_atoms // parts - first * n_atoms // parts


def _wrapped(positions: Array, cell: Array) -> tuple[Array, Array]:
    """Positions moved into the cell, and by how many cell vectors each was outside."""
    turns = np.floor(positions @ np.linalg.inv(cell))
    return positions - turns @ cell, turns


def edges_of(positions: Array, cell: Array, centres: Array, cutoff: float) -> tuple[Array, Array]:
    """The neighbour list of some of the atoms of a periodic structure.

    Only the surroundings of the centres are searched, and only their edges are made, so time and memory
    follow the number of centres.

    Parameters
    ----------
    positions : Array
        Positions [Angstrom], wrapped or not, shape (n_atoms, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    centres : Array
        The atoms whose neighbours are wanted, int64, shape (n_centres,).
    cutoff : float
        Cutoff radius [Angstrom]; may be larger than the cell.

    Returns
    -------
    edges : Array
        Centre and neighbour of every edge, int64, shape (2, n_edges), ordered by centre.
    shifts : Array
        Cell vectors between them: the edge is ``r[j] - r[i] + shift @ cell``; float64, shape (n_edges, 3).
    """
    if not len(centres):
        return np.empty((2, 0), dtype=np.int64), np.empty((0, 3))
    inside, turns = _wrapped(positions, cell)
    near, images = _surroundings(inside, cell, centres, cutoff)
    points = inside[near] + images @ cell
    found = KDTree(inside[centres]).sparse_distance_matrix(
        KDTree(points, balanced_tree=False, compact_nodes=False), cutoff, output_type="ndarray"
    )
    i, j = centres[found["i"]], near[found["j"]]
    image = images[found["j"]]
    real = (i != j) | image.any(axis=1)
    order = np.argsort(i[real], kind="stable")
    i, j, image = i[real][order], j[real][order], image[real][order]
    return np.stack([i, j]), image - turns[j] + turns[i]


def _surroundings(inside: Array, cell: Array, centres: Array, cutoff: float) -> tuple[Array, Array]:
    """Atoms and images of atoms that can be within the cutoff of some centre."""
    inverse = np.linalg.inv(cell)
    reach = cutoff * np.linalg.norm(inverse, axis=0)  # the cutoff over the distance of the cell's faces
    fractions = inside @ inverse
    low, high = fractions[centres].min(axis=0) - reach, fractions[centres].max(axis=0) + reach
    near, images = [], []
    for image in itertools.product(
        *(range(int(np.floor(low[k])), int(np.floor(high[k])) + 1) for k in range(3))
    ):
        there = fractions + image
        atoms = np.flatnonzero(((there >= low) & (there <= high)).all(axis=1))
        near.append(atoms)
        images.append(np.tile(np.array(image, dtype=np.float64), (len(atoms), 1)))
    return np.concatenate(near), np.concatenate(images)
