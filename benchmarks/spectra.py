"""Exact incoherent F(Q,t) and the density of states: CPU time, numbers and memory beside MDANSE and dynasor.

192 atoms, 8192 frames, 8 |Q| with 25 lattice vectors each (those that MDANSE chooses), 1001 lags. Every
program reads its own binary trajectory, runs on one core, and is timed in CPU seconds (user + system) from
opening the file to the results, without imports. Ratios and differences are with the time origins of each
peer: MDANSE uses the first 7192 frames for every lag, dynasor every hundredth frame (all of them would cost
it a hundred times more). Ours is also timed with all of them, its default. dynasor computes the incoherent
part together with the coherent one; what the coherent part costs alone is measured too.

The peers live in environments of their own (`pip install MDANSE==2.0.1`, `pip install dynasor==2.5`):

    python benchmarks/spectra.py --mdanse PYTHON --dynasor PYTHON [--rounds 3] [--json FILE]
                                 [--trajectory FILE.npz]

Without --trajectory (the arrays that peer_mdanse.py reads), one is made up: 64 three-atom molecules that
diffuse, turn and vibrate. A peer without an interpreter is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
N_LAGS, COMB, SHELLS, PER_SHELL = 1001, 100, 8, 25


def made_up(path: Path, n_frames: int = 8192, n_molecules: int = 64, interval: float = 2.0) -> None:
    """Molecules of known shape whose centres diffuse, which turn at random and whose atoms vibrate."""
    rng = np.random.default_rng(0)
    n_atoms = 3 * n_molecules
    shape = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    centre = np.cumsum(rng.normal(scale=0.012, size=(n_frames, n_molecules, 3)), axis=0)
    centre += rng.uniform(0, 12.4, size=(n_molecules, 3))
    angle = np.cumsum(rng.normal(scale=0.03, size=(n_frames, n_molecules, 3)), axis=0)
    times = interval * np.arange(n_frames)[:, None, None]
    cosines, sines = np.cos(angle), np.sin(angle)
    positions = np.empty((n_frames, n_molecules, 3, 3))
    for k, (x, y, _) in enumerate(shape):
        flat = np.stack(
            [x * cosines[..., 0] - y * sines[..., 0], x * sines[..., 0] + y * cosines[..., 0]], -1
        )
        tilted = np.stack([flat[..., 0], flat[..., 1] * cosines[..., 1], flat[..., 1] * sines[..., 1]], -1)
        positions[:, :, k] = centre + tilted
    positions = positions.reshape(n_frames, n_atoms, 3)
    for period in (9.0, 20.0, 60.0):
        phase = rng.uniform(0, 2 * np.pi, size=(n_atoms, 3))
        positions += 0.04 * np.cos(2 * np.pi * times / period + phase)
    velocities = np.gradient(positions, interval, axis=0)
    np.savez(
        path,
        positions=positions,
        velocities=velocities,
        symbols=["O", "H", "H"] * n_molecules,
        masses=[15.9994, 1.00794, 1.00794] * n_molecules,
        L=12.4,
        interval=interval,
    )


def ours(job: str, source: Path, vectors: Path, out: Path) -> None:
    """One job of ours in this process; CPU seconds and peak memory go into the result."""
    from nnqmd_server.spectra.correlation import spectral_density, velocity_tensors
    from nnqmd_server.spectra.incoherent import scattering_function
    from nnqmd_server.spectra.vectors import Family, QVectors

    start = time.process_time()
    data = np.load(source)
    kinds = (data["symbols"] == "H").astype(int)
    if job == "vdos":
        v = data["velocities"]
        interval, n_frames = float(data["interval"]), len(v)
        # MDANSE's origins: all pairs, less those that begin after its last origin
        first = n_frames - N_LAGS + 1
        lags = np.arange(N_LAGS)
        acf = velocity_tensors(v, N_LAGS) * (n_frames - lags)
        acf[..., : n_frames - first] -= velocity_tensors(v[first:], n_frames - first) * (
            n_frames - first - lags[:-1]
        )
        acf /= first
        trace = np.array([acf[kinds == k, :3].sum(axis=1).mean(axis=0) / 3 for k in (0, 1)])
        result = spectral_density(trace, interval, 2 * N_LAGS - 1) / np.pi
    else:
        found = np.load(vectors)
        base = 2 * np.pi / float(data["L"]) * np.eye(3)
        shells = found["shell"] if job != "dynasor" else np.arange(len(found["shell"]))
        Q = np.zeros(shells.max() + 1)
        family = Family(base, np.rint(found["hkl"]).astype(int), shells)
        positions = data["positions"]
        n_frames = len(positions)
        origins = {"all": {}, "mdanse": {"until": n_frames - N_LAGS + 1}, "dynasor": {"every": COMB}}
        result = scattering_function(
            positions, kinds, QVectors(Q, (family,)), N_LAGS, threads=1, **origins[job]
        )
    cpu = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.savez(out, result=result, cpu=cpu, peak=peak)


def call(*command: object) -> None:
    """Run on one core."""
    one = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(c) for c in command], env={**os.environ, **one}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command[:3]))} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def main() -> None:
    """Measure in interleaved rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mdanse", type=Path, help="python of an environment with MDANSE 2.0.1")
    parser.add_argument("--dynasor", type=Path, help="python of an environment with dynasor 2.5")
    parser.add_argument("--trajectory", type=Path, help="npz file; one is made up by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    parser.add_argument("--ours", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        job, *paths = options.ours
        ours(job, *map(Path, paths))
        return
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Path(place), options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """All rounds; prints and returns the figures."""
    source = options.trajectory or folder / "in.npz"
    if options.trajectory is None:
        made_up(source)
    with np.load(source) as data:
        n_frames, interval, L = len(data["positions"]), float(data["interval"]), float(data["L"])
    vectors = folder / "vectors.npz"
    settings = folder / "mdanse.json"
    q = {"shells": [10, 10 * SHELLS, 10], "width": 6.0, "n_vectors": PER_SHELL, "seed": 1}
    q |= {"force_equal_weights": True, "n_samples": 50000}
    settings.write_text(json.dumps({"frames": [0, n_frames, 1, N_LAGS], "q_vectors": q}))
    if options.mdanse:
        call(options.mdanse, HERE / "peer_mdanse.py", "convert", source, folder)
    else:
        from nnqmd_server.spectra.vectors import lattice_vectors

        family = lattice_vectors(np.eye(3) * L, np.arange(1.0, SHELLS + 1), 0.6, PER_SHELL).families[0]
        np.savez(vectors, hkl=family.integers, shell=family.shell)
    comb = folder / "dynasor.json"
    if options.dynasor:
        call(options.dynasor, HERE / "peer_dynasor.py", "convert", source, folder)
    jobs: dict[str, tuple[object, ...]] = {}
    if options.mdanse:  # first in a round: it chooses the vectors, each time others in spite of its seed
        for job in ("disf", "dos"):
            jobs[f"MDANSE {job}"] = (options.mdanse, HERE / "peer_mdanse.py", job, folder)
    for job in ("all", "mdanse", "dynasor", "vdos"):
        jobs[f"ours, {job}"] = (sys.executable, __file__, "--ours", job, source, vectors)
    if options.dynasor:
        jobs["dynasor"] = (options.dynasor, HERE / "peer_dynasor.py", "incoherent", folder)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, dict[str, np.ndarray]] = {}
    for _ in range(options.rounds):
        for name, command in jobs.items():
            out = folder / "out.npz"
            last = {"MDANSE": [settings], "dynasor": [comb]}.get(name.split()[0], [])
            call(*command, out, *last)
            with np.load(out) as found:
                results[name] = dict(found)
            seconds[name].append(float(results[name]["cpu"]))
            if name == "MDANSE disf":
                np.savez(vectors, hkl=results[name]["hkl"], shell=results[name]["shell"])
            with np.load(vectors) as found:
                chosen = np.rint(found["hkl"]) * 2 * np.pi / L
            lags = {"interval": interval, "n_lags": N_LAGS, "window_step": COMB}
            comb.write_text(json.dumps({"vectors": chosen.tolist(), **lags}))
    return report(seconds, results, len(chosen))


def report(
    seconds: dict[str, list[float]], results: dict[str, dict[str, np.ndarray]], n_vectors: int
) -> dict[str, float]:
    """Print the table; the figures under their keys."""
    middle = {name: float(np.median(s)) for name, s in seconds.items()}
    print(f"CPU seconds, one core; F(Q,t) of {n_vectors} Q vectors, {N_LAGS} lags; median (range)")
    for name, s in seconds.items():
        print(f"  {name:18s} {middle[name]:8.2f}  ({min(s):.2f} to {max(s):.2f})")
    figures: dict[str, float] = {
        "peak_mb": max(
            float(r["peak"])
            for n, r in results.items()
            if n in ("ours, all", "ours, mdanse", "ours, dynasor")
        )
    }
    if "MDANSE disf" in results:
        peer = results["MDANSE disf"]
        both = np.stack([peer["disf|f(q,t)|O"], peer["disf|f(q,t)|H"]])
        figures["incoherent.cpu_ratio_mdanse"] = middle["MDANSE disf"] / middle["ours, mdanse"]
        figures["incoherent.max_abs_diff_mdanse"] = float(
            np.abs(results["ours, mdanse"]["result"] - both).max()
        )
        dos = results["MDANSE dos"]
        # nm^2/ps here, Angstrom^2/fs there
        theirs = np.stack([dos["dos|isotropic|O"], dos["dos|isotropic|H"]]) / 10
        mine = results["ours, vdos"]["result"]
        figures["vdos.cpu_ratio_mdanse"] = middle["MDANSE dos"] / middle["ours, vdos"]
        figures["vdos.max_rel_diff_mdanse"] = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
    if "dynasor" in results:
        peer = results["dynasor"]
        both = np.stack([peer["F|O"], peer["F|H"]])
        figures["incoherent.cpu_ratio_dynasor"] = middle["dynasor"] / middle["ours, dynasor"]
        figures["incoherent.cpu_ratio_dynasor_all_origins"] = middle["dynasor"] / middle["ours, all"]
        alone = middle["dynasor"] - float(peer["cpu_coherent"])
        figures["incoherent.cpu_ratio_dynasor_less_coherent"] = alone / middle["ours, all"]
        figures["incoherent.max_abs_diff_dynasor"] = float(
            np.abs(results["ours, dynasor"]["result"] - both).max()
        )
    for key, value in figures.items():
        print(f"{key:45s} {value:.4g}")
    return figures


if __name__ == "__main__":
    main()
