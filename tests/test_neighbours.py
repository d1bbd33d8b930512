"""Neighbour lists that are kept: at every step the very edges of a fresh list, whatever happened before."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import crystal, triclinic

from nnqmd_server.potentials import neighbours, pairs
from nnqmd_server.potentials.neighbours import Lists, fresh_edges
from nnqmd_server.potentials.pairs import Pairs, pairs_between, without_vacuum
from nnqmd_server.structures import Structures, concatenate, from_ase, replicas


def in_order(edges, shifts):
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], edges[1], edges[0]))
    return edges[:, order], shifts[order]


def by_hand(positions, cell, cutoff):
    """All edges from the definition: every pair with every shift that could matter."""
    height = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    fractions = positions @ np.linalg.inv(cell)
    reach = np.ceil(cutoff / height + np.ptp(fractions, axis=0)).astype(int) + 1
    found = []
    for shift in itertools.product(*(range(-r, r + 1) for r in reach)):
        apart = positions[None] - positions[:, None] + np.array(shift) @ cell
        i, j = np.nonzero(np.linalg.norm(apart, axis=2) <= cutoff)
        found += [(a, b, *shift) for a, b in zip(i, j, strict=True) if a != b or any(shift)]
    rows = np.array(found, dtype=float).reshape(-1, 5)
    return in_order(rows[:, :2].T.astype(np.int64), rows[:, 2:])


def same(found, wanted):
    assert len(found) == len(wanted)
    for (edges, shifts), other in zip(found, wanted, strict=True):
        expected = in_order(*other)
        assert np.array_equal(edges, expected[0])
        assert np.array_equal(shifts, expected[1])
        assert edges.dtype == np.int64
        assert shifts.dtype == np.float64
        assert edges.flags.c_contiguous
        assert shifts.flags.c_contiguous


def beads(atoms, count, rng, spread=0.1):
    positions = atoms.positions + rng.normal(scale=spread, size=(count, len(atoms), 3))
    return replicas(atoms.numbers, positions, np.repeat(atoms.cell.array[None], count, axis=0))


def thin():
    atoms = crystal(repeat=(2, 1, 1))
    atoms.set_cell(atoms.cell.array * np.array([1.0, 0.4, 1.0])[:, None], scale_atoms=True)
    return atoms


def molecule():
    """A few atoms in a large box."""
    atoms = crystal()[:5]
    atoms.set_cell([120.0, 120.0, 120.0])
    return atoms


def slab():
    atoms = crystal()
    cell = atoms.cell.array.copy()
    cell[2] = [20.0, -15.0, 150.0]
    atoms.set_cell(cell)
    return atoms


CASES = {"crystal": crystal, "triclinic": triclinic, "thin": thin, "molecule": molecule, "slab": slab}


@pytest.fixture(params=["native", "numpy"])
def arithmetic(request, monkeypatch):
    """Both ways to cut pairs; the native one is there wherever the models can be compiled."""
    if request.param == "numpy":
        monkeypatch.setattr(pairs, "library", lambda: None)
    elif pairs.library() is None:
        pytest.skip("no compiler")
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cutoff", [1.5, 5.0, 7.0])  # thin and crystal are smaller than the last
def test_edges_are_those_of_the_definition(case, cutoff, arithmetic):
    atoms = CASES[case]()
    structures = from_ase([atoms])
    structures.positions[:] += np.random.default_rng(3).integers(-2, 3, (len(atoms), 3)) @ structures.cells[0]
    wanted = by_hand(structures.positions, structures.cells[0], cutoff)
    for skin in (0.0, 1.4):
        lists = Lists(cutoff, skin)
        for _ in range(2):
            same(lists.edges(structures), [wanted])


@pytest.mark.parametrize("case", CASES)
def test_a_random_walk_has_the_edges_of_fresh_lists(case, arithmetic):
    """Atoms that wander off, some of them by far more than a skin, and now and then by a cell vector."""
    rng = np.random.default_rng(5)
    atoms, lists = CASES[case](), Lists(5.0)
    structures = beads(atoms, 1, rng)
    for step in range(60):
        structures.positions[:] += rng.normal(scale=0.03, size=structures.positions.shape)
        if step % 20 == 10:
            structures.positions[rng.integers(len(atoms))] += structures.cells[0, step // 20]
        same(lists.edges(structures), fresh_edges(structures, 5.0))
    assert 3 < lists.built < 40


@pytest.mark.parametrize("case", ["crystal", "triclinic", "thin"])
def test_any_strain_of_the_cell_is_exact(case):
    """Cells that breathe, shear and turn while atoms move: affine motion alone costs no list."""
    rng = np.random.default_rng(6)
    atoms, lists = CASES[case](), Lists(5.0)
    structures = beads(atoms, 4, rng)
    for step in range(60):
        strain = np.eye(3) + rng.normal(scale=0.004 if step % 15 else 0.05, size=(3, 3))
        structures.cells[:] = structures.cells @ strain
        structures.positions[:] = structures.positions @ strain
        structures.positions[:] += rng.normal(scale=0.01, size=structures.positions.shape)
        same(lists.edges(structures), fresh_edges(structures, 5.0))
    assert lists.built < 50


def test_the_rule_is_needed_and_is_just_enough():
    """Two atoms out of each other's sight that come together: the list must go the moment they could meet."""
    positions, cell = np.array([[0.0, 0, 0], [6.39, 0, 0]]), np.eye(3) * 40.0
    numbers = np.array([1, 1])
    lists = Lists(5.0, skin=1.4)
    lists.edges(replicas(numbers, positions[None], cell[None]))
    for closer in np.linspace(0.0, 0.69, 30):
        moved = positions + np.array([[closer, 0, 0], [-closer, 0, 0]])
        (found,) = lists.edges(replicas(numbers, moved[None], cell[None]))
        assert found[0].shape[1] == 0
    assert lists.built == 1
    for closer in (0.71, 0.8):
        moved = positions + np.array([[closer, 0, 0], [-closer, 0, 0]])
        (found,) = lists.edges(replicas(numbers, moved[None], cell[None]))
        assert found[0].shape[1] == 2
    assert lists.built == 2


def test_compression_alone_brings_pairs_into_sight():
    """Nobody moves relative to the cell; the cell shrinks until pairs come within the cutoff."""
    rng = np.random.default_rng(8)
    atoms, lists = crystal(repeat=(2, 1, 1)), Lists(5.0)
    structures = beads(atoms, 1, rng)
    counts = []
    for _ in range(80):
        structures.cells[:] *= 0.995
        structures.positions[:] *= 0.995
        (found,) = lists.edges(structures)
        same([found], fresh_edges(structures, 5.0))
        counts.append(found[0].shape[1])
    assert counts[-1] > 1.5 * counts[0]
    assert 1 < lists.built < 40


def test_one_list_serves_a_ring_polymer_and_its_next_steps(arithmetic):
    rng = np.random.default_rng(1)
    atoms, lists = crystal(repeat=(2, 1, 1)), Lists(5.0)
    for _ in range(10):
        ring = beads(atoms, 16, rng, spread=0.12)
        same(lists.edges(ring), fresh_edges(ring, 5.0))
    assert lists.built == 1


def test_beads_far_apart_get_lists_of_their_own_by_themselves():
    rng = np.random.default_rng(2)
    atoms, lists = crystal(repeat=(2, 1, 1)), Lists(5.0)
    far = beads(atoms, 6, rng, spread=1.5)
    for _ in range(5):
        far.positions[:] += rng.normal(scale=0.02, size=far.positions.shape)
        same(lists.edges(far), fresh_edges(far, 5.0))
    assert lists.built == 6


def test_what_belongs_together_is_found_by_content():
    """Two simulations, in varying cuts and orders, other elements between them, as a worker sees them."""
    rng = np.random.default_rng(3)
    first, second, other = crystal(seed=1, shake=0.3), crystal(seed=2, shake=0.3), triclinic()
    second.positions += 3.0
    lists = Lists(5.0)
    for step in range(30):
        a, b = beads(first, 8, rng, 0.08), beads(second, 8, rng, 0.08)
        low = int(rng.integers(0, 6))
        mixed = [a[low : low + 3], b[2:5], from_ase([other]), a[0:1]]
        if step % 2:
            mixed = [b[low : low + 2], from_ase([other]), a]
        batch = concatenate(mixed)
        same(lists.edges(batch), fresh_edges(batch, 5.0))
    assert lists.built <= 8


def test_structures_that_never_come_back_are_not_collected():
    rng = np.random.default_rng(4)
    lists = Lists(5.0)
    for _ in range(40):
        batch = from_ase([crystal(shake=0.8, seed=int(rng.integers(1 << 30)))])
        same(lists.edges(batch), fresh_edges(batch, 5.0))
    (kind,) = lists._kinds.values()
    assert len(kind.lists) < 20


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_PAIRS", 3000)
    monkeypatch.setattr(neighbours, "MOST_LISTS", 5)
    lists = Lists(5.0)
    for size in range(1, 12):
        batch = concatenate([from_ase([crystal(seed=size, shake=1.0)[: size + 4]]) for _ in range(2)])
        same(lists.edges(batch), fresh_edges(batch, 5.0))
        kept = [one for kind in lists._kinds.values() for one in kind.lists]
        assert sum(len(one.pairs) for one in kept) <= 3000
        assert len(lists._kinds) <= 5


def test_one_atom_no_atom_and_no_edges(arithmetic):
    def alone(box):
        return Structures(np.array([7]), np.array([[0.3, 0, 0]]), np.eye(3)[None] * box, np.array([0, 1]))

    lists = Lists(5.0)
    empty = Structures(np.zeros(0, np.int64), np.zeros((0, 3)), np.eye(3)[None], np.array([0, 0]))
    batch = concatenate([alone(30.0), empty, alone(4.0), alone(30.0)])
    for _ in range(2):
        found = lists.edges(batch)
        assert [e.shape for e, _ in found] == [(2, 0), (2, 0), (2, 6), (2, 0)]
        assert [s.shape for _, s in found] == [(0, 3), (0, 3), (6, 3), (0, 3)]
        same(found[2:3], [by_hand(np.array([[0.3, 0, 0]]), np.eye(3) * 4.0, 5.0)])
    assert lists.edges(batch[0:0]) == []
    (nothing,) = lists.edges(empty)
    assert nothing[0].shape == (2, 0)


def test_numpy_and_native_agree_to_the_last_bit():
    """At pairs whose distance is the cutoff to one part in 10^15, where a fused operation would differ."""
    if pairs.library() is None:
        pytest.skip("no compiler")
    rng = np.random.default_rng(9)
    atoms = triclinic()
    for count in (1, 2, 5, 33):
        positions = atoms.positions + rng.normal(scale=0.1, size=(count, len(atoms), 3))
        cell = atoms.cell.array
        some = pairs_between(atoms.positions, cell, 6.5, np.zeros(len(atoms)))
        apart = positions[:, some.second] - positions[:, some.first] + some.turns.T @ cell
        for cutoff in np.linalg.norm(apart, axis=2).ravel()[:: 97 * count]:
            native = some.within(positions, cell, cutoff)
            across = some._across(cell)
            stacked = np.ascontiguousarray(positions.transpose(1, 2, 0))
            for (e, s), (f, t) in zip(native, some._by_numpy(stacked, across, cutoff * cutoff), strict=True):
                assert np.array_equal(e, f)
                assert np.array_equal(s, t)


@pytest.mark.parametrize("cells", [3, 20, 10**7])
def test_atoms_that_drifted_far_are_ordered_all_the_same(cells):
    rng = np.random.default_rng(12)
    atoms = crystal()
    atoms.positions += rng.integers(-cells, cells, (len(atoms), 3)) @ atoms.cell.array
    one = pairs_between(atoms.positions, atoms.cell.array, 4.0, np.zeros(len(atoms)))
    assert isinstance(one, Pairs)
    wanted = in_order(one.edges, one.shifts)
    assert np.array_equal(one.edges, wanted[0])
    assert np.array_equal(one.shifts, wanted[1])
    (found,) = one.within(atoms.positions[None], atoms.cell.array, 4.1)
    assert np.array_equal(found[0], one.edges)
    assert np.array_equal(found[1], one.shifts)


def test_vacuum_costs_nothing():
    atoms = molecule()
    cell = without_vacuum(atoms.positions, atoms.cell.array, 5.0)
    assert abs(np.linalg.det(cell)) < 20.0**3
    assert np.array_equal(
        without_vacuum(crystal().positions, crystal().cell.array, 5.0), crystal().cell.array
    )
