"""Processes that ``mpiexec`` or ``srun`` started: their numbers, their nodes, and the models for all of them.

Without mpi4py, or where the launcher and the MPI library do not know each other, the launcher's environment
tells the number; what needs messages between the ranks is then left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from nnqmd_server.errors import InputError, ModelError, NnqmdError, ProgramError
from nnqmd_server.potentials.load import card_of, words_of
from nnqmd_server.potentials.package import file_hash

if TYPE_CHECKING:
    from mpi4py import MPI

_NUMBER = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
_PIECE = 1 << 28


@dataclass(frozen=True)
class Rank:
    """One process of a job.

    Parameters
    ----------
    number, size : int
        Which of how many.
    local : int
        Which on its node: chooses the device.
    comm : MPI.Intracomm or None
        All ranks, when they can send each other messages.
    """

    number: int = 0
    size: int = 1
    local: int = 0
    comm: MPI.Intracomm | None = None


def node_name() -> str:
    """Name of this machine, or ``$NNQMD_NODE``: containers may all have one name."""
    return os.environ.get("NNQMD_NODE") or platform.node()


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> Rank:
    """What the launcher's environment variables say (MPICH and its kin, Open MPI, Slurm)."""

    def first(names: tuple[str, ...], default: int) -> int:
        told = [int(environment[name]) for name in names if environment.get(name, "").isdigit()]
        return told[0] if told else default

    size = first(_SIZE, 1)
    return Rank(first(_NUMBER, 0), size, first(_LOCAL, 0)) if size > 1 else Rank()


def find_rank(messages: bool = False) -> Rank:
    """Find out which process of its job this is; joins MPI where there is one.

    Parameters
    ----------
    messages : bool
        The ranks have to send each other messages.

    Raises
    ------
    ProgramError
        They have to, and cannot.
    """
    told = rank_from_environment()
    if told.size == 1 and not messages:
        return told
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if messages:
            raise ProgramError(
                f"A group of ranks needs mpi4py and an MPI library: {error}.",
                "pip install 'nnqmd-server[mpi]'.",
            ) from error
        return told
    comm = MPI.COMM_WORLD
    if comm.Get_size() < told.size:
        if messages:
            raise ProgramError(
                f"The launcher started {told.size} ranks, and the MPI library found {comm.Get_size()}.",
                "Use the mpiexec of this MPI library, or srun --mpi=pmi2 (see srun --mpi=list).",
            )
        return told
    number = comm.Get_rank()
    nodes = tell_all(comm, node_name())
    return Rank(number, comm.Get_size(), nodes[:number].count(nodes[number]), comm)


def tell_all(comm: MPI.Intracomm, text: str) -> list[str]:
    """What every rank says, in their order; all must call this."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.empty(comm.Get_size(), np.int32)
    comm.Allgather(np.array([data.size], np.int32), sizes)
    everything = np.empty(int(sizes.sum()), np.uint8)
    comm.Allgatherv(data, [everything, sizes])
    ends = np.cumsum(sizes)
    return [everything[end - size : end].tobytes().decode() for end, size in zip(ends, sizes, strict=True)]


def wait_politely(done: Callable[[], bool], limit: float = float("inf")) -> bool:
    """Wait until ``done()``, without spinning; False when that takes longer than ``limit`` [s].

    MPI's own waiting burns a core, which others need. The sleeps add 5 % at most to the time waited.
    """
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited > limit:
            return False
        time.sleep(min(2e-3, max(2e-5, 0.05 * waited)))
    return True


def leave(rank: Rank) -> None:
    """Leave MPI while all ranks are still in step: none waits for another one from here on."""
    if rank.comm is not None:
        sys.modules["mpi4py.MPI"].Finalize()


def end_all(rank: Rank, message: str) -> NoReturn:
    """End the whole job with a message: the other ranks would wait for this one for ever."""
    sys.stderr.write(f"nnqmd: rank {rank.number}: {message}\n")
    sys.stderr.flush()
    time.sleep(0.3)  # mpiexec drops what it has not passed on yet
    if rank.comm is not None:
        rank.comm.Abort(1)
    os._exit(1)


@contextlib.contextmanager
def handed_out(rank: Rank, models: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The models on this node, read from the file system once for all ranks.

    Rank 0 reads each file and sends it to one rank of every other node, which writes it into a private
    folder there; each rank of the node keeps a link to it until the end of this context. Every rank compares
    the hash of the file it will load with what rank 0 has read. Python potentials are not files of this kind
    and are found by every rank by itself.

    Parameters
    ----------
    rank : Rank
        This process.
    models : mapping of str to str
        Sources of the potentials by name; those of rank 0 count.

    Raises
    ------
    ModelError
        Rank 0 cannot read a model, or a copy differs from it; on all ranks alike.
    InputError
        The ranks were given different models.
    """
    comm = rank.comm
    if comm is None:
        yield dict(models)
        return
    if len(set(tell_all(comm, repr(sorted(models.items()))))) > 1:
        raise InputError("The ranks were given different models.", "Give all ranks the same command line.")
    nodes = tell_all(comm, node_name())
    leader = nodes.index(nodes[rank.number])
    leaders = comm.Split(0 if rank.number == leader else 1, rank.number)
    folder = Path(tempfile.mkdtemp(prefix="nnqmd-models-")) if leader != 0 else None
    try:
        yield {
            name: _hand_out(rank, leaders, leader, source, folder, name) for name, source in models.items()
        }
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _hand_out(
    rank: Rank, leaders: MPI.Intracomm, leader: int, source: str, folder: Path | None, name: str
) -> str:
    comm = rank.comm
    file, words = words_of(source)
    data, digest, failure, path = b"", "", "", file
    if rank.number == 0:
        try:
            if card_of(source) is not None:
                data = Path(file).read_bytes()
                digest = hashlib.sha256(data).hexdigest()
        except (NnqmdError, OSError) as error:
            failure = str(error)
    digest, failure = tell_all(comm, digest)[0], tell_all(comm, failure)[0]
    if failure:
        raise ModelError(f"Rank 0 cannot read {source}: {failure}")
    if not digest:
        return source
    if folder is not None:
        path = str(folder / name / Path(file).name)
    if rank.number == leader:
        data = _broadcast(leaders, data)
        failure = _keep(path, data) if leader else ""
    there = tell_all(comm, path)[leader]
    if rank.number != leader and leader:
        # Each rank has a link of its own: the one that wrote the file may end before the others have read it.
        failure = _keep(path, there)
    if not failure:
        failure = _differs(Path(path), digest)
    failures = [text for text in tell_all(comm, failure) if text]
    if failures:
        raise ModelError(f"The model could not be handed out: {failures[0]}.", "Set TMPDIR to a local disk.")
    return "@".join([path, *words])


def _keep(path: str, content: bytes | str) -> str:
    """Write a file, or link it to one that is there; what went wrong, or nothing."""
    try:
        Path(path).parent.mkdir()
        if isinstance(content, bytes):
            Path(path).write_bytes(content)
        else:
            os.link(content, path)
    except OSError as error:
        return f"no room for {path} on {node_name()}: {error}"
    return ""


def _differs(path: Path, digest: str) -> str:
    try:
        return "" if file_hash(path) == digest else f"{path} is not what rank 0 has read"
    except OSError as error:
        return f"{path} cannot be read: {error}"


def _broadcast(comm: MPI.Intracomm, data: bytes) -> bytes:
    """Bytes of rank 0, on all; in pieces, since MPI counts with 32 bits."""
    size = np.array([len(data)], np.int64)
    comm.Bcast(size)
    mine = comm.Get_rank() == 0
    buffer = np.frombuffer(data, np.uint8).copy() if mine else np.empty(int(size[0]), np.uint8)
    for first in range(0, int(size[0]), _PIECE):
        comm.Bcast(buffer[first : first + _PIECE])
    return buffer.tobytes()
