"""Any ASE calculator as a potential: ``ase:MODULE.CLASS[,key=value]...``.

An ASE calculator takes one structure at a time, so a batch is a loop; what makes it fast is more workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, FileIOCalculator, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress
from ase.io import read
from ase.stress import voigt_6_to_full_3x3_stress

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.foreign import (
    NO_VIRIAL,
    STRESS,
    find,
    make,
    named_parameters,
    shaped,
    symbols_of,
    take,
    take_names,
)
from nnqmd_server.potentials.sources import Foreign, identity
from nnqmd_server.structures import Array, Results, Structures

GIVES = {"dipole": ("dipole", (3,)), "charge": ("charges", ())}
"""Our names of further properties: ASE's name, and the shape of one of a structure or atom."""

_STRAIN = 1e-5
"""Strain of ``stress=finite``: the difference of energies that are good to 1e-8 eV is good to 1e-3 eV."""


class AseCalculator:
    """A calculator of ASE.

    Parameters
    ----------
    calculator : ase calculator
        What computes; it keeps what it likes between structures (lists, wave functions).
    card : Card
        Its name, hash and elements (of the template; none are known without one).
    stress : str
        "required"; "finite" for central differences of the energy, twelve more of them for each structure;
        "none" for a virial of zero.
    periodic : tuple of bool
        Along which cell vectors the structures repeat. Without any, the virial is made from the forces.
    template : Atoms, optional
        Its charges, magnetic moments, tags and ``info`` go to all structures, which have its atoms.
    """

    together = False

    def __init__(
        self,
        calculator: Any,
        card: Card,
        stress: str = "required",
        periodic: tuple[bool, bool, bool] = (True, True, True),
        template: Atoms | None = None,
    ) -> None:
        self.card = card
        self._calculator = calculator
        self._stress = stress
        self._periodic = periodic
        self._template = template
        self._consistent = "free_energy" in getattr(calculator, "implemented_properties", [])
        self.form = f"ASE, {type(calculator).__name__}"
        if not any(periodic):
            self.form += ", not periodic"
        elif stress == "finite":
            self.form += ", virial by finite differences"
        elif stress == "none":
            self.form += f", {NO_VIRIAL}"
        elif "stress" not in getattr(calculator, "implemented_properties", ["stress"]):
            raise self._without_stress()

    def _without_stress(self) -> ModelError:
        return ModelError(
            f"The calculator {self.card.name} gives no stress, which i-PI's virial and pressure are made of.",
            "At constant volume add stress=none (a virial of zero: i-PI prints a wrong pressure);"
            " at constant pressure stress=finite (twelve more energies for each structure); for molecules"
            " pbc=none.",
        )

    def warm_up(self) -> None:
        """Evaluate the template once; without one there is no structure that every calculator could do."""
        if self._template is not None:
            self._evaluate(self._template.copy())

    def evaluate(self, structures: Structures) -> Results:
        """Energies (the one that the forces belong to, where there are two), forces, virials, properties.

        Raises
        ------
        ModelError
            The calculator gives no stress, or arrays of wrong shapes.
        InputError
            A structure has other atoms than the template.
        """
        results = [self._evaluate(self._atoms(structures, k)) for k in range(len(structures))]
        further = [[r[3 + n] for r in results] for n in range(len(self.card.properties))]
        named = dict(zip(self.card.properties, further, strict=True))
        return Results(
            np.array([r[0] for r in results]),
            np.concatenate([r[1] for r in results]),
            np.array([r[2] for r in results]),
            {name: np.array(values) for name, values in named.items() if name == "dipole"},
            {name: np.concatenate(values) for name, values in named.items() if name == "charge"},
        )

    def _atoms(self, structures: Structures, k: int) -> Atoms:
        part = structures.atoms_of(k)
        numbers = structures.numbers[part]
        if self._template is None:
            atoms = Atoms(numbers)
        elif np.array_equal(self._template.numbers, numbers):
            atoms = self._template.copy()
        else:
            raise InputError(
                f"A structure has other atoms than the template of {self.card.name}.",
                "Give the simulation's first structure as template=..., with its atoms in the same order.",
            )
        atoms.positions = structures.positions[part]
        atoms.set_cell(structures.cells[k])
        atoms.pbc = self._periodic
        return atoms

    def _evaluate(self, atoms: Atoms) -> tuple:
        name, n = self.card.name, len(atoms)
        atoms.calc = self._calculator
        forces = shaped(name, "forces", atoms.get_forces(), (n, 3))
        energy = self._energy(atoms)
        further = [self._further(atoms, name) for name in self.card.properties]
        return float(energy), forces, self._virial(atoms, forces), *further

    def _energy(self, atoms: Atoms) -> float:
        try:
            return atoms.get_potential_energy(force_consistent=self._consistent)
        except PropertyNotImplementedError:
            if not self._consistent:
                raise
            self._consistent = False  # metatomic's names all properties of ASE, whatever the model gives
            return atoms.get_potential_energy()

    def _virial(self, atoms: Atoms, forces: Array) -> Array:
        if not any(self._periodic):
            virial = atoms.positions.T @ forces  # -dE/d(strain) of a system without images
            return (virial + virial.T) / 2
        if self._stress == "none":
            return np.zeros((3, 3))
        if self._stress == "finite":
            stress = calculate_numerical_stress(atoms, _STRAIN, force_consistent=self._consistent)
        else:
            try:
                stress = atoms.get_stress()
            except PropertyNotImplementedError as error:
                raise self._without_stress() from error
        stress = shaped(self.card.name, "stress", stress, (6,))
        return -voigt_6_to_full_3x3_stress(stress) * atoms.get_volume()

    def _further(self, atoms: Atoms, name: str) -> Array:
        asked, shape = GIVES[name]
        shape = shape if name == "dipole" else (len(atoms), *shape)
        return shaped(self.card.name, asked, self._calculator.get_property(asked, atoms), shape)


def load(source: Foreign, device: str = "cpu") -> AseCalculator:
    """The calculator that a source names.

    Options of our own are ``stress`` (see :class:`AseCalculator`), ``pbc`` (``none``, or T or F for each cell
    vector as in ``TTF``), ``template`` (a file that ASE reads) and ``give`` (``dipole``, ``charge`` or both,
    joined by ``+``); all others are the calculator's.

    Raises
    ------
    InputError
        An option of our own cannot be read.
    ModelError
        The calculator cannot be found or made, or gives no stress.
    """
    options = dict(source.options)
    stress = take(options, "stress", STRESS, "required")
    periodic = _read_periodic(options.pop("pbc", "TTT"))
    gives = take_names(options, "give", list(GIVES))
    template = _read_template(options.pop("template", None))
    factory = find(source.what)
    text = f"ase:{source.what}"
    calculator = make(text, factory, options, device, _known(factory))
    if not hasattr(calculator, "get_property"):
        raise ModelError(
            f"{text} made a {type(calculator).__name__}, which is not an ASE calculator.",
            "Name the class of the calculator, or a function that returns one.",
        )
    missing = [n for n in gives if GIVES[n][0] not in getattr(calculator, "implemented_properties", [])]
    if missing:
        raise ModelError(
            f"{text} cannot give {', '.join(missing)}.", f"It has: {calculator.implemented_properties}."
        )
    elements = symbols_of(template.numbers) if template is not None else ()
    card = Card(text, identity(source), elements, 0.0, "float64", gives)
    return AseCalculator(calculator, card, stress, periodic, template)


def _known(factory: Callable[..., Any]) -> list[str] | None:
    """The arguments of a calculator, for those that take any and drop what they do not know.

    That they do is only sure of ASE's own kind with a table of parameters that is not a file format's.
    """
    if not isinstance(factory, type) or not issubclass(factory, Calculator):
        return None
    if not factory.default_parameters or issubclass(factory, FileIOCalculator):
        return None
    return sorted({*factory.default_parameters, *named_parameters(factory)})


def _read_periodic(value: object) -> tuple[bool, bool, bool]:
    text = "FFF" if value is None or value == "none" else str(value)
    if len(text) != 3 or set(text) - {"T", "F"}:
        raise InputError(
            f"pbc={value} is not possible.", "Write pbc=none, or T or F for each cell vector: pbc=TTF."
        )
    return tuple(sign == "T" for sign in text)


def _read_template(path: str | None) -> Atoms | None:
    if path is None:
        return None
    try:
        atoms = read(path, parallel=False)
    except Exception as error:  # ASE's readers raise whatever they like
        raise InputError(
            f"The template {path} cannot be read: {error}.", "Give a file that ASE reads."
        ) from error
    atoms.calc = None
    atoms.constraints = []
    return atoms
