"""The pool: two entries, one for doors and one for workers, around the queue of :mod:`dispatch`.

One thread owns both entries and all the state; others only read :meth:`Pool.status`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from socket import socketpair
from typing import Any

import zmq

from nnqmd_server.errors import AddressError
from nnqmd_server.memory import keep_buffers
from nnqmd_server.pool.beat import BEAT
from nnqmd_server.pool.bulk import Bulk, Place, UnreachableError, near
from nnqmd_server.pool.crew import HOST, Worker, refusal, worker_of
from nnqmd_server.pool.dispatch import Dispatch, Observer, Outcome
from nnqmd_server.pool.gate import Entry, Gate
from nnqmd_server.pool.keys import PoolKeys
from nnqmd_server.pool.messages import (
    BadMessageError,
    Message,
    arrays_to_structures,
    pack,
    results_to_arrays,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.pool.planning import MAX_COST
from nnqmd_server.pool.shares import MAX_FORCE, Batch, Fault, Job
from nnqmd_server.pool.status import Status, glance
from nnqmd_server.pool.watch import Watch, plain
from nnqmd_server.structures import Results, Structures

log = logging.getLogger("nnqmd.pool")

MAX_WAITING = 256
"""Force sets that may wait at once; more are refused."""

POLL = 0.1
"""Longest sleep of the pool's loop [s]; a dead worker process is noticed within this time."""

QUIET = 0.001
"""When nothing has come for so long, there is time to count what has happened [s]."""

MANY_UNTOLD = 64
"""Events after which it is counted nevertheless."""

Recorder = Callable[[str, Job, Structures | Results | Fault], None]


class Pool:
    """A pool of workers behind two entries, one for doors and one for workers.

    Parameters
    ----------
    doors : str or sequence of str
        Addresses at which doors ask, for example ``ipc:///tmp/nnqmd-1000/pool``.
    workers : str or sequence of str
        Addresses at which workers join.
    max_force : float
        Largest force that is let through to a simulation [eV/Angstrom].
    expected : sequence of str
        Names of the potentials that workers will bring; what is asked for another one fails at once.
    max_cost : float
        Largest cost of a batch [edges].
    deterministic : int
        When not 0, every force set is cut into so many even parts, whichever workers are there.
    observe : callable, optional
        Told in the pool's thread what happens, as a word and plain fields; must return at once.
    keys : PoolKeys, optional
        Who may come in over TCP; needed beyond this machine.
    known : mapping of str to dict
        Cards of potentials that workers will bring; one that brings another model is refused.

    Attributes
    ----------
    watch : Watch
        Counts what happens.
    record : callable, optional
        Given each force set when it is asked, and what became of it ("asked", "answered" or "failed"), in the
        pool's thread; must return at once.
    """

    def __init__(
        self,
        doors: str | Sequence[str],
        workers: str | Sequence[str],
        max_force: float = MAX_FORCE,
        expected: Sequence[str] = (),
        max_cost: float = MAX_COST,
        deterministic: int = 0,
        observe: Observer | None = None,
        keys: PoolKeys | None = None,
        known: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self._gate = Gate(keys)
        try:
            self._doors = self._gate.listen(doors, "door")
            self._backs = self._gate.listen(workers, "worker")
        except AddressError:
            self._gate.close()
            raise
        self.watch = Watch()
        if observe is not None:
            self.watch.listen(observe)
        self.record: Recorder | None = None
        # Counting takes longer than deciding, so what happens is told after the messages have left.
        self._untold: deque[tuple[str, dict[str, Any]]] = deque()
        self._dispatch = Dispatch(max_force, max_cost, deterministic, self._note)
        self._bulk = Bulk() if any(map(near, self._doors.addresses)) else None
        self._near_workers = self._bulk is not None and any(map(near, self._backs.addresses))
        self._expected = tuple(expected)
        self._announced = dict(known or {})
        self._dead_pids: deque[int] = deque()
        # What doors of this process ask: they ring, since the loop sleeps on its sockets.
        self._asked: deque[tuple[Job, Bulk | None]] = deque()
        self._bell, self._ring = socketpair()
        for end in (self._bell, self._ring):
            end.setblocking(False)
        self._hopeless = ""
        self._next_beat = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nnqmd-pool", daemon=True)

    def start(self) -> None:
        """Begin to serve, in a thread."""
        keep_buffers()
        self._gate.open()
        self._thread.start()

    def stop(self) -> None:
        """Tell the workers to stop, fail what is still waiting, close the entries."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        elif self._thread.ident is None:  # it was never started
            self._close()

    def ask(self, job: Job, memory: Bulk | None = None) -> None:
        """Evaluate a force set of this process; its ``reply`` is called in the pool's thread.

        ``memory`` is where its positions and its area lie, if they do.
        """
        self._asked.append((job, memory))
        with suppress(OSError):  # it rings already; or the pool has ended, see `ended`
            self._ring.send(b"\0")

    @property
    def shares_memory(self) -> bool:
        """Whether workers of this machine can reach memory of doors."""
        return self._bulk is not None

    @property
    def ended(self) -> bool:
        """Whether the pool has stopped: nobody is answered any more."""
        return self._stopping.is_set() and not self._thread.is_alive()

    @property
    def guarded(self) -> bool:
        """Whether TCP asks for keys."""
        return self._gate.guarded

    def worker_died(self, pid: int) -> None:
        """Say that a worker process of this machine is gone; what it was at goes to another."""
        self._dead_pids.append(pid)

    def give_up(self, why: str) -> None:
        """No worker is left: everything that is asked fails with this reason until another one joins."""
        self._hopeless = why

    def worker_pids(self) -> set[int]:
        """Processes of the workers of this machine that are ready."""
        return {w.pid for w in self._dispatch.workers.copy().values() if w.host == HOST}

    def status(self) -> Status:
        """A consistent enough glance for a display: whoever has an answer finds it counted."""
        until = time.monotonic() + POLL
        while self._untold and time.monotonic() < until:
            time.sleep(1e-4)
        return glance(self._dispatch, self.watch, self._gate.turned_away)

    # ---- the loop ---------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        self._doors.register(poller)
        self._backs.register(poller)
        poller.register(self._bell, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                pause = self._dispatch.pause(time.monotonic(), QUIET if self._untold else POLL)
                ready = dict(poller.poll(math.ceil(1000 * pause)))
                for entry, handle in ((self._backs, self._from_worker), (self._doors, self._from_door)):
                    for sender, frames, far in entry.receive(ready):
                        self._receive(entry, handle, sender, frames, far)
                self._miss()
                self._hear()
                while self._dead_pids:
                    self._forget(self._dead_pids.popleft())
                self._beat(time.monotonic())
                if self._hopeless and not self._dispatch.workers:
                    self._answer(self._dispatch.fail_all(Fault(self._hopeless, "See the workers' logs.")))
                self._hand_out()
                if not ready or len(self._untold) > MANY_UNTOLD:
                    self._tell()
            self._hear()
            self._fail_all("The pool was stopped.")
            for worker in list(self._dispatch.workers.values()):
                self._send(self._backs, worker.identity, Message("stop"))
            self._tell()
            time.sleep(0.05)  # lets the farewell leave before the sockets close
        finally:
            self._close()

    def _close(self) -> None:
        self._gate.close()
        self._bell.close()
        self._ring.close()

    def _note(self, what: str, fields: dict[str, Any]) -> None:
        self._untold.append((what, fields))

    def _tell(self) -> None:
        while self._untold:
            try:
                self.watch(*self._untold[0])
            except Exception:  # whoever watches must not stop the pool
                log.exception("whoever watches failed")
            self._untold.popleft()

    def _fail_all(self, why: str) -> None:
        self._answer(self._dispatch.fail_all(Fault(why, "See the workers' logs.")))

    def _receive(
        self,
        entry: Entry,
        handle: Callable[[bytes, Message], None],
        sender: bytes,
        frames: Sequence[memoryview],
        far: bool,
    ) -> None:
        """Take one message; who came over the network has no memory here to show us, nor may name any."""
        message = None
        try:
            message = unpack(frames, None if far else self._bulk)
            if far:
                for place in ("memory", "forces"):
                    message.fields.pop(place, None)
            handle(sender, message)
        except Exception as error:  # noqa: BLE001 - whatever anybody sends, the pool goes on
            who = "worker" if entry is self._backs else "door"
            what = f"The pool did not understand a message: {str(error)[:200]}"
            self._refuse(who, what)
            request = getattr(message or error, "fields", {}).get("request")
            fields = {"what": what, "request": request if isinstance(request, int) else None}
            self._send(entry, sender, Message("refused", fields))

    def _miss(self) -> None:
        """Notice whose connection has ended; a door that comes back says who it is."""
        self._doors.lines.gone.clear()
        while self._backs.lines.gone:
            worker = self._dispatch.workers.get(self._backs.lines.gone.pop())
            if worker is not None:
                self._lose(worker, "the connection is gone")

    def _refuse(self, whom: str, what: str) -> None:
        log.warning("refused a %s: %s", whom, what)
        self._dispatch.tell("refused", whom=whom, what=what)

    @staticmethod
    def _send(entry: Entry, identity: bytes, message: Message, bulk: Bulk | None = None) -> bool:
        """Send to somebody who may have gone; whether the connection is there."""
        return entry.send(identity, pack(message, bulk))

    # ---- doors ------------------------------------------------------------------------------------

    def _from_door(self, client: bytes, message: Message) -> None:
        if message.kind == "status":
            self._tell()
            fields = asdict(self.status()) | {"near": self._reaches(message.fields.get("memory"))}
            self._send(self._doors, client, Message("status", fields))
            return
        if message.kind not in {"waiting", "evaluate"}:
            raise BadMessageError(f"a door may not say {message.kind!r}")
        request = int(message.fields["request"])
        simulation = str(message.fields.get("client") or client.hex())[:64]
        known = self._dispatch.jobs.get((simulation, request))
        if known is not None:
            # Asked again, perhaps over a new connection: it is computed once, and answered there.
            known.client, known.heard = client, time.monotonic()
        elif message.kind == "waiting":
            self._send(self._doors, client, Message("unknown", {"request": request}))
        else:
            potential = str(message.fields["potential"])
            name = plain(message.fields.get("name") or simulation[:8], 64)
            structures = arrays_to_structures(message.arrays)
            if not len(structures):
                raise BadMessageError("no structures")
            job = Job(client, simulation, name, request, potential, structures, arrived=time.monotonic())
            if "forces" in message.fields and self._bulk is not None:
                job.area = self._bulk.view(message.fields["forces"], "<f8", structures.positions.shape)
            self._accept(job)

    def _hear(self) -> None:
        """Take what doors of this process ask."""
        with suppress(BlockingIOError):
            self._bell.recv(4096)  # also where all was taken before it rang: or the loop never sleeps again
        while self._asked:
            job, memory = self._asked.popleft()
            if memory is not None:
                self._bulk.adopt(memory)
            try:
                self._accept(job)
            except Exception as error:  # whatever a door asks, the pool goes on
                log.exception("a force set could not be taken")
                job.reply(Fault(f"The pool could not take a force set: {str(error)[:200]}", "See the log."))

    def _reaches(self, place: Place | None) -> bool:
        """Whether this process can read and write somebody's memory."""
        try:
            return self._bulk is not None and self._bulk.view(place, "<f8", (1,)).size == 1
        except (UnreachableError, TypeError, ValueError):
            return False

    def _accept(self, job: Job) -> None:
        """Take a force set; it waits while the potential that it asks for has yet to come."""
        if len(self._dispatch.jobs) >= MAX_WAITING:
            fault = Fault(
                "The pool has too many force sets waiting.", "Start more workers or fewer simulations."
            )
        else:
            fault = self._unserved(job)
        if fault is not None:
            self._answer([(job, fault)])
            return
        self._dispatch.add(job, job.arrived)
        if self.record is not None:
            self.record("asked", job, job.structures)

    def _unserved(self, job: Job) -> Fault | None:
        """Settle which potential a force set asks for; what is wrong when there is no such."""
        cards = self._dispatch.cards
        names = sorted({*self._expected, *cards})
        if not job.potential and len(names) == 1:
            job.potential = names[0]
        if not cards or job.potential in names:
            return None
        asked = f"no potential {job.potential!r}" if job.potential else "several potentials"
        return Fault(
            f"This pool has {asked}; it has {', '.join(names)}.",
            "Name one of these (`potential` in <parameters>, or --potential).",
        )

    def _answer(self, outcomes: Sequence[Outcome]) -> None:
        for job, found in outcomes:
            if self.record is not None:
                self.record("failed" if isinstance(found, Fault) else "answered", job, found)
            if job.reply is not None:
                job.reply(found)
                continue
            if isinstance(found, Fault):
                fields = {"what": found.what, "fix": found.fix, "suspects": list(found.suspects)}
                message = Message("failed", {"request": job.request, **fields})
            else:
                fields = {"request": job.request, "shares": len(job.parts), "clean": job.clean}
                message = Message("done", fields, results_to_arrays(found))
            # What two workers were given may still be written by the slower one: then it is sent.
            shared = job.area is not None and job.clean
            self._send(self._doors, job.client, message, self._bulk if shared else None)

    # ---- workers ----------------------------------------------------------------------------------

    def _from_worker(self, identity: bytes, message: Message) -> None:
        worker = self._dispatch.workers.get(identity)
        if message.kind == "ready":
            if worker is None:
                self._admit(identity, message.fields)
        elif worker is None:
            if message.kind != "leaving":
                self._to_worker(identity, Message("who"))  # one of a pool that was here before
            else:
                self._to_worker(identity, Message("stop"))
        elif message.kind == "done":
            number, seconds = int(message.fields["share"]), float(message.fields["seconds"])
            self._note_memory(worker, message.fields.get("memory"))
            self._answer(self._dispatch.done(worker, number, message.arrays, seconds, time.monotonic()))
            self._dismiss(worker)
        elif message.kind == "failed":
            fault = Fault(
                str(message.fields["what"]),
                str(message.fields["fix"]),
                tuple(int(k) for k in message.fields.get("suspects", ())),
                bool(message.fields.get("final")),
            )
            if message.fields.get("far") and self._still_shared(worker):
                log.warning("worker %s cannot reach the memory of a door; arrays are sent", worker.index)
                self._near_workers = False
            number = int(message.fields["share"])
            self._answer(self._dispatch.failed(worker, number, fault, time.monotonic()))
            self._dismiss(worker)
        elif message.kind == "leaving":
            worker.leaving = True
            self._dismiss(worker)
        elif message.kind != "alive":
            raise BadMessageError(f"a worker may not say {message.kind!r}")

    def _still_shared(self, worker: Worker) -> bool:
        """Whether the doors of what a worker has in hand share their memory; a door that is gone does not."""
        runs = worker.batch.runs if worker.batch is not None else []
        areas = [run.job.area for run in runs if run.job.area is not None]
        return self._bulk is not None and any(self._bulk.still_shared(area) for area in areas)

    def _note_memory(self, worker: Worker, limit: dict[str, Any] | None) -> None:
        if limit is not None:
            atoms, structures = int(limit["atoms"]), int(limit["structures"])
            log.warning(
                "worker %s ran out of memory: from now on %s structures of %s atoms at once",
                worker.index,
                structures,
                atoms,
            )
            self._dispatch.tell("memory", worker=worker.index, atoms=atoms, structures=structures)

    def _dismiss(self, worker: Worker) -> None:
        """Let a worker go that wants to and has nothing in hand."""
        if worker.leaving and self._dispatch.leave(worker):
            log.info("worker %s has left", worker.index)
            self._to_worker(worker.identity, Message("stop"))

    def _admit(self, identity: bytes, hello: dict[str, Any]) -> None:
        why = refusal(hello, {**self._announced, **self._dispatch.cards})
        if why is not None:
            self._refuse("worker", why)
            self._to_worker(identity, Message("refused", {"what": why}))
            return
        worker = worker_of(identity, hello)
        worker.near = self._reaches(hello.get("memory"))
        taken = {other.index for other in self._dispatch.workers.values()}
        if worker.index in taken:  # started by somebody else; logs tell workers apart by it
            worker.index = next(k for k in range(len(taken) + 1) if k not in taken)
        self._dispatch.join(worker, {name: known["card"] for name, known in hello["potentials"].items()})
        self._hopeless = ""
        log.info("worker %s is ready (%s)", worker.index, worker.forms)
        for job in list(self._dispatch.jobs.values()):
            fault = self._unserved(job)
            if fault is not None:
                self._dispatch.end(job)
                self._answer([(job, fault)])

    def _forget(self, pid: int) -> None:
        for worker in list(self._dispatch.workers.values()):
            if (worker.pid, worker.host) == (pid, HOST):
                self._lose(worker, f"process {pid} died")

    def _lose(self, worker: Worker, what: str, unsent: Batch | None = None) -> None:
        log.error("worker %s is lost: %s", worker.index, what)
        self._answer(self._dispatch.lose(worker, what, unsent))

    def _to_worker(self, identity: bytes, message: Message) -> None:
        """Send; a worker whose connection is gone is lost."""
        if not self._send(self._backs, identity, message):
            worker = self._dispatch.workers.get(identity)
            if worker is not None:
                self._lose(worker, "the connection is gone")

    def _beat(self, now: float) -> None:
        if now < self._next_beat:
            return
        self._next_beat = now + BEAT
        self._dispatch.tidy(now)
        for entry in (self._doors, self._backs):
            entry.lines.listen_again()
        for identity in self._backs.lines.frozen():
            self._backs.lines.drop(identity)
        for worker in list(self._dispatch.workers.values()):
            self._to_worker(worker.identity, Message("alive"))

    def _hand_out(self) -> None:
        for worker, batch in self._dispatch.hand_out(time.monotonic()):
            bulk = self._bulk if self._near_workers and worker.near else None
            sent = self._send(self._backs, worker.identity, _request(batch, bulk), bulk)
            if not sent and worker.identity in self._dispatch.workers:
                self._lose(worker, "the connection is gone", batch)


def _request(batch: Batch, bulk: Bulk | None) -> Message:
    fields: dict[str, Any] = {"share": batch.number, "potential": batch.potential}
    run = batch.runs[0]
    only = len(batch.runs) == len(batch.holders) == 1
    if bulk is not None and only and run.job.area is not None:
        offsets = run.job.structures.offsets
        fields["forces"] = bulk.find(run.job.area[int(offsets[run.first]) : int(offsets[run.last])])
    return Message("evaluate", fields, structures_to_arrays(batch.structures))
