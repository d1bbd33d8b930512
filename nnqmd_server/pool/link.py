"""How a door or a worker reaches its pool: over a unix socket on one machine, over TCP between machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.addresses import is_tcp, socket_path
from nnqmd_server.pool.keys import Role
from nnqmd_server.pool.line import Line
from nnqmd_server.pool.messages import Frame
from nnqmd_server.pool.remote import Remote

RETRY = 0.05, 1.0
"""First and longest wait before a lost connection is tried again [s]; it doubles in between."""


class Link(Protocol):
    """A connection to a pool; made again by itself when it is lost."""

    def send(self, frames: Sequence[Frame], wait: float = 0.0) -> bool:
        """Send if the pool is there, or comes within ``wait`` [s]; whether it was sent."""

    def receive(self, seconds: float) -> list[memoryview] | None:
        """The frames of the next message; None when none comes in time or the connection is lost.

        Raises
        ------
        BadMessageError
            Who listens there is no pool of ours.
        """

    def why(self) -> AddressError | None:
        """Why the pool turns us away, if it does."""

    def close(self) -> None:
        """Hang up."""


def connect(address: str, keys: str | Path | None, role: Role, retry: tuple[float, float] = RETRY) -> Link:
    """Connect a door or a worker to its pool, with its keys where the address asks for them.

    Parameters
    ----------
    address : str
        Where the pool listens.
    keys : str or Path, optional
        Key file or folder; ``$NNQMD_KEYS`` unless given. Not used for ipc.
    role : str
        "door" or "worker".
    retry : tuple of float
        First and longest wait before a lost connection is tried again [s].

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, unusable keys, or no address.
    """
    if is_tcp(address):
        return Remote(address, keys, role, retry)
    return Line(socket_path(address), retry)
