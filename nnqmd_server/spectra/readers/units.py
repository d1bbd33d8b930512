"""The unit of a trajectory's numbers: what the file says, or the caller where it is silent."""

from __future__ import annotations

from pathlib import Path

from ase.units import fs as _ASE_FS  # noqa: N812 - a constant under our name

from nnqmd_server.errors import DataError
from nnqmd_server.spectra.readers.source import Source
from nnqmd_server.units import ATOMIC_TIME, BOHR

KINDS = {
    "positions": "positions",
    "x_centroid": "positions",
    "velocities": "velocities",
    "v_centroid": "velocities",
    "becx": "charges",
    "becy": "charges",
    "becz": "charges",
}
"""Quantities that a spectrum can use, by i-PI's names, and what they are."""

# "automatic" is what old versions of i-PI wrote for its own units
_LENGTHS = {
    "atomic_unit": BOHR,
    "automatic": BOHR,
    "bohr": BOHR,
    "angstrom": 1.0,
    "ase": 1.0,
    "nanometer": 10.0,
    "picometer": 0.01,
    "meter": 1e10,
}
_UNITS = {
    "positions": _LENGTHS,
    "velocities": {
        "atomic_unit": BOHR / ATOMIC_TIME,
        "automatic": BOHR / ATOMIC_TIME,
        "m/s": 1e-5,
        "angstrom/fs": 1.0,
        "angstrom/ps": 1e-3,
        "nanometer/ps": 1e-2,
        "ase": float(_ASE_FS),
    },
    "charges": {"": 1.0, "atomic_unit": 1.0, "automatic": 1.0, "ase": 1.0, "e": 1.0},
}


def quantity_of(source: Source, asked: str) -> str:
    """What the file holds, by i-PI's name.

    Raises
    ------
    DataError
        Nobody says it, the file and the caller contradict each other, or no spectrum uses it.
    """
    if source.quantity and asked and source.quantity != asked:
        raise DataError(
            f"{source.path} holds {source.quantity}, not {asked}.",
            "Give the file of that quantity, or leave out quantity= (--quantity).",
        )
    quantity = source.quantity or asked
    if not quantity:
        raise DataError(
            f"Frame 0 of {source.path} does not say what it holds.",
            f"Say it with quantity= (--quantity), one of {', '.join(KINDS)}; i-PI's comment line says it.",
        )
    if quantity not in KINDS:
        raise DataError(
            f"{source.path} holds {quantity}, which no spectrum is made of.",
            f"Give a trajectory of {', '.join(KINDS)}.",
        )
    return quantity


def factor(path: Path, what: str, kind: str, said: str, given: str, option: str) -> float:
    """From a file's unit to Angstrom, Angstrom/fs or e.

    Parameters
    ----------
    path : Path
        For the message.
    what : str
        For the message, such as "v_centroid" or "cell".
    kind : str
        "positions", "velocities" or "charges".
    said, given : str
        The unit by the file and by the caller; "" where silent.
    option : str
        The argument that settles it, such as "unit".
    """
    units = _UNITS[kind]
    known = ", ".join(u for u in units if u and u != "automatic")
    flag = f"{option}= (--{option.replace('_', '-')})"
    for unit in (said, given):
        if unit and unit not in units:
            raise DataError(
                f"The unit {unit!r} of the {what} in {path} is not known.",
                f"Use one of {known}, with {flag}.",
            )
    if said and given and units[said] != units[given]:
        raise DataError(
            f"{path} says its {what} is in {said!r}, but {given!r} was asked for.",
            f"Leave out {flag}; if an i-PI input asked for it, input and trajectory are from different runs.",
        )
    if said or given or "" in units:
        return units[said or given]
    raise DataError(
        f"{path} does not say in which unit its {what} is.", f"Say it with {flag}, one of {known}."
    )
