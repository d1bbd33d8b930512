"""Connections to an i-PI that listens, or will, made without ever waiting.

i-PI greets each new client before it accepts the next, and its queue of unaccepted connections is short:
whoever opens several must answer the first ones while the others are being made.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import time

from nnqmd_server.doors.address import Address
from nnqmd_server.errors import AddressError

log = logging.getLogger("nnqmd.door")

STALE = 1.0
"""How long nobody may listen at a socket file before it is taken for left behind [s]."""

_RETRY = (0.001, 0.1)  # shortest and longest pause between attempts to connect [s]
_LATER = {errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT, errno.EINPROGRESS, errno.ETIMEDOUT}


class Connector:
    """Makes connections to an i-PI, one after the other.

    Parameters
    ----------
    address : Address
        Where i-PI listens.
    patience : float
        Longest wait for it to begin to [s], counted from the first attempt.

    Attributes
    ----------
    made : int
        Connections that have been made.
    next_attempt : float
        When it is worth while to try again, on the clock of :func:`time.monotonic`.
    """

    def __init__(self, address: Address, patience: float) -> None:
        self._address = address
        self._patience = patience
        self._half_open: socket.socket | None = None
        self._pause = _RETRY[0]
        self._began: float | None = None
        self._told = False
        self.made = 0
        self.next_attempt = 0.0

    def attempt(self) -> socket.socket | None:
        """A new connection, non-blocking; None as long as there is none.

        Raises
        ------
        AddressError
            The address cannot be one, or nobody has listened at it for too long.
        """
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if self._half_open is None and now < self.next_attempt:
            return None
        error = self._begin() if self._half_open is None else self._end()
        if error != errno.EINPROGRESS:
            new, self._half_open = self._half_open, None
            if error == 0:
                self.made += 1
                self._pause = _RETRY[0]
                return new
            new.close()
            if not self.made:
                self._check_patience(error, now - self._began)
            self._pause = min(2 * self._pause, _RETRY[1])
        self.next_attempt = time.monotonic() + self._pause
        return None

    def close(self) -> None:
        """Give up a connection that has been begun."""
        if self._half_open:
            self._half_open.close()

    def _begin(self) -> int:
        unix = self._address.mode != "inet"
        target = self._address.path if unix else (self._address.host, self._address.port)
        try:
            self._half_open = socket.socket(
                socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            )
            if not unix:
                self._half_open.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._half_open.connect_ex(target)
        except OSError as problem:  # a host that is not known, a name too long, too many open files
            raise AddressError(
                f"Cannot connect to i-PI at {self._address}: {problem}.",
                "Check the address, and `ulimit -n` when there are many beads.",
            ) from problem

    def _end(self) -> int:
        ready = select.poll()
        ready.register(self._half_open, select.POLLOUT)
        if not ready.poll(0):
            return errno.EINPROGRESS
        return self._half_open.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def _check_patience(self, error: int, waited: float) -> None:
        if error not in _LATER:
            raise AddressError(
                f"Cannot connect to i-PI at {self._address}: {errno.errorcode.get(error, error)}.",
                "Check the address.",
            )
        if error == errno.ECONNREFUSED and self._address.path and waited > STALE and not self._told:
            self._told = True
            path = self._address.path
            log.warning(
                "%s was left behind by a killed i-PI, and the next one cannot start: rm %s", path, path
            )
        if waited > self._patience:
            raise AddressError(
                f"Nobody has listened at {self._address} for {self._patience:.0f} s.",
                "Start i-PI, or check that its <ffsocket> has this address.",
            )
