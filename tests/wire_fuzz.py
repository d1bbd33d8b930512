"""Bytes that no i-PI would send, by the million: only our own error, and no memory kept."""

from __future__ import annotations

import random
import struct
from collections import Counter

import numpy as np

from nnqmd_server.doors.wire import (
    KINDS,
    Conversation,
    Exit,
    InSegments,
    ProtocolError,
    State,
    header,
    int32,
)

MOST_KEPT = 1 << 16
"""Bytes that a conversation may hold after messages that announce no more than that."""


REQUEST = ("STATUS", "INIT", "STATUS", "POSDATA", "GETFORCE")
ANYTHING = (*REQUEST, "EXIT")


def message(rng: random.Random, kind: str, batch: int, shared: bool) -> bytes:
    """A message as i-PI sends it."""
    if kind == "INIT":
        text = f"a : 1, batch_size:{batch}".encode() if batch > 1 else b"x"
        return header(kind) + struct.pack("<ii", rng.randrange(99), len(text)) + text
    if kind != "POSDATA":
        return header(kind)
    atoms = rng.randrange(1, 4)
    if shared:
        named = b"".join(int32(len(name)) + name.encode() for name in KINDS)
        return header(kind) + int32(atoms) + (named if rng.random() < 0.5 else b"")
    cells, positions = rng.randbytes(144 * batch), rng.randbytes(24 * atoms * batch)
    return header(kind) + (
        int32(atoms) + cells + positions if batch > 1 else cells + int32(atoms) + positions
    )


def spoil(rng: random.Random, data: bytes) -> bytes:
    """The same bytes, some of them lost, doubled, changed or made up."""
    data = bytearray(data)
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(4)
        if what == 0:
            data[at : at + rng.randrange(30)] = b""
        elif what == 1:
            data[at:at] = rng.randbytes(rng.randrange(1, 30))
        elif what == 2 and at < len(data):
            data[at] = rng.randrange(256)
        else:
            data[at : at + 4] = int32(rng.choice((-1, 0, 1, 2**31 - 1, -(2**31), 65536)))
    return bytes(data)


def once(rng: random.Random) -> str:
    """One conversation with a server that has gone mad; how it ended."""
    shared, batch = rng.random() < 0.3, rng.choice((1, 1, 1, 2, 3))
    talk = Conversation(asks_bead=rng.random() < 0.5, segments=shared)
    said = list(REQUEST) * rng.randrange(3) + rng.choices(ANYTHING, k=rng.randrange(4))
    data = b"".join(message(rng, kind, batch, shared) for kind in said)
    if rng.random() < 0.7:
        data = spoil(rng, data)
    ended = "silent"
    try:
        while data:
            size = rng.choice((1, 5, 12, 100, len(data)))
            piece, data = data[:size], data[size:]
            events = talk.receive(piece)
            if Exit() in events:
                assert talk.state is State.CLOSED
                assert talk.receive(data) == []
                return "left"
            for event in events:
                count, atoms = (
                    (event.n_structures, event.n_atoms)
                    if isinstance(event, InSegments)
                    else event.positions.shape[:2]
                )
                ended = "answered"
                if count * atoms < 1000:
                    talk.give_forces([(0.0, np.zeros((atoms, 3)), np.zeros((3, 3)), "")] * count)
            assert len(talk.outgoing) < MOST_KEPT
            talk.outgoing.clear()
    except ProtocolError:
        return "refused"
    assert len(talk._incoming) < MOST_KEPT
    return ended


def fuzz(rng: random.Random, inputs: int) -> Counter:
    """Try so many inputs; how many ended in which way. Any exception but ours goes through."""
    return Counter(once(rng) for _ in range(inputs))
