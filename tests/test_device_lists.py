"""Lists that are made on the device of the model, by nvalchemi-toolkit-ops: here on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import crystal, triclinic
from test_neighbours import CASES, beads, in_order

from nnqmd_server.potentials import device_lists
from nnqmd_server.potentials.device_pairs import edges_on_device
from nnqmd_server.potentials.neighbours import Lists, fresh_edges
from nnqmd_server.structures import Structures, concatenate, from_ase

HERE = torch.device("cpu")


@pytest.fixture
def there(monkeypatch):
    """As on a GPU: lists are made on the device, by what it is that is made there."""
    monkeypatch.setattr(device_lists, "usable", lambda device: True)


def mixed(seed):
    """Structures that share no list: every case, one atom, one without neighbours, some that drifted."""
    rng = np.random.default_rng(seed)
    frames = [make() for make in CASES.values()]
    frames += [crystal()[:1], triclinic(), crystal(repeat=(2, 2, 1)), crystal()[:7]]
    alone = crystal()[:1]
    alone.set_cell([40.0, 40.0, 40.0])
    frames.append(alone)
    for atoms in frames:
        atoms.positions += rng.normal(scale=0.2, size=atoms.positions.shape)
        atoms.positions[::3] += rng.integers(-3, 4, size=3) @ atoms.cell.array
    return from_ase(frames)


def of_batch(structures, found):
    """Edges of each structure as one array with numbers of the batch."""
    edges = [e + structures.offsets[k] for k, (e, _) in enumerate(found)]
    return np.concatenate(edges, axis=1), np.concatenate([s for _, s in found])


def test_only_gpus_make_lists(monkeypatch):
    monkeypatch.setattr(device_lists, "find_spec", lambda name: name == "nvalchemiops")
    assert device_lists.usable(torch.device("cuda"))
    assert not device_lists.usable(HERE)
    monkeypatch.setattr(device_lists, "find_spec", lambda name: None)
    assert not device_lists.usable(torch.device("cuda"))


def test_single_structures_are_left_out_and_beads_are_not():
    rng = np.random.default_rng(3)
    lists = Lists(5.0)
    batch = concatenate([from_ase([triclinic()]), beads(crystal(), 5, rng), from_ase([crystal()[:7]])])
    chosen = lists.chosen(batch, shared=True)
    assert [which.tolist() for which, _, _ in chosen] == [[1, 2, 3, 4, 5]]
    assert sorted(k for which, _, _ in lists.chosen(batch) for k in which.tolist()) == list(range(7))


def test_what_the_device_makes_goes_where_it_belongs(there, monkeypatch):
    """With lists of the host in its place: which structures are asked for, and where their edges go."""
    asked = []

    def made(structures, cutoff, device):
        asked.append(len(structures))
        found = [in_order(*one) for one in fresh_edges(structures, cutoff)]
        edges, shifts = of_batch(structures, found)
        counts = np.array([e.shape[1] for e, _ in found])
        return torch.from_numpy(edges), torch.from_numpy(shifts), counts

    monkeypatch.setattr(device_lists, "fresh_edges_on_device", made)
    rng = np.random.default_rng(5)
    nobody = Structures(np.zeros(0, np.int64), np.zeros((0, 3)), np.eye(3)[None], np.array([0, 0]))
    ring = beads(crystal(), 6, rng)
    batch = concatenate([from_ase([triclinic()[:9], crystal()[:7]]), ring, nobody, from_ase([crystal()[:1]])])
    lists, host = Lists(5.0), Lists(5.0)
    for step in range(3):
        edges, shifts, counts = edges_on_device(batch, lists, HERE)
        wanted = host.edges(batch)
        assert counts.tolist() == [e.shape[1] for e, _ in wanted]
        assert np.array_equal(edges, of_batch(batch, wanted)[0])
        assert np.array_equal(shifts, of_batch(batch, wanted)[1])
        assert asked == [3] * (step + 1)
    assert lists.built == 1
    edges_on_device(batch[: device_lists.MANY - 1], lists, HERE)
    assert len(asked) == 3  # few structures have kept lists


def test_what_does_not_work_there_is_left_alone(monkeypatch, caplog):
    """Said once; the process then has kept lists. Memory that is short is somebody else's to handle."""
    monkeypatch.setattr(device_lists, "_given_up", [])
    monkeypatch.setattr(device_lists, "usable", lambda device: not device_lists._given_up)
    asked = []

    def fails(*_):
        asked.append(1)
        raise torch.OutOfMemoryError("full") if len(asked) == 1 else RuntimeError("no such driver")

    monkeypatch.setattr(device_lists, "fresh_edges_on_device", fails)
    batch, lists = mixed(1), Lists(5.0)
    with pytest.raises(torch.OutOfMemoryError):
        edges_on_device(batch, lists, HERE)
    for _ in range(2):
        edges, _, counts = edges_on_device(batch, lists, HERE)
        wanted = Lists(5.0).edges(batch)
        assert counts.tolist() == [e.shape[1] for e, _ in wanted]
        assert np.array_equal(edges, of_batch(batch, wanted)[0])
    assert len(asked) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such driver" in caplog.text


@pytest.mark.peer
@pytest.mark.parametrize("cutoff", [1.5, 5.0, 7.0])  # thin and crystal are smaller than the last
def test_edges_of_nvalchemi_are_those_of_kept_lists(there, cutoff):
    pytest.importorskip("nvalchemiops")
    host, lists = Lists(cutoff), Lists(cutoff)
    for seed in range(3):
        batch = mixed(seed)
        edges, shifts, counts = device_lists.fresh_edges_on_device(batch, cutoff, HERE)
        wanted = host.edges(batch)
        assert counts.tolist() == [e.shape[1] for e, _ in wanted]
        assert np.array_equal(edges, of_batch(batch, wanted)[0])
        assert np.array_equal(shifts, of_batch(batch, wanted)[1])
        through, turns, numbers = edges_on_device(batch, lists, HERE)
        assert torch.equal(through, edges)
        assert torch.equal(turns, shifts)
        assert np.array_equal(numbers, counts)
    assert lists.built == 0
    assert (counts == 0).any()


@pytest.mark.peer
@pytest.mark.parametrize("cells", [3, 20, 10**6])
def test_atoms_that_drifted_far(cells):
    pytest.importorskip("nvalchemiops")
    atoms = crystal(repeat=(2, 1, 1))
    atoms.positions[::2] += np.array([cells, -cells, 2 * cells]) @ atoms.cell.array
    batch = from_ase([atoms, crystal()])
    edges, shifts, _ = device_lists.fresh_edges_on_device(batch, 5.0, HERE)
    wanted = of_batch(batch, Lists(5.0).edges(batch))
    assert np.array_equal(edges, wanted[0])
    assert np.array_equal(shifts, wanted[1])


@pytest.mark.peer
def test_only_structures_without_edges():
    pytest.importorskip("nvalchemiops")
    atoms = crystal()[:1]
    atoms.set_cell([40.0, 40.0, 40.0])
    edges, shifts, counts = device_lists.fresh_edges_on_device(from_ase([atoms] * 3), 5.0, HERE)
    assert tuple(edges.shape) == (2, 0)
    assert tuple(shifts.shape) == (0, 3)
    assert counts.tolist() == [0, 0, 0]
