"""``nnqmd serve --door mpi``: this process as a rank beside i-PI."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

from nnqmd_server.cli.terminal import console


@dataclass(frozen=True)
class PoolOptions:
    """How the pool of a node is to be started; see :class:`LocalPool`."""

    model: Path
    logs: Path
    address: str
    workers: int | None
    device: str
    eager: bool


def answer(
    options: PoolOptions,
    name: str,
    group: int,
    template: Path,
    beads: int,
    extras: list[str],
    dipoles: Path | None,
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

    same = f"{options.model.resolve()} {options.workers} {options.device} {options.eager} {options.address}"
    with Job(name, group, same) as job, contextlib.ExitStack() as stack:
        numbers = read_numbers(template)
        place = job.place
        if dipoles and place.groups > 1:
            raise InputError(
                f"{place.groups} groups of ranks answer one force field, and i-PI tells none of them which"
                " beads it has: the dipoles cannot be kept in order.",
                "Leave out --group, so that one group answers; or use --extras dipole, which i-PI orders.",
            )
        pool = None
        if place.host == job.number:
            logs = options.logs / f"rank-{job.number}"
            pool = LocalPool(
                options.model, logs, options.address or None, options.workers, options.device, options.eager
            )
            stack.enter_context(pool)
        client = PoolClient(job.pool_address(pool.address if pool else ""))

        def wait_ready() -> None:
            if pool is None:
                client.card(START_TIMEOUT)
                return
            pool.wait_ready(START_TIMEOUT)
            console.print(f"rank {job.number}: {pool.card.name}, {len(pool.pids)} workers; logs in {logs}")

        def begin() -> ForceSets:
            wait_ready()
            return ForceSets(NodePools(client, job), numbers, beads, dipoles, extras)

        failed = False
        # mpiexec passes signals on to all ranks; i-PI says when it is over.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        if job.number == place.root:
            door = MpiDoor(job, begin, beads)
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
