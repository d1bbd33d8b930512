"""``nnqmd serve``: a pool of workers on this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.cli import serve_mpi, serve_sockets
from nnqmd_server.cli.serve_mpi import PoolOptions
from nnqmd_server.cli.terminal import EXTRAS_HELP, Restarts, console
from nnqmd_server.cli.watching import WatchOptions, watching

EXAMPLES = """
Examples:

  nnqmd serve MODEL.nequip.zip
      then, elsewhere: i-pi input.xml (an input with the direct door finds the pool by itself)

  nnqmd serve MODEL.nequip.zip --workers 4 --address tcp://127.0.0.1:5555

  nnqmd keys ~/pool-keys
  nnqmd serve MODEL.nequip.zip --join 'tcp://*:5556' --keys ~/pool-keys
      workers of other machines may join; prints the command that starts one

  nnqmd serve --workers 0 --join 'tcp://*:5556' --address 'tcp://*:5555' --keys ~/pool-keys
      a pool without workers of its own, for doors and workers of any machine that has a key

  nnqmd serve MODEL.nequip.zip --socket unix:nh3 --template init.xyz
      answers an i-PI whose <ffsocket mode='unix'> has <address>nh3</address>, in batches or not;
      shm:nh3 for mode='shm', inet:localhost:31415 for mode='inet'

  nnqmd serve MODEL.nequip.zip --socket unix:nh3 --template init.xyz --beads 8 --dipoles dipoles.h5

  nnqmd serve mace=mace.py:maker@/envs/mace
  nnqmd serve ase:sevenn.calculator.SevenNetCalculator,model=7net-0@/envs/sevennet
  nnqmd serve committee:seed1.nequip.zip,seed2.nequip.zip
      workers in another Python environment, which needs numpy and pyzmq, but not nnqmd

  nnqmd serve full=big.nequip.zip cheap=small.nequip.zip
      two potentials for one simulation; <parameters> of the direct door say potential: cheap

  nnqmd serve full=big.nequip.zip cheap=springs.py:maker --template init.xyz
      --socket full=unix:nh3 --socket cheap=unix:nh3cheap
      answers two sockets, of one i-PI or of two, each with the potential of its name

  nnqmd serve MODEL.nequip.zip --metrics-port 9400 --log-json pool.log
      live page at http://127.0.0.1:9400/, Prometheus metrics at /metrics; `nnqmd top` needs neither

  nnqmd serve MODEL.nequip.zip --record real.nnqmd
      keeps real requests for `nnqmd replay`

  mpiexec -n 1 i-pi input.xml : -n 1 nnqmd serve MODEL.nequip.zip --door mpi --beads 8 --template init.xyz
      answers an i-PI with <ffmpi>; one rank on each node is enough
"""


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL...",
            help="model files (.nequip.zip, .ckpt, .nequip.pt2, .pth; FILE@float64 for another precision),"
            " each under a name by which doors ask for it; also module:maker or file.py:maker for a Python"
            " potential, ase:, ipi:, deepmd: or torchsim: for those of other programs, sum: and committee:"
            " of several (docs/potentials.md)",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, max=512, help="worker processes; one per core or GPU by default; 0: others will join"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    address: Annotated[str, typer.Option(help="where doors ask; ipc://FOLDER/NAME or tcp://HOST:PORT")] = "",
    join: Annotated[
        str, typer.Option(help="where workers of other machines join: tcp://HOST:PORT, or tcp://*:PORT")
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(help="the pool's keys (see nnqmd keys), for TCP beyond this machine; $NNQMD_KEYS"),
    ] = None,
    sha256: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]HASH", help="refuse the model unless its file has this hash"),
    ] = None,
    potential: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]POTENTIAL",
            help="name of the model that answers --socket or --door, if there are several and it is not NAME",
        ),
    ] = None,
    socket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADDRESS",
            help="also answer an i-PI socket: unix:NAME, shm:NAME or inet:HOST:PORT; several, each under a"
            " name, which then goes before the values of other options too",
        ),
    ] = None,
    door: Annotated[str, typer.Option(help="mpi: answer the <ffmpi> of an i-PI in the same mpiexec")] = "",
    name: Annotated[str, typer.Option(help="name of that <ffmpi>, when the input has several")] = "",
    group: Annotated[
        int, typer.Option(min=0, help="MPI ranks that answer i-PI together; 0: all of the force field")
    ] = 0,
    silence: Annotated[
        float,
        typer.Option(min=1, help="s; end the MPI job when i-PI on another node asks for nothing for so long"),
    ] = 3600.0,
    beads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]N", help="beads of that i-PI; learned unless given, needed by --dipoles"
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="structure file that tells its elements"),
    ] = None,
    extras: Annotated[str, typer.Option(help=EXTRAS_HELP)] = "",
    dipoles: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="HDF5 file for its dipoles, bead by bead"),
    ] = None,
    logs: Annotated[Path, typer.Option(help="folder for the workers' logs")] = Path("nnqmd-logs"),
    restarts: Restarts = 3,
    eager: Annotated[bool, typer.Option("--eager", help="do not compile the model")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="same input, same batches, whatever the workers do")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="port on 127.0.0.1 for a live page and Prometheus metrics; 0: a free one"
        ),
    ] = None,
    log_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="log of what happens, one JSON object a line")
    ] = None,
    log_all: Annotated[
        bool, typer.Option("--log-all", help="in that log also every force set and batch")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keep all requests and answers for nnqmd replay")
    ] = None,
    record_mb: Annotated[int, typer.Option(min=1, help="largest size of that file, in MB")] = 1024,
) -> None:
    """Start a pool of workers and answer until Ctrl-C."""
    from nnqmd_server.errors import InputError
    from nnqmd_server.pool.client import default_address
    from nnqmd_server.pool.launch import LocalPool
    from nnqmd_server.potentials.load import check_hashes, parse_hashes, parse_models, source_hash

    named = parse_models(models or [])
    if not named and (workers != 0 or socket or door):
        raise InputError("There is no model to serve.", "Give a packaged model; or --workers 0.")
    hashes = parse_hashes(sha256 or [], named)
    check_hashes(named, hashes)
    if door not in {"", "mpi"}:
        raise InputError(f"There is no door {door!r} to choose.", "Use --door mpi, or --socket.")
    listened = serve_sockets.read_sockets(
        socket or ([""] if door else []),
        list(named),
        *(values or [] for values in (potential, template, beads, dipoles)),
    )
    watched = WatchOptions(metrics_port, log_json, log_all, record, record_mb)
    if door and watched:
        raise InputError(
            "With --door mpi every rank has a pool of its own, and none of them can be watched or recorded.",
            "Leave out --metrics-port, --log-json and --record; `nnqmd top` works on each machine.",
        )
    if log_all and log_json is None:
        raise InputError("--log-all says what goes into a log that is not wanted.", "Give --log-json FILE.")
    if door:
        options = PoolOptions(named, logs, address, workers, device, eager, deterministic, join, keys, hashes)
        if not serve_mpi.answer(options, name, group, listened[0], extras.split(), silence):
            raise typer.Exit(1)
        return
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    where = address or default_address()
    options = {"deterministic": deterministic, "join": join, "keys": keys, "hashes": hashes}
    options["restarts"] = restarts
    with (
        LocalPool(named, logs, where, workers, device, eager, **options) as pool,
        watching(pool, watched),
    ):
        with console.status("starting the workers") as shown:
            pool.wait_ready(tell=lambda line: shown.update(line))
        for worker in pool.status().workers:
            forms = "; ".join(f"{name}: {form}" for name, form in worker["forms"].items())
            console.print(f"worker {worker['index']} (process {worker['pid']}): {forms}")
        for name, source in named.items():
            console.print(f"{name}: sha256 {source_hash(source) or 'unknown'}")
        for line in pool.join_commands():
            console.print(f"add workers: [bold]{line}[/]", soft_wrap=True)
        what = ", ".join(named) or "what workers bring"
        console.print(f"{what} is served at [bold]{pool.address}[/]; logs in {logs}; stop with Ctrl-C")
        if listened:
            serve_sockets.answer(pool, listened, extras.split(), stop)
        else:
            while not stop.wait(0.5):
                pool.check()
        done = pool.status()
        console.print(f"stopped after {done.force_sets} force sets ({done.structures} structures)")
