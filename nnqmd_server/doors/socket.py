"""The socket door: i-PI's protocol over unix, inet and shared memory, one batch per force set.

i-PI listens and we connect: once per bead in the classic protocol, once per batch in the batched one.
"""

from __future__ import annotations

import contextlib
import logging
import select
import selectors
import socket
import threading
import time
from dataclasses import dataclass

import numpy as np
import psutil

from nnqmd_server.doors.address import Address
from nnqmd_server.doors.connect import Connector
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.gather import Gather
from nnqmd_server.doors.ipi_process import listener_of
from nnqmd_server.doors.segments import Segments
from nnqmd_server.doors.wire import Conversation, Exit, InSegments, Positions, ProtocolError
from nnqmd_server.errors import NnqmdError, ProgramError
from nnqmd_server.pool.client import GivenUpError
from nnqmd_server.structures import Array

log = logging.getLogger("nnqmd.door")

MOST_LINES = 500
"""Connections at most: i-PI watches its clients with select(), which knows 1024 files."""

_REGULAR = 3
"""Complete force sets after which i-PI is taken to give each connection its bead again."""

_WRITE_TIMEOUT = 30.0
_FAREWELL = 2.0
"""How long i-PI is given to close a connection that we have no more use for [s]."""


@dataclass(frozen=True)
class _Asked:
    """Structures of one request; the copies of the last one that pad a batch are left out."""

    h: Array
    positions: Array
    beads: list[range]
    padded: int

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(eq=False)
class _Line:
    """One connection to i-PI."""

    socket: socket.socket
    talk: Conversation
    asked: _Asked | None = None
    segments: Segments | None = None
    done: bool = False

    def close(self) -> None:
        self.socket.close()
        if self.segments:
            self.segments.close()


class SocketDoor:
    """Answers an i-PI server over its sockets until it says EXIT.

    Parameters
    ----------
    address : Address
        Where i-PI listens.
    sets : ForceSets
        Evaluates what is asked.
    n_beads : int, optional
        Beads of a force set; learned from the first one unless given.
    batch_size : int, optional
        Structures that i-PI sends at a time; learned from the first request unless given.
    patience : float
        Longest wait for i-PI to begin to listen [s].

    Attributes
    ----------
    failure : NnqmdError, optional
        Why the door has closed, if not because i-PI was done or ``stop`` was called.
    left_waiting : bool
        Whether an i-PI was left that waits for forces, because of that or because ``stop`` was called.
    ipi : psutil.Process, optional
        After a failure that i-PI, if it runs here and is ours.
    """

    def __init__(
        self,
        address: Address,
        sets: ForceSets,
        n_beads: int | None = None,
        batch_size: int | None = None,
        patience: float = 120.0,
    ) -> None:
        self._address = address
        self._sets = sets
        self._n_beads = n_beads
        self._batch_size = batch_size
        self._selector = selectors.DefaultSelector()
        self._hangups = select.poll()
        self._scratch = memoryview(bytearray(1 << 18))
        self._lines: list[_Line] = []
        self._connector = Connector(address, patience)
        self._beads_seen: set[int] = set()
        self._gather = Gather(n_beads or 1)
        self._stop = threading.Event()
        self.failure: NnqmdError | None = None
        self.left_waiting = False
        self.ipi: psutil.Process | None = None

    def stop(self) -> None:
        """Ask the door to close after what it is doing."""
        self._stop.set()

    def run(self) -> None:
        """Serve until i-PI is done, has gone, or ``stop`` was called; a failure is kept in ``failure``."""
        try:
            self._serve()
            self.left_waiting = bool(self._lines)
        except GivenUpError:
            self.left_waiting = self._stop.is_set()
            log.info("forces that nobody waits for any more were given up")
        except ProtocolError as error:
            self.failure = ProgramError(
                f"What listens at {self._address} does not speak as i-PI does: {error}.",
                "Check that an <ffsocket> has this address, and that its mode is right.",
            )
        except NnqmdError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the socket door failed")
            what = f"The socket door failed: {error.__class__.__name__}: {error}"
            self._fail(ProgramError(what, "Please report this, with the log."))
        finally:
            self._connector.close()
            self._hang_up()
            self._selector.close()
            try:
                self._sets.close()
            except NnqmdError as error:
                self.failure = self.failure or error

    def _fail(self, error: NnqmdError) -> None:
        self.failure = error
        self.left_waiting = bool(self._lines)
        if self._lines:
            self.ipi = listener_of(self._lines[0].socket)

    def _serve(self) -> None:
        while not self._stop.is_set():
            opening = self._open_lines()
            if self._connector.made and not self._lines:
                return
            self._read(self._timeout(opening))
            waiting = [line for line in self._lines if line.asked is not None]
            all_ask = len(waiting) == len(self._lines) and not opening
            if waiting and (all_ask or self._time_left() <= 0):
                self._answer(waiting)

    def _timeout(self, opening: bool) -> float:
        """How long nothing need be done unless something arrives [s]."""
        timeout = 0.2
        if opening:
            timeout = max(0.0, self._connector.next_attempt - time.monotonic())
        if any(line.asked is not None for line in self._lines):
            timeout = min(timeout, max(0.0, self._time_left()))
        return timeout

    def _time_left(self) -> float:
        expecting = any(line.asked is None and line.talk.expecting for line in self._lines)
        return self._gather.remaining(time.monotonic(), expecting)

    # -- connections -----------------------------------------------------------------------------------

    def _wanted(self) -> int:
        """How many connections serve all beads at once, as far as is known."""
        if self._batch_size is None:
            return 1
        return min(-(-(self._n_beads or 1) // self._batch_size), MOST_LINES)

    def _open_lines(self) -> bool:
        """Connect as far as that goes without waiting; whether more connections are wanted."""
        while self._connector.made < self._wanted():
            new = self._connector.attempt()
            if new is None:
                return True
            self._begin(new)
        return False

    def _begin(self, new: socket.socket) -> None:
        line = _Line(new, Conversation(self._asks_bead(), segments=self._address.mode == "shm"))
        self._lines.append(line)
        self._selector.register(new, selectors.EVENT_READ, line)
        self._hangups.register(new, select.POLLRDHUP | select.POLLHUP)

    def _asks_bead(self) -> bool:
        # In batches it costs next to nothing, and the beads of a first force set may all be the same. Else it
        # costs half as much again: i-PI gives every connection the bead that it had before, so once each
        # has its own they are known.
        regular = self._sets.order.regular >= _REGULAR
        return self._sets.needs_beads or self._n_beads is None or self._batch_size != 1 or not regular

    # -- what i-PI says --------------------------------------------------------------------------------

    def _read(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            line: _Line = key.data
            try:
                size = line.socket.recv_into(self._scratch)
            except BlockingIOError:
                continue
            except OSError:
                size = 0
            events = line.talk.receive(self._scratch[:size])
            if size == 0 or Exit() in events:
                line.done, line.asked = True, None
            for event in () if line.done else events:
                self._take(line, event)
            self._write(line)
            if line.done:
                self._end(line)

    def _take(self, line: _Line, event: Positions | InSegments) -> None:
        if isinstance(event, InSegments):
            if line.segments is None or line.segments.shape != (event.n_structures, event.n_atoms):
                if line.segments:
                    line.segments.close()
                line.segments = Segments(event)
            line.asked = _without_padding(event.bead, *line.segments.read())
        else:
            line.asked = _without_padding(event.bead, event.h, event.positions)
        self._learn(line)
        self._gather.arrived(time.monotonic(), len(line.asked))

    def _learn(self, line: _Line) -> None:
        """Beads and batch size, where they were not given."""
        if self._batch_size is None:
            self._batch_size = line.talk.batch_size
        if self._n_beads is None or self._beads_seen:
            numbers = {beads.start for beads in line.asked.beads}
            if numbers & self._beads_seen and len(self._beads_seen) > (self._n_beads or 0):
                self._n_beads = len(self._beads_seen)
                self._gather.whole = self._n_beads
                log.info("i-PI has %d beads", self._n_beads)
            self._beads_seen |= numbers

    def _hang_up(self) -> None:
        """Close the connections so that i-PI goes on with another client, or ends when it is told to.

        The poll thread of i-PI 3.3 dies of a connection that is reset, which is what it gets when bytes
        are left unread here. So it is told first that nothing more comes, and heard until it has closed.
        """
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_WR)
        until = time.monotonic() + _FAREWELL
        while self._lines and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if _is_over(key.fileobj, self._scratch):
                    self._end(key.data)
        for line in list(self._lines):
            self._end(line)

    def _end(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        self._hangups.unregister(line.socket)
        self._lines.remove(line)
        line.close()

    # -- what we say -----------------------------------------------------------------------------------

    def _write(self, line: _Line) -> None:
        if not line.talk.outgoing:
            return
        data, line.talk.outgoing = line.talk.outgoing, bytearray()
        try:
            try:
                sent = line.socket.send(data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                line.socket.settimeout(_WRITE_TIMEOUT)
                line.socket.sendall(memoryview(data)[sent:])
                line.socket.setblocking(False)
        except OSError:  # it has closed, or reads no more: the end of the line is read next
            line.socket.setblocking(False)
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)

    def _answer(self, lines: list[_Line]) -> None:
        lines.sort(key=lambda line: line.asked.beads[0].start)
        asked = [line.asked for line in lines]
        self._gather.taken()
        if len(asked) == 1:
            h, positions, beads = asked[0].h, asked[0].positions, asked[0].beads
        else:
            h = [each for one in asked for each in one.h]
            positions = [each for one in asked for each in one.positions]
            beads = [each for one in asked for each in one.beads]
        answers = self._sets.evaluate(h, positions, beads, self._abandoned)
        for line in lines:
            line.asked = None
        if (asks := self._asks_bead()) != lines[0].talk.asks_bead:
            for line in self._lines:
                line.talk.asks_bead = asks
        self._read(0.0)  # what has come meanwhile came unasked: the wait was too short
        self._gather.answered()
        first = 0
        for line, one in zip(lines, asked, strict=True):
            mine = answers[first : first + len(one)]
            first += len(one)
            if line.done:
                continue
            mine += mine[-1:] * one.padded
            if line.segments:
                line.segments.write(mine)
            line.talk.give_forces(mine)
            self._write(line)

    def _abandoned(self) -> bool:
        """Whether every connection has been hung up, or the door is to close."""
        return self._stop.is_set() or len(self._hangups.poll(0)) == len(self._lines)


def _is_over(connection: socket.socket, scratch: memoryview) -> bool:
    """Whether the other side has closed; what it has said instead is dropped."""
    try:
        return connection.recv_into(scratch) == 0
    except BlockingIOError:
        return False
    except OSError:
        return True


def _without_padding(bead: int, h: Array, positions: Array) -> _Asked:
    """i-PI fills a batch up with copies of its last structure; one of them is enough."""
    whole = len(positions)
    # Most are told apart by their first atom.
    like = _at_the_end((positions[:, 0] == positions[-1, 0]).all(axis=1))
    same = (positions[-like:] == positions[-1]).all(axis=(1, 2)) & (h[-like:] == h[-1]).all(axis=(1, 2))
    count = whole - _at_the_end(same) + 1
    beads = [range(bead + k, bead + k + 1) for k in range(count)]
    beads[-1] = range(bead + count - 1, bead + whole)
    return _Asked(h[:count], positions[:count], beads, whole - count)


def _at_the_end(true: Array) -> int:
    """How many of the last are true, without a gap; 1 at least, to be counted from the end."""
    others = np.flatnonzero(~true)
    return max(1, len(true) - 1 - int(others[-1]) if len(others) else len(true))


def serve_in_thread(door: SocketDoor, name: str = "nnqmd-door") -> threading.Thread:
    """Run a socket door in a thread of its own."""
    thread = threading.Thread(target=door.run, name=name, daemon=True)
    thread.start()
    return thread
