"""Real i-PI runs through the socket doors, with springs instead of a model: every bit must be right."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from springs import (
    NUMBERS,
    POSITIONS,
    Springs,
    answer,
    direct_door,
    last_step,
    own_drivers,
    positions,
    spring_pool,
    start_ipi,
    wait_for,
    write_input,
)

from nnqmd_server.doors.address import free_socket, ipi_address, stale_socket
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.errors import AddressError
from nnqmd_server.units import BOHR

BEADS = 6
STEPS = 50
SETS = STEPS + 1
DRIVER = Path(sys.executable).parent / "i-pi-driver-py"
HARMONIC = """<ffdirect name='springs' threaded='False'> <pes>harmonic</pes>
    <parameters>{k1: 0.02}</parameters> </ffdirect>"""


def place(mode, tag=""):
    """An address of our own, and how an input names it."""
    name = f"nnqmd-{os.getpid()}-{mode}{tag}"
    port = 21000 + (os.getpid() * 7 + sum(map(ord, mode + tag))) % 20000
    if mode == "inet":
        named = f"<address>localhost</address><port>{port}</port>"
        return ipi_address("inet", "localhost", port), named
    return ipi_address(mode, name), f"<address>{name}</address>"


def force_field(mode, named, batch=1, more=""):
    batched = f"<batch_size>{batch}</batch_size>" if batch > 1 else ""
    return f"<ffsocket name='springs' mode='{mode}'>{named}{batched}{more}</ffsocket>"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of a run with the springs inside i-PI."""
    folder = tmp_path_factory.mktemp("own")
    ipi = start_ipi(write_input(folder, HARMONIC, BEADS, STEPS, POSITIONS, precise=True))
    assert ipi.wait(120) == 0
    return folder


@pytest.fixture(scope="module")
def expected(own):
    """Positions of every bead at every step, with the springs inside i-PI."""
    return positions(own, BEADS)


def assert_same_to_round_off(folder, own):
    """Units are converted there and back: the last bit of a force may differ, and 50 steps add that up."""
    for mine, theirs in zip(last_step(folder), last_step(own), strict=True):
        assert np.abs(mine - theirs).max() < 1e-12 * np.abs(theirs).max()


def test_the_direct_door_gives_the_same_trajectory(own, tmp_path):
    source = write_input(tmp_path, direct_door(BEADS), BEADS, STEPS, precise=True)
    with spring_pool(tmp_path / "pool") as pool:
        assert start_ipi(source, pool=pool.address).wait(60) == 0
        assert (pool.status().force_sets, pool.status().structures) == (SETS, BEADS * SETS)
    assert_same_to_round_off(tmp_path, own)


@pytest.mark.parametrize(
    ("mode", "batch", "told", "more"),
    [
        ("unix", 1, True, ""),
        ("unix", 1, False, ""),
        ("unix", 1, True, "<consolidate_messages>False</consolidate_messages>"),
        ("inet", 1, True, ""),
        ("unix", BEADS, True, ""),
        ("unix", 4, False, ""),
        pytest.param("inet", BEADS, False, "", marks=pytest.mark.slow),
        ("shm", BEADS, True, ""),
        pytest.param("shm", 1, True, "", marks=pytest.mark.slow),
    ],
)
def test_every_socket_gives_the_same_trajectory(expected, own, tmp_path, mode, batch, told, more):
    """To round-off, each structure computed once, every bead in its place."""
    address, named = place(mode)
    block = force_field(mode, named, batch, more)
    ipi = start_ipi(write_input(tmp_path, block, BEADS, STEPS, POSITIONS, precise=True))
    client, record = Springs(), tmp_path / "d.h5" if told else None
    answer(address, ipi, client, BEADS if told else None, batch if told else None, record)
    got = positions(tmp_path, BEADS)
    assert got == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert_same_to_round_off(tmp_path, own)
    # In the first force set all beads are where the first is: a batch cannot tell them from padding.
    same = 0 if batch == 1 else BEADS - 1
    assert BEADS * SETS - same <= sum(client.calls) <= BEADS * SETS
    if told:
        assert len(client.calls) <= 2 * SETS
        with h5py.File(record) as file:
            assert file["force_set"][:].tolist() == list(range(SETS))
            assert file["dipole"][:] / BOHR == pytest.approx(expected[:, :, 0], abs=2e-5)
    assert not list(Path("/dev/shm").glob(f"ipi_shm_{ipi.pid}_*"))


def test_beside_ipis_own_drivers_on_one_socket(expected, tmp_path):
    """Two of i-PI's drivers and our door share the beads of every step; nothing is lost or mixed up."""
    address, named = place("unix", "beside")
    ipi = start_ipi(write_input(tmp_path, force_field("unix", named), BEADS, STEPS, POSITIONS))
    wait_for(Path(address.path), ipi)
    drivers = own_drivers(DRIVER, ["-u", "-a", Path(address.path).name.removeprefix("ipi_")], 2)
    until = time.monotonic() + 30
    # i-PI waits half a second for more clients after each one; ours then come in time.
    while (tmp_path / "i-pi.log").read_text().count(
        "Handshaking was successful"
    ) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    client = Springs()
    try:
        answer(address, ipi, client, BEADS, 1)
        assert [driver.wait(10) for driver in drivers] == [0, 0]
    finally:
        for driver in drivers:
            driver.kill()
    assert positions(tmp_path, BEADS) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert 0 < sum(client.calls) < BEADS * SETS  # the drivers had the rest


def files_open():
    return sorted(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


@pytest.mark.parametrize(("mode", "batch"), [("unix", 1), ("unix", BEADS), ("inet", 1), ("shm", BEADS)])
@pytest.mark.parametrize("busy", [False, True])
def test_when_ipi_is_killed_the_door_ends_and_leaves_nothing(tmp_path, mode, batch, busy):
    address, named = place(mode, "kill")
    before = files_open(), threading.active_count()
    ipi = start_ipi(write_input(tmp_path, force_field(mode, named, batch), BEADS, 100_000))
    client = Springs(seconds=60.0 if busy else 0.0)
    door = SocketDoor(address, ForceSets(client, NUMBERS, BEADS), BEADS, batch, patience=30)
    thread = serve_in_thread(door)
    until = time.monotonic() + 30
    while not (door._lines and (busy or len(client.calls) > 20)) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1.0 if busy else 0.0)
    assert thread.is_alive()
    ipi.send_signal(signal.SIGKILL)
    ipi.wait()
    thread.join(2.0)
    assert not thread.is_alive()
    assert door.failure is None
    assert client.closed == 1
    assert (files_open(), threading.active_count()) == before
    if mode == "inet":
        return
    path = Path(address.path)
    assert stale_socket(path)
    with pytest.raises(AddressError, match="left behind by an i-PI that was killed") as error:
        free_socket(path)
    assert "--remove-stale" in error.value.fix
    free_socket(path, remove_stale=True)
    assert not path.exists()
    until = time.monotonic() + 5  # i-PI's own resource tracker removes its segments
    while list(Path("/dev/shm").glob(f"ipi_shm_{ipi.pid}_*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert not list(Path("/dev/shm").glob(f"ipi_shm_{ipi.pid}_*"))
