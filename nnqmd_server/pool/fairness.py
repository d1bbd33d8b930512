"""Whose turn it is when several simulations wait."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nnqmd_server.pool.shares import Job

ACTIVE = 5.0
"""For how long a simulation that asks nothing counts as one that will ask again [s]."""


class FairQueue:
    """The order of force sets: the simulation for which least has been computed goes first.

    While it asks nothing it saves up nothing. So a small one waits for one batch of a large one, not for all
    of it, and nobody is passed for ever (start-time fair queueing: Goyal, Vin and Cheng, IEEE/ACM Trans.
    Networking 5, 690 (1997), with equal weights).
    """

    def __init__(self) -> None:
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._last_asked: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._finish) + len(self._last_asked)

    @property
    def several(self) -> bool:
        """Whether more than one simulation asks these days."""
        return len(self._last_asked) > 1

    def enter(self, job: Job, now: float) -> None:
        """Give a force set its place."""
        job.start = max(self._virtual, self._finish.get(job.simulation, 0.0))
        job.finish = job.start + job.sums[-1]
        self._finish[job.simulation] = job.finish
        self._last_asked[job.simulation] = now

    def order(self, jobs: Iterable[Job]) -> list[Job]:
        """What waits, in the order in which it is to be handed out."""
        queue = sorted(jobs, key=_turn)
        if queue:
            self._virtual = max(self._virtual, _turn(queue[0])[0])
        return queue

    def forget(self, now: float, busy: Collection[str]) -> None:
        """Forget simulations that have gone; ``busy`` are those with a force set in the pool."""
        for key in [k for k, t in self._last_asked.items() if now - t > ACTIVE and k not in busy]:
            del self._last_asked[key]
        served = self._virtual if busy else float("inf")
        for key in [k for k, finish in self._finish.items() if finish <= served and k not in busy]:
            del self._finish[key]


def _turn(job: Job) -> tuple[float, float, int]:
    """What has been computed for its simulation when a force set is next."""
    return job.start + job.given, job.finish, job.number
