"""What i-PI gets beside energy, forces and virial: one JSON object for each bead, under i-PI's own names.

Only names that stand in ``EXTRAS`` are ever sent. i-PI keeps ``raw`` for itself, and its ``<ffcommittee>``
stops over ``pot``, ``force``, ``virial`` and ``uncertainty``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.structures import Array, Results
from nnqmd_server.units import BOHR, HARTREE


@dataclass(frozen=True)
class Extra:
    """An extra: which of a model's properties it is, and in which unit i-PI gets it.

    ``rank`` is the number of axes that follow the first one, of structures or ``of_atoms``; ``unit`` is
    i-PI's unit in the model's.
    """

    source: str
    of_atoms: bool
    rank: int
    unit: float


EXTRAS = {
    "dipole": Extra("dipole", of_atoms=False, rank=1, unit=BOHR),
    "BEC": Extra("born_charges", of_atoms=True, rank=2, unit=1.0),
    "charges": Extra("charge", of_atoms=True, rank=0, unit=1.0),
    "committee_pot": Extra("committee_energy", of_atoms=False, rank=1, unit=HARTREE),
    "committee_force": Extra("committee_forces", of_atoms=True, rank=2, unit=HARTREE / BOHR),
    "committee_virial": Extra("committee_virial", of_atoms=False, rank=3, unit=HARTREE),
}


def check_extras(names: Sequence[str], card: dict[str, Any]) -> None:
    """Make sure that a model can give what i-PI is to get.

    Parameters
    ----------
    names : sequence of str
        Extras by i-PI's names.
    card : dict
        The card of the model.

    Raises
    ------
    InputError
        There is no such extra, or the model does not give it.
    """
    unknown = [name for name in names if name not in EXTRAS]
    if unknown:
        raise InputError(
            f"There are no extras {', '.join(unknown)}.", f"Ask for some of: {', '.join(EXTRAS)}."
        )
    able = [name for name, extra in EXTRAS.items() if extra.source in card["properties"]]
    missing = [name for name in names if name not in able]
    if missing:
        raise InputError(
            f"The model {card['name']} cannot give the extras {', '.join(missing)}.",
            f"It gives: {', '.join(able)}." if able else "Leave them out: it gives energy and forces only.",
        )


def share_extras(names: Sequence[str], cards: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Which extras each of several force fields is to give, when every one must come from some.

    Parameters
    ----------
    names : sequence of str
        Extras by i-PI's names.
    cards : sequence of dict
        The card of each force field's model; a single one must give all.

    Raises
    ------
    InputError
        There is no such extra, or no model gives it.
    """
    if len(cards) == 1:
        check_extras(names, cards[0])
    elif cards:
        given = sorted({name for card in cards for name in card["properties"]})
        check_extras(names, {"name": " and ".join(card["name"] for card in cards), "properties": given})
    return [[name for name in names if EXTRAS[name].source in card["properties"]] for card in cards]


def extras_of(results: Results, names: Sequence[str]) -> list[str]:
    """The text that i-PI gets for each structure of a force set; nothing when nothing was asked for.

    In i-PI's units (e bohr, e, hartree, hartree/bohr): ``dipole`` [3], ``charges`` [n_atoms],
    ``BEC`` [3 n_atoms][3] (Born charges dM/dR: row of atom and displacement, column of the dipole, as i-PI's
    driven dynamics takes them), ``committee_pot`` [n_members], ``committee_force`` [n_members][3 n_atoms],
    ``committee_virial`` [n_members][9].

    Raises
    ------
    ModelError
        The results lack something that the model's card promises, or have it in another shape.
    """
    if not names:
        return [""] * len(results)
    columns = {name: _values(results, name) for name in names}
    return [
        json.dumps({name: values[k].tolist() for name, values in columns.items()})
        for k in range(len(results))
    ]


def property_of(results: Results, extra: Extra) -> Array:
    """What a model gave for an extra, in the model's units; shape (n_structures, ...) or (n_atoms, ...).

    Raises
    ------
    ModelError
        It is not there, or has another shape.
    """
    values = (results.atom_properties if extra.of_atoms else results.properties).get(extra.source)
    if values is None or values.ndim != 1 + extra.rank:
        found = "none" if values is None else f"one of shape {values.shape}"
        raise ModelError(
            f"The model's card promises {extra.source}, and it gave {found}.", "Correct the potential."
        )
    return values


def _values(results: Results, name: str) -> Array:
    """An extra of all structures, shape (n_structures, ...) as i-PI gets it."""
    extra = EXTRAS[name]
    values = property_of(results, extra) / extra.unit
    if extra.of_atoms:
        values = values.reshape(len(results), -1, *values.shape[1:])  # beads are of one size
    if name == "BEC":
        return values.swapaxes(2, 3).reshape(len(results), -1, 3)
    if name == "committee_force":
        values = values.swapaxes(1, 2)
    return values.reshape(*values.shape[:2], -1) if extra.rank > 1 else values
