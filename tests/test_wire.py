"""The wire, byte by byte and against i-PI's own end of it."""

import itertools
import random
import resource
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ipi.interfaces.sockets import Driver, Status
from wire_fuzz import fuzz

from nnqmd_server.doors.wire import (
    KINDS,
    MAX_BATCH,
    MAX_INIT,
    MAX_NAME,
    Conversation,
    Exit,
    InSegments,
    Positions,
    ProtocolError,
    State,
    header,
    int32,
)
from nnqmd_server.doors.wire_server import Asking, Forces, Request

H = np.arange(9.0).reshape(3, 3) + 10 * np.eye(3)
POSITIONS = np.random.default_rng(1).normal(size=(5, 3))


def script() -> bytes:
    init = header("INIT") + struct.pack("<ii", 6, 3) + b"a:1"
    posdata = (
        header("POSDATA")
        + H.tobytes()
        + np.linalg.inv(H).tobytes()
        + struct.pack("<i", 5)
        + POSITIONS.tobytes()
    )
    return header("STATUS") + init + header("STATUS") + posdata + header("GETFORCE")


def converse(pieces):
    talk, events = Conversation(), []
    for piece in pieces:
        events += talk.receive(piece)
    return talk, events


@pytest.mark.parametrize("size", [1, 2, 7, 12, 13, 100, 10_000])
def test_any_fragmentation_gives_the_same_events(size):
    data = script()
    talk, events = converse(data[k : k + size] for k in range(0, len(data), size))
    assert len(events) == 1
    assert events[0].bead == 6
    assert np.array_equal(events[0].h, [H])
    assert np.array_equal(events[0].positions, [POSITIONS])
    assert bytes(talk.outgoing) == header("NEEDINIT") + header("READY")
    talk.outgoing.clear()
    talk.give_forces([(1.5, POSITIONS * 2, H, "{}")])
    answer = bytes(talk.outgoing)
    assert answer[:12] == header("FORCEREADY")
    assert len(answer) == 12 + 8 + 4 + 24 * 5 + 72 + 4 + 2
    assert talk.receive(header("EXIT")) == [Exit()]


@pytest.mark.parametrize(
    "data",
    [
        header("GETFORCE"),
        header("HELLO"),
        b"GET / HTTP/1.1\r\n\r\n",
        header("STATUS") + header("POSDATA"),
        header("INIT") + struct.pack("<ii", 0, MAX_INIT + 1),
        header("INIT") + struct.pack("<ii", 0, -5),
        header("INIT") + struct.pack("<ii", 0, 0) + header("POSDATA") + bytes(144) + struct.pack("<i", -1),
        header("INIT")
        + struct.pack("<ii", 0, 0)
        + header("POSDATA")
        + bytes(144)
        + struct.pack("<i", 2**31 - 1),
        header("INIT") + struct.pack("<ii", 0, 13) + b"batch_size:-4",
        header("INIT") + struct.pack("<ii", 0, 14) + b"batch_size:abc",
        header("INIT") + struct.pack("<ii", 0, 20) + b"batch_size:123456789",
        header("INIT") + struct.pack("<ii", 0, 16) + b"batch_size:65536" + header("POSDATA") + int32(400),
        bytes(12),
        b" " * 12,
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(data):
    with pytest.raises(ProtocolError):
        Conversation().receive(data)


def test_forces_cannot_be_given_before_they_are_asked_for():
    with pytest.raises(ProtocolError):
        Conversation().give_forces([(0.0, np.zeros((1, 3)), np.zeros((3, 3)), "")])


def answer_in_thread(end, forces, seen):
    def run():
        talk = Conversation()
        with end:
            while data := end.recv(65536):
                for event in talk.receive(data):
                    if isinstance(event, Positions):
                        seen.append(event)
                        # i-PI before 3.2 asks STATUS meanwhile; both orders must work.
                        talk.give_forces([(-7.25, forces, H, '{"dipole": [1, 2, 3]}')])
                if talk.outgoing:
                    end.sendall(bytes(talk.outgoing))
                    talk.outgoing.clear()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("consolidated", [True, False])
def test_ipis_own_driver_class_gets_what_we_send(consolidated):
    """i-PI's server-side ``Driver`` on one end of a socket pair, our conversation on the other."""
    ours, theirs = socket.socketpair()
    forces, seen = POSITIONS * 3, []
    thread = answer_in_thread(ours, forces, seen)
    theirs.settimeout(5.0)
    driver = Driver(theirs)
    for bead in (4, 2):
        assert driver.get_status() == Status.Up | Status.NeedsInit
        driver.initialize(bead, "")
        assert driver.get_status() == Status.Up | Status.Ready
        if consolidated:
            h_ih = (H, np.linalg.inv(H))
            driver.sendall(
                b"POSDATA     "
                + h_ih[0].tobytes()
                + h_ih[1].tobytes()
                + np.int32(5).tobytes()
                + POSITIONS.tobytes()
                + b"GETFORCE    "
            )
            driver.status = Status.Up | Status.HasData
            energy, got, virial, extras = driver._recv_forces_bulk(5)
        else:
            driver.sendpos(POSITIONS.reshape(-1), (H, np.linalg.inv(H)))
            assert driver.get_status() == Status.Up | Status.HasData
            energy, got, virial, extras = driver.getforce()
        assert energy == -7.25
        assert np.array_equal(got.reshape(-1, 3), forces)
        assert np.array_equal(virial, H)
        assert list(extras["dipole"]) == [1, 2, 3]
    assert [event.bead for event in seen] == [4, 2]
    theirs.close()
    driver.close()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("length", [0, -1, MAX_NAME + 1])
def test_a_segment_name_of_absurd_length_is_refused(length):
    talk = Conversation(segments=True)
    talk.receive(header("INIT") + struct.pack("<ii", 0, 0))
    with pytest.raises(ProtocolError, match="segment"):
        talk.receive(header("POSDATA") + int32(5) + int32(length))


def test_after_an_error_nothing_more_is_taken():
    talk = Conversation()
    with pytest.raises(ProtocolError):
        talk.receive(b"GET / HTTP/1.1")
    assert talk.state is State.BROKEN
    for _ in range(3):
        with pytest.raises(ProtocolError):
            talk.receive(header("STATUS"))
    assert not talk.outgoing


@pytest.mark.parametrize(
    "owed", [["STATUS"] * 9, ["GETFORCE", "GETFORCE"], ["GETFORCE", "STATUS", "GETFORCE"]]
)
def test_questions_that_cannot_be_answered_are_refused(owed):
    talk = Conversation()
    with pytest.raises(ProtocolError):
        talk.receive(script() + b"".join(header(name) for name in owed))
        talk.give_forces([(0.0, POSITIONS, H, "")])


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [(0.0, POSITIONS[1:], H, "")],
        [(0.0, POSITIONS, H[1:], "")],
        [(0.0, POSITIONS, H, "")] * 2,
    ],
)
def test_answers_on_which_ipi_would_hang_are_refused(answers):
    talk = Conversation()
    talk.receive(script())
    with pytest.raises(ProtocolError, match="1 structures of 5 atoms"):
        talk.give_forces(answers)


def test_a_conversation_that_need_not_know_beads_asks_once():
    talk, _ = converse([script()])
    talk.asks_bead = False
    talk.outgoing.clear()
    talk.give_forces([(0.0, POSITIONS, H, "")])
    talk.outgoing.clear()
    talk.receive(header("STATUS"))
    assert bytes(talk.outgoing) == header("READY")


# (batch_size, consolidated, shared memory): every way in which a server may ask
WAYS = [(1, True, False), (1, False, False), (4, True, False), (MAX_BATCH, True, True), (1, True, True)]


def pieces(data, cuts):
    """The same bytes, cut at arbitrary places."""
    edges = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def exchange(way, atoms, requests, cuts):
    """Both roles against each other, their bytes cut at ``cuts``: what each side was told, and all bytes."""
    batch, consolidated, shared = way
    batch = min(batch, 5)
    names = tuple(f"seg_{kind}" for kind in KINDS) if shared else ()
    server, client = Asking(batch, consolidated, names), Conversation(segments=shared)
    random_numbers = np.random.default_rng(len(requests))
    told, got, spoken = [], [], bytearray()
    for bead, init in requests:
        h = random_numbers.normal(size=(batch, 3, 3)) + 9 * np.eye(3)
        sent = Request(bead, h, random_numbers.normal(size=(batch, atoms, 3)), init)
        answers = tuple(
            (float(k), sent.positions[k] * 2, sent.h[k] * 3, "x" * (k + bead % 3)) for k in range(batch)
        )
        server.ask(sent)
        while server.outgoing or client.outgoing:
            data, server.outgoing = bytes(server.outgoing), bytearray()
            for piece in pieces(data, cuts):
                for event in client.receive(piece):
                    told.append((sent, event))
                    client.give_forces(answers)
            spoken += data
            data, client.outgoing = bytes(client.outgoing), bytearray()
            for piece in pieces(data, cuts):
                got += [(answers, event) for event in server.receive(piece)]
            spoken += data
    server.exit()
    assert client.receive(bytes(server.outgoing)) == [Exit()]
    return told, got, bytes(spoken)


@settings(max_examples=150, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    atoms=st.integers(1, 6),
    requests=st.lists(st.tuples(st.integers(0, 99), st.text("ab :,", max_size=30)), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 3000), max_size=40),
)
def test_both_roles_understand_each_other_however_the_bytes_are_cut(way, atoms, requests, cuts):
    told, got, spoken = exchange(way, atoms, requests, cuts)
    assert len(told) == len(got) == len(requests)
    shared = way[2]
    for (sent, event), (bead, _) in zip(told, requests, strict=True):
        assert event.bead == bead
        if shared:
            assert event == InSegments(bead, len(sent.h), atoms, tuple(f"seg_{kind}" for kind in KINDS))
        else:
            assert np.array_equal(event.h, sent.h)
            assert np.array_equal(event.positions, sent.positions)
    for answers, forces in got:
        assert isinstance(forces, Forces)
        for mine, theirs in zip(answers, forces.answers, strict=True):
            assert mine[3] == theirs[3]
            if not shared:
                assert mine[0] == theirs[0]
                assert np.array_equal(mine[1], theirs[1])
                assert np.array_equal(mine[2], theirs[2])
    # One byte at a time and all at once say the same.
    assert exchange(way, atoms, requests, range(10_000))[2] == exchange(way, atoms, requests, [])[2] == spoken


def test_nothing_that_arrives_does_any_harm():
    """A short run of the fuzz target; the long one is marked slow."""
    tried = fuzz(random.Random(20), inputs=20_000)
    assert tried["refused"] > 1000
    assert tried["answered"] > 1000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_inputs_do_no_harm_and_leave_nothing_in_memory():
    def held():
        """Memory of this process [bytes]."""
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    fuzz(random.Random(0), inputs=20_000)
    before = held()
    tried = fuzz(random.Random(1), inputs=1_000_000)
    assert sum(tried.values()) == 1_000_000
    assert held() < before + 5_000_000


def test_status_is_answered_before_it_is_asked_once_that_is_a_habit():
    talk, _ = converse([script()])
    after = b""
    for _ in range(5):
        talk.outgoing.clear()
        talk.give_forces([(0.0, POSITIONS, H, "")])
        after = bytes(talk.outgoing)
        talk.outgoing.clear()
        talk.receive(header("STATUS"))
        said = bytes(talk.outgoing)
        talk.receive(script()[12:])  # INIT and all that follows
    assert after.endswith(header("NEEDINIT"))
    assert said == b""
    talk.give_forces([(0.0, POSITIONS, H, "")])
    with pytest.raises(ProtocolError, match="not STATUS as before"):
        talk.receive(script()[12:])


def test_a_server_without_that_habit_gets_no_more_than_it_asks_for():
    talk, _ = converse([script()])
    for _ in range(9):
        talk.outgoing.clear()
        talk.give_forces([(0.0, POSITIONS, H, "")])
        assert bytes(talk.outgoing).count(header("NEEDINIT")) == 0
        talk.receive(script()[12:])
