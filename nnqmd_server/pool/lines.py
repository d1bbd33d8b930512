"""The pool's end of connections within a machine: see :mod:`line`."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnqmd_server.pool.beat import LIVENESS
from nnqmd_server.pool.line import Reader, encode
from nnqmd_server.pool.messages import BadMessageError, Frame

log = logging.getLogger("nnqmd.pool")

MAX_LATE = 64
"""Messages that wait for somebody who does not read; with more he is taken for gone."""

MAX_PEERS = 4096
"""Connections at once; further ones are closed."""


class _Peer(Reader):
    """Somebody who has come in."""

    def __init__(self, identity: bytes, connection: socket.socket) -> None:
        super().__init__(connection)
        self.identity = identity
        self.late: deque[memoryview] = deque()
        self.pid = _pid_of(connection)
        self.frozen = 0

    def flush(self) -> None:
        """Write what waits as far as it goes; raises what ``send`` raises."""
        while self.late:
            sent = self.socket.send(self.late[0])
            if sent < len(self.late[0]):
                self.late[0] = self.late[0][sent:]
                return
            self.late.popleft()


class Lines:
    """Listens at socket files, and holds the connections of those who have come.

    Nothing here waits. To be used in one thread.

    Attributes
    ----------
    gone : list of bytes
        Whose connection has ended since this list was last cleared.
    strangers : int
        How many were shown out because they spoke something else.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._listeners: list[tuple[socket.socket, Path, int]] = []
        self._peers: dict[bytes, _Peer] = {}
        self._count = 0
        self._full = False
        self.gone: list[bytes] = []
        self.strangers = 0

    def listen(self, path: Path) -> None:
        """Take connections at a socket file, which nobody but this user can open.

        Raises
        ------
        OSError
            There is something already, or it cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        self._listeners.append((listener, path, path.stat().st_ino))
        self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """A file descriptor that is readable when there is something to do."""
        return self._selector.fileno()

    def receive(self) -> Iterator[tuple[bytes, list[memoryview]]]:
        """What has come: who, and the frames of a message; one reading's worth of each."""
        for key, events in self._selector.select(0):
            peer = key.data
            if peer is None:
                self._accept(key.fileobj)
                continue
            if peer.identity not in self._peers:  # shown out meanwhile
                continue
            try:
                if events & selectors.EVENT_WRITE:
                    peer.flush()
                    self._attend(peer)
                messages = peer.read() if events & selectors.EVENT_READ else []
            except BlockingIOError:
                continue
            except OSError:
                messages = None
            except BadMessageError as error:
                # Who cannot be understood tries again and again; the count tells how often.
                log.log(
                    logging.DEBUG if self.strangers else logging.WARNING, "refused a connection: %s", error
                )
                self.strangers += 1
                messages = None
            if messages is None:
                self.drop(peer.identity)
                continue
            for frames in messages:
                yield peer.identity, frames

    def holds(self, identity: bytes) -> bool:
        """Whether somebody is connected here."""
        return identity in self._peers

    def send(self, identity: bytes, frames: Sequence[Frame]) -> bool:
        """Send to somebody who may have gone; whether he is there. What he does not read yet waits."""
        peer = self._peers.get(identity)
        if peer is None:
            return False
        pieces = encode(frames)
        try:
            sent = 0 if peer.late else peer.socket.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.drop(identity)
            return False
        if sent < sum(map(len, pieces)):
            peer.late.append(memoryview(b"".join(pieces))[sent:])
            if len(peer.late) > MAX_LATE:
                self.drop(identity)
                return False
            self._attend(peer)
        return True

    def listen_again(self) -> None:
        """Take connections again if that had failed; to be called at every beat."""
        self._take_connections(True)

    def frozen(self) -> list[bytes]:
        """Who is held by a signal or a debugger now and was at the last calls; to be called at every beat."""
        found = []
        for peer in self._peers.values():
            peer.frozen = peer.frozen + 1 if _is_stopped(peer.pid) else 0
            if peer.frozen > LIVENESS:
                found.append(peer.identity)
        return found

    def drop(self, identity: bytes) -> None:
        """End somebody's connection."""
        peer = self._peers.pop(identity, None)
        if peer is not None:
            self._selector.unregister(peer.socket)
            peer.socket.close()
            self.gone.append(identity)
            self._take_connections(True)

    def close(self) -> None:
        """End all connections and remove the socket files that are still ours; may be called twice."""
        for peer in self._peers.values():
            peer.socket.close()
        self._peers.clear()
        for listener, path, number in self._listeners:
            listener.close()
            with contextlib.suppress(OSError):
                if path.stat().st_ino == number:
                    path.unlink()
        self._listeners.clear()
        self._selector.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection = None
            try:
                connection, _ = listener.accept()
                if len(self._peers) >= MAX_PEERS:
                    connection.close()
                    continue
                connection.setblocking(False)
                self._count += 1
                peer = _Peer(b"line" + self._count.to_bytes(8, "little"), connection)
                self._selector.register(connection, selectors.EVENT_READ, peer)
            except BlockingIOError:
                return
            except OSError as error:  # as a rule no more file descriptors
                if connection is not None:
                    connection.close()
                log.error("a connection could not be taken: %s; `ulimit -n` allows more", error)
                self._take_connections(False)
                return
            self._peers[peer.identity] = peer

    def _take_connections(self, willing: bool) -> None:
        """Who cannot take another connection does not listen until one has ended, or for a beat."""
        if willing == self._full:
            self._full = not willing
            for listener, *_ in self._listeners:
                if willing:
                    self._selector.register(listener, selectors.EVENT_READ)
                else:
                    self._selector.unregister(listener)

    def _attend(self, peer: _Peer) -> None:
        """Be woken when somebody reads again for whom something waits."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.late else 0)
        self._selector.modify(peer.socket, events, peer)


def _pid_of(connection: socket.socket) -> int:
    """The process at the other end; 0 where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return 0
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def _is_stopped(pid: int) -> bool:
    """Whether a process is held by a signal or a debugger: unlike one that computes, it will not answer."""
    try:
        return pid > 0 and Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:  # gone, or no such system: the end of the connection tells
        return False
