"""The beads of a force set in i-PI's order, though sockets bring them in any order and in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class BeadOrder(Generic[T]):
    """Collects one value for each bead until a force set is complete.

    A structure that ends a padded batch may stand for several beads: the copies that follow it may be
    padding, or beads that are just where it is. It is taken for all of them until a later part of the
    same force set says better; the values are the same when the structures are.

    Parameters
    ----------
    n_beads : int, optional
        Beads of a force set, numbered without a gap, from any number on. Where that is not known a force
        set ends when a bead comes again.

    Attributes
    ----------
    ended : int
        Force sets that have ended.
    regular : int
        How many of the last ones, without a break, had all their beads.
    strangers : int
        Beads that do not belong to the first complete force set, of another system or of a copy that i-PI
        makes to estimate something; they are left out.
    """

    def __init__(self, n_beads: int | None) -> None:
        self._n_beads = n_beads
        self.ended = 0
        self.regular = 0
        self.strangers = 0
        self._first: int | None = None
        self._values: dict[int, T] = {}
        self._maybe: dict[int, T] = {}

    def number_of(self, beads: Sequence[range]) -> int:
        """Number of the force set, from 0 on, to which beads that come next would belong."""
        return self.ended + any(numbers.start in self._values for numbers in beads)

    def add(self, beads: Sequence[range], values: Sequence[T]) -> list[list[T] | None]:
        """Take values; give the force sets that they complete, each in order of the beads.

        None stands for a force set that has ended without all its beads: somebody else was asked for them.

        Parameters
        ----------
        beads : sequence of range
            For each value the beads that it may stand for; it does for the first.
        values : sequence
            The values.
        """
        starts = [numbers.start for numbers in beads]
        if not self._values and starts == list(range(starts[0], starts[0] + (self._n_beads or 0))):
            self.ended += 1  # whole and in order, as the direct door has it: the quick way
            self.regular += 1
            return [list(values)]
        done: list[list[T] | None] = []
        for numbers, value in zip(beads, values, strict=True):
            if self._is_strange(numbers.start):
                self.strangers += 1
                continue
            if numbers.start in self._values:  # i-PI asks for a bead once per force set
                done += self.end()
            self._values[numbers.start] = value
            self._maybe.pop(numbers.start, None)
            self._maybe.update((bead, value) for bead in numbers[1:] if bead not in self._values)
            if len(self._values) == self._n_beads:
                done += self.end()
        return done

    def _is_strange(self, bead: int) -> bool:
        known = self._first is not None and self._n_beads is not None
        return known and not self._first <= bead < self._first + self._n_beads

    def end(self) -> list[list[T] | None]:
        """End the force set that has been begun, if one has."""
        if not self._values:
            return []
        first = min(self._values)
        together = self._maybe | self._values
        wanted = range(first, first + self._n_beads if self._n_beads else max(self._values) + 1)
        complete = all(bead in together for bead in wanted)
        self._values, self._maybe = {}, {}
        if complete and self._first is None:
            self._first = first
        self.ended += 1
        self.regular = self.regular + 1 if complete else 0
        return [[together[bead] for bead in wanted] if complete else None]
