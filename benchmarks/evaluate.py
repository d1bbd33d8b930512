"""What forces cost beside the bare model, and beside its peers: python benchmarks/evaluate.py [--json FILE]

The structures are force sets of real i-PI runs (thermostatted ring-polymer dynamics of solid ammonia, the
shipped model) that this program records first. Rounds alternate between the sides; figures are medians over
the rounds, with the range over them. It fails when the forces of two sides differ.

served   8 beads of 64 and of 256 atoms on W workers. bare: W processes with a worker's environment that call
         the AOTInductor model, bead by bead, on tensors that were made before; served: a client in a process
         of its own asks the pool for the same force sets. served_over_bare.N is the ratio of the times per
         force set; wanted: at most 1.05. list_share.N is the share of list building and
         preparation in a worker's evaluation (its potential, in the bare processes); wanted: below 0.02.
         beyond_model_share.N is that of all but the model: also copies, dipoles, results.
driver   i-PI's own time per step with `nnqmd run`'s pool and direct door, against W clients of i-PI's own
         ASE driver (i-pi-driver-py, ipi/pes/_ase.py) with NequIPCalculator, eager, on the same cores.
         speedup_vs_ase_driver.N; wanted: at least 1.8.
lists    32 beads of 64 atoms: one neighbour list per bead and step against the lists that are kept.
         ring_list_speedup.p32; wanted: at least 10.
gpu      Only where there is a GPU. gpu.batch_speedup.N: 32 beads of 64, 256 and 1024 atoms (.1000) in one
         call against one by one; wanted at 64: at least 5. gpu.host_share.N: what is not the model in the
         batched call; wanted: at most 0.1. gpu.speedup_vs_ase_clients.N: as `driver`, against 8 clients on
         the same GPU. gpu.busy.256: share of the time in which the GPU computes (nvidia-smi) while two
         simulations of 32 beads run; wanted: at least 0.9.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
INPUT = ROOT / "ipi_inputs/ammonia-solid-trpmd/input.xml"
PARTS = ("served", "driver", "lists", "gpu")
BEADS = 8
RING = 32
CELLS = {64: (1, 1, 1), 256: (1, 1, 4), 1024: (2, 2, 4)}  # of the shipped 64-atom cell
SAME = 2e-5
"""Forces of two sides may differ by this much [eV/Angstrom]: sums of float32 in another order."""

CHUNK = 5
"""Force sets after which the sides take turns: a shared machine drifts within seconds."""
TURNS = ("bare", "evaluated", "served")

Figures = dict[str, float]


def write_input(folder: Path, atoms: int, beads: int, steps: int, field: str = "") -> Path:
    """The shipped input with other beads and atoms; i-PI says how long every step took."""
    folder.mkdir(parents=True)
    edges, times = np.array([10.26, 10.26, 5.13]), CELLS[atoms]
    rows = [line.split() for line in (INPUT.parent / "init.xyz").read_text().splitlines()[2:]]
    size = edges * times
    lines = [f"# CELL(abcABC): {size[0]} {size[1]} {size[2]} 90 90 90 positions{{angstrom}} cell{{angstrom}}"]
    for shift in np.ndindex(*times):
        for row in rows:
            place = np.array(row[1:4], dtype=float) + edges * shift
            lines.append(f"{row[0]} {place[0]:.6f} {place[1]:.6f} {place[2]:.6f}")
    (folder / "init.xyz").write_text("\n".join([str(len(lines) - 1), *lines]) + "\n")
    (folder / "nnqmd_pes.py").write_text((INPUT.parent / "nnqmd_pes.py").read_text())
    text = INPUT.read_text().replace("verbosity='medium'", "verbosity='high'")
    text = re.sub(r"<batch_size>\d+", f"<batch_size>{beads}", text)
    text = re.sub(r"nbeads='\d+'", f"nbeads='{beads}'", text)
    text = re.sub(r"<total_steps>\d+", f"<total_steps>{steps}", text)
    text = re.sub(r"<(trajectory|checkpoint).*?(</trajectory>|/>)", "", text, flags=re.DOTALL)
    forces = "<trajectory filename='f' stride='100000' format='xyz'> forces </trajectory>"  # of step 0
    text = text.replace("</output>", f"{forces}</output>")
    if field:
        text = re.sub(r"<ffdirect.*?</ffdirect>", field, text, flags=re.DOTALL)
    (folder / "input.xml").write_text(text)
    return folder / "input.xml"


def step_times(log: Path, first: int) -> list[float]:
    """i-PI's own milliseconds of every step from ``first`` on."""
    found = re.findall(r"at MD step +(\d+)\. t/step: +(\S+)", log.read_text(errors="replace"))
    return [1e3 * float(seconds) for step, seconds in found if int(step) >= first]


def initial_forces(folder: Path) -> np.ndarray:
    """Forces that i-PI was given for the initial structure [eV/Angstrom], of all beads."""
    from nnqmd_server.units import BOHR, HARTREE

    files = sorted(folder.glob("nh3.f_*.xyz"))
    rows = [line.split()[1:4] for file in files for line in file.read_text().splitlines()[2:]]
    if not rows:
        sys.exit(f"i-PI wrote no forces in {folder}")
    return np.array(rows, dtype=float) * HARTREE / BOHR


def must_agree(what: str, one: np.ndarray, other: np.ndarray, tolerance: float = SAME) -> float:
    """Largest difference of forces [eV/Angstrom]; the program ends when it is too large."""
    if one.shape != other.shape or not (worst := float(np.abs(one - other).max())) <= tolerance:
        sys.exit(f"{what}: the forces of the two sides differ ({one.shape} and {other.shape})")
    return worst


# ---------------------------------------------------------------------------------------------- recording


def record(folder: Path, pool: object, atoms: int, beads: int, skip: int, keep: int) -> list:
    """Force sets that a real run asks for, after its rings have opened."""
    from nnqmd_server.inputs.run import Run, make_folder
    from nnqmd_server.structures import Structures

    sets, seen = [], [0]

    def note(kind: str, _: object, what: object) -> None:
        if kind == "asked":
            seen[0] += 1
            if seen[0] > skip:
                arrays = what.numbers, what.positions, what.cells, what.offsets
                sets.append(Structures(*(np.array(x) for x in arrays)))  # the pool's memory is used again

    source = write_input(folder / "in", atoms, beads, skip + keep - 1)
    make_folder(folder / "run", force=False)
    pool.record(note)
    Run(source, folder / "run", pool.address).wait(lambda: None)
    pool.record(None)
    return sets


# ----------------------------------------------------------------------------------------- served and bare


def _tensors(structures: object, card: object) -> list[dict]:
    """What the compiled model takes, made beforehand, for each structure."""
    import torch
    from ase.data import chemical_symbols
    from nequip.data import AtomicDataDict as Key
    from vesin import NeighborList

    types = {symbol: k for k, symbol in enumerate(card.elements)}
    lists = NeighborList(cutoff=card.cutoff, full_list=True)
    found = []
    for k in range(len(structures)):
        one = structures[k : k + 1]
        i, j, shifts = lists.compute(one.positions, one.cells[0], periodic=True, quantities="ijS")
        arrays = {
            Key.POSITIONS_KEY: one.positions,
            Key.EDGE_INDEX_KEY: np.stack([i, j]).astype(np.int64),
            Key.ATOM_TYPE_KEY: np.array([types[chemical_symbols[z]] for z in one.numbers]),
            Key.CELL_KEY: one.cells,
            Key.EDGE_CELL_SHIFT_KEY: shifts.astype(np.float64),
            Key.BATCH_KEY: np.zeros(one.n_atoms, dtype=np.int64),
            Key.NUM_NODES_KEY: np.array([one.n_atoms]),
        }
        found.append({name: torch.from_numpy(np.array(a, order="C")) for name, a in arrays.items()})
    return found


def _compute(barrier: object, orders: object, answers: object, sets: list) -> None:
    """A process with a worker's environment that evaluates its part of every force set when it is told."""
    import torch
    from nequip.model.inference_models import load_compiled_model

    from nnqmd_server.potentials.allegro import load
    from nnqmd_server.potentials.compiled import compiled_model
    from nnqmd_server.potentials.package import read_card

    torch.set_num_threads(1)
    card = read_card(MODEL)
    file, why = compiled_model(MODEL, card, "cpu")
    if file is None:
        answers.put(why)
        return
    model, _ = load_compiled_model(str(file), "cpu")
    potential = load(MODEL, "cpu")
    inputs = [_tensors(one, card) for one in sets]
    for _ in range(3):
        model(inputs[0][0])
        potential.evaluate(sets[0])
    forces = np.concatenate([model(data)["forces"].numpy() for data in inputs[0]])
    answers.put((forces, potential.evaluate(sets[0]).forces))
    while (order := orders.get(timeout=900)) != "end":
        order, part = order
        barrier.wait(timeout=600)
        before, start = dict(potential.spent), time.perf_counter()
        if order == "bare":
            for one in inputs[part]:
                for data in one:
                    model(data)
        else:
            for one in sets[part]:
                potential.evaluate(one)
        spent = time.perf_counter() - start
        stages = {name: potential.spent[name] - before[name] for name in before}
        answers.put((spent, stages))


class Processes:
    """Processes like workers that share every force set among them, without any server."""

    def __init__(self, workers: int, sets: list) -> None:
        from nnqmd_server.pool.cutting import cut
        from nnqmd_server.pool.processes import worker_settings

        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(workers)
        self._queues, self._all = [], []
        settings = worker_settings()
        kept = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # inherited by the processes
        first = 0
        for count in cut(len(sets[0]), [1.0] * workers):
            part = [one[first : first + count] for one in sets]
            first += count
            queues = context.Queue(), context.Queue()
            process = context.Process(target=_compute, args=(self._barrier, *queues, part), daemon=True)
            process.start()
            self._queues.append(queues)
            self._all.append(process)
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        found = [answers.get(timeout=900) for _, answers in self._queues]
        if any(isinstance(one, str) for one in found):
            sys.exit(f"no bare model to compare with: {found[0]}")
        self.forces = np.concatenate([one[0] for one in found])
        own = np.concatenate([one[1] for one in found])
        must_agree("bare model and potential", self.forces, own)

    def measure(self, order: str, part: slice) -> tuple[float, float, dict[str, float]]:
        """Seconds of the slowest process for some of the force sets, of all together, and in their stages."""
        for orders, _ in self._queues:
            orders.put((order, part))
        found = [answers.get(timeout=900) for _, answers in self._queues]
        stages = {name: sum(one[1][name] for one in found) for name in found[0][1]}
        return max(one[0] for one in found), sum(one[0] for one in found), stages

    def end(self) -> None:
        """Let them end."""
        for orders, _ in self._queues:
            orders.put("end")
        for process in self._all:
            process.join(20)
            process.kill()


def _ask(address: str, sets: list, orders: object, answers: object) -> None:
    from nnqmd_server.pool.client import PoolClient

    client = PoolClient(address, patience=300.0)
    answers.put(client.submit(sets[0]).forces)
    while (part := orders.get(timeout=900)) != "end":
        start = time.perf_counter()
        for one in sets[part]:
            client.submit(one)
        answers.put(time.perf_counter() - start)
    client.close()


def served(figures: Figures, folder: Path, workers: int, rounds: int) -> None:
    """Bare calls of the compiled model, a worker's potential, and the pool, in turn."""
    from nnqmd_server.pool.launch import LocalPool

    context = multiprocessing.get_context("spawn")
    for atoms, skip, keep in ((64, 80, 50), (256, 40, 15)):
        with LocalPool(
            {"ammonia": str(MODEL)}, folder / f"logs-{atoms}", workers=workers, device="cpu"
        ) as pool:
            pool.wait_ready()
            sets = record(folder / f"record-{atoms}", pool, atoms, BEADS, skip, keep)
            bare = Processes(workers, sets)
            orders, answers = context.Queue(), context.Queue()
            client = context.Process(target=_ask, args=(pool.address, sets, orders, answers), daemon=True)
            client.start()
            worst = must_agree("bare model and pool", bare.forces, answers.get(timeout=300))
            found: dict[str, list[float]] = {
                "bare": [],
                "evaluated": [],
                "served": [],
                "share": [],
                "lists": [],
            }
            for k in range(rounds):
                spent = dict.fromkeys((*TURNS, "all", "lists", "model"), 0.0)
                for first in range(0, len(sets), CHUNK):
                    part = slice(first, first + CHUNK)
                    spent["bare"] += bare.measure("bare", part)[0]
                    orders.put(part)
                    spent["served"] += answers.get(timeout=900)
                    slowest, every, stages = bare.measure("evaluate", part)
                    spent["evaluated"] += slowest
                    spent["all"] += every
                    spent["lists"] += stages["lists"]
                    spent["model"] += stages["model"]
                for name in TURNS:
                    found[name].append(1e3 * spent[name] / len(sets))
                found["share"].append(1.0 - spent["model"] / spent["all"])
                found["lists"].append(spent["lists"] / spent["all"])
                now = ", ".join(f"{name} {found[name][-1]:.2f}" for name in TURNS)
                print(f"{atoms} atoms, round {k + 1}: {now} ms per force set", flush=True)
            orders.put("end")
            client.join(20)
            bare.end()
        ratios = [a / b for a, b in zip(found["served"], found["bare"], strict=True)]
        spread(figures, f"served_over_bare.{atoms}", ratios)
        ratios = [a / b for a, b in zip(found["evaluated"], found["bare"], strict=True)]
        spread(figures, f"evaluated_over_bare.{atoms}", ratios)
        spread(figures, f"list_share.{atoms}", found["lists"])
        spread(figures, f"beyond_model_share.{atoms}", found["share"])
        for name in ("bare", "served"):
            figures[f"{name}_ms_per_bead.{atoms}"] = statistics.median(found[name]) / BEADS
        figures[f"served_force_difference.{atoms}"] = worst


def spread(figures: Figures, name: str, values: Sequence[float]) -> None:
    """Median and range of the rounds."""
    figures[name] = statistics.median(values)
    figures[f"{name}.min"], figures[f"{name}.max"] = min(values), max(values)


# ------------------------------------------------------------------------------------------ the ASE driver

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


def until(condition: object, process: subprocess.Popen, home: Path, seconds: float = 60.0) -> None:
    """Wait until something is so, while a process lives."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            sys.exit("\n".join(path.read_text()[-2000:] for path in home.glob("*.log")))
        time.sleep(0.01)


def driver(figures: Figures, folder: Path, workers: int, rounds: int) -> None:
    """i-PI with our pool, and with as many clients of its own ASE driver."""
    for atoms, steps in ((64, 40), (256, 16)):
        here = folder / f"{atoms}"
        pairs = in_ipi(figures, here, workers, rounds, atoms, BEADS, steps, clients=workers)
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


# ------------------------------------------------------------------------------------------ neighbour lists


def ring_lists(figures: Figures, folder: Path, workers: int, rounds: int) -> None:
    """The time of the lists of a whole ring, step by step."""
    from nnqmd_server.pool.launch import LocalPool
    from nnqmd_server.potentials.neighbours import Lists, fresh_edges
    from nnqmd_server.potentials.package import read_card

    with LocalPool({"ammonia": str(MODEL)}, folder / "logs", workers=workers, device="cpu") as pool:
        pool.wait_ready()
        sets = record(folder / "record", pool, 64, RING, 40, 40)
    cutoff = read_card(MODEL).cutoff
    found: dict[str, list[float]] = {"each": [], "kept": []}
    for k in range(rounds):
        start = time.perf_counter()
        for one in sets:
            fresh_edges(one, cutoff)
        between = time.perf_counter()
        lists = Lists(cutoff)  # its first list is built within the time
        for one in sets:
            lists.edges(one)
        end = time.perf_counter()
        found["each"].append(1e3 * (between - start) / len(sets))
        found["kept"].append(1e3 * (end - between) / len(sets))
        print(
            f"round {k + 1}: one by one {found['each'][-1]:.3f}, kept {found['kept'][-1]:.3f} ms per step",
            flush=True,
        )
    same_edges(sets, cutoff)
    ratios = [a / b for a, b in zip(found["each"], found["kept"], strict=True)]
    spread(figures, "ring_list_speedup.p32", ratios)
    figures["list_each_ms_per_step.p32"] = statistics.median(found["each"])
    figures["list_kept_ms_per_step.p32"] = statistics.median(found["kept"])


def same_edges(sets: list, cutoff: float) -> None:
    """Both ways find the same edges in every force set; the program ends otherwise."""
    from nnqmd_server.potentials.neighbours import Lists, fresh_edges

    lists = Lists(cutoff)
    for number, one in enumerate(sets):
        for kept, fresh in zip(lists.edges(one), fresh_edges(one, cutoff), strict=True):
            if not np.array_equal(_sorted(*kept), _sorted(*fresh)):
                sys.exit(f"force set {number}: the lists that are kept are not those of the positions")


def _sorted(edges: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    rows = np.concatenate([edges.T, shifts.astype(np.int64)], axis=1)
    return rows[np.lexsort(rows.T[::-1])]


# ------------------------------------------------------------------------------------------------- the GPU


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


# ---------------------------------------------------------------------------------------------------- all

WANTED = {
    "served_over_bare": "at most 1.05",
    "list_share": "below 0.02",
    "speedup_vs_ase_driver": "at least 1.8",
    "ring_list_speedup": "at least 10",
    "gpu.batch_speedup.64": "at least 5",
    "gpu.host_share": "at most 0.1",
    "gpu.busy": "at least 0.9",
}


def table(figures: Figures) -> None:
    """What was measured, with ranges and what was wanted."""
    for name, value in figures.items():
        if name.endswith((".min", ".max")):
            continue
        words = ""
        if f"{name}.min" in figures:
            words = f"   ({figures[f'{name}.min']:.4g} to {figures[f'{name}.max']:.4g})"
            words += "".join(f"; wanted: {text}" for key, text in WANTED.items() if name.startswith(key))
        print(f"{name:<36}{value:>10.4g}{words}")


def main() -> None:
    """Measure, print a table, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="one per core")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from nnqmd_server.pool.processes import count_gpus

    figures: Figures = {}
    parts = {
        "served": lambda folder: served(figures, folder, options.workers, options.rounds),
        "driver": lambda folder: driver(figures, folder, options.workers, options.rounds),
        "lists": lambda folder: ring_lists(figures, folder, options.workers, options.rounds),
        "gpu": lambda folder: gpu(figures, folder, options.rounds),
    }
    without = "gpu" in options.only and not count_gpus()
    for name in options.only:
        if name == "gpu" and without:
            continue
        with tempfile.TemporaryDirectory(prefix="nnqmd-bench-") as place:
            parts[name](Path(place))
    print(f"\nsolid ammonia, {options.workers} workers, medians of {options.rounds} rounds (range)")
    table(figures)
    if without:
        print("gpu.*                               no GPU: not measured")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
