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
    classical : Array
        gamma(t) of all motion in classical mechanics, <dr^2>/6 [Angstrom^2], shape (size // 2 + 1,).
    symmetric : Array
        gamma(t + i hbar/2kT) of all motion, which is real [Angstrom^2], shape (size // 2 + 1,).
    """

    step: float
    size: int
    one_phonon: Array
    quanta: Array
    slow: Array
    classical: Array
    symmetric: Array

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
    even = _in_time(_even(both, step, temperature)).real
    return Motion(
        step,
        size,
        one_phonon,
        _in_time(one_phonon),
        zero + c_slow[0] - c_slow,
        zero.real + _classical(weights, step, size, mass, temperature),
        zero.real + weights[0] * r / (4 * KB * temperature) + both.sum() - even,
    )


def _even(both: Array, step: float, temperature: float) -> Array:
    """G_k exp(-x_k/2), which is the same on both sides; taken from the loss side, where nothing overflows."""
    half = len(both) // 2
    loss = both[1:half] * np.exp(-step * np.arange(1, half) / (2 * KB * temperature))
    return np.concatenate([both[:1], loss, [0.0], loss[::-1]])


def _classical(weights: Array, step: float, size: int, mass: float, temperature: float) -> Array:
    """Int f (2kT/w^2 M) (1 - cos wt)/2: coth(x/2) -> 2/x in gamma(t), and no imaginary part."""
    energies = step * np.arange(1, len(weights))
    both = np.zeros(size)
    both[1 : len(weights)] = recoil_constant(mass) * weights[1:] * KB * temperature / energies**2
    both[-1 : size - len(weights) : -1] = both[1 : len(weights)]
    c = _in_time(both).real
    return c[0] - c


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

    Parameters
    ----------
    moves : Motion
        From `motion`.
    Q : float
        Momentum transfer [1/Angstrom].

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


def corrected_structure_factor(moves: Motion, Q: float, exact: Array, temperature: float) -> Array:
    """S(Q,E) of the Gaussian function times exact/Gaussian of the classical ones; see `liquid`.

    Parameters
    ----------
    moves : Motion
        From `motion`.
    Q : float
        Momentum transfer [1/Angstrom].
    exact : Array
        A classical F(Q,t) at t_j of `intermediate_scattering`, shape (size // 2 + 1,).
    temperature : float
        [K].

    Returns
    -------
    Array
        As `dynamic_structure_factor`.
    """
    x = moves.energies / (KB * temperature)
    even = _in_energy(exact * np.exp(-(Q**2) * (moves.symmetric - moves.classical)), moves)
    near = even * np.exp(np.clip(x / 2, None, 0.5 * _FAR))
    gamma = moves.slow + moves.quanta[0].real - moves.quanta
    S = _in_energy(exact * np.exp(-(Q**2) * (gamma - moves.classical)), moves)
    far = (S + np.roll(S[::-1], 1)) * (0.5 * (1 + np.tanh(x / 2)))  # detailed balance, same norm
    share = np.clip((_FAR - np.abs(x)) / (_FAR - _NEAR), 0, 1)
    S = share * near + (1 - share) * far
    return S / (S.sum() * moves.step)


# exp(x/2) magnifies noise, so from 6 to 10 kT the symmetric form gives way to the real-time one
_NEAR, _FAR = 6.0, 10.0


def _in_energy(F: Array, moves: Motion) -> Array:
    # S_k step = (1/size) Sum_j F(t_j) exp(-2 pi i j k/size); F(-t) = F(t)* makes it real
    return fft.hfft(F, moves.size, axis=-1) / (moves.size * moves.step)


def orders_along(
    moves: Motion, Q: Array, bins: Array, progress: Callable[[float], None] | None = None
) -> Array:
    """S(Q,E) by orders along lines Q(E), as an instrument sees it.

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
    return interpolated(lambda node: orders(moves, node * _Q_STEP), _Q_STEP, Q, bins, progress)


def totals_along(moves: Motion, Q: Array, bins: Array, q_step: float = _Q_STEP) -> Array:
    """As `orders_along`, all orders together, shape (n_lines, 1, n)."""

    def total(node: int) -> Array:
        return dynamic_structure_factor(moves, node * q_step)[None]

    return interpolated(total, q_step, Q, bins, n_orders=1)


def interpolated(
    function: Callable[[int], Array],
    q_step: float,
    Q: Array,
    bins: Array,
    progress: Callable[[float], None] | None = None,
    n_orders: int = N_ORDERS,
) -> Array:
    """What `orders_along` does, for any function of a node of the even grid of Q.

    Parameters
    ----------
    function : callable
        Takes k, gives the orders at Q = k * q_step, shape (n_orders, size); even in k.
    q_step : float
        [1/Angstrom].
    Q, bins, progress
        As for `orders_along`.
    n_orders : int
        Rows of what ``function`` gives.
    """
    first = int(np.floor(Q.min() / q_step)) - _STENCIL // 2 + 1
    last = int(np.floor(Q.max() / q_step)) + _STENCIL // 2
    left = np.floor(Q / q_step).astype(int) - _STENCIL // 2 + 1
    result = np.zeros((len(Q), n_orders, len(bins)))
    for node in range(first, last + 1):
        near = (node >= left) & (node < left + _STENCIL)
        if near.any():
            S = function(node)[:, bins]
            for line, mine in enumerate(near):
                result[line][:, mine] += S[:, mine] * _lagrange(
                    Q[line, mine] / q_step, left[line, mine], node - left[line, mine]
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
