"""Our units against i-PI's own, through i-PI's own reader and cell conventions."""

import json

import numpy as np
import pytest
from conftest import triclinic
from ipi.utils.io import read_file
from ipi.utils.units import unit_to_internal, unit_to_user

from nnqmd_server import units
from nnqmd_server.doors.force_sets import from_results, to_structures
from nnqmd_server.structures import Results


def test_constants_agree_with_ipi_to_the_digits_that_ipi_has():
    assert unit_to_user("energy", "electronvolt", 1.0) == pytest.approx(units.HARTREE, rel=2e-7)
    assert unit_to_user("length", "angstrom", 1.0) == pytest.approx(units.BOHR, rel=2e-8)
    assert unit_to_internal("time", "femtosecond", 1.0) == pytest.approx(1 / units.ATOMIC_TIME, rel=1e-6)
    assert unit_to_internal("temperature", "kelvin", 1.0) == pytest.approx(units.KB / units.HARTREE, rel=1e-5)


def test_a_triclinic_cell_survives_the_way_through_ipi(tmp_path):
    """A structure goes into i-PI's reader as angstrom and comes back from its wire as the same structure."""
    # i-PI's files give lengths and angles, so the first vector lies along x and the second in the xy plane.
    atoms = triclinic()
    atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
    a, b, c, alpha, beta, gamma = atoms.cell.cellpar()
    path = tmp_path / "init.xyz"
    lines = [
        f"{s} {p[0]:.12f} {p[1]:.12f} {p[2]:.12f}"
        for s, p in zip(atoms.symbols, atoms.positions, strict=True)
    ]
    path.write_text(
        f"{len(atoms)}\n# CELL(abcABC): {a:.12f} {b:.12f} {c:.12f} {alpha:.12f} {beta:.12f} {gamma:.12f} "
        "Step: 0 Bead: 0 positions{angstrom} cell{angstrom}\n" + "\n".join(lines) + "\n"
    )
    with path.open() as file:
        held = read_file("xyz", file)
    back = to_structures(atoms.numbers, [held["cell"].h], [held["atoms"].q])
    assert back.cells[0] == pytest.approx(atoms.cell.array, abs=1e-6)
    assert back.positions == pytest.approx(atoms.positions, abs=1e-6)
    # The transposed cell is a different crystal: the test would see a mix-up of rows and columns.
    assert np.abs(back.cells[0].T - atoms.cell.array).max() > 0.1


def test_energies_forces_and_virials_come_back_in_electronvolt():
    rng = np.random.default_rng(0)
    virial = rng.normal(size=(2, 3, 3))
    results = Results(
        np.array([-3.0, 5.0]), rng.normal(size=(8, 3)), virial, {"dipole": rng.normal(size=(2, 3))}
    )
    answers = from_results(results, ["dipole"])
    for k, (energy, forces, one_virial, extras) in enumerate(answers):
        assert unit_to_user("energy", "electronvolt", energy) == pytest.approx(results.energy[k], rel=2e-7)
        assert unit_to_user("force", "ev/ang", 1.0) * forces == pytest.approx(
            results.forces[4 * k : 4 * k + 4], rel=2e-6
        )
        assert unit_to_user("energy", "electronvolt", 1.0) * one_virial == pytest.approx(virial[k], rel=2e-7)
        dipole = json.loads(extras)["dipole"]
        assert np.array(dipole) * units.BOHR == pytest.approx(results.properties["dipole"][k], rel=1e-12)
