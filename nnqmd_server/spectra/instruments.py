"""Neutron instruments: which Q belongs to an energy transfer, and how sharp they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnqmd_server.units import EV_PER_INVCM, HBAR2_OVER_2MN

Array = np.ndarray


@dataclass(frozen=True)
class Bank:
    """Detectors at one scattering angle [degree]."""

    name: str
    angle: float


@dataclass(frozen=True)
class IndirectSpectrometer:
    """A spectrometer with one final energy.

    Parameters
    ----------
    name : str
        What it is called.
    final_energy : float
        Energy of the neutrons that the analysers let pass [cm^-1].
    banks : tuple of Bank
        Detector banks.
    sigma : tuple of float
        Coefficients of the standard deviation of its resolution: sigma(E) = s0 + s1 E + s2 E^2, in cm^-1.
    source : str
        Where the numbers come from.
    """

    name: str
    final_energy: float
    banks: tuple[Bank, ...]
    sigma: tuple[float, float, float]
    source: str


VISION = IndirectSpectrometer(
    name="VISION",
    final_energy=32.0,
    banks=(Bank("backward", 135.0), Bank("forward", 45.0)),
    sigma=(2.5, 0.005, 1e-7),
    source="OCLIMAX's VISION settings (Cheng et al., J. Chem. Theory Comput. 15, 1974 (2019)), "
    "the same polynomial as AbINS uses for TOSCA; a standard deviation, not a full width",
)


def momentum_transfer(energy: Array, final_energy: float, angle: float) -> Array:
    """Q of an indirect-geometry spectrometer [1/Angstrom].

    Q^2 = (2 m_n/hbar^2) [2 Ef + E - 2 sqrt(Ef (Ef + E)) cos(angle)]: momentum and energy conservation.

    Parameters
    ----------
    energy : Array
        Energy transfer E = Ei - Ef, more than -Ef [cm^-1].
    final_energy : float
        [cm^-1].
    angle : float
        Scattering angle [degree].
    """
    cosine = np.cos(np.radians(angle))
    square = 2 * final_energy + energy - 2 * np.sqrt(final_energy * (final_energy + energy)) * cosine
    return np.sqrt(square * EV_PER_INVCM / HBAR2_OVER_2MN)


def resolution(energy: Array, instrument: IndirectSpectrometer = VISION) -> Array:
    """Standard deviation of the instrument's Gaussian resolution [cm^-1] at an energy transfer [cm^-1]."""
    s0, s1, s2 = instrument.sigma
    e = np.abs(energy)
    return s0 + s1 * e + s2 * e**2


def broaden(energy: Array, values: Array, target: Array, sigma: Array) -> Array:
    """Spread every point of a spectrum by its own Gaussian.

    The width belongs to the true energy transfer, not to where the count is shown, so that every
    line keeps its area.

    Parameters
    ----------
    energy : Array
        Even grid of true energy transfers, ascending, shape (n,).
    values : Array
        Densities on it, shape (..., n).
    target : Array
        Energies of the result, same unit, shape (m,).
    sigma : Array
        Standard deviation of each point, same unit, a slowly varying function of energy, shape (n,).

    Returns
    -------
    Array
        Densities, shape (..., m).
    """
    step = energy[1] - energy[0]
    reach = 8 * np.interp(target, energy, sigma)
    first = np.searchsorted(energy, target - 1.1 * reach)
    last = np.searchsorted(energy, target + 1.1 * reach)
    result = np.empty((*values.shape[:-1], len(target)))
    for k, centre in enumerate(target):
        part = slice(first[k], last[k])
        s = sigma[part]
        kernel = np.exp(-0.5 * ((centre - energy[part]) / s) ** 2) / (np.sqrt(2 * np.pi) * s) * step
        result[..., k] = values[..., part] @ kernel
    return result
