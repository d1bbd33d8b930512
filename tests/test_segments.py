"""Shared memory and padded batches, with our own small server on the other side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing import shared_memory

import numpy as np
import pytest
from springs import NUMBERS, SPRING, Springs

from nnqmd_server.doors.address import Address
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.segments import Segments
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.doors.wire import KINDS, InSegments
from nnqmd_server.doors.wire_server import Asking, Request
from nnqmd_server.errors import ProgramError

BATCH = 5
ATOMS = len(NUMBERS)
WIDTHS = {"pos": 3 * ATOMS, "h": 9, "ih": 9, "pot": 1, "force": 3 * ATOMS, "vir": 9}


@pytest.fixture
def owned():
    """The segments as i-PI makes them: (BATCH, ...) float64 each; name and array of every kind."""
    made, arrays = [], {}
    for kind in KINDS:
        name = f"nnqmd-test-{os.getpid()}-{kind}"
        made.append(shared_memory.SharedMemory(create=True, size=8 * BATCH * WIDTHS[kind], name=name))
        arrays[kind] = np.ndarray((BATCH, WIDTHS[kind]), np.float64, buffer=made[-1].buf)
    yield tuple(one.name for one in made), arrays
    arrays.clear()
    for one in made:
        one.close()
        one.unlink()


def test_what_is_attached_is_not_owned(owned):
    """Another process attaches, writes, and ends: the segments are still there."""
    names, arrays = owned
    code = f"""
import numpy as np
from nnqmd_server.doors.segments import Segments
from nnqmd_server.doors.wire import InSegments
segments = Segments(InSegments(0, {BATCH}, {ATOMS}, {names!r}))
segments.write([(k + 0.5, np.full(({ATOMS}, 3), k), np.eye(3), "") for k in range({BATCH})])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # the resource tracker would warn
    assert arrays["pot"][:, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert (arrays["force"] == np.arange(BATCH)[:, None]).all()
    shared_memory.SharedMemory(name=names[0]).close()


@pytest.mark.parametrize("spoil", ["missing", "small", "path"])
def test_segments_that_cannot_be_attached_are_named(owned, spoil):
    names, _ = owned
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    if spoil == "small":
        asked = InSegments(0, BATCH, ATOMS + 1000, names)
    else:
        asked = InSegments(0, BATCH, ATOMS, (*names[:5], "../etc/passwd" if spoil == "path" else "none"))
    with pytest.raises(ProgramError, match="shared"):
        Segments(asked)
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


@pytest.mark.parametrize("shared", [False, True])
def test_the_padding_of_a_batch_is_evaluated_once(owned, tmp_path, shared):
    """Three beads and two copies, then two beads and three: five structures, and five answers each time."""
    names, arrays = owned
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    listener.settimeout(20)
    client = Springs()
    door = SocketDoor(
        Address("shm" if shared else "unix", str(tmp_path / "s")), ForceSets(client, NUMBERS, 5)
    )
    thread = serve_in_thread(door)
    connection, _ = listener.accept()
    connection.settimeout(20)
    server = Asking(BATCH, segments=names if shared else ())
    rng = np.random.default_rng(4)
    beads, h = rng.normal(size=(5, ATOMS, 3)), np.stack([9 * np.eye(3)] * BATCH)
    for first, sent in ((0, beads[[0, 1, 2, 2, 2]]), (3, beads[[3, 4, 4, 4, 4]])):
        if shared:
            arrays["pos"][:], arrays["h"][:] = sent.reshape(BATCH, -1), h.reshape(BATCH, 9)
            arrays["force"][:] = 0.0
        server.ask(Request(first, h, sent))
        got = []
        while not got:
            connection.sendall(bytes(server.outgoing))
            server.outgoing.clear()
            got = server.receive(connection.recv(1 << 20))
        forces = arrays["force"] if shared else np.stack([f for _, f, _, _ in got[0].answers])
        assert forces.reshape(BATCH, ATOMS, 3) == pytest.approx(-SPRING * sent, rel=1e-9)
    assert client.calls == [3, 2]
    server.exit()
    connection.sendall(bytes(server.outgoing))
    thread.join(2)
    assert not thread.is_alive()
    assert door.failure is None
    listener.close()
    connection.close()
