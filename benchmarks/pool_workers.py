"""Workers that sleep, and clients that ask, for benchmarks/pool.py: what the pool costs by itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SLEEPER = f"{HERE / 'sleeping.py'}:sleeper"


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


def _relay(doors: str, back: str) -> None:
    """Passes on whatever comes, from one side to the other."""
    import select

    listeners = [_listener(doors), _listener(back)]
    ends = [listener.accept()[0] for listener in listeners]
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    other = {ends[0].fileno(): ends, ends[1].fileno(): ends[::-1]}
    while True:
        for fd, _ in poll.poll():
            here, there = other[fd]
            there.sendall(here.recv(4096))


def _listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener


def _connected(path: str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    until(lambda: link.connect_ex(path) == 0)
    return link


def _doze(back: str, seconds: float) -> None:
    """Answers, after a sleep, how long that was."""
    link = _connected(back)
    while link.recv(4096):
        start = time.perf_counter()
        time.sleep(seconds)
        link.sendall(f"{time.perf_counter() - start:.9f}".encode().ljust(300))


def floor(seconds: float, times: int = 220) -> float:
    """The median of what two bare hops there and back cost beyond the sleep [ms]."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        doors, back = f"{name}/d", f"{name}/w"
        helpers = [
            context.Process(target=_relay, args=(doors, back), daemon=True),
            context.Process(target=_doze, args=(back, seconds), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        extra = []
        with _connected(doors) as link:
            link.settimeout(60)
            for _ in range(times):
                start = time.perf_counter()
                link.sendall(b"x" * 300)
                slept = float(link.recv(4096))
                extra.append(time.perf_counter() - start - slept)
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
