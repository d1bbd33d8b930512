"""Real i-PI simulations at a pool, for benchmarks/pool.py: how busy they keep it, and how fast they are."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pool_workers import sleeping_pool, until

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
INPUT = ROOT / "ipi_inputs/ammonia-solid-trpmd/input.xml"


PEER = """
from ase import Atoms
import numpy as np
import torch
from nequip.integrations.ase import NequIPCalculator
torch.set_num_threads(1)
__DRIVER_NAME__, __DRIVER_CLASS__ = "peer", "Peer"
A, E = 0.529177210903, 27.211386245988
class Peer:
    def __init__(self, **_):
        self.calculator = NequIPCalculator.LOAD("MODEL", device="cpu")
        numbers = [line.split()[0] for line in open("TEMPLATE").read().splitlines()[2:]]
        self.atoms = Atoms(numbers, pbc=True)
        self.atoms.calc = self.calculator
    def __call__(self, cell, pos):
        self.atoms.set_cell(np.asarray(cell).T * A)
        self.atoms.set_positions(np.asarray(pos) * A)
        virial = -self.atoms.get_stress(voigt=False) * self.atoms.get_volume()
        return self.atoms.get_potential_energy() / E, self.atoms.get_forces() * (A / E), virial / E, ""
"""


def large_input(folder: Path, beads: int, cells: int, seed: int) -> Path:
    """The shipped input with other beads, ``cells`` times the atoms, and nothing written."""
    folder.mkdir()
    edges = np.array([10.26, 10.26, 5.13])
    lines = (INPUT.parent / "init.xyz").read_text().splitlines()
    rows = [line.split() for line in lines[2:]]
    more = [f"# CELL(abcABC): 10.26 10.26 {cells * edges[2]} 90 90 90 positions{{angstrom}} cell{{angstrom}}"]
    for k in range(cells):
        more += [f"{row[0]} {row[1]} {row[2]} {float(row[3]) + k * edges[2]}" for row in rows]
    (folder / "init.xyz").write_text("\n".join([str(len(more) - 1), *more]) + "\n")
    shutil.copy(INPUT.parent / "nnqmd_pes.py", folder)
    text = INPUT.read_text()
    text = re.sub(r"<batch_size>\d+", f"<batch_size>{beads}", text)
    text = re.sub(r"nbeads='\d+'", f"nbeads='{beads}'", text)
    text = re.sub(r"<seed>\d+", f"<seed>{seed}", text)
    text = re.sub(r"<total_steps>\d+", "<total_steps>100000", text)
    text = re.sub(r"<trajectory.*?</trajectory>", "", text, flags=re.DOTALL)
    (folder / "input.xml").write_text(text)
    return folder / "input.xml"


@contextlib.contextmanager
def simulations(folder: Path, address: str, count: int, beads: int, cells: int) -> Iterator[list[Path]]:
    """Real i-PI runs at a pool; yields their outputs."""
    from nnqmd_server.inputs.run import Run, make_folder

    jobs = []
    try:
        for k in range(count):
            source = large_input(folder / f"in-{k}", beads, cells, seed=100 + k)
            make_folder(folder / f"run-{k}", force=False)
            jobs.append(Run(source, folder / f"run-{k}", address))
        yield [job.folder / "nh3.out" for job in jobs]
    finally:
        stoppers = [threading.Thread(target=job.stop) for job in jobs]
        for one in stoppers:
            one.start()
        for one in stoppers:
            one.join()


def busy(figures: dict[str, float], seconds: float = 12.0) -> None:
    """The share of the time in which the workers compute."""
    for count in (1, 4):
        with tempfile.TemporaryDirectory() as name, sleeping_pool([1.0, 1.0]) as (pool, address):
            with simulations(Path(name), address, count, beads=32, cells=4):
                until(lambda pool=pool, n=count: pool.status().force_sets > 30 * n)
                start, before = time.perf_counter(), _busy_seconds(pool)
                time.sleep(seconds)
                spent, after = time.perf_counter() - start, _busy_seconds(pool)
            figures[f"busy.sims{count}"] = (after - before) / spent / 2


def _busy_seconds(pool: object) -> float:
    return sum(worker["busy_seconds"] for worker in pool.status().workers)


def compiled_for_ase(folder: Path) -> Path:
    """The shipped model as nequip compiles it for its ASE calculator."""
    made = folder / "peer.nequip.pt2"
    tool = Path(sys.executable).parent / "nequip-compile"
    command = [tool, MODEL, made, "--mode", "aotinductor", "--device", "cpu", "--target", "ase"]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return made


@contextlib.contextmanager
def pairs(folder: Path, model: Path, count: int) -> Iterator[list[Path]]:
    """Pairs of i-PI and its own Python driver; yields i-PI's outputs. A packaged model runs eagerly."""
    from nnqmd_server.inputs.run import find_ipi

    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes, outputs = [], []
    try:
        for k in range(count):
            source = large_input(folder / f"pair-{k}", 8, 1, seed=100 + k)
            home, name = source.parent, f"nnqmd-bench-{os.getpid()}-{k}"
            door = f"<ffsocket name='allegro' mode='unix'><address>{name}</address></ffsocket>"
            source.write_text(re.sub(r"<ffdirect.*?</ffdirect>", door, source.read_text(), flags=re.DOTALL))
            load = "_from_saved_model" if model.suffix == ".zip" else "from_compiled_model"
            peer = PEER.replace("LOAD", load).replace("MODEL", str(model))
            peer = peer.replace("TEMPLATE", str(home / "init.xyz"))
            (home / "peer.py").write_text(peer)
            outputs.append(home / "nh3.out")
            ipi = [find_ipi(), "input.xml"]
            driver = [
                Path(find_ipi()).parent / "i-pi-driver-py",
                "-u",
                "-a",
                name,
                "-m",
                "custom",
                "-P",
                "peer.py",
            ]
            for command, log in ((ipi, "i-pi.log"), (driver, "driver.log")):
                with (home / log).open("w") as output:
                    processes.append(
                        subprocess.Popen(
                            command, cwd=home, env=settings, stdout=output, stderr=subprocess.STDOUT
                        )
                    )
                until(lambda name=name: Path(f"/tmp/ipi_{name}").exists())
        yield outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for k in range(count):
            Path(f"/tmp/ipi_nnqmd-bench-{os.getpid()}-{k}").unlink(missing_ok=True)


def _steps(out: Path) -> int:
    """Steps that i-PI has done, as its output says: there is a line every 10 steps."""
    rows = [line for line in out.read_text().splitlines() if line and not line.startswith("#")]
    return int(float(rows[-1].split()[0])) if rows else 0


def _pace(outputs: list[Path], seconds: float) -> float:
    """Steps per second of all simulations together, over whole lines of their output."""
    until(lambda: all(out.exists() and _steps(out) >= 10 for out in outputs), 120)
    found: list[float] = []
    watching = [threading.Thread(target=_pace_of, args=(out, seconds, found)) for out in outputs]
    for thread in watching:
        thread.start()
    for thread in watching:
        thread.join()
    return sum(found)


def _pace_of(out: Path, seconds: float, found: list[float]) -> None:
    """From one line of the output to another, at least so many seconds later."""

    def next_line(after: int) -> tuple[int, float]:
        until(lambda: _steps(out) > after)
        return _steps(out), time.perf_counter()

    first, start = next_line(_steps(out))
    time.sleep(seconds)
    last, end = next_line(_steps(out))
    found.append((last - first) / (end - start))


def throughput(figures: dict[str, float], rounds: int) -> None:
    """Allegro: four simulations on one pool against four pairs."""
    from nnqmd_server.pool.launch import LocalPool

    paces: dict[str, list[float]] = {"pool": [], "pairs": [], "pairs_compiled": []}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        peers = {"pairs": MODEL, "pairs_compiled": compiled_for_ase(home)}
        for k in range(rounds):
            folder = home / f"round-{k}"
            folder.mkdir()
            with LocalPool({"ammonia": str(MODEL)}, folder / "logs", device="cpu") as pool:
                pool.wait_ready()
                with simulations(folder, pool.address, 4, beads=8, cells=1) as outputs:
                    paces["pool"].append(_pace(outputs, 20.0))
            for kind, model in peers.items():
                (folder / kind).mkdir()
                with pairs(folder / kind, model, 4) as outputs:
                    paces[kind].append(_pace(outputs, 20.0))
            said = ", ".join(f"{kind} {each[-1]:.2f}" for kind, each in paces.items())
            print(f"round {k + 1}: {said} steps/s", flush=True)
    for kind, each in paces.items():
        figures[f"throughput.{kind}_steps_per_s"] = statistics.median(each)
    for kind, key in (("pairs", "sims4"), ("pairs_compiled", "sims4_compiled_pairs")):
        ratios = [a / b for a, b in zip(paces["pool"], paces[kind], strict=True)]
        figures[f"throughput_ratio.{key}"] = statistics.median(ratios)
