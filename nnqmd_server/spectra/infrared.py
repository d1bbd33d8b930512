"""Infrared absorption from the dipole moment of the whole cell.

    n(w) alpha(w) = 1/(6 eps0 c V kB T) Int_-inf^inf dt exp(-iwt) <J(0).J(t)>,    J = dM/dt

<J.J> is the Kubo-transformed function, which ring polymer dynamics gives for the bead average
M = (1/P) Sum_k M(r_k); no further quantum factor belongs to it (Ramirez, Lopez-Ciudad, Kumar and Marx,
J. Chem. Phys. 121, 3973 (2004)). With classical dynamics this is the "harmonic" quantum correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import constants as c

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import (
    autocorrelation,
    block_slices,
    hann,
    hann_width,
    padded_size,
    spectral_density,
    standard_error,
)
from nnqmd_server.spectra.trajectory import Dipoles
from nnqmd_server.units import EV_PER_INVCM, HBAR

Array = np.ndarray

# (e Angstrom/fs)^2 fs / (Angstrom^3 J) / (eps0 c) in 1/m, and 1/m to 1/cm
_TO_INVCM = (c.e * 1e-10 / 1e-15) ** 2 * 1e-15 / 1e-30 / (c.epsilon_0 * c.c) / 100


@dataclass(frozen=True)
class InfraredSpectrum:
    """Absorption of a run.

    Parameters
    ----------
    wavenumber : Array
        [cm^-1], shape (n,).
    absorption : Array
        n(w) alpha(w) from the dipole current [cm^-1], shape (n,).
    error : Array or None
        Its standard error over blocks of the run.
    from_dipole : Array
        The same from w^2 <M.M>, as a check [cm^-1].
    measured_sum, expected_sum : float
        Int n alpha dnu of the whole current spectrum before the correction for the finite difference,
        and <J^2>/(12 eps0 c^2 V kB T), which it must equal [cm^-2].
    temperature : float
        [K].
    volume : float
        Mean volume [Angstrom^3].
    n_beads, n_frames, n_blocks, n_jumps : int
        Beads averaged, frames used, blocks behind the standard error, branch jumps removed.
    interval, lag, duration : float
        Time between frames, length of the Hann window, length of the run [fs].
    """

    wavenumber: Array
    absorption: Array
    error: Array | None
    from_dipole: Array
    measured_sum: float
    expected_sum: float
    temperature: float
    volume: float
    n_beads: int
    n_frames: int
    n_blocks: int
    n_jumps: int
    interval: float
    lag: float
    duration: float

    @property
    def resolution(self) -> float:
        """Full width at half maximum of a sharp line [cm^-1]."""
        return 2 * np.pi * HBAR * hann_width(self.lag) / EV_PER_INVCM


def infrared_spectrum(
    dipoles: Dipoles, temperature: float, lag: float, highest: float = 4000.0
) -> InfraredSpectrum:
    """Infrared spectrum of a run.

    The current is the difference of neighbouring dipoles divided by the interval, a central
    difference about the time half-way, which lowers the spectrum by [sin(w dt/2)/(w dt/2)]^2; the
    result is divided by that.

    Parameters
    ----------
    dipoles : Dipoles
        Dipole moments of the cell.
    temperature : float
        [K].
    lag : float
        Length of the correlation window [fs].
    highest : float
        Last wavenumber [cm^-1].
    """
    interval = dipoles.interval
    n_lags = _checked_lags(dipoles, lag, highest)
    beads, n_jumps = continuous(dipoles.dipole, dipoles.cell)
    M = beads.mean(axis=1)
    M = M - M.mean(axis=0)
    J = np.diff(M, axis=0) / interval
    volume = float(np.abs(np.linalg.det(dipoles.cell)).mean())
    prefactor = _TO_INVCM / (6 * volume * c.k * temperature)

    size = padded_size(n_lags, interval)
    omega = 2 * np.pi / (size * interval) * np.arange(size // 2 + 1)
    wavenumber = HBAR * omega / EV_PER_INVCM

    def absorption(series: Array) -> Array:
        # both halves of the time axis: twice the half-sided transform
        return (
            2 * prefactor * spectral_density(hann(n_lags) * autocorrelation(series, n_lags), interval, size)
        )

    attenuation = np.sinc(omega * interval / (2 * np.pi)) ** 2
    raw = absorption(J)
    shown = wavenumber <= highest
    blocks = block_slices(len(J), n_lags)
    error = standard_error(np.array([(absorption(J[b]) / attenuation)[shown] for b in blocks]))
    # dnu = dw / (2 pi c) turns the sum into Int dnu; pi C(0) = 2 Int_0^inf dw Int_0^inf C cos
    step = wavenumber[1]
    measured = step * (raw.sum() - 0.5 * raw[0] - 0.5 * raw[-1])
    square = float(np.mean(np.sum(J**2, axis=1)))
    expected = _TO_INVCM * square / (12 * volume * c.k * temperature) / (c.c * 1e-15 * 100)
    return InfraredSpectrum(
        wavenumber[shown],
        (raw / attenuation)[shown],
        error,
        (omega**2 * absorption(M))[shown],
        float(measured),
        float(expected),
        temperature,
        volume,
        dipoles.dipole.shape[1],
        len(dipoles.dipole),
        len(blocks),
        n_jumps,
        interval,
        n_lags * interval,
        dipoles.duration,
    )


def _checked_lags(dipoles: Dipoles, lag: float, highest: float) -> int:
    interval = dipoles.interval
    reach = 0.9 * np.pi * HBAR / interval / EV_PER_INVCM
    if highest > reach:
        raise DataError(
            f"Dipoles every {interval:g} fs do not reach {highest:g} cm^-1.",
            f"Ask for less than {reach:.0f} cm^-1, or write dipoles more often.",
        )
    n_lags = round(lag / interval)
    if n_lags < 16 or n_lags > len(dipoles.dipole) // 2:
        raise DataError(
            f"A correlation window of {lag:g} fs does not fit a run of {dipoles.duration:g} fs.",
            f"Choose between {16 * interval:g} and {dipoles.duration / 2:g} fs, or run longer.",
        )
    return n_lags


def continuous(dipole: Array, cell: Array) -> tuple[Array, int]:
    """Remove jumps between branches of the dipole of a periodic cell.

    When an atom or a Wannier centre is put back into the cell, the dipole jumps by an integer number
    of e times a cell vector. Between two frames the true change is far smaller than half of that.

    Parameters
    ----------
    dipole : Array
        Bead by bead [e Angstrom], shape (n_frames, n_beads, 3).
    cell : Array
        Cell vectors as rows [Angstrom], shape (n_frames, 3, 3).

    Returns
    -------
    Array
        Dipoles on one branch, same shape.
    int
        How many jumps were removed.

    Raises
    ------
    DataError
        A change that is neither small nor close to an integer number of e times cell vectors.
    """
    change = np.diff(dipole, axis=0)
    inverse = np.linalg.inv(cell[1:])
    turns = np.einsum("tbi,tij->tbj", change, inverse)
    whole = np.round(turns)
    left = np.abs(turns - whole)
    if left.max(initial=0.0) > 0.25:
        frame, bead, _ = np.unravel_index(np.argmax(left), left.shape)
        raise DataError(
            f"The dipole of bead {bead} changes by {np.linalg.norm(change[frame, bead]):.3g} e Angstrom "
            f"between frames {frame} and {frame + 1}, which is no motion and no whole number of e times "
            "cell vectors.",
            "Check that the dipole model belongs to this system; a conductor has no such dipole.",
        )
    jumps = np.einsum("tbj,tjk->tbk", whole, cell[1:])
    result = dipole.copy()
    result[1:] -= np.cumsum(jumps, axis=0)
    return result, int(np.count_nonzero(whole.any(axis=-1)))
