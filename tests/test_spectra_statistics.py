"""Streamed correlation functions, errors against the scatter of many runs, windows, quantum factors."""

import tracemalloc

import numpy as np
import pytest
from spectra_cases import trajectory, write_ipi_xyz

from nnqmd_server.errors import DataError
from nnqmd_server.spectra import quantum, windows
from nnqmd_server.spectra.correlation import autocorrelation, spectral_density, velocity_tensors
from nnqmd_server.spectra.running import RunningCorrelation, velocity_correlations
from nnqmd_server.spectra.statistics import Blocks, jackknife, mean
from nnqmd_server.spectra.trajectory import open_trajectory
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB


@pytest.mark.parametrize(("n_frames", "n_lags"), [(97, 40), (1000, 30), (1000, 97), (5000, 16)])
def test_a_stream_gives_the_correlation_of_the_whole(n_frames, n_lags):
    rng = np.random.default_rng(n_frames)
    series = rng.normal(size=(n_frames, 3, 3))
    series[:, :, 1] += np.roll(series[:, :, 0], 2, axis=0)
    running = RunningCorrelation(3, n_lags, {"a": [0, 1], "b": [2]}, tensors=True, most_blocks=8)
    start = 0
    while start < n_frames:
        n = int(rng.integers(1, 60))
        running.add(series[start : start + n])
        start += n
    found = running.result()
    acf = autocorrelation(series, n_lags)
    assert found.tensors == pytest.approx(velocity_tensors(series, n_lags), abs=1e-12)
    assert found.blocks.mean[0] == pytest.approx(acf[:, :2].mean(axis=1), abs=1e-12)
    assert found.blocks.mean[1] == pytest.approx(acf[:, 2], abs=1e-12)
    assert found.blocks.counts[:, 0].sum() == n_frames
    assert len(found.blocks) <= 8
    # the sums of a block are those of its frames
    first, second = (int(n) for n in np.cumsum(found.blocks.counts[:2, 0]))
    lag = n_lags - 1
    pairs = [(t - lag, t) for t in range(lag, n_frames)]
    weights = [0.5 * ((first <= s < second) + (first <= t < second)) for s, t in pairs]
    direct = sum(w * series[s, 2] @ series[t, 2] for w, (s, t) in zip(weights, pairs, strict=True))
    assert found.blocks.sums[1, 1, lag] == pytest.approx(direct, abs=1e-9)


def test_runs_are_averaged_and_not_joined(tmp_path):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(300, 2, 3)), rng.normal(size=(200, 2, 3))
    found = velocity_correlations([trajectory(a, 0.5), trajectory(b, 0.5)], 20)
    acf = sum(autocorrelation(s, 20).mean(axis=1) * (len(s) - np.arange(20)) for s in (a, b))
    assert found.blocks.mean[0] == pytest.approx(acf / (500 - 2 * np.arange(20)), abs=1e-12)
    assert (found.n_trajectories, found.n_frames, found.groups) == (2, 500, ("H",))
    # and the same from disk
    write_ipi_xyz(tmp_path / "a.xyz", a, 1, ["H", "H"])
    streamed = velocity_correlations(open_trajectory(tmp_path / "a.xyz", 0.5), 20, skip=10.0)
    assert streamed.n_frames == 280
    assert streamed.blocks.mean[0] == pytest.approx(autocorrelation(a[20:], 20).mean(axis=1), abs=1e-4)
    with pytest.raises(DataError, match="another interval"):
        velocity_correlations([trajectory(a, 0.5), trajectory(b, 1.0)], 20)
    with pytest.raises(DataError, match=r"does not fit 10 frames"):
        velocity_correlations(trajectory(a[:10], 0.5), 20)


def test_memory_of_a_correlation_does_not_grow_with_the_frames():
    def peak(n):
        tracemalloc.start()
        running = RunningCorrelation(20, 100, tensors=True)
        for _ in range(n):
            running.add(np.ones((50, 20, 3)))
        running.result()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(800) < 1.05 * peak(80)


def ar1(n_runs, n_frames, decay, rng):
    """Stationary AR(1) vectors, <x.x> = 3, shape (n_frames, n_runs, 3)."""
    x = np.empty((n_frames, n_runs, 3))
    x[0] = rng.normal(size=x[0].shape)
    noise = np.sqrt(1 - decay**2) * rng.normal(size=x.shape)
    for k in range(1, n_frames):
        x[k] = decay * x[k - 1] + noise[k]
    return x


def langevin(n_runs, n_frames, rng):
    """Velocities of damped oscillators in a bath, <v.v> = 3; exact steps by the matrix exponential."""
    from scipy.linalg import expm, solve_continuous_lyapunov

    drift = np.array([[0.0, 1.0], [-0.25, -0.05]])  # w = 0.5, friction 0.05 per frame
    step = expm(drift)
    stationary = solve_continuous_lyapunov(drift, -np.diag([0.0, 0.1]))
    kick = np.linalg.cholesky(stationary - step @ stationary @ step.T)
    z = np.linalg.cholesky(stationary) @ rng.normal(size=(n_runs, 3, 2, 1))
    v = np.empty((n_frames, n_runs, 3))
    for k in range(n_frames):
        v[k] = z[:, :, 1, 0]
        z = step @ z + kick @ rng.normal(size=z.shape)
    return v


@pytest.mark.parametrize("process", ["ar1", "langevin"])
def test_the_standard_error_is_the_scatter_of_many_runs(process):
    """Predicted variance, averaged over 150 runs, against the variance between the runs; both have noise."""
    rng = np.random.default_rng(7)
    n_runs, n_frames, n_lags = 150, 4000, 120
    series = ar1(n_runs, n_frames, 0.8, rng) if process == "ar1" else langevin(n_runs, n_frames, rng)
    window = windows.window("hann", n_lags)

    def route(acf):
        spectrum = spectral_density(window * acf, 1.0, 480)[..., 2:100:3]
        # a linear and a strongly nonlinear result, such as exp(-Q^2 <u^2>)
        return np.concatenate([spectrum[0], [np.exp(-0.1 * spectrum[0].sum())]])

    values, variances = [], []
    for run in range(n_runs):
        running = RunningCorrelation(1, n_lags)
        running.add(series[:, run : run + 1])
        found = jackknife(running.result().blocks, route)
        values.append(found.value)
        variances.append(found.variance)
    scatter = np.var(values, axis=0, ddof=1)
    ratio = np.mean(variances, axis=0) / scatter
    # the variance between 150 runs is known to sqrt(2/149) = 12 %, its mean over 33 points to about 4 %
    assert ratio[:-1].mean() == pytest.approx(1, abs=0.12)
    assert np.abs(ratio - 1).max() < 0.5
    assert ratio[-1] == pytest.approx(1, abs=0.4)
    assert found.n_samples >= 8
    # 95 of 100 intervals of two standard errors cover the truth (mean of all runs), a few less for few blocks
    covered = np.abs(values - np.mean(values, axis=0)) < 2 * np.sqrt(variances)
    assert 0.88 < covered.mean() < 0.98


def test_mean_of_unequal_blocks():
    rng = np.random.default_rng(3)
    sizes = np.array([10, 10, 10, 20, 5, 10, 10, 10])
    values, variances = [], []
    for _ in range(2000):
        samples = np.array([rng.normal(size=n).mean() for n in sizes])
        found = mean(samples[:, None], sizes)
        values.append(found.value[0])
        variances.append(found.variance[0])
    assert np.mean(values) == pytest.approx(0, abs=4 / np.sqrt(85 * 2000))
    assert np.mean(variances) == pytest.approx(1 / 85, rel=0.05)
    equal = rng.normal(size=(6, 4))
    assert mean(equal).error == pytest.approx(equal.std(axis=0, ddof=1) / np.sqrt(6))
    assert mean(equal[:1]).error is None


def test_jackknife_without_blocks_is_refused():
    with pytest.raises(DataError, match="no block"):
        jackknife(Blocks(np.zeros((0, 1, 4)), np.zeros((0, 4))), lambda acf: acf)


@pytest.mark.parametrize("name", ["hann", "gaussian", "none"])
def test_width_of_a_window(name):
    """Numerically: the half-width point of the transform of a cosine under the window."""
    lag, interval = 400.0, 0.5
    n = int(lag / interval)
    size = 1 << 16
    # a line at zero has its mirror image in the same place
    spectrum = spectral_density(windows.window(name, n), interval, size)
    nu = np.arange(size // 2 + 1) / (size * interval)
    below = int(np.argmax(spectrum < 0.5 * spectrum[0]))
    half = np.interp(0.5 * spectrum[0], spectrum[[below, below - 1]], nu[[below, below - 1]])
    assert 2 * half == pytest.approx(windows.window_width(name, lag), rel=2e-3)
    assert windows.window(name, n)[0] == 1
    with pytest.raises(DataError, match="no window called 'hamming'"):
        windows.window("hamming", n)


def test_quantum_factors():
    T = 300.0
    energy = np.linspace(-0.3, 0.3, 61)
    x = energy / (KB * T)
    for name in ("harmonic", "standard", "schofield"):
        factor = quantum.quantum_factor(name, energy, T)
        assert factor[::-1] == pytest.approx(np.exp(-x) * factor)  # detailed balance
        assert factor[30] == pytest.approx(1)
    # exact for an oscillator: <x x>_quantum of hbar (n+1)/2Mw against kT/Mw^2 on the loss side, half each
    e0 = 0.2
    n = 1 / np.expm1(e0 / (KB * T))
    exact = (n + 1) * HBAR / 2 / (KB * T * HBAR / e0 / 2)
    assert quantum.quantum_factor("harmonic", np.array([e0]), T)[0] == pytest.approx(exact)
    assert (quantum.quantum_factor("none", energy, T) == 1).all()
    with pytest.raises(DataError, match="no factor"):
        quantum.quantum_factor("egelstaff", energy, T)
    with pytest.raises(DataError, match="no quantum correction called 'gordon'"):
        quantum.quantum_factor("gordon", energy, T)


def test_egelstaff_is_exact_for_a_free_particle():
    """F = exp(-Q^2 kT t^2/2M) becomes the Gaussian about the recoil energy with variance 2 E_R kT."""
    T, Q2_over_M = 300.0, 36.0 / (1.008 * AMU_A2_PER_FS2)  # Q = 6 1/A
    interval, n_lags, size = 0.25, 400, 8192
    times = interval * np.arange(n_lags)
    acf = np.exp(-Q2_over_M * KB * T * times**2 / 2)
    spectrum = quantum.quantum_spectrum("egelstaff", acf, np.ones(n_lags), interval, size, T) / (np.pi * HBAR)
    energy = 2 * np.pi * HBAR / (size * interval) * np.arange(size // 2 + 1)
    recoil = HBAR**2 * Q2_over_M / 2
    exact = np.exp(-((energy - recoil) ** 2) / (4 * recoil * KB * T)) / np.sqrt(4 * np.pi * recoil * KB * T)
    low = energy < 0.4
    assert spectrum[low] == pytest.approx(exact[low], abs=1e-4 * exact.max())
    # the harmonic factor is not: its Gaussian stands elsewhere
    harmonic = quantum.quantum_spectrum("harmonic", acf, np.ones(n_lags), interval, size, T) / (np.pi * HBAR)
    assert np.abs(harmonic[low] - exact[low]).max() > 0.02 * exact.max()
