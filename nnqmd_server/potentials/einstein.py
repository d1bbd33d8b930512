"""Ring polymers that move, without a simulation: what a benchmark gives a potential to evaluate.

Every atom is bound to its place by the same isotropic spring (an Einstein crystal), so that ring-polymer
dynamics is known exactly: the normal modes of the ring oscillate each with its own frequency. Beads are then
as far from each other, and atoms move in a step as far, as in a real run, whatever the potential says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnqmd_server.structures import Array, Structures, replicas
from nnqmd_server.units import AMU_A2_PER_FS2, EV_PER_INVCM, HBAR, KB

WAVENUMBER = 1500.0
"""Wavenumber of a hydrogen atom on the spring [cm^-1]: between its stretching and its lattice modes."""

_HYDROGEN = 1.008


@dataclass(frozen=True)
class RingPolymers:
    """Ring polymers of one structure in harmonic motion.

    Parameters
    ----------
    numbers : Array
        Atomic numbers, shape (n,).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    places : Array
        Where the atoms are bound [Angstrom], shape (n, 3).
    modes : Array
        Normal modes of the ring as rows, orthonormal, shape (n_beads, n_beads).
    frequencies : Array
        Angular frequency of each mode of each atom [1/fs], shape (n_beads, n).
    cosines, sines : Array
        Amplitudes of the modes [Angstrom], shape (n_beads, n, 3).
    """

    numbers: Array
    cell: Array
    places: Array
    modes: Array
    frequencies: Array
    cosines: Array
    sines: Array

    @property
    def n_beads(self) -> int:
        """Beads of each ring."""
        return len(self.modes)

    def at(self, time: float) -> Structures:
        """All beads at a time [fs]."""
        phase = (self.frequencies * time)[:, :, None]
        amplitudes = self.cosines * np.cos(phase) + self.sines * np.sin(phase)
        beads = self.places + np.einsum("mk,mia->kia", self.modes, amplitudes)
        return replicas(self.numbers, beads, np.repeat(self.cell[None], self.n_beads, axis=0))


def ring_modes(n_beads: int) -> Array:
    """Normal modes of a ring of beads as rows, orthonormal; the first is the centroid."""
    n, k = np.arange(n_beads)[:, None], np.arange(n_beads)[None]
    angle = 2 * np.pi * n * k / n_beads
    modes = np.sqrt(2 / n_beads) * np.where(2 * n <= n_beads, np.cos(angle), np.sin(angle))
    modes[0] = 1 / np.sqrt(n_beads)
    if n_beads % 2 == 0:
        modes[n_beads // 2] = (-1.0) ** np.arange(n_beads) / np.sqrt(n_beads)
    return modes


def _frequencies(masses: Array, n_beads: int, temperature: float) -> Array:
    """Of every mode of every atom [1/fs], shape (n_beads, n): w_n^2 + w^2 (Ceriotti et al. 2010, eq. 20)."""
    own = WAVENUMBER * EV_PER_INVCM / HBAR * np.sqrt(_HYDROGEN / masses)
    ring = 2 * n_beads * KB * temperature / HBAR * np.sin(np.arange(n_beads) * np.pi / n_beads)
    return np.sqrt(ring[:, None] ** 2 + own[None] ** 2)


def _widths(masses: Array, n_beads: int, temperature: float) -> Array:
    """Standard deviation of every mode of every atom along x, y or z [Angstrom], shape (n_beads, n)."""
    energy = n_beads * KB * temperature / AMU_A2_PER_FS2  # i-PI simulates at P times the temperature
    return np.sqrt(energy / masses) / _frequencies(masses, n_beads, temperature)


def spreads(mass: float, n_beads: int, temperature: float) -> tuple[float, float]:
    """How wide an atom is spread along x, y or z.

    Parameters
    ----------
    mass : float
        [amu].
    n_beads : int
        Beads of the ring.
    temperature : float
        [K].

    Returns
    -------
    tuple of float
        Standard deviation of a bead from the atom's place, and from the centroid of its ring [Angstrom].
    """
    variances = _widths(np.array([mass]), n_beads, temperature)[:, 0] ** 2 / n_beads
    return float(np.sqrt(variances.sum())), float(np.sqrt(variances[1:].sum()))


def ring_polymers(
    numbers: Array,
    masses: Array,
    places: Array,
    cell: Array,
    n_beads: int,
    temperature: float,
    seed: int = 0,
) -> RingPolymers:
    """Ring polymers in thermal equilibrium, drawn at random.

    Parameters
    ----------
    numbers, masses : Array
        Atomic numbers and masses [amu], shape (n,).
    places : Array
        Where the atoms are bound [Angstrom], shape (n, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    n_beads : int
        Beads of each ring.
    temperature : float
        [K].
    seed : int
        Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    widths = _widths(masses, n_beads, temperature)[:, :, None]
    shape = (n_beads, len(numbers), 3)
    return RingPolymers(
        numbers=np.asarray(numbers, dtype=np.int64),
        cell=np.asarray(cell, dtype=np.float64),
        places=np.asarray(places, dtype=np.float64),
        modes=ring_modes(n_beads),
        frequencies=_frequencies(masses, n_beads, temperature),
        cosines=widths * rng.standard_normal(shape),
        sines=widths * rng.standard_normal(shape),
    )
