"""Recordings: what was asked is in the file, and a pool that is asked it again answers the same."""

from __future__ import annotations

import json
import pickle
import time

import numpy as np
import pytest
from conftest import crystal
from typer.testing import CliRunner
from watching import BEADS, side_by_side, toy_pool, wait_until

from nnqmd_server.cli import app
from nnqmd_server.errors import DataError, InputError, OutputError, StructureError
from nnqmd_server.pool.messages import LARGE
from nnqmd_server.pool.recording import FIRST_LINE, Recorder, read_recording
from nnqmd_server.pool.replay import replay
from nnqmd_server.structures import from_ase, replicas


def sets_of(seed, count=5, beads=4):
    cell = crystal(repeat=(1 + seed % 2, 1, 1))
    rng = np.random.default_rng(seed)
    shape = count, beads, len(cell), 3
    positions = cell.positions + rng.normal(scale=0.05, size=shape)
    cells = np.tile(cell.cell.array, (beads, 1, 1))
    return [replicas(cell.numbers, beads_of_set, cells) for beads_of_set in positions]


@pytest.fixture
def recorded(tmp_path):
    """A recording of two simulations, and what they asked."""
    asked = {"one": sets_of(100), "other": sets_of(201, 3)}
    with toy_pool(tmp_path) as made:
        made.add(1)
        made.add(2)
        recorder = Recorder(tmp_path / "real.nnqmd", lambda: made.pool.status().cards)
        made.pool.record = recorder

        def simulate(name):
            client = made.client(name)
            for structures in asked[name]:
                client.submit(structures)

        side_by_side(lambda: simulate("one"), lambda: simulate("other"))
    recorder.close()
    assert (recorder.written, recorder.left_out, recorder.trouble) == (8, 0, "")
    return tmp_path / "real.nnqmd", asked


@pytest.fixture
def again(tmp_path):
    """Another pool, to play at."""
    (tmp_path / "again").mkdir()
    with toy_pool(tmp_path / "again") as made:
        yield made


def test_a_recording_holds_what_was_asked_and_answered(recorded):
    path, asked = recorded
    recording = read_recording(path)
    assert not recording.cut_off
    assert recording.cards["toy"]["sha256"] == "a" * 64
    for name, sets in asked.items():
        mine = [r for r in recording.requests if r.name == name]
        assert len(mine) == len(sets)
        for request, structures in zip(mine, sets, strict=True):
            found = recording.structures(request)
            assert np.array_equal(found.positions, structures.positions)
            assert np.array_equal(found.cells, structures.cells)
            assert np.array_equal(found.numbers, structures.numbers)
            # the toy's forces are the positions: what is recorded is the answer to this very request
            assert np.array_equal(recording.results(request, found).forces, structures.positions)
            assert request.ended >= request.time


def test_large_force_sets_are_recorded_as_they_were(tmp_path):
    """Their positions lie in memory that the door uses again for its next force set; the disk is slow."""
    with toy_pool(tmp_path) as made:
        made.add(1)
        made.pool.record = recorder = Recorder(tmp_path / "large.nnqmd", lambda: made.pool.status().cards)
        write = recorder._write
        recorder._write = lambda message: time.sleep(0.05) or write(message)
        client = made.client()
        client.card()
        asked = sets_of(301, 6, 64)
        assert asked[0].positions.nbytes > 2 * LARGE
        for structures in asked:
            client.submit(structures)
        made.pool.record = None
        recorder.close()
    recording = read_recording(tmp_path / "large.nnqmd")
    for request, structures in zip(recording.requests, asked, strict=True):
        found = recording.structures(request)
        assert np.array_equal(found.positions, structures.positions)
        assert np.array_equal(recording.results(request, found).forces, structures.positions)


@pytest.mark.parametrize("recorded_pace", [False, True])
def test_a_pool_that_is_asked_again_answers_the_same(recorded, again, recorded_pace):
    path, _ = recorded
    worker = again.add(1)
    report = replay(read_recording(path), again.address, recorded_pace=recorded_pace, compare=True)
    figures = report.figures()
    assert sum(worker.shares) == 5 * 4 + 3 * 4
    assert (figures["force_sets"], figures["structures"], figures["failed"]) == (8, 32, 0)
    assert (figures["difference.force_sets"], figures["difference.identical"]) == (8, 8)
    assert figures["difference.forces"] == figures["difference.energy"] == 0.0
    assert report.other_models == []
    if recorded_pace:
        recording = read_recording(path)
        last = max(r.time for r in recording.requests) - min(r.time for r in recording.requests)
        assert report.seconds >= last


def test_differences_are_measured(recorded, again, tmp_path):
    path, _ = recorded

    def spoil(answer):
        answer.arrays["forces"] = answer.arrays["forces"] + [0.0, 0.0, 0.25]
        answer.arrays["energy"] = answer.arrays["energy"] - 0.5
        return answer

    again.add(1, spoil=spoil, card={"name": "new", "sha256": "b" * 64, "properties": [], "elements": ["N"]})
    report = replay(read_recording(path), again.address, compare=True)
    found = report.differences
    assert report.other_models == ["toy"]
    assert (found.force_sets, found.identical) == (8, 0)
    assert found.forces == pytest.approx(0.25, abs=1e-12)
    assert found.forces_rms == pytest.approx(0.25 / 3**0.5, abs=1e-12)
    assert found.energy == pytest.approx(0.5, abs=1e-9)
    assert found.energy_per_atom == pytest.approx(0.5 / 16, abs=1e-9)  # of the smallest structure
    assert found.virial == 0.0
    # and from the command line, with an exit status for scripts
    figures = tmp_path / "figures.json"
    options = ["replay", str(path), "--pool", again.address, "--json", str(figures)]
    ran = CliRunner().invoke(app, [*options, "--compare", "--tolerance", "0.2"])
    assert ran.exit_code == 3
    assert "0.25" in ran.output
    assert "another model" in ran.output
    assert CliRunner().invoke(app, [*options, "--compare", "--tolerance", "0.3"]).exit_code == 0
    assert CliRunner().invoke(app, options).exit_code == 0
    flat = json.loads(figures.read_text())
    assert flat["force_sets"] == 8
    assert flat["answer_ms.median"] > 0
    assert not any(isinstance(value, dict) for value in flat.values())


def test_a_failure_is_recorded_and_found_again(tmp_path):
    """What a bug report is for: the structure that failed is in the file."""

    def spoil(answer):
        forces = answer.arrays["forces"].copy()
        if np.abs(forces).max() > 500:
            forces[0] = np.nan
        answer.arrays["forces"] = forces
        return answer

    wild = from_ase([crystal(seed=3)])
    wild.positions[0] = 600.0
    with toy_pool(tmp_path) as made:
        made.add(1, spoil=spoil)
        made.pool.record = recorder = Recorder(tmp_path / "bug.nnqmd", lambda: made.pool.status().cards)
        client = made.client("wild")
        client.submit(BEADS)
        with pytest.raises(StructureError, match="not finite"):
            client.submit(wild)
        wait_until(lambda: recorder._waiting.empty())
        made.pool.record = None
        recorder.close()
        recording = read_recording(tmp_path / "bug.nnqmd")
        assert [r.failure is None for r in recording.requests] == [True, False]
        report = replay(recording, made.address)
        assert (report.simulations[0].failed, len(report.simulations[0].seconds)) == (1, 1)
        made.workers[0].spoil = lambda answer: spoil_all(answer)
        with pytest.raises(StructureError, match="wild, force set 1"):
            replay(recording, made.address)  # fails where it did not fail when recorded


def spoil_all(answer):
    answer.arrays["forces"] = answer.arrays["forces"] * np.nan
    return answer


def test_a_recording_that_ends_in_the_middle_is_read_as_far_as_it_goes(recorded, tmp_path):
    path, _ = recorded
    whole = path.read_bytes()
    counts = []
    for part in (0.3, 0.7, 0.99):
        short = tmp_path / f"short-{part}"
        short.write_bytes(whole[: int(part * len(whole))])
        recording = read_recording(short)
        assert recording.cut_off
        counts.append(len(recording.requests))
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] <= 8


def test_what_is_no_recording_is_refused(tmp_path, recorded):
    path, _ = recorded
    whole = path.read_bytes()
    wrong = {
        "pickle": pickle.dumps({"forces": [1, 2, 3]}),
        "empty": b"",
        "huge": FIRST_LINE + b"\x02\x00\x00\x00" + b"\xff" * 16,
        "frames": FIRST_LINE + b"\xff\xff\xff\xff",
        "other": FIRST_LINE + b"\x01\x00\x00\x00" + (12).to_bytes(8, "little") + b"not a header",
        "bits": whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:],
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"no recording|from byte"):
            read_recording(tmp_path / name)
    with pytest.raises(DataError, match="Cannot read"):
        read_recording(tmp_path / "nobody")


def test_the_file_is_bounded_and_never_replaced(tmp_path):
    path = tmp_path / "small.nnqmd"
    one = sum(a.nbytes for a in (BEADS.numbers, BEADS.positions, BEADS.cells, BEADS.offsets))
    with toy_pool(tmp_path) as made:
        made.add(1)
        recorder = Recorder(path, lambda: made.pool.status().cards, max_bytes=5 * one)
        made.pool.record = recorder
        client = made.client()
        for _ in range(10):
            client.submit(BEADS)
        made.pool.record = None
        recorder.close()
        with pytest.raises(OutputError, match="there already"):
            Recorder(path, dict)
    assert path.stat().st_size <= 5 * one
    assert recorder.full
    assert 1 <= recorder.written < 10
    assert recorder.written + recorder.left_out == 10
    assert len(read_recording(path).requests) == recorder.written


def test_a_pool_without_the_potential_is_an_error(recorded, again):
    path, _ = recorded
    again.add(1, name="left")
    again.add(2, name="right")
    with pytest.raises(InputError, match=r"asks for 'toy'; the pool has left, right"):
        replay(read_recording(path), again.address)
