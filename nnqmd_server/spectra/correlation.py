"""Time correlation functions and their spectra, by FFT.

All autocorrelation functions are unbiased (divided by the number of time origins of each lag) and
computed by the Wiener-Khinchin theorem with enough zeros that no lag wraps round.
"""

from __future__ import annotations

import numpy as np
from scipy import fft

from nnqmd_server.units import EV_PER_INVCM, HBAR

Array = np.ndarray

PAIRS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""Order of the six independent components of a symmetric tensor: xx yy zz yz xz xy."""


FINEST = 0.5 * EV_PER_INVCM
"""Coarsest spacing of a spectrum's grid [eV], a fifth of the sharpest instrument sigma served."""


def autocorrelation(series: Array, n_lags: int) -> Array:
    """Autocorrelation of vectors, <a(0).a(t)>, the sum over the last axis.

    Parameters
    ----------
    series : Array
        Shape (n_frames, ..., n_components).
    n_lags : int
        Number of lags, at most n_frames.

    Returns
    -------
    Array
        Shape (n_lags, ...).
    """
    n_frames = len(series)
    size = fft.next_fast_len(n_frames + n_lags, real=True)
    power = np.abs(fft.rfft(series, size, axis=0)) ** 2
    acf = fft.irfft(power.sum(axis=-1), size, axis=0)[:n_lags]
    return acf / _origins(n_frames, n_lags).reshape(-1, *[1] * (acf.ndim - 1))


def velocity_tensors(velocities: Array, n_lags: int) -> Array:
    """Velocity autocorrelation tensor of every atom, symmetrised in its indices.

    Parameters
    ----------
    velocities : Array
        Shape (n_frames, n_atoms, 3).
    n_lags : int
        Number of lags, at most n_frames.

    Returns
    -------
    Array
        <v_a(0) v_b(t)> in the order of `PAIRS`, shape (n_atoms, 6, n_lags).
    """
    n_frames, n_atoms, _ = velocities.shape
    size = fft.next_fast_len(n_frames + n_lags, real=True)
    origins = _origins(n_frames, n_lags)
    tensors = np.empty((n_atoms, 6, n_lags))
    for atom in range(n_atoms):
        v = fft.rfft(velocities[:, atom].T, size)
        products = np.array([(v[a].conj() * v[b]).real for a, b in PAIRS])
        tensors[atom] = fft.irfft(products, size)[:, :n_lags] / origins
    return tensors


def spectral_density(acf: Array, interval: float, size: int) -> Array:
    """Half-sided cosine transform, Int_0^inf C(t) cos(wt) dt, by the trapezoid rule.

    Parameters
    ----------
    acf : Array
        Windowed correlation function, lags last: shape (..., n_lags).
    interval : float
        Time between lags [fs].
    size : int
        Number of points of the zero-padded transform.

    Returns
    -------
    Array
        At the angular frequencies 2 pi k / (size * interval), k = 0 ... size // 2; unit of ``acf``
        times fs, shape (..., size // 2 + 1).
    """
    return interval * (fft.rfft(acf, size).real - 0.5 * acf[..., :1])


def padded_size(n_lags: int, interval: float) -> int:
    """Even length of a zero-padded transform whose energies are no further apart than `FINEST`."""
    wanted = max(2 * n_lags, int(np.ceil(2 * np.pi * HBAR / (FINEST * interval))))
    return 2 * fft.next_fast_len((wanted + 1) // 2, real=True)


def default_lag(duration: float) -> float:
    """Length of the correlation window for a run of ``duration``, both in fs.

    A quarter of the run leaves some independent stretches for error bars. Runs under 2 ps get up to
    half, or their spectra would have no lines at all. Beyond 6 ps the window (5.6 cm^-1) is as fine
    as the elastic resolution of the instruments served here.
    """
    return min(6000.0, max(duration / 4, min(duration / 2, 500.0)))


def _origins(n_frames: int, n_lags: int) -> Array:
    return n_frames - np.arange(n_lags, dtype=float)
