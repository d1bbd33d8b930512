"""``nnqmd serve --door mpi``: this process as a rank beside i-PI."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

from nnqmd_server.cli.serve_sockets import Listened
from nnqmd_server.cli.terminal import console


@dataclass(frozen=True)
class PoolOptions:
    """How the pool of a node is to be started; see :class:`LocalPool`."""

    models: dict[str, str]
    logs: Path
    address: str
    workers: int | None
    device: str
    eager: bool
    deterministic: bool
    join: str = ""
    keys: Path | None = None
    hashes: dict[str, str] | None = None


def answer(
    options: PoolOptions, name: str, group: int, asked: Listened, extras: list[str], silence: float
) -> bool:
    """Do what falls to this rank, from MPI_Init to the end; whether all went well."""
    from nnqmd_server.doors.force_sets import ForceSets
    from nnqmd_server.doors.mpi import MpiDoor
    from nnqmd_server.doors.mpi_job import Job
    from nnqmd_server.doors.mpi_nodes import START_TIMEOUT, NodePools, serve_root
    from nnqmd_server.doors.template import read_numbers
    from nnqmd_server.errors import InputError
    from nnqmd_server.pool.client import PoolClient
    from nnqmd_server.pool.launch import LocalPool
    from nnqmd_server.potentials.load import absolute, interpreter_of

    sources = {name: (absolute(s), interpreter_of(s)[1]) for name, s in options.models.items()}
    how = f"{options.workers} {options.device} {options.eager} {options.deterministic}"
    same = f"{sources} {how} {options.address}"
    with Job(name, group, same) as job, contextlib.ExitStack() as stack:
        numbers = read_numbers(asked.template)
        place = job.place
        if asked.dipoles and place.groups > 1:
            raise InputError(
                f"{place.groups} groups of ranks answer one force field, and i-PI tells none of them which"
                " beads it has: the dipoles cannot be kept in order.",
                "Leave out --group, so that one group answers; or use --extras dipole, which i-PI orders.",
            )
        pool = None
        if place.host == job.number:
            logs = options.logs / f"rank-{job.number}"
            pool = LocalPool(
                options.models,
                logs,
                options.address or None,
                options.workers,
                options.device,
                options.eager,
                options.deterministic,
                join=options.join,
                keys=options.keys,
                hashes=options.hashes,
            )
            stack.enter_context(pool)
        client = PoolClient(job.pool_address(pool.own_address if pool else ""), potential=asked.potential)

        def wait_ready() -> None:
            if pool is None:
                client.card(START_TIMEOUT)
                return
            pool.wait_ready(START_TIMEOUT)
            console.print(
                f"rank {job.number}: {', '.join(options.models)}, {len(pool.pids)} workers; logs in {logs}"
            )

        def begin() -> ForceSets:
            wait_ready()
            return ForceSets(NodePools(client, job), numbers, asked.beads, asked.dipoles, extras)

        failed = False
        # mpiexec passes signals on to all ranks; i-PI says when it is over.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        if job.number == place.root:
            # A group that has company gets some of the beads, and nothing tells which.
            door = MpiDoor(job, begin, asked.beads if place.groups == 1 else None, silence)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: door.stop())
            door.run()
            failed = door.failure is not None
            job.failed = door.saved
        elif job.number in place.carriers:
            wait_ready()
            serve_root(job, client)
        job.leave_together()
        if pool:
            done = pool.status()
            console.print(f"rank {job.number}: {done.force_sets} force sets ({done.structures} structures)")
    return not failed
