"""Between i-PI's units and ours, the same for every door: a force set in, i-PI's answers out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from nnqmd_server.doors.bead_order import BeadOrder
from nnqmd_server.doors.extras import EXTRAS, check_extras, extras_of, property_of
from nnqmd_server.doors.record import DipoleRecord
from nnqmd_server.doors.template import by_size
from nnqmd_server.errors import InputError, StructureError
from nnqmd_server.pool.client import Client
from nnqmd_server.structures import Array, Results, Structures, replicas
from nnqmd_server.units import BOHR, HARTREE

log = logging.getLogger("nnqmd.door")


def to_structures(numbers: Array, h: Sequence[Array], positions: Sequence[Array]) -> Structures:
    """Structures [Angstrom] from what i-PI sends.

    Parameters
    ----------
    numbers : Array
        Atomic numbers, shape (n_atoms,).
    h : sequence of Array
        Cell matrices [bohr], vectors as columns, each (3, 3).
    positions : sequence of Array
        Positions [bohr], each (n_atoms, 3) or flat; or one array of all, (n_structures, n_atoms, 3).
    """
    count = len(positions)
    together = isinstance(positions, np.ndarray)
    flat = positions.reshape(-1) if together else np.concatenate([np.ravel(p) for p in positions])
    if flat.size != count * 3 * len(numbers):
        raise InputError(
            f"i-PI sends {flat.size // (3 * count)} atoms, the template has {len(numbers)}.",
            "Use the file that initialises i-PI as the template.",
        )
    cells = np.array(h, dtype=np.float64).reshape(count, 3, 3).transpose(0, 2, 1) * BOHR
    return replicas(numbers, (flat * BOHR).reshape(count, -1, 3), cells)


def from_results(results: Results, extras: Sequence[str] = ()) -> list[tuple[float, Array, Array, str]]:
    """What i-PI wants for each bead: energy [hartree], forces [hartree/bohr], virial [hartree], extras.

    The virial is sum r f = -stress * volume in both houses. For the extras see :func:`extras_of`.
    """
    count = len(results)
    energy = results.energy / HARTREE
    forces = results.forces.reshape(count, -1, 3) * (BOHR / HARTREE)
    virial = results.virial / HARTREE
    texts = extras_of(results, extras)
    return [(float(energy[k]), forces[k], virial[k], texts[k]) for k in range(count)]


class ForceSets:
    """Asks the pool for one force set after the other and records the dipoles.

    Parameters
    ----------
    client : Client
        The connection to the pool.
    numbers : Array, or sequence of Array
        Atomic numbers of the system, or of each of several systems, which are told apart by their size.
    n_beads : int, optional
        Beads in a force set; needed for the record.
    record : Path, optional
        The HDF5 file for the dipoles.
    extras : sequence of str
        What i-PI gets as extras, see ``EXTRAS``.
    quarantine : Path
        Where structures go that could not be evaluated, with bead and force set (extxyz).
    """

    def __init__(
        self,
        client: Client,
        numbers: Array | Sequence[Array],
        n_beads: int | None,
        record: Path | None = None,
        extras: Sequence[str] = (),
        quarantine: Path = Path("quarantine.extxyz"),
    ) -> None:
        self._client = client
        self._numbers = by_size([numbers] if isinstance(numbers, np.ndarray) else numbers)
        self._extras = extras
        card = client.card()
        check_extras(extras, card)
        has_dipole = "dipole" in card["properties"]
        if record and has_dipole and n_beads is None:
            raise InputError("A record of dipoles needs the number of beads.", "Give --beads.")
        self._record = DipoleRecord(record, n_beads, card["sha256"]) if record and has_dipole else None
        self._quarantine = quarantine
        self.order: BeadOrder[tuple[Array, Array, Array] | None] = BeadOrder(n_beads)
        """Which bead of which force set has been answered."""

    @property
    def needs_beads(self) -> bool:
        """Whether it matters which bead is which: answers go to whoever asked, a record has an order."""
        return self._record is not None

    def evaluate(
        self,
        h: Sequence[Array],
        positions: Sequence[Array],
        beads: Sequence[range] | None = None,
        given_up: Callable[[], bool] | None = None,
    ) -> list[tuple[float, Array, Array, str]]:
        """Answers for the beads of a force set, or for a part of one, in the order given.

        Parameters
        ----------
        h, positions : sequence of Array
            As for :func:`to_structures`.
        beads : sequence of range, optional
            i-PI's number of each replica, as for :class:`BeadOrder`; may be left out where i-PI does not
            tell, if there is no record.
        given_up : callable, optional
            Asked several times a second whether nobody waits for the answer any more.

        Raises
        ------
        GivenUpError
            Nobody waits any more.
        PoolError
            The pool could not answer.
        StructureError
            It could not evaluate some beads; they are kept in the quarantine file.
        OutputError
            The dipoles could not be written.
        """
        sizes = [each.size // 3 for each in positions]
        if len(set(sizes)) > 1:
            return self._evaluate_each_size(sizes, h, positions, beads, given_up)
        numbers = self._numbers.get(sizes[0])
        structures = to_structures(
            next(iter(self._numbers.values())) if numbers is None else numbers, h, positions
        )
        try:
            results = self._client.submit(structures, given_up)
        except StructureError as error:
            raise self._set_aside(structures, beads, error) from error
        if beads is not None:
            self._keep(structures, results, beads)
        return from_results(results, self._extras)

    def _evaluate_each_size(
        self,
        sizes: Sequence[int],
        h: Sequence[Array],
        positions: Sequence[Array],
        beads: Sequence[range] | None,
        given_up: Callable[[], bool] | None,
    ) -> list[tuple[float, Array, Array, str]]:
        answers: dict[int, tuple[float, Array, Array, str]] = {}
        for size in sorted(set(sizes)):
            which = [k for k, other in enumerate(sizes) if other == size]
            each = [
                None if column is None else [column[k] for k in which] for column in (h, positions, beads)
            ]
            answers.update(zip(which, self.evaluate(*each, given_up), strict=True))
        return [answers[k] for k in range(len(sizes))]

    def _set_aside(
        self, structures: Structures, beads: Sequence[range] | None, error: StructureError
    ) -> StructureError:
        from ase import Atoms
        from ase.io import write

        frames = []
        for k in error.suspects:
            atoms = structures.atoms_of(k)
            frame = Atoms(structures.numbers[atoms], structures.positions[atoms])
            frame.set_cell(structures.cells[k])
            frame.pbc = True
            frame.info = {"reason": error.what}
            if beads is not None:
                frame.info |= {"bead": beads[k].start, "force_set": self.order.number_of(beads)}
            frames.append(frame)
        if beads is None:
            where = f"{len(frames)} of the {len(structures)} structures of a request"
        else:
            numbers = ", ".join(str(frame.info["bead"]) for frame in frames)
            where = f"bead {numbers} of force set {self.order.number_of(beads)}"
        kept = f"kept in {self._quarantine}"
        try:
            # In an MPI job ASE would wait for all ranks, i-PI too, to write with it.
            write(self._quarantine, frames, format="extxyz", append=True, parallel=False)
        except OSError as trouble:
            kept = f"not kept: {trouble}"
        return StructureError(f"{error.what.rstrip('.')} ({where}; {kept}).", error.fix, error.suspects)

    def _keep(self, structures: Structures, results: Results, beads: Sequence[range]) -> None:
        if self._record is None:
            self.order.add(beads, [None] * len(beads))
            return
        dipoles = property_of(results, EXTRAS["dipole"])
        values = list(zip(dipoles, results.energy, structures.cells, strict=True))
        known = self.order.strangers
        self._write(self.order.add(beads, values))
        if self.order.strangers and not known:
            log.warning(
                "i-PI asks for beads of another system or force as well; their dipoles are left out."
                " Give every system a force field of its own to keep them."
            )

    def _write(self, rows: Iterable[Sequence[tuple[Array, Array, Array]] | None]) -> None:
        for row in rows:
            if row is None:
                if not self._record.skipped:
                    log.warning("not every bead of a force set was asked of us: its dipoles are left out")
                self._record.skip()
            else:
                dipole, energy, cell = zip(*row, strict=True)
                self._record.append(np.array(dipole), np.array(energy), cell[0])

    def finish_record(self) -> None:
        """Write the rest of the dipoles; may be called from another thread, and twice."""
        if self._record:
            self._write(row for row in self.order.end() if row is not None)
            self._record.close()

    def close(self) -> None:
        """Write the rest of the dipoles and hang up; may be called twice."""
        try:
            self.finish_record()
        finally:
            self._client.close()
