"""The shipped example of ring-polymer contraction."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import MODEL, ROOT, triclinic
from test_runs import numbers, simulate

from nnqmd_server.pool.launch import LocalPool
from nnqmd_server.potentials.load import load
from nnqmd_server.structures import from_ase

EXAMPLE = ROOT / "ipi_inputs/ammonia-solid-contraction"
BONDS = f"{EXAMPLE / 'bonds.py'}:bonds"


def test_forces_and_virial_of_the_bonds_are_derivatives_of_their_energy():
    bonds = load(BONDS)
    atoms = triclinic(shake=0.05)
    found = bonds.evaluate(from_ase([atoms, triclinic(shake=0.03, seed=9)]))
    rng = np.random.default_rng(2)
    move, strain = rng.normal(size=(len(atoms), 3)), rng.normal(size=(3, 3))
    strain = (strain + strain.T) / 2

    def energy(step, bent):
        moved = atoms.copy()
        moved.positions += step * move
        moved.set_cell(moved.cell.array @ (np.eye(3) + bent * strain), scale_atoms=True)
        return bonds.evaluate(from_ase([moved])).energy[0]

    h = 1e-5
    along = -(energy(h, 0) - energy(-h, 0)) / (2 * h)
    assert np.sum(found.forces[: len(atoms)] * move) == pytest.approx(along, rel=1e-6)
    stretched = -(energy(0, h) - energy(0, -h)) / (2 * h)  # virial = sum r f = -dE/dstrain
    assert np.sum(found.virial[0] * strain) == pytest.approx(stretched, rel=1e-6)


@pytest.mark.slow
def test_contracted_to_all_its_beads_it_is_the_network_alone(tmp_path):
    """Three forces that add up to the network's, whatever the bonds are; and what is shipped runs."""
    text = (EXAMPLE / "input.xml").read_text()
    text = re.sub(r"stride='\d+'", "stride='1'", text)
    for name in ("init.xyz", "nnqmd_pes.py"):
        (tmp_path / name).write_text((EXAMPLE / name).read_text())
    few = text.replace("nbeads='32'", "nbeads='8'")
    all_beads = few.replace("nbeads='6'", "").replace("<batch_size>6", "<batch_size>8")
    alone = re.sub(r"<force name='(bonds|less_bonds)'.*?/>", "", all_beads)
    with LocalPool(
        {"allegro": str(MODEL), "bonds": BONDS}, tmp_path / "logs", workers=2, device="cpu"
    ) as pool:
        pool.wait_ready(timeout=280)
        done = {}
        for key, variant in (("all", all_beads), ("alone", alone), ("shipped", text)):
            (tmp_path / f"{key}.xml").write_text(variant)
            done[key] = simulate(tmp_path / f"{key}.xml", tmp_path / key, pool, steps=10)
    mine, other = (numbers(done[key].folder / "nh3.xc.xyz") for key in ("all", "alone"))
    assert mine == pytest.approx(other, abs=1e-5)  # float32 forces
    assert np.isfinite(numbers(done["shipped"].folder / "nh3.xc.xyz")).all()
