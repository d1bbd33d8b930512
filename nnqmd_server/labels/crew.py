"""Worker processes that label frames, one at a time each.

A frame that brings its process down (a Fortran STOP, a segmentation fault, too much memory) is one failed
frame and a new process. Each worker leads a process group of its own, so that nothing that it started
outlives it when it is ended.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ase import Atoms
from ase.calculators.calculator import CalculatorError

from nnqmd_server.errors import NnqmdError
from nnqmd_server.labels.codes import Code
from nnqmd_server.labels.store import Store


@dataclass(frozen=True)
class Job:
    """A structure, and the key under which its labels are kept."""

    key: str
    atoms: Atoms


@dataclass(frozen=True)
class Done:
    """A frame that is through: ``reason`` is "" or says why it failed."""

    key: str
    reason: str
    seconds: float


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    log: Path
    job: Job | None = None
    since: float = 0.0


def label_all(
    jobs: Sequence[Job], code: Code, store: Store, workers: int, limit: float, keep: bool = False
) -> Iterator[Done]:
    """Label frames; each is in the store when it is reported here.

    Parameters
    ----------
    jobs : sequence of Job
        Frames that are not in the store.
    code : Code
        What labels them.
    store : Store
        Where labels and failures are kept.
    workers : int
        Processes.
    limit : float
        Longest time for one frame [s]; then its worker is ended.
    keep : bool
        Keep the working folder of frames that succeeded, too.

    Yields
    ------
    Done
        As frames are finished, in any order.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and open files
    todo = list(reversed(jobs))
    crew: list[_Worker] = []
    try:
        crew += [_start(context, number, code, store, keep) for number in range(min(workers, len(jobs)))]
        for worker in crew:
            _give(worker, todo)
        while any(worker.job for worker in crew):
            ready = wait([worker.pipe for worker in crew if worker.job], timeout=1.0)
            for number, worker in enumerate(crew):
                if worker.job is None:
                    continue
                done = None
                if worker.pipe in ready:
                    done = _answer(worker)
                elif time.monotonic() - worker.since > limit:
                    done = f"it took longer than {limit:g} s"
                    _end(worker)
                if done is None:
                    continue
                key, seconds = worker.job.key, time.monotonic() - worker.since
                worker.job = None
                if done:
                    store.fail(key, done)
                    _set_aside(store, key)
                if not worker.process.is_alive():
                    _end(worker)
                    if todo:
                        crew[number] = worker = _start(context, number, code, store, keep)
                _give(worker, todo)
                yield Done(key, done, seconds)
    finally:
        for worker in crew:
            _end(worker)


def _start(
    context: multiprocessing.context.BaseContext, number: int, code: Code, store: Store, keep: bool
) -> _Worker:
    here, there = context.Pipe()
    log = store.folder / f"worker-{number}.log"
    process = context.Process(target=_work, args=(there, code, store, log, keep), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here, log)


def _give(worker: _Worker, todo: list[Job]) -> None:
    if todo and worker.process.is_alive():
        worker.job, worker.since = todo.pop(), time.monotonic()
        with contextlib.suppress(OSError):  # one that has just died is noticed at its pipe
            worker.pipe.send(worker.job)


def _answer(worker: _Worker) -> str | None:
    """Why the frame failed, or an empty string."""
    try:
        return str(json.loads(worker.pipe.recv_bytes())["reason"])
    except (EOFError, OSError):
        worker.process.join(10)
        status = worker.process.exitcode
        said = _last_line(worker.log)
        how = (
            f"signal {signal.Signals(-status).name}"
            if status is not None and status < 0
            else f"status {status}"
        )
        return f"its process ended with {how}" + (f": {said}" if said else "")


def _end(worker: _Worker) -> None:
    if worker.process.is_alive() and worker.job is None:
        worker.pipe.close()  # it leaves when nothing more can come
        worker.process.join(5)
    if worker.process.pid is not None:
        # the worker made itself leader of a group; before it did, there is nothing but itself
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(10)
    worker.pipe.close()


def _set_aside(store: Store, key: str) -> None:
    source, target = store.running(key), store.failed_folder(key)
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        with contextlib.suppress(OSError):
            source.replace(target)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def _work(pipe: Connection, code: Code, store: Store, log: Path, keep: bool) -> None:
    """What a worker process does until its pipe is closed."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("wb", buffering=0) as stream:  # whatever libraries print, Fortran's included
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    labeller = None
    while True:
        try:
            job: Job = pipe.recv()
        except (EOFError, OSError):
            return
        reason = ""
        folder = store.running(job.key)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            labeller = labeller or code.prepare()
            frame = labeller(job.atoms, folder)
            made_by = {"label_code": code.name, "label_key": job.key}
            frame.info = {**job.atoms.info, **frame.info, **made_by}
            store.put(job.key, frame)
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        except (NnqmdError, CalculatorError) as error:
            reason = error.what if isinstance(error, NnqmdError) else f"{type(error).__name__}: {error}"
        except (RuntimeError, ValueError, ArithmeticError, OSError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {error}"
        pipe.send_bytes(json.dumps({"reason": reason}).encode())
