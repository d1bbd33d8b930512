"""What a served step costs over the bare model: python benchmarks/step_overhead.py [--json FILE]

Measured in one run, on this machine, with the shipped model and input (64 atoms, 8 beads):

- i-PI alone: the same input with forces of zero from inside i-PI's process;
- the bare model: W processes (one per worker) that each evaluate their part of the beads over and
  over, at the same time, without any server; before and after the rest, since machines drift;
- served: i-PI, the direct door, the pool and W workers.

The served step should cost at most 15 % more than bare model plus i-PI alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(count):
        frame = atoms.copy()
        frame.positions += rng.normal(scale=np.where(frame.numbers == 1, 0.07, 0.03)[:, None], size=(64, 3))
        frames.append(frame)
    return from_ase(frames)


def _bare_worker(barrier: object, count: int, repeats: int, times: object) -> None:
    import torch

    from nnqmd_server.potentials.allegro import load

    torch.set_num_threads(1)
    potential, structures = load(MODEL, "cpu"), beads(count)
    for _ in range(5):
        potential.evaluate(structures)
    barrier.wait(timeout=300)
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        potential.evaluate(structures)
        spent.append(time.perf_counter() - start)
    times.put(1e3 * statistics.median(spent))


def bare_model(workers: int, repeats: int) -> float:
    """Milliseconds per force set when every worker process has its part of the beads at hand."""
    from nnqmd_server.pool.scheduler import cut

    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(workers), context.Queue()
    shares = cut(BEADS, [1.0] * workers)
    processes = [context.Process(target=_bare_worker, args=(barrier, n, repeats, times)) for n in shares]
    for process in processes:
        process.start()
    found = [times.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(found)  # a force set is ready when its last share is


def step_times(log: Path) -> float:
    """i-PI's own milliseconds per step: median over its windows of 100 steps."""
    windows = re.findall(r"at MD step +(\d+). t/step: (\S+)", log.read_text())
    return 1e3 * statistics.median(float(t) for step, t in windows if int(step) >= 100)


def ipi_alone(folder: Path, steps: int) -> float:
    """Milliseconds per step of i-PI with forces of zero, writing the same output."""
    from nnqmd_server.inputs.run import find_ipi

    home = folder / "alone"
    home.mkdir()
    shutil.copy(INPUT.parent / "init.xyz", home)
    (home / "zeros.py").write_text(ZEROS)
    text = INPUT.read_text().replace("nnqmd_pes.py", "zeros.py").replace("{template: init.xyz}", "{}")
    (home / "input.xml").write_text(re.sub(r"<total_steps>\d+", f"<total_steps>{steps}", text))
    with (home / "log").open("w") as log:
        command = [find_ipi(), "input.xml"]
        subprocess.run(command, cwd=home, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=600)
    return step_times(home / "log")


def served(folder: Path, workers: int, steps: int) -> float:
    """Milliseconds per step through the direct door and the pool."""
    from nnqmd_server.inputs.run import Run, make_folder
    from nnqmd_server.pool.launch import LocalPool

    make_folder(folder / "served", force=False)
    with LocalPool(MODEL, folder / "logs", workers=workers, device="cpu") as pool:
        pool.wait_ready()
        job = Run(INPUT, folder / "served", pool.address, steps)
        job.wait(lambda: None)
    return step_times(folder / "served" / "i-pi.log")


def main() -> None:
    """Measure, print a table, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=301)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = bare_model(options.workers, repeats=100)
        alone = ipi_alone(folder, max(options.steps, 501))
        served_ms = served(folder, options.workers, options.steps)
        after = bare_model(options.workers, repeats=100)
    bare = (before + after) / 2
    figures = {
        "served_over_bare": served_ms / (bare + alone),
        "ipi_alone_ms": alone,
        "bare_model_ms": bare,
        "served_ms": served_ms,
        "bare_model_before_ms": before,
        "bare_model_after_ms": after,
        "workers": options.workers,
        "beads": BEADS,
        "atoms": 64,
    }
    rows = {
        "i-PI alone (forces of zero)": f"{alone:.2f}",
        "bare model, beads spread over the workers": f"{bare:.2f}   before {before:.2f}, after {after:.2f}",
        "served: i-PI, direct door, pool, workers": f"{served_ms:.2f}",
        "served / (bare model + i-PI alone)": f"{figures['served_over_bare']:.3f}  wanted: at most 1.15",
    }
    print(f"64 atoms, {BEADS} beads, {options.workers} workers: ms per step")
    for name, text in rows.items():
        print(f"{name:<44}{text}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
