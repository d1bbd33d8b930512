"""The i-PI protocol, server side, without any I/O: a small i-PI for tests and for other programs' clients.

It asks for one request at a time, in any of the layouts of :mod:`nnqmd_server.doors.wire`, and gives an
event when the answer is complete.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from nnqmd_server.doors.wire import (
    HEADER,
    MAX_INIT,
    Answer,
    Incoming,
    ProtocolError,
    float64,
    header,
    int32,
)
from nnqmd_server.structures import Array


class Stage(Enum):
    """How far a request has come."""

    IDLE = auto()
    ASKED = auto()
    SENT = auto()
    DUE = auto()
    BROKEN = auto()


# (stage, message) -> next stage. What is not here is a violation of the protocol.
STAGES = {
    (Stage.ASKED, b"NEEDINIT"): Stage.ASKED,
    (Stage.ASKED, b"READY"): Stage.SENT,
    (Stage.SENT, b"HAVEDATA"): Stage.DUE,
    (Stage.DUE, b"FORCEREADY"): Stage.IDLE,
}


@dataclass(frozen=True)
class Request:
    """What is to be evaluated: as :class:`~nnqmd_server.doors.wire.Positions`, with the INIT string."""

    bead: int
    h: Array
    positions: Array
    init: str = " "


@dataclass(frozen=True)
class Forces:
    """The answers to a request, one for each structure."""

    answers: tuple[Answer, ...]


class Asking:
    """One connection to a client, seen from the server, without I/O.

    Parameters
    ----------
    batch_size : int
        Structures in each request; more than one is announced in INIT.
    consolidated : bool
        POSDATA and GETFORCE in one, as i-PI does from 3.2 on.
    segments : tuple of str
        Names of the shared-memory segments, when the numbers are to be found there.
    """

    def __init__(
        self, batch_size: int = 1, consolidated: bool = True, segments: tuple[str, ...] = ()
    ) -> None:
        self.stage = Stage.IDLE
        self.outgoing = bytearray()
        self._batch_size = batch_size
        self._consolidated = consolidated
        self._segments = segments
        self._named = False
        self._incoming = Incoming()
        self._request: Request | None = None

    def ask(self, request: Request) -> None:
        """Begin a request."""
        if self.stage is not Stage.IDLE or len(request.positions) != self._batch_size:
            raise ProtocolError(f"{len(request.positions)} structures asked for while {self.stage.name}")
        self._request = request
        self.stage = Stage.ASKED
        self.outgoing += header("STATUS")

    def exit(self) -> None:
        """Say that this was all."""
        self.outgoing += header("EXIT")

    def receive(self, data: bytes) -> list[Forces]:
        """Take bytes from the client; give what they complete.

        Raises
        ------
        ProtocolError
            An unknown message, one that is out of turn, or another number of atoms.
        """
        if self.stage is Stage.BROKEN:
            raise ProtocolError("bytes after an error")
        self._incoming.add(data)
        events = []
        try:
            while (name := self._incoming.name()) is not None:
                if (self.stage, name) not in STAGES:
                    raise ProtocolError(f"{name!r} while {self.stage.name}")
                size = self._size_of_forces() if name == b"FORCEREADY" else HEADER
                if size is None or len(self._incoming) < size:
                    break
                body = self._incoming.cut(size)
                self.stage = STAGES[self.stage, name]
                if name == b"FORCEREADY":
                    events.append(self._forces(body))
                else:
                    self._go_on(name)
        except ProtocolError:
            self.stage = Stage.BROKEN
            self._incoming.clear()
            raise
        return events

    def _go_on(self, name: bytes) -> None:
        if name == b"NEEDINIT":
            text = self._request.init.encode()
            if self._batch_size > 1:
                text += b", batch_size:%d" % self._batch_size
            self.outgoing += header("INIT") + int32(self._request.bead) + int32(len(text)) + text
            self.outgoing += header("STATUS")
        elif name == b"READY":
            self.outgoing += self._posdata()
            self.outgoing += header("GETFORCE" if self._consolidated else "STATUS")
            self.stage = Stage.DUE if self._consolidated else Stage.SENT
        elif name == b"HAVEDATA":
            self.outgoing += header("GETFORCE")

    def _posdata(self) -> bytes:
        atoms = int32(self._request.positions.shape[1])
        if self._segments:
            names = () if self._named else self._segments
            self._named = True
            named = b"".join(int32(len(name)) + name.encode() for name in names)
            return header("POSDATA") + atoms + named
        cells = [float64(h) + float64(np.linalg.inv(h)) for h in self._request.h]
        positions = float64(self._request.positions)
        if self._batch_size == 1:
            return b"".join((header("POSDATA"), *cells, atoms, positions))
        return b"".join((header("POSDATA"), atoms, *cells, positions))

    def _size_of_forces(self) -> int | None:
        count, atoms = self._request.positions.shape[:2]
        at = HEADER
        if not self._segments:
            at += 8 * count
            if self._incoming.length(at, atoms, "a list of forces", least=atoms) is None:
                return None
            at += 4 + count * (24 * atoms + 72)
        for _ in range(count):
            length = self._incoming.length(at, MAX_INIT, "an extras string")
            if length is None:
                return None
            at += 4 + length
        return at

    def _forces(self, body: bytes) -> Forces:
        count, atoms = self._request.positions.shape[:2]
        numbers = np.zeros((count, 1)), np.zeros((count, atoms, 3)), np.zeros((count, 3, 3))
        at = 0
        for part in () if self._segments else numbers:
            part[:] = np.frombuffer(body, "<f8", part.size, offset=at).reshape(part.shape)
            at += 8 * part.size + 4 * (at == 0)
        texts = []
        for _ in range(count):
            length = struct.unpack_from("<i", body, at)[0]
            texts.append(body[at + 4 : at + 4 + length].decode(errors="replace"))
            at += 4 + length
        energy, forces, virial = numbers
        return Forces(tuple((float(energy[k, 0]), forces[k], virial[k], texts[k]) for k in range(count)))
