"""Potentials made of potentials: a weighted sum, and a committee.

Members that can share a batch (``prepare`` and ``run``, see :mod:`nnqmd_server.potentials.allegro`) are given
one: one neighbour list, built with the largest cutoff among them, and one transfer to the device. Others
evaluate the structures by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import SYMBOLS, Card, Potential, lattice, unknown_elements, warm_up
from nnqmd_server.structures import Results, Structures

COMMITTEE = ("committee_energy", "committee_forces", "committee_virial")
"""What a committee gives of each member: (n_structures, n_members), (n_atoms, n_members, 3), (n_structures,
n_members, 3, 3), in eV and Angstrom."""


class _Composite:
    """What a sum and a committee share."""

    def __init__(self, kind: str, members: Sequence[Potential], weights: Sequence[float]) -> None:
        self.members = tuple(members)
        self.weights = tuple(float(weight) for weight in weights)
        self.card = card_of(kind, [member.card for member in self.members], self.weights)
        forms = dict.fromkeys(member.form for member in self.members)
        self.form = f"{kind} of {len(self.members)}: {'; '.join(forms)}"
        self.together = any(getattr(member, "together", True) for member in self.members)
        self._known = {SYMBOLS.index(symbol) for symbol in self.card.elements}

    def warm_up(self) -> None:
        """Evaluate a lattice, or let the members warm up by themselves when one wants to."""
        if any(hasattr(member, "warm_up") for member in self.members):
            for member in self.members:
                warm_up(member)
        else:
            self.evaluate(lattice(self.card))

    def evaluate(self, structures: Structures) -> Results:
        """Energies, forces, virials and properties, in the order of the structures.

        Raises
        ------
        UnknownElementError
            A structure holds an element that not all members know.
        NnqmdError
            What a member raises.
        """
        if self._known:
            unknown = sorted(set(structures.numbers.tolist()) - self._known)
            if unknown:
                raise unknown_elements(self.card, [SYMBOLS[z] for z in unknown])
        return self._combined(self._of_members(structures))

    def _of_members(self, structures: Structures) -> list[Results]:
        sharing = [member for member in self.members if hasattr(member, "prepare")]
        batch = None
        if len(sharing) > 1:
            batch = sharing[0].prepare(structures, cutoff=max(member.card.cutoff for member in sharing))
        return [
            member.run(batch)
            if batch is not None and hasattr(member, "prepare")
            else member.evaluate(structures)
            for member in self.members
        ]

    def _combined(self, results: Sequence[Results]) -> Results:
        raise NotImplementedError


class Sum(_Composite):
    """A weighted sum of potentials.

    Energy, forces and virial are sums over the members, each with its weight, and so is the dipole, which is
    the derivative of the energy by a field: a member without one adds nothing to it. Any other property is
    given as it is by the one member that has it, and left out where several do.

    Parameters
    ----------
    members : sequence of Potential
        One or more.
    weights : sequence of float, optional
        A number for each; 1 unless given.

    Raises
    ------
    InputError
        There is no member, or not one weight for each.
    ModelError
        The members have no element in common.
    """

    def __init__(self, members: Sequence[Potential], weights: Sequence[float] | None = None) -> None:
        super().__init__("sum", members, [1.0] * len(members) if weights is None else weights)

    def _combined(self, results: Sequence[Results]) -> Results:
        pairs = list(zip(self.weights, results, strict=True))
        given = set(self.card.properties)
        properties = {
            key: value
            for result in results
            for key, value in result.properties.items()
            if key in given and key != "dipole"
        }
        if "dipole" in given:
            properties["dipole"] = sum(
                w * r.properties["dipole"] for w, r in pairs if "dipole" in r.properties
            )
        return Results(
            sum(w * r.energy for w, r in pairs),
            sum(w * r.forces for w, r in pairs),
            sum(w * r.virial for w, r in pairs),
            properties,
            {key: value for r in results for key, value in r.atom_properties.items() if key in given},
        )


class Committee(_Composite):
    """The mean of several potentials, with what each of them says.

    Further properties that all members give are averaged as well.

    Parameters
    ----------
    members : sequence of Potential
        Two or more, for example trained from different seeds.

    Raises
    ------
    InputError
        There are fewer than two members.
    ModelError
        The members have no element in common.
    """

    def __init__(self, members: Sequence[Potential]) -> None:
        if len(members) < 2:
            raise InputError("A committee needs two members or more.", "Give several models.")
        super().__init__("committee", members, [1.0] * len(members))

    def _combined(self, results: Sequence[Results]) -> Results:
        energy = np.stack([r.energy for r in results], axis=1)
        forces = np.stack([r.forces for r in results], axis=1)
        virial = np.stack([r.virial for r in results], axis=1)
        given = [name for name in self.card.properties if name not in COMMITTEE]
        properties = {
            name: np.mean([r.properties[name] for r in results], axis=0)
            for name in given
            if name in results[0].properties
        }
        atom_properties = {
            name: np.mean([r.atom_properties[name] for r in results], axis=0)
            for name in given
            if name in results[0].atom_properties
        }
        return Results(
            energy.mean(axis=1),
            forces.mean(axis=1),
            virial.mean(axis=1),
            properties | {"committee_energy": energy, "committee_virial": virial},
            atom_properties | {"committee_forces": forces},
        )


def card_of(kind: str, cards: Sequence[Card], weights: Sequence[float]) -> Card:
    """What a composite says of itself, from what its members say.

    It knows the elements that all members know (a member that does not tell is taken to know all), and is as
    precise as the least precise.

    Raises
    ------
    InputError
        There is no member, or not one weight for each.
    ModelError
        The members have no element in common.
    """
    if not cards or len(cards) != len(weights):
        raise InputError(
            f"A {kind} of {len(cards)} members has {len(weights)} weights.", "Give one for each."
        )
    telling = [card.elements for card in cards if card.elements]
    elements = tuple(e for e in telling[0] if all(e in others for others in telling)) if telling else ()
    if telling and not elements:
        raise ModelError(
            f"The members of a {kind} have no element in common: {'; '.join(' '.join(e) for e in telling)}.",
            "Use models of the same elements.",
        )
    said = [kind, [[card.sha256, weight] for card, weight in zip(cards, weights, strict=True)]]
    first = cards[0]
    same = all((c.ion_charges, c.carriers) == (first.ion_charges, first.carriers) for c in cards)
    return Card(
        name=f"{kind} of {', '.join(card.name for card in cards)}",
        sha256=hashlib.sha256(json.dumps(said).encode()).hexdigest(),
        elements=elements,
        cutoff=max(card.cutoff for card in cards),
        dtype="float32" if any(card.dtype == "float32" for card in cards) else first.dtype,
        properties=_properties(kind, cards),
        ion_charges=first.ion_charges if same else None,
        carriers=first.carriers if same else None,
    )


def _properties(kind: str, cards: Sequence[Card]) -> tuple[str, ...]:
    names = list(dict.fromkeys(name for card in cards for name in card.properties if name not in COMMITTEE))
    counts = {name: sum(name in card.properties for card in cards) for name in names}
    if kind == "committee":
        return (*(name for name in names if counts[name] == len(cards)), *COMMITTEE)
    return tuple(name for name in names if counts[name] == 1 or name == "dipole")
