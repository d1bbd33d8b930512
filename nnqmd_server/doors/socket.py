"""The socket door: i-PI's classic protocol over unix or inet, one connection per bead, one batch per step.

i-PI listens and we connect, once per bead. i-PI greets each new client before it accepts the next, and
its queue of unaccepted connections is short, so connections are made one by one while those that stand
are already being answered.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.wire import Conversation, Exit, Positions, ProtocolError
from nnqmd_server.errors import AddressError, NnqmdError, ProgramError

log = logging.getLogger("nnqmd.door")

GATHER = 0.003
"""How long a force set that has stopped growing waits for the rest of it [s]: i-PI from 3.2 on sends what
is queued and then nothing until that is answered, so a longer wait would be for nothing."""

_NOT_YET = {errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT, errno.EINPROGRESS}


@dataclass(frozen=True)
class Address:
    """Where i-PI listens: a unix socket path, or host and port."""

    mode: str
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.mode == "unix" else f"inet:{self.host}:{self.port}"


def ipi_address(mode: str, address: str, port: int = 0) -> Address:
    """The address that an ``<ffsocket>`` names; unix sockets live at ``/tmp/ipi_ADDRESS``."""
    if mode == "unix":
        return Address("unix", path=address if address.startswith("/") else f"/tmp/ipi_{address}")
    return Address("inet", host=address, port=port)


def parse_address(text: str) -> Address:
    """``unix:NAME`` or ``inet:HOST:PORT`` as given on the command line."""
    mode, _, rest = text.partition(":")
    if mode == "unix" and rest:
        return ipi_address("unix", rest)
    host, _, port = rest.rpartition(":")
    if mode == "inet" and host and port.isdigit():
        return ipi_address("inet", host, int(port))
    raise AddressError(f"{text!r} is not the address of an i-PI socket.", "Use unix:NAME or inet:HOST:PORT.")


@dataclass(eq=False)
class _Line:
    """One connection to i-PI."""

    socket: socket.socket
    talk: Conversation = field(default_factory=Conversation)
    asked: Positions | None = None
    done: bool = False


class SocketDoor:
    """Answers an i-PI server over its sockets until it says EXIT.

    Parameters
    ----------
    address : Address
        Where i-PI listens.
    sets : ForceSets
        Evaluates what is asked.
    n_beads : int
        Connections to open.
    patience : float
        Longest wait for i-PI to begin to listen [s].
    """

    def __init__(self, address: Address, sets: ForceSets, n_beads: int, patience: float = 120.0) -> None:
        self._address = address
        self._sets = sets
        self._n_beads = n_beads
        self._patience = patience
        self._selector = selectors.DefaultSelector()
        self._lines: list[_Line] = []
        self._opened = 0
        self._arrived = 0.0
        self._stop = threading.Event()
        self.failure: NnqmdError | None = None

    def stop(self) -> None:
        """Ask the door to close after what it is doing."""
        self._stop.set()

    def run(self) -> None:
        """Serve until i-PI is done, has gone, or ``stop`` was called; a failure is kept in ``failure``."""
        try:
            self._serve()
        except NnqmdError as error:
            self.failure = error
        finally:
            for line in self._lines:
                line.socket.close()
            self._selector.close()
            try:
                self._sets.close()
            except NnqmdError as error:
                self.failure = self.failure or error

    def _serve(self) -> None:
        deadline = time.monotonic() + self._patience
        while not self._stop.is_set():
            if self._opened < self._n_beads:
                self._open_one(deadline)
            elif not self._lines:
                return
            waiting = [line for line in self._lines if line.asked is not None]
            self._read(GATHER / 2 if waiting or self._opened < self._n_beads else 0.2)
            waiting = [line for line in self._lines if line.asked is not None]
            complete = len(waiting) == self._n_beads
            if complete or (waiting and time.monotonic() - self._arrived > GATHER):
                self._answer(waiting)

    def _open_one(self, deadline: float) -> None:
        unix = self._address.mode == "unix"
        new = socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM)
        new.setblocking(not unix)
        try:
            if unix:
                new.connect(self._address.path)
            else:
                new.settimeout(1.0)
                new.connect((self._address.host, self._address.port))
                new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                new.setblocking(False)
        except OSError as error:
            new.close()
            if self._opened and not self._lines:
                self._opened = self._n_beads  # i-PI has left already
            elif error.errno not in _NOT_YET and not isinstance(error, TimeoutError):
                raise AddressError(
                    f"Cannot connect to i-PI at {self._address}: {error}.", "Check the address."
                ) from error
            elif not self._opened and time.monotonic() > deadline:
                raise AddressError(
                    f"Nobody has listened at {self._address} for {self._patience:.0f} s.",
                    "Start i-PI, or check that its <ffsocket> has this address.",
                ) from error
            elif not self._lines:
                time.sleep(0.05)
            return
        self._opened += 1
        line = _Line(new)
        self._lines.append(line)
        self._selector.register(new, selectors.EVENT_READ, line)

    def _read(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            line: _Line = key.data
            try:
                data = line.socket.recv(1 << 20)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            try:
                events = line.talk.receive(data)
            except ProtocolError as error:
                raise ProgramError(
                    f"What listens at {self._address} does not speak as i-PI does: {error}.", ""
                ) from error
            for event in events:
                if isinstance(event, Exit):
                    line.done = True
                else:
                    line.asked = event
                    self._arrived = time.monotonic()
            self._write(line)
            if not data or line.done:
                self._selector.unregister(line.socket)
                line.socket.close()
                self._lines.remove(line)

    def _write(self, line: _Line) -> None:
        if not line.talk.outgoing:
            return
        data, line.talk.outgoing = bytes(line.talk.outgoing), bytearray()
        line.socket.settimeout(30.0)
        # A peer that has closed shows up as an empty read next.
        with contextlib.suppress(OSError):
            line.socket.sendall(data)
        line.socket.setblocking(False)

    def _answer(self, lines: list[_Line]) -> None:
        lines.sort(key=lambda line: line.asked.bead)
        asked = [line.asked for line in lines]
        answers = self._sets.evaluate(
            [a.h for a in asked], [a.positions for a in asked], [a.bead for a in asked]
        )
        for line, answer in zip(lines, answers, strict=True):
            line.asked = None
            line.talk.give_forces(*answer)
            self._write(line)


def serve_in_thread(door: SocketDoor, name: str = "nnqmd-door") -> threading.Thread:
    """Run a socket door in a thread of its own."""
    thread = threading.Thread(target=door.run, name=name, daemon=True)
    thread.start()
    return thread


def stale_socket(path: Path) -> bool:
    """Whether a unix socket file exists on which nobody listens (left behind by a killed i-PI)."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
