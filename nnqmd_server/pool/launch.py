"""Start and stop a pool with its worker processes on this machine."""

from __future__ import annotations

import logging
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from nnqmd_server.errors import NnqmdError, OutputError, PoolError
from nnqmd_server.pool.addresses import is_tcp
from nnqmd_server.pool.dispatch import Observer
from nnqmd_server.pool.folders import free, own_folder
from nnqmd_server.pool.inside import InsideClient
from nnqmd_server.pool.keys import pool_keys
from nnqmd_server.pool.processes import Processes, Recipe, plan
from nnqmd_server.pool.scheduler import Pool, Recorder
from nnqmd_server.pool.status import Status
from nnqmd_server.pool.watch import Watch
from nnqmd_server.potentials.load import card_of

log = logging.getLogger("nnqmd.pool")

FINAL = {0, 3, -signal.SIGTERM}
"""Ends of a worker that another start does not mend, or that somebody wanted."""


def join_address(address: str) -> str:
    """Where workers of this machine join the pool that listens for doors at an ipc address."""
    return f"{address}-workers"


class LocalPool:
    """A pool and its workers on this machine.

    Parameters
    ----------
    models : mapping of str to str
        Sources of the potentials by name, see :func:`nnqmd_server.potentials.load.parse_models`; every
        worker holds all of them.
    logs : Path
        Folder for the workers' logs.
    address : str, optional
        Where doors ask; a private ipc socket unless given. One of TCP is served beside that one.
    workers, device : optional
        See :func:`plan`; 0 workers for a pool that others join.
    eager : bool
        Do not compile the model.
    deterministic : bool
        Cut every force set into as many even parts as there are workers now, whatever becomes of them.
    observe : callable, optional
        See :class:`Pool`.
    join : str, optional
        TCP address at which workers of other machines join.
    keys : Path, optional
        Key file of the pool, needed for TCP beyond this machine; ``$NNQMD_KEYS`` unless given.
    hashes : mapping of str to str, optional
        SHA-256 that a model must have, by name.
    restarts : int
        How often in an hour a worker that was ready and has died is started again.

    Raises
    ------
    AddressError
        An address is taken or not allowed, or the keys are unusable.
    ModelError
        What is given is no model.
    OutputError
        The logs cannot be written.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        logs: Path,
        address: str | None = None,
        workers: int | None = None,
        device: str = "auto",
        eager: bool = False,
        deterministic: bool = False,
        observe: Observer | None = None,
        join: str = "",
        keys: Path | None = None,
        hashes: Mapping[str, str] | None = None,
        restarts: int = 0,
    ) -> None:
        cards = {name: card_of(source) for name, source in models.items()}  # what is no model is found first
        self.models = models
        self.plan = plan(workers, device)
        elsewhere = bool(address) and not is_tcp(address)
        self._folder = None if elsewhere else own_folder()
        self.own_address = address if elsewhere else f"ipc://{self._folder}/pool"
        self.address = address or self.own_address
        self.join = join
        back = join_address(self.own_address)
        self._processes: Processes | None = None
        self._watching = threading.Event()
        self._restarts = restarts
        self._restarted: deque[float] = deque()
        self._lost = False
        self._watch: threading.Thread | None = None
        self._logs = logs
        self._pool: Pool | None = None
        try:
            doors = list(dict.fromkeys([self.own_address, self.address]))
            backs = [back, join] if join else [back]
            for place in [*doors, *backs]:
                free(place)
            self._pool = Pool(
                doors,
                backs,
                expected=list(models),
                deterministic=self.plan.workers if deterministic else 0,
                observe=observe,
                keys=pool_keys(keys) if any(is_tcp(place) for place in [*doors, *backs]) else None,
                known={name: card.as_dict() for name, card in cards.items() if card},
            )
            self._pool.start()
            self._processes = Processes(Recipe(models, back, logs, eager, hashes), self.plan)
        except OSError as error:
            self.stop()
            raise OutputError(f"Cannot start workers: {error}.", f"Check that {logs} is writable.") from error
        except NnqmdError:
            self.stop()
            raise
        self._watch = threading.Thread(target=self._watch_workers, name="nnqmd-watch", daemon=True)
        self._watch.start()

    def _watch_workers(self) -> None:
        reported: set[int] = set()
        ready: set[int] = set()
        while not self._watching.wait(0.1):
            for process in self._processes.ended:
                if process.pid not in reported:
                    reported.add(process.pid)
                    self._pool.worker_died(process.pid)
                    if process.pid in ready:
                        self._start_again(process)
            ready |= self._pool.worker_pids()  # after the ended: who was ready when last seen
            mine = self._processes.all
            if mine and all(process.pid in reported for process in mine):
                self._lost = True
                self._pool.give_up(f"All workers have ended. {self.last_words()}")
                return

    def _start_again(self, process: subprocess.Popen) -> None:
        """Replace a worker that has died, unless too many have lately."""
        now = time.monotonic()
        while self._restarted and now - self._restarted[0] > 3600.0:
            self._restarted.popleft()
        if process.returncode in FINAL or len(self._restarted) >= self._restarts:
            return
        self._restarted.append(now)
        try:
            self._processes.again(process)
        except OSError as error:
            log.error("a worker that died cannot be started again: %s", error)
        else:
            log.warning(
                "worker process %s has died (%s) and is started again", process.pid, process.returncode
            )

    def check(self) -> None:
        """Raise when no worker is left of those that were started here, nor one that has joined.

        Raises
        ------
        PoolError
            All workers have ended.
        """
        if self._lost and not self.status().workers:
            raise PoolError(f"All workers have ended. {self.last_words()}", f"See {self._logs}.")

    def last_words(self) -> str:
        """The last line that each worker logged, for error messages."""
        return self._processes.last_words()

    def join_commands(self) -> list[str]:
        """The command lines that add workers: on this machine, and on others where that is possible."""
        models = " ".join(f"{name}={source}" for name, source in self.models.items()) or "MODEL..."
        back = join_address(self.own_address)
        lines = [f"nnqmd worker --pool {back} {models}"]
        if self.join:
            host, _, port = self.join.removeprefix("tcp://").rpartition(":")
            host = platform.node() if host in {"*", "0.0.0.0", "[::]"} else host
            keys = " --keys worker.key" if self._pool.guarded else ""
            lines.append(f"nnqmd worker --pool tcp://{host}:{port}{keys} {models}")
        return lines

    def wait_ready(self, timeout: float = 1500.0, tell: Callable[[str], None] | None = None) -> None:
        """Wait until every worker has loaded its model.

        Parameters
        ----------
        timeout : float
            Longest wait [s]; the first start compiles the model.
        tell : callable, optional
            Called now and then with a line that says what is being waited for.

        Raises
        ------
        PoolError
            A worker has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while len(self.status().workers) < len(self._processes.all):
            if self._processes.ended:
                raise PoolError(
                    f"A worker ended while it was loading the model. {self.last_words()}",
                    f"See {self._logs}.",
                )
            if time.monotonic() > deadline:
                raise PoolError(f"The workers were not ready after {timeout:.0f} s.", f"See {self._logs}.")
            if tell:
                ready, started = len(self.status().workers), len(self._processes.all)
                tell(f"{ready} of {started} workers ready (the first start compiles the model)")
            time.sleep(0.1)

    def client(self, potential: str = "", name: str = "") -> InsideClient:
        """For a door of this process; one of another process makes a ``PoolClient`` for the address."""
        return InsideClient(self._pool, potential, name)

    def status(self) -> Status:
        """See :meth:`Pool.status`."""
        return self._pool.status()

    @property
    def watch(self) -> Watch:
        """Counts what happens in the pool; may be listened to."""
        return self._pool.watch

    def record(self, recorder: Recorder | None) -> None:
        """Give a recorder what is asked and answered from now on; None: no more."""
        self._pool.record = recorder

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that were started here."""
        return [process.pid for process in self._processes.all]

    def stop(self) -> None:
        """Stop the workers and the pool, and remove their sockets."""
        self._watching.set()
        if self._watch is not None:
            self._watch.join(10)  # it may just be starting a worker again
        if self._pool is not None:
            self._pool.stop()
        if self._processes is not None:
            self._processes.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._pool is not None:
            for address in (self.own_address, join_address(self.own_address)):
                Path(address.removeprefix("ipc://")).unlink(missing_ok=True)

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
