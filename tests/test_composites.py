"""Sums and committees: their arithmetic, one prepared batch for all members, the pool and a door."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from conftest import MODEL, crystal, triclinic
from springs import NUMBERS, POSITIONS, direct_door, positions, start_ipi, write_input
from two_potentials import Alone, Counted

from nnqmd_server.doors.extras import EXTRAS
from nnqmd_server.errors import InputError, ModelError, UnknownElementError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.launch import LocalPool
from nnqmd_server.potentials.base import warm_up
from nnqmd_server.potentials.composites import COMMITTEE, Committee, Sum
from nnqmd_server.potentials.load import card_of, load
from nnqmd_server.structures import Structures, from_ase
from nnqmd_server.units import BOHR, HARTREE

TWO = Path(__file__).with_name("two_potentials.py")
BEADS = from_ase([crystal(seed=0), triclinic(), crystal(seed=1, repeat=(1, 1, 2))])


def test_a_sum_is_a_weighted_sum_of_everything_that_follows_from_the_energy():
    members = [
        Counted(1.0, 4.0, properties=("dipole", "charge")),
        Counted(2.0, 5.0, properties=("dipole",)),
        Alone(4.0),
    ]
    whole, alone = Sum(members, [1.0, -0.5, 0.25]), Counted(1.0, 4.0, properties=("dipole", "charge"))
    results, one = whole.evaluate(BEADS), alone.evaluate(BEADS)
    for key in ("energy", "forces", "virial"):
        assert getattr(results, key) == pytest.approx((1 - 0.5 * 2 + 0.25 * 4) * getattr(one, key), rel=1e-12)
    # The dipole is -dE/d(field): the weights are its weights, and who has none adds none.
    assert results.properties["dipole"] == pytest.approx((1 - 0.5 * 2) * one.properties["dipole"], abs=1e-12)
    assert np.array_equal(results.atom_properties["charge"], one.atom_properties["charge"])
    assert whole.card.properties == ("dipole", "charge")
    assert whole.card.cutoff == 5.0


def test_a_committee_is_the_mean_and_says_what_each_member_says():
    members = [Counted(s, 4.0, properties=("dipole", "charge")) for s in (0.7, 0.9, 1.4)]
    whole = Committee([*members[:2], Alone(1.4, properties=("dipole", "charge"))])
    results, parts = whole.evaluate(BEADS), [member.evaluate(BEADS) for member in members]
    for key in ("energy", "forces", "virial"):
        assert getattr(results, key) == pytest.approx(
            np.mean([getattr(p, key) for p in parts], axis=0), rel=1e-12
        )
    for k, part in enumerate(parts):
        assert np.array_equal(results.properties["committee_energy"][:, k], part.energy)
        assert np.array_equal(results.properties["committee_virial"][:, k], part.virial)
        assert np.array_equal(results.atom_properties["committee_forces"][:, k], part.forces)
    assert results.properties["dipole"] == pytest.approx(parts[0].properties["dipole"] / 0.7, rel=1e-12)
    assert whole.card.properties == ("dipole", "charge", *COMMITTEE)
    assert set(results.properties) | set(results.atom_properties) == set(whole.card.properties)


def test_members_are_prepared_once_with_the_longest_cutoff():
    members = [Counted(1.0, 4.0), Counted(2.0, 6.0), Alone(1.0), Counted(3.0, 5.0)]
    Committee(members).evaluate(BEADS)
    assert [getattr(member, "prepared", None) for member in members] == [[6.0], [], None, []]


def test_a_composite_of_composites():
    """A baseline and a committee of corrections, as delta learning has it."""
    inner = Committee([Counted(0.7, 4.0), Counted(0.9, 4.0)])
    results = Sum([Counted(2.0, 4.0), inner]).evaluate(BEADS)
    assert results.energy == pytest.approx(2.8 * Counted(1.0, 4.0).evaluate(BEADS).energy, rel=1e-12)
    assert not set(COMMITTEE) & set(results.properties)


def test_what_does_not_go_together_is_an_error_in_words():
    with pytest.raises(ModelError, match="no element in common: N H; Cu"):
        Sum([Counted(1.0, 4.0), Counted(1.0, 4.0, elements=("Cu",))])
    with pytest.raises(InputError, match="2 members has 1 weights"):
        Sum([Counted(1.0, 4.0), Counted(1.0, 4.0)], [1.0])
    with pytest.raises(InputError, match="two members or more"):
        Committee([Counted(1.0, 4.0)])
    half = Sum([Counted(1.0, 4.0), Counted(1.0, 4.0, elements=("H", "O"), dtype="float32")])
    assert half.card.elements == ("H",)
    assert half.card.dtype == "float32"
    with pytest.raises(UnknownElementError, match="does not know N"):
        half.evaluate(BEADS)
    source = f"sum:{TWO}:soft,ase:ase.calculators.emt.EMT"
    assert load(source).card.elements == ("N", "H")  # a member that does not tell is not in the way
    warm_up(load(source))


@pytest.fixture(scope="module")
def members():
    """The shipped model and one with other weights, eager, in this process."""
    import torch

    found = [load(str(MODEL), compiled=False) for _ in range(2)]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weights in found[1]._model.parameters():
            weights += 0.02 * weights.abs().mean() * torch.randn(weights.shape, generator=generator)
    return found


def test_allegro_members_share_one_list_and_say_what_they_say_alone(members, monkeypatch):
    from nnqmd_server.potentials.neighbours import Lists

    alone = [member.evaluate(BEADS) for member in members]
    assert np.abs(alone[0].forces - alone[1].forces).max() > 1e-3  # they are two
    built, edges = [], Lists.edges
    monkeypatch.setattr(Lists, "edges", lambda self, s: built.append(len(s)) or edges(self, s))
    whole = Committee(members)
    results = whole.evaluate(BEADS)
    committee_calls = list(built)
    built.clear()
    members[0].evaluate(BEADS)
    assert committee_calls == built  # as many lists as one member alone
    for k, part in enumerate(alone):
        assert results.properties["committee_energy"][:, k] == pytest.approx(part.energy, abs=1e-9)
        assert results.atom_properties["committee_forces"][:, k] == pytest.approx(part.forces, abs=1e-9)
        assert results.properties["committee_virial"][:, k] == pytest.approx(part.virial, abs=1e-9)
    for name in ("dipole", "wannier_centroid"):
        where = "properties" if name == "dipole" else "atom_properties"
        both = [getattr(part, where)[name] for part in alone]
        assert getattr(results, where)[name] == pytest.approx(np.mean(both, axis=0), abs=1e-9)
    total = Sum(members, [0.25, 0.75]).evaluate(BEADS)
    mixed = 0.25 * alone[0].forces + 0.75 * alone[1].forces
    assert total.forces == pytest.approx(mixed, abs=1e-9)


def test_an_allegro_member_with_longer_neighbours_does_not_disturb_the_other(members):
    """The list of a partner that needs 7 Angstrom, pruned, is the list of the model itself."""
    alone = members[0].evaluate(BEADS)
    results = Sum([members[0], _Far(members[1])], [1.0, 0.0]).evaluate(BEADS)
    assert results.energy == pytest.approx(alone.energy, abs=1e-5)
    assert results.forces == pytest.approx(alone.forces, abs=2e-5)  # float32: another order of the sums


class _Far:
    """An Allegro model that claims to need neighbours up to 7 Angstrom."""

    form = "far"

    def __init__(self, inner):
        from dataclasses import replace

        self._inner = inner
        self.card = replace(inner.card, cutoff=7.0)

    def prepare(self, structures, cutoff=None):
        return self._inner.prepare(structures, cutoff=cutoff or 7.0)

    def run(self, ready):
        assert ready.cutoff == 7.0
        return self._inner.run(ready)


def test_a_committee_through_the_pool_and_a_door(tmp_path):
    """i-PI moves on the mean, and is told what every member says."""
    source = f"committee:{TWO}:soft,{TWO}:stiff"
    files = POSITIONS + "".join(
        f"<trajectory filename='{name}' stride='1' extra_type='{name}'> extras </trajectory>"
        for name in ("committee_pot", "dipole")
    )
    door = direct_door(2, ", extras: dipole committee_pot committee_force committee_virial")
    path = write_input(tmp_path / "run", door, 2, 3, files)
    with LocalPool({"springs": source}, tmp_path / "logs", workers=1, device="cpu") as pool:
        pool.wait_ready(timeout=60)
        client = PoolClient(pool.address)
        there = client.submit(BEADS)
        assert client.card()["properties"] == ["dipole", *COMMITTEE]
        client.close()
        assert start_ipi(path, pool=pool.address).wait(60) == 0, (path.parent / "i-pi.log").read_text()
    here = load(source).evaluate(BEADS)
    for key in ("energy", "forces", "virial"):
        assert np.array_equal(getattr(there, key), getattr(here, key)), key
    for name in ("dipole", "committee_energy", "committee_virial"):
        assert np.array_equal(there.properties[name], here.properties[name]), name
    assert np.array_equal(there.atom_properties["committee_forces"], here.atom_properties["committee_forces"])
    q = positions(path.parent, 2)
    unit = HARTREE / BOHR**2
    for bead in range(2):
        lines = (path.parent / f"run.committee_pot_{bead}").read_text().splitlines()
        table = np.array([line.split() for line in lines if "#" not in line], dtype=float)
        expected = 0.5 * (q[:, bead] ** 2).sum(axis=(1, 2))[:, None] * np.array([0.5, 1.5]) / unit
        assert table == pytest.approx(expected, rel=5e-5)
    assert set(COMMITTEE) <= {extra.source for extra in EXTRAS.values()}
    assert len(NUMBERS) == q.shape[2]


def test_a_committee_of_files_says_its_card_without_being_loaded_and_keeps_it(potential):
    source = f"committee:{MODEL},{MODEL}"
    found = load(source)
    assert found.card == card_of(source)
    assert np.abs(found.evaluate(BEADS).forces - potential.evaluate(BEADS).forces).max() < 1e-5


def test_no_structure_of_another_element_gets_in(members):
    carbon = from_ase([Atoms("C", cell=[5] * 3, pbc=True)])
    assert isinstance(carbon, Structures)
    with pytest.raises(UnknownElementError, match="does not know C"):
        Committee(members).evaluate(carbon)
