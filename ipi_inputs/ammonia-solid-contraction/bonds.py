"""The bonds inside ammonia molecules, cheap: the reference of the contraction in input.xml.

Morse functions for the N-H bonds and springs for the H-N-H angles, fitted to the DFT forces of the solid
frames in examples/ammonia/data. It need not be good: whatever it misses, the network puts right on the
contracted ring polymer. It must only carry what is stiff.

    nnqmd run input.xml --model allegro=MODEL.nequip.zip --model bonds=bonds.py:bonds
"""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np

from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Array, Results, Structures

DEPTH, RATE, LENGTH = 4.6, 2.083, 1.0249
"""Morse: well depth [eV] (not fitted), exponent [1/Angstrom], bond length [Angstrom]."""
BEND, ANGLE = 3.198, 107.57
"""Spring of an angle [eV/rad^2] and where it rests [degree]."""


def bonds_and_angles(numbers: Array, positions: Array, cell: Array) -> tuple[Array, Array]:
    """Which atoms are bound: (n_bonds, 2), N first, and pairs of bonds at one N (n_angles, 2).

    Every H belongs to the nearest N.
    """
    nitrogen, hydrogen = np.flatnonzero(numbers == 7), np.flatnonzero(numbers == 1)
    apart = nearest(positions[hydrogen][:, None] - positions[nitrogen][None], cell)
    owner = np.linalg.norm(apart, axis=-1).argmin(axis=1)
    angles = [pair for k in range(len(nitrogen)) for pair in combinations(np.flatnonzero(owner == k), 2)]
    return np.column_stack([nitrogen[owner], hydrogen]), np.array(angles, dtype=int).reshape(-1, 2)


def nearest(vectors: Array, cell: Array) -> Array:
    """Vectors to the nearest image; good for those much shorter than the cell."""
    return vectors - np.rint(vectors @ np.linalg.inv(cell)) @ cell


class Bonds:
    """Energies [eV], forces [eV/Angstrom] and virials [eV] of a batch of ammonia structures."""

    form = "numpy"

    def __init__(
        self, rate: float = RATE, length: float = LENGTH, bend: float = BEND, angle: float = ANGLE
    ) -> None:
        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.card = Card("bonds", source, ("N", "H"), 2.0, "float64")
        self._morse, self._bend = (rate, length), (bend, np.radians(angle))

    def evaluate(self, structures: Structures) -> Results:
        """The potential of each structure; all are beads of one system, and the first tells the bonds."""
        count = len(structures)
        x = structures.positions.reshape(count, -1, 3)
        numbers = structures.numbers[structures.atoms_of(0)]
        bonds, angles = bonds_and_angles(numbers, x[0], structures.cells[0])
        n, h = bonds.T
        vectors = np.stack([nearest(x[k][h] - x[k][n], structures.cells[k]) for k in range(count)])
        r = np.linalg.norm(vectors, axis=-1)
        unit = vectors / r[..., None]
        rate, length = self._morse
        decay = np.exp(-rate * (r - length))
        energy = (DEPTH * (1 - decay) ** 2).sum(axis=1)
        pull = -(2 * DEPTH * rate * (1 - decay) * decay)[..., None] * unit  # force on each H
        bend, rest = self._bend
        one, other = angles.T
        cosine = np.einsum("kai,kai->ka", unit[:, one], unit[:, other]).clip(-0.9999, 0.9999)
        off = np.arccos(cosine) - rest
        energy += 0.5 * bend * (off**2).sum(axis=1)
        torque = (bend * off / np.sqrt(1 - cosine**2))[..., None]  # -dE/dcos
        for a, b in ((one, other), (other, one)):
            turn = unit[:, b] - cosine[..., None] * unit[:, a]
            for k in range(count):
                np.add.at(pull[k], a, torque[k] * turn[k] / r[k, a, None])
        forces = np.zeros_like(x)
        for k in range(count):
            np.add.at(forces[k], h, pull[k])
            np.add.at(forces[k], n, -pull[k])
        virial = np.einsum("kai,kaj->kij", vectors, pull)
        return Results(energy, forces.reshape(-1, 3), virial)


def bonds(device: str) -> Bonds:
    """The potential, for ``--model bonds=bonds.py:bonds``."""
    return Bonds()
