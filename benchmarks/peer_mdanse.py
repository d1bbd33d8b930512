"""Runs MDANSE 2.0.1 on a trajectory; called by benchmarks/spectra.py and tests in MDANSE's own environment.

    python -m venv mdanse && mdanse/bin/pip install MDANSE==2.0.1
    mdanse/bin/python benchmarks/peer_mdanse.py convert IN.npz FOLDER
    mdanse/bin/python benchmarks/peer_mdanse.py disf|gdisf|dos FOLDER OUT.npz SETTINGS.json

IN.npz holds positions [Angstrom] and velocities [Angstrom/fs], shape (n_frames, n_atoms, 3), symbols, masses
[amu], the length of the cubic cell [Angstrom] and the time between frames [fs]. The CPU seconds in OUT.npz
are those of the job itself, from its own .mdt file to its results, without imports.
"""

import json
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from MDANSE.Framework.Converters.Converter import Converter
from MDANSE.Framework.Jobs.IJob import IJob
from MDANSE.MolecularDynamics.Trajectory import Trajectory  # noqa: F401 - loaded before the clock starts

JOBS = {
    "disf": "DynamicIncoherentStructureFactor",
    "gdisf": "GaussianDynamicIncoherentStructureFactor",
    "dos": "DensityOfStates",
}


def convert(source: Path, folder: Path) -> None:
    """ASE's .traj first, then MDANSE's own converter, without compression."""
    from ase import Atoms
    from ase.io.trajectory import Trajectory as Writer

    data = np.load(source)
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(str(folder / "in.traj"), "w") as file:
        for r, v in zip(data["positions"], data["velocities"], strict=True):
            atoms = Atoms(list(data["symbols"]), r, cell=[float(data["L"])] * 3, pbc=True)
            atoms.set_masses(data["masses"])
            atoms.arrays["momenta"] = v * data["masses"][:, None]
            file.write(atoms)
    job = Converter.create("ASE")
    job.run(
        {
            "trajectory_file": str(folder / "in.traj"),
            "time_step": float(data["interval"]),
            "time_unit": "fs",
            "fold": False,
            "output_files": (str(folder / "mdanse"), 64, len(data["positions"]), "none", "no logs"),
        },
        status=False,
    )


def run(kind: str, folder: Path, out: Path, settings: dict) -> None:
    """One job on one core, without instrument resolution."""
    job = IJob.create(JOBS[kind])
    parameters = {
        "trajectory": str(folder / "mdanse.mdt"),
        "frames": tuple(settings["frames"]),
        "instrument_resolution": ("ideal", {}),
        "weights": "equal",
        "running_mode": ("single-core", 1),
        "output_files": (str(folder / kind), ["FileInMemory"], "no logs"),
    }
    if kind == "disf":
        parameters["q_vectors"] = ("SphericalLatticeQVectors", settings["q_vectors"])
    elif kind == "gdisf":
        parameters["q_shells"] = tuple(settings["q_shells"])
    else:
        parameters["interpolation_order"] = 0
    start = time.process_time()
    job.run(parameters, status=False)
    cpu = time.process_time() - start
    results = {}

    def keep(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            results[name.replace("/", "|")] = item[...]

    job.results.visititems(keep)
    if kind == "disf":
        shells = job.configuration["q_vectors"]["value"]
        results["vectors"] = np.concatenate([s["q_vectors"].T for s in shells.values()])
        results["hkl"] = np.concatenate([s["hkls"].T for s in shells.values()])
        results["shell"] = np.concatenate(
            [np.full(s["q_vectors"].shape[1], k) for k, s in enumerate(shells.values())]
        )
    np.savez(out, cpu=cpu, **results)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
