"""Batches: cut by edges, shared by models, and the same forces whatever the lists they come from."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.units import Bohr
from conftest import INPUT, MODEL, crystal, triclinic
from test_centres import small
from test_neighbours import CASES, beads, same

from nnqmd_server.doors.template import read_numbers
from nnqmd_server.errors import InputError
from nnqmd_server.inputs.run import find_ipi
from nnqmd_server.potentials import batch, compiled
from nnqmd_server.potentials.allegro import Allegro
from nnqmd_server.potentials.batch import contraction_modifiers, cut_by_edges
from nnqmd_server.potentials.device_pairs import edges_on_device
from nnqmd_server.potentials.neighbours import Lists, fresh_edges
from nnqmd_server.potentials.package import read_card
from nnqmd_server.structures import Structures, concatenate, from_ase, replicas


def test_the_edges_on_a_device_are_those_on_the_host():
    """What a GPU does, with torch on the CPU."""
    rng = np.random.default_rng(11)
    device = torch.device("cpu")
    host, there = Lists(5.0), Lists(5.0)
    for _ in range(3):
        batch = concatenate(
            [beads(crystal(), 5, rng), from_ase([triclinic(), crystal()[:7]]), beads(crystal(), 2, rng)]
        )
        edges, shifts, counts = edges_on_device(batch, there, device)
        wanted = host.edges(batch)
        assert counts.tolist() == [e.shape[1] for e, _ in wanted]
        assert np.array_equal(
            edges, np.concatenate([e + batch.offsets[k] for k, (e, _) in enumerate(wanted)], axis=1)
        )
        assert np.array_equal(shifts, np.concatenate([s for _, s in wanted]))
    empty = Structures(np.zeros(0, np.int64), np.zeros((0, 3)), np.eye(3)[None], np.array([0, 0]))
    assert edges_on_device(empty, there, device)[2].tolist() == [0]


@pytest.mark.parametrize(
    ("counts", "limit", "runs"),
    [
        ([3, 3, 3], 6, [(0, 2), (2, 3)]),
        ([9, 1, 1], 4, [(0, 1), (1, 3)]),
        ([1, 9, 1], 4, [(0, 1), (1, 2), (2, 3)]),
        ([0, 0, 0], 0, [(0, 3)]),
        ([5], 1, [(0, 1)]),
        ([], 5, []),
        ([1, 1, 1], float("inf"), [(0, 3)]),
    ],
)
def test_batches_are_cut_by_edges(counts, limit, runs):
    assert cut_by_edges(np.array(counts, dtype=np.int64), limit) == runs


class Watched:
    """A model that says how many edges it was given."""

    def __init__(self, model):
        self.model, self.edges = model, []

    def __call__(self, data):
        self.edges.append(data["edge_index"].shape[1])
        return self.model(data)


def test_a_memory_limit_is_honoured_and_changes_nothing():
    alone = small()
    batch = from_ase([crystal(seed=1), triclinic(), crystal(seed=2, repeat=(2, 1, 1)), crystal(seed=3)])
    whole = alone.evaluate(batch)
    counts = [e.shape[1] for e, _ in alone.lists.edges(batch)]
    limit = counts[0] + counts[1] + 10
    watched = Watched(alone._model)
    limited = Allegro(watched, alone.card, "cpu", "eager", most_edges=limit)
    results = limited.evaluate(batch)
    assert sum(watched.edges) == sum(counts)
    assert len(watched.edges) > 1
    assert all(n <= limit or n in counts for n in watched.edges)
    assert abs(results.forces - whole.forces).max() < 1e-12
    assert abs(results.virial - whole.virial).max() < 1e-10


@pytest.mark.parametrize("case", [*CASES, "one atom"])
def test_forces_with_kept_lists_are_those_with_fresh_ones_to_the_last_bit(case):
    """Double precision: one at a time, the same bits; in one call, to round-off."""
    rng = np.random.default_rng(13)
    kept, fresh = small(), small()
    fresh.lists = Lists(fresh.card.cutoff, skin=0.0)
    together = Allegro(kept._model, kept.card, "cpu", "eager", most_edges=10**9)
    atoms = CASES[case]() if case in CASES else crystal()[:1]
    for _ in range(4):
        ring = beads(atoms, 3, rng, 0.1)
        a, b, c = kept.evaluate(ring), fresh.evaluate(ring), together.evaluate(ring)
        assert np.array_equal(a.forces, b.forces)
        assert np.array_equal(a.energy, b.energy)
        assert np.array_equal(a.virial, b.virial)
        assert abs(c.forces - b.forces).max() < 1e-12 * max(1.0, abs(b.forces).max())
    assert kept.lists.built == 1
    assert fresh.lists.built >= 4


def test_two_models_share_one_batch():
    """Prepared with the longer cutoff, run by both: the shorter one sees its own edges only."""
    first, second = small(), small()
    batch = from_ase([triclinic(), crystal()])
    ready = first.prepare(batch, cutoff=first.card.cutoff + 1.5)
    assert ready.cutoff == first.card.cutoff + 1.5
    for one in (first, second):
        shared, own = one.run(ready), one.evaluate(batch)
        assert abs(shared.forces - own.forces).max() < 1e-12
        assert abs(shared.energy - own.energy).max() < 1e-10
    assert second.spent["model"] > 0
    with pytest.raises(InputError, match="the model needs"):
        Allegro(first._model, replace(first.card, cutoff=9.0), "cpu", "eager").run(ready)


EINSTEIN = """
import numpy as np
__DRIVER_NAME__, __DRIVER_CLASS__ = "einstein", "Einstein"
class Einstein:
    '''Springs to where the atoms begin; every set of positions goes to a file.'''
    def __init__(self, **_):
        self.start, self.file = None, open("positions", "wb")
    def __call__(self, cell, pos):
        q = np.asarray(pos).reshape(len(pos), -1)
        if self.start is None:
            self.start = q.mean(axis=0)
        self.file.write(q.tobytes())
        self.file.flush()
        f = -0.02 * (q - self.start)
        v = 0.01 * ((q - self.start) ** 2).sum(axis=1)
        return [(v[k], f[k].reshape(-1, 3), np.zeros((3, 3)), "") for k in range(len(q))]
"""


TRITON, CUEQUIVARIANCE = "enable_TritonContracter", "enable_CuEquivarianceContracter"


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "wanted"),
    [
        ("cpu", "float32", {"triton", "cuequivariance_torch"}, []),
        ("cuda", "float32", {"triton", "cuequivariance_torch"}, [CUEQUIVARIANCE]),
        ("cuda", "float64", {"triton", "cuequivariance_torch"}, [TRITON]),
        ("cuda", "float32", {"triton"}, [TRITON]),
        ("cuda", "float32", set(), []),
    ],
)
def test_the_tensor_product_is_one_that_is_installed(monkeypatch, device, dtype, installed, wanted):
    monkeypatch.setattr(batch, "find_spec", lambda name: name in installed or None)
    assert contraction_modifiers(device, dtype, [TRITON, CUEQUIVARIANCE, "other"]) == wanted
    assert contraction_modifiers(device, dtype, ["other"]) == []


def test_the_shipped_model_has_these_tensor_products():
    from nequip.model.modify_utils import get_all_modifiers

    from nnqmd_server.potentials.saved import saved_model

    assert {TRITON, CUEQUIVARIANCE} <= set(get_all_modifiers(saved_model(MODEL, read_card(MODEL))))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tensor_product_that_cannot_be_compiled_is_left_out(monkeypatch, tmp_path, device):
    """The compiler is ours, so that there need not be a GPU: it fails, unless it is to leave it out."""
    monkeypatch.setenv("NNQMD_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_hardware", lambda device: device)
    calls = []

    def run(command, stdout, **_):
        calls.append(command)
        stdout.write(f"call {len(calls)}\n")
        if "--plain" not in command:
            raise subprocess.CalledProcessError(1, command)
        Path(command[command.index("--device") - 1]).write_bytes(b"compiled")

    monkeypatch.setattr(compiled.subprocess, "run", run)
    file, why = compiled.compiled_model(MODEL, read_card(MODEL), device)
    (log,) = tmp_path.glob("*.log")
    if device == "cpu":
        assert (file, len(calls)) == (None, 1)
        assert why.startswith("eager: compilation failed")
        assert str(log) in why
    else:
        assert file.read_bytes() == b"compiled"
        assert why == "compiled for cuda, with nequip's own tensor product"
        assert log.read_text().split() == ["call", "1", "call", "2"]


@pytest.mark.slow
def test_a_thousand_steps_of_ring_polymer_dynamics_without_one_difference(tmp_path, potential):
    """The shipped TRPMD input in i-PI itself; then every frame, whole and as two workers would share it."""
    source = INPUT.read_text().replace("nnqmd_pes.py", "einstein.py").replace("{template: init.xyz}", "{}")
    (tmp_path / "input.xml").write_text(re.sub(r"<total_steps>\d+", "<total_steps>1000", source))
    (tmp_path / "einstein.py").write_text(EINSTEIN)
    shutil.copy(INPUT.parent / "init.xyz", tmp_path)
    command = [find_ipi(), "input.xml"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=280, stdout=subprocess.DEVNULL)
    numbers = read_numbers(tmp_path / "init.xyz")
    frames = np.fromfile(tmp_path / "positions").reshape(-1, 8, len(numbers), 3) * Bohr
    assert len(frames) >= 1001
    assert np.ptp(frames, axis=0).max() > 0.5  # they do move
    cutoff = potential.card.cutoff
    cells = np.repeat(np.diag([10.26, 10.26, 5.13])[None], 8, axis=0)
    whole, halves = Lists(cutoff), [Lists(cutoff), Lists(cutoff)]
    steady = Allegro(potential._model, potential.card, "cpu", "fresh lists")
    steady.lists = Lists(cutoff, skin=0.0)
    for step, positions in enumerate(frames):
        ring = replicas(numbers, positions, cells)
        wanted = fresh_edges(ring, cutoff)
        same(whole.edges(ring), wanted)
        same(halves[0].edges(ring[:4]) + halves[1].edges(ring[4:]), wanted)
        if step % 100 == 0:
            kept, fresh = potential.evaluate(ring), steady.evaluate(ring)
            assert np.array_equal(kept.forces, fresh.forces)
            assert np.array_equal(kept.virial, fresh.virial)
    assert whole.built < 50
