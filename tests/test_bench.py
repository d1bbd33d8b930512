"""`nnqmd bench`: the ring polymers that it evaluates, what it measures, what it says, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from conftest import INPUT, MODEL, crystal
from typer.testing import CliRunner

from nnqmd_server.cli import app
from nnqmd_server.cli.terminal import console
from nnqmd_server.errors import (
    InputError,
    ModelError,
    OutputError,
    PoolError,
    ProgramError,
    UnknownElementError,
)
from nnqmd_server.inputs.forecast import Question, counts_to_try, shares
from nnqmd_server.inputs.own_time import own_time
from nnqmd_server.inputs.start import read_start
from nnqmd_server.pool.sizing import WorkerTime, best, time_in_process, time_workers, worker_counts
from nnqmd_server.potentials.einstein import WAVENUMBER, ring_modes, ring_polymers, spreads
from nnqmd_server.potentials.timing import BatchTime, answer, batches_up_to
from nnqmd_server.structures import from_ase
from nnqmd_server.units import AMU_A2_PER_FS2, EV_PER_INVCM, HBAR, KB

ODD = Path(__file__).with_name("odd_potentials.py")
QUICK = f"{ODD}:quick"

# A potential that says where its time goes: three quarters of it is its model
TELLS = """
import time
import numpy as np
from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results

class Tells:
    card, form = Card("tells", "0" * 64, ("N", "H"), 0.0, "float64"), "sleeps"
    spent, timing = {"lists": 0.0, "copies": 0.0, "model": 0.0}, False

    def evaluate(self, structures):
        start = time.perf_counter()
        time.sleep(0.005)
        spent = time.perf_counter() - start
        for name, part in (("lists", 0.125), ("copies", 0.125), ("model", 0.75)):
            self.spent[name] += part * spent
        n = len(structures)
        return Results(np.zeros(n), np.zeros((structures.n_atoms, 3)), np.zeros((n, 3, 3)))

def tells(device):
    return Tells()

def dies(device):
    import os
    print("last words", file=__import__("sys").stderr, flush=True)
    os._exit(7)

class Fails(Tells):
    def evaluate(self, structures):
        raise ValueError("no such thing")

def fails(device):
    return Fails()
"""


def rings(n_beads=4, temperature=300.0):
    return Question(QUICK, from_ase([crystal()]), n_beads, temperature=temperature).rings


@pytest.mark.parametrize("n_beads", [1, 2, 3, 8, 13])
def test_ring_modes_are_orthonormal_and_begin_with_the_centroid(n_beads):
    modes = ring_modes(n_beads)
    assert modes @ modes.T == pytest.approx(np.eye(n_beads), abs=1e-12)
    assert modes[0] == pytest.approx(np.full(n_beads, n_beads**-0.5))


def test_ring_modes_diagonalise_the_springs_between_neighbours():
    modes = ring_modes(9)
    springs = 2 * np.eye(9) - np.roll(np.eye(9), 1, axis=0) - np.roll(np.eye(9), -1, axis=0)
    expected = 4 * np.sin(np.arange(9) * np.pi / 9) ** 2
    assert modes @ springs @ modes.T == pytest.approx(np.diag(expected), abs=1e-12)


@pytest.mark.parametrize(("mass", "temperature"), [(1.008, 100.0), (1.008, 300.0), (14.007, 50.0)])
def test_many_beads_are_as_wide_as_the_quantum_oscillator(mass, temperature):
    omega = WAVENUMBER * EV_PER_INVCM / HBAR * np.sqrt(1.008 / mass)
    exact = HBAR / (2 * mass * omega * AMU_A2_PER_FS2) / np.tanh(HBAR * omega / (2 * KB * temperature))
    classical = KB * temperature / (mass * omega**2 * AMU_A2_PER_FS2)
    width, ring = spreads(mass, 512, temperature)
    assert width**2 == pytest.approx(exact, rel=1e-3)
    assert ring**2 == pytest.approx(exact - classical, rel=1e-3)


def test_drawn_beads_have_these_widths_at_every_time():
    n = 4000
    places = np.random.default_rng(1).uniform(0, 50, (n, 3))
    drawn = ring_polymers(np.ones(n), np.full(n, 1.008), places, 50 * np.eye(3), 6, 200.0, seed=2)
    width, ring = spreads(1.008, 6, 200.0)
    for time in (0.0, 3.7, 800.0):
        beads = drawn.at(time).positions.reshape(6, n, 3) - places
        assert beads.std() == pytest.approx(width, rel=0.03)
        assert (beads - beads.mean(axis=0)).std() == pytest.approx(ring, rel=0.03)


def test_the_centroid_oscillates_with_the_frequency_of_the_spring():
    drawn = ring_polymers(np.array([1]), np.array([1.008]), np.zeros((1, 3)), 9 * np.eye(3), 4, 300.0)
    centroid = [drawn.at(t).positions.mean(axis=0) for t in (5.0 - 0.01, 5.0, 5.0 + 0.01)]
    acceleration = (centroid[0] - 2 * centroid[1] + centroid[2]) / 0.01**2
    omega = WAVENUMBER * EV_PER_INVCM / HBAR
    assert acceleration == pytest.approx(-(omega**2) * centroid[1], rel=1e-4)


def test_batches_and_workers_that_are_tried():
    assert batches_up_to(1) == [1]
    assert batches_up_to(12) == [1, 2, 4, 8, 12]
    assert batches_up_to(32) == [1, 2, 4, 8, 16, 32]
    assert worker_counts(1) == [1]
    assert worker_counts(6) == [1, 2, 3, 4, 6]
    assert worker_counts(48) == [1, 2, 3, 4, 8, 16, 32, 48]
    assert max(counts_to_try("cpu", 1)) == 1


def test_the_fewest_workers_that_are_as_fast_are_the_best():
    times = [WorkerTime(1, [30.0, 31.0]), WorkerTime(2, [16.0]), WorkerTime(3, [15.8]), WorkerTime(4, [19.0])]
    assert best(times).workers == 2


def said_by(source, seconds=0.5, **options):
    lines = []
    request = {"source": source, "device": "cpu", "compiled": False, "seconds": seconds}
    rest = vars(rings(**options))
    answer(request | {"rings": rest}, lambda kind, **fields: lines.append((kind, fields)))
    return lines


def test_a_potential_is_timed_batch_by_batch(tmp_path):
    (tmp_path / "tells.py").write_text(TELLS)
    lines = said_by(f"{tmp_path / 'tells.py'}:tells", seconds=6.0, n_beads=6)
    assert [kind for kind, _ in lines] == ["loaded", "batch", "batch", "batch", "batch", "end"]
    found = [BatchTime(**fields) for kind, fields in lines if kind == "batch"]
    assert [one.batch for one in found] == [1, 2, 4, 6]
    for one in found:
        assert len(one.milliseconds) >= 3
        assert one.per_bead * one.batch >= 5
        parts = shares(one)
        assert sum(parts.values()) == pytest.approx(1.0)
        assert parts["model"] == pytest.approx(6 * parts["lists"])
        assert one.memory_mb > 10


def test_batches_that_take_too_long_are_left_out():
    lines = said_by(f"{ODD}:slow", seconds=1.0, n_beads=4)  # half a second for each batch
    assert [fields["batch"] for kind, fields in lines if kind == "batch"] == [1]
    assert lines[-1][0] == "end"


def test_a_potential_that_fails_says_how(tmp_path):
    (tmp_path / "tells.py").write_text(TELLS)
    (kind, fields) = said_by(f"{tmp_path / 'tells.py'}:fails")[-1]
    assert kind == "error"
    assert "no such thing" in fields["what"]


def test_errors_of_the_process_arrive_here(tmp_path):
    (tmp_path / "tells.py").write_text(TELLS)
    log = tmp_path / "log"
    with pytest.raises(ModelError, match="no such thing"):
        list(time_in_process(f"{tmp_path / 'tells.py'}:fails", "cpu", False, rings(), 0.2, log))
    with pytest.raises(ModelError, match=r"ended \(status 7\): last words"):
        list(time_in_process(f"{tmp_path / 'tells.py'}:dies", "cpu", False, rings(), 0.2, log))
    with pytest.raises(ModelError, match="cannot be loaded"):
        list(time_in_process(f"{tmp_path / 'tells.py'}:nothing", "cpu", False, rings(), 0.2, log))


def test_a_worker_that_ends_is_an_error(tmp_path):
    (tmp_path / "tells.py").write_text(TELLS)
    timed = time_workers(
        f"{tmp_path / 'tells.py'}:dies", "cpu", False, rings(), [1], 0.2, tmp_path / "logs", lambda _: None
    )
    with pytest.raises(PoolError, match="A worker ended while it was loading"):
        list(timed)


def test_ipi_alone_takes_time_and_a_limit():
    atoms = crystal()
    assert own_time(atoms.numbers, atoms.positions, 2, steps=30) > 0
    with pytest.raises(ProgramError, match="did not do"):
        own_time(atoms.numbers, atoms.positions, 2, limit=0.05)
    with pytest.raises(ProgramError, match="i-PI alone failed"):
        own_time(atoms.numbers, atoms.positions, 0)


def test_structures_of_every_kind(tmp_path):
    start = read_start(INPUT)
    assert (start.n_beads, start.timestep, start.temperature) == (8, 0.5, 100.0)
    assert start.structure.n_atoms == 64
    assert start.structure.cells[0] == pytest.approx(np.diag([10.26, 10.26, 5.13]))
    assert start.structure.positions[0] == pytest.approx([1.080891] * 3, abs=1e-9)
    same = read_start(INPUT.with_name("init.xyz"))
    assert np.array_equal(same.structure.positions, start.structure.positions)
    assert same.n_beads is None
    write(tmp_path / "two.extxyz", [crystal(seed=1), crystal(seed=2)])
    last = read_start(tmp_path / "two.extxyz").structure
    assert last.positions == pytest.approx(crystal(seed=2).positions, abs=1e-7)


def invoke(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_bench_of_a_python_potential(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("cell.extxyz", crystal())
    options = ["--beads", 4, "--seconds", 2, "--workers", 2, "--timestep", 0.25, "--json", "bench.json"]
    with console.capture() as printed:
        ran = invoke(QUICK, "cell.extxyz", *options)
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("bench.json").read_text())
    assert (found["atoms"], found["beads"], found["timestep_fs"]) == (16, 4, 0.25)
    assert {"ms_per_bead.1", "ms_per_bead.2", "ms_per_bead.4"} <= set(found)
    assert "model_share.1" not in found  # it does not tell
    for batch in (1, 2, 4):
        assert found[f"ms_per_bead.{batch}"] >= 2
    assert found["best_workers"] in {1, 2}
    per_set = found[f"ms_per_set.workers{found['best_workers']}"]
    assert per_set >= 2 * 4 / found["best_workers"]
    assert found["ms_per_step"] == pytest.approx(per_set + found["ipi_ms_per_step"])
    assert found["ns_per_day"] == pytest.approx(86.4 * 0.25 / found["ms_per_step"])
    assert found["spread_angstrom.H"] > found["bead_spread_angstrom.H"] > 0
    assert Path("nnqmd-bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = printed.get()
    assert "ns per day" in text
    assert re.search(r"width in Angstrom \(about the centroid\) of H 0\.\d+", text)
    assert "does not tell its list building" in text


def test_errors_come_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("cell.extxyz", crystal())
    write("iron.extxyz", Atoms("Fe2", positions=np.eye(3)[:2], cell=[5, 5, 5], pbc=True))
    write("dummy.extxyz", Atoms("XH", positions=np.eye(3)[:2], cell=[5, 5, 5], pbc=True))
    write("flat.extxyz", Atoms("H", cell=[5, 5, 0], pbc=True))
    broken = crystal()
    broken.positions[3] = np.nan
    write("nan.extxyz", broken)
    Path("noise.cif").write_text("no structure")
    Path("empty.xml").write_text("<simulation><system/></simulation>")
    cases = [
        (MODEL, "none.xyz", ["--beads", 2], InputError, "no structure none.xyz"),
        (MODEL, "noise.cif", ["--beads", 2], InputError, "noise.cif is not a structure"),
        (MODEL, "cell.extxyz", [], InputError, "does not say how many beads"),
        (MODEL, "iron.extxyz", ["--beads", 2], UnknownElementError, "does not know Fe; it knows"),
        (MODEL, "dummy.extxyz", ["--beads", 2], InputError, "a place without an atom"),
        (MODEL, "flat.extxyz", ["--beads", 2], InputError, "its cell has no volume"),
        (MODEL, "nan.extxyz", ["--beads", 2], InputError, "positions that are not numbers"),
        (MODEL, "empty.xml", ["--beads", 2], InputError, "timestep"),
        ("none.nequip.zip", "cell.extxyz", ["--beads", 2], ModelError, "none.nequip.zip"),
        (MODEL, "cell.extxyz", ["--beads", 2, "--plot", "a.doc"], OutputError, "not a picture's name"),
        (MODEL, "cell.extxyz", ["--beads", 2, "--json", "no/b.json"], OutputError, "Cannot write no/b.json"),
        (MODEL, "cell.extxyz", ["--beads", 2, "--device", "cuda"], PoolError, "No GPU was found"),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for model, structure, options, kind, words in cases:
        error = invoke(model, structure, *options).exception
        assert isinstance(error, kind), (structure, options, error)
        assert words in str(error)
        assert error.fix


@pytest.mark.slow
def test_bench_of_the_shipped_model(tmp_path, monkeypatch, potential):
    monkeypatch.chdir(tmp_path)
    ran = invoke(MODEL, INPUT, "--seconds", 10, "--json", "bench.json", "--no-plot")
    assert ran.exit_code == 0, ran.output
    found = json.loads(Path("bench.json").read_text())
    assert (found["atoms"], found["beads"], found["temperature_K"]) == (64, 8, 100.0)
    assert found["form"].startswith("compiled for cpu")
    # A slow machine leaves out the larger batches.
    largest = max(int(key.split(".")[1]) for key in found if key.startswith("model_share."))
    assert largest in {1, 2, 4, 8}
    parts = [found[f"{name}_share.{largest}"] for name in ("lists", "copies", "model", "rest")]
    assert sum(parts) == pytest.approx(1.0)
    assert found[f"model_share.{largest}"] > 0.5
    assert not Path("nnqmd-bench.png").exists()
