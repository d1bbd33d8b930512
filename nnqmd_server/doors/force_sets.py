"""Between i-PI's units and ours, the same for every door: a force set in, i-PI's answers out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from nnqmd_server.doors.bead_order import BeadOrder
from nnqmd_server.doors.record import DipoleRecord
from nnqmd_server.errors import InputError, StructureError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.structures import Array, Results, Structures, replicas
from nnqmd_server.units import BOHR, HARTREE

log = logging.getLogger("nnqmd.door")

EXTRAS = ("dipole",)


def to_structures(numbers: Array, h: Sequence[Array], positions: Sequence[Array]) -> Structures:
    """Structures [Angstrom] from what i-PI sends.

    Parameters
    ----------
    numbers : Array
        Atomic numbers, shape (n_atoms,).
    h : sequence of Array
        Cell matrices [bohr], vectors as columns, each (3, 3).
    positions : sequence of Array
        Positions [bohr], each (n_atoms, 3) or flat.
    """
    count = len(positions)
    flat = np.concatenate([np.ravel(p) for p in positions])
    if flat.size != count * 3 * len(numbers):
        raise InputError(
            f"i-PI sends {flat.size // (3 * count)} atoms, the template has {len(numbers)}.",
            "Use the file that initialises i-PI as the template.",
        )
    flat *= BOHR
    cells = np.array(h, dtype=np.float64).reshape(count, 3, 3).transpose(0, 2, 1) * BOHR
    return replicas(numbers, flat.reshape(count, -1, 3), cells)


def from_results(results: Results, extras: Sequence[str] = ()) -> list[tuple[float, Array, Array, str]]:
    """What i-PI wants for each bead: energy [hartree], forces [hartree/bohr], virial [hartree], extras.

    The virial is sum r f = -stress * volume in both houses. Extras are JSON text; the dipole in e bohr.
    """
    count = len(results)
    energy = results.energy / HARTREE
    forces = results.forces.reshape(count, -1, 3) * (BOHR / HARTREE)
    virial = results.virial / HARTREE
    texts = [""] * count
    if extras:
        texts = [
            json.dumps({name: (results.properties[name][k] / BOHR).tolist() for name in extras})
            for k in range(count)
        ]
    return [(float(energy[k]), forces[k], virial[k], texts[k]) for k in range(count)]


class ForceSets:
    """Asks the pool for one force set after the other and records the dipoles.

    Parameters
    ----------
    client : PoolClient
        The connection to the pool.
    numbers : Array
        Atomic numbers of the system.
    n_beads : int, optional
        Beads in a force set; needed for the record.
    record : Path, optional
        The HDF5 file for the dipoles.
    extras : sequence of str
        Properties that i-PI gets as extras.
    quarantine : Path
        Where structures go that could not be evaluated, with bead and force set (extxyz).
    """

    def __init__(
        self,
        client: PoolClient,
        numbers: Array,
        n_beads: int | None,
        record: Path | None = None,
        extras: Sequence[str] = (),
        quarantine: Path = Path("quarantine.extxyz"),
    ) -> None:
        self._client = client
        self._numbers = numbers
        self._n_beads = n_beads
        self._extras = extras
        card = client.card()
        missing = sorted(set(extras) - set(card["properties"]))
        if missing or not set(extras) <= set(EXTRAS):
            raise InputError(
                f"The model {card['name']} cannot give the extras {', '.join(extras)}.",
                f"Ask for some of: {', '.join(EXTRAS)}; the model must have a Wannier read-out.",
            )
        has_dipole = "dipole" in card["properties"]
        if record and has_dipole and n_beads is None:
            raise InputError("A record of dipoles needs the number of beads.", "Give --beads.")
        self._record = DipoleRecord(record, n_beads, card["sha256"]) if record and has_dipole else None
        self._asked = 0
        self._quarantine = quarantine
        self._order: BeadOrder[tuple[Array, Array, Array]] = BeadOrder(n_beads or 1)

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
            i-PI's number of each replica, as for :class:`BeadOrder`; needed when a force set may come
            in parts.
        given_up : callable, optional
            Asked every second whether nobody waits for the answer any more.

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
        structures = to_structures(self._numbers, h, positions)
        if beads is None:
            beads = [range(k, k + 1) for k in range(len(structures))]
        try:
            results = self._client.submit(structures, given_up)
        except StructureError as error:
            raise self._set_aside(structures, beads, error) from error
        self._asked += len(structures)
        if self._record:
            self._keep(structures, results, beads)
        return from_results(results, self._extras)

    def _set_aside(
        self, structures: Structures, beads: Sequence[range], error: StructureError
    ) -> StructureError:
        from ase import Atoms
        from ase.io import write

        frames = []
        for k in error.suspects:
            atoms = structures.atoms_of(k)
            frame = Atoms(structures.numbers[atoms], structures.positions[atoms])
            frame.set_cell(structures.cells[k])
            frame.pbc = True
            frame.info = {"bead": beads[k].start, "reason": error.what}
            if self._n_beads:
                frame.info["force_set"] = self._asked // self._n_beads
            frames.append(frame)
        where = "bead " + ", ".join(str(frame.info["bead"]) for frame in frames)
        kept = f"kept in {self._quarantine}"
        try:
            write(self._quarantine, frames, format="extxyz", append=True)
        except OSError as trouble:
            kept = f"not kept: {trouble}"
        return StructureError(f"{error.what.rstrip('.')} ({where}; {kept}).", error.fix, error.suspects)

    def _keep(self, structures: Structures, results: Results, beads: Sequence[range]) -> None:
        values = list(zip(results.properties["dipole"], results.energy, structures.cells, strict=True))
        self._write(self._order.add(beads, values))

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
            self._write(row for row in self._order.end() if row is not None)
            self._record.close()

    def close(self) -> None:
        """Write the rest of the dipoles and hang up; may be called twice."""
        try:
            self.finish_record()
        finally:
            self._client.close()
