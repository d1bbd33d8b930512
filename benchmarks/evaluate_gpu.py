"""What needs a GPU, for benchmarks/evaluate.py."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from evaluate_driver import in_ipi
from evaluate_inputs import CELLS, MODEL, RING, Figures, must_agree, spread, write_input


def gpu(figures: Figures, folder: Path, rounds: int) -> None:
    """Batches, host work and clients of the ASE driver on a GPU, and how busy it is."""
    import torch

    from nnqmd_server.potentials.allegro import load

    print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    potential = load(MODEL, "cuda")
    print(f"model: {potential.form}")
    for atoms in CELLS:
        batches(figures, potential, atoms, rounds)
    del potential
    torch.cuda.empty_cache()
    for atoms in (64, 256):
        here = folder / f"clients-{atoms}"
        pairs = in_ipi(figures, here, 1, rounds, atoms, RING, 60, clients=8, device="cuda")
        spread(figures, f"gpu.speedup_vs_ase_clients.{atoms}", [theirs / ours for ours, theirs in pairs])
    figures["gpu.busy.256"] = gpu_busy(folder / "busy", 256)


def batches(figures: Figures, potential: object, atoms: int, rounds: int, repeats: int = 20) -> None:
    """All beads of a step in one call against one bead at a time, and the share of host work."""
    from ase.data import atomic_masses

    from nnqmd_server.inputs.start import read_start
    from nnqmd_server.potentials.einstein import ring_polymers

    with tempfile.TemporaryDirectory() as name:
        start = read_start(write_input(Path(name) / "in", atoms, RING, 1).parent / "init.xyz").structure
    masses = atomic_masses[start.numbers]
    rings = ring_polymers(start.numbers, masses, start.positions, start.cells[0], RING, 100.0)
    sets = [rings.at(0.5 * k) for k in range(repeats)]
    together = potential.evaluate(sets[0]).forces
    alone = np.concatenate([potential.evaluate(sets[0][k : k + 1]).forces for k in range(RING)])
    must_agree("one batch and single beads", together, alone)
    ratios, shares = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        for one in sets:
            potential.evaluate(one)
        between = time.perf_counter()
        for one in sets[: repeats // 4]:
            for k in range(RING):
                potential.evaluate(one[k : k + 1])
        end = time.perf_counter()
        batched, single = (between - begin) / repeats, (end - between) / (repeats // 4)
        ratios.append(single / batched)
        potential.timing, before, begin = True, potential.spent["model"], time.perf_counter()
        for one in sets:
            potential.evaluate(one)
        potential.timing = False
        shares.append(1.0 - (potential.spent["model"] - before) / (time.perf_counter() - begin))
        print(
            f"{atoms} atoms: batch {1e3 * batched:.2f}, single beads {1e3 * single:.2f} ms per force set",
            flush=True,
        )
    name = 1000 if atoms == 1024 else atoms
    spread(figures, f"gpu.batch_speedup.{name}", ratios)
    spread(figures, f"gpu.host_share.{name}", shares)
    figures[f"gpu.batch_ms.{name}"] = 1e3 * batched


def gpu_busy(folder: Path, atoms: int, seconds: float = 20.0) -> float:
    """Share of the time in which kernels run, as nvidia-smi samples it, while two simulations share a GPU."""
    from nnqmd_server.inputs.run import Run, make_folder
    from nnqmd_server.pool.launch import LocalPool

    jobs = []
    with LocalPool({"ammonia": str(MODEL)}, folder / "logs", workers=1, device="cuda") as pool:
        pool.wait_ready()
        try:
            for k in range(2):
                source = write_input(folder / f"in-{k}", atoms, RING, 100_000)
                make_folder(folder / f"run-{k}", force=False)
                jobs.append(Run(source, folder / f"run-{k}", pool.address))
            deadline = time.monotonic() + 120
            while pool.status().force_sets < 100 and time.monotonic() < deadline:
                time.sleep(0.1)
            return sampled_use(seconds)
        finally:
            for job in jobs:
                job.stop()


def sampled_use(seconds: float) -> float:
    """Mean of nvidia-smi's utilisation of the first GPU that may be used, sampled every 0.1 s."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [
        "nvidia-smi",
        f"--id={visible}",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
    ]
    samples, end = [], time.monotonic() + seconds
    with subprocess.Popen([*command, "--loop-ms=100"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            samples.append(float(line))
            if time.monotonic() > end:
                break
        process.kill()
    if not samples:
        sys.exit("nvidia-smi tells nothing about this GPU")
    return statistics.mean(samples) / 100
