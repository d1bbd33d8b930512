"""``nnqmd status`` and ``nnqmd top``: look at a pool that is running."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnqmd_server.cli.terminal import console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from nnqmd_server.pool.client import PoolClient

STATUS_EXAMPLES = """
Examples:

  nnqmd status

  nnqmd status --pool tcp://127.0.0.1:5555 --json | jq .force_sets

  nnqmd status --least 4 && sbatch simulations.sh
      exit status 0: the pool serves with at least 4 workers; 3: it answers, but has fewer; 1: no answer
"""

TOP_EXAMPLES = """
Examples:

  nnqmd top

  nnqmd top --pool tcp://127.0.0.1:5555 --every 5
"""

TOO_FEW = 3
"""Exit status of ``nnqmd status`` when the pool answers but has fewer workers than wanted."""

Address = Annotated[
    str, typer.Option("--pool", metavar="ADDRESS", help="the pool; found by itself when one is running here")
]


def find_address(given: str) -> str:
    """The address of the pool that is meant.

    Raises
    ------
    InputError
        None was named, and several pools of this user are running.
    """
    from nnqmd_server.errors import InputError
    from nnqmd_server.pool.client import default_address

    usual = given or default_address()
    if given or "NNQMD_POOL" in os.environ or _is_live(Path(usual.removeprefix("ipc://"))):
        return usual
    # `nnqmd run` and ranks beside i-PI listen in folders of their own.
    found = sorted(Path(tempfile.gettempdir()).glob("nnqmd-*/pool"))
    live = [f"ipc://{path}" for path in found if _is_live(path)]
    if len(live) > 1:
        raise InputError("Several pools are running: " + ", ".join(live) + ".", "Name one with --pool.")
    return live[0] if live else usual


def _is_live(path: Path) -> bool:
    try:
        if path.stat().st_uid != os.getuid():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(str(path))
    except OSError:
        return False
    return True


def _client(address: str, patience: float) -> PoolClient:
    from nnqmd_server.pool.client import PoolClient

    return PoolClient(find_address(address), patience)


def status(
    address: Address = "",
    as_json: Annotated[bool, typer.Option("--json", help="print everything as one JSON object")] = False,
    least: Annotated[int, typer.Option(min=0, help="workers that must be ready for exit status 0")] = 1,
    patience: Annotated[
        float, typer.Option(min=0.1, max=3600, help="longest wait for an answer, in s")
    ] = 5.0,
) -> None:
    """Show a pool, its potentials, workers and simulations on one screen."""
    from nnqmd_server.cli.screen import screen

    client = _client(address, patience)
    try:
        found = client.status()
    finally:
        client.close()
    if as_json:
        print(json.dumps({"address": client.address, **found}, indent=1))  # noqa: T201 - for programs
    else:
        console.print(screen(found, client.address))
    if len(found["workers"]) < least:
        raise typer.Exit(TOO_FEW)


def top(
    address: Address = "",
    every: Annotated[float, typer.Option(min=0.2, max=60, help="seconds between two looks")] = 1.0,
    patience: Annotated[
        float, typer.Option(min=0.1, max=3600, help="longest wait for the first answer, in s")
    ] = 5.0,
) -> None:
    """Watch a pool live, until Ctrl-C; goes on when the pool is restarted."""
    from rich.live import Live

    from nnqmd_server.cli.screen import screen
    from nnqmd_server.errors import PoolError

    client = _client(address, patience)
    try:
        found, heard = client.status(), time.monotonic()

        def look() -> RenderableType:
            silent = time.monotonic() - heard
            return screen(found, client.address, silent if silent > every + 1.0 else None, console.height)

        with Live(look(), console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                try:
                    found, heard = client.status(1.0), time.monotonic()
                except PoolError:
                    if not console.is_terminal:
                        raise
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        pass
    finally:
        client.close()
