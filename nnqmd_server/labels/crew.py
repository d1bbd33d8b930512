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

from nnqmd_server.errors import NnqmdError, ProgramError
from nnqmd_server.labels.codes import Code
from nnqmd_server.labels.store import Store

START = 600.0
"""Longest time for a worker process to import its code [s]."""


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
    ready: bool = False
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

    Raises
    ------
    ProgramError
        A worker process cannot begin.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and open files
    todo = list(reversed(jobs))
    crew: list[_Worker] = []
    try:
        crew += [_start(context, number, code, store, keep) for number in range(min(workers, len(jobs)))]
        while todo or any(worker.job for worker in crew):
            waited = [worker.pipe for worker in crew if worker.job or not worker.ready]
            answered = wait(waited, timeout=1.0)
            for number, worker in enumerate(crew):
                if worker.pipe in answered and not worker.ready:
                    _receive_ready(worker)
                    _give(worker, todo)
                    continue
                if not worker.ready and time.monotonic() - worker.since > START:
                    raise ProgramError(
                        f"A worker process did not start within {START:g} s.", f"Look at {worker.log}."
                    )
                if worker.job is None:
                    continue
                done = None
                if worker.pipe in answered:
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
                if worker.process.is_alive():
                    _give(worker, todo)
                else:
                    _end(worker)
                    if todo:
                        crew[number] = _start(context, number, code, store, keep)
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
    return _Worker(process, here, log, since=time.monotonic())


def _receive_ready(worker: _Worker) -> None:
    """A worker that cannot even begin would fail for every frame: nothing is marked as failed."""
    try:
        worker.pipe.recv_bytes()
    except (EOFError, OSError) as error:
        worker.process.join(10)
        raise ProgramError(
            f"A worker process did not start: {_last_line(worker.log) or 'it says nothing'}.",
            f"Look at {worker.log}.",
        ) from error
    worker.ready = True


def _give(worker: _Worker, todo: list[Job]) -> None:
    if todo:
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
    labeller = code.prepare()
    pipe.send_bytes(b"ready")  # the time for a frame begins when everything is imported
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
