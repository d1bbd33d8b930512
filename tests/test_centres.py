"""A structure in parts by its centre atoms: the parts add up to the whole, to round-off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.data import atomic_numbers
from conftest import crystal, triclinic
from test_networks import CUTOFF, build
from vesin import NeighborList

from nnqmd_server.potentials.allegro import Allegro
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.centres import edges_of, split_centres
from nnqmd_server.structures import Structures, from_ase


def scattered(atoms, seed=0):
    """The same crystal with atoms moved by whole cell vectors, as i-PI's unwrapped positions are."""
    rng = np.random.default_rng(seed)
    atoms.positions += rng.integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
    return atoms


def in_order(edges, shifts):
    rows = np.column_stack([edges.T, shifts]).astype(int)
    return rows[np.lexsort(rows.T[::-1])]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("cutoff", [2.0, 5.0, 9.0])  # the cell is 5.13: less than, about, and twice its size
@pytest.mark.parametrize("atoms", [crystal(), triclinic(), crystal(repeat=(3, 1, 2))])
def test_the_edges_of_all_parts_are_the_neighbour_list(atoms, cutoff, parts):
    atoms = scattered(atoms)
    cell = atoms.cell.array
    i, j, shifts = NeighborList(cutoff=cutoff, full_list=True).compute(
        points=atoms.positions, box=cell, periodic=True, quantities="ijS"
    )
    owner = split_centres(atoms.positions, cell, parts)
    found = [edges_of(atoms.positions, cell, np.flatnonzero(owner == k), cutoff) for k in range(parts)]
    for k, (edges, _) in enumerate(found):
        assert (owner[edges[0]] == k).all()
    both = np.concatenate([e for e, _ in found], axis=1), np.concatenate([s for _, s in found])
    assert np.array_equal(in_order(*both), in_order(np.stack([i, j]), shifts))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 8, 13])
def test_every_atom_has_one_owner_and_the_parts_are_even_and_compact(parts):
    atoms = crystal(repeat=(4, 2, 2))
    owner = split_centres(scattered(atoms).positions, atoms.cell.array, parts)
    counts = np.bincount(owner, minlength=parts)
    assert counts.sum() == len(atoms)
    assert np.ptp(counts) <= 1
    if parts == 2:  # cut across the long axis: a slab each
        inside = atoms.get_scaled_positions()[:, 0]
        assert np.ptp(inside[owner == 0]) < 0.6
        assert np.ptp(inside[owner == 1]) < 0.6


def small(**changes):
    """A small Allegro with random weights, as a potential."""
    torch.manual_seed(1)
    card = Card("small", "0" * 64, ("N", "H"), CUTOFF, "float64", ("wannier_centroid", "dipole"),
                {"N": 5, "H": 1}, {"N": 8}, strictly_local=True)  # fmt: skip
    return Allegro(build(**changes), card, "cpu", "eager")


def tolerance(structures, results, precision, cutoff):
    """How far apart sums of the same terms in another order may be.

    A force is a sum over the n edges of an atom and of its neighbours' edges to it; each sum of 2n terms
    loses at most 2n u sum|f|, u the unit round-off, and terms are not larger than the largest force here.
    """
    edges = edges_of(structures.positions, structures.cells[0], np.arange(structures.n_atoms), cutoff)[0]
    n = np.bincount(edges[0]).max()
    return 2 * n * np.finfo(precision).eps / 2 * max(1.0, abs(results.forces).max())


def assert_same(parts, whole, size, tol):
    # The energies of all atoms, shifts included, are added in double precision.
    added = size * np.finfo(np.float64).eps * abs(whole.energy).max()
    assert abs(sum(p.energy for p in parts) - whole.energy).max() < tol * size + added
    assert abs(sum(p.forces for p in parts) - whole.forces).max() < tol
    assert abs(sum(p.virial for p in parts) - whole.virial).max() < tol * size
    centroids = sum(p.atom_properties["wannier_centroid"] for p in parts)
    assert abs(centroids - whole.atom_properties["wannier_centroid"]).max() < tol


def parts_of(potential, structures, count):
    owner = split_centres(structures.positions, structures.cells[0], count)
    return [potential.evaluate_centres(structures, np.flatnonzero(owner == k)) for k in range(count)]


@pytest.mark.parametrize("atoms", [crystal(), triclinic(), crystal(repeat=(2, 1, 1))])
@pytest.mark.parametrize("count", [1, 2, 5, 40])  # 40: more parts than atoms, some are empty
def test_parts_of_a_double_precision_network_add_up_to_the_whole(atoms, count):
    """In double precision round-off is 1e-13: anything that was left out would be seen."""
    potential = small()
    structures = from_ase([scattered(atoms)])
    whole = potential.evaluate(structures)
    tol = tolerance(structures, whole, np.float64, CUTOFF)
    assert tol < 1e-12
    assert_same(parts_of(potential, structures, count), whole, structures.n_atoms, tol)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_parts_of_the_shipped_model_add_up_to_the_whole(potential, count):
    structures = from_ase([triclinic()])
    whole = potential.evaluate(structures)
    tol = tolerance(structures, whole, np.float32, potential.card.cutoff)
    parts = parts_of(potential, structures, count)
    assert_same(parts, whole, structures.n_atoms, tol)
    assert max(abs(p.forces).max() for p in parts) > 0.1


def test_one_part_alone_is_the_gradient_of_its_own_energy():
    """Forces of a part, on its neighbours too, against finite differences of the energy of that part."""
    potential = small()
    atoms = triclinic()
    structures = from_ase([atoms])
    mine = np.array([0, 3, 4, 5])
    part = potential.evaluate_centres(structures, mine)
    assert (np.linalg.norm(part.forces, axis=1) > 0).sum() > len(mine)
    step = 1e-4
    for atom in (0, 9):
        for axis in range(3):
            ends = []
            for sign in (-1, 1):
                moved = structures.positions.copy()
                moved[atom, axis] += sign * step
                there = Structures(structures.numbers, moved, structures.cells, structures.offsets)
                ends.append(potential.evaluate_centres(there, mine).energy[0])
            slope = -(ends[1] - ends[0]) / (2 * step)
            # Central differences: step^2 f'''/6, and the round-off of energies of -80 eV each.
            assert slope == pytest.approx(part.forces[atom, axis], abs=1e-6)


def test_a_part_needs_only_its_surroundings():
    """The network sees fewer edges the more parts there are: that is what makes memory fall."""
    atoms = crystal(repeat=(6, 2, 2))
    whole = edges_of(atoms.positions, atoms.cell.array, np.arange(len(atoms)), 5.0)[0].shape[1]
    for parts in (2, 4):
        owner = split_centres(atoms.positions, atoms.cell.array, parts)
        most = max(
            edges_of(atoms.positions, atoms.cell.array, np.flatnonzero(owner == k), 5.0)[0].shape[1]
            for k in range(parts)
        )
        assert most < 1.1 * whole / parts


def test_the_shipped_model_says_that_it_is_local(potential):
    assert potential.card.strictly_local
    assert [atomic_numbers[e] for e in potential.card.elements] == [7, 1]
