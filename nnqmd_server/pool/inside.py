"""How a door that lives in the pool's own process asks it: by reference, with no socket in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from uuid import uuid4

from nnqmd_server.errors import PoolError
from nnqmd_server.pool.bulk import Bulk
from nnqmd_server.pool.client import GLANCE, GivenUpError, chosen, default_name, failure
from nnqmd_server.pool.messages import LARGE
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.pool.shares import Fault, Job
from nnqmd_server.structures import Results, Structures


class InsideClient:
    """Asks a pool of this process; a :class:`~nnqmd_server.pool.client.Client`.

    A socket would wake four threads on the way there and back, and write and read every message twice.

    Parameters
    ----------
    pool : Pool
        The pool.
    potential : str
        Which of its potentials is asked; may be left out when it has one.
    name : str
        What this simulation is called in displays.
    patience : float
        Longest wait for an answer [s].
    """

    def __init__(self, pool: Pool, potential: str = "", name: str = "", patience: float = 600.0) -> None:
        self._pool = pool
        self.potential = potential
        self.patience = patience
        self._who, self._name = uuid4().hex, name or default_name()
        self._requests = 0
        self._bulk = Bulk() if pool.shares_memory else None

    def close(self) -> None:
        """Give up the memory; may be called twice."""
        if self._bulk is not None:
            self._bulk.close()

    def card(self, patience: float | None = None) -> dict:
        """The card of the potential that is asked, as soon as a worker is ready for it.

        Raises
        ------
        InputError
            The pool has several potentials and none was named.
        PoolError
            No worker has become ready in time.
        """
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            cards = self._pool.status().cards
            self.potential = chosen(self.potential, cards, "of this process")
            if self.potential in cards:
                return cards[self.potential]
            if time.monotonic() > deadline or self._pool.ended:
                raise PoolError("No worker of the pool is ready.", "See the workers' logs.")
            time.sleep(0.05)

    def submit(self, structures: Structures, given_up: Callable[[], bool] | None = None) -> Results:
        """Evaluate one force set; as :meth:`Client.submit`."""
        answers: SimpleQueue[Results | Fault] = SimpleQueue()
        job = self._job(structures, answers.put)
        self._pool.ask(job, self._bulk)
        try:
            found = self._wait(job, answers, given_up)
        except PoolError:
            self._retire()  # somebody may still write forces of this force set into it
            raise
        if not job.clean:
            self._retire()
        if isinstance(found, Fault):
            raise failure(found.what, found.fix, found.suspects)
        # The next force set is written where these forces lie.
        return found if job.area is None else replace(found, forces=found.forces.copy())

    def _job(self, structures: Structures, reply: Callable[[Results | Fault], None]) -> Job:
        self._requests += 1
        size, area = structures.positions.nbytes, None
        if self._bulk is not None and size >= LARGE:
            room, shape = self._bulk.room(2 * size), structures.positions.shape
            positions, area = (part.view("<f8").reshape(shape) for part in (room[:size], room[size:]))
            positions[:] = structures.positions
            structures = replace(structures, positions=positions)
        name, now = self._name, time.monotonic()
        return Job(
            b"", self._who, name, self._requests, self.potential, structures, now, area=area, reply=reply
        )

    def _wait(
        self, job: Job, answers: SimpleQueue[Results | Fault], given_up: Callable[[], bool] | None
    ) -> Results | Fault:
        deadline = job.arrived + self.patience
        while True:
            try:
                return answers.get(timeout=GLANCE)
            except Empty:
                job.heard = time.monotonic()  # the pool forgets what nobody waits for
            if given_up is not None and given_up():
                raise GivenUpError("Nobody waits for these forces any more.")
            if self._pool.ended and answers.empty():
                raise PoolError("The pool was stopped.", "Start it again.")
            if time.monotonic() > deadline:
                raise PoolError(
                    f"The pool has not answered for {self.patience:.0f} s.", "See the workers' logs."
                )

    def _retire(self) -> None:
        if self._bulk is not None:
            self._bulk.retire()
