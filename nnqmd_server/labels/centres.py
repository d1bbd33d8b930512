"""Wannier centres: whose they are, and where they are in a small cell.

A centre is a doubly occupied maximally localised orbital. The centres that codes print are
Im ln <exp(2 pi i x / L)> L / 2 pi (Resta), which is biased by O(1/L^2) in small cells: 0.4 D on the dipole
of one ammonia molecule in a box of 6 Angstrom. The first moment of the density |w|^2 itself has no such bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.geometry import get_distances
from ase.io.cube import read_cube
from scipy.optimize import linear_sum_assignment
from scipy.signal import resample

from nnqmd_server.errors import DataError
from nnqmd_server.labels.frames import CENTRES, CENTROID, bad_frame
from nnqmd_server.structures import Array
from nnqmd_server.units import BOHR

NORM_TOLERANCE = 2e-3
"""How far the norm of an orbital on its grid may be from 1."""

ESTIMATOR = "first moment of |w|^2, interpolated once"
"""How centres are computed: labels made in another way are other labels."""

_SAME_ATOM = 1e-3  # Angstrom: cubes carry six digits of a bohr


def first_moment(orbital: Array, origin: Array, cell: Array) -> Array:
    """Centre of |w|^2 of an orbital that is localised in a periodic cell [Angstrom], shape (3,).

    Along every cell vector the marginal p(s) of |w|^2 is centred: c with integral of (s - c) p(s) over
    [c - 1/2, c + 1/2) equal to 0, the sawtooth integrated exactly for the band-limited p,
    m(c) = sum_n (-1)^(n+1) / (pi n) Im[z_n exp(-2 pi i n c)], z_n = <exp(2 pi i n s)>.

    Parameters
    ----------
    orbital : Array
        w on a grid that fills the cell, shape (n1, n2, n3); its norm does not matter.
    origin : Array
        Position of the first point [Angstrom], shape (3,).
    cell : Array
        Cell vectors as rows [Angstrom], shape (3, 3).
    """
    fraction = np.empty(3)
    for axis in range(3):
        points = 2 * orbital.shape[axis]
        # |w|^2 has twice the frequencies of w: on w's own grid they would fold back. Interpolated, centres of
        # one structure on CP2K grids of 300 and 400 Ry (stride 2) differ ten times less
        finer = resample(orbital, points, axis=axis)
        marginal = (finer**2).sum(axis=tuple(k for k in range(3) if k != axis))
        order = np.arange(1, points // 2)
        # numpy's transform has exp(-2 pi i ...)
        z = np.conj(np.fft.fft(marginal))[order] / marginal.sum()
        weights = (-1.0) ** (order + 1) / (np.pi * order)
        centre = float(np.angle(z[0])) / (2 * np.pi)
        for _ in range(200):
            shift = float((weights * (z * np.exp(-2j * np.pi * order * centre)).imag).sum())
            centre += shift
            if abs(shift) < 1e-9:
                break
        fraction[axis] = centre
    return origin + fraction @ cell


def centres_of_cubes(paths: Sequence[Path], atoms: Atoms) -> Array:
    """Centre of the orbital in each cube file [Angstrom], shape (n, 3).

    Parameters
    ----------
    paths : sequence of Path
        Orbitals w(r) [bohr^-3/2] as CP2K's WANNIER_CUBES writes them.
    atoms : Atoms
        The structure that they must belong to.

    Raises
    ------
    DataError
        A file is not a cube, belongs to another structure, or its grid does not fill the cell.
    """
    return np.array([_centre_of_cube(path, atoms) for path in paths]).reshape(-1, 3)


def _centre_of_cube(path: Path, atoms: Atoms) -> Array:
    try:
        with path.open() as stream:
            cube = read_cube(stream)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} cannot be read as a cube file: {error}.", "Let the code write WANNIER_CUBES again."
        ) from error
    values, spacing, origin = cube["data"], np.asarray(cube["spacing"]), np.asarray(cube["origin"])
    same_atoms(path, cube["atoms"].numbers, cube["atoms"].positions, atoms)
    cell = spacing * np.array(values.shape)[:, None]
    if np.abs(cell - atoms.cell.array).max() > 1e-3 * np.abs(atoms.cell.array).max():
        raise DataError(
            f"The grid of {path} ({' x '.join(map(str, values.shape))} points) does not fill the cell once: "
            "its stride does not divide the grid of the calculation.",
            "Use STRIDE 1 1 1 in WANNIER_CUBES, or a CUTOFF whose grid the stride divides.",
        )
    norm = (values**2).sum() * abs(np.linalg.det(spacing)) / BOHR**3
    if abs(norm - 1) > NORM_TOLERANCE:
        raise DataError(
            f"The orbital in {path} has the norm {norm:.4f} on its grid, not 1.",
            "Use STRIDE 1 1 1 in WANNIER_CUBES or a higher CUTOFF.",
        )
    return first_moment(values, origin, cell)


def same_atoms(path: Path, numbers: Array, positions: Array, atoms: Atoms) -> None:
    """Refuse centres of another structure.

    Raises
    ------
    DataError
        Elements differ, or positions by more than 0.001 Angstrom.
    """
    apart = np.inf
    if len(numbers) == len(atoms) and (np.asarray(numbers) == atoms.numbers).all():
        moved = (np.asarray(positions) - atoms.positions) @ np.linalg.inv(atoms.cell.array)
        apart = float(np.abs((moved - np.round(moved)) @ atoms.cell.array).max())
    if apart > _SAME_ATOM:
        raise DataError(
            f"{path} belongs to another structure than the forces: "
            + (
                "its elements differ."
                if apart == np.inf
                else f"its atoms are up to {apart:.3g} Angstrom elsewhere."
            ),
            "Give the Wannier centres of the same frame.",
        )


def carrier_numbers(carriers: Sequence[str], atoms: Atoms) -> tuple[int, ...]:
    """Atomic numbers of the elements that centres belong to; without a choice, all but hydrogen.

    Raises
    ------
    DataError
        None of them is in the structure.
    """
    present = set(atoms.numbers.tolist())
    if carriers:
        wanted = {chemical_symbols.index(symbol) for symbol in carriers if symbol in chemical_symbols}
    else:
        wanted = present - {1}
    if not wanted & present:
        raise DataError(
            f"None of the elements that could carry Wannier centres is in {atoms.get_chemical_formula()}.",
            "Name elements of the structure with --carriers, such as N.",
        )
    return tuple(sorted(wanted & present))


def add_centres(frame: Atoms, centres: Array, carriers: Sequence[str], where: tuple[Path | str, int]) -> None:
    """Give every centre to the nearest carrier atom and store them relative to it.

    ``wannier_centroid`` (n, 3) is the mean over an atom's centres. Where all carriers have equally many
    centres m, ``wannier_centres`` (n, 3 m) has each of them: first those on the bonds to the atoms that are
    nearest to this carrier, in the order of these atoms, then the others, nearest first. Both are zero for
    other atoms, and in Angstrom.

    Raises
    ------
    DataError
        Atoms of one element have different numbers of centres.
    """
    path, number = where
    at = np.flatnonzero(np.isin(frame.numbers, carrier_numbers(carriers, frame)))
    away, distance = get_distances(frame.positions[at], centres, cell=frame.cell, pbc=frame.pbc)
    owner = distance.argmin(axis=0)
    counts = np.bincount(owner, minlength=len(at))
    for element in set(frame.numbers[at].tolist()):
        kind = np.flatnonzero(frame.numbers[at] == element)
        least, most = kind[counts[kind].argmin()], kind[counts[kind].argmax()]
        if counts[least] != counts[most]:
            raise bad_frame(
                path,
                number,
                f"gives {counts[most]} Wannier centres to {chemical_symbols[element]} atom {at[most]}, but "
                f"{counts[least]} to {chemical_symbols[element]} atom {at[least]}",
                "Look at the localisation; with centres between two atoms, name all --carriers.",
            )
    others = np.setdiff1d(np.arange(len(frame)), at)
    bonded = _nearest(frame, others, at)
    centroids = np.zeros((len(frame), 3))
    sets = []
    for k, atom in enumerate(at):
        mine = np.flatnonzero(owner == k)
        vectors = away[k, mine]
        if len(mine):
            centroids[atom] = vectors.mean(axis=0)
        sets.append(vectors[_order(vectors, _arms(frame, atom, others[bonded == k]))])
    frame.set_array(CENTROID, centroids)
    if counts.min() == counts.max() and counts[0] > 0:
        every = np.zeros((len(frame), 3 * counts[0]))
        every[at] = np.array(sets).reshape(len(at), -1)
        frame.set_array(CENTRES, every)


def _nearest(frame: Atoms, others: Array, at: Array) -> Array:
    if not len(others):
        return np.empty(0, dtype=int)
    _, distance = get_distances(frame.positions[others], frame.positions[at], cell=frame.cell, pbc=frame.pbc)
    return distance.argmin(axis=1)


def _arms(frame: Atoms, atom: int, bonded: Array) -> Array:
    if not len(bonded):
        return np.empty((0, 3))
    away, _ = get_distances(frame.positions[[atom]], frame.positions[bonded], cell=frame.cell, pbc=frame.pbc)
    return away[0]


def _order(centres: Array, arms: Array) -> Array:
    """Numbers of the centres: on the bonds first, then by distance from the carrier."""
    first = np.empty(0, dtype=int)
    if len(arms) and len(centres):
        apart = np.linalg.norm(arms[:, None] - centres[None], axis=2)
        first = linear_sum_assignment(apart)[1]
    left = np.setdiff1d(np.arange(len(centres)), first)
    return np.concatenate([first, left[np.argsort(np.linalg.norm(centres[left], axis=1))]])
