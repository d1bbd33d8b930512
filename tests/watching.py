"""A pool with workers that answer by rule, for the tests of status, metrics, log, page and replay."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import asdict

from conftest import crystal
from toys import ToyWorker

from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.structures import from_ase

BEADS = from_ase([crystal(seed=k) for k in range(8)])


class ToyPool:
    """A pool in this process; ``add`` and ``ask`` are how things happen in it."""

    def __init__(self, folder):
        self.address, self.backs = f"ipc://{folder}/d", f"ipc://{folder}/w"
        self.pool = Pool(self.address, self.backs)
        self.watch = self.pool.watch
        self.workers, self.clients = [], []
        self.pool.start()

    def status(self):
        return asdict(self.pool.status())

    def add(self, *args, **kwargs):
        self.workers.append(ToyWorker(self.backs, *args, **kwargs))
        wait_until(lambda: len(self.pool.status().workers) >= len(self.workers))
        return self.workers[-1]

    def client(self, name="", patience=10.0):
        self.clients.append(PoolClient(self.address, patience, name=name))
        return self.clients[-1]


@contextmanager
def toy_pool(folder):
    made = ToyPool(folder)
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        for worker in made.workers:
            worker.left.set()
        made.pool.stop()


def wait_until(there, seconds=10.0):
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def side_by_side(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
