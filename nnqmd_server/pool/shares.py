"""Force sets, the runs they are cut into, the batches that go to workers; what may reach a simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nnqmd_server.pool.messages import BadMessageError, arrays_to_results
from nnqmd_server.structures import Array, Results, Structures, concatenate, join

MAX_FORCE = 1000.0
"""Forces above this never reach a simulation [eV/Angstrom]: they are of a model outside what it learned."""

TRIES = 2
"""How often a run is evaluated before its force set fails: once more, on another worker."""


@dataclass(eq=False)
class Job:
    """One force set of one simulation, for one of the pool's potentials.

    ``costs`` are those of its structures and ``sums`` their running sum, from 0 on. ``start`` and ``finish``
    are its place in the fair queue [cost], ``given`` is how much of it workers were given; ``todo`` is what
    no worker has been given, ``missing`` how many structures have no answer yet; times are those of the
    pool's clock [s]. ``area`` is where a door that shares memory wants its forces, ``clean`` says that nobody
    but those who have answered was told to write there. ``reply`` is how a door of this process is answered,
    instead of a message to ``client``.
    """

    client: bytes
    simulation: str
    name: str
    request: int
    potential: str
    structures: Structures
    arrived: float
    heard: float = 0.0
    number: int = 0
    costs: Array | None = None
    sums: list[float] = field(default_factory=list)
    start: float = 0.0
    finish: float = 0.0
    given: float = 0.0
    begun: float | None = None
    todo: list[Run] = field(default_factory=list)
    parts: dict[int, Results] = field(default_factory=dict)
    missing: int = 0
    ended: bool = False
    area: Array | None = None
    clean: bool = True
    reply: Callable[[Results | Fault], None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What makes a request the same when it is asked again."""
        return self.simulation, self.request

    @property
    def atoms(self) -> int:
        """Mean number of atoms of its structures."""
        return self.structures.n_atoms // len(self.structures)


@dataclass(eq=False)
class Run:
    """Neighbouring structures ``first:last`` of one job that go to one worker together.

    ``failed_on`` are the workers that could not evaluate it, ``deaths`` counts those that died over it;
    one that is ``alone`` is not merged with others, so that what it does falls on nobody else.
    """

    job: Job
    first: int
    last: int
    failed_on: tuple[bytes, ...] = ()
    deaths: int = 0
    alone: bool = False

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def costs(self) -> Array:
        """Costs of its structures."""
        return self.job.costs[self.first : self.last]

    @property
    def cost(self) -> float:
        """What it costs altogether."""
        return self.job.sums[self.last] - self.job.sums[self.first]

    def part(self, first: int, count: int) -> Run:
        """A run of ``count`` of its structures, the first of which is its own ``first``-th."""
        low = self.first + first
        return Run(self.job, low, low + count, self.failed_on, self.deaths, self.alone)


@dataclass(eq=False)
class Batch:
    """What one worker is given in one message: runs of one or several jobs, for one potential.

    ``holders`` are the workers that are at it, ``expected`` how long it should take [s] where that is known.
    """

    number: int
    potential: str
    runs: list[Run]
    structures: Structures
    cost: float
    given: float
    expected: float | None
    holders: list[bytes] = field(default_factory=list)
    answered: bool = False

    @property
    def wanted(self) -> list[Run]:
        """Its runs whose force sets are still waited for."""
        return [run for run in self.runs if not run.job.ended]

    @property
    def atoms(self) -> int:
        """Mean number of atoms of its structures."""
        return self.structures.n_atoms // len(self.structures)


def structures_of(runs: Sequence[Run]) -> Structures:
    """The structures of some runs, one behind another; not copied where there is one run."""
    return concatenate(
        [
            run.job.structures
            if len(run) == len(run.job.structures)
            else run.job.structures[run.first : run.last]
            for run in runs
        ]
    )


def results_by_run(runs: Sequence[Run], structures: Structures, results: Results) -> list[Results]:
    """Results of a batch, cut up for the runs that it was made of (views, no copies)."""
    if len(runs) == 1:
        return [results]
    ends = np.cumsum([len(run) for run in runs]).tolist()
    found = []
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        low, high = int(structures.offsets[first]), int(structures.offsets[last])
        found.append(
            Results(
                results.energy[first:last],
                results.forces[low:high],
                results.virial[first:last],
                {k: v[first:last] for k, v in results.properties.items()},
                {k: v[low:high] for k, v in results.atom_properties.items()},
            )
        )
    return found


def results_of(job: Job) -> Results:
    """Results of a whole force set, in order; the forces in the door's own memory, if it shares some.

    But not where two workers were given the same: the slower one may still write there.
    """
    parts = [job.parts[first] for first in sorted(job.parts)]
    if job.area is None or not job.clean:
        return join(parts)
    low = 0
    for part in parts:
        place = job.area[low : low + len(part.forces)]
        low += len(place)
        if not _same(part.forces, place):
            place[:] = part.forces
    if len(parts) == 1:
        return replace(parts[0], forces=job.area)
    nothing = job.area[:0]  # not joined: they all lie where they should
    return replace(join([replace(part, forces=nothing) for part in parts]), forces=job.area)


def _same(one: Array, other: Array) -> bool:
    return one.__array_interface__["data"] == other.__array_interface__["data"]


@dataclass(frozen=True)
class Fault:
    """Why something could not be evaluated.

    ``suspects`` are places in the structures that were asked; ``final`` says that another try gives the same.
    """

    what: str
    fix: str
    suspects: tuple[int, ...] = ()
    final: bool = False


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
    places, names, largest = _unsound(results, structures, max_force)
    if not places:
        return results
    what = f"forces of {largest:.3g} eV/A"
    if names:
        what = f"{', '.join(names)} that {'are' if len(names) > 1 else 'is'} not finite"
    return Fault(f"The model gave {what}.", "The dynamics has left what the model has learned.", places)


def _all_sound(results: Results, max_force: float) -> bool:
    """A quick look that may say no to results that are sound."""
    others = (results.energy, results.virial, *results.properties.values(), *results.atom_properties.values())
    # Each |component| below the cap over sqrt(3) keeps the norm below the cap; NaN fails every comparison.
    cap, forces = max_force / 1.7321, results.forces
    if forces.size and not (forces.max() <= cap and forces.min() >= -cap):
        return False
    return all(math.isfinite(values.sum()) for values in others)


def _unsound(
    results: Results, structures: Structures, max_force: float
) -> tuple[tuple[int, ...], list[str], float]:
    """Places of structures with anything not finite or too large, what is not finite, the largest force."""
    count = len(structures)
    owner = np.repeat(np.arange(count), np.diff(structures.offsets))
    broken, names = np.zeros(count, dtype=bool), []
    main = {"energy": results.energy, "forces": results.forces, "virial": results.virial}
    for name, values in {**main, **results.properties, **results.atom_properties}.items():
        wrong = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if wrong.any():
            names.append(name)
            of_atoms = name == "forces" or name in results.atom_properties
            broken[owner[wrong] if of_atoms else wrong] = True
    size = np.linalg.norm(results.forces, axis=1)
    broken[owner[size > max_force]] = True
    return tuple(int(k) for k in np.flatnonzero(broken)), names, float(np.nanmax(size, initial=0.0))
