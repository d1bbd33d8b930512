"""The classic i-PI protocol, client side, without any I/O: bytes in, events out.

Theory of operation. :class:`Conversation` holds what has arrived and not been understood yet; every
complete message moves it along the table ``MOVES`` and may put bytes into ``outgoing`` or give an event.
It does not know what a socket is, so any fragmentation of the bytes gives the same events.

i-PI (the server) says STATUS, INIT, POSDATA, GETFORCE, EXIT. Since version 3.2 it sends POSDATA and
GETFORCE together; before, it asks STATUS in between and waits for HAVEDATA. While forces are being
computed the answers to both are owed, and are given when the forces come.

After each answer this client says NEEDINIT again, because INIT carries the number of the bead that the
next positions belong to; nothing else on this wire does.

Headers are 12 characters; numbers are little-endian int32 and float64; hartree and bohr; the cell
vectors are the columns of h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from nnqmd_server.structures import Array

HEADER = 12
MAX_ATOMS = 20_000_000
MAX_INIT = 1 << 20
_INIT_HEAD = HEADER + 8
_POSDATA_HEAD = HEADER + 2 * 72 + 4


class ProtocolError(Exception):
    """The other side said something that this protocol does not allow."""


class State(Enum):
    """Where a conversation stands."""

    NEEDINIT = auto()
    READY = auto()
    COMPUTING = auto()
    HAVEDATA = auto()


# (state, message) -> next state. What is not here is a violation of the protocol.
MOVES = {
    (State.NEEDINIT, b"STATUS"): State.NEEDINIT,
    (State.NEEDINIT, b"INIT"): State.READY,
    (State.READY, b"STATUS"): State.READY,
    (State.READY, b"INIT"): State.READY,
    (State.READY, b"POSDATA"): State.COMPUTING,
    (State.COMPUTING, b"STATUS"): State.COMPUTING,
    (State.COMPUTING, b"GETFORCE"): State.COMPUTING,
    (State.HAVEDATA, b"STATUS"): State.HAVEDATA,
    (State.HAVEDATA, b"GETFORCE"): State.NEEDINIT,
    **{(state, b"EXIT"): state for state in State},
}


@dataclass(frozen=True)
class Positions:
    """A structure to be evaluated.

    ``bead`` is i-PI's number of the request's replica; ``h`` the cell matrix [bohr], vectors as
    columns, shape (3, 3); ``positions`` [bohr], shape (n_atoms, 3).
    """

    bead: int
    h: Array
    positions: Array


@dataclass(frozen=True)
class Exit:
    """The server is done."""


def header(name: str) -> bytes:
    """A message header: 12 characters, padded with blanks."""
    return name.encode().ljust(HEADER)


class Conversation:
    """One connection to an i-PI server, seen from the client, without I/O."""

    def __init__(self) -> None:
        self.state = State.NEEDINIT
        self.outgoing = bytearray()
        self._buffer = bytearray()
        self._bead = -1
        self._owed: list[bytes] = []
        self._answer = b""

    def receive(self, data: bytes) -> list[Positions | Exit]:
        """Take bytes from the server; give what they complete.

        Raises
        ------
        ProtocolError
            An unknown message, one that is out of turn, or an absurd length.
        """
        self._buffer += data
        events: list[Positions | Exit] = []
        while len(self._buffer) >= HEADER:
            name = bytes(self._buffer[:HEADER]).strip()
            if (self.state, name) not in MOVES:
                raise ProtocolError(f"{name!r} while {self.state.name}")
            size = self._size(name)
            if size is None or len(self._buffer) < size:
                break
            body = bytes(self._buffer[HEADER:size])
            del self._buffer[:size]
            event = self._take(name, body)
            self.state = MOVES[self.state, name]
            if event is not None:
                events.append(event)
        return events

    def give_forces(self, energy: float, forces: Array, virial: Array, extras: str = "") -> None:
        """Answer the positions received last.

        Parameters
        ----------
        energy : float
            Potential energy [hartree].
        forces : Array
            Forces [hartree/bohr], shape (n_atoms, 3).
        virial : Array
            Virial [hartree], shape (3, 3).
        extras : str
            JSON text, or nothing.
        """
        if self.state is not State.COMPUTING:
            raise ProtocolError(f"forces given while {self.state.name}")
        text = extras.encode()
        self._answer = b"".join(
            [
                header("FORCEREADY"),
                struct.pack("<d", energy),
                struct.pack("<i", len(forces)),
                np.ascontiguousarray(forces, dtype="<f8").tobytes(),
                np.ascontiguousarray(virial, dtype="<f8").tobytes(),
                struct.pack("<i", len(text)),
                text,
            ]
        )
        self.state = State.HAVEDATA
        owed, self._owed = self._owed, []
        for name in owed:
            self._take(name, b"")
            self.state = MOVES[self.state, name]

    def _size(self, name: bytes) -> int | None:
        """Length of the message that begins the buffer; None when that is not known yet."""
        if name == b"INIT":
            if len(self._buffer) < _INIT_HEAD:
                return None
            length = struct.unpack_from("<i", self._buffer, HEADER + 4)[0]
            if not 0 <= length <= MAX_INIT:
                raise ProtocolError(f"an INIT string of {length} bytes")
            return _INIT_HEAD + length
        if name == b"POSDATA":
            if len(self._buffer) < _POSDATA_HEAD:
                return None
            atoms = struct.unpack_from("<i", self._buffer, _POSDATA_HEAD - 4)[0]
            if not 0 < atoms <= MAX_ATOMS:
                raise ProtocolError(f"positions of {atoms} atoms")
            return _POSDATA_HEAD + 24 * atoms
        return HEADER

    def _take(self, name: bytes, body: bytes) -> Positions | Exit | None:
        if self.state is State.COMPUTING and name in {b"STATUS", b"GETFORCE"}:
            self._owed.append(name)
        elif name == b"STATUS":
            self.outgoing += header(self.state.name)
        elif name == b"INIT":
            self._bead = struct.unpack_from("<i", body)[0]
        elif name == b"POSDATA":
            h = np.frombuffer(body, "<f8", 9).reshape(3, 3)
            return Positions(self._bead, h, np.frombuffer(body, "<f8", offset=148).reshape(-1, 3))
        elif name == b"GETFORCE":
            self.outgoing += self._answer
        elif name == b"EXIT":
            return Exit()
        return None
