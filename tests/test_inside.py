"""A door in the pool's own process asks it without a socket: the same forces, and nothing of it hangs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import crystal
from spring_potential import SpringPotential
from toys import ToyWorker

from nnqmd_server.errors import PoolError
from nnqmd_server.pool import dispatch
from nnqmd_server.pool.client import GivenUpError, PoolClient
from nnqmd_server.pool.inside import InsideClient
from nnqmd_server.pool.launch import LocalPool
from nnqmd_server.pool.messages import LARGE
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.structures import from_ase

SMALL = from_ase([crystal(seed=k) for k in range(3)])
LARGER = [from_ase([crystal(seed=10 * n + k, repeat=(3, 3, 3)) for k in range(4)]) for n in range(2)]


@pytest.fixture
def toys(tmp_path):
    """A pool, a client inside, and a way to add a worker and wait for it."""
    backs = f"ipc://{tmp_path}/w"
    pool = Pool(f"ipc://{tmp_path}/d", backs)
    pool.start()
    client, made = InsideClient(pool, patience=20.0), []

    def add(**kwargs):
        made.append(ToyWorker(backs, 1, **kwargs))
        client.card()
        return made[-1]

    yield pool, client, add
    client.close()
    for worker in made:
        worker.left.set()
    pool.stop()


def test_the_same_forces_as_over_a_socket_and_they_stay(tmp_path):
    """Also where arrays lie in shared memory, in which the next force set is written."""
    assert LARGER[0].positions.nbytes > LARGE > SMALL.positions.nbytes
    source = f"{Path(__file__).parent / 'spring_potential.py'}:springs"
    with LocalPool({"springs": source}, tmp_path, workers=2, device="cpu") as pool:
        pool.wait_ready(60)
        inside, outside = pool.client(name="inside"), PoolClient(pool.address)
        assert inside.card() == outside.card()
        asked = [*LARGER, SMALL, *LARGER[::-1]]
        for one, other, structures in zip(
            [inside.submit(each) for each in asked],
            [outside.submit(each) for each in asked],
            asked,
            strict=True,
        ):
            right = SpringPotential().evaluate(structures)
            for mine in (one, other):
                assert np.array_equal(mine.energy, right.energy)
                assert np.array_equal(mine.forces, right.forces)
                assert np.array_equal(mine.virial, right.virial)
                assert mine.properties.keys() == right.properties.keys()
        assert {each["name"]: each["force_sets"] for each in pool.status().simulations}["inside"] == len(
            asked
        )
        inside.close()
        outside.close()


def test_when_the_pool_is_stopped_nobody_waits_on(toys):
    pool, client, add = toys
    worker = add(spoil=lambda answer: None)
    heard = []

    def ask():
        with pytest.raises(PoolError, match="stopped") as caught:
            client.submit(SMALL)
        heard.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    while not worker.shares:
        time.sleep(0.01)
    pool.stop()
    asking.join(10)
    assert len(heard) == 1
    started = time.monotonic()
    with pytest.raises(PoolError, match="stopped"):
        client.submit(SMALL)
    with pytest.raises(PoolError, match="No worker"):
        InsideClient(pool, "another", patience=30.0).card()
    assert time.monotonic() - started < 10


def test_what_was_given_up_does_not_reach_the_next_force_set(toys):
    _, client, add = toys
    worker = add(delay=0.6)
    one, other = LARGER
    with pytest.raises(GivenUpError):
        client.submit(one, given_up=lambda: bool(worker.shares))
    assert np.array_equal(client.submit(other).forces, other.positions)
    assert np.array_equal(client.submit(one).forces, one.positions)
    assert worker.shares == [4, 4, 4]


def test_a_force_set_that_somebody_waits_for_is_not_forgotten(toys, monkeypatch):
    monkeypatch.setattr(dispatch, "SILENCE", 0.5)
    pool, client, add = toys
    add(delay=3.0)
    assert np.array_equal(client.submit(SMALL).forces, SMALL.positions)
    assert pool.watch.counts["abandoned"] == 0


def test_a_force_set_that_cannot_be_taken_fails_and_the_pool_goes_on(toys, monkeypatch):
    pool, client, add = toys
    add()
    with monkeypatch.context() as patch:
        patch.setattr(pool._dispatch, "add", lambda *_: 1 / 0)
        with pytest.raises(PoolError, match="could not take"):
            client.submit(SMALL)
    assert np.array_equal(client.submit(SMALL).forces, SMALL.positions)


def test_a_ring_for_what_was_taken_already_does_not_keep_the_pool_awake(toys, monkeypatch):
    """It is heard between the force set and its ring when it wakes for something else just then."""
    pool, client, add = toys
    add()
    client.submit(SMALL)
    rounds, pause = [], pool._dispatch.pause
    monkeypatch.setattr(pool._dispatch, "pause", lambda *args: rounds.append(1) or pause(*args))
    pool._ring.send(b"\0")
    time.sleep(1.0)
    assert 1 <= len(rounds) < 100  # it sleeps a tenth of a second at a time
