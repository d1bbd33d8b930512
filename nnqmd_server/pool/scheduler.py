"""The pool: takes complete force sets, cuts each over the workers, gives the results back in order.

One thread owns both sockets and all the state below; others only read :meth:`Pool.status`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import zmq

from nnqmd_server.pool.messages import (
    MAX_MESSAGE,
    BadMessageError,
    Message,
    arrays_to_structures,
    pack,
    results_to_arrays,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.pool.shares import MAX_FORCE, TRIES, Fault, Job, Share, cut, judge
from nnqmd_server.structures import Results, join

log = logging.getLogger("nnqmd.pool")

MAX_WAITING = 256
"""Force sets that may wait at once; more are refused."""

RECENT = 15
"""Shares over which a worker's speed is measured: one slow share does not change the cut."""

POLL = 100
"""Longest sleep of the pool's loop [ms]; a dead worker is noticed within this time."""


@dataclass
class Worker:
    """What the pool knows of one worker."""

    identity: bytes
    index: int
    pid: int
    form: str
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # atoms per second
    structures: int = 0
    busy_seconds: float = 0.0
    share: Share | None = None


@dataclass(frozen=True)
class Status:
    """A glance at the pool, for progress displays."""

    card: dict[str, Any] | None
    workers: list[dict[str, Any]]
    force_sets: int
    structures: int
    waiting: int
    lost_workers: int
    refused: int


class Pool:
    """A pool of workers behind two ZeroMQ sockets, one for doors and one for workers.

    Parameters
    ----------
    doors : str
        Address at which doors ask, for example ``ipc:///tmp/nnqmd-1000/pool``.
    workers : str
        Address at which workers join.
    max_force : float
        Largest force that is let through to a simulation [eV/Angstrom].
    """

    def __init__(self, doors: str, workers: str, max_force: float = MAX_FORCE) -> None:
        self._max_force = max_force
        self._context = zmq.Context()
        self._doors = self._context.socket(zmq.ROUTER)
        self._backs = self._context.socket(zmq.ROUTER)
        for socket in (self._doors, self._backs):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        try:
            self._doors.bind(doors)
            self._backs.bind(workers)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self._workers: dict[bytes, Worker] = {}
        self._shares: deque[Share] = deque()
        self._card: dict[str, Any] | None = None
        self._numbers = 0
        self._force_sets = self._structures = self._lost = self._refused = 0
        self._dead_pids: deque[int] = deque()
        self._hopeless = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nnqmd-pool", daemon=True)

    def start(self) -> None:
        """Begin to serve, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the workers to stop, fail what is still waiting, close the sockets."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def worker_died(self, pid: int) -> None:
        """Say that a worker process is gone; its share goes to another."""
        self._dead_pids.append(pid)

    def give_up(self, why: str) -> None:
        """No worker is left and none will come: everything that is asked fails with this reason."""
        self._hopeless = why

    def status(self) -> Status:
        """A consistent enough glance for a display."""
        workers = [
            {
                "index": w.index,
                "pid": w.pid,
                "form": w.form,
                "structures": w.structures,
                "busy_seconds": w.busy_seconds,
            }
            for w in sorted(self._workers.copy().values(), key=lambda w: w.index)
        ]
        return Status(
            self._card,
            workers,
            self._force_sets,
            self._structures,
            len(self._shares),
            self._lost,
            self._refused,
        )

    # ---- the loop ---------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._doors, zmq.POLLIN)
        poller.register(self._backs, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                ready = dict(poller.poll(POLL))
                if self._backs in ready:
                    self._receive(self._backs, self._from_worker)
                if self._doors in ready:
                    self._receive(self._doors, self._from_door)
                while self._dead_pids:
                    self._forget(self._dead_pids.popleft())
                if self._hopeless:
                    self._fail_all(self._hopeless)
                self._hand_out()
            self._fail_all("The pool was stopped.")
            for worker in self._workers.values():
                self._send(self._backs, worker.identity, Message("stop"))
            time.sleep(0.05)  # lets the farewell leave before the sockets close
        finally:
            self._context.destroy(linger=100)

    def _receive(self, socket: zmq.Socket, handle: Any) -> None:
        identity, *frames = socket.recv_multipart()
        message = None
        try:
            message = unpack(frames)
            handle(identity, message)
        except (BadMessageError, KeyError, TypeError, ValueError) as error:
            self._refused += 1
            log.warning("dropped a message: %s", error)
            request = message.fields.get("request") if message else None
            fields = {"what": f"The pool did not understand a message: {error}", "request": request}
            self._send(socket, identity, Message("refused", fields))

    @staticmethod
    def _send(socket: zmq.Socket, identity: bytes, message: Message) -> None:
        socket.send_multipart([identity, *pack(message)], copy=False)

    # ---- doors ------------------------------------------------------------------------------------

    def _from_door(self, client: bytes, message: Message) -> None:
        if message.kind == "status":
            status = self.status()
            fields = {"card": status.card, "workers": status.workers, "force_sets": status.force_sets}
            self._send(self._doors, client, Message("status", fields))
        elif message.kind == "waiting":
            request = int(message.fields["request"])
            if not self._knows(client, request):
                self._send(self._doors, client, Message("unknown", {"request": request}))
        elif message.kind == "evaluate":
            job = Job(client, int(message.fields["request"]), arrays_to_structures(message.arrays))
            if self._knows(client, job.request):
                return
            if len(self._shares) >= MAX_WAITING:
                self._fail(
                    job,
                    "The pool has too many force sets waiting.",
                    "Start more workers or fewer simulations.",
                )
                return
            self._split(job)
        else:
            raise BadMessageError(f"a door may not say {message.kind!r}")

    def _knows(self, client: bytes, request: int) -> bool:
        shares = [*self._shares, *(w.share for w in self._workers.values() if w.share)]
        return any(s.job.client == client and s.job.request == request for s in shares)

    def _split(self, job: Job) -> None:
        first = 0
        for count in cut(len(job.structures), self._speeds()):
            if count:
                share = Share(self._numbers, job, job.structures[first : first + count], first)
                self._numbers += 1
                job.parts[share.number] = None
                self._shares.append(share)
                first += count

    def _fail(self, job: Job, what: str, fix: str, suspects: Sequence[int] = ()) -> None:
        fields = {"request": job.request, "what": what, "fix": fix, "suspects": list(suspects)}
        self._send(self._doors, job.client, Message("failed", fields))

    def _fail_all(self, why: str) -> None:
        jobs = {id(s.job): s.job for s in self._shares}
        jobs |= {id(w.share.job): w.share.job for w in self._workers.values() if w.share}
        self._shares.clear()
        for worker in self._workers.values():
            worker.share = None
        for job in jobs.values():
            self._fail(job, why, "See the workers' logs.")

    # ---- workers ----------------------------------------------------------------------------------

    def _from_worker(self, identity: bytes, message: Message) -> None:
        if message.kind == "ready":
            self._admit(identity, message.fields)
            return
        worker = self._workers.get(identity)
        if worker is None or worker.share is None or message.fields["share"] != worker.share.number:
            return  # an answer to something that was given to another meanwhile
        share, worker.share = worker.share, None
        if message.kind == "failed":
            found = Fault(
                str(message.fields["what"]),
                str(message.fields["fix"]),
                tuple(int(k) for k in message.fields.get("suspects", ())),
                bool(message.fields.get("final")),
            )
        elif message.kind == "done":
            found = judge(message.arrays, share.structures, self._max_force)
        else:
            raise BadMessageError(f"a worker may not say {message.kind!r}")
        if isinstance(found, Fault):
            self._try_again(worker, share, found)
            return
        self._account(worker, share, float(message.fields["seconds"]))
        self._complete(share, found)

    def _try_again(self, worker: Worker, share: Share, fault: Fault) -> None:
        log.warning("worker %s, share %s: %s", worker.index, share.number, fault.what)
        share.failed_on.append(worker.identity)
        if not fault.final and len(share.failed_on) < TRIES:
            self._shares.appendleft(share)
            return
        self._drop(share.job)
        self._fail(share.job, fault.what, fault.fix, [share.first + k for k in fault.suspects])

    def _admit(self, identity: bytes, fields: dict[str, Any]) -> None:
        card = fields["card"]
        if self._card is not None and card["sha256"] != self._card["sha256"]:
            what = f"this pool serves {self._card['name']}, the worker brought another model, {card['name']}"
            self._refused += 1
            self._send(self._backs, identity, Message("refused", {"what": what}))
            return
        self._card = card
        self._workers[identity] = Worker(
            identity, int(fields["index"]), int(fields["pid"]), str(fields["form"])
        )
        log.info("worker %s is ready (%s)", fields["index"], fields["form"])

    def _account(self, worker: Worker, share: Share, seconds: float) -> None:
        worker.recent.append(share.structures.n_atoms / max(seconds, 1e-9))
        worker.structures += len(share.structures)
        worker.busy_seconds += seconds

    def _speeds(self) -> list[float]:
        """Of every worker, the median of its latest shares; what is not measured yet is taken for typical."""
        measured = [median(w.recent) for w in self._workers.values() if w.recent]
        typical = median(measured) if measured else 1.0
        return [median(w.recent) if w.recent else typical for w in self._workers.values()] or [1.0]

    def _complete(self, share: Share, results: Results) -> None:
        job = share.job
        job.parts[share.number] = results
        parts = [part for part in job.parts.values() if part is not None]
        if len(parts) == len(job.parts):
            self._force_sets += 1
            self._structures += len(job.structures)
            fields = {"request": job.request, "shares": len(parts)}
            self._send(self._doors, job.client, Message("done", fields, results_to_arrays(join(parts))))

    def _drop(self, job: Job) -> None:
        self._shares = deque(s for s in self._shares if s.job is not job)
        for worker in self._workers.values():
            if worker.share and worker.share.job is job:
                worker.share = None  # its answer will match nothing and be passed over

    def _forget(self, pid: int) -> None:
        for identity, worker in list(self._workers.items()):
            if worker.pid != pid:
                continue
            del self._workers[identity]
            self._lost += 1
            log.error("worker %s (process %s) died", worker.index, pid)
            if worker.share:
                worker.share.lost_workers += 1
                if worker.share.lost_workers > 1:
                    self._drop(worker.share.job)
                    self._fail(
                        worker.share.job, "A force set has killed two workers.", "See the workers' logs."
                    )
                else:
                    self._shares.appendleft(worker.share)

    def _hand_out(self) -> None:
        for worker in self._workers.values():
            if worker.share is None:
                worker.share = next((s for s in self._shares if self._may_take(worker, s)), None)
                if worker.share is not None:
                    self._shares.remove(worker.share)
                    arrays = structures_to_arrays(worker.share.structures)
                    request = Message("evaluate", {"share": worker.share.number}, arrays)
                    self._send(self._backs, worker.identity, request)

    def _may_take(self, worker: Worker, share: Share) -> bool:
        """A share that has failed goes to another worker, where there is one."""
        return worker.identity not in share.failed_on or len(self._workers) <= len(share.failed_on)
