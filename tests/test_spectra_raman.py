"""Raman spectra of polarizabilities that are known."""

import numpy as np
import pytest

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.dipole_files import Polarizabilities
from nnqmd_server.spectra.raman import raman_spectrum
from nnqmd_server.units import EV_PER_INVCM, HBAR, KB

TEMPERATURE = 300.0


def vibrating(shape, wavenumber, rng, n_frames=16000, interval=0.5, amplitude=0.2, n_beads=1):
    """A constant tensor plus amplitude * shape * cos(wt + phase); <..> over time is over phases."""
    omega = wavenumber * EV_PER_INVCM / HBAR
    wave = np.cos(omega * interval * np.arange(n_frames) + rng.uniform(0, 2 * np.pi))
    a = 5 * np.eye(3) + amplitude * wave[:, None, None] * shape
    spread = np.linspace(-1, 1, n_beads)[:, None, None] * np.ones((3, 3)) * (n_beads > 1)
    return Polarizabilities(a[:, None] + spread, interval)


def area(spectrum, values, wavenumber):
    near = np.abs(spectrum.wavenumber - wavenumber) < 100
    return values[near].sum() * spectrum.wavenumber[1]


def stokes(wavenumber):
    x = wavenumber * EV_PER_INVCM / (KB * TEMPERATURE)
    return x / -np.expm1(-x)


def test_a_breathing_mode_is_isotropic_and_polarised():
    """Half of <abar^2> on the Stokes side, times x/(1 - exp(-x))."""
    rng = np.random.default_rng(1)
    for wavenumber in (300.0, 1500.0):
        s = raman_spectrum(vibrating(np.eye(3), wavenumber, rng, n_beads=4), TEMPERATURE, 1500.0)
        exact = 0.5 * (0.2**2 / 2) * stokes(wavenumber)
        assert area(s, s.isotropic, wavenumber) == pytest.approx(exact, rel=0.01)
        assert area(s, s.parallel, wavenumber) == pytest.approx(exact, rel=0.01)
        assert np.abs(s.perpendicular).max() < 1e-9 * s.parallel.max()
        assert s.wavenumber[np.argmax(s.parallel)] == pytest.approx(wavenumber, abs=2)
        assert (s.n_beads, s.n_frames, s.n_runs) == (4, 16000, 1)


def test_a_turning_mode_is_depolarised_by_three_quarters():
    """A traceless tensor: VH/VV = (1/10)/(4/30) = 3/4, the classical limit of depolarised scattering."""
    shape = np.array([[1, 2, 0], [2, 1, -1], [0, -1, -2.0]])
    s = raman_spectrum(vibrating(shape, 900.0, np.random.default_rng(2)), TEMPERATURE, 1500.0)
    exact = 0.5 * np.trace(shape @ shape) * (0.2**2 / 2) * stokes(900.0)
    assert area(s, s.anisotropic, 900.0) == pytest.approx(exact, rel=0.01)
    assert area(s, s.perpendicular, 900.0) / area(s, s.parallel, 900.0) == pytest.approx(0.75, rel=1e-9)
    assert np.abs(s.isotropic).max() < 1e-9 * s.anisotropic.max()


def test_bond_polarizability_of_a_diatomic():
    """a_par and a_perp change along a bond: VH/VV of one molecule averaged over orientations."""
    d_par, d_perp = 1.0, 0.3
    shape = np.diag([d_perp, d_perp, d_par])
    s = raman_spectrum(vibrating(shape, 1500.0, np.random.default_rng(3)), TEMPERATURE, 1500.0)
    mean, gamma2 = (d_par + 2 * d_perp) / 3, (d_par - d_perp) ** 2
    # textbook: rho = 3 gamma^2 / (45 mean^2 + 4 gamma^2)
    ratio = area(s, s.perpendicular, 1500.0) / area(s, s.parallel, 1500.0)
    assert ratio == pytest.approx(3 * gamma2 / (45 * mean**2 + 4 * gamma2), rel=1e-3)


def test_laser_runs_and_errors():
    rng = np.random.default_rng(4)
    runs = [vibrating(np.eye(3), w, rng, 8000) for w in rng.normal(1500, 30, 6)]
    plain = raman_spectrum(runs, TEMPERATURE, 900.0)
    laser = raman_spectrum(runs, TEMPERATURE, 900.0, laser=1e7 / 532)
    assert laser.parallel == pytest.approx(plain.parallel * (1 - plain.wavenumber * 532e-7) ** 4)
    alone = [raman_spectrum(r, TEMPERATURE, 900.0).parallel for r in runs]
    assert plain.parallel == pytest.approx(np.mean(alone, axis=0), abs=1e-9 * plain.parallel.max())
    line = plain.parallel > 0.1 * plain.parallel.max()
    sem = np.std(alone, axis=0, ddof=1) / np.sqrt(6)
    assert plain.n_runs == 6
    assert plain.parallel_error[line].mean() == pytest.approx(sem[line].mean(), rel=0.35)


def test_raman_limits():
    run = vibrating(np.eye(3), 900.0, np.random.default_rng(5), 400)
    with pytest.raises(DataError, match="laser"):
        raman_spectrum(run, TEMPERATURE, 90.0, laser=3000.0)
    with pytest.raises(DataError, match="window"):
        raman_spectrum(run, TEMPERATURE, 900.0)
    with pytest.raises(DataError, match="do not reach"):
        raman_spectrum(Polarizabilities(run.polarizability, 10.0), TEMPERATURE, 900.0)
