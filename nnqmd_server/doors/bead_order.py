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
    n_beads : int
        Beads of a force set, numbered without a gap, from any number on.
    """

    def __init__(self, n_beads: int) -> None:
        self._n_beads = n_beads
        self._values: dict[int, T] = {}
        self._maybe: dict[int, T] = {}

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
        done: list[list[T] | None] = []
        for numbers, value in zip(beads, values, strict=True):
            if numbers.start in self._values:  # i-PI asks for a bead once per force set
                done += self.end()
            self._values[numbers.start] = value
            self._maybe.pop(numbers.start, None)
            self._maybe.update((bead, value) for bead in numbers[1:] if bead not in self._values)
            if len(self._values) == self._n_beads:
                done += self.end()
        return done

    def end(self) -> list[list[T] | None]:
        """End the force set that has been begun, if one has."""
        if not self._values:
            return []
        first = min(self._values)
        together = self._maybe | self._values
        wanted = range(first, first + self._n_beads)
        complete = all(bead in together for bead in wanted)
        self._values, self._maybe = {}, {}
        return [[together[bead] for bead in wanted] if complete else None]
