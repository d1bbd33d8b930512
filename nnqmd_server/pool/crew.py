"""What the pool knows of its workers: who they are, what they hold, how fast they are."""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from nnqmd_server.pool.messages import UNITS
from nnqmd_server.pool.shares import Batch

RECENT = 15
"""Batches over which a worker's speed is measured: one slow batch does not change the cut."""

HOST = socket.gethostname()


@dataclass(eq=False)
class Worker:
    """One worker.

    Parameters
    ----------
    identity : bytes
        Its connection.
    index, pid, host : int, int, str
        Number for logs; process and machine.
    forms : dict of str to str
        How each of its potentials runs, in words.
    together : dict of str to bool
        Which of them evaluate a whole batch at once, so that merging simulations pays.
    batch, ahead : Batch, optional
        What it is at, since ``since`` [s], and what it has been given to do next.
    leaving : bool
        It finishes what it has and wants no more.
    near : bool
        It shares memory with us.
    """

    identity: bytes
    index: int
    pid: int
    host: str
    forms: dict[str, str]
    together: dict[str, bool]
    batch: Batch | None = None
    ahead: Batch | None = None
    since: float = 0.0
    leaving: bool = False
    near: bool = False
    structures: int = 0
    busy_seconds: float = 0.0
    speeds: dict[tuple[str, int], float] = field(default_factory=dict)
    _recent: dict[tuple[str, int], deque[float]] = field(default_factory=dict)

    def left(self, now: float) -> float | None:
        """For how long it is busy [s]; None when that is not known, or is longer than it should be."""
        if self.batch is None:
            return 0.0
        if self.batch.expected is None or self.batch.answered:
            return None
        left = self.since + self.batch.expected - now
        return left if left > 0 else None

    def measure(self, batch: Batch, seconds: float) -> None:
        """Learn from a batch that took so long: the median of the latest is the speed [cost/s]."""
        key = batch.potential, size_class(batch.atoms)
        recent = self._recent.setdefault(key, deque(maxlen=RECENT))
        recent.append(batch.cost / max(seconds, 1e-6))
        self.speeds[key] = median(recent)

    def as_dict(self) -> dict[str, Any]:
        """For displays, in plain JSON types."""
        return {
            "index": self.index,
            "pid": self.pid,
            "host": self.host,
            "forms": self.forms,
            "structures": self.structures,
            "busy_seconds": self.busy_seconds,
            "busy": self.batch is not None,
            "leaving": self.leaving,
            "speeds": [
                [name, 2**size, round(speed, 3)] for (name, size), speed in self.speeds.copy().items()
            ],
        }


def size_class(atoms: int) -> int:
    """Sizes within a factor of about 1.4 are one class: the nearest power of two."""
    return round(math.log2(max(atoms, 1)))


def worker_of(identity: bytes, hello: Mapping[str, Any]) -> Worker:
    """A worker as it introduces itself.

    Raises
    ------
    KeyError, TypeError, ValueError
        It does not.
    """
    brought = dict(hello["potentials"])
    for known in brought.values():
        if not 0 <= float(known["card"].get("cutoff") or 0.0) < 1e3:
            raise ValueError("a cutoff radius that is none")
    return Worker(
        identity,
        int(hello["index"]),
        int(hello["pid"]),
        str(hello.get("host") or HOST),
        {str(name): str(known["form"]) for name, known in brought.items()},
        {str(name): bool(known.get("together", True)) for name, known in brought.items()},
    )


def refusal(hello: Mapping[str, Any], cards: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why a worker may not join a pool that holds these potentials; None when it may."""
    units = hello.get("units", UNITS)
    if units != UNITS:
        return f"the worker computes in {str(units)[:40]}, this pool in {UNITS}"
    for name, known in dict(hello["potentials"]).items():
        ours, theirs = cards.get(name), known["card"]
        if ours is None:
            continue
        if theirs["sha256"] != ours["sha256"]:
            return (
                f"{name} is {_described(ours)} in this pool, the worker brought another model,"
                f" {_described(theirs)}"
            )
        for what in ("elements", "cutoff", "dtype"):
            # JSON has lists where the card has tuples.
            if what in ours and _plain(ours[what]) != _plain(theirs.get(what)):
                return f"{name} has {what} {ours[what]} in this pool and {theirs.get(what)} on the worker"
    return None


def _described(card: Mapping[str, Any]) -> str:
    return f"{str(card['name'])[:80]} (sha256 {str(card['sha256'])[:16]})"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def speeds_of(workers: Sequence[Worker], potential: str, atoms: int) -> dict[bytes, float | None]:
    """Speed of each worker with structures of a size [cost/s].

    Who has not been measured with this potential and size is taken for typical of those who have; where
    nobody has, the nearest size counts. None where nobody was ever measured with this potential.
    """
    key = potential, size_class(atoms)
    own = {w.identity: w.speeds.get(key) for w in workers}
    if None in own.values():
        measured = [speed for speed in own.values() if speed is not None]
        nearest = {w.identity: _nearest(w, *key) for w in workers}
        others = measured or [speed for speed in nearest.values() if speed is not None]
        typical = median(others) if others else None
        for identity, speed in own.items():
            if speed is None:
                own[identity] = typical if measured else nearest[identity] or typical
    return own


def _nearest(worker: Worker, potential: str, size: int) -> float | None:
    found = [(abs(s - size), speed) for (name, s), speed in worker.speeds.items() if name == potential]
    return min(found)[1] if found else None
