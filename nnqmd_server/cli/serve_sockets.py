"""``nnqmd serve --socket``: one or several i-PI sockets answered from one pool."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnqmd_server.cli.terminal import console
from nnqmd_server.doors.address import Address, parse_address
from nnqmd_server.errors import InputError, NnqmdError, ProgramError

if TYPE_CHECKING:
    from nnqmd_server.doors.socket import SocketDoor
    from nnqmd_server.pool.launch import LocalPool

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)")
PATIENCE = 86400.0
"""Longest wait for an i-PI to begin to listen [s]."""


@dataclass(frozen=True)
class Listened:
    """One socket to be answered, as the command line has it; without an address, an ``<ffmpi>``."""

    name: str
    address: Address | None
    potential: str
    template: Path
    beads: int | None
    dipoles: Path | None


def _split(text: str, names: Sequence[str]) -> tuple[str, str]:
    """``NAME=VALUE``, or a value for all; a file may have a ``=`` in its name."""
    found = _NAMED.fullmatch(text)
    return (found[1], found[2]) if found and found[1] in names else ("", text)


def _values(texts: Sequence[str], names: Sequence[str], option: str) -> dict[str, list[str]]:
    """The values of an option for each socket; what has no name is for all that have none of their own."""
    given: dict[str, list[str]] = {}
    for text in texts:
        name, value = _split(text, names)
        given.setdefault(name, []).append(value)
        found = _NAMED.fullmatch(text)
        if len(names) > 1 and found and not name and not Path(text).exists():
            raise InputError(
                f"{option} names {found[1]}, which is no socket; there are {', '.join(names)}.",
                f"Say {option} {names[0]}={found[2]}",
            )
    return {name: given.get(name, given.get("", [])) for name in names}


def _last(values: Sequence[str]) -> str:
    return values[-1] if values else ""


def _beads(text: str) -> int | None:
    if text and not (text.isdecimal() and 0 < int(text[:9]) <= 4096):
        raise InputError(f"--beads is {text!r}.", "Give a number from 1 to 4096.")
    return int(text) if text else None


def read_sockets(
    sockets: Sequence[str],
    potentials: Sequence[str],
    chosen: Sequence[str],
    templates: Sequence[str],
    beads: Sequence[str],
    dipoles: Sequence[str],
) -> list[Listened]:
    """What ``--socket [NAME=]ADDRESS`` and the options that go with it ask for.

    Parameters
    ----------
    sockets : sequence of str
        Addresses, each under a name when there are several; an empty one for ``<ffmpi>``.
    potentials : sequence of str
        The potentials that are served.
    chosen, templates, beads, dipoles : sequence of str
        ``--potential``, ``--template``, ``--beads``, ``--dipoles``: for the socket NAME, or for all.

    Raises
    ------
    InputError
        Names are missing, twice or unknown, or a socket lacks what it needs.
    """
    found = [_NAMED.fullmatch(text) for text in sockets]
    names = [match[1] if match else "" for match in found]
    addresses = [match[2] if match else text for match, text in zip(found, sockets, strict=True)]
    if len(set(names)) < len(names) or ("" in names and len(names) > 1):
        raise InputError(
            "Several sockets need a name each.", "--socket full=unix:first --socket cheap=unix:second"
        )
    asked = _values(chosen, names, "--potential")
    structures = _values(templates, names, "--template")
    sizes = _values(beads, names, "--beads")
    records = _values(dipoles, names, "--dipoles")
    listened = []
    for name, address in zip(names, addresses, strict=True):
        template = _last(structures[name])
        if not template:
            raise InputError(
                f"{f'The socket {address}' if address else 'This door'} needs the elements: i-PI sends"
                " positions only.",
                f"Give --template {name + '=' if name else ''}init.xyz.",
            )
        record = _last(records[name])
        size = _beads(_last(sizes[name]))
        if record and size is None:
            raise InputError("A record of dipoles needs the number of beads.", "Give --beads.")
        potential = _last(asked[name]) or (name if name in potentials else "")
        if potential not in potentials and (potential or len(potentials) > 1):
            call = (
                f"Call the socket like it (--socket {potentials[0]}={address}), or give"
                if address
                else "Give"
            )
            raise InputError(
                f"Which potential answers {address or 'this door'}: {', '.join(potentials)}?",
                f"{call} --potential {potentials[0]}.",
            )
        where = parse_address(address) if address else None
        listened.append(
            Listened(name, where, potential, Path(template), size, Path(record) if record else None)
        )
    _check_records(listened)
    return listened


def _check_records(listened: Sequence[Listened]) -> None:
    records = [one.dipoles for one in listened if one.dipoles]
    if len(set(records)) < len(records):
        raise InputError(
            "Two sockets would write their dipoles into one file.",
            "Give each its own: --dipoles " + " --dipoles ".join(f"{one.name}=FILE" for one in listened),
        )


def answer(
    pool: LocalPool, sockets: Sequence[Listened], extras: Sequence[str], stop: threading.Event
) -> None:
    """Answer every socket until its i-PI is done, or ``stop`` is set.

    When one fails, its i-PI is asked to stop and the others are answered on.

    Raises
    ------
    NnqmdError
        What has failed first, once all have ended.
    """
    from nnqmd_server.doors.extras import share_extras
    from nnqmd_server.doors.force_sets import ForceSets
    from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
    from nnqmd_server.doors.template import read_numbers

    doors: list[SocketDoor] = []
    clients = [pool.client(one.potential, str(one.address)) for one in sockets]
    shared = share_extras(extras, [client.card() for client in clients])
    for one, client, wanted in zip(sockets, clients, shared, strict=True):
        numbers = read_numbers(one.template)
        own = f"-{one.name}" if len(sockets) > 1 else ""
        sets = ForceSets(client, numbers, one.beads, one.dipoles, wanted, Path(f"quarantine{own}.extxyz"))
        doors.append(SocketDoor(one.address, sets, one.beads, patience=PATIENCE))
        asks = f" for {client.potential}" if len(sockets) > 1 else ""
        console.print(f"waiting for i-PI at [bold]{one.address}[/]{asks}")
    left = {door: serve_in_thread(door) for door in doors}
    failures: list[NnqmdError] = []
    asked: set[int] = set()  # a second SIGTERM would tell i-PI to drop everything
    while left and not stop.is_set():
        for door, thread in list(left.items()):
            thread.join(0.2 / len(left))
            if not thread.is_alive():
                del left[door]
                if door.failure:
                    failures.append(_end(door, asked))
    for door in left:
        door.stop()
    for thread in left.values():
        thread.join(10)
    failures += [_end(door, asked) for door in left if door.failure]
    if any(door.left_waiting and not door.failure for door in doors):
        console.print("i-PI waits: serve it again and it goes on, or `touch EXIT` in its folder to end it")
    if failures:
        raise failures[0]


def _end(door: SocketDoor, asked: set[int]) -> NnqmdError:
    """Ask the i-PI of a door that has failed to stop, unless another door has; what is to be said of it."""
    from nnqmd_server.doors.ipi_process import stop_softly

    if not door.left_waiting or (door.ipi and door.ipi.pid in asked):
        return door.failure
    if door.ipi:
        asked.add(door.ipi.pid)
    return ProgramError(f"{door.failure.what} {stop_softly(door.ipi)}", door.failure.fix)
