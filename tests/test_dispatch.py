"""The queue without sockets: who is given what, when, and what becomes of it when workers fail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy

from nnqmd_server.pool import dispatch as module
from nnqmd_server.pool import planning
from nnqmd_server.pool.crew import Worker, size_class
from nnqmd_server.pool.cutting import cut, estimated_edges, fixed_parts, share_out
from nnqmd_server.pool.dispatch import Dispatch
from nnqmd_server.pool.messages import results_to_arrays
from nnqmd_server.pool.shares import Fault, Job
from nnqmd_server.structures import Structures

ENOUGH = 10_000
serial = itertools.count(1)


def structures(*sizes, mark=0.0):
    """Cubes of the density of liquid ammonia, every position its own number."""
    n = sum(sizes)
    positions = mark + np.arange(3.0 * n).reshape(n, 3) * 1e-3
    cells = np.array([np.eye(3) * (size / 0.09) ** (1 / 3) for size in sizes])
    return Structures(np.ones(n, int), positions, cells, np.concatenate([[0], np.cumsum(sizes)]).astype(int))


def job(who, *sizes, potential="p", request=None):
    number = next(serial)
    return Job(
        who.encode(),
        who,
        who,
        request or number,
        potential,
        structures(*sizes, mark=number % 5000 * 0.1),
        arrived=0.0,
    )


def worker(index, speed=None, potentials=("p",), together=True, sizes=(16,)):
    one = Worker(
        bytes([index]),
        index,
        index,
        "here",
        dict.fromkeys(potentials, ""),
        dict.fromkeys(potentials, together),
    )
    if speed:
        one.speeds = {(name, size_class(size)): speed for name in potentials for size in sizes}
    return one


def pool_of(*workers, **options):
    heard = []
    pool = Dispatch(observe=lambda event, fields: heard.append((event, fields)), **options)
    for one in workers:
        pool.join(one, {name: {"cutoff": 0.0} for name in one.forms})
    pool.heard = heard
    return pool


def answer(pool, one, now, seconds=None, number=None):
    """What an honest worker says of what it holds."""
    batch = one.batch
    seconds = seconds or now - one.since
    arrays = results_to_arrays(toy(batch.structures))
    return pool.done(one, number or batch.number, arrays, max(seconds, 1e-3), now)


def said(pool, event):
    return [fields for what, fields in pool.heard if what == event]


def given_to(pairs):
    return {w.index: [len(run) for run in batch.runs] for w, batch in pairs}


# ---- pure functions -----------------------------------------------------------------------------------


def test_edges_are_estimated_within_a_few_percent(potential):
    from conftest import crystal, triclinic

    from nnqmd_server.structures import from_ase

    for atoms in (crystal(repeat=(2, 2, 1)), triclinic()):
        batch = from_ase([atoms])
        exact = potential.lists.edges(batch)[0][0].shape[1]
        assert estimated_edges(batch, potential.card.cutoff)[0] == pytest.approx(exact, rel=0.05)


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    speeds=st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    busy=st.booleans(),
)
def test_a_cut_hands_out_everything_and_the_last_ends_soon(sizes, speeds, busy):
    costs = np.array(sizes, float)
    loads = [1.0 * k * busy for k in range(len(speeds))]
    counts = share_out(costs, speeds, loads)
    assert sum(counts) == len(sizes)
    assert min(counts) >= 0
    ends = [load for load in loads if load > 0]
    first = 0
    for count, speed, load in zip(counts, speeds, loads, strict=True):
        if count:
            ends.append(load + costs[first : first + count].sum() / speed)
        first += count
    # No cut ends before everything is done at full speed; ours is later by at most a structure or so each.
    ideal = (costs.sum() + sum(load * v for load, v in zip(loads, speeds, strict=True))) / sum(speeds)
    worst = 2 * costs.max() / min(speeds)
    assert max(ends) <= max(1.1 * ideal + worst, max(loads))


def test_a_worker_that_is_busy_gets_less():
    assert cut(8, [1.0, 1.0], [0.0, 4.0]) == [6, 2]
    assert cut(2, [1.0, 1.0], [0.0, 4.0]) == [2, 0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 9), st.floats(10, 500))
def test_the_fixed_cut_depends_on_the_structures_alone(sizes, parts, limit):
    costs = np.array(sizes, float)
    counts = fixed_parts(costs, parts, limit)
    assert sum(counts) == len(sizes)
    ends = np.cumsum(counts)
    for count, end in zip(counts, ends, strict=True):
        assert count <= -(-len(sizes) // parts)
        assert count == 1 or costs[end - count : end].sum() <= limit * 1.001


# ---- who gets what ------------------------------------------------------------------------------------


def test_a_force_set_is_cut_by_measured_speed():
    pool = pool_of(worker(1, 300.0), worker(2, 100.0))
    pool.add(job("a", *[16] * 8), 0.0)
    assert given_to(pool.hand_out(0.0)) == {1: [6], 2: [2]}


def test_speed_is_known_for_each_size():
    """The GPU is ten times as fast with large structures, but no faster with small ones."""
    gpu, cpu = worker(1), worker(2)
    gpu.speeds = {("p", size_class(16)): 100.0, ("p", size_class(512)): 1000.0}
    cpu.speeds = {("p", size_class(16)): 100.0, ("p", size_class(512)): 100.0}
    pool = pool_of(gpu, cpu)
    pool.add(job("a", *[16] * 8), 0.0)
    assert given_to(pool.hand_out(0.0)) == {1: [4], 2: [4]}
    for one in (gpu, cpu):
        answer(pool, one, 1.0, seconds=64 / 100)
    pool.add(job("a", *[512] * 11), 1.0)
    assert given_to(pool.hand_out(1.0)) == {1: [10], 2: [1]}


def test_what_a_busy_worker_ends_sooner_is_left_for_it():
    """A slow worker that is idle does not get what a fast one, free in a moment, finishes earlier."""
    fast, slow = worker(1, 1600.0), worker(2, 16.0)
    pool = pool_of(fast, slow)
    pool.add(job("a", *[16] * 10), 0.0)
    assert given_to(pool.hand_out(0.0)) == {1: [10]}
    pool.add(job("b", 16), 0.05)
    assert pool.hand_out(0.05) == []
    answer(pool, fast, 0.1)
    assert given_to(pool.hand_out(0.1)) == {1: [1]}


def test_a_worker_that_is_late_is_not_waited_for():
    fast, slow = worker(1, 1600.0), worker(2, 16.0)
    pool = pool_of(fast, slow)
    pool.add(job("a", *[16] * 10), 0.0)
    pool.hand_out(0.0)
    pool.add(job("b", 16), 0.05)
    assert pool.hand_out(0.05) == []
    assert given_to(pool.hand_out(0.2)) == {2: [1]}


def test_simulations_are_merged_up_to_a_cost():
    one = worker(1)
    pool = pool_of(one, max_cost=100)
    for who, sizes in {"a": (16, 16), "b": (16,), "c": (40,), "d": (8,)}.items():
        pool.add(job(who, *sizes), 0.0)
    # All have their turn now; of these the cheapest is first.
    ((_, batch),) = pool.hand_out(0.0)
    assert [run.job.simulation for run in batch.runs] == ["d", "b", "a", "c"]
    assert batch.cost == 96
    assert said(pool, "given")[0]["simulations"] == 4
    outcomes = answer(pool, one, 1.0)
    assert [j.simulation for j, _ in outcomes] == ["d", "b", "a", "c"]
    for done, results in outcomes:
        assert np.array_equal(results.forces, done.structures.positions)


def test_structures_of_different_simulations_are_not_merged_where_it_does_not_pay():
    one = worker(1, together=False)
    pool = pool_of(one)
    pool.add(job("a", 16, 16), 0.0)
    pool.add(job("b", 16, 16), 0.0)
    assert given_to(pool.hand_out(0.0)) == {1: [2]}


def test_a_batch_never_costs_more_than_the_limit_but_for_one_structure():
    one = worker(1)
    pool = pool_of(one, max_cost=100)
    pool.add(job("a", 60, 30, 30, 300, 10), 0.0)
    costs = []
    for step in range(ENOUGH):
        given = pool.hand_out(float(step))
        if not given:
            break
        costs.append(given[0][1].cost)
        outcomes = answer(pool, one, step + 0.5)
    assert costs == [90, 30, 300, 10]
    assert np.array_equal(outcomes[0][1].forces, outcomes[0][0].structures.positions)


def steps_done(sizes, until, speed=1000.0, count=1):
    """Simulations that ask again at once; how many steps each has done, and its longest wait for one."""
    workers = [worker(k, speed, sizes=(1000, 16), together=False) for k in range(count)]
    pool = pool_of(*workers)
    done, longest, asked = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
    now = 0.0
    for who, size in sizes.items():
        pool.add(job(who, *size), now)
    while now < until:
        pool.hand_out(now)
        ends = {w: w.since + w.batch.cost / speed for w in workers if w.batch}
        first = min(ends, key=ends.get)
        now = ends[first]
        for ended, _ in answer(pool, first, now):
            who = ended.simulation
            done[who] += 1
            longest[who] = max(longest[who], now - asked[who])
            asked[who] = now
            pool.add(job(who, *sizes[who]), now)
    return done, longest


def test_a_small_simulation_is_not_stuck_behind_a_large_one_and_none_starves():
    """The large one takes 32 s, its structures 1 s each; the small one waits for one of them, not for all."""
    done, longest = steps_done({"large": [1000] * 32, "small": [16]}, 200.0)
    assert longest["small"] < 1.1
    assert done["small"] * 0.016 == pytest.approx(100, rel=0.1)  # half of the worker for each
    assert done["large"] * 32 == pytest.approx(100, abs=32)


def test_a_small_simulation_waits_for_a_moment_where_structures_are_small():
    done, longest = steps_done({"large": [16] * 2000, "small": [16]}, 70.0)
    assert longest["small"] < planning.QUANTUM + 0.05
    assert done["large"] == 1


def test_equal_simulations_progress_equally():
    done, _ = steps_done({who: [16] * 4 for who in "abcd"}, 20.0, count=3)
    assert max(done.values()) - min(done.values()) <= 1


def test_a_greedy_simulation_cannot_hold_back_another():
    """One with 20 times the work gets its share, half of the time; so does the other."""
    done, _ = steps_done({"large": [16] * 1000, "medium": [16] * 50}, 200.0)
    assert done["medium"] * 0.8 == pytest.approx(100, abs=5)
    assert done["large"] * 16.0 == pytest.approx(100, abs=17)


def test_a_worker_that_is_nearly_done_is_given_its_next_batch_already():
    """But not sooner, and only when there is work: what has been given cannot go to another any more."""
    one = worker(1, 100.0)
    pool = pool_of(one)
    pool.add(job("a", 16), 0.0)
    pool.hand_out(0.0)
    assert pool.pause(0.0, 0.1) == 0.1
    pool.add(job("b", 16), 0.01)
    pool.add(job("c", 16), 0.01)
    assert pool.hand_out(0.1) == []
    assert pool.pause(0.1, 0.1) == pytest.approx(0.06 - planning.AHEAD)
    ((_, batch),) = pool.hand_out(0.157)
    assert pool.hand_out(0.158) == []
    assert [j.simulation for j, _ in answer(pool, one, 0.16)] == ["a"]
    assert one.batch is batch
    assert one.since == 0.16
    pool.lose(one, "died")
    other = worker(2)
    pool.join(other, {"p": {}})
    done = []
    for now in range(1, 5):
        pool.hand_out(float(now))
        done += [j.simulation for j, _ in answer(pool, other, now + 0.5)] if other.batch else []
    assert sorted(done) == ["b", "c"]


def test_long_batches_are_not_merged():
    """Where a batch takes long anyway, merging would only make two simulations wait for each other."""
    one = worker(1, 1000.0)
    pool = pool_of(one)
    for who in "ab":
        pool.add(job(who, *[16] * 8), 0.0)
    assert given_to(pool.hand_out(0.0)) == {1: [8]}
    answer(pool, one, 0.128)
    quick = pool_of(worker(2, 100_000.0))
    for who in "ab":
        quick.add(job(who, *[16] * 8), 0.0)
    assert given_to(quick.hand_out(0.0)) == {2: [8, 8]}


def test_a_late_batch_is_given_to_an_idle_worker_too_and_the_first_answer_counts():
    slow, quick = worker(1, 100.0), worker(2, 100.0)
    pool = pool_of(slow, quick)
    asked = job("a", *[16] * 2)
    pool.add(asked, 0.0)
    pool.hand_out(0.0)
    answer(pool, quick, 0.16)
    assert pool.hand_out(1.0) == []  # not late yet
    ((helper, batch),) = pool.hand_out(module.LATE_LEAST + 3 * 0.16 + 0.1)
    assert helper is quick
    assert batch is slow.batch
    ((ended, results),) = answer(pool, quick, 3.0)
    assert np.array_equal(results.forces, ended.structures.positions)
    assert answer(pool, slow, 5.0, seconds=5.0) == []
    assert len(said(pool, "duplicate")) == len(said(pool, "late")) == 1
    assert slow.speeds["p", size_class(16)] < 100  # and what is learned of it is how slow it was


def test_what_waits_behind_a_worker_that_hangs_is_done_by_others():
    stuck = worker(1, 100.0)
    pool = pool_of(stuck)
    pool.add(job("a", 16), 0.0)
    pool.add(job("b", 16), 0.0)
    pool.hand_out(0.0)
    pool.hand_out(0.158)  # the next one is at hand already
    assert stuck.ahead is not None
    other = worker(2, 100.0)
    pool.join(other, {"p": {}})
    done = []
    for now in (5.0, 6.0, 7.0):
        pool.hand_out(now)
        done += [j.simulation for j, _ in answer(pool, other, now + 0.1)] if other.batch else []
    assert done == ["a", "b"]
    assert not pool.jobs


def test_a_structure_that_kills_two_workers_is_named_and_spares_the_others():
    """Merged with another simulation: only the guilty structure's force set fails, after two workers."""
    workers = [worker(k) for k in (1, 2, 3)]
    pool = pool_of(workers[0])
    pool.add(job("innocent", 16, 16), 0.0)
    guilty = job("guilty", 16, 16, 16)
    pool.add(guilty, 0.0)
    killer = guilty.structures.positions[16, 0]
    outcomes, killed = [], 0
    for now in range(100):
        for one, batch in pool.hand_out(float(now)):
            if (batch.structures.positions[:, 0] == killer).any():
                outcomes += pool.lose(one, "died")
                killed += 1
                if killed < 3:
                    pool.join(workers[killed], {"p": {}})
            else:
                outcomes += answer(pool, one, now + 0.5)
    assert killed == 2
    ended = {j.simulation: found for j, found in outcomes}
    assert isinstance(ended["guilty"], Fault)
    assert ended["guilty"].suspects == (1,)
    assert not isinstance(ended["innocent"], Fault)
    assert said(pool, "quarantined")[0]["places"] == [1]
    assert not pool.jobs


def test_a_batch_that_never_reached_a_worker_has_not_killed_it():
    """Workers that are dead already when they are given something: any number of them harms no force set."""
    pool = pool_of(worker(1))
    pool.add(job("a", 16), 0.0)
    ((one, _),) = pool.hand_out(0.0)
    pool.lose(one, "died")
    for k in (2, 3):
        pool.join(worker(k), {"p": {}})
        ((one, batch),) = pool.hand_out(float(k))
        assert pool.lose(one, "gone", unsent=batch) == []
    pool.join(worker(4), {"p": {}})
    ((one, _),) = pool.hand_out(5.0)
    assert [j.simulation for j, _ in answer(pool, one, 6.0)] == ["a"]


def test_what_one_simulation_asks_wrong_does_not_fail_another():
    one = worker(1)
    pool = pool_of(one)
    pool.add(job("good", 16), 0.0)
    pool.add(job("bad", 16), 0.0)
    outcomes = []
    for now in range(10):
        for w, batch in pool.hand_out(float(now)):
            if any(run.job.simulation == "bad" for run in batch.runs):
                outcomes += pool.failed(w, batch.number, Fault("unknown element", "none", final=True), now)
            else:
                outcomes += answer(pool, w, now + 0.5)
    ended = {j.simulation: found for j, found in outcomes}
    assert isinstance(ended["bad"], Fault)
    assert not isinstance(ended["good"], Fault)


def test_nobody_computes_for_a_door_that_has_gone():
    pool = pool_of(worker(1, 10.0))
    pool.add(job("a", *[16] * 8), 0.0)
    pool.tidy(module.SILENCE - 1)
    assert pool.jobs
    pool.tidy(module.SILENCE + 1)
    assert not pool.jobs
    assert pool.hand_out(module.SILENCE + 1) == []
    assert said(pool, "abandoned")


def test_what_the_queue_remembers_of_those_who_have_left_is_bounded():
    one = worker(1)
    pool = pool_of(one)
    for k in range(300):
        pool.add(job(f"short-{k}", 16), float(k))
        pool.hand_out(float(k))
        answer(pool, one, k + 0.5)
        pool.tidy(k + 0.6)
    assert len(pool._queue) < 20


@pytest.mark.parametrize("lost", [None, 1, 2])
def test_in_deterministic_mode_the_batches_are_the_same_whatever_happens(lost):
    workers = [worker(k, 100.0 * k) for k in (1, 2, 3)]
    pool = pool_of(*workers, parts=4)
    pool.add(job("a", *[16] * 10), 0.0)
    pool.add(job("b", *[16] * 3), 0.0)
    seen = set()
    for now in range(20):
        for one, batch in pool.hand_out(float(now)):
            assert len(batch.runs) == 1
            run = batch.runs[0]
            seen.add((run.job.simulation, run.first, run.last))
            if one.index == lost:
                pool.lose(one, "died")
            else:
                answer(pool, one, now + 0.5)
    assert not pool.jobs
    assert seen == {("a", 0, 3), ("a", 3, 6), ("a", 6, 9), ("a", 9, 10)} | {("b", k, k + 1) for k in range(3)}


# ---- anything may happen ------------------------------------------------------------------------------


class Disorder:
    """Random simulations, workers and failures, one event at a time."""

    def __init__(self, rng, parts):
        self.rng = rng
        self.now = 0.0
        self.pool = pool_of(max_cost=200, parts=parts)
        self.asked = {}
        self.answers = {}
        self.deaths = {}
        self.failures = {}
        self.indices = itertools.count(1)

    def ask(self):
        sizes = [self.rng.choice([1, 16, 60, 250])] * self.rng.randint(1, 12)
        if self.rng.random() < 0.3:
            sizes = [self.rng.randint(1, 40) for _ in sizes]
        asked = job(self.rng.choice("abcde"), *sizes, potential=self.rng.choice("pq"))
        self.asked[asked.request] = asked
        self.pool.add(asked, self.now)

    def arrive(self):
        potentials = self.rng.choice([("p",), ("q",), ("p", "q"), ("p", "q")])
        one = worker(next(self.indices), None, potentials, together=self.rng.random() < 0.5)
        self.pool.join(one, {name: {"cutoff": self.rng.choice([0.0, 3.0])} for name in potentials})

    def anyone(self, busy):
        able = [w for w in self.pool.workers.values() if (w.batch is not None) is busy]
        return self.rng.choice(able) if able else None

    def keep(self, outcomes):
        for ended, found in outcomes:
            assert ended.request not in self.answers, "answered twice"
            self.answers[ended.request] = found
            if not isinstance(found, Fault):
                assert np.array_equal(found.forces, ended.structures.positions)
                assert np.array_equal(found.energy, toy(ended.structures).energy)

    def finish(self):
        if one := self.anyone(busy=True):
            self.keep(answer(self.pool, one, self.now))
            if one.leaving:
                self.pool.leave(one)

    def stale(self):
        if one := self.anyone(busy=True):
            arrays = results_to_arrays(toy(structures(3)))
            assert self.pool.done(one, one.batch.number + 10**6, arrays, 1.0, self.now) == []

    def fail(self):
        if one := self.anyone(busy=True):
            for run in one.batch.wanted:
                self.failures[run.job.request] = self.failures.get(run.job.request, 0) + 1
            self.keep(self.pool.failed(one, one.batch.number, Fault("staged", "none"), self.now))

    def die(self):
        if one := self.rng.choice(list(self.pool.workers.values()) or [None]):
            for run in one.batch.wanted if one.batch else ():
                self.deaths[run.job.request] = self.deaths.get(run.job.request, 0) + 1
            self.keep(self.pool.lose(one, "died"))

    def drain(self):
        if one := self.rng.choice(list(self.pool.workers.values()) or [None]):
            self.pool.leave(one)

    def hand_out(self):
        before = {w.identity for w in self.pool.workers.values() if w.ahead is None and not w.leaving}
        for one, batch in self.pool.hand_out(self.now):
            assert one.identity in before
            assert batch.potential in one.forms
            assert len(batch.structures) == 1 or batch.cost <= 200 or self.pool._parts
            assert len({run.job.potential for run in batch.runs}) == 1

    def check(self):
        """Every structure that is waited for is with a worker, or waits, exactly once."""
        for asked in self.pool.jobs.values():
            everyone = self.pool.workers.values()
            held = {id(b): b for w in everyone for b in (w.batch, w.ahead) if b}.values()
            at_work = [run for batch in held if not batch.answered for run in batch.runs if run.job is asked]
            places = [k for run in [*asked.todo, *at_work] for k in range(run.first, run.last)]
            for first, part in asked.parts.items():
                places += range(first, first + len(part))
            assert sorted(places) == list(range(len(asked.structures)))


@settings(max_examples=60, deadline=None)
@given(rng=st.randoms(use_true_random=False), parts=st.sampled_from([0, 0, 3]))
def test_whatever_happens_every_structure_is_answered_once_and_in_order(rng, parts):
    chaos = Disorder(rng, parts)
    chaos.arrive()
    events = ["ask", "finish", "finish", "hand_out", "hand_out", "arrive", "die", "fail", "drain", "stale"]
    for _ in range(rng.randint(10, 120)):
        chaos.now += rng.choice([0.0, 0.01, 0.3, 4.0])
        getattr(chaos, rng.choice(events))()
        chaos.check()
    # From here on all goes well: everything that is still asked gets its answer.
    for potentials in (("p",), ("q",)):
        chaos.pool.join(worker(next(chaos.indices), None, potentials), {potentials[0]: {}})
    for _ in range(ENOUGH):
        if not chaos.pool.jobs:
            break
        chaos.now += 1.0
        chaos.hand_out()
        chaos.finish()
        chaos.check()
    assert not chaos.pool.jobs
    assert set(chaos.answers) == set(chaos.asked)
    for request, found in chaos.answers.items():
        if isinstance(found, Fault):  # only for a reason
            assert max(chaos.deaths.get(request, 0), chaos.failures.get(request, 0)) >= 2
