"""The full set of Wannier centres, assigned to the atoms that carry them.

The centres of a molecule have no order, and by symmetry no network could keep one: permute two H of an NH3
and its bond centres are permuted with them. So each centre is the business of an atom: a bond centre belongs
to the H at its end (two electrons each), what is left to the heavy atom (of NH3 one lone pair; of H2O the
mean of two). Each carrier then has one centroid, the centroids turn with the structure and are permuted with
the atoms, and all of them together are the full set, up to lone pairs of one atom, of which a true vector
can only give the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from scipy.optimize import linear_sum_assignment

from nnqmd_server.errors import DataError
from nnqmd_server.structures import Array
from nnqmd_server.training.frame_numbers import refuse

ELECTRONS = 2
"""Electrons of a Wannier centre without spin polarisation."""

LIGHT = "H"
"""The element that carries its bond."""


def read_centres(path: Path) -> list[Atoms]:
    """Frames with atoms and, as atoms X, all Wannier centres [Angstrom].

    Raises
    ------
    DataError
        No such file, or not extended XYZ.
    """
    try:
        return read(path, ":", format="extxyz", parallel=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as extended XYZ with centres: {error}",
            "Correct `wannier.centres`; it needs the frames of `data` with the centres as atoms X.",
        ) from error


def assign_centres(
    frames: Sequence[Atoms], with_centres: Sequence[Atoms], carriers: Mapping[str, float]
) -> list[Atoms]:
    """Frames with a centroid on every carrier, made from all their centres.

    Parameters
    ----------
    frames
        Frames with labels.
    with_centres
        The same frames in the same order: the atoms, then the centres as X.
    carriers
        Element -> electrons of its centroid; H carries 2, its bond.

    Returns
    -------
    list of Atoms
        Copies with ``wannier_centroid`` [Angstrom], relative to each atom, shape (n_atoms, 3).

    Raises
    ------
    DataError
        The files do not belong together, or the number of centres is not that of the carriers' electrons.
    """
    if len(frames) != len(with_centres):
        raise DataError(
            f"The data have {len(frames)} frames, the file of centres {len(with_centres)}.",
            "Give the centres of the same frames, in the same order.",
        )
    other = [k for k, pair in enumerate(zip(frames, with_centres, strict=True)) if not _same(*pair)]
    refuse(other, "other atoms in the file of centres", "Give the centres of the same frames, in order.")
    wrong = [k for k, frame in enumerate(with_centres) if not _complete(frame, carriers)]
    refuse(
        wrong,
        "another number of centres than its carriers have pairs of electrons",
        f"Each centre stands for {ELECTRONS} electrons; correct `carriers` (all centres of NH3: N 2, H 2).",
    )
    found = []
    for frame, centred in zip(frames, with_centres, strict=True):
        copy = frame.copy()
        copy.calc = frame.calc
        ghosts = centred.numbers == 0
        copy.set_array(
            "wannier_centroid",
            centroids_of(frame, centred.positions[ghosts], carriers),
        )
        found.append(copy)
    return found


def centroids_of(atoms: Atoms, centres: Array, carriers: Mapping[str, float]) -> Array:
    """The centroid of each carrier's own centres, relative to it [Angstrom], shape (n_atoms, 3).

    Each H gets the one centre on its bond, by the assignment of all H to centres with the smallest sum of
    squared distances; each heavy carrier the nearest of the rest. Atoms that carry nothing get zeros.
    """
    symbols = np.array(atoms.get_chemical_symbols())
    heavy = np.flatnonzero(np.isin(symbols, [s for s in carriers if s != LIGHT]))
    light = np.flatnonzero(symbols == LIGHT) if LIGHT in carriers else np.array([], dtype=int)
    result = np.zeros((len(atoms), 3))
    left = np.arange(len(centres))
    if len(light):
        arms = _arms(atoms, light, centres)
        rows, columns = linear_sum_assignment(np.einsum("ijk,ijk->ij", arms, arms))
        result[light[rows]] = arms[rows, columns]
        left = np.setdiff1d(left, columns)
    if len(heavy) and len(left):
        arms = _arms(atoms, heavy, centres[left])
        # Every heavy atom has as many places as pairs of electrons.
        pairs = np.array([int(carriers[s]) // ELECTRONS for s in symbols[heavy]])
        places = np.repeat(np.arange(len(heavy)), pairs)
        rows, columns = linear_sum_assignment(np.einsum("ijk,ijk->ij", arms, arms)[places])
        np.add.at(result, heavy[places[rows]], arms[places[rows], columns] / pairs[places[rows], None])
    return result


def _arms(atoms: Atoms, at: Array, centres: Array) -> Array:
    """From each of some atoms to each centre, through the nearest image [Angstrom]."""
    apart = centres[None] - atoms.positions[at][:, None]
    cell = atoms.cell.array
    return apart - np.round(apart @ np.linalg.inv(cell)) @ cell


def _same(frame: Atoms, centred: Atoms) -> bool:
    real = centred.numbers != 0
    return (
        real.sum() == len(frame)
        and bool((centred.numbers[real] == frame.numbers).all())
        and np.allclose(centred.positions[real], frame.positions, atol=1e-4)
        and np.allclose(centred.cell.array, frame.cell.array, atol=1e-4)
    )


def _complete(centred: Atoms, carriers: Mapping[str, float]) -> bool:
    electrons = sum(carriers.get(symbol, 0.0) for symbol in centred.get_chemical_symbols())
    return ELECTRONS * int((centred.numbers == 0).sum()) == electrons
