"""Other programs' models through our pool, against these programs themselves: python benchmarks/potentials.py

    python benchmarks/potentials.py --deepmd /envs/deepmd --mace /envs/mace --sevennet /envs/sevennet

For every environment that is named (a folder of a virtual environment or its python; also from
NNQMD_DEEPMD_PYTHON and so on), the program makes or brings a model and evaluates five structures of
ammonia by its own interface (benchmarks/peer_potentials.py); then one worker in that environment serves
the same model in every way that nnqmd knows, and the largest differences are printed: energy [eV],
forces [eV/Angstrom], virial [eV], and how long the worker took for each structure [ms], in a second call
(the first one warms up).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
PROGRAMS = ("deepmd", "mace", "mattersim", "metatomic", "orb", "sevennet", "tblite")


def structures_of_ammonia() -> object:
    """Beads of the 16-atom crystal, one of them out of the cell, and a sheared cell."""
    from ase import Atoms

    from nnqmd_server.structures import from_ase

    lines = (ROOT / "ipi_inputs/ammonia-solid-trpmd/init.xyz").read_text().splitlines()[2:18]
    symbols = [line.split()[0] for line in lines]
    positions = np.array([line.split()[1:4] for line in lines], dtype=float)
    rng = np.random.default_rng(7)
    frames = []
    for k in range(5):
        atoms = Atoms(
            symbols, positions + rng.normal(scale=0.04, size=positions.shape), cell=[5.13] * 3, pbc=True
        )
        if k == 3:
            atoms.positions += [17.0, -9.0, 4.0]  # i-PI does not wrap
        if k == 4:
            strain = np.array([[1.02, 0.04, -0.03], [0.0, 0.99, 0.06], [0.0, 0.0, 1.03]])
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        frames.append(atoms)
    return from_ase(frames)


def training_set(path: Path) -> None:
    """Energies and forces of the 16-atom frames of the ammonia data set, for DeePMD-kit."""
    from ase.io import read

    frames = [
        f
        for f in read(ROOT / "examples/ammonia/data/ammonia_train.xyz", ":", format="extxyz")
        if len(f) == 16
    ]
    numbers = frames[0].numbers
    frames = [f for f in frames if np.array_equal(f.numbers, numbers)]
    np.savez(
        path,
        numbers=numbers,
        coord=[f.positions for f in frames],
        box=[f.cell.array for f in frames],
        energy=[f.get_potential_energy() for f in frames],
        force=[f.get_forces() for f in frames],
    )


def python_of(program: str, given: str | None = None) -> str | None:
    """The interpreter of a program's environment."""
    path = given or os.environ.get(f"NNQMD_{program.upper()}_PYTHON")
    if path and Path(path).is_dir():
        path = str(Path(path) / "bin/python")
    return path


def prepare(program: str, python: str, folder: Path, structures: object) -> dict:
    """Let the program make its model and answer; the ways in which we can serve it, and the versions."""
    fields = ("numbers", "positions", "cells", "offsets")
    np.savez(folder / "structures.npz", **{name: getattr(structures, name) for name in fields})
    training_set(folder / "train.npz")
    command = [python, str(HERE / "peer_potentials.py"), program, str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return json.loads((folder / "sources.json").read_text())


def differences(source: str, python: str, folder: Path, structures: object) -> dict[str, float]:
    """Serve a source in the other environment, and compare with what the program itself said."""
    from nnqmd_server.pool.client import PoolClient
    from nnqmd_server.pool.launch import LocalPool

    oracle = np.load(folder / "oracle.npz")
    with LocalPool({"peer": f"{source}@{python}"}, folder / "logs", workers=1, device="cpu") as pool:
        pool.wait_ready(timeout=250)
        client = PoolClient(pool.address, potential="peer")
        try:
            results = client.submit(structures)
            started = time.perf_counter()
            again = client.submit(structures)
            seconds = time.perf_counter() - started
        finally:
            client.close()
    found = {
        key: float(np.abs(getattr(results, key) - oracle[key]).max())
        for key in ("energy", "forces", "virial")
    }
    found["repeated"] = float(np.abs(results.forces - again.forces).max())
    return found | {
        "ms": 1e3 * seconds / len(structures),
        "largest_force": float(np.abs(oracle["forces"]).max()),
        "largest_energy": float(np.abs(oracle["energy"]).max()),
    }


def main() -> None:
    """Print a line for every program and way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for program in PROGRAMS:
        parser.add_argument(f"--{program}", metavar="ENVIRONMENT")
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    structures, rows = structures_of_ammonia(), []
    print(f"{len(structures)} structures of 16 atoms; largest difference from the program's own interface")
    print(
        f"{'program':10} {'as':18} {'energy eV':>10} {'force eV/A':>11} {'virial eV':>10} {'ms':>7}  versions"
    )
    for program in PROGRAMS:
        python = python_of(program, options[program])
        if python is None:
            print(f"{program:10} not run: no --{program} ENVIRONMENT")
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            told = prepare(program, python, folder, structures)
            versions = " ".join(f"{k} {v}" for k, v in told["versions"].items())
            for way, source in told["sources"].items():
                found = differences(source, python, folder, structures)
                rows.append({"program": program, "way": way, "versions": versions, **found})
                largest = f"{found['energy']:10.1e} {found['forces']:11.1e} {found['virial']:10.1e}"
                print(f"{program:10} {way:18} {largest} {found['ms']:7.1f}  {versions}", flush=True)
    if options["json"]:
        options["json"].write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
