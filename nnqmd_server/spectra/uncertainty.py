"""Standard errors of S(Q,E), which is no linear function of what was averaged over the run.

Every block of the runs is left out once, and the whole route from the velocity autocorrelation functions to
the broadened spectrum is gone again (`statistics.jackknife`). The route here is the isotropic one: the
error of the almost-isotropic powder average is taken to be the same fraction of the spectrum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.inelastic import (
    NeutronSpectrum,
    averaged_over_lines,
    density_for,
    true_transfers,
)
from nnqmd_server.spectra.instruments import broaden
from nnqmd_server.spectra.statistics import jackknife
from nnqmd_server.spectra.vibrations import densities_of
from nnqmd_server.units import EV_PER_INVCM

Array = np.ndarray

Q_STEP = 0.2
"""Spacing of the Q between which S is interpolated here [1/Angstrom]: relative error 1e-4."""


def standard_errors(
    spectrum: NeutronSpectrum, progress: Callable[[float], None] | None = None
) -> Array | None:
    """Standard error of the total intensity of every bank.

    Parameters
    ----------
    spectrum : NeutronSpectrum
        Of runs; that of phonon modes has no error.
    progress : callable, optional
        Called with the fraction done.

    Returns
    -------
    Array or None
        [barn/(sr meV)], shape (n_banks, n); None with fewer than two blocks.
    """
    v, instrument = spectrum.vibrations, spectrum.instrument
    if v.blocks is None or len(v.blocks) < 2:
        return None
    bins = true_transfers(float(spectrum.energy[-1]), instrument, v.step)
    energy = bins * v.step / EV_PER_INVCM
    banks = instrument.lines(energy)
    Q = np.concatenate([lines for lines, _ in banks])
    sigma = instrument.width(energy)
    done = 0

    def totals(means: Array) -> Array:
        nonlocal done
        summed = np.zeros((len(Q), 1, len(bins)))
        for element, part, density in zip(v.elements, spectrum.elements, densities_of(means, v), strict=True):
            started = density_for(element, v, spectrum.solid, density)
            moves = neutron.motion(started, v.step, element.mass, v.temperature)
            weight = element.count / v.n_atoms * part.cross_section / (4 * np.pi) * 1e-3
            summed += weight * neutron.totals_along(moves, Q, bins, Q_STEP)
        done += 1
        if progress is not None:
            progress(done / (len(v.blocks) + 1))
        return broaden(energy, averaged_over_lines(summed, banks), spectrum.energy, sigma)[:, 0]

    found = jackknife(v.blocks, totals)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(found.value > 0, found.error / found.value, 0.0)
    return fraction * spectrum.total
