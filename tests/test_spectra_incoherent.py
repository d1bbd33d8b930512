"""Exact incoherent scattering: the estimator, closed cases, sum rules, and other programs."""

import numpy as np
import pytest
from spectra_cases import H
from spectra_peers import WATER, call, interpreter

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.spectra import incoherent, pieces
from nnqmd_server.spectra.correlation import spectral_density, velocity_tensors
from nnqmd_server.spectra.displacement import gaussian_function, mean_square_displacements
from nnqmd_server.spectra.fourier_backends import OnTorch
from nnqmd_server.spectra.incoherent import scattering_function, structure_factor
from nnqmd_server.spectra.neutron import recoil_constant
from nnqmd_server.spectra.trajectory import open_beads
from nnqmd_server.spectra.vectors import (
    Family,
    QVectors,
    directions,
    free_vectors,
    lattice_vectors,
    powder_vectors,
)
from nnqmd_server.units import AMU_A2_PER_FS2, HBAR, KB


def by_definition(positions, vectors, n_lags, origins):
    """Sum over origins one by one; positions (frames, beads, atoms, 3)."""
    result = np.zeros((len(vectors), n_lags))
    for row, q in zip(result, vectors, strict=True):
        e = np.exp(1j * positions @ q).mean(axis=1)
        for lag in range(n_lags):
            start = origins[origins < len(e) - lag]
            row[lag] = (e[start].conj() * e[start + lag]).real.mean()
    return result


@pytest.fixture(scope="module")
def walk():
    rng = np.random.default_rng(0)
    centres = 30 + np.cumsum(0.1 * rng.normal(size=(300, 1, 4, 3)), axis=0)
    return centres, centres + 0.1 * rng.normal(size=(300, 3, 4, 3))


@pytest.mark.parametrize("segment", [1 << 15, 64])
@pytest.mark.parametrize("beads", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize(("every", "until"), [(1, None), (1, 250), (2, None), (2, 251), (7, None), (7, 250)])
def test_estimator_against_its_definition(walk, segment, beads, device, every, until, monkeypatch):
    """Transforms, cross spectra and direct sums; whole and cut runs; NumPy and torch; one bead and three."""
    monkeypatch.setattr(pieces, "SEGMENT", segment)
    if device == "torch":  # on its CPU: the code that a GPU runs
        monkeypatch.setattr(incoherent, "backend_for", lambda _: OnTorch("cpu"))
    vectors = free_vectors(3 * np.random.default_rng(1).normal(size=(4, 3)))
    kinds = np.array([0, 1, -1, 0])
    found = scattering_function(walk[beads], kinds, vectors, 50, every=every, until=until, threads=2)
    origins = np.arange(0, until or 300, every)
    for kind in (0, 1):
        exact = by_definition(walk[beads][:, :, kinds == kind], vectors.vectors, 50, origins)
        assert found[kind] == pytest.approx(exact, abs=3e-7)


@pytest.mark.parametrize(
    "vectors",
    [
        lattice_vectors(np.array([[12.0, 0, 0], [3, 13, 0], [0, 1, 14]]), [1.0, 3.0, 5.0], 0.4, 7),
        powder_vectors(np.arange(1.0, 9.0), 5),
        powder_vectors(0.3 + 0.5 * np.arange(30), 3),
        powder_vectors([0.0, 0.5, 2.7], 3),
    ],
    ids=["lattice", "line", "shifted line", "uneven"],
)
def test_products_of_phases_equal_phases(walk, vectors):
    found = scattering_function(walk[0], np.zeros(4, int), vectors, 40)[0]
    single = by_definition(walk[0], vectors.vectors, 40, np.arange(300))
    exact = [single[vectors.shells == k].mean(axis=0) for k in range(len(vectors.Q))]
    assert found == pytest.approx(np.array(exact), abs=3e-7)


def test_lattice_vectors_fit_the_cell():
    cell = np.array([[12.0, 0, 0], [3, 13, 0], [0, 1, 14]])
    vectors = lattice_vectors(cell, [2.0, 4.0], 0.3, 25)
    turns = vectors.vectors @ cell.T / (2 * np.pi)
    assert turns == pytest.approx(np.rint(turns), abs=1e-9)
    assert (
        np.abs(np.linalg.norm(vectors.vectors, axis=1) - np.repeat([2.0, 4.0], vectors.counts)) < 0.15
    ).all()
    assert len({tuple(np.rint(t)) for t in turns} & {tuple(-np.rint(t)) for t in turns}) == 0
    with pytest.raises(InputError, match="no lattice vector"):
        lattice_vectors(cell, [0.05], 0.01)


def test_directions_average_the_sphere():
    d = directions(200)
    assert np.linalg.norm(d, axis=1) == pytest.approx(1)
    assert d.T @ d / len(d) == pytest.approx(np.eye(3) / 3, abs=2e-3)


def test_free_classical_particle():
    """exp(-Q^2 kT t^2/2M), and its spectrum: one sum, recoil as first moment, detailed balance."""
    temperature, interval, n_atoms, q = 300.0, 2.0, 1000, 2.0
    thermal = KB * temperature / (H * AMU_A2_PER_FS2)
    v = np.sqrt(thermal) * np.random.default_rng(4).normal(size=(n_atoms, 3))
    t = interval * np.arange(160)
    vectors = powder_vectors([q], 40)
    v *= np.sqrt(thermal * q**2 / ((v @ vectors.vectors.T) ** 2).mean())  # <(Q.v)^2> of this sample
    positions = t[:, None, None] * v
    F = scattering_function(positions, np.zeros(n_atoms, int), vectors, 100)[0, 0]
    assert F[0] == pytest.approx(1, abs=1e-6)
    assert pytest.approx(np.exp(-(q**2) * thermal * t[:100] ** 2 / 2), abs=0.02) == F
    window = 0.5 * (1 + np.tanh((60 - np.arange(100)) / 4))  # F is noise beyond 60 lags
    energy, S = structure_factor(F, interval, temperature, window)
    step = energy[1] - energy[0]
    _, classical = structure_factor(F, interval, temperature, window, correction="none")
    assert classical.sum() * step == pytest.approx(1, rel=1e-3)
    assert (energy * S).sum() * step == pytest.approx(recoil_constant(H) * q**2, rel=1e-3)
    k = energy > 0
    ratio = np.exp(-energy[k] / (KB * temperature))
    assert S[::-1][k] == pytest.approx(ratio * S[k], rel=1e-6, abs=1e-12 * S.max())


def test_langevin_particle():
    """<dr^2>/6 = (kT/M g^2)(gt - 1 + exp(-gt)), and the Gaussian function of it is exact."""
    friction, mass, temperature, interval = 1 / 100, 14.0, 250.0, 4.0
    rng = np.random.default_rng(5)
    thermal = KB * temperature / (mass * AMU_A2_PER_FS2)
    a = np.exp(-friction * interval)
    # exact propagation of velocity and position together
    vv = thermal * (1 - a**2)
    rv = thermal / friction * (1 - a) ** 2
    rr = thermal / friction**2 * (2 * friction * interval - 3 + 4 * a - a**2)
    noise = rng.normal(size=(4000, 60, 3, 2)) @ np.linalg.cholesky([[vv, rv], [rv, rr]]).T
    v = np.sqrt(thermal) * rng.normal(size=(60, 3))
    r = np.zeros((4001, 60, 3))
    for k in range(4000):
        r[k + 1] = r[k] + v * (1 - a) / friction + noise[k, ..., 1]
        v = a * v + noise[k, ..., 0]
    t = interval * np.arange(200)
    gamma = thermal / friction**2 * (friction * t - 1 + np.exp(-friction * t))
    kinds = np.zeros(60, int)
    displacements = mean_square_displacements(r, 200)
    assert displacements.mean(axis=0) / 6 == pytest.approx(gamma, rel=0.05, abs=1e-12)
    Q = np.array([0.5, 1.0, 2.0])
    exact = np.exp(-(Q[:, None] ** 2) * gamma)
    assert scattering_function(r, kinds, powder_vectors(Q, 20), 200)[0] == pytest.approx(exact, abs=0.02)
    assert gaussian_function(displacements, kinds, Q)[0] == pytest.approx(exact, abs=0.02)


def test_classical_oscillator_is_gaussian():
    """F = exp{-Q^2 (kT/M w^2)(1 - cos wt)} for thermal amplitudes."""
    w, temperature, interval, q = 0.03, 300.0, 2.0, 3.0
    rng = np.random.default_rng(6)
    spread = np.sqrt(KB * temperature / (H * AMU_A2_PER_FS2)) / w
    c, s = spread * rng.normal(size=(2, 3000, 3))
    t = interval * np.arange(400)
    r = c * np.cos(w * t)[:, None, None] + s * np.sin(w * t)[:, None, None]
    F = scattering_function(r, np.zeros(3000, int), powder_vectors([q], 12), 150)[0, 0]
    assert pytest.approx(np.exp(-(q**2) * spread**2 * (1 - np.cos(w * t[:150]))), abs=0.01) == F


def test_mean_square_displacements_against_their_definition(walk):
    r = walk[0][:, 0]
    found = mean_square_displacements(r, 40)
    exact = [((r[k:] - r[: len(r) - k]) ** 2).sum(axis=-1).mean(axis=0) for k in range(40)]
    assert found == pytest.approx(np.array(exact).T, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("every", "until"), [(1, None), (1, 250), (3, None), (3, 200)])
def test_a_stream_gives_the_same(walk, tmp_path, monkeypatch, every, until):
    """Bead files read once, in pieces that are shorter than the run."""
    positions = walk[1]
    for bead in range(3):
        with (tmp_path / f"run.pos_{bead}.xyz").open("w") as file:
            for k, frame in enumerate(positions[:, bead]):
                file.write(f"4\n# CELL(abcABC): 900 900 900 90 90 90 Step: {k} Bead: {bead} ")
                file.write("positions{angstrom} cell{angstrom}\n")
                file.writelines(f"H {x:.9f} {y:.9f} {z:.9f}\n" for x, y, z in frame)
    beads = open_beads(tmp_path / "run.pos_0.xyz", timestep=0.5)
    monkeypatch.setattr(pieces, "STREAM_BYTES", 1)  # then four windows of lags
    kinds, vectors = np.array([0, 1, -1, 0]), powder_vectors([1.0, 2.0], 4)
    found = scattering_function(beads, kinds, vectors, 20, every=every, until=until)
    whole = scattering_function(positions, kinds, vectors, 20, every=every, until=until)
    assert found == pytest.approx(whole, abs=3e-7)


def test_unusable_positions(walk):
    broken = walk[0][:, 0].copy()
    broken[17, 2] = np.nan
    vectors = powder_vectors([1.0], 2)
    with pytest.raises(DataError, match="Frame 17"):
        scattering_function(broken, np.zeros(4, int), vectors, 10)
    with pytest.raises(DataError, match="do not fit"):
        scattering_function(walk[0], np.zeros(5, int), vectors, 10)
    with pytest.raises(InputError, match="400 lags"):
        scattering_function(walk[0], np.zeros(4, int), vectors, 400)
    with pytest.raises(InputError, match="cannot be used"):
        scattering_function(walk[0], np.zeros(4, int), vectors, 10, device="nonsense")


@pytest.fixture(scope="module")
def water():
    with np.load(WATER) as data:
        loaded = dict(data)
    loaded["kinds"] = (loaded["symbols"] == "H").astype(int)
    return loaded


N_LAGS = 101


@pytest.fixture(scope="module")
def mdanse(tmp_path_factory):
    """Results of MDANSE by job."""
    python = interpreter("mdanse")
    folder = tmp_path_factory.mktemp("mdanse")
    call(python, "peer_mdanse.py", "convert", WATER, folder)
    q = {"shells": [10, 70, 20], "width": 6.0, "n_vectors": 12, "seed": 1, "n_samples": 20000}
    settings = {
        "frames": [0, 256, 1, N_LAGS],
        "q_vectors": q | {"force_equal_weights": True},
        "q_shells": [0, 80, 10],
    }
    results = {}
    for job in ("disf", "gdisf", "dos"):
        call(python, "peer_mdanse.py", job, folder, folder / "out.npz", settings=settings, folder=folder)
        with np.load(folder / "out.npz") as found:
            results[job] = dict(found)
    return results


@pytest.mark.peer
def test_mdanse_incoherent_structure_factor(mdanse, water):
    """MDANSE lets correlations start at the first T - lags + 1 frames only; its vectors are in 1/nm."""
    peer = mdanse["disf"]
    base = 2 * np.pi / float(water["L"]) * np.eye(3)
    vectors = QVectors(np.arange(4.0), (Family(base, np.rint(peer["hkl"]).astype(int), peer["shell"]),))
    assert vectors.vectors == pytest.approx(peer["vectors"] / 10, abs=1e-9)
    F = scattering_function(water["positions"], water["kinds"], vectors, N_LAGS, until=256 - N_LAGS + 1)
    for kind, symbol in enumerate("OH"):
        assert np.abs(F[kind] - peer[f"disf|f(q,t)|{symbol}"]).max() < 1e-6
    # S(Q,w), 1/2pi and angular frequency, on MDANSE's own grid: no padding, no window
    S = spectral_density(F, 1.0, 2 * N_LAGS - 1) / np.pi * float(water["interval"]) / 1000  # ps
    theirs = peer["disf|s(q,f)|H"][:, N_LAGS - 1 :]
    assert np.abs(S[1] - theirs).max() < 1e-6 * np.abs(theirs).max()


@pytest.mark.peer
def test_mdanse_gaussian_structure_factor(mdanse, water):
    peer = mdanse["gdisf"]
    displacements = mean_square_displacements(water["positions"], N_LAGS, np.arange(256 - N_LAGS + 1))
    F = gaussian_function(displacements, water["kinds"], peer["gdisf|axes|q"] / 10)
    for kind, symbol in enumerate("OH"):
        assert np.abs(F[kind] - peer[f"gdisf|f(q,t)|{symbol}"]).max() < 1e-6


@pytest.mark.peer
def test_mdanse_density_of_states(mdanse, water):
    """From the velocities of the trajectory (interpolation order 0); nm^2/ps there, Angstrom^2/fs here."""
    peer = mdanse["dos"]
    v, last = water["velocities"].astype(float), 256 - N_LAGS + 1
    lags = np.arange(N_LAGS)
    acf = velocity_tensors(v, N_LAGS) * (256 - lags)
    acf[..., :-1] -= velocity_tensors(v[last:], N_LAGS - 1) * (N_LAGS - 1 - lags[:-1])
    acf /= last
    for kind, symbol in enumerate("OH"):
        trace = acf[water["kinds"] == kind, :3].sum(axis=1).mean(axis=0) / 3
        f = spectral_density(trace, float(water["interval"]), 2 * N_LAGS - 1) / np.pi * 10
        theirs = peer[f"dos|isotropic|{symbol}"]
        assert np.abs(f - theirs).max() < 1e-6 * np.abs(theirs).max()


@pytest.mark.peer
@pytest.mark.parametrize("every", [1, 20])
def test_dynasor_incoherent(tmp_path, water, every):
    """dynasor starts at every so manieth frame, and near the end uses the lags that are left."""
    python = interpreter("dynasor")
    call(python, "peer_dynasor.py", "convert", WATER, tmp_path)
    vectors = lattice_vectors(float(water["L"]) * np.eye(3), [1.0, 3.0, 5.0], 0.8, 8)
    free = free_vectors(vectors.vectors)
    settings = {"vectors": free.vectors.tolist(), "interval": 2.0, "n_lags": N_LAGS, "window_step": every}
    out = tmp_path / "out.npz"
    call(python, "peer_dynasor.py", "incoherent", tmp_path, out, settings=settings, folder=tmp_path)
    with np.load(out) as peer:
        F = scattering_function(water["positions"], water["kinds"], free, N_LAGS, every=every)
        for kind, symbol in enumerate("OH"):
            assert np.abs(F[kind] - peer[f"F|{symbol}"]).max() < 1e-6


def test_recoil_and_normalisation_of_water(water):
    """Int E S dE = hbar^2 Q^2 <v^2>/2kT, with the trajectory's own kinetic energy, for any classical F."""
    q, interval, temperature = 3.0, float(water["interval"]), 300.0
    F = scattering_function(water["positions"], water["kinds"], powder_vectors([q], 60), 100)[1, 0]
    window = np.exp(-0.5 * (np.arange(100) / 25) ** 2)
    energy, S = structure_factor(F, interval, temperature, window)
    _, classical = structure_factor(F, interval, temperature, window, correction="none")
    step = energy[1] - energy[0]
    assert classical.sum() * step == pytest.approx(1, rel=1e-3)
    gain, loss = S[energy < 0][::-1], S[energy > 0]
    assert gain == pytest.approx(loss * np.exp(-energy[energy > 0] / (KB * temperature)), abs=1e-6 * S.max())
    v2 = (water["velocities"][:, water["kinds"] == 1] ** 2).sum(axis=-1).mean() / 3
    # the window adds (hbar/width)^2 to the classical second moment, which the first moment is made of
    second = HBAR**2 * (q**2 * v2 + (1 / (25 * interval)) ** 2)
    assert (energy * S).sum() * step == pytest.approx(second / (2 * KB * temperature), rel=0.01)
