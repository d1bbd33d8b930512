"""What every potential is: ``evaluate(Structures) -> Results``, and a card that says what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np

from nnqmd_server.errors import UnknownElementError
from nnqmd_server.structures import Results, Structures

_SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br "
    "Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er "
    "Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md "
    "No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)

SYMBOLS = tuple(_SYMBOLS.split())
"""Chemical symbols by atomic number: here, since a worker of a foreign interpreter may lack ASE."""


@dataclass(frozen=True)
class Card:
    """What a potential says of itself.

    Parameters
    ----------
    name : str
        File name of the model.
    sha256 : str
        Hash of the model file; a pool refuses workers whose hash differs.
    elements : tuple of str
        Chemical symbols that the model knows, in its own type order.
    cutoff : float
        Cutoff radius [Angstrom].
    dtype : str
        Precision of the network, "float32" or "float64".
    properties : tuple of str
        What it gives beyond energy, forces and virial ("wannier_centroid", "dipole").
    ion_charges : dict
        Charge of the ion core of each element [e]; empty without a Wannier read-out.
    carriers : dict
        Electrons that the Wannier centroid of each carrier element stands for.
    strictly_local : bool
        Every atom's energy depends on the edges of that atom alone, so a structure can be split by centres.
    """

    name: str
    sha256: str
    elements: tuple[str, ...]
    cutoff: float
    dtype: str
    properties: tuple[str, ...] = ()
    ion_charges: dict[str, float] | None = None
    carriers: dict[str, float] | None = None
    strictly_local: bool = False

    def as_dict(self) -> dict:
        """As plain JSON types."""
        return asdict(self)


BORN = "born_charges"
"""The property of atoms that holds Born charges [e], shape (n_atoms, 3, 3)."""


def with_born(card: Card) -> Card:
    """The card of the same model when it gives Born charges too."""
    return replace(card, properties=(*card.properties, BORN))


def unknown_elements(card: Card, symbols: Sequence[str]) -> UnknownElementError:
    """The error for elements that a model does not know."""
    return UnknownElementError(
        f"The model {card.name} does not know {', '.join(symbols)}; it knows {', '.join(card.elements)}.",
        "Use a model that was trained on all elements of the structure.",
    )


class Potential(Protocol):
    """Anything that computes energies, forces and virials of a batch of structures."""

    card: Card
    form: str
    """How the model runs, in words for the log ("compiled for cpu", "eager, no C++ compiler")."""
    # Optional: `together` (bool, True where it is missing) says that a batch costs less than its structures
    # one by one, so that simulations are merged for it. `spent` (seconds in "lists", "copies" and "model"
    # until now) with `timing` (set: wait for the device after each) gives `nnqmd bench` its shares.
    # Optional: `warm_up()` does its first-call work, where a lattice of its elements is not what it can do.

    def evaluate(self, structures: Structures) -> Results:
        """Energies [eV], forces [eV/Angstrom], virials [eV] and properties, in the order given."""
        ...


def warm_up(potential: Potential) -> None:
    """Evaluate something small once, so that the first batch does not pay for first-call work."""
    own = getattr(potential, "warm_up", None)
    if own is not None:
        own()
    else:
        potential.evaluate(lattice(potential.card))


def lattice(card: Card) -> Structures:
    """A cubic lattice of 27 atoms of the elements that a potential knows, 2 Angstrom apart."""
    numbers = np.array([SYMBOLS.index(s) for s in card.elements or ("H",)], dtype=np.int64)
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * 2.0
    offsets = np.array([0, len(grid)], dtype=np.int64)
    return Structures(np.resize(numbers, len(grid)), grid, np.eye(3)[None] * 6.0, offsets)
