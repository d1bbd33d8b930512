"""The direct door: the PES that i-PI loads with ``<ffdirect>``, a thin client of the pool.

In the i-PI input::

    <ffdirect name='allegro'>
      <pes>custom</pes> <pes_path>nnqmd_pes.py</pes_path> <batch_size>8</batch_size>
      <parameters>{template: init.xyz}</parameters>
    </ffdirect>

where ``nnqmd_pes.py`` says ``from nnqmd_server.doors.direct import *`` and ``batch_size`` is the number of
beads: i-PI then asks once per step, for all beads together. No torch is imported here.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ipi.utils.softexit import softexit

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.template import by_size, read_numbers
from nnqmd_server.errors import InputError, NnqmdError, PoolError, ProgramError
from nnqmd_server.pool.client import GivenUpError, PoolClient, default_address
from nnqmd_server.structures import Array

__all__ = ["__DRIVER_CLASS__", "__DRIVER_NAME__", "NnqmdPES"]

__DRIVER_NAME__ = "nnqmd"
__DRIVER_CLASS__ = "NnqmdPES"


class NnqmdPES:
    """Forces from a pool of nnqmd workers, for i-PI's ``<ffdirect>``.

    Parameters
    ----------
    template : str
        Structure file that tells the elements in i-PI's order; the file that initialises i-PI will do.
        Several, separated by spaces, when systems of different sizes share the force field.
    pool : str, optional
        Address of the pool; ``$NNQMD_POOL`` or the default of ``nnqmd serve`` unless given.
    patience : float
        Longest wait for the pool [s].
    dipoles : str
        HDF5 file for the dipoles of every bead; "none" writes none.
    potential : str, optional
        Which of the pool's potentials is asked, when it has several.
    keys : str, optional
        Key file (``door.key``) for a pool at a TCP address; ``$NNQMD_KEYS`` unless given.
    beads : int
        Beads of a force set; those of the first request unless given. A threaded ``<ffdirect>`` may send
        a force set in parts, in order.
    extras : str
        What i-PI gets as extras (``dipole``, ``charges``, ``committee_pot``, ``committee_force``,
        ``committee_virial``), separated by spaces; none by default.
    verbosity : object
        Given by i-PI; not used.
    """

    def __init__(
        self,
        template: str = "",
        pool: str = "",
        patience: float = 600.0,
        dipoles: str = "dipoles.h5",
        extras: str = "",
        potential: str = "",
        keys: str = "",
        beads: int = 0,
        verbosity: object = None,
        **unknown: object,
    ) -> None:
        self._sets: ForceSets | None = None
        self._n_beads = int(beads)
        self._asked = 0
        self._shared = False
        self._wanted = {"extras": extras.split(), "record": None if dipoles == "none" else Path(dipoles)}
        try:
            if unknown:
                raise InputError(
                    f"<parameters> of the nnqmd PES has {', '.join(unknown)}, which it does not know.",
                    "It knows template, pool, potential, keys, beads, patience, dipoles and extras.",
                )
            if not template:
                raise InputError(
                    "The nnqmd PES does not know the elements: i-PI sends positions only.",
                    "Give the initial structure: <parameters>{template: init.xyz}</parameters>.",
                )
            self._numbers = [read_numbers(file) for file in template.split()]
            by_size(self._numbers)
            where = pool or default_address()
            self._client = PoolClient(where, float(patience), str(potential), keys=keys or None)
        except NnqmdError as error:
            _say(error)
            raise SystemExit(1) from None

    def __call__(self, cell: Array | Sequence[Array], pos: Array | Sequence[Array]) -> tuple | list[tuple]:
        """Energy, forces, virial, extras of one structure, or a list of these for a list of structures."""
        batched = isinstance(cell, list)
        h, positions = (cell, pos) if batched else ([cell], [pos])
        try:
            if self._sets is None:
                self._n_beads = self._n_beads or len(h)
                self._shared = _askers(self) > 1
                self._sets = self._begin(self._n_beads)
            answers = self._sets.evaluate(h, positions, self._next_beads(len(h)), _ending)
        except GivenUpError:
            raise SystemExit from None  # i-PI is ending, and has told why
        except NnqmdError as error:
            raise _end_softly(error) from None
        except Exception as error:  # noqa: BLE001 - whatever it is, i-PI is to write RESTART first
            traceback.print_exc()
            failed = f"The direct door failed: {error.__class__.__name__}: {error}"
            raise _end_softly(ProgramError(failed, "Please report what stands above.")) from None
        return answers if batched else answers[0]

    def _next_beads(self, count: int) -> list[range] | None:
        if self._shared:
            return None
        numbers = [(self._asked + k) % self._n_beads for k in range(count)]
        self._asked += count
        return [range(bead, bead + 1) for bead in numbers]

    def _begin(self, n_beads: int) -> ForceSets:
        try:
            self._client.card(patience=5.0)
        except PoolError as error:
            sys.stderr.write(f"nnqmd is waiting: {error.what} {error.fix}\n")
            sys.stderr.flush()
        if self._shared and self._wanted["record"] and "dipole" in self._client.card()["properties"]:
            raise InputError(
                "Several systems or forces of the input share this force field, and i-PI does not say which"
                " of them it asks for: their dipoles would be mixed.",
                "Give each a force field of its own, as `nnqmd run` does by itself, or say dipoles: none.",
            )
        sets = ForceSets(self._client, self._numbers, n_beads, **self._wanted)
        # A soft exit runs in a thread of its own while this one may be waiting for the pool: the
        # connection belongs to this thread and must be left alone.
        softexit.register_function(_finish, sets)
        return sets


def _askers(pes: NnqmdPES) -> int:
    """How many forces of the simulation ask a PES, as far as i-PI shows itself: it registers for the end."""
    count = 0
    for function, *_ in softexit.flist:
        for system in getattr(getattr(function, "__self__", None), "syslist", ()):
            count += sum(getattr(force.ff, "driver", None) is pes for force in system.forces.mforces)
    return count


def _ending() -> bool:
    """Whether i-PI is ending (a signal, the file EXIT) while we wait for forces."""
    return softexit.triggered


def _end_softly(error: NnqmdError) -> SystemExit:
    """Let i-PI write RESTART, which a traceback from here would lose."""
    _say(error)
    softexit.trigger(status="restartable", message=f" @NNQMD: {error.what}")
    return SystemExit(1)


def _finish(sets: ForceSets) -> None:
    try:
        sets.finish_record()
    except NnqmdError as error:  # i-PI has more to do before it ends
        _say(error)


def _say(error: NnqmdError) -> None:
    sys.stderr.write(f"nnqmd: {error}\n")
    sys.stderr.flush()
