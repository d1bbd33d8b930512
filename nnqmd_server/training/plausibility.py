"""Labels that cannot be what they are said to be: wrong units, absurd forces, centroids that are positions.

Wrong units do not stop a training: it ends with a network that is wrong without a sign. So what physics tells
about the size of each number is asked first, with wide margins: nothing here is about good or bad data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic
from vesin import NeighborList

from nnqmd_server.errors import DataError
from nnqmd_server.structures import Array
from nnqmd_server.training.frame_numbers import refuse

ABSURD_FORCE = 100.0
"""eV/Angstrom; N-H compressed to half its length has about 60."""

CLOSEST = 0.4
"""Distance over the sum of covalent radii, below which no electronic structure is right."""

SMALLEST_VOLUME = 0.5
"""Angstrom^3 per atom: hydrogen at the centre of Jupiter has more."""

FAR = 1.65
"""The same for the nearest neighbour of a typical atom; bohr for Angstrom makes 1.89 of 1."""

LARGEST_STRESS = 20.0
"""Pressure times volume per atom [eV]: some 300 GPa in a solid. A stress in GPa is 160 times too large."""

LONGEST_CENTROID = 1.5
"""Angstrom from its atom."""

NEAR_FRAMES = 0.1
"""Largest displacement [Angstrom] between two frames whose energies forces can be compared with."""

_NOBLE = {2, 10, 18, 36, 54, 86}
_PAIRS = 200
_MEANINGS = {
    27.2114: "energies in hartree (forces in eV/Angstrom)",
    0.5291772: "forces in eV/bohr",
    1 / 51.42207: "forces in hartree/bohr (energies in eV)",
    1 / 23.0605: "energies in kcal/mol (forces in eV/Angstrom)",
    1 / 96.4853: "energies in kJ/mol (forces in eV/Angstrom)",
    1e-3: "energies in meV (forces in eV/Angstrom)",
}


def check_sizes(frames: Sequence[Atoms], numbers: Sequence[int], carriers: Iterable[str] = ()) -> None:
    """Refuse labels of an impossible size.

    Parameters
    ----------
    frames
        Frames with energy [eV], forces [eV/Angstrom] and stress [eV/Angstrom^3], finite.
    numbers
        The number of each frame in its file, counted from 0, for the error.
    carriers
        Elements whose atoms carry a Wannier centroid.

    Raises
    ------
    DataError
        Names the frames and what the numbers look like.
    """
    _check_distances(frames, numbers)
    refuse(
        [k for k, frame in zip(numbers, frames, strict=True) if _largest_force(frame) > ABSURD_FORCE],
        f"a force above {ABSURD_FORCE:g} eV/Angstrom",
        "Look at these calculations, and at the unit (1 hartree/bohr is 51.4 eV/Angstrom); to leave such "
        "frames out, set `max_force`.",
    )
    refuse(
        [k for k, frame in zip(numbers, frames, strict=True) if _pressure_volume(frame) > LARGEST_STRESS],
        "a stress that no solid has",
        "The unit must be eV/Angstrom^3: divide GPa by 160.2 and kbar by 1602.",
    )
    carriers = tuple(carriers)
    refuse(
        [k for k, frame in zip(numbers, frames, strict=True) if _longest(frame, carriers) > LONGEST_CENTROID],
        f"a Wannier centroid more than {LONGEST_CENTROID:g} Angstrom from its atom",
        "Centroids are relative to their atom, through the nearest image, in Angstrom.",
    )
    _check_work(frames, numbers)


def _largest_force(frame: Atoms) -> float:
    return float(np.linalg.norm(frame.get_forces(), axis=1).max())


def _pressure_volume(frame: Atoms) -> float:
    """|pressure| times volume per atom [eV]."""
    return float(abs(np.trace(frame.get_stress(voigt=False))) / 3 * frame.get_volume() / len(frame))


def _longest(frame: Atoms, carriers: tuple[str, ...]) -> float:
    at = np.isin(frame.get_chemical_symbols(), carriers)
    if not at.any() or "wannier_centroid" not in frame.arrays:
        return 0.0
    return float(np.linalg.norm(frame.arrays["wannier_centroid"][at], axis=1).max())


def _check_distances(frames: Sequence[Atoms], numbers: Sequence[int]) -> None:
    nearest = [_nearest(frame) for frame in frames]
    crowded = [k for k, ratios in zip(numbers, nearest, strict=True) if ratios.min() < CLOSEST]
    many = len(crowded) > len(frames) // 2
    refuse(
        crowded,
        f"two atoms closer than {CLOSEST:g} times the sum of their covalent radii",
        "Positions and cells must be in Angstrom; these look like nanometres or fractions of the cell."
        if many
        else "Remove these frames: an electronic structure is not to be trusted there.",
    )
    usual = float(np.median(np.concatenate(nearest)))
    noble = all(set(frame.numbers) <= _NOBLE for frame in frames)
    if usual > FAR and not noble:
        raise DataError(
            f"A typical atom is {usual:.2f} times the sum of covalent radii away from its nearest neighbour.",
            "Positions and cells must be in Angstrom; these look like bohr: multiply by 0.529177.",
        )


def _nearest(frame: Atoms) -> Array:
    """Distance of each atom's nearest neighbour over the sum of their covalent radii, shape (n_atoms,)."""
    ratios = np.full(len(frame), 2.0)
    if frame.get_volume() < SMALLEST_VOLUME * len(frame):
        return np.zeros(len(frame))  # not worth a list, which would be very long
    radii = covalent_radii[frame.numbers]
    neighbours = NeighborList(cutoff=4 * float(radii.max()), full_list=True)
    i, j, distance = neighbours.compute(
        points=frame.positions, box=frame.cell.array, periodic=True, quantities="ijd"
    )
    np.minimum.at(ratios, i, distance / (radii[i] + radii[j]))
    return ratios


def _check_work(frames: Sequence[Atoms], numbers: Sequence[int]) -> None:
    """Where frames follow each other closely, the energy must fall by what the forces do."""
    change, work, first = [], [], None
    for k in range(1, len(frames)):
        done = _work(frames[k - 1], frames[k])
        if done is not None:
            change.append(frames[k].get_potential_energy() - frames[k - 1].get_potential_energy())
            work.append(done)
            first = numbers[k - 1] if first is None else first
        if len(work) == _PAIRS:
            break
    if len(work) < 3:
        return
    change, work = np.array(change), np.array(work)
    slope = float(np.median(change / -work))  # of most pairs: a few may cross a jump of the electronic state
    if not 0.5 < slope < 2.0:
        near = min(_MEANINGS, key=lambda ratio: abs(np.log(abs(slope) * ratio)))
        fits = slope > 0 and abs(np.log(slope * near)) < 0.3
        looks = (
            f"This looks like {_MEANINGS[near]}."
            if fits
            else "Are these gradients instead of forces?"
            if slope < 0
            else "No common unit gives this number."
        )
        raise DataError(
            f"Between {len(work)} pairs of frames that are close together (the first are frames {first} and "
            f"{first + 1}, counted from 0) the energy changes by {slope:.3g} times what the forces say.",
            f"Energies must be in eV, forces in eV/Angstrom and positions in Angstrom. {looks}",
        )


def _work(before: Atoms, after: Atoms) -> float | None:
    """Work of the mean force from one frame to the next [eV]; None where it tells nothing."""
    same = len(before) == len(after) and (before.numbers == after.numbers).all()
    if not same or not np.allclose(before.cell.array, after.cell.array, atol=1e-6):
        return None
    moved, length = find_mic(after.positions - before.positions, before.cell, True)
    if not 1e-5 < length.max() < NEAR_FRAMES:
        return None
    done = float(np.sum(0.5 * (before.get_forces() + after.get_forces()) * moved))
    # Where work of both signs cancels, the next order in the displacement would decide.
    size = float(np.sum(np.abs(0.5 * (before.get_forces() + after.get_forces()) * moved)))
    return done if abs(done) > 0.2 * size and abs(done) > 1e-9 else None
