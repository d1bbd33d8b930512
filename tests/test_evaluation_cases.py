"""One structure, many in one call, eager or compiled: the same forces, for structures of every kind.

The limits are those that the house promises, 1e-6 eV/Angstrom in float32 and 1e-12 in float64, for forces of
the order of 1 eV/Angstrom; where forces are larger, rounding is larger in proportion.
"""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
import torch._dynamo
from ase import Atoms
from conftest import MODEL, crystal, triclinic

from nnqmd_server.potentials.allegro import Allegro
from nnqmd_server.structures import VACUUM, from_ase

SHAPE = np.array([[0, 0, 0], [0.94, 0, 0.38], [-0.47, 0.81, 0.38], [-0.47, -0.81, 0.38]])
LIMIT = {"float32": 1e-6, "float64": 1e-12}


def molecule(at=(0.0, 0.0, 0.0), **cell):
    return Atoms("NHHH", SHAPE + np.array(at), **cell)


def slab():
    atoms = crystal(seed=4)
    atoms.pbc = (True, True, False)
    return atoms


def wire():
    atoms = triclinic(seed=5)
    atoms.pbc = (False, True, False)
    return atoms


CASES = {
    "crystal": crystal(seed=1),
    "triclinic": triclinic(),
    "supercell": crystal(seed=2, repeat=(2, 1, 1)),
    # Thinner than the cutoff of 5 Angstrom, so that atoms see many images of each other and of themselves.
    "thin": Atoms("NHHH", SHAPE, cell=[[3.0, 0.3, 0], [0, 3.1, 0.2], [0.1, 0, 3.2]], pbc=True),
    "flat": molecule(cell=[9.0, 9.0, 3.3], pbc=True),
    "molecule": molecule(),
    "molecule far away": molecule((-480.0, 333.0, 77.0)),
    "slab": slab(),
    "wire": wire(),
    "chain": molecule(cell=[3.2, 0, 0], pbc=(True, False, False)),
    "two far apart": molecule() + molecule((300.0, 0.0, 0.0)),
    "an isolated atom among others": molecule() + Atoms("N", [[20.0, 0, 0]]),
    "one atom": Atoms("N", [[1.0, 2.0, 3.0]]),
    "one atom and its images": Atoms("N", [[0.0, 0, 0]], cell=[3.5, 3.6, 3.7], pbc=True),
    "atoms without edges": Atoms("NH", [[0.0, 0, 0], [0, 0, 30.0]]),
}
WITHOUT_EDGES = {"one atom", "atoms without edges"}
ALONE = {"molecule", "molecule far away", "chain", "one atom"}


def in_one_call(potential, structures):
    """All structures in one call of the model, as a GPU evaluates them."""
    together = Allegro(potential._model, potential.card, "cpu", potential.form, most_edges=10**9)
    assert len(together.prepare(structures).parts) == 1
    return together.evaluate(structures)


@pytest.fixture(scope="module", params=["float32", "float64"])
def eager(request):
    from nnqmd_server.potentials.allegro import load

    return load(MODEL, compiled=False, precision=request.param)


def assert_same(one, other, limit):
    largest = max(1.0, abs(one.forces).max())
    assert abs(one.forces - other.forces).max() <= limit * largest
    n = len(one.forces)
    # Energies are sums over atoms, virials over pairs of atoms at distances of Angstroms.
    assert abs(one.energy - other.energy).max() <= n * limit * largest
    assert abs(one.virial - other.virial).max() <= 5 * n * limit * largest
    for key, values in one.atom_properties.items():
        assert abs(values - other.atom_properties[key]).max() <= limit, key


@pytest.mark.parametrize("case", CASES)
def test_the_case_is_what_it_says(eager, case):
    """Forces that are there, and zeros where no neighbour is."""
    results = eager.evaluate(from_ase([CASES[case]]))
    assert np.isfinite(results.energy).all()
    if case in WITHOUT_EDGES:
        assert not results.forces.any()
        assert not results.virial.any()
    elif case != "one atom and its images":  # its neighbours balance each other
        assert abs(results.forces).max() > 0.05
    else:
        assert abs(results.forces).max() < LIMIT[eager.card.dtype] * 10
        assert abs(results.virial).max() > 0.01


def test_batched_is_single(eager):
    structures = from_ase(list(CASES.values()))
    batch = in_one_call(eager, structures)
    for k, name in enumerate(CASES):
        single = eager.evaluate(structures[k : k + 1])
        atoms = structures.atoms_of(k)
        part = type(batch)(
            batch.energy[k : k + 1], batch.forces[atoms], batch.virial[k : k + 1], {},
            {key: values[atoms] for key, values in batch.atom_properties.items()},
        )  # fmt: skip
        try:
            assert_same(single, part, LIMIT[eager.card.dtype])
        except AssertionError as error:
            raise AssertionError(name) from error


def test_only_structures_without_edges(eager):
    structures = from_ase([CASES[name] for name in sorted(WITHOUT_EDGES)])
    batch = in_one_call(eager, structures)
    assert not batch.forces.any()
    assert_same(eager.evaluate(structures), batch, LIMIT[eager.card.dtype])


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_eager(potential, case):
    from nnqmd_server.potentials.allegro import load

    structures = from_ase([CASES[case]])
    eager = load(MODEL, compiled=False)
    assert potential.form.startswith("compiled")
    assert_same(eager.evaluate(structures), potential.evaluate(structures), LIMIT["float32"])


def test_compiled_in_one_call_is_eager(potential):
    """Structures of all kinds and sizes in one call of the compiled model, against each alone and eager."""
    from nnqmd_server.potentials.allegro import load

    structures = from_ase(list(CASES.values()))
    eager = load(MODEL, compiled=False)
    assert_same(eager.evaluate(structures), in_one_call(potential, structures), LIMIT["float32"])


def test_nothing_is_compiled_while_atoms_and_edges_change_in_number(potential, monkeypatch):
    def never(*_, **__):
        raise AssertionError("something is compiled in the middle of a run")

    assert potential.form.startswith("compiled")
    monkeypatch.setattr(subprocess, "Popen", never)
    graphs = dict(torch._dynamo.utils.counters["stats"])
    edges = set()
    for n in range(1, 17):
        one = from_ase([crystal(seed=n)[:n]])
        results = potential.evaluate(one)
        together = in_one_call(potential, from_ase([crystal(seed=n)[:n], crystal(seed=n)]))
        edges.add(potential.lists.edges(one)[0][0].shape[1])
        assert_same(results, potential.evaluate(one), 0.0)
        assert np.isfinite(together.forces).all()
    assert len(edges) > 12
    assert dict(torch._dynamo.utils.counters["stats"]) == graphs


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_compiled_is_eager_in_double_precision():
    from nnqmd_server.potentials.allegro import load

    eager = load(MODEL, compiled=False, precision="float64")
    compiled = load(MODEL, precision="float64")
    assert compiled.form.startswith("compiled")
    structures = from_ase(list(CASES.values()))
    for k in range(len(structures)):
        one, other = (p.evaluate(structures[k : k + 1]) for p in (eager, compiled))
        assert_same(one, other, LIMIT["float64"])
    assert_same(in_one_call(eager, structures), in_one_call(compiled, structures), LIMIT["float64"])


def test_single_precision_is_double_precision_to_its_rounding():
    from nnqmd_server.potentials.allegro import load

    double = load(MODEL, compiled=False, precision="float64")
    single = load(MODEL, compiled=False)
    structures = from_ase([CASES[name] for name in ("crystal", "triclinic", "slab", "molecule")])
    one, other = double.evaluate(structures), single.evaluate(structures)
    assert double.card.dtype == "float64"
    error = abs(one.forces - other.forces).max() / abs(one.forces).max()
    assert 1e-9 < error < 5e-6


# --- what a structure without periodicity is ---


@pytest.mark.parametrize("case", ["molecule", "slab", "wire", "chain"])
def test_no_neighbour_is_seen_through_the_vacuum(case):
    atoms = CASES[case]
    structures = from_ase([atoms])
    lengths = np.linalg.norm(structures.cells[0], axis=1)
    assert (lengths[~atoms.pbc] >= VACUUM).all()
    assert np.array_equal(structures.cells[0][atoms.pbc], atoms.cell.array[atoms.pbc])
    # The vectors across are perpendicular to the others, so the vacuum is as wide as they are long.
    across = structures.cells[0][~atoms.pbc] / lengths[~atoms.pbc, None]
    assert across @ across.T == pytest.approx(np.eye(len(across)), abs=1e-12)
    assert abs(across @ structures.cells[0][atoms.pbc].T).max(initial=0.0) < 1e-9
    room = np.ptp(atoms.positions @ across.T, axis=0) + VACUUM
    assert (lengths[~atoms.pbc] >= room).all()
    assert structures.volumes[0] > 1.0


def test_the_direction_of_a_cell_vector_without_periodicity_does_not_matter(eager):
    straight, tilted = CASES["slab"], CASES["slab"].copy()
    tilted.cell[2] = [3.0, -1.0, 4.0]
    one, other = (eager.evaluate(from_ase([atoms])) for atoms in (straight, tilted))
    assert_same(one, other, LIMIT[eager.card.dtype])


def test_the_virial_of_a_molecule_is_that_of_its_forces(eager):
    """Without images W_ab = sum_i r_ia F_ib: it knows nothing of the cell that was made up."""
    structures = from_ase([CASES["molecule"]])
    results = eager.evaluate(structures)
    virial = structures.positions.T @ results.forces
    assert results.virial[0] == pytest.approx(virial, abs=20 * LIMIT[eager.card.dtype])
    assert abs(virial).max() > 0.1


def test_far_apart_is_alone(eager):
    pair = eager.evaluate(from_ase([CASES["two far apart"]]))
    alone = eager.evaluate(from_ase([CASES["molecule"]]))
    assert pair.forces == pytest.approx(np.tile(alone.forces, (2, 1)), abs=20 * LIMIT[eager.card.dtype])


def test_a_periodic_direction_without_a_cell_vector_is_refused():
    from nnqmd_server.errors import InputError

    with pytest.raises(InputError, match="periodic in a direction in which"):
        from_ase([Atoms("N", [[0, 0, 0]], pbc=True)])
    with pytest.raises(InputError, match="periodic in a direction in which"):
        from_ase([Atoms("N", [[0, 0, 0]], cell=[[3, 0, 0], [6, 0, 0], [0, 0, 0]], pbc=(1, 1, 0))])
