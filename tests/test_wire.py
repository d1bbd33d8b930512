"""The wire, byte by byte and against i-PI's own end of it."""

import socket
import struct
import threading

import numpy as np
import pytest
from ipi.interfaces.sockets import Driver, Status

from nnqmd_server.doors.wire import MAX_INIT, Conversation, Exit, Positions, ProtocolError, header

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
    assert np.array_equal(events[0].h, H)
    assert np.array_equal(events[0].positions, POSITIONS)
    assert bytes(talk.outgoing) == header("NEEDINIT") + header("READY")
    talk.outgoing.clear()
    talk.give_forces(1.5, POSITIONS * 2, H, "{}")
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
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(data):
    with pytest.raises(ProtocolError):
        Conversation().receive(data)


def test_forces_cannot_be_given_before_they_are_asked_for():
    with pytest.raises(ProtocolError):
        Conversation().give_forces(0.0, np.zeros((1, 3)), np.zeros((3, 3)))


def answer_in_thread(end, forces, seen):
    def run():
        talk = Conversation()
        with end:
            while data := end.recv(65536):
                for event in talk.receive(data):
                    if isinstance(event, Positions):
                        seen.append(event)
                        # i-PI before 3.2 asks STATUS meanwhile; both orders must work.
                        talk.give_forces(-7.25, forces, H, '{"dipole": [1, 2, 3]}')
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
