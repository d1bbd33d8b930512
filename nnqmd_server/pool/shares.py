"""Force sets and the shares they are cut into; which results may go to a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nnqmd_server.pool.messages import BadMessageError, arrays_to_results
from nnqmd_server.structures import Array, Results, Structures

MAX_FORCE = 1000.0
"""Forces above this never reach a simulation [eV/Angstrom]: they are of a model outside what it learned."""

TRIES = 2
"""How often a share is evaluated before its force set fails: once more, on another worker."""


@dataclass
class Job:
    """One force set of one client."""

    client: bytes
    request: int
    structures: Structures
    parts: dict[int, Results | None] = field(default_factory=dict)


@dataclass
class Share:
    """A run of structures of one job, as given to one worker.

    ``first`` is the place of its first structure in the job; ``failed_on`` are the workers that could not
    evaluate it, ``lost_workers`` counts those that died over it.
    """

    number: int
    job: Job
    structures: Structures
    first: int = 0
    failed_on: list[bytes] = field(default_factory=list)
    lost_workers: int = 0


@dataclass(frozen=True)
class Fault:
    """Why a share could not be evaluated.

    ``suspects`` are places in the share's structures; ``final`` says that another try gives the same.
    """

    what: str
    fix: str
    suspects: tuple[int, ...] = ()
    final: bool = False


EVEN_ENOUGH = 1.1
"""Measured speeds are noisy: an even cut is kept unless another one would end sooner by this factor."""


def cut(count: int, speeds: Sequence[float]) -> list[int]:
    """How many of ``count`` equal structures each worker gets so that the last one ends soonest.

    Structures are handed out one by one to the worker that would finish it first; but evenly, where that
    takes hardly longer.
    """
    best, even = _by_finish(count, speeds), _by_finish(count, [1.0] * len(speeds))
    return even if _duration(even, speeds) <= EVEN_ENOUGH * _duration(best, speeds) else best


def _by_finish(count: int, speeds: Sequence[float]) -> list[int]:
    given = [0] * len(speeds)
    for _ in range(count):
        best = min(range(len(speeds)), key=lambda k: ((given[k] + 1) / speeds[k], given[k], k))
        given[best] += 1
    return given


def _duration(given: Sequence[int], speeds: Sequence[float]) -> float:
    return max(n / speed for n, speed in zip(given, speeds, strict=True))


def judge(arrays: dict[str, Array], structures: Structures, max_force: float) -> Results | Fault:
    """Results that may go to a simulation, or what is wrong with them.

    Parameters
    ----------
    arrays : dict of Array
        What a worker sent.
    structures : Structures
        What it was asked.
    max_force : float
        Largest force that is let through [eV/Angstrom].
    """
    try:
        results = arrays_to_results(arrays, structures)
    except BadMessageError as error:
        return Fault(f"A worker sent {error}.", "See the workers' logs.")
    if _all_sound(results, max_force):
        return results
    places, largest = _unsound(results, structures, max_force)
    what = "energies or forces that are not finite numbers"
    if largest > max_force:
        what = f"forces of {largest:.3g} eV/A"
    elif not places:
        return results
    return Fault(f"The model gave {what}.", "The dynamics has left what the model has learned.", places)


def _all_sound(results: Results, max_force: float) -> bool:
    """A quick look that may say no to results that are sound."""
    others = (results.energy, results.virial, *results.properties.values(), *results.atom_properties.values())
    # Each |component| below the cap over sqrt(3) keeps the norm below the cap; NaN fails every comparison.
    return bool(np.abs(results.forces).max(initial=0.0) <= max_force / 1.7321) and all(
        np.isfinite(values.sum()) for values in others
    )


def _unsound(results: Results, structures: Structures, max_force: float) -> tuple[tuple[int, ...], float]:
    """Places of structures with anything that is not finite or too large, and the largest force."""
    count = len(structures)
    owner = np.repeat(np.arange(count), np.diff(structures.offsets))
    broken = np.zeros(count, dtype=bool)
    for values in (results.energy, results.virial, *results.properties.values()):
        broken |= ~np.isfinite(values).reshape(count, -1).all(axis=1)
    size = np.linalg.norm(results.forces, axis=1)
    atoms = ~(size <= max_force)  # true for NaN too
    for values in results.atom_properties.values():
        atoms |= ~np.isfinite(values).reshape(len(owner), -1).all(axis=1)
    broken[owner[atoms]] = True
    return tuple(int(k) for k in np.flatnonzero(broken)), float(np.nanmax(size, initial=0.0))
