"""The scheduler with workers that answer by rule, so that every failure can be staged."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from conftest import crystal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import CARD, ToyWorker, toy

from nnqmd_server.errors import InputError, PoolError, StructureError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.cutting import cut
from nnqmd_server.pool.inside import InsideClient
from nnqmd_server.pool.link import connect
from nnqmd_server.pool.messages import Message, pack
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.structures import from_ase


@pytest.fixture(params=["through a socket", "inside"])
def toys(tmp_path, request):
    """A pool, a client of it (of another process, or of this one), and a way to add workers."""
    doors, backs = f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/w"
    pool = Pool(doors, backs)
    pool.start()
    made = []

    def add(*args, **kwargs):
        made.append(ToyWorker(backs, *args, **kwargs))
        return made[-1]

    def ready(count):
        until = time.monotonic() + 10
        while len(pool.status().workers) < count and time.monotonic() < until:
            time.sleep(0.01)
        assert len(pool.status().workers) == count

    client = InsideClient(pool, patience=10.0) if request.param == "inside" else PoolClient(doors, 10.0)
    yield pool, client, add, ready, backs
    client.close()
    for worker in made:
        worker.left.set()
    pool.stop()


BEADS = from_ase([crystal(seed=k) for k in range(8)])


def dies_when_given_a_share(pool, *workers):
    """Report each worker as dead once it holds a share, whichever is first."""
    waiting = list(workers)

    def watch():
        while waiting:
            time.sleep(0.01)
            for worker in [w for w in waiting if w.shares]:
                waiting.remove(worker)
                pool.worker_died(worker.pid)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(
    ("count", "speeds", "expected"),
    [
        (8, [1, 1], [4, 4]),
        (8, [1.0, 1.1], [4, 4]),
        (8, [3, 1], [6, 2]),
        (1, [1, 2], [0, 1]),
        (3, [1, 1, 1, 1], [1, 1, 1, 0]),
    ],
)
def test_beads_are_cut_so_that_the_last_worker_ends_soonest(count, speeds, expected):
    assert cut(count, speeds) == expected


def test_the_cut_is_close_to_optimal():
    """No other way to hand out the beads ends sooner by more than a tenth (tried exhaustively)."""
    rng = np.random.default_rng(5)
    uneven = 0
    for _ in range(100):
        a, b = rng.uniform(0.2, 5, 2)
        ours = cut(9, [a, b])
        assert sum(ours) == 9
        best = min(max(k / a, (9 - k) / b) for k in range(10))
        assert max(ours[0] / a, ours[1] / b) <= 1.1 * best + 1e-12
        uneven += abs(ours[0] - ours[1]) > 1
    assert uneven > 20


def test_results_come_back_in_bead_order_whatever_worker_is_first(toys):
    _, client, add, ready, _ = toys
    slow, fast = add(1, delay=0.05), add(2)
    ready(2)
    for _ in range(3):
        results = client.submit(BEADS)
        assert np.array_equal(results.forces, BEADS.positions)
        assert np.array_equal(results.energy, toy(BEADS).energy)
    assert sum(slow.shares) + sum(fast.shares) == 24


def test_two_simulations_do_not_get_each_others_forces(toys):
    pool, _, add, ready, _ = toys
    add(1)
    add(2)
    ready(2)
    wrong = []

    def simulate(seed):
        mine = from_ase([crystal(seed=seed + k, repeat=(1 + seed % 2, 1, 1)) for k in range(3)])
        client = PoolClient(pool._doors.addresses[0], patience=10.0)
        same = [np.array_equal(client.submit(mine).forces, mine.positions) for _ in range(20)]
        wrong.extend([seed] * (not all(same)))
        client.close()

    threads = [threading.Thread(target=simulate, args=(seed,)) for seed in (10, 21, 32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert pool.status().force_sets == 60


def test_the_share_of_a_dead_worker_goes_to_another(toys):
    pool, client, add, ready, _ = toys
    mute = add(1, spoil=lambda answer: None)
    add(2)
    ready(2)
    dies_when_given_a_share(pool, mute)
    results = client.submit(BEADS)
    assert np.array_equal(results.forces, BEADS.positions)
    assert pool.status().lost_workers == 1


def test_a_share_that_kills_two_workers_is_not_handed_to_a_third(toys):
    pool, client, add, ready, _ = toys
    mute = [add(pid, spoil=lambda answer: None) for pid in (1, 2)]
    ready(2)
    dies_when_given_a_share(pool, *mute)
    with pytest.raises(PoolError, match="killed two workers"):
        client.submit(BEADS[:1])
    third = add(3)
    ready(1)
    assert np.array_equal(client.submit(BEADS).forces, BEADS.positions)
    assert third.shares == [8]


@pytest.mark.parametrize("name", ["forces", "energy", "virial"])
def test_results_that_are_not_finite_never_reach_a_door(toys, name):
    _, client, add, ready, _ = toys

    def spoil(answer):
        answer.arrays[name].flat[0] = np.nan
        return answer

    add(1, spoil=spoil)
    ready(1)
    with pytest.raises(PoolError, match="not finite"):
        client.submit(BEADS)


def spoil_structure(k, value):
    def spoil(answer):
        forces = answer.arrays["forces"].reshape(-1, 16, 3).copy()
        forces[k, 5, 1] = value
        answer.arrays["forces"] = forces.reshape(-1, 3)
        return answer

    return spoil


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_share_that_fails_on_one_worker_is_tried_on_another(toys, value):
    _, client, add, ready, _ = toys
    broken = add(1, spoil=spoil_structure(0, value))
    good = add(2)
    ready(2)
    for _ in range(3):
        assert np.array_equal(client.submit(BEADS).forces, BEADS.positions)
    assert len(broken.shares) >= 1
    assert sum(good.shares) == 24  # all of it in the end


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_structures_that_fail_everywhere_are_named(toys, value):
    _, client, add, ready, _ = toys
    workers = [add(pid, spoil=spoil_structure(1, value)) for pid in (1, 2)]
    ready(2)
    with pytest.raises(StructureError, match=r"not finite|1e\+06 eV/A") as caught:
        client.submit(BEADS)
    assert caught.value.suspects in {(1,), (5,)}  # the second of whichever share failed twice first
    assert sum(len(w.shares) for w in workers) <= 4


def test_results_of_the_wrong_size_never_reach_a_door(toys):
    _, client, add, ready, _ = toys

    def spoil(answer):
        answer.arrays["forces"] = answer.arrays["forces"][:-1]
        return answer

    add(1, spoil=spoil)
    ready(1)
    with pytest.raises(PoolError, match="wrong size"):
        client.submit(BEADS)


def test_an_answer_after_a_failure_is_not_taken_for_another(toys):
    """The share of a failed job may still be answered later; the next force set must not get it."""
    _, client, add, ready, _ = toys
    failed = threading.Event()

    def fail_once(answer):
        if not failed.is_set():
            failed.set()
            return Message(
                "failed", {"share": answer.fields["share"], "what": "staged", "fix": "none", "final": True}
            )
        return answer

    add(1, spoil=fail_once)
    add(2, delay=0.2)
    ready(2)
    with pytest.raises(PoolError, match="staged"):
        client.submit(BEADS)
    other = from_ase([crystal(seed=100 + k) for k in range(8)])
    assert np.array_equal(client.submit(other).forces, other.positions)


def test_a_worker_with_another_model_is_refused(toys):
    pool, client, add, ready, _ = toys
    add(1)
    ready(1)
    stranger = add(2, card=CARD | {"sha256": "b" * 64, "name": "other"})
    stranger.join(5)
    assert "another model" in stranger.refused
    assert pool.status().refused == 1
    assert np.array_equal(client.submit(BEADS).forces, BEADS.positions)


def test_rubbish_is_counted_and_does_no_harm(toys):
    pool, client, add, ready, backs = toys
    add(1)
    ready(1)
    for address in (pool._doors.addresses[0], backs):
        stranger = connect(address, None, "door")
        assert stranger.send([b"\x80\x04rubbish", b"more"])
        assert stranger.send(pack(Message("evaluate", {})))
        assert stranger.receive(5.0)
        stranger.close()
    assert np.array_equal(client.submit(BEADS).forces, BEADS.positions)
    assert pool.status().refused >= 3


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = "request potential potentials share seconds index pid client memory forces".split()  # noqa: SIM905
KINDS = ("ready", "done", "failed", "evaluate", "waiting", "status", "leaving", "alive", "x")
NASTY = [
    np.inf,
    -1,
    "x",
    [],
    {"p": 5},
    {"p": {"card": 5}},
    {"p": {"card": CARD | {"cutoff": "x"}, "form": 1}},
]
FIELDS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NASTY) | ANYTHING, min_size=3, max_size=9)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(KINDS), FIELDS), min_size=10, max_size=20))
def test_whatever_fields_a_message_has_the_pool_goes_on(toys, messages):
    pool, client, add, ready, backs = toys
    if not pool.status().workers:
        add(1)
        ready(1)
    for address in (pool._doors.addresses[0], backs):
        stranger = connect(address, None, "door")
        for kind, fields in messages:
            assert stranger.send(pack(Message(kind, fields)))
        stranger.close()
    assert np.array_equal(client.submit(BEADS[:1]).forces, BEADS[:1].positions)


def test_a_pool_without_workers_says_so_in_bounded_time(toys):
    pool, client, _, _, _ = toys
    started = time.monotonic()
    with pytest.raises(PoolError, match="No worker"):
        client.card(patience=0.5)
    pool.give_up("All workers have ended.")
    with pytest.raises(PoolError, match="All workers have ended"):
        client.submit(BEADS)
    assert time.monotonic() - started < 5


def test_nobody_at_the_address_is_an_error_in_bounded_time(tmp_path):
    client = PoolClient(f"ipc://{tmp_path}/nobody", patience=0.3)
    started = time.monotonic()
    for ask in (client.card, lambda: client.submit(BEADS)):
        with pytest.raises(PoolError, match="not answered") as caught:
            ask()
        assert "nnqmd serve" in caught.value.fix
    client.close()
    assert time.monotonic() - started < 5


def test_a_pool_that_is_restarted_is_asked_again(tmp_path):
    """The pool goes while it holds a request, and comes back at the same address with other workers."""
    doors, backs = f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/w"
    first = Pool(doors, backs)
    first.start()
    mute = ToyWorker(backs, 1, spoil=lambda answer: None)
    client = PoolClient(doors, patience=20.0)
    assert client.card()["name"] == "toy"
    got = []
    asking = threading.Thread(target=lambda: got.append(client.submit(BEADS)))
    asking.start()
    while not mute.shares:
        time.sleep(0.01)
    # As if killed: the sockets go without a word.
    first._fail_all = lambda why: None
    first.stop()
    time.sleep(0.5)
    second = Pool(doors, backs)
    second.start()
    worker = ToyWorker(backs, 2)
    asking.join(15)
    assert not asking.is_alive()
    assert np.array_equal(got[0].forces, BEADS.positions)
    assert sum(worker.shares) == 8  # asked once, computed once
    client.close()
    second.stop()
    for one in (mute, worker):
        one.left.set()


def test_a_door_that_waits_long_does_not_ask_twice(toys):
    _, client, add, ready, _ = toys
    worker = add(1, delay=2.5)
    ready(1)
    assert np.array_equal(client.submit(BEADS).forces, BEADS.positions)
    assert worker.shares == [8]


def test_each_simulation_is_answered_by_the_potential_it_named(toys):
    """Two potentials in one pool: shares go only to workers that hold the one that is asked."""
    pool, _, add, ready, _ = toys
    cheap, full = add(1, name="cheap"), add(2, name="full", card={**CARD, "sha256": "b" * 64})
    ready(2)
    address = pool._doors.addresses[0]
    one, other = (PoolClient(address, 10.0, name) for name in ("cheap", "full"))
    unsaid, wrong = PoolClient(address, 10.0), PoolClient(address, 0.3, "nobody")
    try:
        one.submit(BEADS)
        assert (sum(cheap.shares), sum(full.shares)) == (8, 0)
        other.submit(BEADS)
        assert (sum(cheap.shares), sum(full.shares)) == (8, 8)
        assert other.card()["sha256"] == "b" * 64
        with pytest.raises(PoolError, match="several potentials; it has cheap, full"):
            unsaid.submit(BEADS)
        with pytest.raises(InputError, match="several potentials: cheap, full"):
            unsaid.card()
        with pytest.raises(PoolError, match="no potential 'nobody'"):
            wrong.card()
        with pytest.raises(PoolError, match="no potential 'nobody'"):
            wrong.submit(BEADS)
    finally:
        for client in (one, other, unsaid, wrong):
            client.close()
