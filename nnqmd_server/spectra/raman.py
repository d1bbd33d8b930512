"""Raman spectra from the polarizability of the whole cell.

With abar = Tr a / 3 and b = a - abar, averaged over the beads as a dipole is, and <..> Kubo-transformed:

    isotropic(nu)   = q(w) c Int_-inf^inf dt exp(-iwt) <abar(0) abar(t)>
    anisotropic(nu) = q(w) c Int_-inf^inf dt exp(-iwt) <Tr b(0).b(t)>
    VV = isotropic + (4/30) anisotropic,       VH = (1/10) anisotropic

(the usual 4/45 and 3/45 belong to gamma^2 = (3/2) Tr b.b; D. A. Long, The Raman Effect, Wiley 2002, ch. 5).
q(w) is the quantum correction of the Stokes side, x/(1 - exp(-x)) for the Kubo-transformed function. With a
laser at nu_L the scattered power goes with (nu_L - nu)^4, given relative to nu_L^4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import constants as c

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.correlation import padded_size
from nnqmd_server.spectra.dipole_files import Polarizabilities
from nnqmd_server.spectra.quantum import Correction, quantum_spectrum
from nnqmd_server.spectra.running import RunningCorrelation
from nnqmd_server.spectra.statistics import jackknife
from nnqmd_server.spectra.windows import Window, window, window_width
from nnqmd_server.units import EV_PER_INVCM, HBAR

Array = np.ndarray

_CM_PER_FS = c.c * 100 * 1e-15


@dataclass(frozen=True)
class RamanSpectrum:
    """Stokes side of the Raman spectrum of the cell.

    Parameters
    ----------
    wavenumber : Array
        Shift [cm^-1], shape (n,).
    isotropic, anisotropic, parallel, perpendicular : Array
        See the head of this file; parallel is VV, perpendicular VH [Angstrom^6 cm], shape (n,).
    isotropic_error, anisotropic_error, parallel_error, perpendicular_error : Array or None
        Standard errors over blocks of the runs.
    temperature : float
        [K].
    laser : float or None
        Wavenumber of the laser [cm^-1], whose factor (1 - nu/nu_L)^4 is in all of them; None: no factor.
    n_beads, n_frames, n_runs, n_blocks : int
        Beads averaged; frames in all runs; runs; blocks behind the errors.
    interval, lag, duration : float
        Time between frames, length of the window, length of all runs [fs].
    window : str
        Name of the window.
    quantum : str
        Name of the quantum correction.
    """

    wavenumber: Array
    isotropic: Array
    anisotropic: Array
    parallel: Array
    perpendicular: Array
    isotropic_error: Array | None
    anisotropic_error: Array | None
    parallel_error: Array | None
    perpendicular_error: Array | None
    temperature: float
    laser: float | None
    n_beads: int
    n_frames: int
    n_runs: int
    n_blocks: int
    interval: float
    lag: float
    duration: float
    window: Window
    quantum: Correction

    @property
    def resolution(self) -> float:
        """Full width at half maximum of a sharp line [cm^-1]."""
        return 2 * np.pi * HBAR * window_width(self.window, self.lag) / EV_PER_INVCM


def raman_spectrum(
    runs: Polarizabilities | Sequence[Polarizabilities],
    temperature: float,
    lag: float,
    highest: float = 4000.0,
    laser: float | None = None,
    window_name: Window = "hann",
    quantum: Correction = "harmonic",
    most_blocks: int = 16,
) -> RamanSpectrum:
    """Raman spectrum of one run, or of several independent ones of one ensemble.

    The mean polarizability of each run is taken off first; it belongs to the elastic line.

    Parameters
    ----------
    runs : Polarizabilities or a sequence of them
        Of the whole cell, bead by bead.
    temperature : float
        [K].
    lag : float
        Length of the correlation window [fs].
    highest : float
        Last shift [cm^-1].
    laser : float, optional
        Wavenumber of the laser [cm^-1], such as 1e7/532; above ``highest``.
    window_name : Window
        "hann", "gaussian" or "none".
    quantum : Correction
        "harmonic" is exact for path-integral dynamics.
    most_blocks : int
        Most blocks behind the standard errors.

    Raises
    ------
    DataError
        A window that does not fit the runs, shifts beyond Nyquist's or the laser's, runs that differ.
    """
    several = [runs] if isinstance(runs, Polarizabilities) else list(runs)
    n_lags = _checked_lags(several, lag, highest, laser)
    interval = several[0].interval
    size = padded_size(n_lags, interval)
    wavenumber = 2 * np.pi * HBAR / (size * interval) * np.arange(size // 2 + 1) / EV_PER_INVCM
    shown = wavenumber <= highest
    w = window(window_name, n_lags)
    scale = 2 * _CM_PER_FS * (np.ones(shown.sum()) if laser is None else (1 - wavenumber[shown] / laser) ** 4)

    def spectra(acf: Array) -> Array:
        iso, aniso = quantum_spectrum(quantum, acf, w, interval, size, temperature)[:, shown] * scale
        return np.array([iso, aniso, iso + 4 / 30 * aniso, aniso / 10])

    # one site holds abar in its first component, the other the nine of b; the rest is zero
    running = RunningCorrelation(2, n_lags, {"iso": [0], "aniso": [1]}, 9, most_blocks=most_blocks)
    for run in several:
        a = run.polarizability.mean(axis=1)
        a = a - a.mean(axis=0)
        trace = np.trace(a, axis1=1, axis2=2) / 3
        parts = np.zeros((len(a), 2, 9))
        parts[:, 0, 0] = trace
        parts[:, 1] = (a - trace[:, None, None] * np.eye(3)).reshape(-1, 9)
        running.next_trajectory()
        running.add(parts)
    found = jackknife(running.result().blocks, spectra)
    errors = (None,) * 4 if found.error is None else tuple(found.error)
    return RamanSpectrum(
        wavenumber[shown],
        *found.value,
        *errors,
        temperature,
        laser,
        several[0].polarizability.shape[1],
        sum(len(r.polarizability) for r in several),
        len(several),
        found.n_samples,
        interval,
        n_lags * interval,
        sum(r.duration for r in several),
        window_name,
        quantum,
    )


def _checked_lags(
    several: Sequence[Polarizabilities], lag: float, highest: float, laser: float | None
) -> int:
    if not several:
        raise DataError("No polarizabilities were given.", "Name at least one run.")
    interval = several[0].interval
    for run in several[1:]:
        same = run.polarizability.shape[1] == several[0].polarizability.shape[1]
        if not same or abs(run.interval / interval - 1) > 1e-9:
            raise DataError(
                "The runs differ in their number of beads or their interval.",
                "Average only runs of one ensemble, written with the same stride.",
            )
    reach = 0.9 * np.pi * HBAR / interval / EV_PER_INVCM
    if highest > reach or (laser is not None and highest >= laser):
        limit = reach if laser is None else min(reach, 0.99 * laser)
        raise DataError(
            f"Polarizabilities every {interval:g} fs do not reach {highest:g} cm^-1."
            if highest > reach
            else f"A laser of {laser:g} cm^-1 cannot lose {highest:g} cm^-1.",
            f"Ask for less than {limit:.0f} cm^-1, or write them more often.",
        )
    n_lags = round(lag / interval)
    shortest = min(r.duration for r in several)
    if n_lags < 16 or n_lags > (round(shortest / interval) + 2) // 2:
        raise DataError(
            f"A correlation window of {lag:g} fs does not fit a run of {shortest:g} fs.",
            f"Choose between {16 * interval:g} and {shortest / 2:g} fs, or run longer.",
        )
    return n_lags
