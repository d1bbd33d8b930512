"""Incoherent neutron scattering in the quantum Gaussian approximation, all orders at once.

    F(Q,t) = exp{-Q^2 gamma(t)}
    gamma(t) = (hbar/2M) Int_0^inf dw f(w)/w {coth(hbar w/2kT) [1 - cos wt] - i sin wt}
    S(Q,E) = (1/2 pi hbar) Int dt exp(-iEt/hbar) F(Q,t),      E > 0: the neutron loses energy

(the Gaussian approximation with a Kubo-transformed velocity autocorrelation function, as in Guarini et
al., arXiv:1505.03907, for liquid hydrogen). Exact for harmonic, free and Brownian particles; detailed
balance, the Debye-Waller factor and the recoil sum rule hold by construction.

On an even grid of energies, f becomes weights p_k = f dE. With r = hbar^2/2M and x = E/kT,

    G_k = r p_k / [E_k (1 - exp(-x_k))]   for all E_k != 0 (gain side: E < 0)
    C(t) = Sum_k G_k exp(i E_k t/hbar)
    gamma(t) = p_0 [r kT t^2/hbar^2 - i r t/hbar] + C(0) - C(t)

The first term is the limit E -> 0. It makes gamma exact to the trapezoid rule for any f(0): the
Sum_k (1 - cos k theta)/k^2 = pi theta/2 - theta^2/4 of a constant f has its parabola cancelled by half the
zero bin and leaves the straight line of diffusion; a free particle is p_0 = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import fft

from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB

Array = np.ndarray

N_ORDERS = 5
"""Orders 0, 1, 2, 3, and all higher ones together."""

WIDEST = 1.0
"""Half-width of the energy grid [eV]; what lies beyond wraps to gain energies, far from the spectrum."""

# Points of the interpolation in Q, and their spacing [1/Angstrom]: relative error below 1e-6
# (S varies over 1/(2 u) >~ 2 A^-1).
_STENCIL = 6
_Q_STEP = 0.1


@dataclass(frozen=True)
class Motion:
    """One kind of atom's motion, ready for any Q.

    Parameters
    ----------
    step : float
        Spacing of the energy grid [eV].
    size : int
        Number of energies, in the order of the FFT: 0, step, ..., -step.
    one_phonon : Array
        Weights G_k of the motion counted in quanta [Angstrom^2], FFT order, shape (size,).
    quanta : Array
        C(t) of these weights [Angstrom^2], complex, shape (size // 2 + 1,).
    slow : Array
        gamma(t) of the motion that is not counted in quanta [Angstrom^2], shape (size // 2 + 1,):
        zero in a solid, diffusion in a liquid.
    """

    step: float
    size: int
    one_phonon: Array
    quanta: Array
    slow: Array

    @property
    def debye_waller(self) -> float:
        """<u^2> along Q of the motion counted in quanta [Angstrom^2]; of all motion in a solid."""
        return float(self.quanta[0].real)

    @property
    def energies(self) -> Array:
        """Energies in FFT order [eV], shape (size,)."""
        return fft.fftfreq(self.size, 1 / (self.size * self.step))


def recoil_constant(mass: float) -> float:
    """hbar^2/2M [eV Angstrom^2] for a mass in amu."""
    return HBAR**2 / (2 * mass * AMU_A2_PER_FS2)


def one_phonon_weights(weights: Array, step: float, size: int, mass: float, temperature: float) -> Array:
    """G_k of the module's docstring.

    Parameters
    ----------
    weights : Array
        p_k for energies k * step, k = 0 ..., shape (..., n); p_0 is not used.
    step : float
        [eV].
    size : int
        Number of energies of the result, even, at least 2 n.
    mass, temperature : float
        [amu], [K].

    Returns
    -------
    Array
        [Angstrom^2], FFT order, shape (..., size).
    """
    n = min(weights.shape[-1], size // 2)
    energies = step * np.arange(1, n)
    x = energies / (KB * temperature)
    loss = recoil_constant(mass) * weights[..., 1:n] / energies / -np.expm1(-x)
    both = np.zeros((*weights.shape[:-1], size))
    both[..., 1:n] = loss
    both[..., -1 : size - n : -1] = loss * np.exp(-x)
    return both


def motion(
    density: Array,
    step: float,
    mass: float,
    temperature: float,
    slow_below: float = 0.0,
    widest: float = WIDEST,
) -> Motion:
    """Prepare a density of states for scattering.

    Parameters
    ----------
    density : Array
        f(E) at energies k * step [1/eV], trapezoid integral one, shape (n,).
    step : float
        [eV].
    mass, temperature : float
        [amu], [K].
    slow_below : float
        Motion below this energy [eV], the zero bin included, is kept to all orders in the
        quasi-elastic line ("order 0") instead of being counted in quanta.
    widest : float
        Half-width of the energy grid [eV].
    """
    size = 2 * fft.next_fast_len(int(np.ceil(widest / step)), real=True)
    weights = np.zeros(size // 2)
    n = min(len(density), size // 2)
    weights[:n] = density[:n] * step
    weights[0] *= 0.5
    weights /= weights.sum()
    both = one_phonon_weights(weights, step, size, mass, temperature)
    fast = np.abs(fft.fftfreq(size, 1 / (size * step))) >= slow_below
    c_slow = _in_time(np.where(fast, 0.0, both))
    time = 2 * np.pi * HBAR / (size * step) * np.arange(size // 2 + 1)
    r = recoil_constant(mass)
    zero = weights[0] * (r * KB * temperature * time**2 / HBAR**2 - 1j * r * time / HBAR)
    one_phonon = np.where(fast, both, 0.0)
    return Motion(step, size, one_phonon, _in_time(one_phonon), zero + c_slow[0] - c_slow)


def _in_time(weights: Array) -> Array:
    # C(t_j) = Sum_k G_k exp(+2 pi i j k / size); real weights, so the conjugate of a forward rfft
    return np.conj(fft.rfft(weights))


def intermediate_scattering(moves: Motion, Q: float) -> Array:
    """F(Q,t) at t_j = 2 pi hbar j / (size * step), complex, shape (size // 2 + 1,)."""
    gamma = moves.slow + moves.quanta[0].real - moves.quanta
    return np.exp(-(Q**2) * gamma)


def dynamic_structure_factor(moves: Motion, Q: float) -> Array:
    """S(Q,E), all orders from one FFT.

    Parameters
    ----------
    moves : Motion
        From `motion`.
    Q : float
        Momentum transfer [1/Angstrom].

    Returns
    -------
    Array
        [1/eV], energies in FFT order (`Motion.energies`), shape (size,). The elastic line of a
        solid is the value at E = 0: exp(-Q^2 <u^2>)/step.
    """
    return _in_energy(intermediate_scattering(moves, Q), moves)


def orders(moves: Motion, Q: float) -> Array:
    """S(Q,E) by the number of quanta exchanged.

    Order n is exp(-Q^2 (gamma_slow + <u^2>)) (Q^2 C)^n / n!.

    Returns
    -------
    Array
        [1/eV], rows 0, 1, 2, 3 and all above, energies in FFT order, shape (5, size).
    """
    still = np.exp(-(Q**2) * (moves.slow + moves.quanta[0].real))
    x = Q**2 * moves.quanta
    lower = still * np.array([np.ones_like(x), x, x**2 / 2, x**3 / 6])
    result = np.empty((N_ORDERS, moves.size))
    result[:4] = _in_energy(lower, moves)
    result[4] = _in_energy(still * np.exp(x), moves) - result[:4].sum(axis=0)
    return result


def _in_energy(F: Array, moves: Motion) -> Array:
    # S_k step = (1/size) Sum_j F(t_j) exp(-2 pi i j k/size); F(-t) = F(t)* makes it real
    return fft.hfft(F, moves.size, axis=-1) / (moves.size * moves.step)


def orders_along(
    moves: Motion, Q: Array, bins: Array, progress: Callable[[float], None] | None = None
) -> Array:
    """S(Q,E) by orders along lines Q(E), as an indirect-geometry instrument sees it.

    Every Q of an even grid costs one set of FFTs; between them S is interpolated in Q with six
    points (relative error below 1e-6).

    Parameters
    ----------
    moves : Motion
        From `motion`.
    Q : Array
        Momentum transfer [1/Angstrom] at each energy, shape (n_lines, n).
    bins : Array
        Energies as multiples of `Motion.step` (negative: gain), int, shape (n,).
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Array
        [1/eV], shape (n_lines, 5, n).
    """
    first = int(np.floor(Q.min() / _Q_STEP)) - _STENCIL // 2 + 1
    last = int(np.floor(Q.max() / _Q_STEP)) + _STENCIL // 2
    left = np.floor(Q / _Q_STEP).astype(int) - _STENCIL // 2 + 1
    result = np.zeros((len(Q), N_ORDERS, len(bins)))
    for node in range(first, last + 1):
        near = (node >= left) & (node < left + _STENCIL)
        if near.any():
            S = orders(moves, node * _Q_STEP)[:, bins]  # even in Q: nodes below zero are fine
            for line, mine in enumerate(near):
                result[line][:, mine] += S[:, mine] * _lagrange(
                    Q[line, mine] / _Q_STEP, left[line, mine], node - left[line, mine]
                )
        if progress is not None:
            progress((node - first + 1) / (last - first + 1))
    return result


def _lagrange(x: Array, left: Array, which: Array) -> Array:
    """Lagrange weight of point ``which`` of the stencil that begins at ``left``, in units of the step."""
    weight = np.ones_like(x)
    for other in range(_STENCIL):
        factor = np.where(
            which == other, 1.0, (x - left - other) / np.where(which == other, 1, which - other)
        )
        weight = weight * factor
    return weight


def mean_kinetic_energy(density: Array, step: float, temperature: float) -> float:
    """Quantum kinetic energy per atom, (3/4) Int E coth(E/2kT) f dE [eV]; compare i-PI's kinetic_cv."""
    energies = step * np.arange(1, len(density))
    quantum = energies / np.tanh(energies / (2 * KB * temperature)) * density[1:]
    return float(0.75 * step * (quantum.sum() + KB * temperature * density[0]))
