"""The i-PI protocol, client side, without any I/O: bytes in, events out.

Theory of operation. :class:`Conversation` holds what has arrived and not been understood yet; every
complete message moves it along the table ``MOVES`` and may put bytes into ``outgoing`` or give an event.
It does not know what a socket is, so any fragmentation of the bytes gives the same events. Whatever the
bytes are, nothing but :class:`ProtocolError` is raised, no length is believed beyond the ``MAX_``
constants, and after an error nothing more is taken.

i-PI (the server) says STATUS, INIT, POSDATA, GETFORCE, EXIT. Since version 3.2 it sends POSDATA and
GETFORCE together; before, it asks STATUS in between and waits for HAVEDATA. While forces are being
computed the answers to both are owed, and are given when the forces come.

Three layouts of POSDATA and of its answer: *classic*, one structure; *batched* (i-PI 3.3), as many
structures as ``batch_size`` in the INIT string says, always that many, the tail padded with copies of
the last; *shared memory* (i-PI 3.3), where the numbers are in segments whose names come with the first
POSDATA, and only extras travel here.

Every i-PI asks STATUS as soon as it has read an answer. A conversation that has seen the server do so
after each of its first answers sends its reply along with the next answer, and takes the question when
it comes as answered: i-PI then need not wait for us once per bead. A server that stops doing so has the
reply in excess; that is a violation of the protocol.

INIT carries the number of the bead that the next positions (the first of a batch) belong to; nothing
else on this wire does. A conversation that is to know beads therefore says NEEDINIT after each answer.

Headers are 12 characters; numbers are little-endian int32 and float64; hartree and bohr; the cell
vectors are the columns of h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from nnqmd_server.structures import Array

Answer = tuple[float, Array, Array, str]
"""Energy [hartree], forces [hartree/bohr] (n_atoms, 3), virial [hartree] (3, 3), extras (JSON or nothing)."""

HEADER = 12
MAX_ATOMS = 20_000_000
"""Atoms of all structures of one message together."""
MAX_BATCH = 1 << 16
MAX_INIT = 1 << 20
MAX_NAME = 255
_MAX_OWED = 8
_HABIT = 3
"""Answers that STATUS must have followed before that is relied on."""

KINDS = ("pos", "h", "ih", "pot", "force", "vir")
"""The shared-memory segments, in the order in which i-PI names them."""


class ProtocolError(Exception):
    """The other side said something that this protocol does not allow."""


class State(Enum):
    """Where a conversation stands."""

    NEEDINIT = auto()
    READY = auto()
    COMPUTING = auto()
    HAVEDATA = auto()
    CLOSED = auto()
    BROKEN = auto()


# (state, message) -> next state. What is not here is a violation of the protocol. Two moves are not
# messages: forces that are given lead from COMPUTING to HAVEDATA; and a conversation that is to know
# beads goes on from READY to NEEDINIT after an answer.
MOVES = {
    (State.NEEDINIT, b"STATUS"): State.NEEDINIT,
    (State.NEEDINIT, b"INIT"): State.READY,
    (State.READY, b"STATUS"): State.READY,
    (State.READY, b"INIT"): State.READY,
    (State.READY, b"POSDATA"): State.COMPUTING,
    (State.COMPUTING, b"STATUS"): State.COMPUTING,
    (State.COMPUTING, b"GETFORCE"): State.COMPUTING,
    (State.HAVEDATA, b"STATUS"): State.HAVEDATA,
    (State.HAVEDATA, b"GETFORCE"): State.READY,
    **{(state, b"EXIT"): State.CLOSED for state in State if state is not State.BROKEN},
}


@dataclass(frozen=True)
class Positions:
    """Structures to be evaluated.

    ``bead`` is i-PI's number of the first one's replica; ``h`` the cell matrices [bohr], vectors as
    columns, shape (n_structures, 3, 3); ``positions`` [bohr], shape (n_structures, n_atoms, 3).
    """

    bead: int
    h: Array
    positions: Array


@dataclass(frozen=True)
class InSegments:
    """``n_structures`` of ``n_atoms`` atoms to be evaluated, in the shared memory of these ``names``."""

    bead: int
    n_structures: int
    n_atoms: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Exit:
    """The server is done."""


Event = Positions | InSegments | Exit


def header(name: str) -> bytes:
    """A message header: 12 characters, padded with blanks."""
    return name.encode().ljust(HEADER)


def int32(number: int) -> bytes:
    """A whole number as it travels."""
    return struct.pack("<i", number)


def float64(numbers: Array) -> bytes:
    """An array as it travels."""
    return np.ascontiguousarray(numbers, dtype="<f8").tobytes()


def read_batch_size(text: str) -> int:
    """The ``batch_size`` that an INIT string announces; 1 when it does not.

    Raises
    ------
    ProtocolError
        It is not a number that can be meant.
    """
    size = 1
    for token in text.split(","):
        key, colon, value = token.partition(":")
        if colon and key.strip() == "batch_size":
            if not value.strip().isdecimal() or not 0 < int(value.strip()[:9]) <= MAX_BATCH:
                raise ProtocolError(f"a batch_size of {value.strip()[:40]!r}")
            size = int(value)
    return size


class Incoming:
    """What has arrived and not been understood yet, and how to cut it into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def name(self) -> bytes | None:
        """The header that the buffer begins with; None as long as it is not complete."""
        return bytes(self._buffer[:HEADER]).rstrip(b" ") if len(self._buffer) >= HEADER else None

    def int32(self, at: int) -> int | None:
        """The number at an offset; None as long as it has not arrived."""
        return struct.unpack_from("<i", self._buffer, at)[0] if len(self._buffer) >= at + 4 else None

    def length(self, at: int, most: int, what: str, least: int = 0) -> int | None:
        """A number that is a length, within bounds.

        Raises
        ------
        ProtocolError
            It is out of bounds.
        """
        number = self.int32(at)
        if number is not None and not least <= number <= most:
            raise ProtocolError(f"{what} of length {number}")
        return number

    def add(self, data: bytes | memoryview) -> None:
        """Take bytes."""
        self._buffer += data

    def cut(self, size: int) -> bytes:
        """Take the first message off the buffer, without its header."""
        with memoryview(self._buffer) as view:
            body = view[HEADER:size].tobytes()
        del self._buffer[:size]
        return body

    def clear(self) -> None:
        """Forget everything."""
        self._buffer.clear()


class Conversation:
    """One connection to an i-PI server, seen from the client, without I/O.

    Parameters
    ----------
    asks_bead : bool
        Whether INIT is asked for before each request, since it names the bead; may be changed at any time.
    segments : bool
        Whether the numbers are in shared memory.

    Attributes
    ----------
    outgoing : bytearray
        Bytes for the server; whoever sends them takes them off.
    """

    def __init__(self, asks_bead: bool = True, segments: bool = False) -> None:
        self.state = State.NEEDINIT
        self.asks_bead = asks_bead
        self.outgoing = bytearray()
        self.batch_size = 1
        self._segments = segments
        self._incoming = Incoming()
        self._bead = -1
        self._names: tuple[str, ...] = ()
        self._owed: list[bytes] = []
        self._asked = (0, 0)  # structures, atoms of each
        self._answer = b""
        self._answered = False  # the last thing that was said is an answer
        self._habit = 0
        self._foreseen = False  # STATUS has been replied to before it came

    @property
    def expecting(self) -> bool:
        """Whether positions are under way: a message has begun, or INIT has been answered."""
        return len(self._incoming) > 0 or (self.asks_bead and self.state is State.READY)

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes from the server; give what they complete.

        Raises
        ------
        ProtocolError
            An unknown message, one that is out of turn, or an absurd length.
        """
        if self.state is State.CLOSED:
            return []
        if self.state is State.BROKEN:
            raise ProtocolError("bytes after an error")
        self._incoming.add(data)
        events: list[Event] = []
        try:
            while (name := self._incoming.name()) is not None:
                self._check(name)
                size = self._size(name)
                if size is None or len(self._incoming) < size:
                    break
                event = self._take(name, self._incoming.cut(size))
                self._move(name)
                if event is not None:
                    events.append(event)
                if self.state is State.CLOSED:
                    self._incoming.clear()
        except ProtocolError:
            self.state = State.BROKEN
            self._incoming.clear()
            raise
        return events

    def give_forces(self, answers: Sequence[Answer]) -> None:
        """Answer the positions received last, one answer for each structure.

        Raises
        ------
        ProtocolError
            No positions have come, or the answers are not of their number and size: i-PI hangs on those.
        """
        count, atoms = self._asked
        right = len(answers) == count and all(np.size(forces) == 3 * atoms for _, forces, _, _ in answers)
        if not right or not all(np.size(virial) == 9 for _, _, virial, _ in answers):
            raise ProtocolError(f"answers that are not {count} structures of {atoms} atoms")
        parts = [] if self._segments else _numbers(answers, atoms)
        for *_, extras in answers:
            text = extras.encode()
            parts += (int32(len(text)), text)
        self._give(b"".join((header("FORCEREADY"), *parts)))

    def _give(self, answer: bytes) -> None:
        if self.state is not State.COMPUTING:
            raise ProtocolError(f"forces given while {self.state.name}")
        self._answer = answer
        self.state = State.HAVEDATA
        owed, self._owed = self._owed, []
        for name in owed:
            self._check(name)
            self._take(name, b"")
            self._move(name)

    def _check(self, name: bytes) -> None:
        if (self.state, name) not in MOVES:
            state, self.state = self.state, State.BROKEN
            raise ProtocolError(f"{name!r} while {state.name}")

    def _move(self, name: bytes) -> None:
        self.state = MOVES[self.state, name]
        if name == b"GETFORCE" and self.state is State.READY and self.asks_bead:
            self.state = State.NEEDINIT

    def _size(self, name: bytes) -> int | None:
        """Length of the message that begins the buffer; None when that is not known yet."""
        if name == b"INIT":
            length = self._incoming.length(HEADER + 4, MAX_INIT, "an INIT string")
            return None if length is None else HEADER + 8 + length
        if name == b"POSDATA":
            return self._size_of_positions()
        return HEADER

    def _size_of_positions(self) -> int | None:
        batched = self.batch_size > 1 or self._segments
        at = HEADER if batched else HEADER + 144
        atoms = self._incoming.length(at, MAX_ATOMS // self.batch_size, "a list of atoms", least=1)
        if atoms is None:
            return None
        if not self._segments:
            return at + 4 + (self.batch_size * (144 + 24 * atoms) if batched else 24 * atoms)
        at += 4
        for _ in () if self._names else KINDS:
            length = self._incoming.length(at, MAX_NAME, "the name of a segment", least=1)
            if length is None:
                return None
            at += 4 + length
        return at

    def _take(self, name: bytes, body: bytes) -> Event | None:
        if self._answered:
            self._answered = False
            self._habit = self._habit + 1 if name == b"STATUS" else 0
            foreseen, self._foreseen = self._foreseen, False
            if foreseen:
                return self._foresaw(name)
        if self.state is State.COMPUTING and name in {b"STATUS", b"GETFORCE"}:
            if len(self._owed) == _MAX_OWED:
                raise ProtocolError(f"{_MAX_OWED + 1} questions before the first was answered")
            self._owed.append(name)
        elif name == b"STATUS":
            self.outgoing += header(self.state.name)
        elif name == b"INIT":
            self._bead = struct.unpack_from("<i", body)[0]
            self.batch_size = read_batch_size(body[8:].decode(errors="replace"))
        elif name == b"POSDATA":
            return self._positions(body)
        elif name == b"GETFORCE":
            self._send_answer()
        elif name == b"EXIT":
            return Exit()
        return None

    def _send_answer(self) -> None:
        self.outgoing += self._answer
        self._answer, self._answered = b"", True
        if self._habit >= _HABIT:
            self._foreseen = True
            self.outgoing += header((State.NEEDINIT if self.asks_bead else State.READY).name)

    def _foresaw(self, name: bytes) -> Exit | None:
        if name == b"EXIT":
            return Exit()
        if name != b"STATUS":
            raise ProtocolError(f"{name!r} after an answer, and not STATUS as before")
        return None

    def _positions(self, body: bytes) -> Positions | InSegments:
        count = self.batch_size
        if self._segments:
            atoms = struct.unpack_from("<i", body)[0]
            self._asked = (count, atoms)
            self._names = self._names or _segment_names(body[4:])
            return InSegments(self._bead, count, atoms, self._names)
        cells = np.frombuffer(body, "<f8", 18 * count, offset=0 if count == 1 else 4)
        positions = np.frombuffer(body, "<f8", offset=144 * count + 4).reshape(count, -1, 3)
        self._asked = positions.shape[:2]
        return Positions(self._bead, cells.reshape(count, 2, 3, 3)[:, 0], positions)


def _numbers(answers: Sequence[Answer], atoms: int) -> list[bytes | Array]:
    """Energies, atoms, forces, virials: the same order for one structure and for a batch of them."""
    return [
        struct.pack(f"<{len(answers)}d", *(energy for energy, *_ in answers)),
        int32(atoms),
        *(np.ascontiguousarray(forces, dtype="<f8") for _, forces, _, _ in answers),
        *(np.ascontiguousarray(virial, dtype="<f8") for _, _, virial, _ in answers),
    ]


def _segment_names(body: bytes) -> tuple[str, ...]:
    names = []
    for _ in KINDS:
        length = struct.unpack_from("<i", body)[0]
        names.append(body[4 : 4 + length].decode("ascii", errors="replace"))
        body = body[4 + length :]
    return tuple(names)
