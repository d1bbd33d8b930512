"""The pairs of a neighbour list, and which of them are within the cutoff of many structures at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vesin import NeighborList

from nnqmd_server.potentials.native import library
from nnqmd_server.structures import Array

_BEADS = 32  # structures that pairs.c looks at together
_MOST_SHIFTS = 4096  # between the smallest and the largest of a list, for a table of all
_CHUNK = 12_000  # coordinates of pairs at once: they stay in the cache


@dataclass
class Pairs:
    """Pairs (i, j, S) of a list, once each way as edges and once as what has one distance.

    Parameters
    ----------
    first, second : Array
        Atoms of each pair, int64, shape (n_pairs,).
    turns : Array
        Cell vectors from the first to the second atom, float64, shape (3, n_pairs).
    edges : Array
        Both directions of all pairs, by i, j and S: int64, shape (2, 2 n_pairs).
    shifts : Array
        Their cell vectors, float64, shape (2 n_pairs, 3).
    pair : Array
        Which pair each edge belongs to, int32, shape (2 n_pairs,).
    back : Array
        Whether each edge goes from the second atom to the first, bool, shape (2 n_pairs,).
    """

    first: Array
    second: Array
    turns: Array
    edges: Array
    shifts: Array
    pair: Array
    back: Array
    _last: tuple[Array, Array] | None = field(default=None, init=False, repr=False)
    _small: tuple[Array, Array, Array] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.first)

    def within(self, positions: Array, cell: Array, cutoff: float) -> list[tuple[Array, Array]]:
        """The edges of structures that are within the cutoff.

        Parameters
        ----------
        positions : Array
            Positions [Angstrom], shape (n_structures, n_atoms, 3).
        cell : Array
            The cell of all of them [Angstrom], shape (3, 3).
        cutoff : float
            Cutoff radius [Angstrom].

        Returns
        -------
        list of (edges, shifts)
            For each structure, in the order of ``edges``.
        """
        across, square = self._across(cell), cutoff * cutoff
        if library() is None or len(self) >= 1 << 30:
            return self._by_numpy(_side_by_side(positions, 1), across, square)
        return [
            edges
            for low in range(0, len(positions), _BEADS)
            for edges in self._by_native(positions[low : low + _BEADS], across, square)
        ]

    def _across(self, cell: Array) -> Array:
        """The vectors of the turns, shape (n_pairs, 3); kept, since cells seldom change."""
        if self._last is None or not np.array_equal(self._last[0], cell):
            t = self.turns
            # Element by element and in one order, so that a distance does not depend on who asks.
            across = [t[0] * cell[0, k] + t[1] * cell[1, k] + t[2] * cell[2, k] for k in range(3)]
            self._last = cell.copy(), np.stack(across, axis=1)
        return self._last[1]

    def _compact(self) -> tuple[Array, Array, Array]:
        """The edges in less memory: both atoms of each, the number of its shift, and all these shifts."""
        if self._small is None:
            most = np.abs(self.turns).max(axis=1, initial=0.0)
            wide = [2 * int(m) + 1 for m in most]
            if math.prod(wide) <= _MOST_SHIFTS:
                x, y, z = (self.turns + most[:, None]).astype(np.int32)
                codes = ((x * wide[1] + y) * wide[2] + z)[self.pair]
                # The table is odd about its middle.
                codes[self.back] = math.prod(wide) - 1 - codes[self.back]
                table = np.indices(wide).reshape(3, -1).T - most
            else:  # atoms have drifted far
                codes, table = np.arange(len(self.shifts)), self.shifts
            kinds = (self.edges.T, np.int32), (codes, np.int32), (table, np.float64)
            self._small = tuple(np.ascontiguousarray(array, dtype=kind) for array, kind in kinds)
        return self._small

    def _by_native(self, positions: Array, across: Array, square: float) -> list[tuple[Array, Array]]:
        count, n_pairs = len(positions), len(self)
        beads = _side_by_side(positions, 4 if count > 1 else 1)
        near, counts = np.empty(n_pairs, dtype=np.uint32), np.empty(count, dtype=np.int64)
        arrays = [beads, self.first, self.second, across]
        library().near_pairs(
            n_pairs, count, beads.shape[2], *_addresses(arrays), square, *_addresses([near, counts])
        )
        counts *= 2
        # Each structure's begin at multiples of 64 bytes, so that tensors can be made of them as they are.
        ends = np.cumsum(-(-counts // 8) * 8)
        starts = np.concatenate([[0], ends[:-1]])
        edges, shifts = _room(2 * ends[-1], np.int64), _room(3 * ends[-1], np.float64)
        bits, chosen = np.empty(2 * n_pairs + 8, dtype=np.uint32), np.empty(2 * n_pairs + 8, dtype=np.int32)
        arrays = [self.pair, near, *self._compact(), starts, counts, bits, chosen, edges, shifts]
        library().take_edges(2 * n_pairs, count, *_addresses(arrays))
        return [
            (edges[2 * low : 2 * (low + n)].reshape(2, n), shifts[3 * low : 3 * (low + n)].reshape(n, 3))
            for low, n in zip(starts.tolist(), counts.tolist(), strict=True)
        ]

    def _by_numpy(self, beads: Array, across: Array, square: float) -> list[tuple[Array, Array]]:
        near = np.empty((len(self), beads.shape[2]), dtype=bool)
        step = max(16, _CHUNK // (3 * beads.shape[2]))
        for low in range(0, len(self), step):
            part = slice(low, low + step)
            apart = beads.take(self.second[part], axis=0)
            apart -= beads.take(self.first[part], axis=0)
            apart += across[part, :, None]
            apart *= apart
            squares = apart[:, 0]
            squares += apart[:, 1]
            squares += apart[:, 2]
            np.less_equal(squares, square, out=near[part])
        found = []
        for within in np.ascontiguousarray(near.T):
            which = np.flatnonzero(within.take(self.pair))
            found.append((self.edges.take(which, axis=1), self.shifts.take(which, axis=0)))
        return found


def _side_by_side(positions: Array, multiple: int) -> Array:
    """Beads of an atom beside each other, for arithmetic that runs over them: (n_atoms, 3, n)."""
    count, n_atoms = positions.shape[:2]
    beads = np.zeros((n_atoms, 3, -(-count // multiple) * multiple))
    beads[:, :, :count] = positions.transpose(1, 2, 0)
    return beads


def _addresses(arrays: Sequence[Array]) -> list[int]:
    return [array.ctypes.data for array in arrays]


def _room(count: int, dtype: type) -> Array:
    """Memory for so many numbers of eight bytes that begins at a multiple of 64."""
    room = np.empty(int(count) + 8, dtype=dtype)
    first = -(room.ctypes.data // 8) % 8
    return room[first : first + int(count)]


def pairs_between(positions: Array, cell: Array, cutoff: float, reach: Array) -> Pairs:
    """All pairs no further apart than the cutoff and what both atoms may move, from vesin.

    Parameters
    ----------
    positions : Array
        Positions [Angstrom], wrapped or not, shape (n_atoms, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    cutoff : float
        Cutoff radius [Angstrom].
    reach : Array
        How far each atom may go [Angstrom], shape (n_atoms,).
    """
    if not len(positions):
        i = j = np.empty(0, dtype=np.int64)
        s = np.empty((3, 0))
    else:
        widest = cutoff + 2 * float(reach.max())
        search = NeighborList(cutoff=widest, full_list=False, n_threads=1)
        box = without_vacuum(positions, cell, widest)
        i, j, s, d = search.compute(points=positions, box=box, periodic=True, quantities="ijSd")
        i, j = i.astype(np.int64), j.astype(np.int64)
        kept = d <= cutoff + reach[i] + reach[j]
        # Numbers of one direction side by side: numpy is several times slower along short rows.
        i, j, s = i[kept], j[kept], np.ascontiguousarray(s[kept].T, dtype=np.float64)
    both = np.concatenate([i, j]), np.concatenate([j, i])
    shifts = np.concatenate([s, -s], axis=1) + 0.0  # no negative zeros
    order = _order(both[0], both[1], shifts, len(positions))
    return Pairs(
        first=i,
        second=j,
        turns=s,
        edges=np.stack([both[0][order], both[1][order]]),
        shifts=np.ascontiguousarray(shifts[:, order].T),
        pair=np.tile(np.arange(len(i), dtype=np.int32), 2)[order],
        back=order >= len(i),
    )


def _order(i: Array, j: Array, shifts: Array, n_atoms: int) -> Array:
    """By i, then j, then shift."""
    low, high = shifts.min(axis=1, initial=0), shifts.max(axis=1, initial=0)
    wide = (high - low + 1).tolist()
    if n_atoms * n_atoms * wide[0] * wide[1] * wide[2] >= 2.0**62:  # atoms have drifted very far
        return np.lexsort((shifts[2], shifts[1], shifts[0], j, i))
    s = (shifts - low[:, None]).astype(np.int64)
    key = j
    for k in range(3):
        key = key * int(wide[k]) + s[k]
    if n_atoms * wide[0] * wide[1] * wide[2] < 1 << 16:  # numpy sorts short numbers digit by digit
        order = np.argsort(key.astype(np.uint16), kind="stable")
        return order[np.argsort(i[order].astype(np.uint16), kind="stable")]
    return np.argsort(i * int(n_atoms * wide[0] * wide[1] * wide[2]) + key)


def without_vacuum(positions: Array, cell: Array, cutoff: float) -> Array:
    """A smaller cell with the same pairs, where atoms have no neighbours in the next cell anyway.

    A grid over a molecule's box of 1000 Angstrom takes a hundred times longer than one over the molecule.

    Parameters
    ----------
    positions : Array
        Positions [Angstrom], shape (n_atoms, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    cutoff : float
        Cutoff radius [Angstrom].
    """
    inverse = np.linalg.inv(cell)
    # In units of the cell vector: what the atoms take up, and a little more than the cutoff.
    needed = np.ptp(positions @ inverse, axis=0) + (cutoff + 1.0) * np.linalg.norm(inverse, axis=0)
    return cell * np.minimum(needed, 1.0)[:, None]
