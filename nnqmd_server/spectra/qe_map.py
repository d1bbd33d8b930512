"""S(Q,E) of a powder on a grid of Q and E, whatever the instrument reaches of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.inelastic import NeutronSpectrum, density_for
from nnqmd_server.spectra.instruments import kinematic_limits
from nnqmd_server.units import EV_PER_INVCM

Array = np.ndarray

MAP_STEP, MAP_Q_STEP = 4.0, 0.1
"""Spacing of the grid in cm^-1 and 1/Angstrom."""


@dataclass(frozen=True)
class ScatteringMap:
    """Incoherent S(Q,E), weighted with cross-sections.

    Parameters
    ----------
    Q : Array
        [1/Angstrom], shape (n_q,).
    energy : Array
        Energy transfer, positive for neutron energy loss [cm^-1], shape (n_e,).
    intensity : Array
        (1/N) Sum_i (sigma_i/4 pi) S_i(Q,E) [barn/(sr meV)], shape (n_q, n_e).
    """

    Q: Array
    energy: Array
    intensity: Array


def scattering_map(
    motions: tuple[neutron.Motion, ...],
    weights: Array,
    Q: Array,
    energy: Array,
    sigma: Array,
    progress: Callable[[float], None] | None = None,
) -> ScatteringMap:
    """S(Q,E) with all orders, in the isotropic Gaussian approximation.

    Parameters
    ----------
    motions : tuple of Motion
        One per kind of atom, on one energy grid.
    weights : Array
        count * cross-section / (4 pi N) of each kind [barn/sr], shape (n_kinds,).
    Q : Array
        [1/Angstrom], shape (n_q,).
    energy : Array
        Even grid of energies of the result [cm^-1], shape (n_e,).
    sigma : Array
        Standard deviation of the resolution at those energies [cm^-1], shape (n_e,). Taken as constant
        over the width of one line.
    progress : callable, optional
        Called with the fraction done.
    """
    step = motions[0].step / EV_PER_INVCM
    reach = energy[-1] + 5 * float(sigma.max())
    bins = np.arange(int(np.floor((energy[0] - 5 * float(sigma.max())) / step)), int(reach / step))
    kernel = _kernel(bins * step, energy, sigma)
    intensity = np.zeros((len(Q), len(energy)))
    for row, q in enumerate(Q):
        S = sum(
            w * neutron.dynamic_structure_factor(m, q)[bins] for w, m in zip(weights, motions, strict=True)
        )
        intensity[row] = 1e-3 * (kernel @ S)  # 1/eV -> 1/meV
        if progress is not None:
            progress((row + 1) / len(Q))
    return ScatteringMap(Q, energy, intensity)


def map_of(spectrum: NeutronSpectrum, progress: Callable[[float], None] | None = None) -> ScatteringMap:
    """The map around a neutron spectrum: Q up to what its instrument reaches, its energies from zero on."""
    v = spectrum.vibrations
    motions = tuple(
        neutron.motion(density_for(e, v, spectrum.solid), v.step, e.mass, v.temperature) for e in v.elements
    )
    weights = np.array(
        [
            e.count * part.cross_section / (4 * np.pi * v.n_atoms)
            for e, part in zip(v.elements, spectrum.elements, strict=True)
        ]
    )
    energy = np.arange(0.0, spectrum.energy[-1] + 0.5, MAP_STEP)
    largest = float(np.nanmax(kinematic_limits(spectrum.instrument, spectrum.energy)[1]))
    Q = np.arange(MAP_Q_STEP, 1.05 * largest, MAP_Q_STEP)
    return scattering_map(motions, weights, Q, energy, spectrum.instrument.width(energy), progress)


def _kernel(true: Array, shown: Array, sigma: Array) -> Array:
    """Gaussian weights from true to shown energies, a sparse matrix."""
    from scipy import sparse

    step = true[1] - true[0]
    first = np.searchsorted(true, shown - 5 * sigma)
    last = np.searchsorted(true, shown + 5 * sigma)
    rows = np.repeat(np.arange(len(shown)), last - first)
    columns = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
    s = sigma[rows]
    values = np.exp(-0.5 * ((shown[rows] - true[columns]) / s) ** 2) / (np.sqrt(2 * np.pi) * s) * step
    return sparse.csr_matrix((values, (rows, columns)), shape=(len(shown), len(true)))
