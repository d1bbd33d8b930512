"""A glance at the pool, for whatever shows it: ``nnqmd status`` and ``top``, the metrics, the web page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnqmd_server import __version__
from nnqmd_server.pool.crew import HOST
from nnqmd_server.pool.dispatch import Dispatch
from nnqmd_server.pool.watch import IDLE, Watch


@dataclass(frozen=True)
class Status:
    """A glance at the pool, for displays: totals since it was started, and who is there now."""

    version: str
    host: str
    pid: int
    started: float
    now: float
    cards: dict[str, dict[str, Any]]
    workers: list[dict[str, Any]]
    force_sets: int
    structures: int
    waiting: int
    lost_workers: int
    refused: int
    retries: int
    quarantined: int
    failed: int
    simulations: list[dict[str, Any]]
    turned_away: dict[str, int]
    history: dict[str, Any]
    news: list[dict[str, Any]]


def glance(dispatch: Dispatch, watch: Watch, turned_away: Mapping[str, int]) -> Status:
    """Who is there and what has been done; may be called from any thread.

    Parameters
    ----------
    dispatch, watch
        Of the pool.
    turned_away : mapping of str to int
        Connections that the gate has refused, by reason.
    """
    workers = sorted(dispatch.workers.copy().values(), key=lambda w: w.index)
    seen, counts = watch.workers(), watch.counts
    return Status(
        version=__version__,
        host=HOST,
        pid=os.getpid(),
        started=watch.started,
        now=time.time(),
        cards=dispatch.cards.copy(),
        workers=[IDLE | worker.as_dict() | seen.get(worker.index, {}) for worker in workers],
        force_sets=watch.force_sets,
        structures=watch.structures,
        waiting=dispatch.waiting,
        lost_workers=counts["lost"],
        refused=counts["refused"],
        retries=counts["retried"],
        quarantined=counts["quarantined"],
        failed=counts["failed"],
        simulations=watch.simulations(),
        history=watch.history(),
        news=watch.news(),
        turned_away=dict(turned_away),
    )
