"""Liquids: the Gaussian route corrected by exact/Gaussian of the classical functions."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.special import ive
from spectra_cases import trajectory

from nnqmd_server.errors import DataError
from nnqmd_server.spectra import neutron
from nnqmd_server.spectra.inelastic import neutron_spectrum
from nnqmd_server.spectra.instruments import VISION
from nnqmd_server.spectra.liquid import correction_of
from nnqmd_server.spectra.vibrations import densities_of_states
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB

MASS, TEMPERATURE, INTERVAL, N_FRAMES = 1.00794, 300.0, 4.0, 4000


def moved(energies, seed=0):
    """Positions and velocities of isotropic thermal classical oscillators, shape (frames, atoms, 3)."""
    rng = np.random.default_rng(seed)
    w = np.asarray(energies)[:, None] / HBAR
    spread = np.sqrt(KB * TEMPERATURE / (MASS * AMU_A2_PER_FS2)) / w
    c, s = spread * rng.normal(size=(2, len(energies), 3))
    t = INTERVAL * np.arange(N_FRAMES)[:, None, None]
    positions = c * np.cos(w * t) + s * np.sin(w * t)
    return positions, w * (s * np.cos(w * t) - c * np.sin(w * t))


def areas(energy, S, edges):
    return np.array([S[(energy >= a) & (energy < b)].sum() for a, b in pairwise(edges)])


@pytest.fixture(scope="module")
def two_kinds():
    """Half of the atoms move slowly and far, half fast and little, under one label: far from Gaussian."""
    rng = np.random.default_rng(9)
    energies = np.concatenate([rng.normal(0.008, 0.001, 80), rng.normal(0.030, 0.003, 80)])
    positions, velocities = moved(energies)
    vibrations = densities_of_states(trajectory(velocities, INTERVAL), TEMPERATURE, 3000.0)
    correction = correction_of(positions, INTERVAL, vibrations, largest=5.0, q_step=0.25, n_directions=6)
    return energies, vibrations, correction


def test_two_kinds_of_places_against_the_exact_ladder(two_kinds):
    """The mean of the exact quantum ladders, in bins of 4 meV; the correction takes the error away."""
    energies, vibrations, correction = two_kinds
    q = 3.0
    element = vibrations.elements[0]
    moves = neutron.motion(element.density, vibrations.step, element.mass, TEMPERATURE, slow_below=0.005)
    edges = np.arange(-0.022, 0.1, 0.004)
    exact = np.zeros(len(edges) - 1)
    n = np.arange(-40, 80)
    for e in energies:
        r, x = neutron.recoil_constant(MASS) * q**2 / e, e / (KB * TEMPERATURE)
        y = r / np.sinh(x / 2)
        exact += areas(n * e, np.exp(y - r / np.tanh(x / 2) + n * x / 2) * ive(np.abs(n), y), edges)
    exact /= len(energies)
    plain = areas(moves.energies, neutron.orders(moves, q).sum(axis=0) * moves.step, edges)
    node = round(q / correction.q_step)
    S = correction.orders(0, node, moves, TEMPERATURE)
    better = areas(moves.energies, S.sum(axis=0) * moves.step, edges)
    errors = [np.abs(found - exact).sum() for found in (plain, better)]
    print(f"sum of |areas - exact|: Gaussian {errors[0]:.4f}, corrected {errors[1]:.4f}")
    assert errors[1] < 0.15 * errors[0]
    assert S.sum() * moves.step == pytest.approx(1, abs=1e-4)
    first = (moves.energies * S.sum(axis=0)).sum() * moves.step
    assert first == pytest.approx(neutron.recoil_constant(MASS) * q**2, rel=0.05)
    k = np.arange(1, 1000)
    total = S.sum(axis=0)
    ratio = np.exp(-moves.energies[k] / (KB * TEMPERATURE))
    assert total[-k] == pytest.approx(ratio * total[k], abs=1e-6 * np.abs(total).max())


def test_gaussian_motion_is_left_as_it_is():
    """Every atom moves with the same 60 frequencies: then F is Gaussian, and no correction is needed."""
    energies = np.linspace(0.005, 0.025, 60)
    parts = [moved(np.full(60, e), seed=k) for k, e in enumerate(energies)]
    positions, velocities = (sum(p[i] for p in parts) / np.sqrt(60) for i in (0, 1))
    vibrations = densities_of_states(trajectory(velocities, INTERVAL), TEMPERATURE, 1000.0)
    correction = correction_of(positions, INTERVAL, vibrations, largest=7.0, q_step=0.5, n_directions=6)
    plain = neutron_spectrum(vibrations, solid=False, highest=400.0)
    better = neutron_spectrum(vibrations, solid=False, highest=400.0, liquid=correction)
    assert better.corrected and not plain.corrected
    assert better.total.sum(axis=1) == pytest.approx(plain.total.sum(axis=1), rel=0.02)
    # at E = 0 the window gives the Gaussian route a little diffusion, which the exact function has not
    inelastic = plain.energy > 50
    apart = np.abs(better.total - plain.total)[:, inelastic]
    assert apart.max() < 0.04 * plain.total.max()


def test_a_correction_that_does_not_reach(two_kinds):
    _, vibrations, correction = two_kinds
    with pytest.raises(DataError, match="reach"):
        neutron_spectrum(vibrations, solid=False, liquid=correction, instrument=VISION)
    with pytest.raises(DataError, match="other atoms"):
        correction_of(np.zeros((4000, 10, 3)), INTERVAL, vibrations)
