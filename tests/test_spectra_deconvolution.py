"""Thermostats taken out of velocity spectra: against i-PI's tool, its example, and a case that is known."""

import numpy as np
import pytest
from conftest import ROOT
from ipi.utils.tools.gle import gle_frequency_kernel, isra_deconvolute
from scipy.linalg import expm
from spectra_cases import H, trajectory

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.spectra.deconvolution import (
    deconvolve,
    thermostat_kernel,
    thermostat_of,
    without_thermostat,
)
from nnqmd_server.spectra.vibrations import densities_of_states
from nnqmd_server.units import AMU_A2_PER_FS2, EV_PER_INVCM, HBAR, KB

# the thermostats of i-PI's example, in its units
GLE = "<thermostat mode='gle'><A shape='(2,2)'>[0.000484, 0.0121, -0.0121, 0.000242]</A></thermostat>"
WHITE = "<thermostat mode='langevin'><tau units='femtosecond'> 10 </tau></thermostat>"
INPUT = """<simulation><system><initialize nbeads='{beads}'/><motion mode='dynamics'><dynamics mode='nvt'>
<timestep units='femtosecond'>0.5</timestep>{thermostat}</dynamics></motion>
<ensemble><temperature units='kelvin'>300</temperature></ensemble></system></simulation>"""


def thermostat(folder, text, beads=1):
    (folder / "input.xml").write_text(INPUT.format(beads=beads, thermostat=text))
    return thermostat_of(folder / "input.xml")


def test_thermostats_are_read_from_inputs(tmp_path):
    A, C = thermostat(tmp_path, GLE)
    assert pytest.approx(np.array([[0.000484, 0.0121], [-0.0121, 0.000242]]) * 41.341373, rel=1e-6) == A
    assert pytest.approx(np.eye(2)) == C
    A, C = thermostat(tmp_path, WHITE)
    assert pytest.approx(np.array([[0.1]]), rel=1e-6) == A
    pile = "<thermostat mode='pile_l'><tau units='femtosecond'> 50 </tau></thermostat>"
    assert thermostat(tmp_path, pile, 8)[0] == pytest.approx(np.array([[0.02]]), rel=1e-6)
    # a covariance of its own, in units of kB P T
    quantum = "<C shape='(1,1)' units='kelvin'> [ 1200.0 ] </C></thermostat>"
    cold = WHITE.replace("langevin", "gle").replace(
        "<tau units='femtosecond'> 10 </tau>", "<A shape='(1,1)'>[0.01]</A>"
    )
    A, C = thermostat(tmp_path, cold.replace("</thermostat>", quantum), 2)
    assert pytest.approx(2.0, rel=1e-6) == C[0, 0]
    with pytest.raises(InputError, match="pile_g"):
        thermostat(tmp_path, pile.replace("pile_l", "pile_g"))
    with pytest.raises(InputError, match="svr"):
        thermostat(tmp_path, pile.replace("pile_l", "svr"))
    with pytest.raises(InputError, match="0 thermostats"):
        thermostat(tmp_path, "")
    with pytest.raises(InputError, match="cannot be used"):
        thermostat_of(tmp_path / "no.xml")


@pytest.mark.parametrize("name", [GLE, WHITE])
def test_kernel_and_steps_are_those_of_ipis_tool(tmp_path, name):
    A, C = thermostat(tmp_path, name)
    omega = np.linspace(0, 1.0, 240)
    kernel = thermostat_kernel(omega, A, C)
    theirs = gle_frequency_kernel(omega, A, A @ C + C @ A.T)
    assert kernel == pytest.approx(theirs, abs=1e-9 * theirs.max())
    y = np.exp(-(((omega - 0.3) / 0.1) ** 2)) + 0.2
    f, *_ = isra_deconvolute(omega, y, theirs, 40, 10)
    assert deconvolve(omega, y, kernel, 40).spectrum == pytest.approx(f, rel=1e-6)


def test_spectrum_of_a_damped_oscillator():
    """Closed form of the damped oscillator: (2 g/pi) w^2 / ((w0^2 - w^2)^2 + g^2 w^2), of integral one."""
    omega = np.linspace(0, 2.0, 2001)
    g, j = 0.1, 400
    w0 = omega[j]
    exact = 2 / np.pi * g * omega**2 / ((w0**2 - omega**2) ** 2 + g**2 * omega**2) * omega[1]
    kernel = thermostat_kernel(omega[::10], np.array([[g]]))
    assert kernel[1:, 40] == pytest.approx(10 * exact[10::10], rel=1e-9)
    assert exact.sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("column", "text", "distance"), [(2, GLE, 0.32), (3, WHITE, 0.12)])
def test_ipis_own_example(tmp_path, column, text, distance):
    """Water with two strong thermostats, brought back to the spectrum of one that hardly disturbs."""
    data = np.loadtxt(ROOT / "tests/data/ipi-gleacf.txt")
    omega, reference, observed = data[:, 0], data[:, 1], data[:, column]
    A, C = thermostat(tmp_path, text)
    kernel = thermostat_kernel(omega, A, C)

    def apart(a, b):
        return np.abs(a / a.sum() - b / b.sum()).sum()

    # forward: the reference under the kernel is what the thermostatted run shows
    assert apart(kernel @ reference, observed) < 0.1 if text == GLE else 0.02
    found = deconvolve(omega, observed, kernel)
    assert apart(found.spectrum, reference) < distance
    assert apart(observed, reference) > 2 * distance
    assert found.spectrum.sum() == pytest.approx(reference.sum(), rel=0.1)
    wavenumber = HBAR * omega / EV_PER_INVCM
    smooth = np.exp(-0.5 * (np.arange(-15, 16) / 4.0) ** 2)
    for low, high in ((1400, 2100), (3200, 4200)):  # bend and stretch
        here = (wavenumber > low) & (wavenumber < high)
        peaks = [
            wavenumber[here][np.argmax(np.convolve(s, smooth, "same")[here])]
            for s in (found.spectrum, reference)
        ]
        assert peaks[0] == pytest.approx(peaks[1], abs=20)
    assert (np.diff(found.residual) <= 0).all()
    assert found.steps[-1] == found.chosen == 500


def test_it_stops_where_the_errors_say():
    rng = np.random.default_rng(2)
    omega = np.linspace(0, 1.0, 300)
    kernel = thermostat_kernel(omega, np.array([[0.1]]))
    true = sum(h * np.exp(-0.5 * ((omega - w) / 0.02) ** 2) for w, h in ((0.2, 1.0), (0.6, 0.5)))
    clean = kernel @ true
    error = np.full_like(clean, 0.01 * clean.max())
    found = deconvolve(omega, clean + error * rng.normal(size=len(error)), kernel, 2000, error=error)
    assert found.chosen < 2000
    assert 0.9 < found.chi2 <= 1 + np.sqrt(2 / 300)
    far = deconvolve(omega, clean + error * rng.normal(size=len(error)), kernel, 2000)
    assert np.abs(found.spectrum - true).sum() < np.abs(clean - true).sum()
    assert np.abs(found.spectrum - true).sum() < np.abs(far.spectrum - true).sum()
    assert found.fitted == pytest.approx(kernel @ found.spectrum)


def test_what_cannot_be_deconvolved():
    omega = np.linspace(0, 1, 50)
    with pytest.raises(DataError, match="not even"):
        thermostat_kernel(omega[1:], np.eye(1))
    with pytest.raises(DataError, match="does not damp"):
        thermostat_kernel(omega, -np.eye(1))
    kernel = thermostat_kernel(omega, 0.1 * np.eye(1))
    with pytest.raises(DataError, match="does not fit"):
        deconvolve(omega[:40], np.ones(40), kernel)
    with pytest.raises(DataError, match="nothing to deconvolve"):
        deconvolve(omega, np.zeros(50), kernel)


def test_a_thermostatted_run_gets_its_narrow_line_back():
    """Oscillators of 1000 cm^-1 under white noise of 50 fs, which makes their line 106 cm^-1 wide."""
    friction, interval, n_frames = 0.02, 1.0, 12000
    omega = 1000 * EV_PER_INVCM / HBAR
    drift = np.array([[0.0, -1.0], [omega**2, friction]])
    stationary = np.diag([1 / omega**2, 1.0])
    step = expm(-drift * interval)
    kick = np.linalg.cholesky(stationary - step @ stationary @ step.T)
    rng = np.random.default_rng(9)
    z = np.sqrt(stationary) @ rng.normal(size=(8, 3, 2, 1))
    v = np.empty((n_frames, 8, 3))
    for k in range(n_frames):
        v[k] = z[:, :, 1, 0]
        z = step @ z + kick @ rng.normal(size=z.shape)
    speed = np.sqrt(KB * 300.0 / (H * AMU_A2_PER_FS2))
    vibrations = densities_of_states(trajectory(speed * v, interval), 300.0, 1500.0)
    (found,) = without_thermostat(vibrations, np.array([[friction]]), highest=3000.0)

    def width(wavenumber, density):
        return density.sum() * (wavenumber[1] - wavenumber[0]) / density.max()

    wavenumber = HBAR * found.omega / EV_PER_INVCM
    before = width(vibrations.energies / EV_PER_INVCM, vibrations.elements[0].density)
    assert before > 120
    assert width(wavenumber, found.spectrum) < 0.6 * before
    assert wavenumber[np.argmax(found.spectrum)] == pytest.approx(1000, abs=25)
    area = found.spectrum.sum() * (found.omega[1] - found.omega[0]) * HBAR
    assert area == pytest.approx(1, abs=0.05)
    assert found.chi2 < 2
