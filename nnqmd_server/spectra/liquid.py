"""Liquids: the quantum Gaussian function corrected by the ratio exact/Gaussian of the classical ones.

    F(Q, t + i hbar/2kT) = F_quantum,Gauss(Q, t + i hbar/2kT) * F_exact(Q,t) / F_Gauss(Q,t)

F_exact is a classical (or centroid) function from positions, F_Gauss = exp(-Q^2 gamma_classical) comes from
the same density of states as the quantum function. In a liquid molecules turn and sit in different places, so
that one mean density misses what F_exact has. The ratio is even and real, as are classical functions; of the
quantum function that is true at t + i hbar/2kT, from where exp(E/2kT) leads back with exact detailed balance.
Both classical functions die out together; written as F_exact exp(-Q^2 [gamma_quantum - gamma_classical])
nothing is divided by noise, and the bracket stays bounded, since the diffusion in it cancels. Beyond the last
lag the ratio keeps its value.

exp(E/2kT) magnifies noise. Beyond 6 to 10 kT the product is therefore taken at real times, and
S(E) -> [S(E) + S(-E)] / [1 + exp(-E/kT)] restores detailed balance. In the end the norm is set to one.
This is exact where the motion is Gaussian or classical; between the two it is an approximation, good while
Q^2 [gamma_quantum - gamma_classical] of unlike places differs little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from nnqmd_server.errors import DataError
from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.incoherent import scattering_function
from nnqmd_server.spectra.pieces import Sliceable
from nnqmd_server.spectra.trajectory import Trajectory
from nnqmd_server.spectra.vectors import powder_vectors
from nnqmd_server.spectra.vibrations import Vibrations
from nnqmd_server.units import HBAR

Array = np.ndarray


@dataclass(frozen=True)
class LiquidCorrection:
    """Exact classical functions of every kind of atom.

    Parameters
    ----------
    Q : Array
        q_step * (0, 1, ...) [1/Angstrom], shape (n_q,).
    exact : Array
        F(Q,t), shape (n_kinds, n_q, n_lags).
    interval : float
        Time between lags [fs].
    """

    Q: Array
    exact: Array
    interval: float

    @property
    def q_step(self) -> float:
        """Spacing of Q [1/Angstrom]."""
        return float(self.Q[1])

    def function(self, kind: int, q: int, moves: neutron.Motion) -> Array:
        """F_exact at the times of a motion: a spline, and beyond the last lag as the Gaussian function."""
        F = self.exact[kind, q]
        lags = self.interval * np.arange(len(F))
        time = 2 * np.pi * HBAR / (moves.size * moves.step) * np.arange(moves.size // 2 + 1)
        inside = time <= lags[-1]
        result = np.empty(len(time))
        result[inside] = CubicSpline(lags, F, bc_type=("clamped", "not-a-knot"))(time[inside])
        last = np.interp(lags[-1], time, moves.classical)
        result[~inside] = F[-1] * np.exp(-(self.Q[q] ** 2) * (moves.classical[~inside] - last))
        return result

    def orders(self, kind: int, q: int, moves: neutron.Motion, temperature: float) -> Array:
        """As `neutron.orders` at Q[q], corrected: the total, shared as the Gaussian function shares it."""
        gaussian = neutron.orders(moves, float(self.Q[q]))
        F = self.function(kind, q, moves)
        total = neutron.corrected_structure_factor(moves, float(self.Q[q]), F, temperature)
        whole = gaussian.sum(axis=0)
        ratio = np.divide(
            total,
            whole,
            out=np.zeros_like(whole),
            where=whole > 1e-9 * whole.max(),
        )
        return gaussian * ratio

    def orders_along(
        self,
        kind: int,
        moves: neutron.Motion,
        Q: Array,
        bins: Array,
        temperature: float,
        progress: Callable[[float], None] | None = None,
    ) -> Array:
        """As `neutron.orders_along`, corrected.

        Parameters
        ----------
        kind : int
            Which kind of atom.
        moves : Motion
            Its motion.
        Q, bins : Array
            As there.
        temperature : float
            [K].
        progress : callable, optional
            Called with the fraction done.
        """
        needed = float(np.max(Q))
        if needed > self.Q[-1] - 3 * self.q_step:
            raise DataError(
                f"The exact functions reach {self.Q[-1]:.2f} 1/Angstrom, the instrument {needed:.2f}.",
                f"Compute them up to {needed + 4 * self.q_step:.2f} 1/Angstrom.",
            )

        def at(node: int) -> Array:
            k = abs(node)
            return self.orders(kind, k, moves, temperature)

        return neutron.interpolated(at, self.q_step, Q, bins, progress)


def correction_of(
    positions: Sliceable | Trajectory,
    interval: float,
    vibrations: Vibrations,
    largest: float = 16.0,
    q_step: float = 0.2,
    n_directions: int = 20,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> LiquidCorrection:
    """Classical functions of every element and group of a liquid.

    Parameters
    ----------
    positions : Sliceable or Trajectory
        Unwrapped classical or centroid positions [Angstrom], shape (n_frames, n_atoms, 3), of the run (or
        one of the runs) that ``vibrations`` comes from; a trajectory on disk is read as a stream.
    interval : float
        Time between frames [fs].
    vibrations : Vibrations
        For the kinds of atoms and the length of the window.
    largest : float
        Largest Q that the instrument will ask for [1/Angstrom].
    q_step : float
        Spacing of Q; between them S is interpolated [1/Angstrom].
    n_directions : int
        Directions of the powder average.
    device : str
        As for `scattering_function`.
    progress : callable, optional
        Called with the fraction done.
    """
    streamed = isinstance(positions, Trajectory)
    n_frames, n_atoms = (
        (positions.about_frames, positions.n_atoms) if streamed else (positions.shape[0], positions.shape[-2])
    )
    kinds = np.full(n_atoms, -1)
    for k, element in enumerate(vibrations.elements):
        if element.atoms is None or element.atoms.max() >= len(kinds):
            raise DataError(
                "The positions have other atoms than the velocities.", "Take both from the same run."
            )
        kinds[element.atoms] = k
    n_lags = min(round(vibrations.lag / interval), n_frames // 2)
    if n_lags < 16:
        raise DataError("The positions are too few for this window.", "Run longer, or shorten the window.")
    Q = q_step * np.arange(int(np.ceil(largest / q_step)) + 5)
    exact = scattering_function(
        positions, kinds, powder_vectors(Q, n_directions), n_lags, device=device, progress=progress
    )
    return LiquidCorrection(Q, exact, interval)
