"""What a pool counts, as Prometheus text (prometheus.io, exposition formats)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from nnqmd_server.pool.tallies import Tally
from nnqmd_server.pool.watch import Watch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_EVENTS = {
    "joined": ("nnqmd_workers_joined", "Workers that joined."),
    "left": ("nnqmd_workers_left", "Workers that left after their last answer."),
    "lost": ("nnqmd_workers_lost", "Workers that died or fell silent."),
    "unable": ("nnqmd_unable", "Batches that a worker could not evaluate, or with forces that may not pass."),
    "retried": ("nnqmd_retries", "Batches, or parts of them, that were computed again."),
    "quarantined": ("nnqmd_quarantined", "Force sets that killed two workers."),
    "failed": ("nnqmd_force_sets_failed", "Force sets that failed."),
    "late": ("nnqmd_late_batches", "Batches that were late, and of which another worker got a copy."),
    "duplicate": ("nnqmd_duplicate_answers", "Answers of the slower of two workers, dropped."),
    "memory": ("nnqmd_out_of_memory", "Times that a worker ran out of memory and took less from then on."),
    "abandoned": ("nnqmd_force_sets_abandoned", "Force sets that nobody waited for any more."),
}


class PoolCollector:
    """Makes the metrics of a pool when somebody asks for them; keeps nothing itself.

    Parameters
    ----------
    watch : Watch
        What has been counted.
    status : callable
        The pool's status as plain fields.
    """

    def __init__(self, watch: Watch, status: Callable[[], dict[str, Any]]) -> None:
        self._watch = watch
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        status = self._status()
        info = {"version": str(status["version"]), "host": str(status["host"])}
        yield InfoMetricFamily("nnqmd_pool", "Version and machine of the pool.", value=info)
        yield GaugeMetricFamily(
            "nnqmd_pool_start_time_seconds", "When the pool was started [Unix time].", value=status["started"]
        )
        yield GaugeMetricFamily(
            "nnqmd_waiting_force_sets",
            "Force sets of which no part has been given to a worker.",
            value=status["waiting"],
        )
        yield GaugeMetricFamily("nnqmd_workers", "Workers that are ready.", value=len(status["workers"]))
        counts = self._watch.counts.copy()
        for event, (name, text) in _EVENTS.items():
            yield CounterMetricFamily(name, text, value=counts[event])
        refused = CounterMetricFamily("nnqmd_refused", "Messages and workers refused.", labels=["whom"])
        for whom in ("door", "worker"):
            refused.add_metric([whom], self._watch.refused[whom])
        yield refused
        turned_away = CounterMetricFamily(
            "nnqmd_turned_away", "Connections without the right keys.", labels=["why"]
        )
        for why, count in status.get("turned_away", {}).items():
            turned_away.add_metric([why], count)
        yield turned_away
        yield from self._potentials()
        yield from _workers(status["workers"])
        yield from _simulations(status["simulations"])

    def _potentials(self) -> Iterator[Metric]:
        sets = CounterMetricFamily("nnqmd_force_sets", "Force sets answered.", labels=["potential"])
        structures = CounterMetricFamily(
            "nnqmd_structures", "Structures (beads) of the force sets answered.", labels=["potential"]
        )
        batch = HistogramMetricFamily(
            "nnqmd_batch_structures", "Structures in a batch given to a worker.", labels=["potential"]
        )
        wait = HistogramMetricFamily(
            "nnqmd_queue_wait_seconds",
            "From a force set's arrival until its first part is given to a worker.",
            labels=["potential"],
        )
        compute = HistogramMetricFamily(
            "nnqmd_compute_seconds", "Time in which a worker evaluated a batch.", labels=["potential"]
        )
        elapsed = HistogramMetricFamily(
            "nnqmd_answer_seconds", "From a force set's arrival to its answer.", labels=["potential"]
        )
        for name, one in self._watch.potentials().items():
            sets.add_metric([name], one.force_sets)
            structures.add_metric([name], one.structures)
            for family, tally in (
                (batch, one.batch),
                (wait, one.wait),
                (compute, one.compute),
                (elapsed, one.elapsed),
            ):
                family.add_metric([name], _buckets(tally), tally.total)
        yield from (sets, structures, batch, wait, compute, elapsed)


def _buckets(tally: Tally) -> list[tuple[str, float]]:
    """Cumulative counts, as Prometheus wants them."""
    buckets, below = [], 0
    for bound, count in zip((*tally.bounds, float("inf")), tally.counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", below))
    return buckets


def _workers(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["worker", "host"]
    share = GaugeMetricFamily(
        "nnqmd_worker_busy_share", "Part of the last 30 s that a worker computed.", labels=labels
    )
    busy = CounterMetricFamily(
        "nnqmd_worker_busy_seconds", "Time that a worker has spent computing.", labels=labels
    )
    done = CounterMetricFamily("nnqmd_worker_structures", "Structures a worker evaluated.", labels=labels)
    speed = GaugeMetricFamily(
        "nnqmd_worker_atoms_per_second", "Speed of a worker in its latest batches.", labels=labels
    )
    for one in workers:
        key = [str(one["index"]), str(one["host"])]
        share.add_metric(key, one["busy_share"])
        busy.add_metric(key, one["busy_seconds"])
        done.add_metric(key, one["structures"])
        if one["atoms_per_second"] is not None:
            speed.add_metric(key, one["atoms_per_second"])
    yield from (share, busy, done, speed)


def _simulations(simulations: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["simulation", "potential"]
    sets = CounterMetricFamily(
        "nnqmd_simulation_force_sets", "Force sets answered to a simulation.", labels=labels
    )
    structures = CounterMetricFamily(
        "nnqmd_simulation_structures", "Structures (beads) of these.", labels=labels
    )
    pace = GaugeMetricFamily(
        "nnqmd_simulation_force_sets_per_second", "How often a simulation is answered, lately.", labels=labels
    )
    waiting = GaugeMetricFamily(
        "nnqmd_simulation_waiting", "1 while a simulation waits for forces.", labels=labels
    )
    for one in simulations:
        key = [str(one["name"]), str(one["potential"])]
        sets.add_metric(key, one["force_sets"])
        structures.add_metric(key, one["structures"])
        pace.add_metric(key, one["force_sets_per_second"])
        waiting.add_metric(key, float(one["waiting"]))
    yield from (sets, structures, pace, waiting)


class Metrics:
    """The metrics of a pool and of its process (memory, CPU time), as text.

    Parameters
    ----------
    watch, status
        As for :class:`PoolCollector`.
    """

    def __init__(self, watch: Watch, status: Callable[[], dict[str, Any]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(PoolCollector(watch, status))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The metrics now."""
        return generate_latest(self._registry)
