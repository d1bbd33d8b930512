"""A potential with everything that i-PI can be sent: springs to the origin, as i-PI's own ``harmonic`` has.

What it says beside energies and forces tells one bead and one atom from every other, and can be computed
from i-PI's positions. It serves as a Python potential: ``nnqmd serve tests/spring_potential.py:springs``.
"""

from __future__ import annotations

import os
import time

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results
from nnqmd_server.units import BOHR, HARTREE

SPRING = 0.02
"""Spring constant [hartree/bohr^2]."""
MEMBERS = np.array([0.7, 0.9, 1.4])
"""Springs of the committee's members, in units of the whole; their mean is 1."""
CHARGE = 0.05
"""Charge of an atom per length along y [e/Angstrom]."""
PROPERTIES = (
    "dipole", "born_charges", "charge", "committee_energy", "committee_forces", "committee_virial"
)  # fmt: skip


class SpringPotential:
    """Springs to the origin with spring constant ``spring`` [hartree/bohr^2].

    An evaluation takes ``seconds``, but for the first ``quick`` ones.
    """

    form = "numpy"

    def __init__(self, spring: float = SPRING, seconds: float = 0.0, quick: int = 0) -> None:
        self.spring = spring * HARTREE / BOHR**2
        self.seconds, self.quick = seconds, quick
        self.card = Card("springs", "0" * 64, ("N", "H"), 0.0, "float64", PROPERTIES)

    def evaluate(self, structures) -> Results:
        self.quick -= 1
        if self.quick < 0:
            time.sleep(self.seconds)
        count, positions = len(structures), structures.positions
        beads = positions.reshape(count, -1, 3)
        energy = 0.5 * self.spring * np.einsum("kij,kij->k", beads, beads)
        virial = -self.spring * np.einsum("kia,kib->kab", beads, beads)
        return Results(
            energy,
            -self.spring * positions,
            virial,
            {
                "dipole": beads[:, 0].copy(),
                "committee_energy": energy[:, None] * MEMBERS,
                "committee_virial": virial[:, None] * MEMBERS[:, None, None],
            },
            {
                "charge": CHARGE * positions[:, 1],
                "born_charges": CHARGE * positions[:, :, None] * np.arange(1, 4),
                "committee_forces": -self.spring * positions[:, None] * MEMBERS[:, None],
            },
        )


def springs(device: str) -> SpringPotential:
    """The potential, for ``nnqmd serve``."""
    seconds, quick = os.environ.get("SPRING_SECONDS", "0"), os.environ.get("SPRING_QUICK", "1")
    return SpringPotential(seconds=float(seconds), quick=int(quick))  # one is the worker's warming up


class Marked(SpringPotential):
    """Springs that fail on one structure, known by its positions [bohr] as i-PI prints them."""

    def __init__(self, marked) -> None:
        super().__init__()
        self.marked = marked

    def evaluate(self, structures) -> Results:
        results = super().evaluate(structures)
        beads = structures.positions.reshape(len(structures), -1, 3) / BOHR
        if beads.shape[1:] == self.marked.shape:  # not so when the worker warms up
            wrong = abs(beads - self.marked).max(axis=(1, 2)) < 2e-4  # six digits are printed
            results.atom_properties["charge"][wrong.repeat(len(self.marked))] = float("nan")
        return results


def marked(device: str) -> Marked:
    """The same for ``nnqmd serve``; ``marked.npy`` has the positions."""
    return Marked(np.load("marked.npy"))
