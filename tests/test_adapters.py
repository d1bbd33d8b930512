"""ASE calculators and i-PI's drivers as potentials; those of other environments: test_peer_potentials.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from conftest import crystal, triclinic
from springs import POSITIONS, direct_door, positions, start_ipi, write_input

from nnqmd_server.errors import InputError, ModelError, PoolError, StructureError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.launch import LocalPool
from nnqmd_server.potentials.base import warm_up
from nnqmd_server.potentials.load import load
from nnqmd_server.structures import Structures, from_ase
from nnqmd_server.units import BOHR, HARTREE

HERE = Path(__file__).parent
ODD = f"ase:{HERE / 'ase_calculators.py'}"
DRIVER = f"ipi:{HERE / 'ipi_driver.py'}"
EMT_SOURCE = "ase:ase.calculators.emt.EMT"


def copper(seed, size=1):
    """A crystal whose cell no axis order can hide, with an atom outside of it."""
    atoms = bulk("Cu", cubic=True) * (size, 1, 1)
    atoms.rattle(0.1, seed=seed)
    strain = np.array([[1.02, 0.04, -0.03], [0.0, 0.99, 0.06], [0.0, 0.0, 1.03]])
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.positions[0] += atoms.cell[0] - 2 * atoms.cell[2]
    return atoms


def strained_energy(potential, structures, a, b, d=1e-5):
    """-dE/d(strain_ab) of a batch by central differences [eV]."""
    energies = []
    for sign in (1, -1):
        strain = np.eye(3)
        strain[a, b] += sign * d / 2
        strain[b, a] += sign * d / 2
        moved = Structures(
            structures.numbers, structures.positions @ strain, structures.cells @ strain, structures.offsets
        )
        energies.append(potential.evaluate(moved).energy)
    return -(energies[0] - energies[1]) / (2 * d)


@pytest.mark.parametrize(
    ("source", "calculator"),
    [
        (EMT_SOURCE, EMT()),
        (
            "ase:ase.calculators.lj.LennardJones,sigma=2.3,epsilon=0.1,rc=5,smooth=true",
            LennardJones(sigma=2.3, epsilon=0.1, rc=5, smooth=True),
        ),
    ],
)
def test_an_ase_calculator_says_what_it_says_in_ase(source, calculator):
    frames = [copper(1), copper(2, 2), copper(3)]
    structures, potential = from_ase(frames), load(source)
    assert not potential.together
    results = potential.evaluate(structures)
    for k, frame in enumerate(frames):
        frame.calc = calculator
        assert results.energy[k] == pytest.approx(frame.get_potential_energy(), abs=1e-12)
        assert results.forces[structures.atoms_of(k)] == pytest.approx(frame.get_forces(), abs=1e-12)
        assert results.virial[k] == pytest.approx(
            -frame.get_stress(voigt=False) * frame.get_volume(), abs=1e-9
        )
    for a, b in ((0, 0), (1, 2)):
        assert results.virial[:, a, b] == pytest.approx(
            strained_energy(potential, structures, a, b), abs=1e-5
        )


def test_a_virial_that_the_calculator_lacks():
    structures = from_ase([copper(1), copper(2, 2)])
    right = load(EMT_SOURCE).evaluate(structures)
    finite = load(f"{EMT_SOURCE},stress=finite")
    assert "finite differences" in finite.form
    results = finite.evaluate(structures)
    assert results.virial == pytest.approx(right.virial, abs=1e-5)
    assert np.array_equal(results.forces, right.forces)
    none = load(f"{EMT_SOURCE},stress=none")
    assert "constant volume only" in none.form
    results = none.evaluate(structures)
    assert not results.virial.any()
    assert np.array_equal(results.forces, right.forces)
    with pytest.raises(ModelError, match="gives no stress") as error:
        load("ase:ase.calculators.tip3p.TIP3P")
    assert "stress=none" in error.value.fix
    assert "stress=finite" in error.value.fix
    broken = load(f"{ODD}:Broken")  # promises it, and the promise is broken later
    with pytest.raises(ModelError, match="gives no stress"):
        broken.evaluate(structures)


def test_molecules_get_their_virial_from_the_forces():
    cluster = Atoms("Cu4", positions=[[0, 0, 0], [2.4, 0.1, 0], [0.3, 2.6, 0.2], [0.1, 0.4, 2.5]])
    cluster.positions += [7.0, -3.0, 11.0]
    cluster.cell = np.eye(3) * 4.0  # far too small: images must not be seen
    structures = Structures(cluster.numbers, cluster.positions, cluster.cell.array[None], np.array([0, 4]))
    potential = load("ase:ase.calculators.lj.LennardJones,sigma=2.3,epsilon=0.1,rc=5,smooth=true,pbc=none")
    results = potential.evaluate(structures)
    cluster.calc = LennardJones(sigma=2.3, epsilon=0.1, rc=5, smooth=True)
    assert results.energy[0] == pytest.approx(cluster.get_potential_energy(), abs=1e-12)
    for a, b in ((0, 0), (0, 1), (2, 2)):
        assert results.virial[0, a, b] == pytest.approx(
            strained_energy(potential, structures, a, b)[0], abs=1e-6
        )
    slab = load("ase:ase.calculators.emt.EMT,pbc=TTF,stress=none").evaluate(from_ase([copper(1)]))
    frame = copper(1)
    frame.pbc = (True, True, False)
    frame.calc = EMT()
    assert slab.forces == pytest.approx(frame.get_forces(), abs=1e-12)


def test_the_energy_is_the_one_that_the_forces_belong_to_and_the_device_is_passed_on():
    structures = from_ase([crystal()])
    plain = load(f"{ODD}:Springs,stress=none,entropy=3.0").evaluate(structures)
    assert plain.energy[0] == pytest.approx(0.5 * (structures.positions**2).sum(), rel=1e-12)
    claims = load(f"{ODD}:Claims,stress=finite,entropy=3.0").evaluate(structures)
    assert claims.energy[0] == pytest.approx(plain.energy[0] + 3.0, rel=1e-12)
    assert abs(claims.virial[0]).max() > 1.0
    assert load(f"{ODD}:with_device,stress=none,size=2", "cuda")._calculator.parameters["device"] == "cuda2"
    assert load(f"{ODD}:with_device,stress=none,device=mine")._calculator.parameters["device"] == "mine1"


def test_a_template_brings_charges_and_info_and_only_its_own_atoms(tmp_path):
    template = crystal()
    template.set_initial_charges(np.arange(16.0))
    template.info["shift"] = 5.0
    template.write(tmp_path / "first.extxyz")
    source = f"{ODD}:Springs,stress=none,give=dipole+charge"
    potential = load(f"{source},template={tmp_path / 'first.extxyz'}")
    assert potential.card.elements == ("H", "N")
    assert potential.card.properties == ("dipole", "charge")
    warm_up(potential)
    beads = from_ase([crystal(seed=k) for k in range(2)])
    results = potential.evaluate(beads)
    q = beads.positions.reshape(2, 16, 3)
    assert results.properties["dipole"] == pytest.approx(q.sum(axis=1) + 5.0, abs=1e-12)
    assert results.atom_properties["charge"].reshape(2, 16) == pytest.approx(
        q[:, :, 1] + np.arange(16), abs=1e-12
    )
    with pytest.raises(InputError, match="other atoms than the template"):
        potential.evaluate(from_ase([copper(1)]))
    bare = load(source)
    assert bare.card.elements == ()
    warm_up(bare)  # has nothing to do, and does not fail
    assert bare.evaluate(beads).properties["dipole"] == pytest.approx(q.sum(axis=1), abs=1e-12)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("ase:nope.calculators.EMT", "no Python module nope"),
        ("ase:EMT", "not the address"),
        ("ase:ase.calculators.emt.EMTT", "has no EMTT"),
        ("ase:gone.py:maker", "no file gone.py"),
        ("ase:ase.calculators.emt.EMT,asap=true", "unknown: asap"),
        (f"{ODD}:with_device,bigness=3", "unexpected keyword argument 'bigness'"),
        (f"{ODD}:nothing", "not an ASE calculator"),
        ("ase:ase.calculators.emt.EMT,give=dipole", "cannot give dipole"),
        ("ase:ase.calculators.emt.EMT,give=colour", "colour cannot be had"),
        ("ase:ase.calculators.emt.EMT,stress=zero", "stress=zero"),
        ("ase:ase.calculators.emt.EMT,pbc=yes", "pbc=yes"),
        ("ase:ase.calculators.emt.EMT,template=gone.xyz", "template gone.xyz cannot be read"),
        (f"{ODD}:raises", "cannot be made: OSError: no licence"),
        ("ipi:harmony,k1=1", "i-PI has no driver harmony"),
        ("ipi:harmonic", "missing a required argument: 'k1'"),
        ("ipi:harmonic,k1=1,k4=1", "unknown: k4"),
        ("ipi:harmonic,k1=1,give=colour", "colour cannot be had"),
        ("ipi:gone.py", "cannot be loaded"),
        (f"{DRIVER},k=1,template=gone.xyz", "template gone.xyz cannot be read"),
        ("deepmd:gone.pb", "no model file gone.pb|No module"),
        ("torchsim:a.b:C", "needs torch_sim|no Python module a"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_with_a_fix(source, words):
    with pytest.raises((ModelError, InputError), match=words) as error:
        load(source)
    assert error.value.fix


def test_wrong_shapes_are_named():
    one = Structures(np.array([1]), np.zeros((1, 3)), np.eye(3)[None] * 5, np.array([0, 1]))
    with pytest.raises(ModelError, match=r"forces of shape \(2, 3\); wanted was \(1, 3\)"):
        load(f"{ODD}:Broken,stress=none").evaluate(one)
    with pytest.raises(ModelError, match=r"forces of shape \(15, 3\); wanted was \(16, 3\)"):
        load(f"{DRIVER},k=1,odd=true").evaluate(from_ase([crystal()]))
    with pytest.raises(ModelError, match="charges in its extras"):
        load(f"{DRIVER},k=1,give=charge").evaluate(from_ase([crystal()]))


def test_ipis_springs_are_springs_in_our_units():
    frames = [crystal(seed=0), crystal(seed=1), triclinic(), copper(1)]
    structures, potential = from_ase(frames), load("ipi:harmonic,k1=0.02")
    assert potential.together
    results = potential.evaluate(structures)
    k = 0.02 * HARTREE / BOHR**2
    assert results.forces == pytest.approx(-k * structures.positions, rel=1e-12)
    expected = [0.5 * k * (frame.positions**2).sum() for frame in frames]
    assert results.energy == pytest.approx(expected, rel=1e-12)
    assert not results.virial.any()  # what i-PI's harmonic says, and the log says so


def test_a_users_own_driver_with_its_virial_and_extras(tmp_path):
    template = crystal()
    lines = [f"{symbol} 0 0 0" for symbol in template.get_chemical_symbols()]
    (tmp_path / "init.xyz").write_text("\n".join(["16", "# CELL(abcABC): 1 1 1 90 90 90", *lines]))
    source = f"{DRIVER},k=0.1,template={tmp_path / 'init.xyz'},give=dipole+committee_energy"
    potential = load(source)
    assert not potential.together
    structures = from_ase([crystal(seed=0), triclinic()])
    results = potential.evaluate(structures)
    k, q = 0.1 * HARTREE / BOHR**2, structures.positions.reshape(2, 16, 3)
    bonds = np.diff(q, axis=1)
    energy = 0.5 * k * (bonds**2).sum(axis=(1, 2))
    assert results.energy == pytest.approx(energy, rel=1e-12)
    assert results.virial == pytest.approx(-k * np.einsum("kia,kib->kab", bonds, bonds), rel=1e-12)
    assert results.virial[:, 0, 1] == pytest.approx(strained_energy(potential, structures, 0, 1), rel=1e-6)
    assert results.properties["dipole"] == pytest.approx(q[:, 0], rel=1e-12)
    assert results.properties["committee_energy"] == pytest.approx(
        np.stack([energy, 0 * energy], 1), rel=1e-12
    )
    with pytest.raises(InputError, match="other atoms than the template"):
        potential.evaluate(from_ase([copper(1)]))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """One worker that holds several of them."""
    models = {
        "copper": EMT_SOURCE,
        "springs": "ipi:harmonic,k1=0.02",
        "odd": f"{ODD}:Fails",
        "both": f"sum:{EMT_SOURCE},0.5*ipi:harmonic,k1=0.02",
    }
    with LocalPool(models, tmp_path_factory.mktemp("logs"), workers=1, device="cpu") as running:
        running.wait_ready(timeout=120)
        yield running


def ask(pool, name, structures):
    client = PoolClient(pool.address, potential=name)
    try:
        return client.submit(structures)
    finally:
        client.close()


def test_the_pool_gives_what_they_give_here(pool):
    structures = from_ase([copper(1), copper(2, 2)])
    for name, source in pool.models.items():
        here, there = load(source).evaluate(structures), ask(pool, name, structures)
        for key in ("energy", "forces", "virial"):
            assert np.array_equal(getattr(here, key), getattr(there, key)), (name, key)


@pytest.mark.parametrize(("axis", "words"), [(0, "SCF not converged"), (1, "finite")])
def test_a_structure_that_fails_stops_at_the_pool(pool, axis, words):
    frames = [crystal(seed=k) for k in range(3)]
    frames[1].positions[3, axis] = 200.0
    with pytest.raises(StructureError, match=words) as error:
        ask(pool, "odd", from_ase(frames))
    assert error.value.suspects == (1,)
    assert np.isfinite(ask(pool, "odd", from_ase(frames[2:])).forces).all()  # the worker is alive


def test_what_cannot_be_loaded_ends_the_pool_with_the_reason(tmp_path):
    with (
        LocalPool({"x": "ase:ase.calculators.tip3p.TIP3P"}, tmp_path, workers=1, device="cpu") as running,
        pytest.raises(PoolError, match="gives no stress"),
    ):
        running.wait_ready(timeout=60)


def test_ipi_moves_the_same_with_its_driver_in_our_pool(pool, tmp_path):
    """8 beads of the ammonia crystal through the direct door, against i-PI's own <ffdirect>."""
    door = direct_door(8, ", potential: springs")
    ours = write_input(tmp_path / "ours", door, 8, 5, POSITIONS)
    own = "<ffdirect name='springs'> <pes>harmonic</pes> <parameters>{k1: 0.02}</parameters> </ffdirect>"
    theirs = write_input(tmp_path / "theirs", own, 8, 5, POSITIONS)
    assert start_ipi(ours, pool=pool.address).wait(60) == 0, (ours.parent / "i-pi.log").read_text()
    assert start_ipi(theirs).wait(60) == 0, (theirs.parent / "i-pi.log").read_text()
    assert positions(ours.parent, 8) == pytest.approx(positions(theirs.parent, 8), rel=1e-9, abs=1e-9)
