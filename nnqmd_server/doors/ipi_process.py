"""The i-PI that is answered, over a socket or in an MPI job: which process it is, how it is asked to stop.

An i-PI whose only client has gone waits for another one for ever. It is asked to stop softly instead: one
SIGTERM, upon which it writes RESTART. (It takes a second one for an order to drop everything.) Before that
our connections must be closed: i-PI 3.3 does not look at signals, nor at the file EXIT, while a client
owes it an answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from pathlib import Path

import psutil

GRACE = 30.0
"""How long i-PI may take to end after it was asked to [s]."""


def listener_of(connection: socket.socket) -> psutil.Process | None:
    """The process that listens at the other end of a connection; None unless it is here, and ours.

    Parameters
    ----------
    connection : socket.socket
        A connection that has not been closed.
    """
    try:
        if connection.family == socket.AF_UNIX:
            size = struct.calcsize("3i")
            pid, *_ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        else:
            pid = _owner_of(connection.getpeername(), connection.getsockname())
        found = psutil.Process(pid) if pid > 0 and pid != os.getpid() else None
        return found if found and found.uids().real == os.getuid() else None
    except (OSError, psutil.Error):  # it has gone, or the system does not tell
        return None


def _owner_of(mine: tuple, other: tuple) -> int:
    """The process that holds one end of a TCP connection on this machine; 0 when none is to be seen."""
    for known in psutil.net_connections("tcp"):
        if known.pid and known.laddr and tuple(known.laddr) == mine and tuple(known.raddr) == other:
            return known.pid
    return 0


_RANK = (
    "PMI_RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK",
    "SLURM_PROCID",
)  # MPICH and its kin, Open MPI, Slurm


def rank_zero(number: int) -> psutil.Process | None:
    """i-PI, rank 0 of the MPI job; None unless it was started beside this process, and is up.

    Parameters
    ----------
    number : int
        The rank of this process.
    """
    name = next((name for name in _RANK if os.environ.get(name) == str(number)), "")
    try:
        starter = psutil.Process().parent()
        for process in starter.children(recursive=True) if starter else ():
            with contextlib.suppress(OSError, psutil.Error):  # ended meanwhile, or somebody else's
                if process.environ().get(name) == "0" and handles_sigterm(process.pid):
                    return process
    except psutil.Error:
        return None
    return None


def is_past_its_end(ipi: psutil.Process) -> bool:
    """Whether an i-PI that was up is so no more, though its process may wait in MPI_Finalize for us.

    Python puts the signals back as they were before anything else ends.
    """
    try:
        return not (ipi.is_running() and handles_sigterm(ipi.pid))
    except OSError:
        return True


def stop_softly(ipi: psutil.Process | None) -> str:
    """Ask i-PI to stop, wait for it, and say what came of it, in sentences for an error message.

    Parameters
    ----------
    ipi : psutil.Process, optional
        As :func:`listener_of` gave it; our connections to it have been closed since.
    """
    if ipi is None:
        return (
            "i-PI runs on another machine or as another user, and waits for forces: `touch EXIT` in its"
            " folder, and it ends with a RESTART; or serve it again, and it goes on."
        )
    began = time.time()
    try:
        folder = Path(ipi.cwd())
        if not handles_sigterm(ipi.pid):
            return f"The server that we answered (process {ipi.pid}) handles no SIGTERM and was left alone."
        ipi.terminate()
        ipi.wait(GRACE)
    except psutil.TimeoutExpired:
        return f"i-PI (process {ipi.pid}) was asked to stop and has not done so for {GRACE:.0f} s."
    except (OSError, psutil.Error):
        return "i-PI has ended."
    if wrote_restart(folder, began):
        return f"i-PI was asked to stop: {folder / 'RESTART'} was written."
    return f"i-PI has ended; there is no new RESTART in {folder}."


def handles_sigterm(pid: int) -> bool:
    """Whether a process does something of its own about SIGTERM, as i-PI does."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def wrote_restart(folder: Path, since: float) -> bool:
    """Whether i-PI has written a RESTART, to its end, after a point of time."""
    restart = folder / "RESTART"
    try:
        with restart.open("rb") as file:
            file.seek(-min(64, restart.stat().st_size), os.SEEK_END)
            # The clocks of file systems are coarse.
            return restart.stat().st_mtime > since - 1.0 and file.read().strip().endswith(b"</simulation>")
    except OSError:
        return False
