"""Where the sockets of a pool lie: folders that only this user can enter, cleared of what was left behind."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.addresses import is_tcp, socket_path

PREFIX = "nnqmd-pool-"
"""What the folders of pools begin with that were given no other place."""


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user can enter, or check that it is one.

    Raises
    ------
    AddressError
        It exists and belongs to, or is open to, somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise AddressError(
            f"The socket folder {folder} is open to other users.", f"chmod 700 {folder}, or choose another."
        )
    return folder


def own_folder() -> Path:
    """A new folder for the sockets of a pool; those of pools that were killed are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            ours = folder.lstat().st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            sockets = list(folder.iterdir()) if ours else []
        except OSError:  # gone meanwhile
            continue
        # A folder without sockets may be that of a pool that is just being started.
        if sockets and not any(somebody_listens(path) for path in sockets):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=PREFIX))


def somebody_listens(path: Path) -> bool:
    """Whether a process takes connections at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def free(address: str) -> None:
    """Make sure that nobody listens at an address yet; a socket file that nobody listens on is removed.

    Raises
    ------
    AddressError
        Somebody does, or it is no address that can be used.
    """
    if is_tcp(address):
        return
    path = socket_path(address)
    private_folder(path.parent)
    if path.exists():
        if somebody_listens(path):
            raise AddressError(
                f"Another pool is listening at {address}.", "Stop it, or give this one another --address."
            )
        path.unlink(missing_ok=True)
