"""Potentials that can share a batch, for tests/test_composites.py; they count what they prepare."""

from __future__ import annotations

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results


class Counted:
    """Springs with ``spring`` [eV/Angstrom^2] to the origin; ``prepared`` has the cutoff of every call."""

    form = "numpy"
    together = False

    def __init__(self, spring, cutoff, elements=("N", "H"), properties=(), dtype="float64"):
        self.spring, self.prepared = spring, []
        self.card = Card(f"spring{spring}", f"{int(10 * spring):064d}", elements, cutoff, dtype, properties)

    def prepare(self, structures, cutoff=None):
        self.prepared.append(cutoff)
        return structures, cutoff or self.card.cutoff

    def run(self, ready):
        structures, cutoff = ready
        assert cutoff >= self.card.cutoff
        q, parts = structures.positions, [structures.atoms_of(k) for k in range(len(structures))]
        energy = np.array([0.5 * self.spring * (q[part] ** 2).sum() for part in parts])
        virial = np.array([-self.spring * q[part].T @ q[part] for part in parts])
        of_all = {"dipole": np.array([self.spring * q[part].sum(axis=0) for part in parts])}
        of_atoms = {"charge": self.spring * q[:, 1]}
        wanted = self.card.properties
        return Results(
            energy,
            -self.spring * q,
            virial,
            {name: value for name, value in of_all.items() if name in wanted},
            {name: value for name, value in of_atoms.items() if name in wanted},
        )

    def evaluate(self, structures):
        return self.run(self.prepare(structures))


class Alone:
    """The same without a batch to share."""

    form = "alone"

    def __init__(self, spring, **options):
        self._inner = Counted(spring, 0.0, **options)
        self.card = self._inner.card

    def evaluate(self, structures):
        return self._inner.evaluate(structures)


def soft(device):
    return Counted(0.5, 4.0, properties=("dipole",))


def stiff(device):
    return Counted(1.5, 5.0, properties=("dipole",))
