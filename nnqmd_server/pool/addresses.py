"""Addresses of pools: which can be reached from elsewhere, and what they ask for."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.keys import KEYS_VARIABLE, PeerKeys, Role, peer_keys

LONGEST = 100
"""Longest path of a socket that every system takes [characters]."""


def is_tcp(address: str) -> bool:
    """Whether an address is one of TCP."""
    return address.startswith("tcp://")


def is_loopback(address: str) -> bool:
    """Whether a TCP address can be reached from this machine only."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or * for all interfaces
        return False


def socket_path(address: str) -> Path:
    """The socket file of an ipc address.

    Raises
    ------
    AddressError
        It is no address, or its path is too long for one.
    """
    path = Path(address.removeprefix("ipc://"))
    if not address.startswith("ipc://") or not path.name:
        raise AddressError(f"{address} is not an address.", "Use ipc:///folder/name or tcp://HOST:PORT.")
    if len(str(path)) > LONGEST:
        raise AddressError(
            f"The socket path {path} is longer than {LONGEST} characters.", "Choose a shorter one."
        )
    return path


def needs_keys(address: str) -> AddressError:
    """The error for TCP beyond this machine without keys."""
    return AddressError(
        f"{address} can be reached from other machines, where everybody could connect or listen.",
        f"Make keys with `nnqmd keys FOLDER` and give --keys (or ${KEYS_VARIABLE}); or use ipc://.",
    )


def check_keys(address: str, keys: str | Path | None, role: Role) -> PeerKeys | None:
    """The keys with which an address can be used; None where it needs none.

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, or unusable ones.
    """
    if not is_tcp(address):
        return None
    found = peer_keys(keys, role)
    if found is None and not is_loopback(address):
        raise needs_keys(address)
    return found
