"""Who gets how much of a force set: pure functions, with no clock and no sockets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from nnqmd_server.structures import Array, Structures

EVEN_ENOUGH = 1.1
"""Measured speeds are noisy: an even cut is kept unless another one would end sooner by this factor."""


def estimated_edges(structures: Structures, cutoff: float) -> Array:
    """What each structure costs: about as many edges as its neighbour list will have.

    An atom has rho 4/3 pi rc^3 neighbours at the mean density rho; where a structure is emptier than that
    (slabs, clusters) the estimate is low by the share of vacuum. At least the number of atoms.

    Parameters
    ----------
    structures : Structures
        Cells and atoms.
    cutoff : float
        Cutoff radius of the potential [Angstrom]; 0 when it has none.

    Returns
    -------
    Array
        Shape (n_structures,).
    """
    counts = structures.offsets[1:] - structures.offsets[:-1]
    sphere = 4.0 / 3.0 * math.pi * cutoff**3
    # A cell without volume is the potential's to refuse; it must not upset the queue.
    if (counts == counts[0]).all():
        # Beads have the same size and nearly the same cell: one stands for all.
        atoms = float(counts[0])
        neighbours = sphere * atoms / max(_volume(structures.cells[0]), 1e-6)
        return np.full(len(counts), atoms * max(1.0, min(neighbours, 1e4)))
    return counts * np.clip(sphere * counts / np.maximum(structures.volumes, 1e-6), 1.0, 1e4)


def _volume(cell: Array) -> float:
    # In plain numbers: numpy's determinant of one cell takes longer than all else here.
    (a, b, c), (d, e, f), (g, h, i) = cell.tolist()
    return abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))


def cut(count: int, speeds: Sequence[float], loads: Sequence[float] | None = None) -> list[int]:
    """How many of ``count`` equal structures each worker gets so that the last one ends soonest.

    Structures are handed out one by one to the worker that would finish it first; but evenly, where that
    takes hardly longer.

    Parameters
    ----------
    count : int
        Structures to hand out.
    speeds : sequence of float
        Structures per second of each worker.
    loads : sequence of float, optional
        For how long each worker is still busy [s].
    """
    if len(speeds) == 1:
        return [count]
    loads = [0.0] * len(speeds) if loads is None else loads
    together = max(loads) == min(loads)
    even = [count // len(speeds) + (k < count % len(speeds)) for k in range(len(speeds))]
    if together and max(speeds) <= EVEN_ENOUGH * min(speeds):
        return even
    best = _by_finish(count, speeds, loads)
    if together and _duration(even, speeds) <= EVEN_ENOUGH * _duration(best, speeds):
        return even
    return best


def _by_finish(count: int, speeds: Sequence[float], loads: Sequence[float]) -> list[int]:
    given = [0] * len(speeds)
    ends = [(load + 1.0 / speed, 0, k) for k, (speed, load) in enumerate(zip(speeds, loads, strict=True))]
    heapq.heapify(ends)
    for _ in range(count):
        _, n, k = ends[0]
        given[k] = n + 1
        heapq.heapreplace(ends, (loads[k] + (n + 2) / speeds[k], n + 1, k))
    return given


def _duration(given: Sequence[int], speeds: Sequence[float]) -> float:
    return max(n / speed for n, speed in zip(given, speeds, strict=True))


def share_out(costs: Array, speeds: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Cut a run of structures into consecutive parts, one for each worker, that all end together.

    Parameters
    ----------
    costs : Array
        Of each structure, shape (n_structures,).
    speeds : sequence of float
        Cost per second of each worker.
    loads : sequence of float
        For how long each worker is still busy [s].

    Returns
    -------
    list of int
        How many structures each worker gets, in the order of the structures; their sum is n_structures.
    """
    total, count = float(costs.sum()), len(costs)
    mean = total / count
    counts = cut(count, [speed / mean for speed in speeds], loads)
    if float(costs.max()) <= 1.01 * mean:
        return counts
    # Of unequal size: the borders go to where the running cost is what the equal ones would have.
    running = np.cumsum(costs) - 0.5 * costs
    borders = np.searchsorted(running, np.cumsum(counts) * mean).tolist()
    borders[-1] = count
    return [high - low for low, high in zip([0, *borders[:-1]], borders, strict=True)]


def within(costs: Array, limit: float) -> int:
    """How many of the first structures cost no more than ``limit`` together; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(costs), limit * (1 + 1e-9), side="right")))


def fixed_parts(costs: Array, parts: int, limit: float) -> list[int]:
    """A cut that depends on the structures alone, not on who is there or how fast.

    Parameters
    ----------
    costs : Array
        Of each structure, shape (n_structures,).
    parts : int
        Into how many even parts.
    limit : float
        Largest cost of a part; where it is more, there are more parts.
    """
    size = -(-len(costs) // parts)
    counts = []
    first = 0
    while first < len(costs):
        counts.append(min(size, within(costs[first:], limit), len(costs) - first))
        first += counts[-1]
    return counts
