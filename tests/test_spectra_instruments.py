"""VISION's geometry and resolution, and the whole spectrum on it."""

import numpy as np
import pytest
from scipy.optimize import curve_fit
from spectra_cases import H, harmonic_velocities, trajectory

from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.diffusion import looks_liquid
from nnqmd_server.spectra.inelastic import neutron_spectrum
from nnqmd_server.spectra.instruments import VISION, broaden, momentum_transfer, resolution
from nnqmd_server.spectra.powder import almost_isotropic
from nnqmd_server.spectra.vibrations import densities_of_states
from nnqmd_server.units import EV_PER_INVCM, KB, MEV_PER_INVCM


@pytest.mark.parametrize(
    ("angle", "expected"),
    [(45.0, (1.059, 2.077, 4.765, 6.949, 12.965)), (135.0, (2.557, 3.913, 6.692, 8.891, 14.917))],
)
def test_momentum_transfer(angle, expected):
    energy = np.array([0.0, 100.0, 500.0, 1000.0, 3200.0])
    assert momentum_transfer(energy, 32.0, angle) == pytest.approx(expected, abs=6e-4)


def test_elastic_momentum_transfer_is_2k_sin_half_angle():
    k = 2 * np.pi / 4.541  # a neutron of 3.967 meV: lambda[A] = 9.0446/sqrt(E[meV])
    for bank in VISION.banks:
        expected = 2 * k * np.sin(np.radians(bank.angle / 2))
        assert momentum_transfer(np.array(0.0), VISION.final_energy, bank.angle) == pytest.approx(
            expected, rel=1e-3
        )
    assert VISION.final_energy * MEV_PER_INVCM == pytest.approx(3.967, abs=1e-3)


@pytest.mark.parametrize("centre", [0.0, 60.0, 500.0, 2100.0, 3400.0])
def test_a_sharp_line_gets_the_sigma_of_the_polynomial(centre):
    energy = np.arange(-200, 8400) * 0.5
    line = np.where(energy == centre, 1 / 0.5, 0.0)
    target = np.arange(-100.0, 4000.0)
    seen = broaden(energy, line, target, resolution(energy))
    sigma = 2.5 + 0.005 * centre + 1e-7 * centre**2
    (height, position, width), _ = curve_fit(
        lambda e, a, b, s: a * np.exp(-0.5 * ((e - b) / s) ** 2), target, seen, p0=(seen.max(), centre + 1, 5)
    )
    assert abs(width) == pytest.approx(sigma, rel=1e-6)
    assert position == pytest.approx(centre, abs=1e-6)
    assert height == pytest.approx(1 / (np.sqrt(2 * np.pi) * sigma), rel=1e-6)


def test_broadening_conserves_area():
    energy = np.arange(-400, 8400) * 0.5
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(3, len(energy))) * ((energy > 0) & (energy < 3000))
    target = np.arange(-100.0, 3500.0)
    seen = broaden(energy, values, target, resolution(energy))
    assert seen.sum(axis=1) == pytest.approx(0.5 * values.sum(axis=1), rel=1e-9)


def tensor_of(components, step, size, bin_):
    """One mode at one energy, zero temperature: only the loss side."""
    tensor = np.zeros((6, size))
    tensor[:, bin_] = components
    return tensor


def test_almost_isotropic_is_isotropic_for_a_cube():
    step, size, bin_, u2 = 1e-3, 2000, 50, 0.02
    tensor = tensor_of([u2, u2, u2, 0, 0, 0], step, size, bin_)
    Q = np.full((1, 2), 6.0)
    first, second = almost_isotropic(tensor, step, Q, np.array([bin_, 2 * bin_]))[0]
    x = 36 * u2
    assert first[0] * step == pytest.approx(x * np.exp(-x), rel=1e-12)
    assert second[1] * step == pytest.approx(x**2 / 2 * np.exp(-x), rel=1e-12)
    assert first[1] == 0
    assert second[0] == pytest.approx(0, abs=1e-12)


def test_almost_isotropic_against_the_average_over_directions():
    """A mode along one skew axis: exact order 1 is <(Q.e)^2 u exp(-(Q.e)^2 u)> over directions."""
    step, size, bin_, u2 = 1e-3, 2000, 50, 0.02
    e = np.array([1.0, 2.0, 2.0]) / 3
    components = u2 * np.array([e[0] ** 2, e[1] ** 2, e[2] ** 2, e[1] * e[2], e[0] * e[2], e[0] * e[1]])
    tensor = tensor_of(components, step, size, bin_)
    cosine, weight = np.polynomial.legendre.leggauss(60)
    for q in (1.0, 3.0):
        x = q**2 * u2 * cosine**2
        exact1, exact2 = (0.5 * weight @ (x**n * np.exp(-x)) / n for n in (1, 2))
        first, second = almost_isotropic(tensor, step, np.full((1, 2), q), np.array([bin_, 2 * bin_]))[0]
        assert first[0] * step == pytest.approx(exact1, rel=0.01)
        # the trace in the exponent of order 2 is cruder; its prefactor 3/15 is exact
        assert second[1] * step == pytest.approx(exact2, rel=0.02 if q == 1 else 0.15)
        isotropic = q**2 * u2 / 3 * np.exp(-(q**2) * u2 / 3)
        assert abs(first[0] * step - exact1) < 0.2 * abs(isotropic - exact1)


@pytest.fixture(scope="module")
def hydrogen():
    velocities = harmonic_velocities(np.full((8, 3), [0.05, 0.06, 0.42]), H, 20.0, 6000, 1.0, seed=5)
    return densities_of_states(trajectory(velocities, 1.0), 20.0, 2500.0)


def test_spectrum_on_vision_has_the_right_lines(hydrogen):
    spectrum = neutron_spectrum(hydrogen, anisotropic=False)
    for energy in (0.05, 0.42):
        centre = energy / EV_PER_INVCM
        near = np.abs(spectrum.energy - centre) < 20
        peak = spectrum.energy[near][np.argmax(spectrum.orders[0, 1][near])]
        assert peak == pytest.approx(centre, abs=10)
    # area of the elastic line: sigma/4pi exp(-Q^2 <u^2>), barn/sr, energies in meV
    elastic = spectrum.orders[:, 0].sum(axis=1) * MEV_PER_INVCM
    Q0 = np.array([momentum_transfer(np.array(0.0), 32.0, b.angle) for b in VISION.banks])
    u2 = spectrum.elements[0].displacement
    exact = sum(neutron.recoil_constant(H) / e / np.tanh(e / (2 * KB * 20)) / 3 for e in (0.05, 0.06, 0.42))
    assert u2 == pytest.approx(exact, rel=5e-3)
    assert elastic == pytest.approx(82.02 / (4 * np.pi) * np.exp(-(Q0**2) * u2), rel=1e-4)
    assert spectrum.total == pytest.approx(spectrum.orders.sum(axis=1))
    assert (spectrum.total > -1e-9).all()


def test_anisotropic_hydrogen_scatters_more_from_its_stiff_direction(hydrogen):
    """Along a stiff bond <u^2> is small, so its line loses less to the Debye-Waller factor."""
    isotropic = neutron_spectrum(hydrogen, anisotropic=False)
    better = neutron_spectrum(hydrogen)
    stretch = np.abs(isotropic.energy - 0.42 / EV_PER_INVCM) < 60
    ratio = better.orders[0, 1][stretch].sum() / isotropic.orders[0, 1][stretch].sum()
    Q = momentum_transfer(np.array(0.42 / EV_PER_INVCM), 32.0, 135.0)
    u = [neutron.recoil_constant(H) / e for e in (0.05, 0.06, 0.42)]
    # alpha = (TrA + 2 A_zz)/5 for a mode along z
    expected = np.exp(Q**2 * (sum(u) / 3 - (sum(u) + 2 * u[2]) / 5))
    assert ratio == pytest.approx(expected, rel=0.1)
    assert ratio > 1.3


def test_solid_and_liquid_are_told_apart():
    interval, rng = 2.0, np.random.default_rng(2)
    solid = harmonic_velocities(np.full(30, 0.01), 14.0, 200.0, 1000, interval)
    assert not looks_liquid(trajectory(solid, interval, "N"))[0]
    v = np.cumsum(rng.normal(size=(1000, 30, 3)), axis=0)
    drift = 0.01 * (v - v.mean(axis=0)) / v.std()
    assert looks_liquid(trajectory(drift + 2e-3 * rng.normal(size=(1, 30, 3)), interval, "N"))[0]
