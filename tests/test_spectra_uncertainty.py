"""Standard errors of S(Q,E): as large as independent runs really differ."""

from dataclasses import replace

import numpy as np
import pytest
from spectra_cases import H, trajectory

from nnqmd_server.spectra.inelastic import neutron_spectrum
from nnqmd_server.spectra.output.contents_ins import ins_result
from nnqmd_server.spectra.uncertainty import standard_errors
from nnqmd_server.spectra.vibrations import densities_of, densities_of_states
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB

KELVIN, INTERVAL, FRAMES = 50.0, 2.0, 4096


def noisy_run(seed):
    """Gaussian velocities with a broad line at 40 meV, so that every stretch of the run is different."""
    rng = np.random.default_rng(seed)
    energy = 2 * np.pi * HBAR * np.fft.rfftfreq(FRAMES, INTERVAL)
    shape = np.exp(-0.5 * ((energy - 0.040) / 0.004) ** 2)
    noise = rng.normal(size=(2, len(energy), 6, 3))
    v = np.fft.irfft(np.sqrt(shape)[:, None, None] * (noise[0] + 1j * noise[1]), FRAMES, axis=0)
    # the ensemble's variance is put right, not each run's
    expected = 2 * (shape[1:-1]).sum() * 2 / FRAMES**2
    return v * np.sqrt(KB * KELVIN / (H * AMU_A2_PER_FS2) / expected)


@pytest.fixture(scope="module")
def runs():
    found = []
    for seed in range(5):
        v = densities_of_states(trajectory(noisy_run(seed), INTERVAL), KELVIN, 200.0)
        spectrum = neutron_spectrum(v, anisotropic=False, highest=450.0)
        found.append((spectrum, standard_errors(spectrum)))
    return found


def test_errors_are_the_scatter_of_independent_runs(runs):
    totals = np.array([spectrum.total for spectrum, _ in runs])
    errors = np.array([error for _, error in runs])
    energy = runs[0][0].energy
    seen = (energy > 230) & (energy < 430)
    scatter = totals[..., seen].var(axis=0, ddof=1)
    predicted = (errors[..., seen] ** 2).mean(axis=0)
    # 5 runs, some ten independent energies: the ratio of the variances is known to about 20 %
    assert scatter.sum() / predicted.sum() == pytest.approx(1.0, abs=0.5)


def test_blocks_give_the_densities_back(runs):
    v = runs[0][0].vibrations
    for density, element in zip(densities_of(v.blocks.mean, v), v.elements, strict=True):
        np.testing.assert_allclose(density, element.density, rtol=1e-10, atol=1e-12)


def test_errors_stand_in_the_result(runs):
    spectrum, errors = runs[0]
    data = ins_result(spectrum, errors=errors).data[0]
    np.testing.assert_array_equal(data["total_forward"].error, errors[1])
    assert (errors[:, spectrum.energy > 0] > 0).all()


def test_one_block_has_no_error(runs):
    spectrum, _ = runs[0]
    for blocks in (
        None,
        replace(spectrum.vibrations.blocks, sums=np.ones((1, 1, 5)), counts=np.ones((1, 5))),
    ):
        one = replace(spectrum, vibrations=replace(spectrum.vibrations, blocks=blocks))
        assert standard_errors(one) is None


def test_errors_of_densities_are_the_scatter_of_independent_runs():
    values, errors = [], []
    for seed in range(20):
        v = densities_of_states(trajectory(noisy_run(seed), INTERVAL), KELVIN, 200.0)
        values.append(v.elements[0].density)
        errors.append(v.elements[0].error)
    seen = (v.energies > 0.028) & (v.energies < 0.053)
    scatter = np.var(values, axis=0, ddof=1)[seen].sum()
    assert scatter / np.mean(np.square(errors), axis=0)[seen].sum() == pytest.approx(1.1, abs=0.35)
