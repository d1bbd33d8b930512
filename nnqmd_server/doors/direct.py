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
from collections.abc import Sequence
from pathlib import Path

from ipi.utils.softexit import softexit

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.template import read_numbers
from nnqmd_server.errors import InputError, NnqmdError, PoolError
from nnqmd_server.pool.client import PoolClient, default_address
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
    pool : str, optional
        Address of the pool; ``$NNQMD_POOL`` or the default of ``nnqmd serve`` unless given.
    patience : float
        Longest wait for the pool [s].
    dipoles : str
        HDF5 file for the dipoles of every bead; "none" writes none.
    extras : str
        Properties that i-PI gets as extras ("dipole"), separated by spaces; none by default.
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
        verbosity: object = None,
        **unknown: object,
    ) -> None:
        self._sets: ForceSets | None = None
        self._wanted = {"extras": extras.split(), "record": None if dipoles == "none" else Path(dipoles)}
        try:
            if unknown:
                raise InputError(
                    f"<parameters> of the nnqmd PES has {', '.join(unknown)}, which it does not know.",
                    "It knows template, pool, patience, dipoles and extras.",
                )
            if not template:
                raise InputError(
                    "The nnqmd PES does not know the elements: i-PI sends positions only.",
                    "Give the initial structure: <parameters>{template: init.xyz}</parameters>.",
                )
            self._numbers = read_numbers(template)
            self._client = PoolClient(pool or default_address(), float(patience))
        except NnqmdError as error:
            _say(error)
            raise SystemExit(1) from None

    def __call__(self, cell: Array | Sequence[Array], pos: Array | Sequence[Array]) -> tuple | list[tuple]:
        """Energy, forces, virial, extras of one structure, or a list of these for a list of structures."""
        batched = isinstance(cell, list)
        h, positions = (cell, pos) if batched else ([cell], [pos])
        try:
            if self._sets is None:
                self._sets = self._begin(len(h))
            answers = self._sets.evaluate(h, positions)
        except NnqmdError as error:
            _say(error)
            # Lets i-PI write RESTART; a traceback from here would lose it.
            softexit.trigger(status="restartable", message=f" @NNQMD: {error.what}")
            raise SystemExit(1) from None
        return answers if batched else answers[0]

    def _begin(self, n_beads: int) -> ForceSets:
        try:
            self._client.card(patience=5.0)
        except PoolError as error:
            sys.stderr.write(f"nnqmd is waiting: {error.what} {error.fix}\n")
            sys.stderr.flush()
        sets = ForceSets(self._client, self._numbers, n_beads, **self._wanted)
        # A soft exit runs in a thread of its own while this one may be waiting for the pool: the
        # connection belongs to this thread and must be left alone.
        softexit.register_function(_finish, sets)
        return sets


def _finish(sets: ForceSets) -> None:
    try:
        sets.finish_record()
    except NnqmdError as error:  # i-PI has more to do before it ends
        _say(error)


def _say(error: NnqmdError) -> None:
    sys.stderr.write(f"nnqmd: {error}\n")
    sys.stderr.flush()
