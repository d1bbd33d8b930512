"""Which elements stand in an i-PI simulation: i-PI sends positions only, so a template tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers

from nnqmd_server.errors import InputError
from nnqmd_server.structures import Array

_ISOTOPES = {"D": "H", "T": "H"}


def read_numbers(path: str | Path) -> Array:
    """Atomic numbers of a template structure, in its order; D and T count as H.

    Parameters
    ----------
    path : str or Path
        The file that initialises i-PI (xyz), or any structure file that ASE reads.

    Raises
    ------
    InputError
        The file is missing, unreadable, or names something that is not an element.
    """
    path = Path(path)
    try:
        if path.suffix == ".xyz":
            with path.open() as file:
                count = int(file.readline())
                file.readline()
                symbols = [file.readline().split()[0] for _ in range(count)]
        else:
            from ase.io import read

            # In an MPI job ASE would wait for all ranks, i-PI too, to read with it.
            symbols = read(path, parallel=False).get_chemical_symbols()
    except FileNotFoundError:
        raise InputError(
            f"There is no template structure {path}.", "Give the file that initialises i-PI."
        ) from None
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"{path} is not a structure file: {error}.", "Give an xyz file of the system."
        ) from error
    return to_numbers(symbols, path)


def to_numbers(symbols: Sequence[str], source: object) -> Array:
    """Atomic numbers of chemical symbols; D and T count as H.

    Raises
    ------
    InputError
        Something is not an element; ``source`` is named in the message.
    """
    symbols = [_ISOTOPES.get(s, s) for s in symbols]
    unknown = sorted({s for s in symbols if s not in atomic_numbers})
    if unknown or not symbols:
        raise InputError(
            f"{source} names no elements: {', '.join(unknown)}.", "Use chemical symbols as atom names."
        )
    return np.array([atomic_numbers[s] for s in symbols], dtype=np.int64)


def by_size(templates: Sequence[Array]) -> dict[int, Array]:
    """Atomic numbers of several systems by their number of atoms, which is all that i-PI tells of them.

    Raises
    ------
    InputError
        Two have the same number of atoms and not the same elements in the same order.
    """
    found: dict[int, Array] = {}
    for numbers in templates:
        if not np.array_equal(found.setdefault(len(numbers), numbers), numbers):
            raise InputError(
                f"Two systems of {len(numbers)} atoms have different elements, and i-PI sends only positions:"
                " one force field cannot tell them apart.",
                "Give each system a force field of its own; `nnqmd run` does that by itself.",
            )
    return found
