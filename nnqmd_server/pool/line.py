"""A door's or worker's connection to a pool of its machine: messages over a unix socket.

ZeroMQ takes every message through threads of its own on both sides, and a thread that has slept wakes
slowly: over two hops and back that is twice as many wake-ups as there are sleepers to tell. Here who sends
writes to the kernel, and who waits is woken by it.

On the wire a message is ``<4s mark> <u32 number of frames> <u64 length of each>`` and the frames, each of
which begins at a multiple of eight bytes. Whatever else arrives ends the connection.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from nnqmd_server.pool.beat import BEAT, LIVENESS
from nnqmd_server.pool.messages import MAX_FRAMES, MAX_MESSAGE, BadMessageError, Frame

log = logging.getLogger("nnqmd.pool")

MARK = b"nnq1"
CHUNK = 1 << 16
"""Bytes that are read at once, unless a longer message is under way."""

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


class Reader:
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
        self._reader: Reader | None = None
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
        self._reader, self._waits, self._wait = Reader(connection), 0.0, self._retry[0]
        return True

    def _lose(self) -> None:
        self.close()
        self._messages.clear()
        self._next_try = time.monotonic() + self._retry[0]


def _set_limit(connection: socket.socket, which: int, seconds: float) -> None:
    whole, rest = divmod(max(seconds, 1e-3), 1)  # none at all would mean for ever
    connection.setsockopt(socket.SOL_SOCKET, which, struct.pack("@ll", int(whole), int(1e6 * rest)))
