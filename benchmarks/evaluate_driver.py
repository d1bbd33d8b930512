"""i-PI with our pool beside i-PI with its own ASE driver, for benchmarks/evaluate.py."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluate_inputs import (
    BEADS,
    MODEL,
    Figures,
    initial_forces,
    must_agree,
    spread,
    step_times,
    until,
    write_input,
)

STEPS = {64: 40, 256: 16}
"""Of each run, by atoms."""

PEER = """
import torch
from ase.io import read
from ipi.pes._ase import ASEDriver
from nequip.integrations.ase import NequIPCalculator

torch.set_num_threads(1)
__DRIVER_NAME__, __DRIVER_CLASS__ = "peer", "Peer"


class Peer(ASEDriver):
    def check_parameters(self):
        super().check_parameters()
        self.ase_calculator = NequIPCalculator._from_saved_model("MODEL", device="DEVICE")
"""


def ours_in_ipi(folder: Path, pool: object, atoms: int, beads: int, steps: int) -> list[float]:
    """Milliseconds of every step with our pool and the direct door, as `nnqmd run` does it."""
    from nnqmd_server.inputs.run import Run, make_folder

    source = write_input(folder / "in", atoms, beads, steps)
    make_folder(folder / "run", force=False)
    Run(source, folder / "run", pool.address).wait(lambda: None)
    return step_times(folder / "run/i-pi.log", first=5)


def theirs_in_ipi(
    folder: Path, clients: int, atoms: int, beads: int, steps: int, device: str = "cpu"
) -> list[float]:
    """Milliseconds of every step with i-PI's ASE driver and NequIPCalculator."""
    from ase import Atoms
    from ase.io import write

    from nnqmd_server.inputs.run import find_ipi
    from nnqmd_server.inputs.start import read_start

    name = f"nnqmd-bench-{os.getpid()}"
    field = (
        f"<ffsocket name='allegro' mode='unix'><address>{name}</address><latency>1e-4</latency></ffsocket>"
    )
    home = write_input(folder / "in", atoms, beads, steps, field).parent
    start = read_start(home / "init.xyz").structure
    template = Atoms(numbers=start.numbers, positions=start.positions, cell=start.cells[0], pbc=True)
    write(home / "template.extxyz", template)
    (home / "peer.py").write_text(PEER.replace("MODEL", str(MODEL)).replace("DEVICE", device))
    driver = [str(Path(find_ipi()).parent / "i-pi-driver-py"), "-u", "-a", name]
    driver += ["-m", "custom", "-P", "peer.py", "-o", "template=template.extxyz"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for k, command in enumerate([[find_ipi(), "input.xml"], *[driver] * clients]):
            with (home / ("i-pi.log" if k == 0 else f"driver-{k}.log")).open("w") as output:
                processes.append(
                    subprocess.Popen(command, cwd=home, env=settings, stdout=output, stderr=subprocess.STDOUT)
                )
            if k == 0:
                until(Path(f"/tmp/ipi_{name}").exists, processes[0], home)
        processes[0].wait(900)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        Path(f"/tmp/ipi_{name}").unlink(missing_ok=True)
    return step_times(home / "i-pi.log", first=5)


def driver(figures: Figures, folder: Path, workers: int, rounds: int, sizes: Sequence[int]) -> None:
    """i-PI with our pool, and with as many clients of its own ASE driver."""
    for atoms in sizes:
        here = folder / f"{atoms}"
        pairs = in_ipi(figures, here, workers, rounds, atoms, BEADS, STEPS[atoms], clients=workers)
        spread(figures, f"speedup_vs_ase_driver.{atoms}", [theirs / ours for ours, theirs in pairs])
        figures[f"ours_ms_per_step.{atoms}"] = statistics.median(ours for ours, _ in pairs)
        figures[f"ase_driver_ms_per_step.{atoms}"] = statistics.median(theirs for _, theirs in pairs)


def in_ipi(
    figures: Figures,
    folder: Path,
    workers: int,
    rounds: int,
    atoms: int,
    beads: int,
    steps: int,
    clients: int,
    device: str = "cpu",
) -> list[tuple[float, float]]:
    """Median milliseconds per step of ours and of the ASE driver, round by round."""
    from nnqmd_server.pool.launch import LocalPool

    pairs = []
    for k in range(rounds):
        here = folder / f"{k}"
        # A pool for each round, so that its workers are not there while the others compute.
        with LocalPool({"ammonia": str(MODEL)}, here / "logs", workers=workers, device=device) as pool:
            pool.wait_ready()
            ours = ours_in_ipi(here / "ours", pool, atoms, beads, steps)
        theirs = theirs_in_ipi(here / "theirs", clients, atoms, beads, steps, device)
        if not ours or not theirs:
            sys.exit("\n".join(path.read_text()[-2000:] for path in here.glob("*/*/*.log")))
        pairs.append((statistics.median(ours), statistics.median(theirs)))
        words = f"ours {pairs[-1][0]:.1f}, ASE driver {pairs[-1][1]:.1f} ms per step"
        print(f"{atoms} atoms, {beads} beads, {device}, round {k + 1}: {words}", flush=True)
        one, other = initial_forces(here / "ours/run"), initial_forces(here / "theirs/in")
        worst = must_agree("our door and the ASE driver", one, other)
        figures[f"driver_force_difference.{atoms}.{device}"] = worst
    return pairs
