"""Where i-PI listens, and socket files that a killed i-PI leaves behind."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from nnqmd_server.errors import AddressError

PREFIX = "/tmp/ipi_"
"""What i-PI (and ASE) put before the name of a unix socket."""


@dataclass(frozen=True)
class Address:
    """Where i-PI listens: a unix socket path, or host and port; ``mode`` is "unix", "shm" or "inet".

    "shm" is a unix socket over which only control messages go; the numbers are in shared memory.
    """

    mode: str
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"inet:{self.host}:{self.port}" if self.mode == "inet" else f"{self.mode}:{self.path}"


def ipi_address(mode: str, address: str, port: int = 0) -> Address:
    """The address that an ``<ffsocket>`` names; unix sockets live at ``/tmp/ipi_ADDRESS``."""
    if mode in {"unix", "shm"}:
        return Address(mode, path=address if address.startswith("/") else PREFIX + address)
    return Address("inet", host=address, port=port)


def parse_address(text: str) -> Address:
    """``unix:NAME``, ``shm:NAME`` or ``inet:HOST:PORT`` as given on the command line.

    Raises
    ------
    AddressError
        It is none of these.
    """
    mode, _, rest = text.partition(":")
    if mode in {"unix", "shm"} and rest:
        return ipi_address(mode, rest)
    host, _, port = rest.rpartition(":")
    if mode == "inet" and host and port.isdecimal() and 0 < int(port[:9]) < 65536:
        return ipi_address("inet", host, int(port))
    raise AddressError(
        f"{text!r} is not the address of an i-PI socket.", "Use unix:NAME, shm:NAME or inet:HOST:PORT."
    )


def stale_socket(path: Path) -> bool:
    """Whether a unix socket file exists on which nobody listens (left behind by a killed i-PI)."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def free_socket(path: Path, remove_stale: bool = False) -> None:
    """Make sure that an i-PI can listen at a unix socket.

    Parameters
    ----------
    path : Path
        The socket file.
    remove_stale : bool
        Remove it when nobody listens on it.

    Raises
    ------
    AddressError
        It is taken, or left behind and not to be removed.
    """
    if not stale_socket(path):
        if path.exists():
            raise AddressError(
                f"Another i-PI listens at {path}.", "Stop it, or use another <address> in the input."
            )
        return
    if not remove_stale:
        raise AddressError(
            f"{path} was left behind by an i-PI that was killed; nobody listens on it.",
            f"Say --remove-stale, or: rm {path}",
        )
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AddressError(f"{path} cannot be removed: {error}.", "Ask its owner to remove it.") from error
