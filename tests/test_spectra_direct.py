"""Chopper spectrometers: kinematics, angles, resolution; TOSCA; cross-sections."""

import sys

import numpy as np
import pytest
from scipy.optimize import curve_fit
from spectra_cases import H, harmonic_velocities, trajectory

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.cross_sections import cross_section, cross_section_of, tabulated
from nnqmd_server.spectra.inelastic import density_for, neutron_spectrum
from nnqmd_server.spectra.instruments import (
    TOSCA,
    VISION,
    direct,
    direct_momentum_transfer,
    kinematic_limits,
    momentum_transfer,
)
from nnqmd_server.spectra.vibrations import densities_of_states
from nnqmd_server.units import EV_PER_INVCM, MEV_PER_INVCM


def test_direct_momentum_transfer_conserves_momentum():
    """|k_i - k_f| from the two wave vectors; lambda[A] = 9.0446/sqrt(E[meV])."""
    transfer = np.array([-40.0, 0.0, 60.0, 180.0])
    k_i, k_f = (2 * np.pi / 9.0446 * np.sqrt(e) for e in (200.0, 200.0 - transfer))
    for angle in (3.0, 45.0, 135.0):
        a = np.radians(angle)
        Q = np.hypot(k_i - k_f * np.cos(a), k_f * np.sin(a))
        found = direct_momentum_transfer(transfer / MEV_PER_INVCM, 200.0 / MEV_PER_INVCM, angle)
        assert found == pytest.approx(Q, rel=1e-4)


def test_kinematic_limits():
    energy = np.array([-30.0, 0.0, 100.0, 1000.0, 3999.0, 5000.0])
    sequoia = direct("SEQUOIA", 500.0, 20.0)
    low, high = kinematic_limits(sequoia, energy)
    Ei = 500.0 / MEV_PER_INVCM
    for k, e in enumerate(energy[:4]):
        assert low[k] == pytest.approx(direct_momentum_transfer(e, Ei, 3.0))
        assert high[k] == pytest.approx(direct_momentum_transfer(e, Ei, 60.0))
    assert np.isnan(low[-2:]).all()  # 98 % of 4033 cm^-1 is the end
    low, high = kinematic_limits(VISION, energy)
    assert np.isfinite(low[1:]).all()
    assert low[1:] == pytest.approx(momentum_transfer(energy[1:], 32.0, 45.0))
    assert high[1:] == pytest.approx(momentum_transfer(energy[1:], 32.0, 135.0))


def test_angles_share_the_solid_angle():
    """The mean of cos(angle) over a ring from a to b is that of the sphere: (cos a + cos b)/2."""
    arcs = direct("ARCS", 120.0, 3.0)
    ((Q, weights),) = arcs.lines(np.array([0.0]))
    k2 = (2 * np.pi / 9.0446) ** 2 * 120.0
    cosines = 1 - Q[:, 0] ** 2 / (2 * k2)
    low, high = np.cos(np.radians(arcs.angles))
    assert weights.sum() == pytest.approx(1)
    assert weights @ cosines == pytest.approx((low + high) / 2, abs=1e-4)
    assert np.diff(cosines) == pytest.approx(np.diff(cosines)[0], rel=1e-6)


def test_resolution_of_direct_geometry(tmp_path):
    constant = direct("HYDRA", 250.0, 8.0, angles=(5.0, 120.0))
    assert constant.width(np.array([0.0, 1500.0])) * MEV_PER_INVCM == pytest.approx(8.0 / 2.354820, rel=1e-6)
    (tmp_path / "res.dat").write_text("# meV  FWHM meV\n0 10\n100 6\n240 3\n")
    table = direct("ARCS", 250.0, tmp_path / "res.dat")
    assert table.width(np.array(50.0 / MEV_PER_INVCM)) * MEV_PER_INVCM == pytest.approx(
        8.0 / 2.354820, rel=1e-6
    )
    (tmp_path / "bad.dat").write_text("0 10\n100 -6\n")
    with pytest.raises(DataError, match="no table"):
        direct("ARCS", 250.0, tmp_path / "bad.dat")
    with pytest.raises(DataError, match="no table"):
        direct("ARCS", 250.0, tmp_path / "nothing.dat")
    with pytest.raises(InputError, match="range of scattering angles"):
        direct("HYDRA", 250.0, 8.0)
    with pytest.raises(InputError, match="incident energy"):
        direct("ARCS", -3.0, 8.0)


def test_resolution_from_resins():
    """Standard deviations that resins 0.1.0 itself prints for these settings."""
    pytest.importorskip("resins")
    arcs = direct("ARCS", 500.0, chopper_frequency=600)
    sequoia = direct("SEQUOIA", 500.0, chopper_frequency=420)
    at = np.array([5.0, 400.0]) / MEV_PER_INVCM
    assert arcs.width(at) * MEV_PER_INVCM == pytest.approx([8.357, 2.865], rel=2e-3)
    assert sequoia.width(at) * MEV_PER_INVCM == pytest.approx([4.619, 3.310], rel=2e-3)
    with pytest.raises(InputError, match="chopper_frequency"):
        direct("ARCS", 500.0, chopper_frequency=300)  # no transmission


def test_without_resins_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "resins", None)
    with pytest.raises(InputError, match="pip install resins"):
        direct("ARCS", 500.0)


@pytest.fixture(scope="module")
def hydrogen():
    velocities = harmonic_velocities(np.full((8, 3), [0.05, 0.06, 0.12]), H, 20.0, 6000, 1.0, seed=5)
    return densities_of_states(trajectory(velocities, 1.0), 20.0, 2500.0)


def test_direct_spectrum_is_the_mean_over_angles(hydrogen):
    """One-phonon area of a line against S at each angle, summed by hand."""
    arcs = direct("ARCS", 250.0, 2.0, angles=(10.0, 90.0))
    spectrum = neutron_spectrum(hydrogen, anisotropic=False, instrument=arcs)
    assert spectrum.energy[-1] <= arcs.highest
    assert np.isfinite(spectrum.Q).all() and spectrum.orders.shape[0] == 1
    line = np.abs(spectrum.energy - 0.12 / EV_PER_INVCM) < 120
    area = spectrum.orders[0, 1, line].sum() * MEV_PER_INVCM
    (element,) = hydrogen.elements
    moves = neutron.motion(density_for(element, hydrogen, True), hydrogen.step, H, 20.0)
    near = np.abs(moves.energies - 0.12) < 0.013
    by_hand = []
    for cosine in np.cos(np.radians(90)) + (np.arange(200) + 0.5) / 200 * np.cos(np.radians(10)):
        Q = direct_momentum_transfer(0.12 / EV_PER_INVCM, arcs.incident_energy, np.degrees(np.arccos(cosine)))
        by_hand.append(neutron.orders(moves, Q)[1, near].sum() * moves.step)
    assert area == pytest.approx(82.02 / (4 * np.pi) * np.mean(by_hand), rel=0.01)
    top = spectrum.energy[line][np.argmax(spectrum.orders[0, 1, line])]
    (_, middle, width), _ = curve_fit(
        lambda e, a, b, s: a * np.exp(-0.5 * ((e - b) / s) ** 2),
        spectrum.energy[line], spectrum.orders[0, 1, line], p0=(1.0, top, 10.0),
    )  # fmt: skip
    assert middle == pytest.approx(0.12 / EV_PER_INVCM, abs=2)
    own = hydrogen.resolution / EV_PER_INVCM
    assert 2.3548 * abs(width) == pytest.approx(np.hypot(2.0 / MEV_PER_INVCM, own), rel=0.1)


def test_tosca_has_the_banks_of_abins(hydrogen):
    spectrum = neutron_spectrum(hydrogen, instrument=TOSCA)
    assert [b.angle for b in TOSCA.banks] == [134.98885653, 45.0]
    other = neutron_spectrum(hydrogen, instrument=VISION)
    assert spectrum.total == pytest.approx(other.total, rel=2e-3)


def test_deuteration_changes_how_atoms_scatter_only(hydrogen):
    plain = neutron_spectrum(hydrogen, anisotropic=False)
    heavy = neutron_spectrum(hydrogen, anisotropic=False, overrides={"H": "D"})
    given = neutron_spectrum(hydrogen, anisotropic=False, overrides={"H": 41.01})
    assert heavy.total == pytest.approx(plain.total * 7.64 / 82.02, rel=1e-3)
    assert given.total == pytest.approx(plain.total / 2, rel=1e-4)
    assert heavy.elements[0].power.source == "D, periodictable"
    assert heavy.elements[0].displacement == plain.elements[0].displacement
    with pytest.raises(DataError, match="There are: H"):
        neutron_spectrum(hydrogen, overrides={"N": "N15"})
    with pytest.raises(DataError, match="no neutron cross-section"):
        neutron_spectrum(hydrogen, overrides={"H": "Xx"})


@pytest.mark.parametrize(
    ("label", "coherent", "incoherent"), [("H", 1.7568, 80.26), ("D", 5.592, 2.05), ("N", 11.01, 0.5)]
)
def test_parts_of_cross_sections(label, coherent, incoherent):
    found = tabulated(label)
    assert found.coherent == pytest.approx(coherent, abs=0.01)
    assert found.incoherent == pytest.approx(incoherent, abs=0.02)
    assert found.total == cross_section(label)


def test_a_group_goes_before_its_label():
    overrides = {"H": "D", "methyl": 5.0}
    assert cross_section_of("H", "methyl", overrides).total == 5.0
    assert cross_section_of("H", "", overrides).total == cross_section("D")
    assert cross_section_of("C", "", overrides).total == cross_section("C")
    with pytest.raises(DataError, match="makes no sense"):
        cross_section_of("H", "", {"H": -1.0})
