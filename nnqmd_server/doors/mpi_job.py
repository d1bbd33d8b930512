"""The ranks beside i-PI in one ``mpiexec``: how they join, who does what, and how the job ends on an error.

MPI has no half measures: a rank that ends before MPI_Init leaves the others waiting in it for ever, and so
does one that merely stops answering. So whatever goes wrong here ends the whole job, with our message.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from nnqmd_server.errors import InputError, NnqmdError, ProgramError
from nnqmd_server.pool.ranks import tell_all, wait_politely
from nnqmd_server.structures import Array

if TYPE_CHECKING:
    from mpi4py import MPI

IPI = 0
"""i-PI is rank 0 of the job."""

JOIN_TIMEOUT = 120.0
"""How long i-PI may take from its start to its first call of MPI [s]."""

GRACE = 30.0
"""How long i-PI, or another rank, may take to end after it was told to [s]."""

# i-PI splits the world with colour 0 for itself, its own drivers use 1 and a few more. Ours must not meet
# those, since what we tell each other next means nothing to them.
_COLOUR = 28270


@dataclass(frozen=True)
class Rank:
    """What one rank says of itself: its number, its node, the force field it serves, and its pool.

    ``group`` is how many ranks make up a group (0: all of the force field); ``pool`` is the same text for
    ranks that can use the same workers.
    """

    number: int
    node: str
    field: str
    group: int
    pool: str


@dataclass(frozen=True)
class Place:
    """What one rank has to do; all ranks by their numbers in the job.

    Parameters
    ----------
    members : tuple of int
        The ranks of the group; the first of them, the ``root``, talks to i-PI.
    carriers : tuple of int
        One member for each pool (that is, node) that shares in the group's work; the root comes first.
    host : int
        The rank that starts the pool that this rank uses.
    groups : int
        How many groups serve the same force field.
    """

    members: tuple[int, ...]
    carriers: tuple[int, ...]
    host: int
    groups: int

    @property
    def root(self) -> int:
        """The rank that talks to i-PI."""
        return self.members[0]


def arrange(ranks: Sequence[Rank], number: int) -> Place:
    """What the rank with a number has to do, from what all say of themselves.

    Ranks of one force field form groups in the order of their numbers. On each node, the first rank that
    needs some pool starts it, and all others there that can use the same one do so.
    """
    me = next(rank for rank in ranks if rank.number == number)
    mine = [rank for rank in ranks if rank.field == me.field]
    size = me.group or len(mine)
    groups = [mine[first : first + size] for first in range(0, len(mine), size)]
    group = next(group for group in groups if me in group)
    carriers: dict[tuple[str, str], int] = {}
    for rank in group:
        carriers.setdefault((rank.node, rank.pool), rank.number)
    host = next(rank.number for rank in ranks if (rank.node, rank.pool) == (me.node, me.pool))
    return Place(
        tuple(rank.number for rank in group), tuple(carriers.values()), host=host, groups=len(groups)
    )


def end_job(message: str = "") -> NoReturn:
    """End the whole job at once, i-PI included; this process in any case."""
    if message:
        sys.stderr.write(f"nnqmd: {message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    if has_joined():
        time.sleep(0.3)  # mpiexec drops what it has not passed on yet
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(1)
    elif started_by_mpiexec():
        # An exit status, whatever it is, would leave i-PI in MPI_Init; a signal makes mpiexec end all.
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)


def has_joined() -> bool:
    """Whether this process is past MPI_Init."""
    return "mpi4py.MPI" in sys.modules


def started_by_mpiexec() -> bool:
    """Whether this process is one of several of an MPI job (MPICH and its kin, Open MPI, Slurm)."""
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    return any(os.environ.get(name, "1") != "1" for name in names)


class Job:
    """The MPI job as one of our ranks sees it, from MPI_Init to the end.

    As a context manager it ends the job when an exception passes, since i-PI would wait for this rank. When
    ``failed`` has been set it ends the job after all our ranks have come to the end: MPICH's mpiexec forgets
    the exit status of a rank that ends after i-PI.

    Parameters
    ----------
    field : str
        Name of the ``<ffmpi>`` that is served; may be empty when there is only one.
    group : int
        Ranks in a group; 0 for all ranks of the force field.
    pool : str
        The same text for all ranks that can use the same pool.

    Raises
    ------
    ProgramError
        mpi4py is missing, or this is not an MPI job with i-PI.
    InputError
        The groups of this force field are not of one size.
    """

    def __init__(self, field: str, group: int, pool: str) -> None:
        self.mpi = _join()
        self.world: MPI.Intracomm = self.mpi.COMM_WORLD
        self.number = self.world.Get_rank()
        if self.world.Get_size() < 2:
            raise ProgramError(
                "The MPI door is alone: i-PI must be rank 0 of the same mpiexec.",
                "mpiexec -n 1 i-pi input.xml : -n 1 nnqmd serve MODEL --door mpi ...",
            )
        if self.number == IPI:
            raise ProgramError(
                "The MPI door is rank 0 of the job, which must be i-PI.",
                "Give i-PI first: mpiexec -n 1 i-pi input.xml : -n 1 nnqmd serve MODEL --door mpi ...",
            )
        self._ours: MPI.Intracomm = self.world.Split(color=_COLOUR, key=self.number)
        # Containers may all have one name, so the name of the node can be given.
        node = os.environ.get("NNQMD_NODE") or self.mpi.Get_processor_name()
        self.field = field
        self.failed = False
        me = Rank(self.number, node, field, group, pool)
        ranks = [Rank(**json.loads(text)) for text in self.tell_all(json.dumps(asdict(me)))]
        if len({rank.group for rank in ranks if rank.field == field}) > 1:
            raise InputError(
                f"The ranks of the force field {field!r} have different --group.", "Give all the same."
            )
        self.place = arrange(ranks, self.number)
        self._hosts = {rank.number: index for index, rank in enumerate(ranks)}

    def tell_all(self, text: str) -> list[str]:
        """What every one of our ranks says, in the order of the ranks; all must call this."""
        return tell_all(self._ours, text)

    def pool_address(self, mine: str) -> str:
        """Address of the pool that this rank uses; ``mine`` is that of a pool it started, or nothing."""
        return self.tell_all(mine)[self._hosts[self.place.host]]

    def send(self, buffer: Array, to: int, tag: int, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Send an array; False when ``given_up()`` before the other side has taken it."""
        request = self.world.Isend(buffer, dest=to, tag=tag)
        wait_politely(lambda: request.Test() or given_up(), limit=float("inf"))
        if request != self.mpi.REQUEST_NULL and not request.Test():
            # Nobody will ever take it, and MPI_Finalize would wait for that.
            request.Cancel()
            request.Free()
            return False
        return True

    def heard(self, source: int, tag: int | None = None) -> int | None:
        """Tag of a message that has come from a rank, or None."""
        status = self.mpi.Status()
        any_or = self.mpi.ANY_TAG if tag is None else tag
        return status.Get_tag() if self.world.Iprobe(source=source, tag=any_or, status=status) else None

    def receive(self, source: int, tag: int, kind: type[np.generic]) -> Array:
        """The next message of a rank, which has come or is about to, as an array."""
        status = self.mpi.Status()
        self.world.Probe(source=source, tag=tag, status=status)
        buffer = np.empty(status.Get_count(self.mpi.BYTE) // np.dtype(kind).itemsize, kind)
        self.world.Recv(buffer, source=source, tag=tag)
        return buffer

    def leave_together(self) -> bool:
        """Wait for our other ranks, which may still need this rank's pool; False if they do not come."""
        request = self._ours.Ibarrier()
        return wait_politely(request.Test, GRACE)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NnqmdError):
            end_job(str(error))
        elif error is not None:
            sys.excepthook(kind, error, trace)
            end_job()
        self.leave_together()
        if self.failed:
            end_job()


def _join() -> MPI:
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        with _deadline(JOIN_TIMEOUT):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ProgramError(
            f"The MPI door needs mpi4py and an MPI library: {error}.",
            "pip install 'nnqmd-server[mpi]', in the environment of i-PI as well.",
        ) from error
    return MPI


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Kill this process when the block is not done in time.

    MPI_Init waits for all processes and holds Python's lock meanwhile, so only another process can look
    at the clock. It is forked, before there are threads, and ends with us in any case: its pipe closes.
    """
    theirs, ours = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(ours)
        if not select.select([theirs], [], [], seconds)[0]:
            message = (
                f"nnqmd: i-PI has not joined the MPI job within {seconds:.0f} s. It has ended, or it has no"
                " <ffmpi>, or it uses another MPI library.\nFix: See what i-PI has printed.\n"
            )
            os.write(2, message.encode())
            os.kill(parent, signal.SIGKILL)
        os._exit(0)
    os.close(theirs)
    try:
        yield
    finally:
        os.close(ours)
        os.waitpid(child, 0)
