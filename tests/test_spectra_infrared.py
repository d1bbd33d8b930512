"""Infrared absorption in absolute units."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import constants
from spectra_cases import write_ipi_xyz

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.currents import Current, continuous, current_of_charges
from nnqmd_server.spectra.dielectric import dielectric_constant
from nnqmd_server.spectra.dipole_files import Dipoles, read_dipole_extras, read_polarizability_extras
from nnqmd_server.spectra.infrared import infrared_spectrum
from nnqmd_server.spectra.trajectory import open_beads, open_trajectory
from nnqmd_server.units import AMU_A2_PER_FS2, ATOMIC_TIME, BOHR, EV_PER_INVCM, HBAR, KB

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


STRETCH, MASSES = 30.0, (1.008, 15.999)  # eV/A^2, amu: 3752 cm^-1 for OH


def diatomic(n_frames=24000, interval=0.25):
    """Two atoms on a spring by Newton's equations, kT in the stretch: velocities and relative place."""
    reduced = MASSES[0] * MASSES[1] / sum(MASSES)
    omega = np.sqrt(STRETCH / (reduced * AMU_A2_PER_FS2))
    step, inner = interval / 8, 8
    m = np.array(MASSES) * AMU_A2_PER_FS2
    # <v_rel^2> = kT/mu
    v = np.sqrt(2 * KB * TEMPERATURE / (reduced * AMU_A2_PER_FS2)) * np.array([m[1], -m[0]]) / m.sum()
    x = np.zeros(2)
    velocities, apart = np.zeros((n_frames, 2, 3)), np.empty(n_frames)
    force = lambda x: -STRETCH * np.array([x[0] - x[1], x[1] - x[0]])  # noqa: E731
    for k in range(n_frames):
        velocities[k, :, 2], apart[k] = v, x[0] - x[1]
        for _ in range(inner):
            v = v + 0.5 * step * force(x) / m
            x = x + step * v
            v = v + 0.5 * step * force(x) / m
    return velocities, apart, omega, reduced


def test_harmonic_diatomic_by_charges_and_by_dipoles(tmp_path):
    """One line at sqrt(k/mu); its area times 12 eps0 c^2 V kT is <J^2> = q^2 kT/mu."""
    velocities, apart, omega, reduced = diatomic()
    write_ipi_xyz(tmp_path / "v.xyz", velocities, 1, ["H", "O"])
    charges = current_of_charges(
        open_trajectory(tmp_path / "v.xyz", 0.25), np.array([CHARGE, -CHARGE]), VOLUME
    )
    M = np.zeros((len(apart), 1, 3))
    M[:, 0, 2] = CHARGE * apart
    by_dipoles = Dipoles(M, np.tile(np.diag([5.0, 10.0, 20.0]), (len(M), 1, 1)), 0.25)
    for source in (charges, by_dipoles):
        spectrum = infrared_spectrum(source, TEMPERATURE, 1500.0, highest=8000.0)
        peak = spectrum.wavenumber[np.argmax(spectrum.absorption)]
        assert peak == pytest.approx(HBAR * omega / EV_PER_INVCM, abs=2)
        near = np.abs(spectrum.wavenumber - peak) < 60
        line = spectrum.absorption[near].sum() * spectrum.wavenumber[1]
        # in SI: Int n alpha dnu = <J^2> / (12 eps0 c^2 V kT), [1/m^2]
        c = constants
        square = (CHARGE * c.e) ** 2 * c.k * TEMPERATURE / (reduced * c.atomic_mass)
        exact = square / (12 * c.epsilon_0 * c.c**2 * VOLUME * 1e-30 * c.k * TEMPERATURE) * 1e-4
        assert line == pytest.approx(exact, rel=0.01)
        assert np.abs(spectrum.absorption[~near]).max() < 0.01 * spectrum.absorption.max()
        assert spectrum.measured_sum == pytest.approx(spectrum.expected_sum, rel=1e-3)
        assert spectrum.measured_sum == pytest.approx(exact, rel=0.01)


def test_born_charges_that_change(tmp_path):
    """dM/dt = Sum Z(t) v, bead by bead; fixed matrices and three trajectories give the same."""
    rng = np.random.default_rng(8)
    v, Z = rng.normal(size=(2, 80, 2, 3)), rng.normal(size=(2, 80, 2, 3, 3))
    for bead in range(2):
        write_ipi_xyz(tmp_path / f"run.vel_{bead}.xyz", v[bead], 1, ["H", "O"])
        for a, name in enumerate(("becx", "becy", "becz")):
            path = tmp_path / f"run.{name}_{bead}.xyz"
            write_ipi_xyz(path, Z[bead, :, :, a] * BOHR / ATOMIC_TIME, 1, ["H", "O"])
            path.write_text(path.read_text().replace("v_centroid{atomic_unit}", f"{name}{{atomic_unit}}"))
    velocities = open_beads(tmp_path / "run.vel", timestep=0.5)
    born = [open_beads(tmp_path / f"run.{n}", timestep=0.5) for n in ("becx", "becy", "becz")]
    found = current_of_charges(velocities, born, VOLUME)
    assert found.current == pytest.approx(np.einsum("ptiab,ptib->ta", Z, v) / 2, abs=1e-4)
    assert (found.n_beads, found.dipole) == (2, None)
    fixed = current_of_charges(velocities, Z[0, 0], VOLUME)
    assert fixed.current == pytest.approx(np.einsum("iab,ptib->ta", Z[0, 0], v) / 2, abs=1e-4)
    with pytest.raises(DataError, match="becx, becy, becz, in this order"):
        current_of_charges(velocities, born[::-1], VOLUME)
    with pytest.raises(DataError, match=r"\(3,\) charges were given for 2 atoms"):
        current_of_charges(velocities, np.ones(3), VOLUME)


def test_the_spectrum_can_be_computed_again_from_what_is_kept():
    s = infrared_spectrum(oscillator(1600.0, 8000), TEMPERATURE, 900.0, window_name="gaussian")
    omega = s.wavenumber * EV_PER_INVCM / HBAR
    integrand = s.window_values * s.correlation * np.cos(omega[::50, None] * s.lags)
    integral = s.interval * (integrand.sum(axis=1) - 0.5 * integrand[:, 0])
    again = 2 * s.prefactor * integral / s.attenuation[::50]
    assert again == pytest.approx(s.absorption[::50], rel=1e-9, abs=1e-9 * s.absorption.max())


def test_several_runs_and_their_error():
    rng = np.random.default_rng(11)
    one = [oscillator(w, 6000) for w in rng.normal(1600, 40, 12)]
    together = infrared_spectrum(one, TEMPERATURE, 700.0)
    alone = [infrared_spectrum(d, TEMPERATURE, 700.0).absorption for d in one]
    assert together.absorption == pytest.approx(np.mean(alone, axis=0), abs=1e-9 * together.absorption.max())
    assert (together.n_runs, together.n_blocks, together.n_frames) == (12, 12, 72000)
    sem = np.std(alone, axis=0, ddof=1) / np.sqrt(12)
    line = together.absorption > 0.1 * together.absorption.max()
    assert together.error[line] == pytest.approx(sem[line], rel=0.05)
    with pytest.raises(DataError, match="runs differ"):
        infrared_spectrum([one[0], oscillator(1600.0, 6000, 1.0)], TEMPERATURE, 700.0)
    slow, fast = (Current(np.ones((400, 3)), None, VOLUME, dt, 1) for dt in (1.0, 2.0))
    with pytest.raises(DataError, match="runs differ"):
        infrared_spectrum([slow, fast], TEMPERATURE, 100.0, 1000.0)


def test_other_quantum_corrections_and_windows():
    dipoles = oscillator(1600.0, 8000)
    harmonic = infrared_spectrum(dipoles, TEMPERATURE, 900.0)
    x = harmonic.wavenumber * EV_PER_INVCM / (KB * TEMPERATURE)
    standard = infrared_spectrum(dipoles, TEMPERATURE, 900.0, quantum="standard").absorption
    # w (1 - exp(-x)) 2/(1 + exp(-x)) = 2 w tanh(x/2), the well-known form
    expected = harmonic.absorption[1:] * 2 * np.tanh(x[1:] / 2) / x[1:]
    assert standard[1:] == pytest.approx(expected, rel=1e-9)
    none = infrared_spectrum(dipoles, TEMPERATURE, 900.0, window_name="none")
    assert none.resolution < harmonic.resolution
    height = none.absorption.max() / harmonic.absorption.max()
    assert height == pytest.approx(2, rel=0.01)  # the integral of the window doubles


@pytest.mark.parametrize("breathing", [False, True])
def test_jumps_by_electrons_and_cores_leave_no_trace_in_the_spectrum(breathing):
    clean = oscillator(1600.0, 4000, n_beads=3)
    cells = np.tile([[9.0, 0, 0], [2.0, 8.0, 0], [1.0, -1.0, 7.0]], (4000, 1, 1))
    if breathing:
        cells = cells * (1 + 0.01 * np.cos(0.003 * np.arange(4000)))[:, None, None]
    rng = np.random.default_rng(12)
    jumped = clean.dipole.copy()
    for _ in range(40):
        frame, bead, vector = int(rng.integers(1, 4000)), int(rng.integers(3)), int(rng.integers(3))
        quantum = rng.choice([2, -2, 1, -1, 6, -5])  # electron pairs; cores of H, O and N
        jumped[frame:, bead] += quantum * cells[frame:, vector]
    found = infrared_spectrum(Dipoles(jumped, cells, 0.5), TEMPERATURE, 700.0)
    exact = infrared_spectrum(Dipoles(clean.dipole, cells, 0.5), TEMPERATURE, 700.0)
    assert 30 < found.n_jumps <= 40
    assert found.absorption == pytest.approx(exact.absorption, abs=1e-6 * exact.absorption.max())


SPRING = 0.4  # eV/A^2


def bath(n_frames, rng, n_beads=1):
    """Dipole of a charge on a spring in a viscous bath: <M^2> = 3 q^2 kT/k, relaxing in 5 fs."""
    decay = np.exp(-0.1)
    noise = rng.normal(size=(n_frames, 3)) * CHARGE * np.sqrt(KB * TEMPERATURE / SPRING)
    M = np.empty_like(noise)
    M[0] = noise[0]
    for k in range(1, n_frames):
        M[k] = decay * M[k - 1] + np.sqrt(1 - decay**2) * noise[k]
    beads = M[:, None] + 0.2 * np.linspace(-1, 1, n_beads)[:, None] * (n_beads > 1)
    return Dipoles(beads, np.tile(np.diag([5.0, 10.0, 20.0]), (n_frames, 1, 1)), 0.5)


def test_static_dielectric_constant_of_a_charge_on_a_spring():
    """eps - 1 = q^2/(eps0 V k), whatever the temperature and the spread of the beads."""
    rng = np.random.default_rng(13)
    c = constants
    exact = 1 + (CHARGE * c.e) ** 2 / (c.epsilon_0 * VOLUME * 1e-30 * SPRING * c.e / 1e-20)
    found = [dielectric_constant(bath(4000, rng, n_beads=4), TEMPERATURE) for _ in range(60)]
    values, errors = np.array([f.value for f in found]), np.array([f.error for f in found])
    assert values.mean() - 1 == pytest.approx(exact - 1, rel=0.02)
    assert np.mean(errors**2) / values.var(ddof=1) == pytest.approx(1, abs=0.5)
    assert np.mean(np.abs(values - exact) < 2 * errors) > 0.85
    assert found[0].relaxation == pytest.approx(5.0, rel=0.4)
    assert found[0].tensor.trace() / 3 == pytest.approx(found[0].value, rel=1e-9)
    assert not found[0].warnings
    assert "relaxes" in dielectric_constant(bath(300, rng), TEMPERATURE).warnings[0]
    # another branch and another eps_inf
    runs = [bath(4000, rng), bath(4000, rng)]
    plain = dielectric_constant(runs, TEMPERATURE, high_frequency=1.8)
    shifted = Dipoles(runs[1].dipole + 2 * runs[1].cell[0, 1], runs[1].cell, 0.5)
    again = dielectric_constant([runs[0], shifted], TEMPERATURE, high_frequency=1.8)
    assert again.value == pytest.approx(plain.value)
    assert plain.value == pytest.approx(exact + 0.8, abs=5 * plain.error)


PES = """
import json
import numpy as np
from ipi.pes.dummy import Dummy_driver

__DRIVER_NAME__ = "charges"
__DRIVER_CLASS__ = "Charges_driver"


class Charges_driver(Dummy_driver):
    def compute_structure(self, cell, pos):
        x = pos.reshape(-1, 3)
        dipole = 0.7 * x[:4].sum(axis=0) - 0.7 * x[4:].sum(axis=0)
        tensor = x[0][:, None] + x[0]
        extras = json.dumps({"dipole": dipole.tolist(), "polarizability": tensor.tolist()})
        return 0.05 * (pos**2).sum(), -0.1 * pos, cell * 0, extras
"""
RING = """
<simulation verbosity='quiet'>
 <output prefix='simulation'>
  <trajectory filename='vc' stride='1' format='xyz' flush='10000'> v_centroid </trajectory>
  <trajectory filename='xc' stride='1' format='xyz' flush='10000'> x_centroid </trajectory>
  <trajectory filename='dip' stride='1' extra_type='dipole' flush='10000'> extras </trajectory>
  <trajectory filename='pol' stride='1' extra_type='polarizability' flush='10000'> extras </trajectory>
 </output>
 <total_steps>2000</total_steps>
 <prng><seed>7</seed></prng>
 <ffdirect name='h'><pes>custom</pes><pes_path>pes.py</pes_path></ffdirect>
 <system>
  <initialize nbeads='4'><file mode='xyz'>init.xyz</file>
   <velocities mode='thermal' units='kelvin'>600</velocities></initialize>
  <forces><force forcefield='h'/></forces>
  <motion mode='dynamics'><fixcom>False</fixcom><dynamics mode='nvt'>
   <timestep units='femtosecond'>0.5</timestep>
   <thermostat mode='pile_g'><tau units='femtosecond'>1e6</tau><pile_lambda>0.5</pile_lambda></thermostat>
  </dynamics></motion>
  <ensemble><temperature units='kelvin'>300</temperature></ensemble>
 </system>
</simulation>
"""


def test_a_ring_polymer_of_charges_through_ipi(tmp_path):
    """TRPMD of charges on springs: i-PI's own extras and its centroid velocities show the same spectrum.

    For a dipole that is linear in the positions the bead average is that of the centroid.
    """
    (tmp_path / "pes.py").write_text(PES)
    (tmp_path / "input.xml").write_text(RING)
    rows = "".join(f"{s} 0 0 0\n" for s in ["H"] * 4 + ["O"] * 4)
    box = "# CELL(abcABC): 10.0 10.0 10.0 90 90 90 positions{angstrom} cell{angstrom}"
    (tmp_path / "init.xyz").write_text(f"8\n{box}\n{rows}")
    program = shutil.which("i-pi") or str(Path(sys.executable).parent / "i-pi")
    subprocess.run([program, "input.xml"], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    dipoles = read_dipole_extras(tmp_path / "simulation.dip", 0.5, 10 * np.eye(3), "atomic_unit", n_beads=4)
    assert dipoles.dipole.shape == (2001, 4, 3)
    charges = np.array([CHARGE] * 4 + [-CHARGE] * 4)
    centroid = open_trajectory(tmp_path / "simulation.xc.xyz", 0.5).load().positions
    M = np.einsum("i,tia->ta", charges, centroid)
    assert dipoles.dipole.mean(axis=1) == pytest.approx(M, abs=1e-4)
    velocities = open_trajectory(tmp_path / "simulation.vc.xyz", 0.5)
    one = infrared_spectrum(dipoles, TEMPERATURE, 500.0)
    two = infrared_spectrum(current_of_charges(velocities, charges, VOLUME), TEMPERATURE, 500.0)
    assert one.absorption == pytest.approx(two.absorption, abs=0.01 * two.absorption.max())
    atomic = constants.value("Hartree energy") / constants.value("Bohr radius") ** 2
    for mass, low in ((1.00794, 1500.0), (15.9994, 100.0)):
        omega = np.sqrt(0.1 * atomic / (mass * constants.atomic_mass))
        here = (one.wavenumber > low) & (one.wavenumber < low + 1300)
        peak = one.wavenumber[here][np.argmax(one.absorption[here])]
        assert peak == pytest.approx(omega / (2 * np.pi * constants.c * 100), rel=0.01)
    found = read_polarizability_extras(tmp_path / "simulation.pol_0", 0.5, "atomic_unit")
    tensor = (centroid[:, 0, :, None] + centroid[:, 0, None]) / BOHR * BOHR**3
    assert found.polarizability.mean(axis=1) == pytest.approx(tensor, abs=1e-4)
