"""Runs dynasor 2.5 on a trajectory; called by benchmarks/spectra.py and tests in dynasor's own environment.

    python -m venv dynasor && dynasor/bin/pip install dynasor==2.5
    dynasor/bin/python benchmarks/peer_dynasor.py convert IN.npz FOLDER
    dynasor/bin/python benchmarks/peer_dynasor.py incoherent FOLDER OUT.npz SETTINGS.json

IN.npz as for peer_mdanse.py. The CPU seconds in OUT.npz are those of the call from its trajectory file (ASE's
binary .traj) to its results, after a short call that lets numba compile; NUMBA_NUM_THREADS=1 keeps its
threads from spinning. dynasor has no incoherent part without the coherent one: ``cpu`` is the whole call,
``cpu_coherent`` the same call without the incoherent part.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from dynasor import Trajectory, compute_dynamic_structure_factors
from dynasor.logging_tools import set_logging_level


def convert(source: Path, folder: Path) -> None:
    """To ASE's .traj."""
    from ase import Atoms
    from ase.io.trajectory import Trajectory as Writer

    data = np.load(source)
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(str(folder / "dynasor.traj"), "w") as file:
        for r in data["positions"]:
            file.write(Atoms(list(data["symbols"]), r, cell=[float(data["L"])] * 3, pbc=True))


def run(folder: Path, out: Path, settings: dict) -> None:
    """One call, twice: with the incoherent part and without."""
    q_points = np.array(settings["vectors"])
    set_logging_level("WARNING")

    def call(incoherent: bool, frames: int | None, window: int, step: int) -> tuple[float, object]:
        start = time.process_time()
        trajectory = Trajectory(
            str(folder / "dynasor.traj"),
            trajectory_format="ase",
            atomic_indices="read_from_trajectory",
            frame_stop=frames,
        )
        sample = compute_dynamic_structure_factors(
            trajectory, q_points, settings["interval"], window, step, calculate_incoherent=incoherent
        )
        return time.process_time() - start, sample

    call(True, 40, 20, 10)
    window, step = settings["n_lags"] - 1, settings["window_step"]
    alone = call(False, settings.get("frames"), window, step)[0] if settings.get("both", True) else 0.0
    cpu, sample = call(True, settings.get("frames"), window, step)
    counts = sample.particle_counts
    np.savez(
        out,
        cpu=cpu,
        cpu_coherent=alone,
        # dynasor divides by all atoms: back to the mean over the atoms of an element
        **{f"F|{s}": sample[f"Fqt_incoh_{s}"] * sum(counts.values()) / n for s, n in counts.items()},
    )


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
