"""``nnqmd serve``: a pool of workers on this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.cli import serve_mpi
from nnqmd_server.cli.serve_mpi import PoolOptions
from nnqmd_server.cli.terminal import console

EXAMPLES = """
Examples:

  nnqmd serve MODEL.nequip.zip
      then, elsewhere: i-pi input.xml (an input with the direct door finds the pool by itself)

  nnqmd serve MODEL.nequip.zip --workers 4 --address tcp://127.0.0.1:5555

  nnqmd serve MODEL.nequip.zip --socket unix:nh3 --template init.xyz
      answers an i-PI whose <ffsocket mode='unix'> has <address>nh3</address>, in batches or not;
      shm:nh3 for mode='shm', inet:localhost:31415 for mode='inet'

  nnqmd serve MODEL.nequip.zip --socket unix:nh3 --template init.xyz --beads 8 --dipoles dipoles.h5

  mpiexec -n 1 i-pi input.xml : -n 1 nnqmd serve MODEL.nequip.zip --door mpi --beads 8 --template init.xyz
      answers an i-PI with <ffmpi>; one rank on each node is enough
"""


def serve(
    model: Annotated[Path, typer.Argument(help="packaged model (.nequip.zip)")],
    workers: Annotated[
        int | None, typer.Option(min=1, max=512, help="worker processes; one per core or GPU by default")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    address: Annotated[
        str, typer.Option(help="where doors ask; ipc://FOLDER/NAME or tcp://127.0.0.1:PORT")
    ] = "",
    socket: Annotated[
        str, typer.Option(help="also answer an i-PI socket: unix:NAME, shm:NAME or inet:HOST:PORT")
    ] = "",
    door: Annotated[str, typer.Option(help="mpi: answer the <ffmpi> of an i-PI in the same mpiexec")] = "",
    name: Annotated[str, typer.Option(help="name of that <ffmpi>, when the input has several")] = "",
    group: Annotated[
        int, typer.Option(min=0, help="MPI ranks that answer i-PI together; 0: all of the force field")
    ] = 0,
    beads: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="beads of that i-PI; learned unless given, needed by --dipoles"),
    ] = None,
    template: Annotated[Path | None, typer.Option(help="structure file that tells its elements")] = None,
    extras: Annotated[str, typer.Option(help="properties that it gets as extras, for example dipole")] = "",
    dipoles: Annotated[Path | None, typer.Option(help="HDF5 file for its dipoles, bead by bead")] = None,
    logs: Annotated[Path, typer.Option(help="folder for the workers' logs")] = Path("nnqmd-logs"),
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the model")] = False,
) -> None:
    """Start a pool of workers and answer until Ctrl-C."""
    from nnqmd_server.errors import InputError
    from nnqmd_server.pool.client import default_address
    from nnqmd_server.pool.launch import LocalPool

    if door not in {"", "mpi"}:
        raise InputError(f"There is no door {door!r} to choose.", "Use --door mpi, or --socket.")
    if (socket or door) and template is None:
        raise InputError(
            "This door needs the elements: i-PI sends positions only.", "Give --template init.xyz."
        )
    if dipoles and beads is None:
        raise InputError("A record of dipoles needs the number of beads.", "Give --beads.")
    if door:
        options = PoolOptions(model, logs, address, workers, device, eager)
        if not serve_mpi.answer(options, name, group, template, beads or 1, extras.split(), dipoles):
            raise typer.Exit(1)
        return
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with LocalPool(model, logs, address or default_address(), workers, device, eager) as pool:
        with console.status("starting the workers") as shown:
            pool.wait_ready(tell=lambda line: shown.update(line))
        for worker in pool.status().workers:
            console.print(f"worker {worker['index']} (process {worker['pid']}): {worker['form']}")
        console.print(
            f"{pool.card.name} is served at [bold]{pool.address}[/]; logs in {logs}; stop with Ctrl-C"
        )
        if socket:
            _answer_socket(pool.address, socket, beads, template, extras, dipoles, stop)
        else:
            while not stop.wait(0.5):
                pool.check()
        done = pool.status()
        console.print(f"stopped after {done.force_sets} force sets ({done.structures} structures)")


def _answer_socket(
    pool: str,
    socket: str,
    beads: int | None,
    template: Path,
    extras: str,
    dipoles: Path | None,
    stop: threading.Event,
) -> None:
    from nnqmd_server.doors.address import parse_address
    from nnqmd_server.doors.force_sets import ForceSets
    from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
    from nnqmd_server.doors.template import read_numbers
    from nnqmd_server.pool.client import PoolClient

    where = parse_address(socket)
    sets = ForceSets(PoolClient(pool), read_numbers(template), beads, dipoles, extras.split())
    door = SocketDoor(where, sets, beads, patience=86400.0)
    thread = serve_in_thread(door)
    console.print(f"waiting for i-PI at [bold]{where}[/]")
    while thread.is_alive() and not stop.is_set():
        thread.join(0.2)
    door.stop()
    thread.join(10)
    if door.failure:
        raise door.failure
