"""Labelled frames in extended XYZ, under ASE's keys or other ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read

from nnqmd_server.errors import DataError, InputError
from nnqmd_server.labels.frames import CENTRES, CENTROID, GROUP, SOURCE, bad_frame, labelled
from nnqmd_server.structures import Array
from nnqmd_server.units import BOHR, GPA, HARTREE, KCAL_PER_MOL

QUANTITIES = ("energy", "forces", "stress", "virial")

_ENERGIES = {
    "ev": 1.0,
    "mev": 1e-3,
    "hartree": HARTREE,
    "rydberg": HARTREE / 2,
    "kcal/mol": KCAL_PER_MOL,
    "kj/mol": KCAL_PER_MOL / 4.184,
}
_LENGTHS = {"angstrom": 1.0, "a": 1.0, "bohr": BOHR, "nm": 10.0}
_PRESSURES = {"gpa": GPA, "kbar": 0.1 * GPA, "bar": 1e-4 * GPA, "mpa": 1e-3 * GPA}


def parse_keys(text: str) -> dict[str, str]:
    """``energy=REF_energy,forces=REF_forces`` as a dict.

    Raises
    ------
    InputError
        A name before = is none of energy, forces, stress, virial.
    """
    return _pairs(text, "--keys", QUANTITIES)


def parse_units(text: str) -> dict[str, float]:
    """``energy=hartree,forces=hartree/bohr`` as factors to eV, eV/Angstrom and eV/Angstrom^3.

    Also ``length``, for the positions and the cell.

    Raises
    ------
    InputError
        A quantity or unit is not known.
    """
    given = _pairs(text, "--units", (*QUANTITIES, "length"))
    return {name: _factor(name, unit) for name, unit in given.items()}


def _pairs(text: str, option: str, known: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in known or not value:
            raise InputError(
                f"{part!r} in {option} is not NAME=VALUE.",
                f"Names are {', '.join(known)}, separated by commas.",
            )
        found[name] = value
    return found


def _factor(quantity: str, unit: str) -> float:
    text = unit.lower().replace("å", "a")
    if quantity == "length" and text in _LENGTHS:
        return _LENGTHS[text]
    if quantity in {"energy", "virial"} and text in _ENERGIES:
        return _ENERGIES[text]
    if quantity == "stress" and text in _PRESSURES:
        return _PRESSURES[text]
    per, slash, length = text.rpartition("/")
    power = {"forces": 1, "stress": 3}.get(quantity)
    if slash and power and per in _ENERGIES:
        name, _, raised = length.partition("^")
        if name in _LENGTHS and (raised or "1") == str(power):
            return _ENERGIES[per] / _LENGTHS[name] ** power
    raise InputError(
        f"{unit!r} is not a known unit of {quantity}.",
        "Use eV, hartree, rydberg, kcal/mol, kJ/mol; angstrom, bohr, nm; forces as eV/angstrom; "
        "stress as GPa, kbar or eV/angstrom^3.",
    )


def read_extxyz(path: Path, group: str, keys: Mapping[str, str], units: Mapping[str, float]) -> list[Atoms]:
    """All frames of an extxyz file.

    Parameters
    ----------
    path : Path
        The file. Under the keys energy, forces, stress and virial its numbers are in eV, eV/Angstrom,
        eV/Angstrom^3 and eV, as ASE defines them, unless ``units`` says otherwise.
    group : str
        Name of the run for frames without ``config_type``.
    keys : mapping
        Other names for energy, forces, stress and virial.
    units : mapping
        Factors of `parse_units`; required for whatever has another name.

    Raises
    ------
    DataError
        A frame cannot be read, lacks energy or forces, or its stress and virial contradict each other.
    """
    for name in keys:
        if name not in units:
            usual = {"forces": "eV/angstrom", "stress": "eV/angstrom^3"}.get(name, "eV")
            raise DataError(
                f"The unit of {keys[name]!r} in {path} is not known: only ASE's own keys define one.",
                f"Say it, for example --units {name}={usual}.",
            )
    try:
        frames = read(path, ":", format="extxyz", parallel=False)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise DataError(f"{path} cannot be read as extended XYZ: {error}.", "Correct the file.") from error
    return [_frame(path, k, frame, group, keys, units) for k, frame in enumerate(frames)]


def _frame(
    path: Path, number: int, frame: Atoms, group: str, keys: Mapping[str, str], units: Mapping[str, float]
) -> Atoms:
    found = {name: _value(frame, keys.get(name, name)) for name in QUANTITIES}
    for name in ("energy", "forces"):
        if found[name] is None:
            there = sorted({*frame.info, *frame.arrays, *_results(frame)} - {"numbers", "positions"})
            raise bad_frame(
                path,
                number,
                f"has no {keys.get(name, name)!r}",
                f"Say what it is called with --keys {name}=NAME; there is {', '.join(there) or 'none'}.",
            )
    scaled = {
        name: None if value is None else np.asarray(value, dtype=float) * units.get(name, 1.0)
        for name, value in found.items()
    }
    atoms = frame.copy()
    length = units.get("length", 1.0)
    atoms.set_cell(atoms.cell.array * length, scale_atoms=False)
    atoms.positions *= length
    stress = _stress(path, number, atoms, scaled["stress"], scaled["virial"])
    info = {GROUP: frame.info.get(GROUP, group), SOURCE: frame.info.get(SOURCE, f"{path.stem}_f{number:06d}")}
    made = labelled(atoms, float(scaled["energy"]), scaled["forces"], stress, info, (path, number))
    for name in (CENTROID, CENTRES):
        if name in frame.arrays:
            made.set_array(name, frame.arrays[name] * length)
    return made


def _value(frame: Atoms, key: str) -> Any:
    for place in (_results(frame), frame.info, frame.arrays):
        if key in place:
            return place[key]
    return None


def _results(frame: Atoms) -> Mapping[str, Any]:
    return frame.calc.results if frame.calc is not None else {}


def _stress(
    path: Path, number: int, atoms: Atoms, stress: Array | None, virial: Array | None
) -> Array | None:
    full = None if stress is None else _matrix(path, number, stress)
    if virial is None:
        return full
    if atoms.cell.rank < 3:
        raise bad_frame(path, number, "has a virial but no cell", "Give the cell, or leave the virial out.")
    # virial = -V stress in extended XYZ (QUIP), nequip and DeePMD
    of_virial = -_matrix(path, number, virial) / atoms.get_volume()
    if full is not None:
        size = max(float(np.abs(full).max()), 1e-6)
        if np.abs(full - of_virial).max() > 0.02 * size:
            opposite = np.abs(full + of_virial).max() <= 0.02 * size
            raise bad_frame(
                path,
                number,
                "has a stress and a virial that "
                + ("have the same sign" if opposite else "contradict each other"),
                "virial is -volume x stress; correct or remove the one that is wrong.",
            )
    return of_virial if full is None else full


def _matrix(path: Path, number: int, values: Array) -> Array:
    if values.size == 9:
        return values.reshape(3, 3)
    if values.size == 6:
        xx, yy, zz, yz, xz, xy = values.ravel()
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    raise bad_frame(
        path, number, f"has a stress or virial of {values.size} numbers", "Give 9, or 6 in Voigt's order."
    )
