"""When a simulation has failed: five criteria, each with its unit. Light: loaded inside i-PI, no torch.

The published time to failure of Allegro-Legato is the step at which the temperature, looked at every ten
steps, differs from the set-point by more than 100 K (docs/fidelity.md). That one is here as it was; the
others see a collapse earlier and name it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from vesin import NeighborList

from nnqmd_server.errors import InputError
from nnqmd_server.structures import Array

_FLOWN = 1e5
"""Atoms farther from the origin than this have been thrown out [Angstrom]."""


@dataclass(frozen=True)
class Criteria:
    """What counts as a failure.

    Parameters
    ----------
    temperature_window : float
        Largest difference of the instantaneous temperature from the set-point [K].
    temperature_sigmas : float
        The window is widened to this many standard deviations of the canonical ensemble where it is
        narrower: a small healthy system leaves a window of 100 K by itself.
    settle : float
        The temperature is not judged before this time [fs]: runs begin from a structure at rest.
    distance_factor : float
        Smallest distance of two atoms, in units of the sum of their covalent radii.
    distances : mapping of str to float
        Smallest distances of pairs [Angstrom] instead, by pair in alphabetical order ("H-N").
    max_force : float
        Largest force on an atom [eV/Angstrom].
    max_jump : float
        Largest change of a bead's potential energy from one step to the next [eV/atom].
    """

    temperature_window: float = 100.0
    temperature_sigmas: float = 6.0
    settle: float = 500.0
    distance_factor: float = 0.6
    distances: Mapping[str, float] = field(default_factory=dict)
    max_force: float = 100.0
    max_jump: float = 0.5


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong.

    ``step`` counts from 0; ``criterion`` is "temperature", "distance", "force", "energy jump" or
    "not finite"; ``value`` and ``limit`` are in ``unit``; ``detail`` says where.
    """

    step: int
    criterion: str
    value: float | None
    limit: float | None
    unit: str
    detail: str = ""

    def words(self) -> str:
        """One line for people."""
        numbers = ""
        if self.value is not None and self.limit is not None:
            numbers = f" {self.value:.4g} {self.unit} (limit {self.limit:.4g})"
        return f"{self.criterion}{numbers}{', ' + self.detail if self.detail else ''}"


def save(thing: Criteria | Failure, path: Path) -> None:
    """Write as JSON; a file is there whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(asdict(thing), indent=1) + "\n")
    temporary.replace(path)


def load_criteria(path: Path) -> Criteria:
    """Read what :func:`save` wrote."""
    return Criteria(**json.loads(path.read_text()))


def load_failure(path: Path) -> Failure | None:
    """Read what :func:`save` wrote; None if there is no such file."""
    return Failure(**json.loads(path.read_text())) if path.is_file() else None


def parse_distances(texts: list[str]) -> dict[str, float]:
    """Smallest distances [Angstrom] by pair, from texts such as ``N-H=0.7``.

    Raises
    ------
    InputError
        A text is not a pair of elements and a length.
    """
    found = {}
    for text in texts:
        pair, _, value = text.partition("=")
        elements = sorted(pair.split("-"))
        try:
            length = float(value)
        except ValueError:
            length = math.nan
        if len(elements) != 2 or not set(elements) <= set(atomic_numbers) or not 0 < length < 10:
            raise InputError(
                f"--min-distance {text!r} is not a pair and a length.", "Write N-H=0.7, in Angstrom."
            )
        found["-".join(elements)] = length
    return found


def temperature_limit(criteria: Criteria, temperature: float, n_atoms: int, n_beads: int) -> float:
    """Largest difference from the set-point that is allowed [K].

    The kinetic temperature of f degrees of freedom has the standard deviation T sqrt(2 / f) in the
    canonical ensemble; all beads together have f = 3 N P, less three of the centre of mass.
    """
    sigma = temperature * math.sqrt(2 / max(1, 3 * n_atoms * n_beads - 3))
    return max(criteria.temperature_window, criteria.temperature_sigmas * sigma)


def judge_temperature(
    steps: Array, kelvin: Array, criteria: Criteria, temperature: float, limit: float, timestep: float
) -> Failure | None:
    """First step at which the temperature is outside its window.

    Parameters
    ----------
    steps, kelvin : Array
        What i-PI printed, each shape (n_rows,).
    criteria : Criteria
        What counts.
    temperature : float
        Set-point [K].
    limit : float
        See :func:`temperature_limit` [K].
    timestep : float
        [fs].
    """
    late = steps * timestep >= criteria.settle
    # the negation also holds for NaN
    outside = ~(np.abs(kelvin - temperature) <= limit) & (late | ~np.isfinite(kelvin))
    if not outside.any():
        return None
    k = int(np.argmax(outside))
    value = float(kelvin[k])
    if not np.isfinite(value):
        return Failure(int(steps[k]), "not finite", None, None, "", "temperature")
    return Failure(
        int(steps[k]), "temperature", value, temperature + math.copysign(limit, value - temperature), "K"
    )


class Watch:
    """Looks at the force sets of one simulation, in order.

    Parameters
    ----------
    criteria : Criteria
        What counts as a failure.
    numbers : Array
        Atomic numbers, shape (n_atoms,).
    """

    def __init__(self, criteria: Criteria, numbers: Array) -> None:
        self._criteria = criteria
        self._numbers = numbers
        elements = np.unique(numbers)
        limits = np.zeros((elements.max() + 1,) * 2)
        for a in elements:
            for b in elements:
                pair = "-".join(sorted((chemical_symbols[a], chemical_symbols[b])))
                radii = covalent_radii[a] + covalent_radii[b]
                limits[a, b] = criteria.distances.get(pair, criteria.distance_factor * radii)
        self._limits = limits
        self._neighbours = NeighborList(cutoff=float(limits.max()), full_list=False)
        self._energies: Array | None = None

    def positions(self, step: int, cells: Array, positions: Array) -> Failure | None:
        """Judge positions before forces are asked for.

        Parameters
        ----------
        step : int
            Goes into the failure.
        cells : Array
            Cell vectors as rows [Angstrom], shape (n_beads, 3, 3).
        positions : Array
            [Angstrom], shape (n_beads, n_atoms, 3).
        """
        for bead, (cell, places) in enumerate(zip(cells, positions, strict=True)):
            if not (np.abs(places) < _FLOWN).all():  # NaN fails too
                return Failure(step, "not finite", None, None, "", f"positions of bead {bead}")
            i, j, d = self._neighbours.compute(points=places, box=cell, periodic=True, quantities="ijd")
            i, j = i.astype(int), j.astype(int)
            limit = self._limits[self._numbers[i], self._numbers[j]]
            close = d < limit
            if close.any():
                k = int(np.argmin(np.where(close, d / limit, np.inf)))
                names = "-".join(chemical_symbols[self._numbers[atom]] for atom in (i[k], j[k]))
                where = f"{names}, atoms {i[k]} and {j[k]} of bead {bead} (from 0)"
                return Failure(step, "distance", float(d[k]), float(limit[k]), "Angstrom", where)
        return None

    def answers(self, step: int, energies: Array, forces: Array) -> Failure | None:
        """Judge what the model said of them.

        Parameters
        ----------
        step : int
            Goes into the failure.
        energies : Array
            [eV], shape (n_beads,).
        forces : Array
            [eV/Angstrom], shape (n_beads, n_atoms, 3).
        """
        if not (np.isfinite(energies).all() and np.isfinite(forces).all()):
            return Failure(step, "not finite", None, None, "", "energy or forces")
        size = np.linalg.norm(forces, axis=-1)
        bead, atom = np.unravel_index(int(np.argmax(size)), size.shape)
        if size[bead, atom] > self._criteria.max_force:
            name = chemical_symbols[self._numbers[atom]]
            where = f"on {name}, atom {atom} of bead {bead} (from 0)"
            return Failure(
                step, "force", float(size[bead, atom]), self._criteria.max_force, "eV/Angstrom", where
            )
        before, self._energies = self._energies, energies
        if before is not None:
            jumps = np.abs(energies - before) / len(self._numbers)
            bead = int(np.argmax(jumps))
            if jumps[bead] > self._criteria.max_jump:
                limit = self._criteria.max_jump
                return Failure(
                    step, "energy jump", float(jumps[bead]), limit, "eV/atom", f"bead {bead} (from 0)"
                )
        return None


def as_settings(criteria: Criteria) -> dict[str, Any]:
    """Names and values with units in the names, for files and tables."""
    return {
        "temperature_window_K": criteria.temperature_window,
        "temperature_sigmas": criteria.temperature_sigmas,
        "settle_fs": criteria.settle,
        "distance_factor_of_covalent_radii": criteria.distance_factor,
        "distances_A": dict(criteria.distances),
        "max_force_eV_per_A": criteria.max_force,
        "max_jump_eV_per_atom": criteria.max_jump,
    }
