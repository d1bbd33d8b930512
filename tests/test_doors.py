"""Forces through each door, with i-PI's own code on the other side, against the model called directly."""

from __future__ import annotations

import json
import os
import socket
import struct
import time

import h5py
import numpy as np
import pytest
from ase.calculators.socketio import SocketIOCalculator
from conftest import INPUT, triclinic
from ipi.interfaces.sockets import Driver, Status
from springs import Springs

from nnqmd_server.doors.address import ipi_address, parse_address, stale_socket
from nnqmd_server.doors.direct import NnqmdPES
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.doors.template import read_numbers
from nnqmd_server.errors import AddressError, InputError, StructureError
from nnqmd_server.pool.client import GivenUpError, PoolClient
from nnqmd_server.structures import from_ase
from nnqmd_server.units import BOHR, HARTREE

BEADS = 5


@pytest.fixture(scope="module")
def beads():
    return [triclinic(shake=0.03, seed=k) for k in range(BEADS)]


@pytest.fixture(scope="module")
def expected(potential, beads):
    return potential.evaluate(from_ase(beads))


@pytest.fixture
def template(tmp_path, beads):
    path = tmp_path / "init.xyz"
    path.write_text("16\n\n" + "\n".join(f"{s} 0 0 0" for s in beads[0].get_chemical_symbols()) + "\n")
    return path


def as_ipi_sends(atoms):
    """Cell matrix (vectors as columns) and flat positions, in bohr."""
    return atoms.cell.array.T / BOHR, atoms.positions.reshape(-1) / BOHR


def assert_same(answers, expected):
    for k, (energy, forces, virial, *_) in enumerate(answers):
        assert energy * HARTREE == pytest.approx(expected.energy[k], abs=1e-6)
        mine = expected.forces.reshape(len(expected), -1, 3)[k]
        assert np.reshape(forces, (-1, 3)) * HARTREE / BOHR == pytest.approx(mine, abs=1e-6)
        assert virial * HARTREE == pytest.approx(expected.virial[k], abs=1e-6)


def test_the_direct_door_gives_the_models_forces(pool, beads, expected, template, tmp_path):
    record = tmp_path / "d.h5"
    pes = NnqmdPES(template=str(template), pool=pool.address, dipoles=str(record), extras="dipole")
    sent = [as_ipi_sends(atoms) for atoms in beads]
    answers = pes([h for h, _ in sent], [q for _, q in sent])
    assert_same(answers, expected)
    for k, (*_, extras) in enumerate(answers):
        assert np.array(json.loads(extras)["dipole"]) * BOHR == pytest.approx(
            expected.properties["dipole"][k], abs=1e-6
        )
    pes._sets.close()
    with h5py.File(record) as file:
        assert file["dipole"].shape == (1, BEADS, 3)
        assert file["dipole"].attrs["unit"] == "e Angstrom"
        assert file["dipole"][0] == pytest.approx(expected.properties["dipole"], abs=1e-6)
        assert file["energy"][0] == pytest.approx(expected.energy, abs=1e-6)
        assert file["cell"][0] == pytest.approx(beads[0].cell.array, abs=1e-9)


def ask_as_ipi_does(driver, bead, atoms):
    """What i-PI's poll thread does for one request in its default (consolidated) mode."""
    status = driver.get_status()
    if status & Status.NeedsInit:
        driver.initialize(bead, "")
        status = driver.get_status()
    assert status == Status.Up | Status.Ready
    h, q = as_ipi_sends(atoms)
    head = h.tobytes() + np.linalg.inv(h).tobytes() + struct.pack("<i", len(atoms))
    driver.sendall(b"POSDATA     " + head + q.tobytes() + b"GETFORCE    ")
    driver.status = Status.Up | Status.HasData


@pytest.mark.parametrize("mode", ["unix", "inet"])
def test_the_socket_door_gives_the_models_forces(pool, beads, expected, template, tmp_path, mode):
    if mode == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "ipi"))
        address = ipi_address("unix", str(tmp_path / "ipi"))
    else:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        address = ipi_address("inet", "127.0.0.1", listener.getsockname()[1])
    listener.listen(2)
    listener.settimeout(20)
    record = tmp_path / "d.h5"
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(template), BEADS, record, ["dipole"])
    door = SocketDoor(address, sets, BEADS, batch_size=1)
    thread = serve_in_thread(door)
    drivers = []
    for _ in range(BEADS):
        connection, _ = listener.accept()
        connection.settimeout(20)
        drivers.append(Driver(connection))
        drivers[-1].get_status()  # i-PI greets each client before it accepts the next
    before = pool.status()
    for order in (range(BEADS), [3, 1, 4, 0, 2]):  # beads need not meet the same connection again
        for driver, bead in zip(drivers, order, strict=True):
            ask_as_ipi_does(driver, bead, beads[bead])
        answers = {bead: driver._recv_forces_bulk(16) for driver, bead in zip(drivers, order, strict=True)}
        assert_same([answers[bead] for bead in range(BEADS)], expected)
    after = pool.status()
    assert after.structures - before.structures == 2 * BEADS  # nothing was computed twice
    for driver in drivers:
        driver.sendall(b"EXIT        ")
        driver.close()
    thread.join(10)
    assert not thread.is_alive()
    assert door.failure is None
    listener.close()
    with h5py.File(record) as file:
        for row in range(2):
            assert file["dipole"][row] == pytest.approx(expected.properties["dipole"], abs=1e-6)


def test_a_part_of_a_force_set_is_not_kept_waiting(pool, beads, expected, template, tmp_path):
    """i-PI may send some beads, and the rest only when those are answered."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "ipi"))
    listener.listen(4)
    listener.settimeout(20)
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(template), BEADS)
    door = SocketDoor(ipi_address("unix", str(tmp_path / "ipi")), sets, BEADS, batch_size=1)
    thread = serve_in_thread(door)
    drivers = []
    for _ in range(BEADS):
        connection, _ = listener.accept()
        connection.settimeout(20)
        drivers.append(Driver(connection))
        drivers[-1].get_status()
        connection.close()  # i-PI's Driver holds a duplicate
    for part in ([0, 1], [2, 3, 4]):
        for bead in part:
            ask_as_ipi_does(drivers[bead], bead, beads[bead])
        for bead in part:
            energy, *_ = drivers[bead]._recv_forces_bulk(16)
            assert energy * HARTREE == pytest.approx(expected.energy[bead], abs=1e-6)
    for driver in drivers:  # i-PI is killed: end of file, no EXIT
        driver.close()
    thread.join(10)
    assert not thread.is_alive()
    assert door.failure is None
    listener.close()


@pytest.mark.parametrize("mode", ["unix", "inet"])
def test_ases_socket_calculator_gets_forces_stress_and_extras(pool, beads, expected, template, mode):
    """Another server of the classic protocol: it sends every number on its own and asks STATUS each time."""
    name, port = f"nnqmd-ase-{os.getpid()}", 22000 + os.getpid() % 20000
    where = {"unixsocket": name} if mode == "unix" else {"port": port}
    address = ipi_address(mode, name if mode == "unix" else "localhost", port)
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(template), None, extras=["dipole"])
    with SocketIOCalculator(timeout=20, **where) as calculator:
        thread = serve_in_thread(door := SocketDoor(address, sets))
        for _ in range(2):  # more than the number of answers after which habits are relied on
            for k, atoms in enumerate(beads):
                atoms = atoms.copy()
                atoms.calc = calculator
                # ASE has the hartree of CODATA 2014.
                assert atoms.get_potential_energy() == pytest.approx(expected.energy[k], rel=2e-8)
                mine = expected.forces.reshape(BEADS, -1, 3)[k]
                assert atoms.get_forces() == pytest.approx(mine, abs=1e-5)
                stress = -expected.virial[k] / atoms.get_volume()
                assert atoms.get_stress(voigt=False) == pytest.approx(stress, abs=1e-7)
        extras = json.loads(calculator.server.calculate(beads[3])["morebytes"].tobytes())
        assert np.array(extras["dipole"]) * BOHR == pytest.approx(expected.properties["dipole"][3], abs=1e-5)
    thread.join(2)
    assert not thread.is_alive()
    assert door.failure is None


def test_something_that_is_not_ipi_is_named(pool, template):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(template), 1)
    door = SocketDoor(ipi_address("inet", "127.0.0.1", listener.getsockname()[1]), sets, 1)
    thread = serve_in_thread(door)
    connection, _ = listener.accept()
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
    thread.join(10)
    assert "does not speak as i-PI does" in str(door.failure)
    connection.close()
    listener.close()


def test_forces_that_nobody_waits_for_are_given_up(tmp_path, beads):
    client, began = PoolClient(f"ipc://{tmp_path}/none", 60), time.monotonic()
    with pytest.raises(GivenUpError):
        client.submit(from_ase(beads[:1]), given_up=lambda: True)
    client.close()
    assert time.monotonic() - began < 1.5


def test_a_server_that_asks_for_the_impossible_is_named(tmp_path, template):
    """Two GETFORCE for one structure: noticed only when the forces are there."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "ipi"))
    listener.listen(1)
    sets = ForceSets(Springs(), read_numbers(template), 1)
    door = SocketDoor(ipi_address("unix", str(tmp_path / "ipi")), sets, 1, 1)
    thread = serve_in_thread(door)
    connection, _ = listener.accept()
    init = b"INIT".ljust(12) + struct.pack("<ii", 0, 0)
    h = 9 * np.eye(3)
    body = h.tobytes() + h.tobytes() + struct.pack("<i", 16) + bytes(24 * 16)
    connection.sendall(init + b"POSDATA".ljust(12) + body + 2 * b"GETFORCE".ljust(12))
    thread.join(5)
    assert "does not speak as i-PI does" in str(door.failure)
    connection.close()
    listener.close()


def test_nobody_listening_is_an_error_in_bounded_time(pool, template, tmp_path):
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(template), 1)
    door = SocketDoor(ipi_address("unix", str(tmp_path / "none")), sets, 1, patience=0.3)
    door.run()
    assert "Nobody has listened" in str(door.failure)


def test_a_stale_socket_is_told_from_a_live_one(tmp_path):
    path = tmp_path / "s"
    live = socket.socket(socket.AF_UNIX)
    live.bind(str(path))
    live.listen(1)
    assert not stale_socket(path)
    live.close()
    assert stale_socket(path)
    assert not stale_socket(tmp_path / "none")


@pytest.mark.parametrize("text", ["nh3", "unix:", "inet:host", "inet:host:port", "tcp:host:1"])
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(AddressError, match="unix:NAME"):
        parse_address(text)


def test_addresses():
    assert parse_address("unix:nh3").path == "/tmp/ipi_nh3"
    assert parse_address("inet:localhost:31415").port == 31415


def test_templates(tmp_path):
    assert read_numbers(INPUT.parent / "init.xyz").tolist() == [7, 1, 1, 1] * 16
    heavy = tmp_path / "heavy.xyz"
    heavy.write_text("2\n\nN 0 0 0\nD 1 0 0\n")
    assert read_numbers(heavy).tolist() == [7, 1]
    for text in ("two\n\nN 0 0 0\n", "3\n\nN 0 0 0\n", "1\n\nXx 0 0 0\n", ""):
        heavy.write_text(text)
        with pytest.raises(InputError):
            read_numbers(heavy)


def test_a_template_of_another_size_is_named(pool, template, beads):
    small = template.with_name("small.xyz")
    small.write_text("2\n\nN 0 0 0\nH 1 0 0\n")
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(small), 1)
    h, q = as_ipi_sends(beads[0])
    with pytest.raises(InputError, match="16 atoms, the template has 2"):
        sets.evaluate([h], [q])
    sets.close()


def test_structures_that_cannot_be_evaluated_are_kept_with_bead_and_force_set(
    pool, beads, template, tmp_path
):
    """Two atoms in one place: the model's forces are none that a simulation may have."""
    from ase.io import read

    kept = tmp_path / "quarantine.extxyz"
    sets = ForceSets(PoolClient(pool.address, 60), read_numbers(template), BEADS, quarantine=kept)
    sent = [as_ipi_sends(atoms) for atoms in beads]
    ids = [range(k, k + 1) for k in range(10, 15)]
    sets.evaluate([h for h, _ in sent], [q for _, q in sent], ids)
    broken = sent[3][1].copy()
    broken[3:6] = broken[0:3]
    with pytest.raises(StructureError, match=r"bead 13 of force set 1; kept in .*quarantine.extxyz"):
        sets.evaluate(
            [h for h, _ in sent],
            [q if k != 3 else broken for k, (_, q) in enumerate(sent)],
            ids,
        )
    sets.close()
    (frame,) = read(kept, ":")
    assert (frame.info["bead"], frame.info["force_set"]) == (13, 1)
    assert frame.positions.reshape(-1) == pytest.approx(broken * BOHR, abs=1e-7)
    assert np.linalg.norm(frame.positions[1] - frame.positions[0]) < 1e-6
