"""Scattering functions against cases with a closed solution."""

import numpy as np
import pytest
from scipy import constants, fft, integrate
from scipy.special import ive
from spectra_cases import H, harmonic_velocities, trajectory, write_ipi_xyz

from nnqmd_server.errors import DataError
from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.cross_sections import cross_section
from nnqmd_server.spectra.trajectory import open_trajectory
from nnqmd_server.spectra.vibrations import debye_start, densities_of_states, trapezoid
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB

E0 = 0.050  # eV
Q = 5.0  # 1/A
# I_n of a hydrogen oscillator (1.008 amu) of 50 meV at Q = 5 1/A, to 6 decimals, computed apart from
# this code by exp(-Q^2 u2) exp(nx/2) I_n(y)
LADDER = {
    20.0: (0, (0.354607, 0.367637, 0.190573, 0.065859, 0.017070, 0.003539)),
    300.0: (-2, (0.004112, 0.048575, 0.305709, 0.336027, 0.196779, 0.078127, 0.023424, 0.005638)),
}


def bessel_ladder(n, temperature, mass, energy=E0, q=Q):
    r = neutron.recoil_constant(mass) / energy
    x = energy / (KB * temperature)
    y = q**2 * r / np.sinh(x / 2)
    return np.exp(y - q**2 * r / np.tanh(x / 2) + n * x / 2) * ive(np.abs(n), y)


def line(energy, step, n):
    density = np.zeros(n)
    density[round(energy / step)] = 1 / step
    return density


def rungs(S, moves, energy=E0, first=-2, last=5):
    """Area of the spectrum within half a quantum of each rung."""
    e = moves.energies
    return np.array(
        [S[np.abs(e - n * energy) < energy / 2].sum() * moves.step for n in range(first, last + 1)]
    )


@pytest.mark.parametrize("temperature", LADDER)
def test_one_oscillator_is_the_bessel_ladder(temperature):
    moves = neutron.motion(line(E0, 1e-4, 5000), 1e-4, 1.008, temperature)
    S = neutron.dynamic_structure_factor(moves, Q)
    first, published = LADDER[temperature]
    found = rungs(S, moves, first=first, last=first + len(published) - 1)
    assert found == pytest.approx(published, abs=6e-6)  # their hbar^2/2M has 5 digits
    n = np.arange(-2, 6)
    assert rungs(S, moves) == pytest.approx(bessel_ladder(n, temperature, 1.008), abs=1e-12)


@pytest.mark.parametrize(("temperature", "tolerance"), [(20.0, 3e-4), (300.0, 1e-3)])
def test_ladder_from_a_trajectory_file(tmp_path, temperature, tolerance):
    """Centroid velocities in an i-PI file -> reader -> VACF -> density -> S(Q,E)."""
    energies = E0 + 2e-4 * np.random.default_rng(1).normal(size=60)
    velocities = harmonic_velocities(energies, H, temperature, 2000, 4.0)
    write_ipi_xyz(tmp_path / "vc.xyz", velocities, 8, ["H"] * 60)
    vibrations = densities_of_states(open_trajectory(tmp_path / "vc.xyz", 0.5), temperature, 4000.0)
    (element,) = vibrations.elements
    assert element.kinetic_ratio == pytest.approx(1, abs=1e-3)
    density = debye_start(element.density, vibrations.energies, vibrations.resolution)
    density /= trapezoid(density, vibrations.step)
    moves = neutron.motion(density, vibrations.step, element.mass, temperature)
    S = neutron.dynamic_structure_factor(moves, Q)
    n = np.arange(-2, 6)
    assert rungs(S, moves) == pytest.approx(bessel_ladder(n, temperature, H), abs=tolerance)
    u2 = neutron.recoil_constant(H) / E0 / np.tanh(E0 / (2 * KB * temperature))
    assert moves.debye_waller == pytest.approx(u2, rel=2e-3)


def test_orders_of_an_oscillator_are_poisson_at_zero_temperature():
    moves = neutron.motion(line(E0, 1e-4, 5000), 1e-4, 1.008, 1.0)
    parts = neutron.orders(moves, Q).sum(axis=1) * moves.step
    mean = Q**2 * moves.debye_waller
    poisson = np.exp(-mean) * np.array([1, mean, mean**2 / 2, mean**3 / 6])
    assert parts[:4] == pytest.approx(poisson, abs=1e-12)
    assert parts.sum() == pytest.approx(1, abs=1e-12)


def liquid_like(step, n):
    """A density with diffusion, a broad band and a stretch, unit integral."""
    e = step * np.arange(n)
    f = 1 / (1 + (e / 0.003) ** 2) + 0.5 * np.exp(-0.5 * ((e - 0.06) / 0.015) ** 2)
    f = f + np.exp(-0.5 * ((e - 0.42) / 0.01) ** 2)
    return f / trapezoid(f, step)


@pytest.mark.parametrize("temperature", [20.0, 250.0])
@pytest.mark.parametrize("q", [1.0, 4.0, 9.0])
def test_sum_rules_and_detailed_balance(temperature, q):
    step = 6e-5
    moves = neutron.motion(liquid_like(step, 10000), step, 1.008, temperature, 0.005, widest=3.0)
    S = neutron.dynamic_structure_factor(moves, q)
    e = moves.energies
    recoil = neutron.recoil_constant(1.008) * q**2
    assert S.sum() * step == pytest.approx(1, abs=1e-9)
    assert (e * S).sum() * step == pytest.approx(recoil, rel=1e-3)
    assert neutron.orders(moves, q).sum(axis=0) == pytest.approx(S, abs=1e-8 * S.max())
    k = np.arange(1, int(6 * KB * temperature / step))
    seen = S[k] > 1e-5 * S.max()
    assert seen.sum() > 20
    loss, gain = S[k][seen], S[-k][seen]
    assert gain == pytest.approx(
        loss * np.exp(-e[k][seen] / (KB * temperature)), rel=1e-6, abs=1e-8 * S.max()
    )


def test_free_particle_is_a_gaussian_about_its_recoil():
    step, temperature, q = 2e-4, 300.0, 4.0
    density = np.zeros(100)
    density[0] = 2 / step  # half weight of the zero bin
    moves = neutron.motion(density, step, 1.008, temperature, slow_below=1e-3)
    recoil = neutron.recoil_constant(1.008) * q**2
    variance = 2 * recoil * KB * temperature
    e = moves.energies
    expected = np.exp(-((e - recoil) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    assert neutron.dynamic_structure_factor(moves, q) == pytest.approx(expected, abs=1e-9 * expected.max())


def test_brownian_particle():
    """Langevin: f = (2/pi) g/(g^2+w^2); <dr^2>/6 = (kT/M g^2)(gt - 1 + exp(-gt)) in the classical limit."""
    friction, temperature, mass = 1 / 500, 3000.0, 20.0
    step = 5e-5
    w = step * np.arange(40000) / HBAR
    density = 2 / np.pi * friction / (friction**2 + w**2) / HBAR
    moves = neutron.motion(density, step, mass, temperature, slow_below=2e-3)
    gamma = moves.slow + moves.quanta[0].real - moves.quanta
    t = 2 * np.pi * HBAR / (moves.size * step) * np.arange(len(gamma))
    some = (t > 100) & (t < 0.3 * t[-1])
    thermal = KB * temperature / (mass * AMU_A2_PER_FS2)
    expected = thermal / friction**2 * (friction * t - 1 + np.exp(-friction * t))
    assert gamma.real[some] == pytest.approx(expected[some], rel=2e-3)
    imaginary = -HBAR / (2 * mass * AMU_A2_PER_FS2 * friction) * (1 - np.exp(-friction * t))
    assert gamma.imag[some] == pytest.approx(imaginary[some], rel=2e-3)


def test_debye_waller_of_one_mode():
    """Hydrogen, 50 meV, 20 K: <u^2> = (hbar^2/2ME) coth(E/2kT), here by hand in SI units."""
    moves = neutron.motion(line(E0, 1e-4, 5000), 1e-4, 1.008, 20.0)
    c = constants
    si = c.hbar**2 / (2 * 1.008 * c.atomic_mass * 0.050 * c.e) / np.tanh(0.050 * c.e / (2 * c.k * 20)) * 1e20
    assert moves.debye_waller == pytest.approx(si, rel=1e-9)
    assert moves.debye_waller == pytest.approx(0.04147, abs=5e-6)


@pytest.mark.parametrize("temperature", [5.0, 100.0, 400.0])
def test_debye_solid(temperature):
    """<u^2> = (3 hbar^2/M k TD) [1/4 + (T/TD)^2 Int_0^(TD/T) x/(e^x - 1) dx]."""
    debye, mass, step = 200.0, 17.0, 2e-5
    top = KB * debye
    e = step * np.arange(int(top / step) + 1)
    moves = neutron.motion(3 * e**2 / top**3, step, mass, temperature)
    integral = integrate.quad(lambda x: x / np.expm1(x), 1e-12, debye / temperature)[0]
    expected = 6 * neutron.recoil_constant(mass) / top * (0.25 + (temperature / debye) ** 2 * integral)
    assert moves.debye_waller == pytest.approx(expected, rel=3e-3)
    elastic = neutron.dynamic_structure_factor(moves, 3.0)[0] * step
    assert elastic == pytest.approx(np.exp(-9 * expected), rel=5e-3)


def test_scattering_along_a_line_equals_scattering_at_each_q():
    moves = neutron.motion(liquid_like(1e-4, 6000), 1e-4, 1.008, 100.0, 0.005)
    bins = np.arange(-30, 5000, 7)
    Q_line = np.sqrt(1.1 + 0.45 * np.abs(bins) * 0.1)[None]
    S = neutron.orders_along(moves, Q_line, bins)
    scale = S.sum(axis=1).max()
    for k in range(0, len(bins), 60):
        exact = neutron.orders(moves, Q_line[0, k])[:, bins[k]]
        assert S[0, :, k] == pytest.approx(exact, rel=2e-5, abs=1e-9 * scale)


def test_quantum_kinetic_energy_of_an_oscillator():
    found = neutron.mean_kinetic_energy(line(E0, 1e-4, 5000), 1e-4, 77.0)
    assert found == pytest.approx(0.75 * E0 / np.tanh(E0 / (2 * KB * 77.0)), rel=1e-12)


def test_density_of_a_brownian_particle_gives_its_diffusion():
    """An Ornstein-Uhlenbeck velocity: D = kT/(M g)."""
    friction, mass, temperature, interval = 1 / 60, 14.00674, 250.0, 5.0
    rng = np.random.default_rng(3)
    decay = np.exp(-friction * interval)
    thermal = np.sqrt(KB * temperature / (mass * AMU_A2_PER_FS2))
    noise = rng.normal(size=(8000, 40, 3)) * thermal
    v = np.empty_like(noise)
    v[0] = noise[0]
    for k in range(1, len(v)):
        v[k] = decay * v[k - 1] + np.sqrt(1 - decay**2) * noise[k]
    vibrations = densities_of_states(trajectory(v, interval, "N"), temperature, 800.0)
    (element,) = vibrations.elements
    assert element.diffusion == pytest.approx(thermal**2 / friction, rel=0.1)
    assert element.error is not None
    exact = 2 / np.pi * friction / (friction**2 + (vibrations.energies / HBAR) ** 2) / HBAR
    low = vibrations.energies < 0.03
    within = np.abs(element.density - exact)[low] < 4 * element.error[low] + 0.02 * exact[0]
    assert within.mean() > 0.95


def test_naive_transform_convention_is_not_mirrored():
    """At 20 K nearly everything is energy loss: a wrong sign of time would put it on the gain side."""
    moves = neutron.motion(line(E0, 1e-4, 5000), 1e-4, 1.008, 20.0)
    S = neutron.dynamic_structure_factor(moves, Q)
    assert S[moves.energies < -E0 / 2].sum() < 1e-10 * S[moves.energies > E0 / 2].sum()
    assert np.array_equal(moves.energies, fft.fftfreq(moves.size, 1 / (moves.size * moves.step)))


@pytest.mark.parametrize(
    ("label", "barn"), [("H", 82.02), ("D", 7.64), ("N", 11.51), ("O", 4.232), ("C", 5.551)]
)
def test_cross_sections(label, barn):
    assert cross_section(label) == pytest.approx(barn, abs=0.005)


@pytest.mark.parametrize("label", ["Xx", "H2", "X", "Z", ""])
def test_labels_without_cross_section(label):
    with pytest.raises(DataError):
        cross_section(label)
