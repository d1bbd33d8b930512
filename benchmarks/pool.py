"""What the pool costs, how it fills its workers, what it survives: python benchmarks/pool.py [--json FILE]

The workers of the first three parts are real worker processes whose potential sleeps a fixed time for each
structure (benchmarks/sleeping.py), so that eight of them fit on two cores.

overhead     one force set of 32 x 256 atoms after the other, by a client in a process of its own: what the
             client waits beyond the compute time of the slowest batch, as its worker measured it.
             Median [ms]; wanted: below 1.0 with 1, 2 and 8 workers. "floor" is the physical limit measured
             beside it: bare ZeroMQ, one message of 300 bytes to one such sleeping process and back over two
             hops, with nothing looked at or decided.
efficiency   32 structures on 8 equal workers, and on one of speed 1 and one of speed 2: the speed-up as a
             share of the ideal; wanted: 0.95 and 0.90.
busy         real i-PI simulations of 32 x 256 atoms on 2 workers: the share of the time in which the workers
             compute, with 1 simulation (i-PI's own time shows) and with 4; wanted with 4: 0.95.
throughput   4 simulations of 8 x 64 atoms with the shipped Allegro model on one pool with one worker per
             core, against 4 pairs of i-PI and i-pi-driver-py with the same model in nequip's own ASE
             calculator, eager as it loads a package; steps per second of all together, in alternating
             rounds; wanted: 1.5 times. "compiled" is against pairs whose user has compiled the model too.
soak         requests from 4 clients at 4 workers, one of which is killed (SIGKILL) every 500 requests: how
             many got no answer, how many a wrong one, and by how much the pool's process grew; wanted: 0, 0,
             flat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
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

HERE = Path(__file__).parent
ROOT = HERE.parent
SLEEPER = f"{HERE / 'sleeping.py'}:sleeper"
MODEL = ROOT / "examples/ammonia/models/small/ammonia-small.nequip.zip"
INPUT = ROOT / "ipi_inputs/ammonia-solid-trpmd/input.xml"
PARTS = ("overhead", "efficiency", "busy", "throughput", "soak")
KILL_EVERY = 500


def beads(count: int, atoms: int, seed: int = 0) -> object:
    """A force set of random gas in a cubic cell."""
    from nnqmd_server.structures import replicas

    rng = np.random.default_rng(seed)
    edge = (atoms / 0.09) ** (1 / 3)
    numbers = np.resize([7, 1, 1, 1], atoms)
    return replicas(
        numbers, rng.uniform(0, edge, (count, atoms, 3)), np.tile(np.eye(3) * edge, (count, 1, 1))
    )


class Workers:
    """Worker processes with the sleeping potential, started by this process."""

    def __init__(self, back: str, logs: Path) -> None:
        self.back, self.logs = back, logs
        self.processes: list[subprocess.Popen] = []

    def start(self, milliseconds: float) -> subprocess.Popen:
        """One more."""
        from nnqmd_server.pool.processes import worker_command, worker_settings

        index = len(self.processes)
        command = [*worker_command(), "--pool", self.back, "--model", f"sleeper={SLEEPER}"]
        settings = {**os.environ, **worker_settings(), "SLEEP_MS": str(milliseconds)}
        with (self.logs / f"worker-{index}.log").open("w") as output:
            process = subprocess.Popen(
                [*command, "--index", str(index)], env=settings, stdout=output, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Wait for those that the pool has told to stop; kill the others."""
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(condition: object, seconds: float = 60.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("the benchmark waited too long: a worker or a client has failed")
        time.sleep(0.01)


@contextlib.contextmanager
def sleeping_pool(sleeps: list[float], observe: object = None) -> Iterator[tuple[object, str]]:
    """A pool in this process with one worker for each time [ms per structure]."""
    from nnqmd_server.pool.scheduler import Pool

    with tempfile.TemporaryDirectory() as name:
        doors, back = f"ipc://{name}/doors", f"ipc://{name}/workers"
        pool = Pool(doors, back, observe=observe)
        pool.start()
        workers = Workers(back, Path(name))
        try:
            for milliseconds in sleeps:
                workers.start(milliseconds)
            until(lambda: len(pool.status().workers) == len(sleeps))
            yield pool, doors
        finally:
            pool.stop()
            workers.end()


def _ask(address: str, count: int, atoms: int, times: int, queue: object) -> None:
    from nnqmd_server.pool.client import PoolClient

    client, structures = PoolClient(address, patience=60.0), beads(count, atoms)
    client.card()
    waited = []
    for _ in range(times):
        start = time.perf_counter()
        client.submit(structures)
        waited.append(time.perf_counter() - start)
    client.close()
    queue.put(waited)


def ask(address: str, count: int, atoms: int, times: int) -> list[float]:
    """Seconds for each of so many force sets, as a client in another process sees them."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_ask, args=(address, count, atoms, times, queue))
    process.start()
    waited = queue.get(timeout=300)
    process.join()
    return waited


def _echo(doors: str, back: str) -> None:
    """Two ROUTERs that pass on whatever comes."""
    import zmq

    context = zmq.Context()
    front, behind = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    front.bind(doors)
    behind.bind(back)
    worker, _ = behind.recv_multipart()
    while True:
        client, body = front.recv_multipart()
        behind.send_multipart([worker, body])
        front.send_multipart([client, behind.recv_multipart()[1]])


def _doze(back: str, seconds: float) -> None:
    """Answers, after a sleep, how long that was."""
    import zmq

    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(back)
    socket.send(b"here")
    while True:
        socket.recv()
        start = time.perf_counter()
        time.sleep(seconds)
        socket.send(f"{time.perf_counter() - start:.9f}".encode().ljust(300))


def floor(seconds: float, times: int = 220) -> float:
    """The median of what two bare hops there and back cost beyond the sleep [ms]."""
    import zmq

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        doors, back = f"ipc://{name}/d", f"ipc://{name}/w"
        helpers = [
            context.Process(target=_echo, args=(doors, back), daemon=True),
            context.Process(target=_doze, args=(back, seconds), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        zmq_context = zmq.Context()
        socket = zmq_context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(doors)
        extra = []
        for _ in range(times):
            start = time.perf_counter()
            socket.send(b"x" * 300)
            if not socket.poll(60_000):
                raise SystemExit("the bare echo did not answer")
            extra.append(time.perf_counter() - start - float(socket.recv()))
        zmq_context.destroy(linger=0)
        for helper in helpers:
            helper.kill()
    return 1e3 * statistics.median(extra[20:])


def overhead(figures: dict[str, float]) -> None:
    """What a client waits beyond the slowest batch."""
    figures["overhead_ms.floor"] = floor(0.5e-3 * 32)
    for workers, milliseconds in ((1, 0.5), (2, 1.0), (8, 4.0)):
        slowest: list[float] = []

        def observe(event: str, fields: dict, slowest: list[float] = slowest) -> None:
            if event == "asked":
                slowest.append(0.0)
            elif event == "done":
                slowest[-1] = max(slowest[-1], fields["seconds"])

        with sleeping_pool([milliseconds] * workers, observe) as (_, address):
            waited = ask(address, 32, 256, 220)
        extra = [1e3 * (w - s) for w, s in zip(waited, slowest, strict=True)][20:]
        figures[f"overhead_ms.w{workers}"] = statistics.median(extra)
        figures[f"overhead_ms.w{workers}.p90"] = sorted(extra)[int(0.9 * len(extra))]


def efficiency(figures: dict[str, float]) -> None:
    """Speed-up as a share of the ideal."""
    step = 10.0
    with sleeping_pool([step]) as (_, address):
        alone = statistics.median(ask(address, 32, 256, 8)[2:])
    with sleeping_pool([step] * 8) as (_, address):
        eight = statistics.median(ask(address, 32, 256, 60)[10:])
    figures["efficiency.equal8"] = alone / 8 / eight
    with sleeping_pool([step, step / 2]) as (_, address):
        unequal = statistics.median(ask(address, 32, 256, 40)[15:])
    figures["efficiency.unequal"] = alone / 3 / unequal


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


def _serve(doors: str, back: str, stop: object) -> None:
    from nnqmd_server.pool.scheduler import Pool

    pool = Pool(doors, back)
    pool.start()
    stop.wait()
    print(f"the pool: {pool.status().lost_workers} workers lost, {pool.status().retries} batches given again")
    pool.stop()


def _hammer(address: str, seed: int, count: int, end: float, asked: object, bad: object) -> None:
    """A client that checks every answer, for so many requests and until a time."""
    sys.path.insert(0, str(HERE))
    from sleeping import expected

    from nnqmd_server.errors import PoolError
    from nnqmd_server.pool.client import PoolClient

    client = PoolClient(address, patience=60.0)
    client.card()
    rng = np.random.default_rng(seed)
    sizes = [(4, 16), (8, 16), (2, 64), (16, 8)]
    sets = [beads(n, atoms, seed) for n, atoms in sizes]
    while asked[seed] < count or time.time() < end:
        structures = sets[rng.integers(len(sets))]
        structures.positions[:] += rng.normal(scale=0.01)
        try:
            results = client.submit(structures)
        except PoolError as error:
            print(f"lost: {error}")
            bad[0] += 1
        else:
            right = expected(structures)
            same = np.array_equal(results.forces, right.forces) and np.array_equal(
                results.energy, right.energy
            )
            bad[1] += not same
        asked[seed] += 1
    client.close()


def _memory(pid: int) -> float:
    """Resident memory of a process [MB]."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def soak(figures: dict[str, float], requests: int, minutes: float) -> None:
    """Many requests while workers are killed."""
    context = multiprocessing.get_context("spawn")
    clients = 4
    each = requests // clients
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        doors, back = f"ipc://{name}/doors", f"ipc://{name}/workers"
        stop = context.Event()
        pool = context.Process(target=_serve, args=(doors, back, stop))
        pool.start()
        workers = Workers(back, Path(name))
        present = [workers.start(0.0) for _ in range(4)]
        asked = context.Array("q", clients)
        bad = [context.Array("q", 2) for _ in range(clients)]
        end = time.time() + 60 * minutes
        askers = [
            context.Process(target=_hammer, args=(doors, k, each, end, asked, bad[k])) for k in range(clients)
        ]
        for one in askers:
            one.start()
        started, kills, resident = time.monotonic(), 0, []
        while any(one.is_alive() for one in askers):
            time.sleep(0.01)
            if sum(asked) >= (kills + 1) * KILL_EVERY:
                kills += 1
                place = rng.randrange(len(present))
                present[place].kill()
                present[place].wait()
                present[place] = workers.start(0.0)
                resident.append((sum(asked), _memory(pool.pid)))
            if time.monotonic() - started > 3600:
                raise SystemExit("the soak does not end")
        spent = time.monotonic() - started
        stop.set()
        pool.join(20)
        workers.end()
    settled = next(m for n, m in resident if n >= 0.1 * sum(asked))
    figures["soak.requests"] = sum(asked)
    figures["soak.kills"] = kills
    figures["soak.seconds"] = spent
    # A client that ended early, by a crash, has not asked what it should have.
    short = sum(max(0, each - count) for count in asked)
    figures["soak.lost"] = short + sum(counts[0] for counts in bad)
    figures["soak.wrong"] = sum(counts[1] for counts in bad)
    figures["soak.rss_mb"] = resident[-1][1]
    figures["soak.rss_growth_mb"] = resident[-1][1] - settled


def main() -> None:
    """Measure, print a table, and write the figures where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures as a flat JSON object")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput")
    parser.add_argument("--requests", type=int, default=100_000, help="of the soak")
    parser.add_argument("--minutes", type=float, default=0.0, help="the soak goes on for so long at least")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    parts = {
        "overhead": lambda: overhead(figures),
        "efficiency": lambda: efficiency(figures),
        "busy": lambda: busy(figures),
        "throughput": lambda: throughput(figures, options.rounds),
        "soak": lambda: soak(figures, options.requests, options.minutes),
    }
    for name in options.only:
        before = set(figures)
        parts[name]()
        for key in figures:
            if key not in before:
                print(f"{key:<32}{figures[key]:>12.4g}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
