"""What a machine makes of a model: its time in one process, batch by batch, and with several workers."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnqmd_server import errors
from nnqmd_server.errors import ModelError, PoolError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.launch import join_address
from nnqmd_server.pool.processes import Plan, Processes, Recipe, gpu_of, worker_command, worker_settings
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.potentials.load import absolute, interpreter_of
from nnqmd_server.potentials.timing import MARK, BatchTime, Rings

LOADING = 1500.0
"""Longest wait for a model; the first time it is compiled [s]."""

SAME = 1.03
"""More workers are better only if the step is shorter by this factor."""


@dataclass(frozen=True)
class Loaded:
    """What a process says once it holds the model; ``seconds`` to load it, resident ``memory_mb`` then."""

    name: str
    form: str
    cutoff: float
    dtype: str
    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class WorkerTime:
    """How long a whole force set takes with a number of workers; ``milliseconds`` of each set."""

    workers: int
    milliseconds: list[float]

    @property
    def per_set(self) -> float:
        """Median milliseconds of a force set."""
        return float(np.median(self.milliseconds))


def worker_counts(cores: int) -> list[int]:
    """How many workers are tried: every number up to four cores, then 8, 16 ... and all of them."""
    return sorted({*range(1, min(cores, 4) + 1), *(1 << k for k in range(cores.bit_length())), cores})


def best(times: Sequence[WorkerTime]) -> WorkerTime:
    """The fewest workers that are, within 3 %, as fast as any number of them."""
    fastest = min(one.per_set for one in times)
    return next(one for one in times if one.per_set <= SAME * fastest)


def time_in_process(
    source: str, device: str, eager: bool, rings: Rings, seconds: float, log: Path
) -> Iterator[Loaded | BatchTime]:
    """Load a potential in a process like a worker's and time batches of 1, 2, 4 ... beads there.

    Parameters
    ----------
    source : str
        The potential, see :func:`nnqmd_server.potentials.load.interpreter_of`.
    device : str
        "cpu" or "cuda".
    eager : bool
        Do not compile it.
    rings : Rings
        What is evaluated.
    seconds : float
        How long, about, once it is loaded.
    log : Path
        File for what the process writes.

    Yields
    ------
    Loaded, then BatchTime
        As they come.

    Raises
    ------
    NnqmdError
        What stopped it: the model, its elements, its memory.
    """
    request = {
        "source": absolute(source),
        "device": device,
        "compiled": not eager,
        "seconds": seconds,
        "rings": asdict(rings),
    }
    settings = os.environ | worker_settings()
    if device == "cuda":
        settings["CUDA_VISIBLE_DEVICES"] = gpu_of(0)
    command = worker_command(interpreter_of(source)[1], "nnqmd_server.potentials.timing")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=settings, text=True
        )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.close()
        yield from _follow(lines, process, log, seconds)
    except BrokenPipeError:
        raise _ended(process, log) from None
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
        process.stdout.close()


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        if line.startswith(MARK):
            lines.put(line.removeprefix(MARK))
    lines.put(None)


def _follow(
    lines: queue.Queue[str | None], process: subprocess.Popen, log: Path, seconds: float
) -> Iterator[Loaded | BatchTime]:
    patience = LOADING
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            raise ModelError(f"The model has not answered for {patience:.0f} s.", f"See {log}.") from None
        if line is None:
            raise _ended(process, log)
        said: dict[str, Any] = json.loads(line)
        kind = said.pop("kind")
        if kind == "end":
            return
        if kind == "error":
            known = getattr(errors, said["type"], ModelError)
            raise known(said["what"], said["fix"] or f"See {log}.")
        if kind == "loaded":
            yield Loaded(**said)
            patience = 300.0 + 10 * seconds  # one bead of a very large structure
        else:
            yield BatchTime(**said)


def _ended(process: subprocess.Popen, log: Path) -> ModelError:
    process.wait(10)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    status = process.returncode
    if status == -9:
        return ModelError(
            "The process that held the model was killed: most likely there was no memory left.",
            "Try a smaller structure or fewer beads.",
        )
    return ModelError(
        f"The process that held the model ended (status {status}): {' '.join(last)[:300]}", f"See {log}."
    )


def time_workers(
    source: str,
    device: str,
    eager: bool,
    rings: Rings,
    counts: Sequence[int],
    seconds: float,
    logs: Path,
    tell: Callable[[str], None],
) -> Iterator[WorkerTime]:
    """Serve whole force sets with more and more worker processes; those of a number stay for the next.

    Parameters
    ----------
    source, device, eager, rings
        See :func:`time_in_process`.
    counts : sequence of int
        Numbers of workers, growing.
    seconds : float
        For each number, about, once they are ready.
    logs : Path
        Folder for the workers' logs.
    tell : callable
        Given a line that says what is being waited for.

    Yields
    ------
    WorkerTime
        For each number; none after the first one that has no memory.

    Raises
    ------
    PoolError
        A worker has ended, or is not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="nnqmd-") as name:
        doors = f"ipc://{name}/pool"
        pool = Pool(doors, join_address(doors), expected=["potential"])
        recipe = Recipe({"potential": source}, join_address(doors), logs, eager)
        present: list[Processes] = []
        client = None
        pool.start()
        try:
            client = PoolClient(doors, potential="potential", name="nnqmd bench")
            ready = 0
            for count in counts:
                present.append(Processes(recipe, Plan(count - ready, device), first=ready))
                ready = count
                _wait_ready(pool, present, count, logs, tell)
                tell(f"{count} worker{'s' * (count > 1)}")
                yield WorkerTime(count, _time_sets(client, rings, seconds))
        finally:
            if client is not None:
                client.close()
            pool.stop()
            for processes in present:
                processes.stop()


def _wait_ready(
    pool: Pool, present: Sequence[Processes], count: int, logs: Path, tell: Callable[[str], None]
) -> None:
    deadline = time.monotonic() + LOADING
    while (ready := len(pool.status().workers)) < count:
        if any(processes.ended for processes in present):
            words = " ".join(processes.last_words() for processes in present if processes.ended)
            raise PoolError(f"A worker ended while it was loading the model. {words}", f"See {logs}.")
        if time.monotonic() > deadline:
            raise PoolError(f"The workers were not ready after {LOADING:.0f} s.", f"See {logs}.")
        tell(f"{ready} of {count} workers ready")
        time.sleep(0.05)


def _time_sets(client: PoolClient, rings: Rings, seconds: float) -> list[float]:
    """Milliseconds of every force set, without the first two where there are more of them.

    The first ones map memory and teach the pool how fast its workers are.
    """
    polymers = rings.draw()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        structures = polymers.at(rings.timestep * len(times))
        asked = time.perf_counter()
        client.submit(structures)
        times.append(1e3 * (time.perf_counter() - asked))
    return times[min(2, len(times) - 1) :]
