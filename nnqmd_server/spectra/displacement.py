"""Mean square displacements from positions, and scattering in the classical Gaussian approximation."""

from __future__ import annotations

import numpy as np
from scipy import fft

from nnqmd_server.errors import InputError

Array = np.ndarray


def mean_square_displacements(positions: Array, n_lags: int, origins: Array | None = None) -> Array:
    """<|r(t) - r(0)|^2> of every atom, averaged over time origins.

    Parameters
    ----------
    positions : Array
        Unwrapped [Angstrom], shape (n_frames, n_atoms, 3).
    n_lags : int
        Number of lags, at most n_frames.
    origins : Array, optional
        Frames at which a displacement may start; all by default.

    Returns
    -------
    Array
        [Angstrom^2], shape (n_atoms, n_lags).
    """
    n_frames, n_atoms, _ = positions.shape
    if not 1 <= n_lags <= n_frames:
        raise InputError(f"{n_lags} lags do not fit {n_frames} frames.", "Ask for fewer lags.")
    start = np.ones(n_frames) if origins is None else np.bincount(origins, minlength=n_frames).astype(float)
    size = fft.next_fast_len(n_frames + n_lags, real=True)
    begins = np.conj(fft.rfft(start, size))
    count = _lags(begins * fft.rfft(np.ones(n_frames), size), size, n_lags)
    result = np.empty((n_atoms, n_lags))
    for atom in range(n_atoms):
        r = np.asarray(positions[:, atom], dtype=float).T
        r = r - r.mean(axis=1, keepdims=True)
        square = (r**2).sum(axis=0)
        # sum over origins of r(t)^2 + r(0)^2 - 2 r(0).r(t)
        later = begins * fft.rfft(square, size)
        first = np.conj(fft.rfft(start * square, size)) * fft.rfft(np.ones(n_frames), size)
        product = (np.conj(fft.rfft(start * r, size)) * fft.rfft(r, size)).sum(axis=0)
        result[atom] = _lags(later + first - 2 * product, size, n_lags) / count
    result[:, 0] = 0.0
    return np.maximum(result, 0.0)


def gaussian_function(displacements: Array, kinds: Array, Q: Array) -> Array:
    """exp(-Q^2 <dr^2>/6) of every atom, averaged over the atoms of a kind.

    Parameters
    ----------
    displacements : Array
        From `mean_square_displacements` [Angstrom^2], shape (n_atoms, n_lags).
    kinds : Array
        0, 1, ... or -1 for none; shape (n_atoms,).
    Q : Array
        [1/Angstrom], shape (n_q,).

    Returns
    -------
    Array
        Shape (n_kinds, n_q, n_lags).
    """
    Q = np.asarray(Q, dtype=float)
    result = np.zeros((int(kinds.max()) + 1, len(Q), displacements.shape[1]))
    for k in range(len(result)):
        mine = displacements[kinds == k]
        for j, q in enumerate(Q):
            result[k, j] = np.exp(-(q**2) * mine / 6).mean(axis=0)
    return result


def _lags(spectrum: Array, size: int, n_lags: int) -> Array:
    return fft.irfft(spectrum, size)[:n_lags]
