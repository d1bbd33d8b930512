"""Two Python potentials for ``nnqmd run --model``: springs to the origin, as i-PI's ``harmonic`` has them.

The spring of an atom is in proportion to its atomic number, in units of nitrogen's: what is told wrong
elements is seen. For i-PI's ``harmonic`` beside it, all atoms of a system are of one element.
"""

from __future__ import annotations

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results
from nnqmd_server.units import BOHR, HARTREE

SOFT, STIFF = 0.01, 0.07
"""Spring constants for nitrogen [hartree/bohr^2]."""


class Springs:
    """Springs to the origin; ``spring`` in hartree/bohr^2, for nitrogen."""

    form = "numpy"

    def __init__(self, name: str, spring: float, properties: tuple[str, ...] = ()) -> None:
        self.card = Card(name, name[0] * 64, ("N", "H", "He"), 0.0, "float64", properties)
        self._spring = spring * HARTREE / BOHR**2

    def evaluate(self, structures) -> Results:
        spring = self._spring * structures.numbers[:, None] / 7.0
        forces = -spring * structures.positions
        energies = 0.5 * spring * structures.positions**2
        atoms = [structures.atoms_of(k) for k in range(len(structures))]
        # The "dipole" tells a bead from every other, and can be found from i-PI's positions.
        dipole = np.array([structures.positions[a][0] for a in atoms])
        properties = {"dipole": dipole} if self.card.properties else {}
        energy = np.array([energies[a].sum() for a in atoms])
        return Results(energy, forces, np.zeros((len(atoms), 3, 3)), properties)


def soft(device: str) -> Springs:
    return Springs("soft", SOFT)


def stiff(device: str) -> Springs:
    return Springs("stiff", STIFF, ("dipole",))
