"""How a run ends, or goes on, when something stops under a real i-PI: never a hang, never a lost RESTART."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ase.io import read
from conftest import INPUT, ROOT
from spring_potential import Marked
from springs import (
    NUMBERS,
    POSITIONS,
    Springs,
    direct_door,
    positions,
    spring_pool,
    start_ipi,
    write_input,
)
from test_faults import alive, children, ends_within
from test_sockets import force_field, place

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.ipi_process import listener_of, stop_softly, wrote_restart
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.errors import PoolError, StructureError
from nnqmd_server.inputs.xml import read_input
from nnqmd_server.pool.client import PoolClient


def slow(*values):
    """One of the cases of a test that are left to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)


BEADS, STEPS = 4, 40
LONG = 100_000
HARMONIC = """<ffdirect name='springs'> <pes>harmonic</pes> <parameters>{k1: 0.02}</parameters> </ffdirect>"""
SOURCE = f"{Path(__file__).parent}/spring_potential.py:springs"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Positions of every bead at every step, with the springs inside i-PI."""
    folder = tmp_path_factory.mktemp("own")
    assert start_ipi(write_input(folder, HARMONIC, BEADS, STEPS, POSITIONS)).wait(60) == 0
    return positions(folder, BEADS)


def assert_same(folder, expected):
    assert positions(folder, BEADS) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def until(condition, seconds=20.0):
    """Wait for something, not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def ended(ipi, seconds):
    """Exit status of an i-PI; one that hangs is killed and fails the test."""
    try:
        return ipi.wait(seconds)
    except subprocess.TimeoutExpired:
        ipi.kill()
        ipi.wait()
        pytest.fail(f"i-PI did not end within {seconds} s")


def steps_of(folder):
    out = folder / "run.out"
    return len(out.read_text().splitlines()) if out.exists() else 0


# ---- a door that closes


@pytest.mark.parametrize(
    ("mode", "batch"), [("unix", 1), slow("inet", 1), slow("unix", BEADS), slow("shm", BEADS)]
)
def test_after_a_door_has_closed_another_one_goes_on(expected, tmp_path, mode, batch):
    """Even when it closes with i-PI's words unread: a reset connection kills the poll thread of i-PI 3.3."""
    address, named = place(mode, f"again{batch}")
    ipi = start_ipi(write_input(tmp_path, force_field(mode, named, batch), BEADS, STEPS, POSITIONS))
    first = Springs()
    door = SocketDoor(address, ForceSets(first, NUMBERS, BEADS), BEADS, batch, patience=30)
    listen = door._read
    door._read = lambda wait: listen(wait) if len(first.calls) < 10 else time.sleep(wait or 0.01)
    thread = serve_in_thread(door)
    until(lambda: len(first.calls) >= 10)
    time.sleep(0.3)  # i-PI has sent the next beads, and nobody has read them
    door.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert door.failure is None
    assert door.left_waiting
    second = SocketDoor(address, ForceSets(Springs(), NUMBERS, BEADS), BEADS, batch, patience=30)
    thread = serve_in_thread(second)
    assert ended(ipi, 20) == 0
    thread.join(5)
    assert_same(tmp_path, expected)


class Failing(Springs):
    """A pool that fails for good after some force sets."""

    def submit(self, structures, given_up=None):
        if sum(self.calls) >= 10 * BEADS:
            raise PoolError("All workers have ended.", "See the logs.")
        return super().submit(structures, given_up)


@pytest.mark.parametrize(
    ("mode", "batch", "here"),
    [slow("unix", 1, True), ("inet", BEADS, True), slow("shm", BEADS, True), ("unix", BEADS, False)],
)
def test_an_ipi_whose_door_has_failed_is_stopped_softly(tmp_path, mode, batch, here):
    """Where its process is known by one SIGTERM; elsewhere the message says how, and that works."""
    address, named = place(mode, f"fail{batch}{here}")
    source = write_input(tmp_path, force_field(mode, named, batch), BEADS, LONG, safe_stride=1)
    ipi = start_ipi(source)
    door = SocketDoor(address, ForceSets(Failing(), NUMBERS, BEADS), BEADS, batch, patience=30)
    door.run()
    assert "All workers have ended" in door.failure.what
    assert door.left_waiting
    assert door.ipi.pid == ipi.pid
    if here:
        threading.Thread(target=ipi.wait, daemon=True).start()  # it is our child
        assert f"{tmp_path}/RESTART was written" in stop_softly(door.ipi)
    else:
        said = stop_softly(None)
        assert "touch EXIT" in said
        (tmp_path / "EXIT").touch()
    assert ended(ipi, 10) == 0
    assert wrote_restart(tmp_path, time.time() - 20)
    assert read_input(tmp_path / "RESTART").first_step >= 5
    text = (tmp_path / "i-pi.log").read_text()
    assert text.count("Kill signal. Trying") == (1 if here else 0)


def test_a_server_that_does_not_handle_sigterm_is_left_alone():
    import psutil

    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.3)
        assert "left alone" in stop_softly(psutil.Process(server.pid))
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


def test_the_listener_of_a_socket_of_our_own_is_nobody():
    import socket

    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())
        assert listener_of(client) is None


class Wrong(Springs):
    def submit(self, structures, given_up=None):
        raise KeyError("a bug of ours")


def test_a_bug_of_ours_is_told_and_leaves_a_restart_over_a_socket(tmp_path):
    address, named = place("unix", "bug")
    ipi = start_ipi(write_input(tmp_path, force_field("unix", named, BEADS), BEADS, LONG))
    door = SocketDoor(address, ForceSets(Wrong(), NUMBERS, BEADS), BEADS, BEADS, patience=30)
    door.run()
    assert "The socket door failed: KeyError: 'a bug of ours'" in door.failure.what
    threading.Thread(target=ipi.wait, daemon=True).start()
    assert "RESTART was written" in stop_softly(door.ipi)
    assert ended(ipi, 5) == 0


@pytest.mark.slow
def test_a_bug_of_ours_is_told_and_leaves_a_restart_through_the_direct_door(tmp_path):
    with spring_pool(tmp_path / "pool") as pool:
        ipi = start_ipi(
            write_input(tmp_path, direct_door(BEADS), BEADS, LONG, safe_stride=1),
            pool=pool.address,
            pes="import nnqmd_server.doors.force_sets as sets\nsets.from_results = lambda *_: 1 / 0\n",
        )
        assert ended(ipi, 20) == 0
    text = (tmp_path / "i-pi.log").read_text()
    assert "nnqmd: The direct door failed: ZeroDivisionError: division by zero" in text
    assert wrote_restart(tmp_path, time.time() - 20)


# ---- which bead, which force set


@pytest.mark.parametrize(
    ("mode", "batch", "told"),
    [
        ("direct", BEADS, True),
        slow("unix", 1, True),
        ("unix", 1, False),
        slow("unix", BEADS, True),
        slow("shm", BEADS, False),
        slow("inet", 3, False),
    ],
)
def test_the_quarantine_tells_the_bead_and_the_force_set(expected, tmp_path, mode, batch, told):
    """However the force sets come: in parts, padded, or with beads that are all in one place at first."""
    bead, step = 2, 9
    potential = Marked(expected[step, bead])
    kept = tmp_path / "quarantine.extxyz"
    with spring_pool(tmp_path / "pool", evaluate=potential.evaluate) as pool:
        if mode == "direct":
            ipi = start_ipi(write_input(tmp_path, direct_door(BEADS), BEADS, STEPS), pool=pool.address)
        else:
            address, named = place(mode, f"q{batch}{told}")
            ipi = start_ipi(write_input(tmp_path, force_field(mode, named, batch), BEADS, STEPS))
            sets = ForceSets(PoolClient(pool.address, 10), NUMBERS, BEADS if told else None, quarantine=kept)
            door = SocketDoor(address, sets, BEADS if told else None, batch if told else None, patience=30)
            door.run()
            assert isinstance(door.failure, StructureError)
            assert "charge that is not finite" in door.failure.what
            assert f"bead {bead} of force set {step}" in door.failure.what
            ipi.terminate()
        assert ended(ipi, 20) == 0
    (frame,) = read(kept, ":")
    assert (frame.info["bead"], frame.info["force_set"]) == (bead, step)


# ---- a pool that is restarted, or hangs


@pytest.mark.parametrize("mode", ["direct", slow("unix")])
def test_a_pool_may_be_restarted_under_a_run(expected, tmp_path, mode):
    """The trajectory is that of a run that was never interrupted."""
    address, named = place("unix", f"restart{mode}")
    home = f"ipc://{tmp_path}/doors"
    slow = {"delay": 0.01}
    with spring_pool(tmp_path / "one", home, **slow) as pool:
        if mode == "direct":
            ipi = start_ipi(write_input(tmp_path, direct_door(BEADS), BEADS, STEPS, POSITIONS), pool=home)
            thread = None
        else:
            source = write_input(tmp_path, force_field("unix", named, BEADS), BEADS, STEPS, POSITIONS)
            ipi = start_ipi(source)
            door = SocketDoor(address, ForceSets(PoolClient(home, 30), NUMBERS, BEADS), BEADS, BEADS)
            thread = serve_in_thread(door)
        until(lambda: pool.status().force_sets > 10)
        vanish(pool)
    with spring_pool(tmp_path / "two", home, **slow) as pool:
        assert ended(ipi, 30) == 0, (tmp_path / "i-pi.log").read_text()
        assert 0 < pool.status().force_sets < STEPS
    if thread:
        thread.join(5)
        assert door.failure is None
    assert_same(tmp_path, expected)


def vanish(pool):
    """As after kill -9: the pool says nothing to those who wait."""
    pool._fail_all = lambda *_: None


def hang(answer):
    return None


@pytest.mark.parametrize(
    ("mode", "how"),
    [("direct", "EXIT"), slow("direct", "SIGTERM"), slow("unix", "EXIT"), ("unix", "SIGTERM")],
)
def test_ipi_can_be_stopped_while_a_worker_hangs(tmp_path, mode, how):
    """Through the direct door at once; a socket door is told by whoever stops it, as `nnqmd run` does."""
    address, named = place("unix", f"hang{how}")
    good = []

    def spoil(answer):
        good.append(1)
        return answer if len(good) < 10 else None

    with spring_pool(tmp_path / "pool", spoil=spoil) as pool:
        if mode == "direct":
            source = write_input(tmp_path, direct_door(BEADS), BEADS, LONG, safe_stride=1)
            ipi = start_ipi(source, pool=pool.address)
        else:
            source = write_input(tmp_path, force_field("unix", named, BEADS), BEADS, LONG, safe_stride=1)
            ipi = start_ipi(source)
            door = SocketDoor(address, ForceSets(PoolClient(pool.address), NUMBERS, BEADS), BEADS, BEADS)
            thread = serve_in_thread(door)
        until(lambda: len(good) >= 10)
        time.sleep(0.2)
        if how == "EXIT":
            (tmp_path / "EXIT").touch()
        else:
            ipi.terminate()
        if mode == "unix":
            door.stop()
            thread.join(5)
            assert not thread.is_alive()
        assert ended(ipi, 6) == 0, (tmp_path / "i-pi.log").read_text()
    assert wrote_restart(tmp_path, time.time() - 20)
    assert read_input(tmp_path / "RESTART").first_step >= 4
    assert "Traceback" not in (tmp_path / "i-pi.log").read_text()


@pytest.mark.slow
def test_a_hanging_worker_behind_a_socket_is_waited_for_no_longer_than_the_patience(tmp_path):
    address, named = place("unix", "patience")
    ipi = start_ipi(write_input(tmp_path, force_field("unix", named, BEADS), BEADS, LONG, safe_stride=1))
    with spring_pool(tmp_path / "pool", spoil=hang) as pool:
        door = SocketDoor(address, ForceSets(PoolClient(pool.address, 2.0), NUMBERS, BEADS), BEADS, BEADS)
        began = time.monotonic()
        door.run()
        assert time.monotonic() - began < 10
    assert "has not answered for 2 s" in door.failure.what
    threading.Thread(target=ipi.wait, daemon=True).start()
    assert "RESTART was written" in stop_softly(door.ipi)


# ---- `nnqmd serve` as a process of its own


@pytest.fixture
def nnqmd(tmp_path):
    """Start the command line as a process of its own; the process, and the file with its output."""
    started = []

    def start(*words, tag="", **settings):
        out = tmp_path / f"{words[0]}{tag}.out"
        with out.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", "from nnqmd_server.cli import main; main()", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
                    "TMPDIR": str(tmp_path),
                    **settings,
                },
            )
        started.append(process)
        return process, out

    yield start
    for process in started:
        for pid in children(process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


@pytest.fixture
def serve(nnqmd, tmp_path):
    """Start `nnqmd serve` with one worker that has the springs."""
    one = ["--workers", "1", "--device", "cpu", "--address", f"ipc://{tmp_path}/pool/s", "--logs", "logs"]
    return lambda *options, **settings: nnqmd("serve", SOURCE, *one, *options, **settings)


def socket_of(where):
    return ["--socket", str(where).replace("/tmp/ipi_", ""), "--template", str(INPUT.parent / "init.xyz")]


def left_over(folder):
    """Sockets of ours that are still there."""
    return [path for path in folder.rglob("*") if path.is_socket()] + list(folder.glob("nnqmd-*/*"))


def test_workers_that_die_under_serve_end_ipi_with_a_restart(serve, tmp_path):
    address, named = place("unix", "serve")
    home = tmp_path / "run"
    ipi = start_ipi(write_input(home, force_field("unix", named, BEADS), BEADS, LONG, safe_stride=1))
    process, out = serve(*socket_of(address), "--restarts", "0")
    until(lambda: steps_of(home) > 20, 40)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    threading.Thread(target=ipi.wait, daemon=True).start()
    assert process.wait(15) == 1
    assert ended(ipi, 1) == 0
    text = " ".join(out.read_text().split())
    assert "All workers have ended" in text
    assert f"i-PI was asked to stop: {home}/RESTART was written." in text
    assert "Traceback" not in text
    assert not Path(address.path).exists()
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("busy", [slow(False), True])
def test_when_ipi_is_killed_serve_and_its_workers_end_within_two_seconds(serve, tmp_path, busy):
    address, named = place("unix", f"orphan{busy}")
    home = tmp_path / "run"
    ipi = start_ipi(write_input(home, force_field("unix", named, BEADS), BEADS, LONG))
    process, out = serve(*socket_of(address), SPRING_SECONDS="60" if busy else "0")
    if busy:
        until(lambda: "Handshaking was successful" in (home / "i-pi.log").read_text(), 40)
        time.sleep(0.5)
    else:
        until(lambda: steps_of(home) > 20, 40)
    family = [process.pid, *children(process.pid)]
    assert len(family) == 2, out.read_text()
    ipi.kill()
    ipi.wait()
    killed = time.monotonic()
    process.wait(10)
    assert ends_within(max(0.0, 2.0 - (time.monotonic() - killed)), family)
    assert time.monotonic() - killed < 2.0
    assert left_over(tmp_path) == []
    if not busy:  # i-PI's own socket, which it leaves when it is killed, is named
        _, out = serve(*socket_of(address), tag="again")
        until(lambda: f"{address.path} was left behind by a killed i-PI" in out.read_text(), 20)
    Path(address.path).unlink()


def test_exit_over_a_socket_ends_ipi_and_serve(serve, tmp_path):
    address, named = place("unix", "exit")
    home = tmp_path / "run"
    ipi = start_ipi(write_input(home, force_field("unix", named, BEADS), BEADS, LONG, safe_stride=1))
    process, out = serve(*socket_of(address))
    until(lambda: steps_of(home) > 20, 40)
    family = [process.pid, *children(process.pid)]
    (home / "EXIT").touch()
    assert ended(ipi, 10) == 0
    assert process.wait(5) == 0, out.read_text()
    assert not any(alive(pid) for pid in family)
    assert read_input(home / "RESTART").first_step > 5
    assert left_over(tmp_path) == []
    assert not Path(address.path).exists()


def test_a_killed_pool_process_is_started_again_under_the_direct_door(serve, expected, tmp_path):
    """kill -9 of `nnqmd serve`: its workers end, the next one takes its place, i-PI goes on; then EXIT."""
    home = tmp_path / "run"
    process, _ = serve(SPRING_SECONDS="0.02", tag="1")
    source = write_input(home, direct_door(BEADS), BEADS, STEPS, POSITIONS)
    ipi = start_ipi(source, pool=f"ipc://{tmp_path}/pool/s")
    until(lambda: steps_of(home) > 12, 40)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert ends_within(2.5, workers)
    serve(tag="2")
    assert ended(ipi, 40) == 0
    assert_same(home, expected)


@pytest.mark.slow
def test_exit_through_the_direct_door_leaves_the_pool_as_it_is(serve, tmp_path):
    process, out = serve()
    home = tmp_path / "run"
    source = write_input(home, direct_door(BEADS), BEADS, LONG, safe_stride=1)
    ipi = start_ipi(source, pool=f"ipc://{tmp_path}/pool/s")
    until(lambda: steps_of(home) > 20, 40)
    (home / "EXIT").touch()
    assert ended(ipi, 10) == 0
    assert read_input(home / "RESTART").first_step > 5
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == 0, out.read_text()
    assert left_over(tmp_path) == []


# ---- `nnqmd run`


def family_of(process):
    """A process and all that it has started, and they."""
    found = [process]
    for pid in found:
        found += children(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["direct", "unix"])
def test_ctrl_c_while_a_worker_hangs_does_not_lose_the_restart(nnqmd, tmp_path, mode):
    _, named = place("unix", "ctrlc")
    block = direct_door(BEADS) if mode == "direct" else force_field("unix", named, BEADS)
    source = write_input(tmp_path / "in", block, BEADS, LONG, safe_stride=1)
    (tmp_path / "in/nnqmd_pes.py").write_text("from nnqmd_server.doors.direct import *\n")
    words = [str(source), "--model", SOURCE, "--workers", "1", "--device", "cpu", "--out", "out"]
    process, out = nnqmd("run", *words, SPRING_SECONDS="60", SPRING_QUICK="20")
    until(lambda: steps_of(tmp_path / "out") > 12, 40)
    time.sleep(1.0)
    family = family_of(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(12) == 130, out.read_text()
    assert not any(alive(pid) for pid in family)
    assert read_input(tmp_path / "out/RESTART").first_step > 5
    assert left_over(tmp_path) == []
    assert "Traceback" not in out.read_text()


def test_sigterm_to_every_process_of_a_job_stops_it_softly(nnqmd, tmp_path):
    """As a batch system does; i-PI takes a second SIGTERM, from us, for an order to drop everything."""
    source = write_input(tmp_path / "in", direct_door(BEADS), BEADS, LONG, safe_stride=1)
    (tmp_path / "in/nnqmd_pes.py").write_text("from nnqmd_server.doors.direct import *\n")
    words = [str(source), "--model", SOURCE, "--workers", "1", "--device", "cpu", "--out", "out"]
    process, out = nnqmd("run", *words)
    until(lambda: steps_of(tmp_path / "out") > 12, 40)
    family = family_of(process.pid)
    for pid in reversed(family):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(15) != 0
    assert ends_within(3, family)
    assert read_input(tmp_path / "out/RESTART").first_step > 5
    assert left_over(tmp_path) == []
    assert "Traceback" not in out.read_text()
