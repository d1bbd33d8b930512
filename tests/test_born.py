"""Born charges: the slope of the dipole, their sum, the way to i-PI; dipoles of a trajectory after a run."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from ase.io import write
from conftest import MODEL, triclinic
from test_networks import CUTOFF, build
from typer.testing import CliRunner

from nnqmd_server.cli import app
from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.allegro import Allegro, load
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.born import WithBorn
from nnqmd_server.structures import Structures, from_ase

IONS = {"N": 5, "H": 1}
CARD = Card("toy", "0" * 64, ("N", "H"), CUTOFF, "float64", ("wannier_centroid", "dipole"), IONS, {"N": 8})


def toy(carriers, born=True):
    """A small random network in double precision."""
    torch.manual_seed(1)
    card = replace(CARD, carriers=carriers)
    network = build(carriers=carriers)
    if not born:
        return Allegro(network, card, "cpu", "eager")
    with_born = replace(card, properties=(*card.properties, "born_charges"))
    return Allegro(WithBorn(network, card), with_born, "cpu", "eager")


@pytest.fixture(scope="module")
def structures():
    """Two structures of different size."""
    return from_ase([triclinic(), triclinic(seed=5)[:12]])


CARRIERS = [{"N": 8}, {"N": 2, "H": 2}]


@pytest.mark.parametrize("carriers", CARRIERS)
def test_born_charges_are_the_slope_of_the_dipole(structures, carriers):
    potential = toy(carriers)
    born = potential.evaluate(structures).atom_properties["born_charges"]
    assert born.shape == (structures.n_atoms, 3, 3)
    step = 1e-4
    for atom in (0, 1, 9, 17, 20):
        for b in range(3):
            ends = []
            for sign in (-1, 1):
                moved = structures.positions.copy()
                moved[atom, b] += sign * step
                there = Structures(structures.numbers, moved, structures.cells, structures.offsets)
                ends.append(potential.evaluate(there).properties["dipole"])
            slope = (ends[1] - ends[0]) / (2 * step)
            owner = int(atom >= structures.offsets[1])
            assert slope[owner] == pytest.approx(born[atom, :, b], abs=1e-7)
            assert np.abs(slope[1 - owner]).max() < 1e-9


@pytest.mark.parametrize("carriers", CARRIERS)
def test_born_charges_of_a_neutral_structure_add_up_to_nothing(structures, carriers):
    potential = toy(carriers)
    born = potential.evaluate(structures).atom_properties["born_charges"]
    raw = potential._raw(potential.prepare(structures)).atom_properties["born_charges"]
    for k in range(2):
        assert np.abs(raw[structures.atoms_of(k)].sum(axis=0)).max() < 1e-12  # by itself, in double precision
        assert np.abs(born[structures.atoms_of(k)].sum(axis=0)).max() < 1e-13
    assert np.abs(born).max() > 0.1


def test_single_precision_obeys_the_sum_rule_as_ipi_asks():
    potential = load(MODEL, born=True)
    structures = from_ase([triclinic()])
    results = potential.evaluate(structures)
    born = results.atom_properties["born_charges"]
    assert np.abs(born.sum(axis=0)).max() < 1e-10  # i-PI: 1e-8 per atom
    # NH3: hydrogen positive, nitrogen negative, about their charges in the molecule
    trace = np.trace(born, axis1=1, axis2=2) / 3
    assert (trace[structures.numbers == 1] > 0.1).all()
    assert (trace[structures.numbers == 7] < -0.3).all()


def test_everything_else_stays_as_it_is_without_born_charges(structures):
    with_born, without = toy({"N": 8}).evaluate(structures), toy({"N": 8}, born=False).evaluate(structures)
    assert np.array_equal(with_born.energy, without.energy)
    for one, other in (
        (with_born.forces, without.forces),
        (with_born.virial, without.virial),
        (with_born.properties["dipole"], without.properties["dipole"]),
    ):
        assert one == pytest.approx(other, abs=1e-12)


def test_born_charges_turn_with_the_structure(structures):
    from scipy.spatial.transform import Rotation

    turn = Rotation.random(random_state=3).as_matrix()
    turned = Structures(
        structures.numbers, structures.positions @ turn.T, structures.cells @ turn.T, structures.offsets
    )
    potential = toy({"N": 8})
    here = potential.evaluate(structures).atom_properties["born_charges"]
    there = potential.evaluate(turned).atom_properties["born_charges"]
    assert there == pytest.approx(turn @ here @ turn.T, abs=1e-10)


def test_a_model_without_read_out_has_no_born_charges():
    with pytest.raises(ModelError, match="no Wannier read-out"):
        WithBorn(build(), replace(CARD, properties=(), carriers=None))


def test_ipi_gets_born_charges_in_its_own_shape(structures):
    from nnqmd_server.doors.extras import check_extras, extras_of

    potential = toy({"N": 8})
    check_extras(["dipole", "BEC"], potential.card.as_dict())
    one = structures[:1]
    results = potential.evaluate(one)
    sent = np.array(json.loads(extras_of(results, ["BEC"])[0])["BEC"])
    assert sent.shape == (3 * one.n_atoms, 3)  # ipi.engine.motion.driven_dynamics.BEC
    born = results.atom_properties["born_charges"]
    assert sent[3 * 4 + 1, 2] == born[4, 2, 1]  # atom 4 moved along y, dipole along z
    assert np.abs(sent.reshape(-1, 3, 3).sum(axis=0)).max() < 1e-8


MAKER = """
from nnqmd_server.potentials.allegro import load
def born(device):
    return load({model!r}, device, born=True)
"""


@pytest.mark.slow
def test_born_charges_come_through_the_pool_with_the_forces(tmp_path):
    from nnqmd_server.pool.client import PoolClient
    from nnqmd_server.pool.launch import LocalPool

    (tmp_path / "maker.py").write_text(MAKER.format(model=str(MODEL)))
    atoms = [triclinic(), triclinic(seed=9)]
    source = f"{tmp_path / 'maker.py'}:born"
    with LocalPool({"ammonia": source}, tmp_path, workers=2, device="cpu") as pool:
        pool.wait_ready(timeout=280)
        client = PoolClient(pool.address, 60.0)
        found = client.submit(from_ase(atoms))
        client.close()
    expected = load(MODEL, born=True).evaluate(from_ase(atoms))
    assert found.atom_properties["born_charges"] == pytest.approx(
        expected.atom_properties["born_charges"], abs=1e-6
    )
    assert found.forces == pytest.approx(expected.forces, abs=1e-5)


# --- nnqmd dipole ---


def trajectory(path, frames=120):
    """Molecules that shiver at one frequency, every 2 fs; ASE writes Angstrom."""
    atoms = triclinic(shake=0.0)
    random = np.random.default_rng(2)
    along = random.normal(scale=0.02, size=(2, len(atoms), 3))
    made = []
    for k in range(frames):
        moved = atoms.copy()
        phase = 2 * np.pi * k * 2.0 / 40.0
        moved.positions += along[0] * np.cos(phase) + along[1] * np.sin(phase)
        made.append(moved)
    write(path, made)
    return made


def test_dipoles_of_a_trajectory_and_its_infrared_spectrum(tmp_path, potential):
    made = trajectory(tmp_path / "md.traj")
    command = [
        "dipole",
        str(tmp_path / "md.traj"),
        "--model",
        str(MODEL),
        "--interval",
        "2.0",
        "--batch",
        "50",
        "--molecules",
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "120 frames" in done.output
    expected = potential.evaluate(from_ase(made)).properties["dipole"]
    with h5py.File(tmp_path / "dipoles.h5") as file:
        assert file["dipole"].attrs["unit"] == "e Angstrom"
        assert file.attrs["interval_fs"] == 2.0
        assert file["dipole"][:, 0] == pytest.approx(expected, abs=1e-6)
        # NH3 is neutral: its molecules make up the whole
        assert file["molecular_dipole"].shape == (120, 1, 4, 3)
        assert file["molecular_dipole"][:].sum(axis=2) == pytest.approx(file["dipole"][:], abs=1e-9)
        assert list(file["molecule_at"]) == [k for k in range(16) if made[0].numbers[k] == 7]
        assert file["cell"][7] == pytest.approx(made[0].cell.array)
    spectrum = ["spectrum", "ir", str(tmp_path / "dipoles.h5"), "--temperature", "300"]
    done = CliRunner().invoke(app, [*spectrum, "--out", str(tmp_path / "ir")], catch_exceptions=False)
    assert done.exit_code == 0
    assert any((tmp_path / "ir").iterdir())


def test_born_charges_of_a_trajectory(tmp_path):
    made = trajectory(tmp_path / "md.traj", 3)
    command = ["dipole", str(tmp_path / "md.traj"), "--model", str(MODEL), "--interval", "2", "--born"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    expected = load(MODEL, born=True).evaluate(from_ase(made)).atom_properties["born_charges"]
    with h5py.File(tmp_path / "dipoles.h5") as file:
        assert file["born_charges"].shape == (3, 1, 16, 3, 3)
        assert file["born_charges"][:].reshape(-1, 3, 3) == pytest.approx(expected, abs=1e-6)


def test_a_model_without_dipoles_is_refused(tmp_path):
    from nnqmd_server.spectra.predicted_dipoles import write_dipoles
    from nnqmd_server.spectra.trajectory import open_trajectory

    trajectory(tmp_path / "md.traj", 3)
    opened = open_trajectory(tmp_path / "md.traj", interval=1.0)
    plain = toy({"N": 8}, born=False)
    plain.card = replace(plain.card, properties=())
    with pytest.raises(ModelError, match="does not give dipole"):
        write_dipoles(tmp_path / "d.h5", opened, plain)
    assert not (tmp_path / "d.h5").exists()
