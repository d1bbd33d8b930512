"""From a classical or Kubo-transformed spectrum to the quantum one.

    C(w) = q(w) C_cl(w),      x = hbar w / kB T

"harmonic" is x/(1 - exp(-x)), which is exact between the Kubo-transformed and the quantum function, and so
right for centroid and ring polymer dynamics; with classical dynamics it is an approximation, the only one
of these that keeps the fluctuation-dissipation theorem. "standard" is 2/(1 + exp(-x)), "schofield" is
exp(x/2), "none" is one. "egelstaff" is not a factor: it takes the function at the time
sqrt(t^2 + (hbar/2kT)^2) and multiplies its spectrum by exp(x/2). See Ramirez, Lopez-Ciudad, Kumar and Marx,
J. Chem. Phys. 121, 3973 (2004), who compare them. All but "none" obey detailed balance,
q(-w) = exp(-x) q(w).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy.interpolate import CubicSpline

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import spectral_density
from nnqmd_server.units import HBAR, KB

Array = np.ndarray
Correction = Literal["harmonic", "standard", "schofield", "egelstaff", "none"]


def quantum_factor(name: Correction, energy: Array, temperature: float) -> Array:
    """The factor of a spectrum at energy transfers hbar w [eV] of either sign; same shape.

    Raises
    ------
    DataError
        Unknown name, or "egelstaff", which is none (`quantum_spectrum`).
    """
    check_correction(name)
    x = np.asarray(energy, dtype=float) / (KB * temperature)
    if name == "harmonic":
        return np.where(
            np.abs(x) < 1e-6, 1 + x / 2, np.divide(x, -np.expm1(-x), where=x != 0, out=np.ones_like(x))
        )
    if name == "standard":
        return 1 + np.tanh(x / 2)
    if name == "schofield":
        return np.exp(x / 2)
    if name == "none":
        return np.ones_like(x)
    raise DataError(
        "Egelstaff's correction is no factor of a spectrum.",
        "Use quantum_spectrum on the correlation function.",
    )


def quantum_spectrum(
    name: Correction, acf: Array, window: Array, interval: float, size: int, temperature: float
) -> Array:
    """Half-sided cosine transform of a correlation function, corrected, at w >= 0.

    Parameters
    ----------
    name : Correction
        Which correction.
    acf : Array
        Classical or Kubo-transformed function without window, lags last: shape (..., n_lags).
    window : Array
        Shape (n_lags,).
    interval : float
        Time between lags [fs].
    size : int
        Length of the zero-padded transform.
    temperature : float
        [K].

    Returns
    -------
    Array
        As `correlation.spectral_density`, shape (..., size // 2 + 1).
    """
    check_correction(name)
    energy = 2 * np.pi * HBAR / (size * interval) * np.arange(size // 2 + 1)
    if name != "egelstaff":
        return quantum_factor(name, energy, temperature) * spectral_density(window * acf, interval, size)
    later = egelstaff(acf, interval, temperature)
    return np.exp(energy / (2 * KB * temperature)) * spectral_density(window * later, interval, size)


def egelstaff(acf: Array, interval: float, temperature: float) -> Array:
    """The function at sqrt(t^2 + (hbar/2kT)^2), by a cubic spline; beyond the last lag it keeps its value.

    exp(x/2) magnifies what is left at high frequency, noise and the error of the spline included, so use
    it only up to a few kB T.
    """
    times = interval * np.arange(acf.shape[-1])
    shifted = np.sqrt(times**2 + (HBAR / (2 * KB * temperature)) ** 2)
    even = np.concatenate([-times[:0:-1], times])
    spline = CubicSpline(even, np.concatenate([acf[..., :0:-1], acf], axis=-1), axis=-1)
    return spline(np.minimum(shifted, times[-1]))


def check_correction(name: str) -> None:
    """Refuse a name that is no correction."""
    if name not in get_args(Correction):
        raise DataError(
            f"There is no quantum correction called {name!r}.",
            f"Choose one of {', '.join(get_args(Correction))} (--quantum).",
        )
