"""A potential that costs nothing: what is left is the way of a force set through the house."""

from __future__ import annotations

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results, Structures


class Nothing:
    """No energy, no forces, no virial, for any structure."""

    form = "zeros"
    card = Card("nothing", "0" * 64, (), 0.0, "float64")

    def evaluate(self, structures: Structures) -> Results:
        """Zeros."""
        count = len(structures)
        return Results(np.zeros(count), np.zeros((structures.n_atoms, 3)), np.zeros((count, 3, 3)))


def nothing(_device: str) -> Nothing:
    """The potential, for ``nnqmd serve benchmarks/nothing.py:nothing``."""
    return Nothing()
