"""Powder average of the first two orders for atoms that move differently along different directions.

The almost-isotropic approximation in the form of Mantid's AbINS ("Dynamical structure factor from ab initio
calculations" in its documentation), with the displacement tensors of every atom taken from its velocity
autocorrelation tensor:

    B(E) = g_1(E),  A = Int g_1 dE         (3x3 tensors, Angstrom^2)
    order 1: (Q^2/3) Tr B exp(-Q^2 alpha),  alpha = (1/5) {Tr A + 2 B:A / Tr B}
    order 2: (Q^4/30) {Tr B * Tr B + 2 B:*B} exp(-Q^2 Tr A/3)    (*: convolution over energy)

Orders 0 and above 2 stay isotropic, as there. For isotropic tensors nothing changes.
"""

from __future__ import annotations

import numpy as np
from scipy import fft

from nnqmd_server.spectra.neutron import Motion, one_phonon_weights
from nnqmd_server.spectra.vibrations import Element, Vibrations, debye_start, trapezoid

Array = np.ndarray

# xx yy zz yz xz xy: off-diagonal components stand for two entries of the tensor
_TWICE = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])


def almost_isotropic(tensor: Array, step: float, Q: Array, bins: Array) -> Array:
    """Orders 1 and 2 of one atom along lines Q(E).

    Parameters
    ----------
    tensor : Array
        One-phonon weights g_1 dE of the six components [Angstrom^2], FFT order, shape (6, size).
    step : float
        Energy step [eV].
    Q : Array
        Momentum transfer [1/Angstrom] at each energy, shape (n_lines, n).
    bins : Array
        Energies as multiples of ``step``, shape (n,).

    Returns
    -------
    Array
        [1/eV], shape (n_lines, 2, n).
    """
    A = tensor.sum(axis=1)
    trace_a = A[:3].sum()
    B = tensor[:, bins]
    trace_b = B[:3].sum(axis=0)
    product = (_TWICE * A) @ B
    # noise can make B a tensor that no motion has; alpha stays between what A's eigenvalues allow
    eigen = np.linalg.eigvalsh([[A[0], A[5], A[4]], [A[5], A[1], A[3]], [A[4], A[3], A[2]]])
    share = np.divide(product, trace_b, out=np.full_like(trace_b, trace_a / 3), where=trace_b > 0)
    alpha = 0.2 * (trace_a + 2 * np.clip(share, eigen[0], eigen[-1]))
    size = tensor.shape[1]
    C = np.conj(fft.rfft(tensor, axis=1))
    pairs = C[:3].sum(axis=0) ** 2 + 2 * (_TWICE[:, None] * C**2).sum(axis=0)
    second = fft.hfft(pairs, size)[bins] / size
    return np.stack(
        [
            Q**2 / 3 * trace_b * np.exp(-(Q**2) * alpha) / step,
            Q**4 / 30 * second * np.exp(-(Q**2) * trace_a / 3) / step,
        ],
        axis=1,
    )


def element_orders(element: Element, vibrations: Vibrations, moves: Motion, Q: Array, bins: Array) -> Array:
    """Orders 1 and 2 averaged over the atoms of an element of a solid.

    Parameters
    ----------
    element, vibrations : Element, Vibrations
        From `vibrations.densities_of_states`.
    moves : Motion
        The isotropic motion of the element, for its grid.
    Q, bins : Array
        As in `almost_isotropic`.

    Returns
    -------
    Array
        [1/eV], shape (n_lines, 2, n).
    """
    total = np.zeros((len(Q), 2, len(bins)))
    energies, cut = vibrations.energies, vibrations.resolution
    scale = 1 / trapezoid(debye_start(element.density, energies, cut), vibrations.step)
    for density in vibrations.tensor_densities(element):
        started = scale * debye_start(density, energies, cut)
        g = one_phonon_weights(
            started * moves.step, moves.step, moves.size, element.mass, vibrations.temperature
        )
        total += almost_isotropic(g, moves.step, Q, bins)
    # noise and side lobes of single atoms cancel in the mean; cut below zero before, they would add up
    return np.maximum(total / element.count, 0.0)
