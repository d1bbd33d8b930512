"""The MPI door: i-PI's ``<ffmpi>``, with i-PI and this door in one ``mpiexec``.

    mpiexec -n 1 i-pi input.xml : -n 1 nnqmd serve MODEL --door mpi --template init.xyz --beads 8

Theory of operation. Each group of ranks says HELLO with its ranks and the name of its force field; then
i-PI sends INIT once, WORK with the structures that are queued (up to ``<batch_size>``), and at the end
EXIT. WORK is answered with RESULT and EXTRA. Headers are int32, numbers float64; hartree and bohr; the
cell vectors are the columns of h. Nothing on this wire numbers the beads, but i-PI sends what it has
queued in bead order, so they can be counted where one group answers a force field alone.

Who computes. MPI ends the whole job, i-PI included and without RESTART, when one of its processes dies.
So no rank holds the model: the first rank on each node starts a pool of worker processes there, and the
others on it that serve the same model use that pool. Unless ``--group`` says otherwise all ranks of a
force field are one group: i-PI then has one partner, which gets the force set whole and in order, and
cuts it over the pools of the nodes. One rank per node and force field is enough.

When something fails, i-PI is asked to stop by the file EXIT in its folder, upon which it writes RESTART
and says EXIT to all ranks. If it does not, the job is aborted. An i-PI that fails itself says nothing: it
waits for us in MPI_Finalize. On the same node that is seen; elsewhere it is silent for too long.
"""

from __future__ import annotations

import enum
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.ipi_process import is_past_its_end, rank_zero, wrote_restart
from nnqmd_server.doors.mpi_job import GRACE, IPI, Job, end_job
from nnqmd_server.errors import NnqmdError, ProgramError
from nnqmd_server.pool.ranks import wait_politely
from nnqmd_server.structures import Array

SILENCE = 3600.0
"""Longest time in which i-PI asks for nothing [s]; it may be waiting for another force field."""

LOOK = 2.0
"""How often a silent i-PI on this node is looked at, and how long EXIT may take once it has ended [s]."""


class Tag(enum.IntEnum):
    """The kinds of message, as i-PI numbers them."""

    HELLO = 1
    INIT = 2
    WORK = 3
    RESULT = 4
    EXTRA = 5
    EXIT = 6


def read_work(header: Array, body: Array) -> tuple[Array, Array]:
    """Cells and positions of a WORK message.

    Parameters
    ----------
    header : Array
        Atoms and structures, int32, shape (2,).
    body : Array
        For each structure h, its inverse and the positions [bohr].

    Returns
    -------
    tuple of Array
        h, shape (n_structures, 3, 3), vectors as columns, and positions (n_structures, n_atoms, 3) [bohr].

    Raises
    ------
    ProgramError
        The message is not as long as it says.
    """
    n_atoms, count = (int(n) for n in header) if len(header) == 2 else (0, 0)
    if n_atoms < 1 or count < 1 or len(body) != count * (18 + 3 * n_atoms):
        raise ProgramError(
            f"i-PI sent {len(body)} numbers for {count} structures of {n_atoms} atoms.",
            "Use i-PI 3.3 or a newer one with the same MPI protocol.",
        )
    rows = body.reshape(count, -1)
    return rows[:, :9].reshape(-1, 3, 3), rows[:, 18:].reshape(count, n_atoms, 3)


def write_results(answers: Sequence[tuple[float, Array, Array, str]]) -> tuple[Array, Array]:
    """The RESULT and EXTRA messages for answers as :class:`ForceSets` gives them."""
    numbers = np.concatenate(
        [
            np.concatenate([[energy], np.ravel(forces), np.ravel(virial)])
            for energy, forces, virial, _ in answers
        ]
    )
    texts = [text.encode() for *_, text in answers]
    extras = b"".join(struct.pack("=i", len(text)) + text for text in texts)
    return numbers.astype(np.float64), np.frombuffer(extras, np.uint8)


class MpiDoor:
    """Answers i-PI over MPI until it says EXIT; for the root of a group.

    Parameters
    ----------
    job : Job
        This rank in its MPI job.
    begin : callable
        Gives the :class:`ForceSets`; called when i-PI asks for the first time, since i-PI waits more
        quietly for an answer than for a HELLO.
    n_beads : int, optional
        Beads in a force set, if they are known and one group answers all of them.
    silence : float
        Longest time in which i-PI asks for nothing [s].
    """

    def __init__(
        self, job: Job, begin: Callable[[], ForceSets], n_beads: int | None, silence: float = SILENCE
    ) -> None:
        self._job = job
        self._begin = begin
        self._sets: ForceSets | None = None
        self._n_beads = n_beads
        self._silence = silence
        self._answered = 0
        self._ipi: psutil.Process | None = None
        self._stop = threading.Event()
        self.failure: NnqmdError | None = None
        self.saved = False  # whether i-PI has nothing more to write after a failure

    def stop(self) -> None:
        """Expect i-PI to end soon: signals from ``mpiexec`` reach all, and i-PI has the last word."""
        self._stop.set()

    def run(self) -> None:
        """Serve until i-PI says EXIT; a failure is shown, kept in ``failure``, and stops i-PI softly.

        Raises
        ------
        NnqmdError
            The pool, or what depends on its model, could not begin.
        """
        self._say_hello()
        try:
            try:
                while (work := self._next_work()) is not None:
                    self._answer(*work)
            except NnqmdError as error:
                if self._sets is None:
                    raise  # nothing has been simulated yet: there is no RESTART to be saved
                self._fail(error)
        finally:
            if self._sets is not None:
                self._close()

    def _say_hello(self) -> None:
        members = self._job.place.members
        hello = np.array([self._job.number, len(members), *members], np.int32)
        self._job.send(hello, IPI, Tag.HELLO)
        self._job.send(np.frombuffer(self._job.field.encode(), np.uint8), IPI, Tag.HELLO)

    def _next_work(self) -> tuple[Array, Array] | None:
        """Cells and positions that i-PI wants evaluated; None when it is done."""
        while True:
            tag = self._wait()
            if tag == Tag.EXIT:
                self._job.receive(IPI, tag, np.int32)
                return None
            if tag == Tag.INIT:
                self._job.receive(IPI, tag, np.int32)
                self._job.receive(IPI, tag, np.uint8)
            elif tag == Tag.WORK:
                return read_work(
                    self._job.receive(IPI, tag, np.int32), self._job.receive(IPI, tag, np.float64)
                )
            else:
                raise ProgramError(
                    f"i-PI sent a message of kind {tag}, which its MPI protocol does not have.",
                    "Use i-PI 3.3 or a newer one with the same MPI protocol.",
                )

    def _wait(self) -> int:
        """The kind of the next message; ends the job when i-PI has gone, or gone silent."""
        told: float | None = None
        heard: int | None = None
        look = time.monotonic() + LOOK
        gone = False

        def done() -> bool:
            nonlocal told, heard, look, gone
            now = time.monotonic()
            if told is None and self._stop.is_set():
                told = now
            if now > look:
                look, was_gone = now + LOOK, gone
                gone = self._ipi is not None and is_past_its_end(self._ipi)
                if was_gone and gone:  # twice: EXIT may be on its way
                    return True
            heard = self._job.heard(IPI)
            return heard is not None or (told is not None and now - told > GRACE)

        if not wait_politely(done, self._silence):
            end_job(
                f"i-PI has asked for nothing for {self._silence:.0f} s; the job is ended (see --silence)."
            )
        if heard is None and gone:
            end_job("i-PI has ended with an error, which it has printed; the job is ended.")
        if heard is None:
            end_job(f"i-PI has not stopped within {GRACE:.0f} s; the job is ended.")
        return int(heard)

    def _answer(self, h: Array, positions: Array) -> None:
        if self._sets is None:
            self._ipi = rank_zero(self._job.number)  # it asks, so it is up
            self._sets = self._begin()
        beads = None
        if self._n_beads:
            numbers = [(self._answered + k) % self._n_beads for k in range(len(h))]
            beads = [range(bead, bead + 1) for bead in numbers]
        results, extras = write_results(self._sets.evaluate(h, positions, beads))
        self._answered += len(h)

        def given_up() -> bool:
            return self._job.heard(IPI, Tag.EXIT) is not None

        if self._job.send(results, IPI, Tag.RESULT, given_up):
            self._job.send(extras, IPI, Tag.EXTRA, given_up)

    def _fail(self, error: NnqmdError) -> None:
        """Say what failed and let i-PI write RESTART, as far as it still can."""
        self.failure = self.failure or error
        sys.stderr.write(f"nnqmd: {error}\n")
        sys.stderr.flush()
        began = time.time()
        request = Path("EXIT")
        request.touch()
        try:
            if not wait_politely(lambda: self._job.heard(IPI, Tag.EXIT) is not None, GRACE):
                request.unlink(missing_ok=True)
                end_job(f"i-PI did not stop within {GRACE:.0f} s; the job is ended without a new RESTART.")
        finally:
            # i-PI leaves it, and would stop at once the next time.
            request.unlink(missing_ok=True)
        self._job.receive(IPI, Tag.EXIT, np.int32)
        if wait_politely(lambda: wrote_restart(Path(), since=began), GRACE):
            sys.stderr.write("nnqmd: RESTART was written.\n")
            self.saved = True

    def _close(self) -> None:
        try:
            self._sets.close()
        except NnqmdError as error:
            self.failure = self.failure or error
            sys.stderr.write(f"nnqmd: {error}\n")
