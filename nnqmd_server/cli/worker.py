"""``nnqmd worker``: workers for a pool that is already there, alone or under mpiexec and srun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.cli.terminal import console

EXAMPLES = """
Examples:

  nnqmd worker MODEL.nequip.zip
      one worker per GPU or core, for the pool that `nnqmd serve` started on this machine

  nnqmd worker --pool tcp://node1:5556 --keys worker.key MODEL.nequip.zip
      for a pool on another machine; `nnqmd serve --join` prints this line

  srun --ntasks-per-node=4 nnqmd worker --pool tcp://node1:5556 --keys worker.key MODEL.nequip.zip
  mpiexec -n 8 nnqmd worker --pool tcp://node1:5556 --keys worker.key MODEL.nequip.zip
      one worker per rank; the model is read once and handed out

  mpiexec -n 4 nnqmd worker --group 4 --pool tcp://node1:5556 --keys worker.key MODEL.nequip.zip
      four ranks as one worker: each large structure is split over them
"""


def worker(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]MODEL...", help="the pool's models, as for nnqmd serve")
    ],
    pool: Annotated[
        str, typer.Option(help="where workers join; that of the pool on this machine by default")
    ] = "",
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="worker processes; one per core or GPU, one per MPI rank"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    group: Annotated[
        int, typer.Option(min=0, help="MPI ranks that make up one worker and share each structure")
    ] = 0,
    keys: Annotated[
        Path | None, typer.Option(help="worker.key, needed for TCP beyond this machine; $NNQMD_KEYS")
    ] = None,
    sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]HASH", help="refuse the model unless its file has this hash"),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=1, help="how long to wait for a pool that is gone [s]")
    ] = 600.0,
    logs: Annotated[Path, typer.Option(help="folder for the workers' logs")] = Path("nnqmd-logs"),
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the model")] = False,
) -> None:
    """Join a running pool; leaves it in order on Ctrl-C or SIGTERM, and ends when the pool does."""
    from nnqmd_server.pool.addresses import check_keys
    from nnqmd_server.pool.client import default_address
    from nnqmd_server.pool.launch import join_address
    from nnqmd_server.potentials.load import check_hashes, parse_hashes, parse_models

    named = parse_models(models)
    hashes = parse_hashes(sha256 or [], named)
    address = pool or join_address(default_address())
    check_keys(address, keys, "worker")
    if group:
        _serve_group(address, named, hashes, group, device, eager, keys, patience)
        return
    from nnqmd_server.pool.processes import DRAIN_TIMEOUT, Plan, Processes, Recipe, plan
    from nnqmd_server.pool.ranks import find_rank, handed_out, leave

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rank = find_rank()
    with handed_out(rank, named) as here:
        leave(rank)
        check_hashes(here, hashes)
        wanted = plan(workers, device)
        if rank.size > 1:
            wanted = Plan(workers or 1, wanted.device)
            logs /= f"rank-{rank.number}"
        first = rank.local * wanted.workers if rank.size > 1 else 0
        started = Processes(Recipe(here, address, logs, eager, hashes, keys, patience), wanted, first)
        what = f"{len(started.all)} on {wanted.device}"
        console.print(f"workers for the pool at {address}: {what}; logs in {logs}")
        while len(started.ended) < len(started.all) and not stop.wait(0.2):
            pass
        started.drain()
        started.stop(DRAIN_TIMEOUT)
    if any(process.returncode not in {0, -signal.SIGTERM} for process in started.all):
        from nnqmd_server.errors import PoolError

        raise PoolError(f"Workers have ended. {started.last_words()}", f"See {logs}.")


def _serve_group(
    address: str,
    models: dict[str, str],
    hashes: dict[str, str],
    size: int,
    device: str,
    eager: bool,
    keys: Path | None,
    patience: float,
) -> None:
    from nnqmd_server.pool.processes import gpu_of, plan, worker_settings

    settings = worker_settings()
    if any(name not in os.environ for name in settings):
        # The C library reads these when a process begins, and MPI has to live in the one that computes.
        command = [sys.executable, "-m", "nnqmd_server.cli", *sys.argv[1:]]
        os.execve(sys.executable, command, {**settings, **os.environ})
    from nnqmd_server.pool.group import Group, check_local, follow, group_of
    from nnqmd_server.pool.ranks import end_all, find_rank, handed_out
    from nnqmd_server.pool.worker import load_all, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the first rank hears them, and says stop to the others
    rank = find_rank(messages=True)
    status = 0
    try:
        where = plan(1, device).device
        if where == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(rank.local)
        with handed_out(rank, models) as here:
            comm = group_of(rank, size)
            potentials = load_all(here, where, not eager, hashes)
            check_local(potentials)
            if comm.Get_rank():
                follow(potentials, comm)
            else:
                groups = {name: Group(p, k, comm) for k, (name, p) in enumerate(potentials.items())}
                status = serve(groups, address, rank.number // size, None, patience, keys)
                next(iter(groups.values())).stop()
    except Exception as error:  # noqa: BLE001 - whatever it is: the other ranks would wait for ever
        end_all(rank, str(error) or repr(error))
    if status:
        raise typer.Exit(status)
