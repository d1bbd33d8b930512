"""A connection to a pool on another machine: a ZeroMQ socket with keys."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.addresses import check_keys
from nnqmd_server.pool.beat import BEAT, LIVENESS
from nnqmd_server.pool.keys import KEYS_VARIABLE, Role
from nnqmd_server.pool.messages import Frame

HANDSHAKE = 10_000
"""How long a stranger may take to say who he is [ms]; then the connection is closed."""

MAX_TCP_MESSAGE = 1 << 28
"""Longest frame over TCP [bytes]: what a stranger may make us allocate before he has proved who he is."""

SURE = 3.0
"""So long must a pool have turned us away, whenever we tried, before that is believed [s]."""

QUEUE = 64
"""Messages of one peer that may wait to be read; a peer that sends more is slowed down."""

_TURNED_AWAY = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def bound(socket: zmq.Socket) -> None:
    """Bound what a socket takes and keeps, and how long it waits; before it has an address.

    ZeroMQ closes a connection on which nothing is heard any more. Its own thread asks and answers, so that a
    worker which computes (even one that keeps Python's lock) is alive, and one that was stopped, or whose
    machine or network is gone, is not.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_TCP_MESSAGE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    for option in (zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL):
        socket.setsockopt(option, int(1000 * BEAT * LIVENESS))
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * BEAT))


class Remote:
    """A connection over TCP, which is made again when it is lost.

    Parameters
    ----------
    address : str
        ``tcp://HOST:PORT``.
    keys : str or Path, optional
        Key file or folder; ``$NNQMD_KEYS`` unless given.
    role : str
        "door" or "worker".
    retry : tuple of float
        First and longest time between two tries to connect [s]; it doubles in between.

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, unusable ones, or no address.
    """

    def __init__(self, address: str, keys: str | Path | None, role: Role, retry: tuple[float, float]) -> None:
        found = check_keys(address, keys, role)
        self._address = address
        self._since: float | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        bound(self._socket)
        # Nothing is queued for a pool that is not there: it would all arrive at the next one.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, int(1000 * retry[0]))
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, int(1000 * retry[1]))
        if found is not None:
            self._socket.curve_publickey = found.public.encode()
            self._socket.curve_secretkey = found.secret.encode()
            self._socket.curve_serverkey = found.pool.encode()
        self._events = self._socket.get_monitor_socket(_TURNED_AWAY | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(
                f"{address} is not an address: {error}.", "Use ipc:///folder/name or tcp://HOST:PORT."
            ) from error

    def send(self, frames: Sequence[Frame], wait: float = 0.0) -> bool:
        """Send if the pool is there, or comes within ``wait`` [s]; whether it was sent."""
        if wait:
            self._socket.poll(1000 * wait, zmq.POLLOUT)
        try:
            # Zero-copy of pyzmq wakes a thread for each frame, which costs more than the copy of these sizes.
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, seconds: float) -> list[memoryview] | None:
        """The frames of the next message; None when none comes in time."""
        if not self._socket.poll(1000 * seconds):
            return None
        return [frame.buffer for frame in self._socket.recv_multipart(copy=False)]

    def why(self) -> AddressError | None:
        """Why the pool turns us away, or None; one failure may be of a pool that was just going.

        Without this a wrong key would look like a pool that does not answer.
        """
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())["event"]
            failed = bool(event & _TURNED_AWAY)
            self._since = (self._since or time.monotonic()) if failed else None
        if self._since is None or time.monotonic() - self._since < SURE:
            return None
        return AddressError(
            f"The pool at {self._address} turns this process away: its key is not one that the pool knows, or"
            " only one of both has keys.",
            f"Give the key file that was made for this pool (--keys, or ${KEYS_VARIABLE}).",
        )

    def close(self) -> None:
        """Hang up; may be called twice."""
        if not self._context.closed:
            self._socket.disable_monitor()
            self._context.destroy(linger=0)
