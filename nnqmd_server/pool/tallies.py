"""Histograms, shares and paces of what happens in a pool, for :mod:`watch`; bounded, whatever happens."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

WINDOW = 30.0
"""Over which the busy share and the pace are measured [s]."""

STRUCTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Bounds of the histogram of batch sizes."""

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds of the histograms of times [s]."""


@dataclass
class Tally:
    """A histogram: how many values are at most each bound (the last count: above all), and their sum."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Tally:
        """The same, to be read by another thread."""
        return Tally(self.bounds, self.counts.copy(), self.total)


@dataclass
class PotentialWatch:
    """Counts of one potential: force sets and structures answered; histograms of its batches and waits."""

    force_sets: int = 0
    structures: int = 0
    batch: Tally = field(default_factory=lambda: Tally(STRUCTURES))
    wait: Tally = field(default_factory=lambda: Tally(SECONDS))
    compute: Tally = field(default_factory=lambda: Tally(SECONDS))
    elapsed: Tally = field(default_factory=lambda: Tally(SECONDS))

    def copy(self) -> PotentialWatch:
        """The same, to be read by another thread."""
        tallies = (self.batch.copy(), self.wait.copy(), self.compute.copy(), self.elapsed.copy())
        return PotentialWatch(self.force_sets, self.structures, *tallies)


@dataclass
class WorkerWatch:
    """What one worker has done; ``marks`` are (time, seconds of work until then).

    ``hand`` are the batches that it was given and has not answered; it is at the first, since ``since``.
    """

    pid: int
    host: str
    joined: float
    structures: int = 0
    busy_seconds: float = 0.0
    since: float | None = None
    hand: set[int] = field(default_factory=set)
    marks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=128))
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=15))

    def given(self, batch: int, now: float) -> None:
        """It was given a batch."""
        self.mark(now)
        if not self.hand:
            self.since = now
        self.hand.add(batch)

    def ended(self, batch: int, now: float) -> None:
        """It has answered one, and is at the next if it has one."""
        self.hand.discard(batch)
        self.since = now if self.hand else None

    def mark(self, now: float) -> None:
        """Remember how much it has worked until now, in one or two marks a second."""
        if len(self.marks) > 1 and now - self.marks[-2][0] < 1.0:
            self.marks.pop()
        self.marks.append((now, self.work(now)))

    def work(self, now: float) -> float:
        """Seconds of work until now, with what it is at."""
        return self.busy_seconds + (now - self.since if self.since is not None else 0.0)

    def busy_share(self, now: float) -> float:
        """Part of the last ``WINDOW`` seconds (or since it joined) that it worked."""
        begin = max(now - WINDOW, self.joined)
        before = _at(begin, [(self.joined, 0.0), *self.marks, (now, self.work(now))])
        return min(1.0, max(0.0, (self.work(now) - before) / max(now - begin, 1e-9)))

    def speed(self) -> float | None:
        """Atoms per second in its latest batches."""
        seconds = sum(spent for _, spent in self.recent)
        return sum(atoms for atoms, _ in self.recent) / seconds if seconds > 0 else None


@dataclass
class SimulationWatch:
    """What one simulation has asked; ``answers`` are the times of its latest answers."""

    name: str
    potential: str
    force_sets: int = 0
    structures: int = 0
    failed: int = 0
    atoms: int = 0
    beads: int = 0
    heard: float = 0.0
    pending: dict[int, float] = field(default_factory=dict)
    answers: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def pace(self, now: float) -> float:
        """Force sets per second, lately; 0 once it has asked nothing for a while."""
        times = [t for t in self.answers if now - t <= WINDOW]
        if len(times) < 2:
            times = list(self.answers)[-2:]
        if len(times) < 2:
            return 0.0
        typical = (times[-1] - times[0]) / (len(times) - 1)
        if now - times[-1] > max(5.0, 3 * typical):
            return 0.0
        return (len(times) - 1) / max(times[-1] - times[0], 1e-9)

    def waits(self, now: float) -> float | None:
        """For how long its oldest unanswered force set has waited [s]."""
        return now - min(self.pending.values()) if self.pending else None


def _at(time: float, marks: Sequence[tuple[float, float]]) -> float:
    """The value at a time on the broken line through the marks."""
    for (before, low), (after, high) in pairwise(marks):
        if before <= time <= after:
            return low + (high - low) * (time - before) / max(after - before, 1e-9)
    return marks[0][1]
