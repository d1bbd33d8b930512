"""Infrared absorption from the current of the whole cell.

    n(w) alpha(w) = 1/(6 eps0 c V kB T) Int_-inf^inf dt exp(-iwt) <J(0).J(t)>,    J = dM/dt

<J.J> is the Kubo-transformed function, which ring polymer dynamics gives for the bead average
M = (1/P) Sum_k M(r_k); no further quantum factor belongs to it (Ramirez, Lopez-Ciudad, Kumar and Marx,
J. Chem. Phys. 121, 3973 (2004)). With classical dynamics this is the "harmonic" quantum correction; another
one, with the factor q(w) of `quantum`, multiplies it by q(w) (1 - exp(-x))/x, x = hbar w/kB T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import constants as c

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import padded_size, spectral_density
from nnqmd_server.spectra.currents import Current, current_of_dipoles
from nnqmd_server.spectra.dipole_files import Dipoles
from nnqmd_server.spectra.quantum import Correction, quantum_factor, quantum_spectrum
from nnqmd_server.spectra.running import Correlations, RunningCorrelation
from nnqmd_server.spectra.statistics import jackknife
from nnqmd_server.spectra.windows import Window, window, window_width
from nnqmd_server.units import EV_PER_INVCM, HBAR

Array = np.ndarray

TO_INVCM = (c.e * 1e-10 / 1e-15) ** 2 * 1e-15 / 1e-30 / (c.epsilon_0 * c.c) / 100
"""(e Angstrom/fs)^2 fs / (Angstrom^3 J eps0 c) in 1/cm."""


@dataclass(frozen=True)
class InfraredSpectrum:
    """Absorption of one run or of several of one ensemble.

    The spectrum can be computed again from what is kept here:
    ``absorption`` = 2 ``prefactor`` Int_0^inf w(t) <J(0).J(t)> cos(wt) dt / ``attenuation``, times the
    quantum correction if it is not the harmonic one; the integral is a trapezoid sum over ``lags``.

    Parameters
    ----------
    wavenumber : Array
        [cm^-1], shape (n,).
    absorption : Array
        n(w) alpha(w) from the dipole current [cm^-1], shape (n,).
    error : Array or None
        Its standard error over blocks of the runs; None for a single block.
    from_dipole : Array or None
        The same from w^2 <M.M>, as a check [cm^-1]; None where the current comes from charges.
    measured_sum, expected_sum : float
        Int n alpha dnu of the whole current spectrum before the correction for the finite difference,
        and <J^2>/(12 eps0 c^2 V kB T), which it must equal [cm^-2].
    temperature : float
        [K].
    volume : float
        Mean volume [Angstrom^3].
    n_beads, n_frames, n_runs, n_blocks, n_jumps : int
        Beads averaged, frames used in all runs, runs, blocks behind the standard error, branch jumps
        removed.
    interval, lag, duration : float
        Time between frames, length of the window, length of all runs [fs].
    lags : Array
        Times of the correlation function [fs], shape (n_lags,).
    correlation : Array
        <J(0).J(t)> without window [e^2 Angstrom^2/fs^2], shape (n_lags,).
    window_values : Array
        The window w(t), shape (n_lags,).
    prefactor : float
        1/(6 eps0 c V kB T) in cm^-1 per e^2 Angstrom^2/fs.
    attenuation : Array
        [sin(w dt/2)/(w dt/2)]^2 where the current is a difference of dipoles, else one; shape (n,).
    window : str
        Name of the window.
    quantum : str
        Name of the quantum correction.
    how : str
        Where the current comes from.
    """

    wavenumber: Array
    absorption: Array
    error: Array | None
    from_dipole: Array | None
    measured_sum: float
    expected_sum: float
    temperature: float
    volume: float
    n_beads: int
    n_frames: int
    n_runs: int
    n_blocks: int
    n_jumps: int
    interval: float
    lag: float
    duration: float
    lags: Array
    correlation: Array
    window_values: Array
    prefactor: float
    attenuation: Array
    window: Window
    quantum: Correction
    how: str

    @property
    def resolution(self) -> float:
        """Full width at half maximum of a sharp line [cm^-1]."""
        return 2 * np.pi * HBAR * window_width(self.window, self.lag) / EV_PER_INVCM


def infrared_spectrum(
    runs: Dipoles | Current | Sequence[Dipoles | Current],
    temperature: float,
    lag: float,
    highest: float = 4000.0,
    window_name: Window = "hann",
    quantum: Correction = "harmonic",
    most_blocks: int = 16,
) -> InfraredSpectrum:
    """Infrared spectrum of one run, or of several independent ones of one ensemble.

    Parameters
    ----------
    runs : Dipoles, Current, or a sequence of them
        Dipole moments of the cell, or its current (`currents`).
    temperature : float
        [K].
    lag : float
        Length of the correlation window [fs].
    highest : float
        Last wavenumber [cm^-1].
    window_name : Window
        "hann", "gaussian" or "none".
    quantum : Correction
        "harmonic" is exact for path-integral dynamics and needs no factor here.
    most_blocks : int
        Most blocks behind the standard error.

    Raises
    ------
    DataError
        A window that does not fit the runs, wavenumbers beyond Nyquist's, runs that differ, dipoles that
        jump.
    """
    several = [runs] if isinstance(runs, Dipoles | Current) else list(runs)
    currents = [current_of_dipoles(r) if isinstance(r, Dipoles) else r for r in several]
    _check_alike(currents)
    interval = currents[0].interval
    n_lags = _checked_lags(currents, lag, highest)
    n_frames = [len(r.current) for r in currents]
    volume = float(np.average([r.volume for r in currents], weights=n_frames))
    prefactor = TO_INVCM / (6 * volume * c.k * temperature)

    size = padded_size(n_lags, interval)
    omega = 2 * np.pi / (size * interval) * np.arange(size // 2 + 1)
    wavenumber = HBAR * omega / EV_PER_INVCM
    shown = wavenumber <= highest
    w = window(window_name, n_lags)
    differences = currents[0].dipole is not None
    attenuation = np.sinc(omega * interval / (2 * np.pi)) ** 2 if differences else np.ones_like(omega)

    def absorption(acf: Array) -> Array:
        # both halves of the time axis: twice the half-sided transform
        if quantum == "harmonic":
            return 2 * prefactor * spectral_density(w * acf, interval, size)[shown]
        corrected = quantum_spectrum(quantum, acf, w, interval, size, temperature)
        harmonic = quantum_factor("harmonic", HBAR * omega, temperature)
        return 2 * prefactor * (corrected / harmonic)[shown]

    blocks = _correlate([r.current for r in currents], n_lags, most_blocks).blocks
    found = jackknife(blocks, lambda acf: absorption(acf[0]) / attenuation[shown])
    from_dipole = None
    if differences:
        fluctuations = [r.dipole - r.dipole.mean(axis=0) for r in currents if r.dipole is not None]
        from_dipole = omega[shown] ** 2 * absorption(_correlate(fluctuations, n_lags, 1).blocks.mean[0])
    # dnu = dw / (2 pi c) turns the sum into Int dnu; pi C(0) = 2 Int_0^inf dw Int_0^inf C cos
    acf = blocks.mean[0]
    raw = 2 * prefactor * spectral_density(w * acf, interval, size)
    measured = wavenumber[1] * (raw.sum() - 0.5 * raw[0] - 0.5 * raw[-1])
    square = np.average([np.mean(np.sum(r.current**2, axis=1)) for r in currents], weights=n_frames)
    expected = TO_INVCM * square / (12 * volume * c.k * temperature) / (c.c * 1e-15 * 100)
    return InfraredSpectrum(
        wavenumber[shown],
        found.value,
        found.error,
        from_dipole,
        float(measured),
        float(expected),
        temperature,
        volume,
        currents[0].n_beads,
        sum(n_frames) + (len(currents) if differences else 0),
        len(currents),
        found.n_samples,
        sum(r.n_jumps for r in currents),
        interval,
        n_lags * interval,
        sum(r.duration for r in currents),
        interval * np.arange(n_lags),
        acf,
        w,
        prefactor,
        attenuation[shown],
        window_name,
        quantum,
        currents[0].how,
    )


def _correlate(series: Sequence[Array], n_lags: int, most_blocks: int) -> Correlations:
    running = RunningCorrelation(1, n_lags, most_blocks=most_blocks)
    for one in series:
        running.next_trajectory()
        running.add(one[:, None])
    return running.result()


def _check_alike(currents: Sequence[Current]) -> None:
    if not currents:
        raise DataError("No dipoles were given.", "Name at least one run.")
    first = currents[0]
    for other in currents[1:]:
        same = (other.n_beads, other.dipole is None) == (first.n_beads, first.dipole is None)
        same = same and abs(other.interval / first.interval - 1) < 1e-9
        if not same or abs(other.volume / first.volume - 1) > 0.05:
            raise DataError(
                "The runs differ in their number of beads, their interval or their cell.",
                "Average only runs of one ensemble, written with the same stride.",
            )


def _checked_lags(currents: Sequence[Current], lag: float, highest: float) -> int:
    interval = currents[0].interval
    reach = 0.9 * np.pi * HBAR / interval / EV_PER_INVCM
    if highest > reach:
        raise DataError(
            f"Dipoles every {interval:g} fs do not reach {highest:g} cm^-1.",
            f"Ask for less than {reach:.0f} cm^-1, or write dipoles more often.",
        )
    n_lags = round(lag / interval)
    shortest = min(currents, key=lambda r: r.duration)
    if n_lags < 16 or n_lags > (len(shortest.current) + 1) // 2:
        raise DataError(
            f"A correlation window of {lag:g} fs does not fit a run of {shortest.duration:g} fs.",
            f"Choose between {16 * interval:g} and {shortest.duration / 2:g} fs, or run longer.",
        )
    return n_lags
