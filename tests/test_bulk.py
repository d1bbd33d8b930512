"""Shared memory between door, pool and workers: nobody reads what another one writes later."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import crystal
from toys import toy

from nnqmd_server.pool.bulk import MAX_ATTACHED, Bulk, UnreachableError, near
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.link import connect
from nnqmd_server.pool.messages import (
    BadMessageError,
    Message,
    NotSharedError,
    arrays_to_structures,
    pack,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.pool.worker import serve
from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import from_ase

BEADS = from_ase([crystal(seed=k, repeat=(2, 2, 2)) for k in range(8)])  # 1024 atoms: above LARGE

READER = """
import sys
from nnqmd_server.pool.bulk import Bulk
place = [int(x) for x in sys.argv[1:]]
view = Bulk().view(place, "<f8", (3,))
print(*view)
view[:] = (4.0, 5.0, 6.0)
"""


def test_another_process_reads_and_writes_our_memory():
    bulk = Bulk()
    ours = bulk.room(1000)[64:88].view("<f8")
    ours[:] = (1.0, 2.0, 3.0)
    told = subprocess.run(
        [sys.executable, "-c", READER, *map(str, bulk.find(ours))], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["1.0", "2.0", "3.0"]
    assert ours.tolist() == [4.0, 5.0, 6.0]


def test_what_is_not_shared_is_an_error():
    bulk, other = Bulk(), Bulk()
    place = bulk.find(bulk.room(4096))
    assert other.view(place, "<f8", (512,)).size == 512
    assert bulk.find(np.zeros(8)) is None
    for bad in (
        [*place[:3], 4096],
        [*place[:3], -8],
        [*place[:3], 4],
        [place[0], place[1], place[2] + 1, 0],
        [2**22 + 1, 3, 4, 0],
        [os.getpid(), 0, 5, 0],
    ):
        with pytest.raises(UnreachableError):
            other.view(bad, "<f8", (8,))
    with pytest.raises(UnreachableError):
        other.view(place, "<f8", (513,))
    with Path(__file__).open("rb") as ordinary:
        found = os.fstat(ordinary.fileno())
        with pytest.raises(UnreachableError):
            other.view([os.getpid(), ordinary.fileno(), found.st_ino, 0], "<f8", (1,))


def test_a_segment_cannot_be_cut_under_its_readers():
    bulk = Bulk()
    bulk.room(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(bulk._fd, 0)


def open_files():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_attached_memory_is_bounded_and_outlives_its_owner():
    mine, before = Bulk(), open_files()
    views = []
    for k in range(MAX_ATTACHED + 10):
        other = Bulk()
        other.room(4096).view("<f8")[:] = k
        views.append(mine.view(other.find(other.room(4096)), "<f8", (512,)))
        other.close()
    assert len(mine._others) == MAX_ATTACHED
    assert [view[0] for view in views] == list(range(MAX_ATTACHED + 10))
    views.clear()
    assert open_files() <= before + MAX_ATTACHED
    mine.close()
    assert open_files() == before


def test_whether_memory_is_still_shared():
    """A door that has gone must not be taken for a worker that cannot reach memory at all."""
    mine, other = Bulk(), Bulk()
    view = mine.view(other.find(other.room(4096)), "<f8", (512,))
    assert mine.still_shared(view)
    other.close()
    assert not mine.still_shared(view)
    assert not mine.still_shared(np.zeros(8))


def test_a_message_names_what_is_shared():
    bulk, there = Bulk(), Bulk()
    arrays = structures_to_arrays(BEADS)
    arrays["positions"] = bulk.room(BEADS.positions.nbytes).view("<f8").reshape(-1, 3)
    arrays["positions"][:] = BEADS.positions
    frames = pack(Message("evaluate", {"share": 7}, arrays), bulk)
    assert sum(len(frame) for frame in frames) < BEADS.positions.nbytes / 2
    found = arrays_to_structures(unpack(frames, there).arrays)
    assert np.array_equal(found.positions, BEADS.positions)
    with pytest.raises(BadMessageError):
        unpack(frames)  # no memory is shared over this connection
    bulk.close()
    with pytest.raises(NotSharedError) as gone:
        unpack(frames, Bulk())
    assert gone.value.fields == {"share": 7}


class Slow:
    """Forces = positions + a number; the first call waits for a signal."""

    form, together = "toy", True
    card = Card("slow", "0" * 64, (), 0.0, "float64")

    def __init__(self, number, gate=None):
        self.number, self.gate, self.calls = number, gate, 0

    def evaluate(self, structures):
        if structures.n_atoms > 100:
            self.calls += 1
            if self.gate is not None and self.calls == 1:
                self.gate.wait(30)
        results = toy(structures)
        results.forces[:] += self.number
        return results


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A pool, workers in threads, and a door that shares its memory."""
    monkeypatch.setattr("nnqmd_server.pool.worker.signal.signal", lambda *_: None)  # not the main thread
    monkeypatch.setattr("nnqmd_server.pool.dispatch.LATE_UNKNOWN", 0.2)
    doors, backs = f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/w"
    pool = Pool(doors, backs)
    pool.start()
    threads = []

    def add(potential):
        count = len(pool.status().workers)
        thread = threading.Thread(target=serve, args=({"toy": potential}, backs, count, None, 30.0))
        thread.start()
        threads.append(thread)
        until = time.monotonic() + 10
        while len(pool.status().workers) == count and time.monotonic() < until:
            time.sleep(0.01)

    client = PoolClient(doors, patience=20.0)
    yield pool, client, add
    client.close()
    pool.stop()
    for thread in threads:
        thread.join(15)


def own(client):
    return None if client._bulk._own is None else client._bulk._own.key


def test_forces_come_back_through_shared_memory_and_are_ours_to_keep(house):
    _, client, add = house
    add(Slow(1.0))
    add(Slow(1.0))
    client.card()
    assert client._near
    first = client.submit(BEADS)
    kept, key = first.forces.copy(), own(client)
    moved = from_ase([crystal(seed=k + 50, repeat=(2, 2, 2)) for k in range(8)])
    second = client.submit(moved)
    assert key is not None
    assert own(client) == key  # the same memory again
    assert np.array_equal(first.forces, kept)
    assert np.array_equal(kept, BEADS.positions + 1.0)
    assert np.array_equal(second.forces, moved.positions + 1.0)
    assert np.array_equal(second.energy, toy(moved).energy)
    small = from_ase([crystal(seed=3)])
    assert np.array_equal(client.submit(small).forces, small.positions + 1.0)


def test_a_late_worker_cannot_write_into_the_next_force_set(house):
    """The slow worker's copy is answered by the other one; what it writes later goes nowhere."""
    _, client, add = house
    gate = threading.Event()
    slow = Slow(1.0, gate)
    add(slow)
    client.card()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.submit(BEADS)))
    asking.start()
    while not slow.calls:
        time.sleep(0.01)
    before = own(client)
    add(Slow(2.0))
    asking.join(20)
    assert np.array_equal(answers[0].forces, BEADS.positions + 2.0)
    assert own(client) is None  # not clean: a new segment next time
    gate.set()
    for k in range(20):
        moved = from_ase([crystal(seed=k + 9, repeat=(2, 2, 2)) for _ in range(8)])
        forces = client.submit(moved).forces - moved.positions
        owner = np.repeat(np.arange(8), 128)
        assert all(len(set(np.round(forces[owner == b].ravel(), 6))) == 1 for b in range(8))
    assert own(client) != before


def test_the_memory_of_a_door_that_is_gone_stops_nobody(house):
    _, client, add = house
    add(Slow(1.0))
    client.card()
    link = connect(client.address, None, "door")
    arrays = structures_to_arrays(BEADS)
    bulk = Bulk()
    arrays["positions"] = bulk.room(BEADS.positions.nbytes).view("<f8").reshape(-1, 3)
    frames = pack(Message("evaluate", {"request": 1, "potential": "toy"}, arrays), bulk)
    bulk.close()
    assert link.send(frames)
    answer = unpack(link.receive(5.0))
    assert (answer.kind, answer.fields["request"]) == ("refused", 1)
    assert np.array_equal(client.submit(BEADS).forces, BEADS.positions + 1.0)
    link.close()


def test_only_connections_within_a_machine_share():
    assert near("ipc:///run/pool")
    assert not near("tcp://127.0.0.1:5555")
