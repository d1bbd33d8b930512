"""A group of MPI ranks as one potential: a large structure, split over the ranks by its centre atoms.

Theory of operation. The first rank of the group talks to the pool; to it the group is a potential like
any other. To evaluate a structure it cuts the atoms into compact parts and broadcasts the structure and the
parts. Every rank evaluates its centres with their neighbours (:mod:`nnqmd_server.potentials.centres`). One
Allreduce adds up energies, forces, virials and what belongs to the atoms; it also says whether a rank has
failed, so none may miss it. Only the edges of its own centres are ever made on a rank, and the memory that
the network needs, about 20 kB for each edge, falls with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nnqmd_server.errors import InputError, ModelError, NnqmdError
from nnqmd_server.pool.ranks import Rank, tell_all, wait_politely
from nnqmd_server.potentials.base import Potential
from nnqmd_server.potentials.centres import split_centres
from nnqmd_server.structures import Array, Results, Structures, join

if TYPE_CHECKING:
    from mpi4py import MPI

_STOP = -1


class Splittable(Potential, Protocol):
    """A potential of which every rank can evaluate a part."""

    def evaluate_centres(self, structure: Structures, centres: Array) -> Results:
        """What some atoms of one structure contribute; zeros for no atoms."""
        ...

    def add_dipoles(self, structures: Structures, results: Results) -> None:
        """Complete the results with what needs the whole structure."""
        ...


def group_of(rank: Rank, size: int) -> MPI.Intracomm:
    """The ranks that evaluate together with this one: ``size`` neighbouring ones.

    Raises
    ------
    InputError
        The job cannot be divided into groups of this size.
    """
    if rank.size % size:
        raise InputError(
            f"{rank.size} ranks cannot be divided into groups of {size}.",
            f"Start a multiple of {size} ranks, for example mpiexec -n {size}.",
        )
    return rank.comm.Split(rank.number // size, rank.number)


def check_local(potentials: Mapping[str, Potential]) -> None:
    """Refuse potentials that cannot be split by centres.

    Raises
    ------
    ModelError
        One passes messages between atoms, or does not say that it passes none.
    """
    for name, potential in potentials.items():
        if not potential.card.strictly_local or not hasattr(potential, "evaluate_centres"):
            raise ModelError(
                f"{name} ({potential.card.name}) cannot be split by centre atoms: only strictly local models,"
                " such as Allegro, can.",
                "Leave out --group: every rank is then a worker of its own.",
            )


class Group:
    """A potential that is evaluated by all ranks of a group; for the first of them.

    Parameters
    ----------
    potential : Splittable
        The model as loaded on this rank.
    number : int
        Which of the group's potentials it is, on all ranks.
    comm : MPI.Intracomm
        The ranks of the group.
    """

    def __init__(self, potential: Splittable, number: int, comm: MPI.Intracomm) -> None:
        self._potential = potential
        self._number = number
        self._comm = comm
        self.card = potential.card
        self.form = f"{potential.form}, split over {comm.Get_size()} MPI ranks"

    def evaluate(self, structures: Structures) -> Results:
        """See :meth:`Potential.evaluate`.

        Raises
        ------
        NnqmdError
            As the potential itself.
        RuntimeError
            A rank has failed otherwise.
        """
        results = join([self._evaluate_one(structures[k : k + 1]) for k in range(len(structures))])
        self._potential.add_dipoles(structures, results)
        return results

    def _evaluate_one(self, structure: Structures) -> Results:
        # One rank decides who owns what: two that round differently could leave an atom to nobody.
        owner = split_centres(structure.positions, structure.cells[0], self._comm.Get_size())
        _send(self._comm, np.array([self._number, structure.n_atoms], np.int64))
        _send(self._comm, np.concatenate([structure.numbers, owner]))
        _send(self._comm, np.concatenate([structure.cells.ravel(), structure.positions.ravel()]))
        return _add_up(self._comm, self._potential, structure, owner)

    def stop(self) -> None:
        """Let the other ranks go."""
        _send(self._comm, np.array([_STOP, 0], np.int64))


def follow(potentials: Mapping[str, Splittable], comm: MPI.Intracomm) -> None:
    """Evaluate with the group until its first rank says stop; for all other ranks."""
    models = list(potentials.values())
    while True:
        order = _send(comm, np.empty(2, np.int64))
        if order[0] == _STOP:
            return
        n = int(order[1])
        numbers, owner = _send(comm, np.empty(2 * n, np.int64)).reshape(2, n)
        values = _send(comm, np.empty(9 + 3 * n, np.float64))
        structure = Structures(
            numbers, values[9:].reshape(n, 3), values[:9].reshape(1, 3, 3), np.array([0, n])
        )
        try:
            _add_up(comm, models[order[0]], structure, owner)
        except (NnqmdError, RuntimeError):
            continue  # the first rank tells the pool


def _send(comm: MPI.Intracomm, values: Array) -> Array:
    """Broadcast what the first rank has into the others' arrays, waiting without spinning."""
    wait_politely(comm.Ibcast(values).Test)
    return values


def _add_up(comm: MPI.Intracomm, potential: Splittable, structure: Structures, owner: Array) -> Results:
    empty = potential.evaluate_centres(structure, np.empty(0, np.int64))  # raises on all ranks or on none
    failure = ""
    try:
        part = potential.evaluate_centres(structure, np.flatnonzero(owner == comm.Get_rank()))
    except Exception as error:  # noqa: BLE001 - whatever it is: the others wait in the sum
        part, failure = empty, f"{error.__class__.__name__}: {str(error)[:500]}"
    mine = np.concatenate([[float(bool(failure))], *(a.ravel() for a in _arrays(part))])
    total = np.empty_like(mine)
    wait_politely(comm.Iallreduce(mine, total).Test)
    if total[0]:
        said = tell_all(comm, failure)
        raise RuntimeError("; ".join(f"rank {k} of the group: {text}" for k, text in enumerate(said) if text))
    return _results(total[1:], empty)


def _arrays(results: Results) -> list[Array]:
    return [results.energy, results.virial, results.forces, *results.atom_properties.values()]


def _results(values: Array, shapes: Results) -> Results:
    """Results of the same shapes as others, from all their numbers in one run."""
    ends = np.cumsum([a.size for a in _arrays(shapes)])[:-1]
    parts = [
        part.reshape(like.shape) for part, like in zip(np.split(values, ends), _arrays(shapes), strict=True)
    ]
    of_atoms = dict(zip(shapes.atom_properties, parts[3:], strict=True))
    return Results(parts[0], parts[2], parts[1], {}, of_atoms)
