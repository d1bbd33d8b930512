"""When a force set has come together: what arrives together is evaluated together, and nothing stalls.

i-PI up to 3.1 sends every bead of a force set, sooner or later; i-PI from 3.2 on sends those that are
queued when its poll thread wakes, and then nothing until they are answered. Which of the two is on the
other side is not known, so the wait for a remainder is short, bounded, and learned: it follows the
longest pause between two beads of one part, grows when beads came after all while a part was being
computed, and shrinks while it is in vain. Beyond the last bead of a force set that came in parts there is
no wait once such parts have added up several times; now and then that is checked again, since another
driver may join and take its share.
"""

from __future__ import annotations

SHORTEST = 0.0001
LONGEST = 0.010
"""Bounds of the wait for a remainder [s]."""

_FIRST_PAUSE = 0.001
_PAUSES = 2.5
_DECAY = 0.95
_DOUBT = -3
_CREDIT = 15


class Gather:
    """Decides when to evaluate what has arrived. It has no clock: times [s] are given to it.

    Parameters
    ----------
    whole : int
        Structures of a force set; may be changed when more is known.
    """

    def __init__(self, whole: int) -> None:
        self.whole = whole
        self._left = whole
        self._count = 0
        self._part = 0
        self._last = 0.0
        self._pause = _FIRST_PAUSE
        self._longest_pause = 0.0
        self._trust = _DOUBT

    @property
    def wait(self) -> float:
        """How long a part that has stopped growing waits for more [s]."""
        return min(max(_PAUSES * self._pause, SHORTEST), LONGEST)

    def arrived(self, now: float, structures: int) -> None:
        """Structures have arrived."""
        if self._count:
            self._longest_pause = max(self._longest_pause, now - self._last)
        self._count += structures
        self._last = now

    def remaining(self, now: float, expecting: bool) -> float:
        """How much longer to wait [s]; zero or less when it is time.

        Parameters
        ----------
        now : float
            The time.
        expecting : bool
            Whether the server has begun to say something more; the wait is then as long as it may be.
        """
        if self._count >= (self._left if self._trust > 0 else self.whole):
            return 0.0
        return self._last + (LONGEST if expecting else self.wait) - now

    def taken(self) -> None:
        """What has arrived is being evaluated now."""
        self._part, self._count = self._count, 0
        self._pause = max(self._longest_pause, _DECAY * self._pause)
        self._longest_pause = 0.0

    def answered(self) -> None:
        """What was taken has been evaluated, and what arrived meanwhile has been counted."""
        more = self._count > 0  # before we answered: waiting would not have been in vain
        part, left, self._left = self._part, self._left, self.whole
        unwaited = self._trust > 0 and left <= part < self.whole
        if part < left:
            self._left = left - part
        elif part > left or (unwaited and more):
            self._trust = _DOUBT
        elif unwaited:
            self._trust -= 1
        elif left < self.whole:
            self._trust = self._trust + 1 if self._trust < 0 else _CREDIT
        if more and not unwaited:
            self._pause = min(2 * max(self._pause, SHORTEST), LONGEST)
