"""Infrared absorption in absolute units."""

import numpy as np
import pytest
from scipy import constants

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.infrared import continuous, infrared_spectrum
from nnqmd_server.spectra.plot import plot_ir
from nnqmd_server.spectra.tables import write_ir
from nnqmd_server.spectra.trajectory import Dipoles
from nnqmd_server.units import AMU_A2_PER_FS2, EV_PER_INVCM, HBAR, KB

MASS, CHARGE, VOLUME, TEMPERATURE = 2.0, 0.7, 1000.0, 300.0  # amu, e, A^3, K


def oscillator(wavenumber, n_frames=20000, interval=0.5, n_beads=1):
    """A charge on an isotropic spring at equipartition: M = q sqrt(2kT/m)/w cos(wt + phase)."""
    omega = wavenumber * EV_PER_INVCM / HBAR
    amplitude = CHARGE * np.sqrt(2 * KB * TEMPERATURE / (MASS * AMU_A2_PER_FS2)) / omega
    t = interval * np.arange(n_frames)
    M = amplitude * np.cos(omega * t[:, None] + np.array([0.1, 1.9, 4.0]))
    # beads spread about their mean, which alone may matter
    spread = np.linspace(-1, 1, n_beads)[:, None] * 0.05 if n_beads > 1 else np.zeros((1, 1))
    cells = np.tile(np.diag([5.0, 10.0, 20.0]), (n_frames, 1, 1))
    return Dipoles(M[:, None] + spread * np.cos(0.9 * t)[:, None, None], cells, interval)


@pytest.mark.parametrize("wavenumber", [300.0, 1600.0, 3400.0])
def test_integrated_absorption_of_one_charge(wavenumber):
    """Int n alpha dnu = q^2/(4 eps0 c^2 V m), by hand in SI: <J^2> = 3 kT q^2/m at equipartition."""
    c = constants
    si = (CHARGE * c.e) ** 2 / (4 * c.epsilon_0 * c.c**2 * VOLUME * 1e-30 * MASS * c.atomic_mass)  # m^-2
    spectrum = infrared_spectrum(oscillator(wavenumber), TEMPERATURE, 2500.0, highest=4500.0)
    area = spectrum.absorption.sum() * spectrum.wavenumber[1]
    assert area == pytest.approx(si * 1e-4, rel=2e-3)
    assert spectrum.wavenumber[np.argmax(spectrum.absorption)] == pytest.approx(wavenumber, abs=0.5)
    assert spectrum.volume == pytest.approx(VOLUME)
    # the check by w^2 <MM> weighs the two flanks of the line differently
    assert spectrum.from_dipole.sum() / spectrum.absorption.sum() == pytest.approx(1, abs=5e-3)


def test_absolute_height_of_a_line():
    """A line of area A under a Hann window of length L has the height 2 pi c L A / 2 pi per wavenumber.

    The window's transform is normalised in nu: its peak is 2 Int_0^L w dt * c = c L.
    """
    spectrum = infrared_spectrum(oscillator(1600.0), TEMPERATURE, 2500.0)
    area = spectrum.absorption.sum() * spectrum.wavenumber[1]
    expected = area * constants.c * 100 * 2500e-15
    assert spectrum.absorption.max() == pytest.approx(expected, rel=2e-3)


def test_sum_rule_of_any_dipole():
    rng = np.random.default_rng(4)
    smooth = np.cumsum(rng.normal(size=(5000, 1, 3)), axis=0) * 1e-3
    dipoles = Dipoles(smooth, np.tile(10 * np.eye(3), (5000, 1, 1)), 0.5)
    spectrum = infrared_spectrum(dipoles, 100.0, 400.0)
    assert spectrum.measured_sum == pytest.approx(spectrum.expected_sum, rel=1e-6)
    assert spectrum.error is not None
    assert spectrum.n_blocks >= 4
    assert spectrum.error.shape == spectrum.absorption.shape


def test_only_the_bead_average_counts():
    one = infrared_spectrum(oscillator(1600.0, 4000), TEMPERATURE, 900.0)
    many = infrared_spectrum(oscillator(1600.0, 4000, n_beads=8), TEMPERATURE, 900.0)
    assert many.absorption == pytest.approx(one.absorption, rel=1e-6, abs=1e-6 * one.absorption.max())
    assert many.n_beads == 8


def test_absorption_is_inverse_in_temperature_and_volume():
    dipoles = oscillator(1600.0, 4000)
    one = infrared_spectrum(dipoles, 100.0, 900.0).absorption
    assert infrared_spectrum(dipoles, 200.0, 900.0).absorption == pytest.approx(one / 2)
    larger = Dipoles(dipoles.dipole, 2 * dipoles.cell, dipoles.interval)
    assert infrared_spectrum(larger, 100.0, 900.0).absorption == pytest.approx(one / 8)


def test_branch_jumps_are_removed():
    rng = np.random.default_rng(5)
    smooth = np.cumsum(rng.normal(size=(300, 4, 3)) * 0.05, axis=0)
    cells = np.tile([[9.0, 0, 0], [2.0, 8.0, 0], [1.0, -1.0, 7.0]], (300, 1, 1))
    jumped = smooth.copy()
    jumped[100:, 1] += 2 * cells[0, 1]  # a Wannier centre crosses
    jumped[200:, 1] -= 5 * cells[0, 2]  # an atom core crosses
    jumped[50:, 3] += cells[0, 0] - cells[0, 1]
    back, count = continuous(jumped, cells)
    assert count == 3
    assert back == pytest.approx(smooth, abs=1e-12)
    untouched, none = continuous(smooth, cells)
    assert none == 0
    assert np.array_equal(untouched, smooth)


def test_a_change_that_is_no_jump_is_refused():
    dipole = np.zeros((100, 2, 3))
    dipole[40:, 1, 0] = 4.0  # 0.4 of the cell
    with pytest.raises(DataError, match=r"bead 1 .* frames 39 and 40"):
        continuous(dipole, np.tile(10 * np.eye(3), (100, 1, 1)))


def test_limits():
    dipoles = oscillator(1600.0, 400, interval=5.0)
    with pytest.raises(DataError, match="do not reach"):
        infrared_spectrum(dipoles, 300.0, 500.0)
    with pytest.raises(DataError, match="window"):
        infrared_spectrum(dipoles, 300.0, 1500.0, highest=1000.0)


def test_table_and_picture(tmp_path):
    spectrum = infrared_spectrum(oscillator(1600.0, 8000), TEMPERATURE, 900.0)
    write_ir(tmp_path / "ir.txt", spectrum, ["a note"])
    plot_ir(tmp_path / "ir.png", spectrum)
    text = (tmp_path / "ir.txt").read_text()
    for word in (
        "1/(6 eps0 c V kB T)",
        "T = 300 K",
        "V = 1000.0000 A^3",
        "8000 frames",
        "sum rule",
        "a note",
    ):
        assert word in text
    data = np.loadtxt(tmp_path / "ir.txt")
    assert data[:, 1] == pytest.approx(spectrum.absorption, rel=1e-6, abs=1e-6)
    assert (tmp_path / "ir.png").read_bytes()[:4] == b"\x89PNG"
