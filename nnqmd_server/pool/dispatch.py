"""What is to be computed, by whom, and what has become of it. No sockets, and the time is given.

The decisions are made elsewhere: whose turn it is in :mod:`fairness`, who gets what in :mod:`planning`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from nnqmd_server.pool.crew import Worker
from nnqmd_server.pool.cutting import estimated_edges, fixed_parts
from nnqmd_server.pool.fairness import FairQueue
from nnqmd_server.pool.planning import MAX_COST, Plan, is_free, next_free, plan_batches
from nnqmd_server.pool.shares import (
    MAX_FORCE,
    TRIES,
    Batch,
    Fault,
    Job,
    Run,
    judge,
    results_by_run,
    results_of,
    structures_of,
)
from nnqmd_server.structures import Array, Results

log = logging.getLogger("nnqmd.pool")

LATE_FACTOR, LATE_LEAST, LATE_UNKNOWN = 3.0, 2.0, 120.0
"""A batch is late after so many times the expected time and so many seconds; or [s] when nothing is known."""

SILENCE = 30.0
"""A door that has not asked for its force set for so long does not want it any more [s]."""

Outcome = tuple[Job, Results | Fault]
Observer = Callable[[str, dict[str, Any]], None]


class Dispatch:
    """The queue, the workers, and who is at what.

    Parameters
    ----------
    max_force : float
        Largest force that is let through to a simulation [eV/Angstrom].
    max_cost : float
        Largest cost of a batch [edges].
    parts : int
        When not 0, every force set is cut into so many even parts, whoever is there, and nothing is merged:
        the same structures are then always evaluated together.
    observe : callable, optional
        Told what happens: a word and plain fields.
    """

    def __init__(
        self,
        max_force: float = MAX_FORCE,
        max_cost: float = MAX_COST,
        parts: int = 0,
        observe: Observer | None = None,
    ) -> None:
        self.workers: dict[bytes, Worker] = {}
        self.jobs: dict[tuple[str, int], Job] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self._max_force = max_force
        self._max_cost = max_cost
        self._parts = parts
        self._observe = observe
        self._count = 0
        self._queue = FairQueue()

    def tell(self, event: str, /, **fields: Any) -> None:
        """Tell whoever watches."""
        if self._observe is not None:
            self._observe(event, fields)

    # ---- force sets -------------------------------------------------------------------------------

    def add(self, job: Job, now: float) -> None:
        """Put a force set into the queue."""
        self._count += 1
        job.number, job.heard, job.missing = self._count, now, len(job.structures)
        self._estimate(job)
        self._queue.enter(job, now)
        self.jobs[job.key] = job
        first = 0
        counts = fixed_parts(job.costs, self._parts, self._max_cost) if self._parts else [len(job.structures)]
        for count in counts:
            job.todo.append(Run(job, first, first + count))
            first += count
        self.tell("asked", **_of(job), atoms=job.structures.n_atoms)

    def _estimate(self, job: Job) -> None:
        cutoff = self.cards.get(job.potential, {}).get("cutoff") or 0.0
        job.costs = estimated_edges(job.structures, float(cutoff))
        job.sums = [0.0, *np.cumsum(job.costs).tolist()]

    @property
    def waiting(self) -> int:
        """Force sets of which no part has been given to a worker."""
        return sum(job.begun is None for job in self.jobs.copy().values())  # asked by other threads too

    def tidy(self, now: float) -> None:
        """Forget force sets that nobody asks for any more, and simulations that have gone."""
        for job in [job for job in self.jobs.values() if now - job.heard > SILENCE]:
            self.end(job)
            self.tell("abandoned", simulation=job.name, request=job.request, potential=job.potential)
        self._queue.forget(now, {job.simulation for job in self.jobs.values()})

    def end(self, job: Job) -> None:
        """Forget a force set; answers to parts of it that are under way will be passed over."""
        job.ended = True
        job.todo.clear()
        self.jobs.pop(job.key, None)

    def _fail(self, job: Job, fault: Fault) -> list[Outcome]:
        if job.ended:
            return []
        self.end(job)
        self.tell("failed", **_of(job), what=fault.what)
        return [(job, fault)]

    def fail_all(self, fault: Fault) -> list[Outcome]:
        """Fail everything that is asked."""
        return [outcome for job in list(self.jobs.values()) for outcome in self._fail(job, fault)]

    # ---- workers ----------------------------------------------------------------------------------

    def join(self, worker: Worker, cards: Mapping[str, dict[str, Any]]) -> None:
        """A worker is ready."""
        self.workers[worker.identity] = worker
        new = set(cards) - set(self.cards)
        self.cards |= cards
        for job in self.jobs.values():
            if job.potential in new:
                self._estimate(job)
        self.tell("joined", **_who(worker), potentials=worker.forms)

    def leave(self, worker: Worker) -> bool:
        """A worker wants no more; whether it may go at once."""
        worker.leaving = True
        if worker.batch is None:
            del self.workers[worker.identity]
            self.tell("left", **_who(worker))
            return True
        return False

    def lose(self, worker: Worker, what: str, unsent: Batch | None = None) -> list[Outcome]:
        """A worker is gone; what it was at goes to others, unless it has killed one before.

        ``unsent`` is a batch that never reached it, which it cannot have died of.
        """
        del self.workers[worker.identity]
        batch, ahead = worker.batch, worker.ahead
        worker.batch = worker.ahead = None
        held = sum(len(one.structures) for one in (batch, ahead) if one)
        self.tell("lost", **_who(worker), what=what, structures=held)
        outcomes = []
        for run in [run for one in (batch, ahead) if one for run in one.runs]:
            run.job.clean = False  # the worker may live, and only have been silent
        for run in batch.wanted if batch and not batch.answered and batch is not unsent else ():
            run.deaths += 1
            if run.deaths > 1:
                outcomes += self._quarantine(run)
        for one in (batch, ahead):
            if one is not None:
                one.holders.remove(worker.identity)
                if not one.holders and not one.answered:
                    self._again(worker, one, one.wanted, what)
        return outcomes

    def _quarantine(self, run: Run) -> list[Outcome]:
        places, job, died = list(range(run.first, run.last)), run.job, "A force set has killed two workers."
        name = {"simulation": job.name, "request": job.request, "potential": job.potential}
        self.tell("quarantined", **name, places=places, what=died)
        return self._fail(job, Fault(died, "See the workers' logs.", tuple(places)))

    def _again(self, worker: Worker, batch: Batch, runs: Iterable[Run], what: str) -> None:
        """Back into the queue with runs of a batch, each on its own from now on."""
        count = 0
        for run in runs:
            count += len(run)
            run.alone = True
            # One by one, so that a structure that kills a second worker takes no other with it.
            single = run.deaths and not self._parts
            run.job.todo[:0] = [run.part(k, 1) for k in range(len(run))] if single else [run]
        if count:
            self.tell(
                "retried",
                batch=batch.number,
                worker=worker.index,
                potential=batch.potential,
                structures=count,
                what=what,
            )

    # ---- who gets what ----------------------------------------------------------------------------

    def hand_out(self, now: float) -> list[tuple[Worker, Batch]]:
        """Give workers that are idle, or soon will be, what waits; idle ones also a copy of what is late."""
        if not self.jobs or not any(is_free(w, now) for w in self.workers.values()):
            return []
        given: list[tuple[Worker, Batch]] = []
        queue = self._queue.order(job for job in self.jobs.values() if job.todo)
        if queue:
            workers, several = list(self.workers.values()), self._queue.several
            plans = plan_batches(queue, workers, now, self._max_cost, several, self._parts)
            given = [(plan.worker, self._give(plan, now)) for plan in plans if plan.runs]
        if any(_is_late(w, now) for w in self.workers.values()):
            idle = [w for w in self.workers.values() if w.batch is None and not w.leaving]
            given += [pair for w in idle for pair in self._help_out(w, now)]
        return given

    def pause(self, now: float, longest: float) -> float:
        """After how long to look again, if nothing happens [s]: when a worker is to be given more work."""
        if not any(job.todo for job in self.jobs.values()):
            return longest
        return min(longest, next_free(self.workers.values(), now))

    def _give(self, plan: Plan, now: float) -> Batch:
        self._count += 1
        worker, runs = plan.worker, plan.runs
        structures = structures_of(runs)
        potential = runs[0].job.potential
        expected = plan.cost / plan.speed if plan.speed else None
        batch = Batch(self._count, potential, runs, structures, plan.cost, now, expected)
        for run in runs:
            run.job.begun = now if run.job.begun is None else run.job.begun
            run.job.given += run.cost
        self._hold(worker, batch, now, wait=max(now - run.job.arrived for run in runs), copy=False)
        return batch

    def _hold(self, worker: Worker, batch: Batch, now: float, wait: float, copy: bool) -> None:
        if worker.batch is None:
            worker.batch, worker.since = batch, now
        else:
            worker.ahead = batch
        batch.holders.append(worker.identity)
        for run in batch.runs if copy else ():
            run.job.clean = False
        self.tell(
            "given",
            **_what(worker, batch),
            cost=batch.cost,
            simulations=len({run.job.simulation for run in batch.runs}),
            wait=wait,
            copy=copy,
        )

    def _help_out(self, helper: Worker, now: float) -> list[tuple[Worker, Batch]]:
        """A copy of a late batch for a worker that has nothing else to do; the first answer counts."""
        for worker in self.workers.values():
            if not _is_late(worker, now):
                continue
            elapsed = now - worker.since
            # What it was to do next is stuck behind what it is at.
            for batch in (worker.batch, worker.ahead):
                if batch is not None and _may_help(helper, batch):
                    log.warning(
                        "worker %s is late (%.1f s); %s does it too", worker.index, elapsed, helper.index
                    )
                    late = {"batch": batch.number, "worker": worker.index}
                    self.tell("late", **late, elapsed=elapsed, expected=worker.batch.expected)
                    self._hold(helper, batch, now, wait=elapsed, copy=True)
                    return [(helper, batch)]
        return []

    # ---- what comes back --------------------------------------------------------------------------

    def _take_back(self, worker: Worker, number: int, now: float) -> Batch | None:
        """The batch that a worker answers; None when it was given nothing of this number."""
        batch = worker.batch
        if batch is None or batch.number != number:
            return None
        worker.batch, worker.ahead, worker.since = worker.ahead, None, now
        batch.holders.remove(worker.identity)
        return batch

    def done(
        self, worker: Worker, number: int, arrays: dict[str, Array], seconds: float, now: float
    ) -> list[Outcome]:
        """A worker has evaluated what it was given."""
        batch = self._take_back(worker, number, now)
        if batch is None:
            return []
        if batch.answered:
            worker.measure(batch, seconds)  # that it was the slower one is to be learned too
            self.tell("duplicate", batch=number, worker=worker.index)
            return []
        results = judge(arrays, batch.structures, self._max_force)
        if isinstance(results, Fault):
            return self._try_again(worker, batch, results)
        batch.answered = True
        worker.measure(batch, seconds)
        worker.structures += len(batch.structures)
        worker.busy_seconds += seconds
        self.tell("done", **_what(worker, batch), seconds=seconds, elapsed=now - batch.given)
        outcomes: list[Outcome] = []
        parts = results_by_run(batch.runs, batch.structures, results)
        for run, part in zip(batch.runs, parts, strict=True):
            job = run.job
            if job.ended:
                continue
            job.parts[run.first] = part
            job.missing -= len(run)
            if not job.missing:
                self.end(job)
                wait = (job.begun or now) - job.arrived
                atoms = job.structures.n_atoms
                self.tell("answered", **_of(job), atoms=atoms, wait=wait, elapsed=now - job.arrived)
                outcomes.append((job, results_of(job)))
        return outcomes

    def failed(self, worker: Worker, number: int, fault: Fault, now: float) -> list[Outcome]:
        """A worker could not evaluate what it was given."""
        batch = self._take_back(worker, number, now)
        return [] if batch is None or batch.answered else self._try_again(worker, batch, fault)

    def _try_again(self, worker: Worker, batch: Batch, fault: Fault) -> list[Outcome]:
        log.warning("worker %s, batch %s: %s", worker.index, batch.number, fault.what)
        self.tell(
            "unable", batch=batch.number, worker=worker.index, potential=batch.potential, what=fault.what
        )
        jobs = {id(run.job) for run in batch.runs}
        outcomes: list[Outcome] = []
        back = []
        first = 0
        for run in batch.runs:
            inside = [k - first for k in fault.suspects if first <= k < first + len(run)]
            first += len(run)
            if run.job.ended:
                continue
            if inside or not fault.suspects:
                run.failed_on += (worker.identity,)
            hopeless = fault.final and len(jobs) == 1
            if hopeless or len(run.failed_on) >= TRIES:
                places = tuple(run.first + k for k in inside)
                outcomes += self._fail(run.job, Fault(fault.what, fault.fix, places, fault.final))
            elif not batch.holders:
                back.append(run)
        self._again(worker, batch, [run for run in back if not run.job.ended], fault.what)
        return outcomes


def _is_late(worker: Worker, now: float) -> bool:
    """Whether a worker should have answered long ago."""
    if worker.batch is None:
        return False
    known = worker.batch.expected
    return now - worker.since > (LATE_UNKNOWN if known is None else LATE_LEAST + LATE_FACTOR * known)


def _may_help(helper: Worker, batch: Batch) -> bool:
    wanted = not batch.answered and len(batch.holders) == 1 and bool(batch.wanted)
    failed = any(helper.identity in run.failed_on for run in batch.runs)
    return wanted and batch.potential in helper.forms and not failed


def _who(worker: Worker) -> dict[str, Any]:
    return {"worker": worker.index, "pid": worker.pid, "host": worker.host}


def _what(worker: Worker, batch: Batch) -> dict[str, Any]:
    return {
        "batch": batch.number,
        "worker": worker.index,
        "potential": batch.potential,
        "structures": len(batch.structures),
        "atoms": batch.structures.n_atoms,
    }


def _of(job: Job) -> dict[str, Any]:
    return {
        "simulation": job.name,
        "request": job.request,
        "potential": job.potential,
        "structures": len(job.structures),
    }
