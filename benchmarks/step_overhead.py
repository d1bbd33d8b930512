"""What a served step costs over the bare model: python benchmarks/step_overhead.py [--json FILE]

Measured on this machine with the shipped model and input (64 atoms, 8 beads), round by round, since
machines drift; a round is, one after the other,

- the bare model: W processes (one per worker) that each evaluate their part of the beads over and
  over, at the same time, without any server, in the same environment as a worker;
- i-PI alone: the same input with forces of zero from inside i-PI's process;
- served: i-PI, the direct door, the pool and W workers.

The figures are medians over the rounds, the ratio that of the rounds' own ratios. The served step should
cost at most 15 % more than bare model plus i-PI alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
INPUT = ROOT / "ipi_inputs/ammonia-solid-trpmd/input.xml"
BEADS = 8
STEPS = 101  # i-PI prints its time per step after step 0 and after every 100 more
REPEATS = 40

ZEROS = """
import numpy as np
__DRIVER_NAME__, __DRIVER_CLASS__ = "zeros", "Zeros"
class Zeros:
    def __init__(self, **_): pass
    def __call__(self, cell, pos):
        return [(0.0, np.zeros_like(q), np.zeros((3, 3)), "") for q in pos]
"""


def beads(count: int) -> object:
    """Structures like those of the run: the initial one with atoms displaced as zero-point motion does."""
    from ase.io import read

    from nnqmd_server.structures import from_ase

    atoms = read(INPUT.parent / "init.xyz", format="xyz")
    atoms.set_cell([10.26, 10.26, 5.13])
    atoms.pbc = True
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(count):
        frame = atoms.copy()
        frame.positions += rng.normal(scale=np.where(frame.numbers == 1, 0.07, 0.03)[:, None], size=(64, 3))
        frames.append(frame)
    return from_ase(frames)


def _bare_worker(barrier: object, count: int, rounds: int, times: object) -> None:
    import torch

    from nnqmd_server.potentials.allegro import load

    torch.set_num_threads(1)
    potential, structures = load(MODEL, "cpu"), beads(count)
    for _ in range(5):
        potential.evaluate(structures)
    for _ in range(rounds):
        barrier.wait(timeout=600)
        spent = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            potential.evaluate(structures)
            spent.append(time.perf_counter() - start)
        times.put(1e3 * statistics.mean(spent))


class BareModel:
    """Processes that have their part of the beads at hand and evaluate it when told."""

    def __init__(self, workers: int, rounds: int) -> None:
        from nnqmd_server.pool.cutting import cut
        from nnqmd_server.pool.processes import worker_settings

        context = multiprocessing.get_context("spawn")
        self._barrier, self._times = context.Barrier(workers + 1), context.Queue()
        self._processes = [
            context.Process(target=_bare_worker, args=(self._barrier, n, rounds, self._times), daemon=True)
            for n in cut(BEADS, [1.0] * workers)
        ]
        os.environ.update(worker_settings())  # the same allocator as in a worker; inherited by the processes
        for process in self._processes:
            process.start()

    def measure(self) -> float:
        """Milliseconds per force set, which is ready when its last share is."""
        self._barrier.wait(timeout=600)
        return max(self._times.get(timeout=600) for _ in self._processes)


def step_time(log: Path) -> float:
    """i-PI's own milliseconds per step, its mean over the first window after step 0."""
    windows = re.findall(r"at MD step +(\d+). t/step: (\S+)", log.read_text())
    return 1e3 * float(next(t for step, t in windows if int(step) == STEPS - 1))


def ipi_alone(home: Path) -> float:
    """Milliseconds per step of i-PI with forces of zero, writing the same output."""
    from nnqmd_server.inputs.run import find_ipi

    home.mkdir()
    shutil.copy(INPUT.parent / "init.xyz", home)
    (home / "zeros.py").write_text(ZEROS)
    text = INPUT.read_text().replace("nnqmd_pes.py", "zeros.py").replace("{template: init.xyz}", "{}")
    (home / "input.xml").write_text(re.sub(r"<total_steps>\d+", f"<total_steps>{STEPS}", text))
    with (home / "log").open("w") as log:
        command = [find_ipi(), "input.xml"]
        subprocess.run(command, cwd=home, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=600)
    return step_time(home / "log")


def served(home: Path, address: str) -> float:
    """Milliseconds per step through the direct door and the pool."""
    from nnqmd_server.inputs.run import Run, make_folder

    make_folder(home, force=False)
    Run(INPUT, home, address, STEPS).wait(lambda: None)
    return step_time(home / "i-pi.log")


def main() -> None:
    """Measure, print a table, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    from nnqmd_server.pool.launch import LocalPool

    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LocalPool(
            {"ammonia": str(MODEL)}, folder / "logs", workers=options.workers, device="cpu"
        ) as pool:
            pool.wait_ready()
            bare_model = BareModel(options.workers, options.rounds)
            for k in range(options.rounds):
                bare = bare_model.measure()
                alone = ipi_alone(folder / f"alone-{k}")
                rounds.append((bare, alone, served(folder / f"served-{k}", pool.address)))
                print("round {}: bare {:.2f}, i-PI alone {:.2f}, served {:.2f} ms".format(k + 1, *rounds[-1]))
    bare, alone, served_ms = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [one[2] / (one[0] + one[1]) for one in rounds]
    figures = {
        "served_over_bare": statistics.median(ratios),
        "served_over_bare_min": min(ratios),
        "served_over_bare_max": max(ratios),
        "ipi_alone_ms": alone,
        "bare_model_ms": bare,
        "served_ms": served_ms,
        "rounds": options.rounds,
        "workers": options.workers,
        "beads": BEADS,
        "atoms": 64,
    }
    low, high = figures["served_over_bare_min"], figures["served_over_bare_max"]
    ratio = f"{figures['served_over_bare']:.3f}   ({low:.3f} to {high:.3f}; wanted: at most 1.15)"
    rows = {
        "i-PI alone (forces of zero)": f"{alone:.2f}",
        "bare model, beads spread over the workers": f"{bare:.2f}",
        "served: i-PI, direct door, pool, workers": f"{served_ms:.2f}",
        "served / (bare model + i-PI alone)": ratio,
    }
    print(f"64 atoms, {BEADS} beads, {options.workers} workers: ms per step")
    for name, text in rows.items():
        print(f"{name:<44}{text}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
