"""Neighbour lists of a ring polymer, kept and made anew, for benchmarks/evaluate.py."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from evaluate_inputs import MODEL, RING, Figures, record, spread


def ring_lists(figures: Figures, folder: Path, workers: int, rounds: int) -> None:
    """The time of the lists of a whole ring, step by step."""
    from nnqmd_server.memory import keep_buffers
    from nnqmd_server.pool.launch import LocalPool
    from nnqmd_server.potentials.neighbours import Lists, fresh_edges
    from nnqmd_server.potentials.package import read_card

    with LocalPool({"ammonia": str(MODEL)}, folder / "logs", workers=workers, device="cpu") as pool:
        pool.wait_ready()
        sets = record(folder / "record", pool, 64, RING, 40, 40)
    cutoff = read_card(MODEL).cutoff
    found: dict[str, list[float]] = {"each": [], "kept": []}
    keep_buffers()  # as a worker's process does, which also warms up before it begins
    fresh_edges(sets[0], cutoff)
    Lists(cutoff).edges(sets[0])
    for k in range(rounds):
        each = kept = 0.0
        lists = Lists(cutoff)  # its first list is built within the time
        for one in sets:  # in turn: neither finds the cache as it has left it
            start = time.perf_counter()
            fresh_edges(one, cutoff)
            between = time.perf_counter()
            lists.edges(one)
            kept += time.perf_counter() - between
            each += between - start
        found["each"].append(1e3 * each / len(sets))
        found["kept"].append(1e3 * kept / len(sets))
        print(
            f"round {k + 1}: one by one {found['each'][-1]:.3f}, kept {found['kept'][-1]:.3f} ms per step"
            f" (lists made: {lists.built})",
            flush=True,
        )
    same_edges(sets, cutoff)
    ratios = [a / b for a, b in zip(found["each"], found["kept"], strict=True)]
    spread(figures, "ring_list_speedup.p32", ratios)
    figures["list_each_ms_per_step.p32"] = statistics.median(found["each"])
    figures["list_kept_ms_per_step.p32"] = statistics.median(found["kept"])


def same_edges(sets: list, cutoff: float) -> None:
    """Both ways find the same edges in every force set; the program ends otherwise."""
    from nnqmd_server.potentials.neighbours import Lists, fresh_edges

    lists = Lists(cutoff)
    for number, one in enumerate(sets):
        for kept, fresh in zip(lists.edges(one), fresh_edges(one, cutoff), strict=True):
            if not np.array_equal(_sorted(*kept), _sorted(*fresh)):
                sys.exit(f"force set {number}: the lists that are kept are not those of the positions")


def _sorted(edges: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    rows = np.concatenate([edges.T, shifts.astype(np.int64)], axis=1)
    return rows[np.lexsort(rows.T[::-1])]
