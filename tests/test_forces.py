"""The shipped model as physics: forces and virial are derivatives of the energy; symmetry; batching."""

import numpy as np
import pytest
from conftest import crystal, triclinic
from scipy.stats import special_ortho_group

from nnqmd_server.errors import InputError, UnknownElementError
from nnqmd_server.potentials.allegro import Allegro
from nnqmd_server.structures import Structures, from_ase


def energy(potential, atoms):
    return potential.evaluate(from_ase([atoms])).energy[0]


def central_difference(function, step):
    """Fourth-order derivative at zero."""
    outer, inner = function(2 * step) - function(-2 * step), function(step) - function(-step)
    return (8 * inner - outer) / (12 * step)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_forces_are_the_derivative_of_the_energy(potential, seed):
    atoms = triclinic(seed=seed)
    forces = potential.evaluate(from_ase([atoms])).forces
    # Along the force itself, where the derivative is largest against the noise of float32 energies.
    along = forces / np.linalg.norm(forces)

    def moved(step):
        shifted = atoms.copy()
        shifted.positions += step * along
        return energy(potential, shifted)

    assert -central_difference(moved, 0.02) == pytest.approx(np.linalg.norm(forces), rel=1e-3)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)])
def test_the_virial_is_the_derivative_with_strain(potential, a, b):
    atoms = triclinic(shake=0.08)
    virial = potential.evaluate(from_ase([atoms])).virial[0]

    def strained(step):
        strain = np.eye(3)
        strain[a, b] += step / 2
        strain[b, a] += step / 2
        shifted = atoms.copy()
        shifted.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        return energy(potential, shifted)

    assert -central_difference(strained, 0.004) == pytest.approx(
        virial[a, b], abs=1e-3 * np.abs(virial).max()
    )
    assert virial == pytest.approx(virial.T, abs=1e-5)


def test_rotated_structures_have_rotated_forces_and_dipoles(potential):
    atoms = triclinic()
    turn = special_ortho_group.rvs(3, random_state=4)
    for matrix in (turn, -turn):
        other = atoms.copy()
        other.set_cell(atoms.cell.array @ matrix)
        other.positions = atoms.positions @ matrix
        both = potential.evaluate(from_ase([atoms, other]))
        assert both.energy[1] == pytest.approx(both.energy[0], abs=2e-4)
        assert both.forces[16:] == pytest.approx(both.forces[:16] @ matrix, abs=2e-4)
        assert both.properties["dipole"][1] == pytest.approx(both.properties["dipole"][0] @ matrix, abs=2e-4)
        assert both.virial[1] == pytest.approx(matrix.T @ both.virial[0] @ matrix, abs=2e-3)


def test_a_batch_gives_what_single_structures_give(potential):
    frames = [crystal(seed=1), triclinic(), crystal(seed=2, repeat=(2, 1, 1))]
    together = potential.evaluate(from_ase(frames))
    alone = [potential.evaluate(from_ase([frame])) for frame in frames]
    assert np.array_equal(together.forces, np.concatenate([r.forces for r in alone]))
    assert np.array_equal(
        together.properties["dipole"], np.concatenate([r.properties["dipole"] for r in alone])
    )


def test_one_call_for_many_frames_agrees_with_one_by_one(potential):
    """The path that a GPU takes, run on the CPU: several frames with their own cells in one model call."""
    structures = from_ase([crystal(seed=1), triclinic(), crystal(seed=2, repeat=(2, 1, 1))])
    together = Allegro(potential._model, potential.card, "cpu", "one call", most_edges=10**9).evaluate(
        structures
    )
    single = potential.evaluate(structures)
    assert together.energy == pytest.approx(single.energy, abs=1e-4)
    assert together.forces == pytest.approx(single.forces, abs=5e-5)
    assert together.virial == pytest.approx(single.virial, abs=5e-4)


def test_the_compiled_model_agrees_with_the_eager_one(potential, model_path):
    from nnqmd_server.potentials.allegro import load

    eager = load(model_path, compiled=False)
    assert eager.form == "eager"
    structures = from_ase([crystal(), triclinic()])
    one, other = potential.evaluate(structures), eager.evaluate(structures)
    assert one.forces == pytest.approx(other.forces, abs=5e-5)
    assert one.atom_properties["wannier_centroid"] == pytest.approx(
        other.atom_properties["wannier_centroid"], abs=1e-5
    )


def test_without_a_compiler_the_model_runs_eagerly_and_says_so(model_path, monkeypatch, tmp_path):
    from nnqmd_server.potentials.allegro import load

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    potential = load(model_path)
    assert potential.form.startswith("eager: no C++ compiler was found")
    assert np.isfinite(potential.evaluate(from_ase([crystal()])).forces).all()


def test_a_compiled_model_that_is_spoilt_is_not_used(potential, model_path, monkeypatch, tmp_path):
    from nnqmd_server.potentials import compiled
    from nnqmd_server.potentials.allegro import load

    folder = tmp_path / "cache"
    monkeypatch.setenv("NNQMD_CACHE", str(folder))
    folder.mkdir()
    monkeypatch.setattr(compiled, "_compile", lambda path, card, device, target: (target, "made"))
    key = f"{potential.card.sha256[:16]}"
    load(model_path)  # the stand-in for the compiler made nothing
    (found,) = [p.name for p in folder.glob("*.lock")]
    assert found.startswith(key)
    (folder / found.replace(".lock", ".nequip.pt2")).write_bytes(b"spoilt")
    spoilt = load(model_path)
    assert spoilt.form.startswith("eager:")
    structures = from_ase([crystal()])
    mine, other = spoilt.evaluate(structures).forces, potential.evaluate(structures).forces
    assert mine == pytest.approx(other, abs=5e-5)


def test_wrapping_and_supercells_change_nothing(potential):
    atoms = crystal()
    wrapped = atoms.copy()
    wrapped.positions += atoms.cell.array[0] * np.random.default_rng(1).integers(-3, 4, size=(16, 1))
    doubled = atoms.repeat((1, 2, 1))
    results = potential.evaluate(from_ase([atoms, wrapped, doubled]))
    assert results.forces[16:32] == pytest.approx(results.forces[:16], abs=2e-5)
    assert results.energy[2] == pytest.approx(2 * results.energy[0], abs=2e-4)
    assert results.virial[2] == pytest.approx(2 * results.virial[0], abs=2e-3)


def test_an_element_that_the_model_does_not_know_is_named(potential):
    atoms = crystal()
    atoms.symbols[0] = "O"
    with pytest.raises(UnknownElementError, match=r"does not know O; it knows"):
        potential.evaluate(from_ase([atoms]))


@pytest.mark.parametrize("spoil", ["positions", "cells"])
def test_broken_structures_are_refused(potential, spoil):
    good = from_ase([crystal()])
    arrays = {"positions": good.positions.copy(), "cells": good.cells.copy()}
    arrays[spoil].flat[0] = np.nan if spoil == "positions" else 0.0
    if spoil == "cells":
        arrays["cells"][0, 0] = 0.0
    with pytest.raises(InputError, match="not finite or a cell without volume"):
        potential.evaluate(Structures(good.numbers, arrays["positions"], arrays["cells"], good.offsets))
