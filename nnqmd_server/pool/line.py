"""Connections between processes of one machine: messages over unix sockets.

ZeroMQ takes every message through threads of its own on both sides, and a thread that has slept wakes
slowly: over two hops and back that is twice as many wake-ups as there are sleepers to tell. Here who sends
writes to the kernel, and who waits is woken by it.

On the wire a message is ``<4s mark> <u32 number of frames> <u64 length of each>`` and the frames, each of
which begins at a multiple of eight bytes. Whatever else arrives ends the connection.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnqmd_server.pool.beat import BEAT, LIVENESS
from nnqmd_server.pool.messages import MAX_FRAMES, MAX_MESSAGE, BadMessageError, Frame

log = logging.getLogger("nnqmd.pool")

MARK = b"nnq1"
CHUNK = 1 << 16
"""Bytes that are read at once, unless a longer message is under way."""

MAX_LATE = 64
"""Messages that wait for somebody who does not read; with more he is taken for gone."""

MAX_PEERS = 4096
"""Connections at once; further ones are closed."""

_HEAD = struct.Struct("<4sI")
_NOTHING = bytes(8)


def encode(frames: Sequence[Frame]) -> list[Frame]:
    """What is written for a message, in pieces; the frames are not copied."""
    lengths = [len(frame) for frame in frames]
    pieces: list[Frame] = [_HEAD.pack(MARK, len(frames)) + struct.pack(f"<{len(frames)}Q", *lengths)]
    for frame, length in zip(frames, lengths, strict=True):
        pieces.append(frame)
        if length % 8:
            pieces.append(_NOTHING[length % 8 :])
    return pieces


class Inbox:
    """Puts messages together from the bytes that arrive, however they are cut."""

    def __init__(self) -> None:
        self._pieces: list[bytearray] = []
        self._have = 0
        self._need = _HEAD.size

    @property
    def missing(self) -> int:
        """Bytes that must come before there can be another message."""
        return self._need - self._have

    def add(self, piece: bytearray) -> list[list[memoryview]]:
        """The messages that are complete with these bytes.

        Raises
        ------
        BadMessageError
            This is no message of ours, or one that is too long.
        """
        self._pieces.append(piece)
        self._have += len(piece)
        messages = []
        while self._have >= self._need:
            whole = self._pieces[0] if len(self._pieces) == 1 else bytearray().join(self._pieces)
            found = self._first(whole)
            if found is not None:
                messages.append(found)
                whole, self._need = whole[self._need :], _HEAD.size
            self._pieces, self._have = [whole] if whole else [], len(whole)
        return messages

    def _first(self, data: bytearray) -> list[memoryview] | None:
        """The frames of the message with which the bytes begin; sets how many bytes it needs."""
        mark, count = _HEAD.unpack_from(data)
        if mark != MARK or not 1 <= count <= MAX_FRAMES:
            raise BadMessageError("something that is no message of ours")
        self._need = place = _HEAD.size + 8 * count
        if len(data) < place:
            return None
        lengths = struct.unpack_from(f"<{count}Q", data, _HEAD.size)
        self._need += sum(-(-length // 8) * 8 for length in lengths)
        if self._need > MAX_MESSAGE:
            raise BadMessageError("a message that is too long")
        if len(data) < self._need:
            return None
        view, frames = memoryview(data), []
        for length in lengths:
            frames.append(view[place : place + length])
            place += -(-length // 8) * 8
        return frames


class _Reader:
    """Reads what has come over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._inbox = Inbox()
        self._scratch = bytearray(CHUNK)

    def read(self) -> list[list[memoryview]] | None:
        """One reading's worth of messages; None at the end of the connection; raises what ``recv`` raises."""
        missing = self._inbox.missing
        space = self._scratch if missing <= CHUNK else bytearray(min(missing, 4 * CHUNK))
        count = self.socket.recv_into(space)
        return self._inbox.add(space[:count]) if count else None


class Line:
    """A connection to a pool of this machine, which is made again when it is lost.

    Parameters
    ----------
    path : Path
        The pool's socket.
    retry : tuple of float
        First and longest time between two tries to connect [s]; it doubles in between.
    """

    def __init__(self, path: Path, retry: tuple[float, float] = (0.05, 1.0)) -> None:
        self._path = path
        self._retry = retry
        self._wait = retry[0]
        self._next_try = 0.0
        self._reader: _Reader | None = None
        self._waits = 0.0
        self._messages: deque[list[memoryview]] = deque()

    def send(self, frames: Sequence[Frame], wait: float = 0.0) -> bool:
        """Send if the pool is there, or comes within ``wait`` [s]; whether it was sent."""
        end = time.monotonic() + wait
        while self._reader is None and not self._connect():
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        pieces = encode(frames)
        try:
            sent = self._reader.socket.sendmsg(pieces)
            if sent < sum(map(len, pieces)):
                self._reader.socket.sendall(memoryview(b"".join(pieces))[sent:])
        except OSError as error:  # it is gone, or reads nothing any more
            log.debug("not sent: %s", error)
            self._lose()
            return False
        return True

    def receive(self, seconds: float) -> list[memoryview] | None:
        """The frames of the next message; None when none comes in time or the connection is lost.

        Raises
        ------
        BadMessageError
            Who listens there is no pool of ours.
        """
        if self._messages:
            return self._messages.popleft()
        end = time.monotonic() + seconds
        left = seconds
        while True:
            if self._reader is None:
                time.sleep(min(left, max(0.02, self._next_try - time.monotonic())))
                return None
            self._wait_at_most(left)
            try:
                found = self._reader.read()
            except BlockingIOError:
                return None
            except OSError:
                found = None
            except BadMessageError:
                self._lose()
                raise
            if found is None:
                self._lose()
                return None
            if found:
                self._messages.extend(found)
                return self._messages.popleft()
            left = end - time.monotonic()
            if left <= 0:
                return None

    def why(self) -> None:
        """Nobody is turned away here: who may open the socket file may come in."""

    def close(self) -> None:
        """Hang up."""
        if self._reader is not None:
            self._reader.socket.close()
            self._reader = None

    def _wait_at_most(self, seconds: float) -> None:
        """Let the kernel bound the wait: one call then waits and reads."""
        if not 0.99 * self._waits <= seconds <= 1.01 * self._waits:
            self._waits = seconds
            _set_limit(self._reader.socket, socket.SO_RCVTIMEO, seconds)

    def _connect(self) -> bool:
        now = time.monotonic()
        if now < self._next_try:
            return False
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _set_limit(connection, socket.SO_SNDTIMEO, BEAT * LIVENESS)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            self._next_try, self._wait = now + self._wait, min(2 * self._wait, self._retry[1])
            return False
        self._reader, self._waits, self._wait = _Reader(connection), 0.0, self._retry[0]
        return True

    def _lose(self) -> None:
        self.close()
        self._messages.clear()
        self._next_try = time.monotonic() + self._retry[0]


def _set_limit(connection: socket.socket, which: int, seconds: float) -> None:
    whole, rest = divmod(max(seconds, 1e-3), 1)  # none at all would mean for ever
    connection.setsockopt(socket.SOL_SOCKET, which, struct.pack("@ll", int(whole), int(1e6 * rest)))


class _Peer(_Reader):
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
    """The other end: listens at socket files, and holds the connections of those who have come.

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
                log.warning("refused a connection: %s", error)
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
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # as a rule no more file descriptors
                log.error("a connection could not be taken: %s", error)
                self._take_connections(False)
                return
            if len(self._peers) >= MAX_PEERS:
                connection.close()
                continue
            connection.setblocking(False)
            self._count += 1
            peer = _Peer(b"line" + self._count.to_bytes(8, "little"), connection)
            self._peers[peer.identity] = peer
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _take_connections(self, willing: bool) -> None:
        """Who cannot take another connection does not listen until one has ended."""
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
