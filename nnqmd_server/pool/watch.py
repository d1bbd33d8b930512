"""What happens in a pool, counted: for ``nnqmd status``, the metrics, the web page and the log.

No sockets. Whatever happens, the memory this takes is bounded: by the number of workers, by
``MAX_SIMULATIONS``, ``MAX_POTENTIALS`` and ``MAX_NEWS``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from nnqmd_server.pool.dispatch import Observer
from nnqmd_server.pool.tallies import PotentialWatch, SimulationWatch, WorkerWatch

MAX_SIMULATIONS = 256
"""Simulations that are remembered, the latest ones."""

FORGET = 3600.0
"""A simulation that asks nothing for so long is forgotten [s]."""

HISTORY, STEP = 150, 2.0
"""The recent past is kept in so many steps of so many seconds."""

MAX_POTENTIALS = 64
MAX_NEWS = 50

EACH_FORCE_SET = frozenset({"asked", "given", "done", "answered"})
"""Events of every force set, where all goes well; the others are news."""

IDLE = {"busy_share": 0.0, "atoms_per_second": None}
"""Of a worker that has done nothing yet."""


class Watch:
    """Told by the pool what happens, it counts and passes it on.

    Parameters
    ----------
    clock : callable
        Tells the time [s].

    Attributes
    ----------
    counts : Counter
        Of every kind of event since the pool was started; ``refused`` by whom in ``refused``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._listeners: list[Observer] = []
        self.started = time.time()
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.force_sets = self.structures = 0
        self._potentials: dict[str, PotentialWatch] = {}
        self._workers: dict[int, WorkerWatch] = {}
        self._simulations: OrderedDict[str, SimulationWatch] = OrderedDict()
        self._history: deque[list[int]] = deque(maxlen=HISTORY)
        self._news: deque[dict[str, Any]] = deque(maxlen=MAX_NEWS)

    def listen(self, listener: Observer) -> None:
        """Tell somebody else too, in the pool's thread; must return at once."""
        self._listeners = [*self._listeners, listener]

    def ignore(self, listener: Observer) -> None:
        """Tell somebody no more."""
        self._listeners = [other for other in self._listeners if other is not listener]

    def __call__(self, what: str, fields: dict[str, Any]) -> None:
        """Something has happened."""
        with self._lock:
            now = self._clock()
            self.counts[what] += 1
            count = getattr(self, f"_{what}", None) if what in _COUNTED else None
            if count is not None:
                count(fields, now)
            if what not in EACH_FORCE_SET:
                self._news.append({"time": time.time(), "event": what, "text": in_words(what, fields)})
        for listener in self._listeners:
            listener(what, fields)

    # ---- for displays -------------------------------------------------------------------------------

    def workers(self) -> dict[int, dict[str, Any]]:
        """By number: share of the time it works, speed [atoms/s], work so far."""
        with self._lock:
            now = self._clock()
            return {
                index: {
                    "busy_share": round(worker.busy_share(now), 4),
                    "atoms_per_second": worker.speed(),
                    "busy_seconds": worker.busy_seconds,
                    "structures": worker.structures,
                    "pid": worker.pid,
                    "host": worker.host,
                }
                for index, worker in self._workers.items()
            }

    def simulations(self) -> list[dict[str, Any]]:
        """Who asks, how much, how often; the latest last."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            return [
                {
                    "name": one.name,
                    "potential": one.potential,
                    "force_sets": one.force_sets,
                    "structures": one.structures,
                    "failed": one.failed,
                    "atoms": one.atoms,
                    "beads": one.beads,
                    "force_sets_per_second": round(one.pace(now), 4),
                    "waiting": bool(one.pending),
                    "waits": one.waits(now),
                    "idle": None if one.pending else now - one.heard,
                }
                for one in self._simulations.values()
            ]

    def potentials(self) -> dict[str, PotentialWatch]:
        """Counts and histograms of each potential, copied."""
        with self._lock:
            return {name: one.copy() for name, one in self._potentials.items()}

    def news(self) -> list[dict[str, Any]]:
        """The latest events that are not everyday ones: time, event, text; the latest last."""
        with self._lock:
            return list(self._news)

    def history(self) -> dict[str, Any]:
        """Force sets answered in each step of the recent past; the latest last."""
        with self._lock:
            last = int(self._clock() / STEP)
            counts = dict(self._history)
        steps = range(last - HISTORY, last)  # the step that is not over yet is left out
        return {"seconds": STEP, "force_sets": [counts.get(k, 0) for k in steps]}

    # ---- what is counted ------------------------------------------------------------------------------

    def _joined(self, fields: dict[str, Any], now: float) -> None:
        self._workers[fields["worker"]] = WorkerWatch(fields["pid"], str(fields["host"]), now)

    def _left(self, fields: dict[str, Any], now: float) -> None:
        self._workers.pop(fields["worker"], None)

    _lost = _left

    def _refused(self, fields: dict[str, Any], now: float) -> None:
        self.refused["worker" if fields["whom"] == "worker" else "door"] += 1

    def _asked(self, fields: dict[str, Any], now: float) -> None:
        name = fields["simulation"]
        one = self._simulations.get(name)
        if one is None:
            self._forget(now)
            one = self._simulations[name] = SimulationWatch(name, fields["potential"])
            if len(self._simulations) > MAX_SIMULATIONS:
                self._simulations.popitem(last=False)
        self._simulations.move_to_end(name)
        one.potential, one.heard = fields["potential"], now
        one.beads = fields["structures"]
        one.atoms = round(fields["atoms"] / max(1, fields["structures"]))
        one.pending[fields["request"]] = now
        if len(one.pending) > MAX_SIMULATIONS:  # more than the pool lets wait
            one.pending.pop(next(iter(one.pending)))

    def _given(self, fields: dict[str, Any], now: float) -> None:
        self._potential(fields).batch.add(fields["structures"])
        worker = self._workers.get(fields["worker"])
        if worker is not None:
            worker.given(fields["batch"], now)

    def _done(self, fields: dict[str, Any], now: float) -> None:
        self._potential(fields).compute.add(fields["seconds"])
        worker = self._workers.get(fields["worker"])
        if worker is not None:
            worker.ended(fields["batch"], now)
            worker.busy_seconds += fields["seconds"]
            worker.structures += fields["structures"]
            worker.recent.append((fields["atoms"], fields["seconds"]))
            worker.mark(now)

    def _duplicate(self, fields: dict[str, Any], now: float) -> None:
        worker = self._workers.get(fields["worker"])
        if worker is not None:
            worker.ended(fields["batch"], now)

    _unable = _duplicate

    def _answered(self, fields: dict[str, Any], now: float) -> None:
        potential = self._potential(fields)
        potential.force_sets += 1
        potential.structures += fields["structures"]
        potential.wait.add(fields["wait"])
        potential.elapsed.add(fields["elapsed"])
        self.force_sets += 1
        self.structures += fields["structures"]
        step = int(now / STEP)
        if self._history and self._history[-1][0] == step:
            self._history[-1][1] += 1
        else:
            self._history.append([step, 1])
        one = self._ended(fields, now)
        if one is not None:
            one.force_sets += 1
            one.structures += fields["structures"]
            one.answers.append(now)

    def _failed(self, fields: dict[str, Any], now: float) -> None:
        one = self._ended(fields, now)
        if one is not None:
            one.failed += 1

    def _abandoned(self, fields: dict[str, Any], now: float) -> None:
        self._ended(fields, now)

    def _ended(self, fields: dict[str, Any], now: float) -> SimulationWatch | None:
        one = self._simulations.get(fields["simulation"])
        if one is not None:
            one.pending.pop(fields["request"], None)
            one.heard = now
        return one

    def _potential(self, fields: dict[str, Any]) -> PotentialWatch:
        name = fields["potential"]
        if name not in self._potentials and len(self._potentials) >= MAX_POTENTIALS:
            name = "others"
        found = self._potentials.get(name)
        if found is None:
            found = self._potentials[name] = PotentialWatch()
        return found

    def _forget(self, now: float) -> None:
        for name, one in list(self._simulations.items()):
            if not one.pending and now - one.heard > FORGET:
                del self._simulations[name]


_COUNTED = (
    {"joined", "left", "lost", "refused"}
    | {"asked", "given", "done", "duplicate", "unable"}
    | {"answered", "failed", "abandoned"}
)


def plain(text: object, most: int = 300) -> str:
    """Text from elsewhere, for a terminal: no control characters, not too long."""
    text = str(text)[:most]
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def in_words(what: str, fields: dict[str, Any]) -> str:
    """One line that says what has happened, for people."""
    worker = f"worker {fields.get('worker')}"
    place = f"{worker} (process {fields.get('pid')} on {fields.get('host')})"
    asked = f"{fields.get('simulation')}, force set {fields.get('request')}"
    why = plain(fields.get("what", ""))
    lines = {
        "joined": f"{place} joined",
        "left": f"{place} left",
        "lost": f"{place} was lost: {why}; {fields.get('structures')} structures go to others",
        "refused": f"a {fields.get('whom')} was refused: {why}",
        "failed": f"{asked} failed: {why}",
        "unable": f"{worker} could not evaluate a batch: {why}",
        "retried": f"{fields.get('structures')} structures of {worker} are computed again: {why}",
        "quarantined": f"{asked} is given to nobody any more: {why}",
        "late": f"{worker} is late; another one does its batch too",
        "duplicate": f"{worker} answered after another one; its answer was dropped",
        "memory": f"{worker} ran out of memory: at most {fields.get('structures')} structures of"
        f" {fields.get('atoms')} atoms at once from now on",
        "abandoned": f"nobody waits for {asked} any more",
    }
    return plain(lines.get(what, f"{what} {fields}"), 500)
