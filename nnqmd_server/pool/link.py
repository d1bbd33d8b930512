"""How pool and workers notice that the other side is gone."""

from __future__ import annotations

import zmq

BEAT = 1.0
"""How often pool and workers let each other know that they are there [s]."""

LIVENESS = 3
"""So many beats without a sign of life, and the other side is taken for gone."""


def keep_alive(socket: zmq.Socket) -> None:
    """Let ZeroMQ close a connection on which nothing is heard any more.

    Its own thread asks and answers, so that a worker which computes (even one that keeps Python's lock) is
    alive, and one that was stopped, or whose machine or network is gone, is not.
    """
    for option in (zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL):
        socket.setsockopt(option, int(1000 * BEAT * LIVENESS))
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * BEAT))
