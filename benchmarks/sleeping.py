"""A potential that takes a fixed time and whose answers anyone can check: for benchmarks of the pool.

``$SLEEP_MS`` is the time for each structure [ms].
"""

from __future__ import annotations

import os
import time

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results, Structures


def expected(structures: Structures) -> Results:
    """What it answers: small forces, different for every position, so that any mix-up shows."""
    energy = np.add.reduceat(structures.positions[:, 0], structures.offsets[:-1])
    return Results(energy, 1e-3 * np.sin(structures.positions), np.zeros((len(structures), 3, 3)))


class Sleeper:
    """Sleeps for each structure, as a model would compute on a device of its own."""

    form = "sleeps"

    def __init__(self) -> None:
        self.card = Card("sleeper", "0" * 64, ("H", "N"), 0.0, "float64")
        self._seconds = 1e-3 * float(os.environ.get("SLEEP_MS", "1"))

    def evaluate(self, structures: Structures) -> Results:
        """The answer, after a while."""
        until = time.perf_counter() + self._seconds * len(structures)
        results = expected(structures)
        time.sleep(max(0.0, until - time.perf_counter()))
        return results


def sleeper(device: str) -> Sleeper:
    """For ``sleeping.py:sleeper``."""
    return Sleeper()
