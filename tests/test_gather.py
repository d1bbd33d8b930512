"""When a force set is taken to be complete, on a clock of our own."""

from __future__ import annotations

import pytest

from nnqmd_server.doors.bead_order import BeadOrder
from nnqmd_server.doors.gather import LONGEST, SHORTEST, Gather


def play(gather, parts, unasked=(), clock=0.0, step=0.0001):
    """One force set in parts of so many beads; ``unasked`` parts begin while the one before is computed.

    Returns the clock and how long each part was waited for after its last bead.
    """
    waits = []
    for k, part in enumerate(parts):
        if k == 0 or k not in unasked:
            gather.arrived(clock, 1)
        for _ in range(part - 1):
            clock += step
            gather.arrived(clock, 1)
        waits.append(max(0.0, gather.remaining(clock, expecting=False)))
        clock += waits[-1]
        gather.taken()
        clock += 0.02
        if k + 1 in unasked:
            gather.arrived(clock, 1)
        gather.answered()
    return clock, waits


def test_a_whole_force_set_is_not_kept_waiting():
    gather = Gather(8)
    for _ in range(3):
        _, waits = play(gather, [8])
        assert waits == [0.0]


def test_the_wait_for_a_remainder_that_never_comes_shrinks_and_is_bounded():
    """i-PI from 3.2 on: a part, and nothing until it is answered. i-PI 2.6.3: one bead after the other."""
    for parts in ([3, 5], [1] * 8):
        gather, clock = Gather(8), 0.0
        first = gather.wait
        assert first <= LONGEST
        for _ in range(80):
            clock, waits = play(gather, parts, clock=clock)
        assert waits[-1] == 0.0  # the last bead of the force set is known to be the last
        assert all(wait <= 0.3 * first for wait in waits)
        assert gather.wait >= SHORTEST


def test_the_wait_grows_when_beads_come_unasked():
    """i-PI up to 3.1: what we do not wait for arrives while we compute."""
    gather = Gather(8)
    _, before = play(gather, [3, 5], unasked={1})
    assert gather.wait > before[0]
    for _ in range(20):
        play(gather, [3, 5], unasked={1})
    assert gather.wait == LONGEST


def test_long_pauses_between_beads_are_learned():
    gather = Gather(8)
    play(gather, [7], step=0.002)
    assert gather.wait == pytest.approx(min(0.005, LONGEST))


def test_a_share_that_does_not_add_up_is_not_believed():
    """Another driver takes three of eight beads: five come, never the rest."""
    gather, clock, calls = Gather(8), 0.0, 0
    for _ in range(40):
        arrived = 0
        while arrived < 5:
            gather.arrived(clock, 1)
            arrived += 1
            clock += 0.00005
            if gather.remaining(clock, expecting=False) <= 0 or arrived == 5:
                gather.taken()
                gather.answered()
                calls += 1
        clock += 0.01
    assert calls <= 40 + 4  # a few force sets are cut before that is learned


def test_when_more_is_under_way_the_wait_is_as_long_as_it_may_be():
    gather = Gather(8)
    gather.arrived(0.0, 3)
    assert gather.remaining(0.0, expecting=False) == gather.wait < LONGEST
    assert gather.remaining(0.0, expecting=True) == LONGEST


def one(bead):
    return range(bead, bead + 1)


def test_beads_come_in_any_order_and_in_parts():
    order = BeadOrder(4)
    assert order.add([one(7), one(5)], ["c", "a"]) == []
    assert order.add([one(8), one(6)], ["d", "b"]) == [["a", "b", "c", "d"]]
    assert order.end() == []


def test_a_padded_tail_stands_for_beads_only_until_they_come():
    order = BeadOrder(5)
    assert order.add([one(0), range(1, 5)], ["a", "b"]) == []
    assert order.add([one(2), one(3), range(4, 7)], ["c", "d", "e"]) == [["a", "b", "c", "d", "e"]]


def test_beads_that_are_all_the_same_make_a_force_set():
    order = BeadOrder(4)
    assert order.add([range(0, 4)], ["x"]) == []  # may be one bead and its padding
    assert order.add([one(0), one(1), one(2), one(3)], list("abcd")) == [["x"] * 4, list("abcd")]


def test_a_force_set_of_which_somebody_else_had_a_part_is_not_mixed_with_the_next():
    order = BeadOrder(3)
    assert order.add([one(0), one(1)], ["a", "b"]) == []
    assert order.add([one(1), one(0)], ["d", "c"]) == [None]
    assert order.add([one(2)], ["e"]) == [["c", "d", "e"]]


def test_force_sets_are_counted_whatever_they_come_as():
    order = BeadOrder(3)
    whole = [one(5), one(6), one(7)]
    assert order.number_of(whole) == 0
    assert order.add(whole, list("abc")) == [list("abc")]
    assert order.add([one(6)], ["b"]) == []
    assert order.number_of([one(5)]) == 1  # the same force set
    assert order.number_of([one(6)]) == 2  # one that somebody else had a part of has ended
    assert order.add([one(6), one(5), one(7)], list("bac")) == [None, list("abc")]
    assert (order.ended, order.regular) == (3, 1)


def test_force_sets_are_counted_where_the_number_of_beads_is_not_known():
    order = BeadOrder(None)
    for _ in range(3):
        order.add([range(0, 4)], ["x"])  # all in one place, so all but one look like padding
    assert (order.ended, order.number_of([one(0)])) == (2, 3)
    order.add([one(0), range(1, 4)], list("ab"))
    order.add([one(2), one(3)], list("cd"))
    assert (order.ended, order.number_of([one(0), one(1)])) == (3, 4)
