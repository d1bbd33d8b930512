"""Runs that fail, live, stop and go on: real i-PI simulations over pools of toy potentials."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from conftest import ROOT
from springs import spring_pool

from nnqmd_server.errors import InputError, NnqmdError
from nnqmd_server.fidelity import study
from nnqmd_server.fidelity.criteria import Criteria, Watch, judge_temperature, temperature_limit
from nnqmd_server.fidelity.simulation import Case, Protocol, advance, outcome, supercell
from nnqmd_server.fidelity.structure import read_structure
from nnqmd_server.structures import Results

CELL = read_structure(str(ROOT / "examples/ammonia/phase1.xyz"))


class Flight:
    """No forces: molecules fall apart, and atoms meet sooner or later. ``spoil`` may change a result."""

    def __init__(self, spoil=lambda results, call: None):
        self.spoil, self.calls = spoil, 0

    def __call__(self, structures):
        results = Results(
            np.zeros(len(structures)),
            np.zeros_like(structures.positions),
            np.zeros((len(structures), 3, 3)),
            {"dipole": np.zeros((len(structures), 3))},
        )
        self.spoil(results, self.calls)
        self.calls += 1
        return results


def nan_at_7(results, call):
    if call >= 7:  # a second try gives the same
        results.energy[0] = np.nan


def push_at_5(results, call):
    if call == 5:
        results.forces[3, 1] = 150.0


def jump_at_6(results, call):
    if call >= 6:
        results.energy[-1] = 40.0


def one_run(pool, folder, case=None, **changes):
    case = case or Case("springs", 16, 2, 3)
    settings = {"temperature": 300.0, "timestep": 0.5, "steps": 40} | changes
    protocol = Protocol(**settings)
    return advance(
        case, supercell(CELL, case.atoms), protocol, folder, pool.address, threading.Event(), lambda *_: None
    )


@pytest.mark.parametrize(
    ("spoil", "step", "criterion", "words"),
    [
        (nan_at_7, 7, "not finite", "energy that is not finite"),
        (push_at_5, 5, "force", "on H, atom 3 of bead 0"),
        (jump_at_6, 6, "energy jump", "bead 1"),
    ],
)
def test_what_goes_wrong_is_named_with_its_step(tmp_path, spoil, step, criterion, words):
    with spring_pool(tmp_path / "pool", evaluate=Flight(spoil)) as pool:
        found = one_run(pool, tmp_path / "run")
    assert (found.step, found.failure.step) == (step, step)
    assert found.failure.criterion == criterion
    assert words in found.failure.words()


def test_a_study_keeps_its_results_and_does_nothing_twice(tmp_path):
    """Free flight ends when atoms meet; a limit that few reach leaves some runs censored."""
    protocol = Protocol(300.0, 1.0, 60, criteria=Criteria(distance_factor=0.75))
    cases = study.make_cases(["springs"], [16, 32], [1, 2], [1, 2])
    assert len(cases) == 8
    flight, seen = Flight(), []
    with spring_pool(tmp_path / "pool", evaluate=flight) as pool:
        study.claim(tmp_path, CELL, protocol)

        def go(which):
            tell = lambda done, steps: seen.append(len(done))  # noqa: E731
            settings = ({"springs": "ab" * 32}, CELL, protocol, tmp_path, pool.address, 3, tell)
            return set(study.run_study(which, *settings))

        first = go(cases[:6])
        calls = flight.calls
        assert go(cases[:6]) == first
        path = tmp_path / study.RESULTS
        path.write_text(path.read_text()[:-20])  # a command that was killed while it wrote a line
        again = go(cases[:6])
        assert {(r.case, r.steps, r.failure) for r in again} == {(r.case, r.steps, r.failure) for r in first}
        assert flight.calls == calls  # nothing was simulated again
        records = go(cases)
    assert max(seen) == len(records) == 8
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8
    for record in records:
        assert record.steps == 60 or (record.failed and record.criterion == "distance")
        assert record.time_fs == record.steps * 1.0
        assert record.failed == bool(record.failure)
    assert any(record.failed for record in records)
    series = study.by_series(records)
    assert [(one.beads, len(one.times)) for one in series] == [(1, 4), (2, 4)]
    with pytest.raises(InputError, match=r"temperature_K is 310.0 and was 300.0"):
        study.claim(tmp_path, CELL, Protocol(310.0, 1.0, 60, criteria=protocol.criteria))
    study.claim(tmp_path, CELL, Protocol(300.0, 1.0, 90, criteria=protocol.criteria))  # may be made longer


def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_been(tmp_path):
    """Stopped softly in the middle, and made longer when it is done: the same temperatures."""
    wide = Criteria(temperature_window=1e9, max_force=1e6, max_jump=1e6, distance_factor=0.01)
    case = Case("springs", 16, 2, 5)
    cell = supercell(CELL, 16)
    with spring_pool(tmp_path / "pool", delay=0.02) as pool:

        def go(folder, steps, stop=None, tell=lambda *_: None):
            protocol = Protocol(100.0, 0.5, steps, criteria=wide)
            return advance(case, cell, protocol, folder, pool.address, stop or threading.Event(), tell)

        whole = go(tmp_path / "whole", 120)
        assert (whole.step, whole.failure) == (120, None)
        stop = threading.Event()
        found = go(tmp_path / "cut", 100, stop, lambda _, step: step >= 20 and stop.set())
        assert found is None
        reached = outcome(tmp_path / "cut", case, Protocol(100.0, 0.5, 100, criteria=wide)).step
        assert 20 <= reached < 100
        assert go(tmp_path / "cut", 100).step == 100
        assert go(tmp_path / "cut", 120).step == 120
    rows = [
        np.concatenate([np.loadtxt(p / "run.out") for p in sorted(folder.glob("piece-*"))])
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert len(list((tmp_path / "cut").glob("piece-*"))) == 3
    for row in rows[1]:
        assert row == pytest.approx(rows[0][int(row[0]) // 10], rel=1e-6)


def test_a_temperature_outside_its_window_fails_at_the_step_that_was_printed(tmp_path):
    """Springs to the origin pull a crystal together: potential energy turns into heat."""
    hot = Criteria(settle=0.0, distance_factor=0.01, max_jump=1e6)
    with spring_pool(tmp_path / "pool") as pool:
        found = one_run(pool, tmp_path / "run", steps=400, criteria=hot)
    limit = temperature_limit(hot, 300.0, 16, 2)
    printed = np.loadtxt(tmp_path / "run/piece-1/run.out")
    first = next(row for row in printed if abs(row[2] - 300.0) > limit)
    assert found.failure.criterion == "temperature"
    assert (found.step, found.failure.value) == (first[0], pytest.approx(first[2]))


def test_a_simulation_that_breaks_is_no_failure_of_the_model(tmp_path):
    """A potential that the pool has not says nothing about a model: an error, and no line in the results."""
    protocol = Protocol(300.0, 0.5, 40)
    with spring_pool(tmp_path / "pool") as pool:
        study.claim(tmp_path, CELL, protocol)
        with pytest.raises(NnqmdError, match="asks for the potential nothing"):
            study.run_study(
                [Case("nothing", 16, 1, 1)],
                {"nothing": ""},
                CELL,
                protocol,
                tmp_path,
                pool.address,
                1,
                lambda *_: None,
            )
    assert study.read_results(tmp_path) == []


def test_criteria_look_at_pairs_by_their_own_limit():
    numbers = np.array([7, 1, 1])
    cell = np.eye(3)[None] * 8.0
    places = np.array([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])[None]
    watch = Watch(Criteria(distances={"H-N": 0.9}), numbers)
    assert watch.positions(0, cell, places) is None
    moved = places.copy()
    moved[0, 1, 0] = 0.8
    found = watch.positions(4, cell, moved)
    assert (found.criterion, found.limit, found.step) == ("distance", 0.9, 4)
    assert found.value == pytest.approx(0.8)
    assert "N-H, atoms 0 and 1" in found.detail or "H-N, atoms 1 and 0" in found.detail
    assert Watch(Criteria(), numbers).positions(4, cell, moved) is None  # 0.6 x 1.02 A
    across = places.copy()
    across[0, 2] = [-7.4, 0.0, 0.0]  # its image is 0.6 A from the nitrogen
    assert watch.positions(0, cell, across).criterion == "distance"
    assert watch.positions(0, cell, np.full_like(places, np.nan)).criterion == "not finite"
    assert watch.positions(0, cell, places * 1e7).criterion == "not finite"


def test_the_window_is_never_narrower_than_what_a_healthy_system_does():
    """16 atoms at 200 K leave a window of 100 K by themselves; 3456 do not."""
    criteria = Criteria()
    assert temperature_limit(criteria, 200.0, 16, 1) == pytest.approx(6 * 200 * np.sqrt(2 / 45))
    assert temperature_limit(criteria, 200.0, 3456, 1) == 100.0
    rng = np.random.default_rng(1)
    kelvin = 200.0 * rng.chisquare(45, 20000) / 45
    steps = np.arange(len(kelvin)) * 10
    narrow = Criteria(temperature_sigmas=0.0)
    limits = [temperature_limit(c, 200.0, 16, 1) for c in (narrow, criteria)]
    assert judge_temperature(steps, kelvin, narrow, 200.0, limits[0], 0.5) is not None
    assert judge_temperature(steps, kelvin, criteria, 200.0, limits[1], 0.5) is None
    kelvin[700] = np.nan
    assert judge_temperature(steps, kelvin, criteria, 200.0, limits[1], 0.5).step == 7000
    early = np.array([600.0, 200.0])
    assert judge_temperature(steps[:2], early, criteria, 200.0, limits[1], 0.5) is None


def test_supercells_are_as_near_to_a_cube_as_can_be():
    for atoms, shape in ((16, (1, 1, 1)), (64, (2, 2, 1)), (128, (2, 2, 2)), (432, (3, 3, 3))):
        assert supercell(CELL, atoms).cell.lengths() == pytest.approx(5.13 * np.sort(shape)[::-1])
    with pytest.raises(InputError, match=r"100 atoms are not a multiple of the 16") as error:
        supercell(CELL, 100)
    assert "96 or 112" in error.value.fix


def test_structures_are_read_with_their_cell(tmp_path):
    whole = read_structure(str(ROOT / "ipi_inputs/ammonia-solid-trpmd/init.xyz"))
    assert whole.cell.lengths() == pytest.approx([10.26, 10.26, 5.13])
    assert len(read_structure(f"{ROOT}/examples/ammonia/data/ammonia_train.xyz@-1")) == 32
    (tmp_path / "bare.xyz").write_text("1\n\nN 0 0 0\n")
    with pytest.raises(InputError, match="no periodic cell"):
        read_structure(str(tmp_path / "bare.xyz"))
    with pytest.raises(InputError, match="There is no structure file"):
        read_structure("nowhere.xyz@3")
