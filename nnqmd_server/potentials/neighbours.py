"""Neighbour lists that are kept between steps, and one list for all beads of a ring polymer.

Theory of operation. A list is made around reference positions x (of one structure, or the centroid of beads
that lie close together) in a reference cell h. It holds all pairs (i, j, S) with

    |x_j - x_i + S h| <= r_c + b_i + b_j,

where b_i is how far atom i may go: the spread of the beads that was measured plus half the skin. Whoever
uses it gets the pairs within r_c only, at the positions of the step; so a list never changes a result, it
only has to be complete, and that is checked at every step. With H the cell of the step, A = h^-1 H and
s the smallest singular value of A, write r_i = x_i A + u_i. A pair within r_c has

    s |x_j - x_i + S h| <= |(x_j - x_i + S h) A| = |r_j - r_i + S H - u_j + u_i| <= r_c + |u_i| + |u_j|,

hence it is in the list when |u_i| <= s b_i - (1 - s) r_c / 2 for every atom. For A = 1 this is the usual
rule: nobody has moved by more than half the skin. It is exact for any strain and needs unwrapped positions;
an atom that somebody has wrapped has moved far, and gets a new list.

Which list fits which structure is found by content (elements, then the rule above), never by assumption: a
worker sees some beads of one simulation now and of another one next.

Pairs come in one order, by i, j and S, whatever list they come from: the same structure gives the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vesin import NeighborList

from nnqmd_server.potentials.pairs import Pairs, pairs_between
from nnqmd_server.structures import Array, Structures

SKIN = 1.4
"""How much closer two atoms may come before a list is made anew [Angstrom]; of beads half of it, since they
explore together what their spread says; docs/evaluation.md says what else was tried."""

WIDEST = 0.35
"""Largest b_i, as a part of the cutoff: beads further apart than that have lists of their own."""

MOST_LISTS = 128
"""Lists that are kept for structures of the same elements; the one not used for longest goes first."""

MOST_PAIRS = 20_000_000
"""Pairs of all lists that are kept, about 60 bytes each."""

_GUARD = 1e-6  # for the round-off of the distances in the rule [Angstrom]
_NOTHING = np.empty((2, 0), dtype=np.int64), np.empty((0, 3))
_TRIALS = 8  # where lists are not used again, one in so many is kept all the same


def fresh_edges(structures: Structures, cutoff: float) -> list[tuple[Array, Array]]:
    """Edges of every structure from a new list for each, in no particular order.

    Returns
    -------
    list of (edges, shifts)
        For each structure: centres and neighbours, int64, shape (2, n_edges), atoms numbered from 0; and
        the cell vectors between them, float64, shape (n_edges, 3).
    """
    search = NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
    found = []
    for k in range(len(structures)):
        i, j, s = search.compute(
            points=structures.positions[structures.atoms_of(k)],
            box=structures.cells[k],
            periodic=True,
            quantities="ijS",
        )
        found.append((np.stack([i, j]).astype(np.int64), s.astype(np.float64)))
    return found


@dataclass
class KeptList:
    """Pairs around reference positions, and how far atoms may have gone for them to be complete."""

    positions: Array
    cell: Array
    reach: Array  # b of every atom
    pairs: Pairs
    copies: dict[Any, Any] = field(default_factory=dict)  # of the pairs, on other devices
    _last: tuple[Array, Array, float] | None = field(default=None, init=False)  # of the last cell

    def _affine(self, cell: Array, cutoff: float) -> tuple[Array, Array]:
        """The reference in a cell, and the squares of how far atoms may be from it; negative for never."""
        if self._last is None or not np.array_equal(self._last[0], cell):
            at, allowed = self.positions, self.reach
            if not np.array_equal(cell, self.cell):
                strain = np.linalg.solve(self.cell, cell)
                least = np.linalg.svd(strain, compute_uv=False)[-1]
                at = self.positions @ strain
                allowed = least * self.reach - (1.0 - least) * cutoff / 2
            self._last = cell.copy(), at, np.where(allowed >= 0, allowed, -1.0) * np.abs(allowed)
        return self._last[1], self._last[2]

    def fits(self, positions: Array, cell: Array, cutoff: float) -> Array:
        """For which of the structures, positions of shape (count, n, 3), the list is complete."""
        at, allowed = self._affine(cell, cutoff)
        moved = positions - at
        return (np.einsum("pij,pij->pi", moved, moved) <= allowed).all(axis=1)


@dataclass
class _Kind:
    """The lists of structures with the same elements, the last used one first."""

    lists: list[KeptList] = field(default_factory=list)
    made: int = 0
    used_again: int = 0
    since_kept: int = 0

    def worth_keeping(self) -> bool:
        """Whether structures come back; now and then a list is kept to find out."""
        self.since_kept += 1
        if self.made < _TRIALS or self.used_again >= self.made or self.since_kept >= _TRIALS:
            self.since_kept = 0
            return True
        return False


class Lists:
    """Neighbour lists for structures that are mostly a step further than those of the last call.

    Parameters
    ----------
    cutoff : float
        Cutoff radius [Angstrom].
    skin : float
        How much closer two atoms may come before a list is made anew [Angstrom], half of it for beads; 0
        keeps none.
    """

    def __init__(self, cutoff: float, skin: float = SKIN) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.built = 0
        """How many lists have been made."""
        self._kinds: OrderedDict[bytes, _Kind] = OrderedDict()

    def edges(self, structures: Structures) -> list[tuple[Array, Array]]:
        """The edges of every structure, ordered by centre, neighbour and shift.

        Parameters
        ----------
        structures : Structures
            Any; beads and successive steps are recognised as such.

        Returns
        -------
        list of (edges, shifts)
            For each structure: centres and neighbours, int64, shape (2, n_edges), atoms numbered from 0; and
            the cell vectors between them, float64, shape (n_edges, 3): an edge is
            ``r[j] - r[i] + shift @ cell``.
        """
        found: list[tuple[Array, Array]] = [_NOTHING] * len(structures)
        for which, cell, one in self.chosen(structures):
            first = structures.offsets[which[0]]
            alone = which[-1] - which[0] == len(which) - 1
            if alone:  # side by side, as beads are: no copy
                positions = structures.positions[first : structures.offsets[which[-1] + 1]]
            else:
                positions = np.concatenate([structures.positions[structures.atoms_of(k)] for k in which])
            within = one.pairs.within(positions.reshape(len(which), -1, 3), cell, self.cutoff)
            for k, edges in zip(which, within, strict=True):
                found[k] = edges
        return found

    def chosen(self, structures: Structures, shared: bool = False) -> list[tuple[Array, Array, KeptList]]:
        """Which list is complete for which structures; lists are made where none is.

        Parameters
        ----------
        structures : Structures
            Any.
        shared : bool
            Make no list for structures that would be alone with it: they are left out.

        Returns
        -------
        list of (structures, cell, list)
            Numbers of the structures in rising order, the cell of all of them, and their list.
        """
        found = []
        for first, last in _runs(structures):
            cell = structures.cells[first]
            numbers = structures.numbers[structures.atoms_of(first)]
            if not len(numbers):
                continue
            positions = structures[first:last].positions.reshape(last - first, len(numbers), 3)
            lists = self._lists_for(numbers, positions, cell, shared)
            found += [(first + which, cell, one) for which, one in lists]
        return found

    def _lists_for(
        self, numbers: Array, positions: Array, cell: Array, shared: bool
    ) -> list[tuple[Array, KeptList]]:
        """Lists, and which structures each of them is for."""
        elements = numbers.tobytes()
        kind = self._kinds.setdefault(elements, _Kind())
        self._kinds.move_to_end(elements)
        pending = np.arange(len(positions))
        chosen: list[tuple[Array, KeptList]] = []
        for place, one in enumerate(kind.lists):
            fits = one.fits(positions if not chosen else positions[pending], cell, self.cutoff)
            if not place and fits.all():  # as at nearly every step
                kind.used_again += len(positions)
                return [(pending, one)]
            if fits.any():
                chosen.append((pending[fits], one))
                pending = pending[~fits]
                if not len(pending):
                    break
        kind.used_again += len(positions) - len(pending)
        kept = [one for _, one in chosen]
        while len(pending):
            members, reach = self._group(numbers, positions[pending])
            if shared and len(members) == 1:  # the others most likely are too: each costs a look at all
                break
            keep = self.skin > 0 and kind.worth_keeping()
            margin = keep * self.skin / (2 if len(members) == 1 else 4)
            one = self._make(positions[pending[members]].mean(axis=0), cell, reach + margin)
            kind.made += 1
            kind.used_again += len(members) - 1
            chosen.append((pending[members], one))
            if keep:
                kept.append(one)
            pending = np.delete(pending, members)
        used = {id(one) for one in kept}
        kind.lists = (kept + [one for one in kind.lists if id(one) not in used])[:MOST_LISTS]
        self._forget()
        return chosen

    def _group(self, numbers: Array, positions: Array) -> tuple[Array, Array]:
        """Structures that can share a list with the first one, and the spread of each of their atoms.

        Beads explore what their neighbours explore: atoms of one element are given the largest spread among
        them.
        """
        widest = WIDEST * self.cutoff - self.skin / 4
        near = np.flatnonzero(_distances(positions, positions[0]).max(axis=1) <= 2 * widest)
        for _ in range(3):  # those far from the centre move it: once they are out it moves again
            if len(near) <= 1:
                break
            spread = _distances(positions[near], positions[near].mean(axis=0))
            inside = spread.max(axis=1) <= widest
            if inside.all():
                reach = np.empty(len(numbers))
                for element in np.unique(numbers):
                    reach[numbers == element] = spread[:, numbers == element].max()
                return near, reach
            near = near[inside]
        return np.array([0]), np.zeros(len(numbers))

    def _make(self, centre: Array, cell: Array, reach: Array) -> KeptList:
        self.built += 1
        pairs = pairs_between(centre, cell, self.cutoff + _GUARD, reach)
        return KeptList(centre, cell.copy(), reach, pairs)

    def _forget(self) -> None:
        """Drop lists of elements that have not been asked for, as far as there are too many pairs."""
        total = sum(len(one.pairs) for kind in self._kinds.values() for one in kind.lists)
        while total > MOST_PAIRS:
            kind = next(iter(self._kinds.values()))
            if kind.lists:
                total -= len(kind.lists.pop().pairs)
            elif len(self._kinds) > 1:
                self._kinds.popitem(last=False)
        while len(self._kinds) > MOST_LISTS:
            self._kinds.popitem(last=False)


def _distances(positions: Array, centre: Array) -> Array:
    """How far each atom is from where it is in another structure, shape (n_structures, n_atoms)."""
    return np.linalg.norm(positions - centre, axis=-1)


def _runs(structures: Structures) -> Sequence[tuple[int, int]]:
    """Runs of neighbouring structures with the same atoms and the same cell."""
    count = len(structures)
    sizes = np.diff(structures.offsets)
    if not count:
        return []
    if (sizes == sizes[0]).all() and (structures.cells == structures.cells[0]).all():
        numbers = structures.numbers.reshape(count, sizes[0])
        if (numbers == numbers[0]).all():  # beads
            return [(0, count)]
    differ = np.ones(count, dtype=bool)
    differ[1:] = (sizes[1:] != sizes[:-1]) | (structures.cells[1:] != structures.cells[:-1]).any(axis=(1, 2))
    if (sizes == sizes[0]).all():
        numbers = structures.numbers.reshape(count, sizes[0])
        differ[1:] |= (numbers[1:] != numbers[:-1]).any(axis=1)
    else:
        for k in np.flatnonzero(~differ):
            differ[k] = not np.array_equal(
                structures.numbers[structures.atoms_of(k)], structures.numbers[structures.atoms_of(k - 1)]
            )
    starts = np.flatnonzero(differ).tolist()
    return list(zip(starts, [*starts[1:], count], strict=True))
