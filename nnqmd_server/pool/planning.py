"""Who is given what: pure decisions about what waits and who is there.

Whenever workers are idle, what waits is cut over them so that all end together; what a busy worker would
finish sooner is left for it. Simulations whose structures suit the same worker are merged into one batch,
up to a cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nnqmd_server.pool.crew import Worker, speeds_of
from nnqmd_server.pool.cutting import share_out, within
from nnqmd_server.pool.shares import Job, Run

MAX_COST = 1_000_000.0
"""Largest cost of a batch [edges]; eager Allegro needs about 20 kB for each."""

QUANTUM = 0.25
"""Longest batch while several simulations ask [s]: so long a small one may have to wait for a worker."""

FULL = 0.02
"""A batch that takes so long is full [s]: what a batch costs by itself is little then, and simulations that
are merged all think afterwards, and nobody asks."""

WAIT_ENOUGH = 1.25
"""What idle workers can do at once is left for busy ones only if it ends sooner by this factor."""

AHEAD = 0.005
"""A worker that will be idle so soon is given its next batch already [s], if there is work for it."""


@dataclass(frozen=True)
class Rules:
    """Largest cost of a batch; whether several simulations ask; see :class:`Dispatch` for ``parts``."""

    max_cost: float
    several: bool
    parts: int


@dataclass(eq=False)
class Plan:
    """What a worker is about to be given.

    ``load`` is for how long it has enough to do [s], None when that cannot be told; ``full`` the cost up to
    which simulations are merged.
    """

    worker: Worker
    free: bool
    load: float | None
    runs: list[Run] = field(default_factory=list)
    cost: float = 0.0
    full: float = 0.0
    speed: float | None = None

    def takes(self, run: Run) -> bool:
        """Whether a run, or the beginning of it, may be added now."""
        if not self.free or not self.runs:
            return self.free
        first = self.runs[0]
        return (
            self.worker.together[first.job.potential]
            and first.job.potential == run.job.potential
            and not (run.alone or first.alone)
            and self.cost + run.cost / len(run) <= self.full
        )


def plan_batches(
    queue: Sequence[Job],
    workers: Sequence[Worker],
    now: float,
    max_cost: float = MAX_COST,
    several: bool = False,
    parts: int = 0,
) -> list[Plan]:
    """What each worker is to be given; what is planned is taken out of the ``todo`` of the force sets.

    Parameters
    ----------
    queue : sequence of Job
        What waits, in the order of the fair queue.
    workers : sequence of Worker
        Who is there, idle or not.
    now : float
        Time [s].
    max_cost : float
        Largest cost of a batch.
    several : bool
        Several simulations ask: none may keep a worker for long.
    parts : int
        See :class:`Dispatch`.
    """
    rules = Rules(max_cost, several, parts)
    plans = [Plan(w, is_free(w, now), w.left(now)) for w in sorted(workers, key=lambda w: w.index)]
    for job in queue:
        todo, job.todo = job.todo, []
        for run in todo:
            job.todo += _place(run, plans, rules)
    return plans


def next_free(workers: Iterable[Worker], now: float) -> float:
    """After how long the next worker may be given something [s]; infinite when that is not known."""
    busy = [w.left(now) for w in workers if w.batch is not None and w.ahead is None]
    return min((max(0.0, left - AHEAD) for left in busy if left is not None), default=float("inf"))


def _able(run: Run, plans: Sequence[Plan]) -> list[Plan]:
    """Who may be given a run: one that has failed goes to another worker, where there is one."""
    able = [p for p in plans if run.job.potential in p.worker.forms and not p.worker.leaving]
    return [p for p in able if p.worker.identity not in run.failed_on] or able


def _place(run: Run, plans: Sequence[Plan], rules: Rules) -> list[Run]:
    """Put what is to be given now into the plans; the rest of the run, which goes on waiting."""
    able = _able(run, plans)
    ready = [plan for plan in able if plan.takes(run) and not (rules.parts and plan.runs)]
    if not ready:
        return [run]
    known = speeds_of([plan.worker for plan in able], run.job.potential, run.job.atoms)
    speeds = {identity: speed or 1.0 for identity, speed in known.items()}
    measured = None not in known.values()
    if rules.parts:
        chosen = [min(ready, key=lambda plan: (plan.load, -speeds[plan.worker.identity], plan.worker.index))]
        counts = [len(run)]
    else:
        chosen, counts = ready, _counts(run, ready, speeds)
        others = [plan for plan in able if plan.load is not None] if measured else []
        if len(others) > len(ready):
            best = _counts(run, others, speeds)
            if _end(run, ready, counts, speeds) > WAIT_ENOUGH * _end(run, others, best, speeds):
                chosen, counts = others, best
    rest, first = [], 0
    for plan, count in zip(chosen, counts, strict=True):
        if not count:
            continue
        part = run.part(first, count)
        first += count
        speed = known[plan.worker.identity]
        taken = _take(plan, part, speed, rules) if plan in ready else 0
        plan.load += part.cost / (speed or 1.0)
        if taken < count:
            rest.append(part.part(taken, count - taken))
    return rest


def _take(plan: Plan, part: Run, speed: float | None, rules: Rules) -> int:
    """Add as much of a run as there is room for; how many structures that is."""
    if not plan.runs:
        hurried = speed is not None and rules.several
        room = min(rules.max_cost, QUANTUM * speed) if hurried else rules.max_cost
        plan.full = min(rules.max_cost, FULL * speed) if speed is not None else rules.max_cost
        plan.speed = speed
        whole = rules.parts or part.cost <= room
        taken = len(part) if whole else min(len(part), within(part.costs, room))
    else:
        # Pieces of a force set that wait for different batches would help nobody.
        taken = len(part) if plan.cost + part.cost <= plan.full else 0
    if taken:
        plan.runs.append(part if taken == len(part) else part.part(0, taken))
        plan.cost += plan.runs[-1].cost
    return taken


def is_free(worker: Worker, now: float) -> bool:
    """Whether a worker may be given something: it is idle, or will be in a moment."""
    if worker.batch is None or worker.leaving:
        return not worker.leaving
    left = worker.left(now)
    return worker.ahead is None and left is not None and left <= AHEAD


def _counts(run: Run, plans: Sequence[Plan], speeds: Mapping[bytes, float]) -> list[int]:
    if len(plans) == 1:
        return [len(run)]
    return share_out(run.costs, [speeds[p.worker.identity] for p in plans], [p.load for p in plans])


def _end(run: Run, plans: Sequence[Plan], counts: Sequence[int], speeds: Mapping[bytes, float]) -> float:
    """After how long the last of these workers has done its part of a run [s]."""
    cost = run.cost / len(run)
    parts = zip(plans, counts, strict=True)
    return max(plan.load + n * cost / speeds[plan.worker.identity] for plan, n in parts if n)
