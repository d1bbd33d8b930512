"""Worker processes: they join, drain, run out of memory, are stopped, killed and left alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path

import numpy as np
import pytest
from conftest import crystal

from nnqmd_server.errors import InputError, PoolError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.folders import PREFIX, own_folder
from nnqmd_server.pool.launch import LocalPool
from nnqmd_server.pool.processes import worker_command
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.potentials.load import interpreter_of, parse_models
from nnqmd_server.structures import from_ase

ODD = Path(__file__).with_name("odd_potentials.py")
BEADS = from_ase([crystal(seed=k) for k in range(8)])

ALONE = """
import sys
from nnqmd_server.pool.worker import load_all, serve
sys.exit(serve(load_all({"p": sys.argv[2]}, "cpu"), sys.argv[1], 7, None, patience=float(sys.argv[3])))
"""


def right(results):
    return np.array_equal(results.forces, -1e-3 * np.sin(BEADS.positions))


def wait(condition, seconds=15.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


class House:
    """A pool in this process, and worker processes that come and go."""

    def __init__(self, folder):
        self.doors, self.back = f"ipc://{folder}/d", f"ipc://{folder}/w"
        self.folder, self.processes, self.events = folder, [], []
        self.pool = None
        self.open()

    def open(self, **options):
        observe = lambda event, fields: self.events.append((event, fields))  # noqa: E731
        self.pool = Pool(self.doors, self.back, observe=observe, **options)
        self.pool.start()

    def run(self, command):
        with (self.folder / f"worker-{len(self.processes)}.log").open("w") as log:
            settings = os.environ | {"ODD_LOG": str(self.folder / "odd.log")}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=settings)
        self.processes.append(process)
        return process

    def start(self, maker):
        index = ["--index", str(len(self.processes))]
        return self.run([*worker_command(), "--pool", self.back, "--model", f"p={ODD}:{maker}", *index])

    def start_alone(self, maker, patience):
        return self.run([sys.executable, "-c", ALONE, self.back, f"{ODD}:{maker}", str(patience)])

    def ready(self, count):
        wait(lambda: len(self.pool.status().workers) == count)

    def said(self, event):
        self.pool.status()  # by then all is told that was answered
        return [fields for what, fields in self.events if what == event]

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()
        self.pool.stop()


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    yield made
    made.close()


@pytest.fixture
def client(house):
    made = PoolClient(house.doors, patience=30.0)
    yield made
    made.close()


def test_a_worker_that_is_told_to_end_finishes_what_it_has(house, client):
    leaver = house.start("slow")
    house.ready(1)
    got = []
    asking = threading.Thread(target=lambda: got.append(client.submit(BEADS)))
    asking.start()
    wait(lambda: house.said("given"))
    leaver.terminate()
    assert leaver.wait(10) == 0
    asking.join(10)
    assert right(got[0])
    house.ready(0)
    assert house.said("left")
    assert not house.said("lost")
    assert not house.said("retried")
    stayer = house.start("quick")
    assert right(client.submit(BEADS))  # who comes later does the rest
    stayer.terminate()
    assert stayer.wait(10) == 0  # an idle one leaves at once


def test_workers_join_and_leave_while_a_simulation_runs(house, client):
    house.start("quick")
    house.ready(1)
    stop, wrong, done = threading.Event(), [], []

    def simulate():
        while not stop.is_set():
            done.append(1)
            if not right(client.submit(BEADS)):
                wrong.append(1)

    running = threading.Thread(target=simulate)
    running.start()
    for _ in range(3):
        newcomer = house.start("quick")
        house.ready(2)
        before = len(done)
        wait(lambda before=before: len(done) > before + 10)
        newcomer.terminate()
        assert newcomer.wait(10) == 0
    stop.set()
    running.join(10)
    assert not wrong
    joined = {fields["worker"] for fields in house.said("done")}
    assert joined == {0, 1, 2, 3}
    assert not house.said("retried")


@pytest.mark.slow
def test_a_stopped_worker_is_missed_and_may_come_back(house, client):
    """SIGSTOP, as when its machine or its network is gone: after three seconds another one does its work."""
    stopped = house.start("slow")
    house.ready(1)
    house.start("slow")
    house.ready(2)
    got = []
    asking = threading.Thread(target=lambda: got.append(client.submit(BEADS)))
    asking.start()
    wait(lambda: len(house.said("given")) == 2)
    stopped.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    asking.join(15)
    assert right(got[0])
    assert 2 < time.monotonic() - started < 8
    assert len(house.said("lost")) == 1
    stopped.send_signal(signal.SIGCONT)
    house.ready(2)  # the pool asks who it is, and it joins again
    assert right(client.submit(BEADS))


@pytest.mark.slow
def test_a_worker_that_keeps_pythons_lock_is_not_taken_for_dead(house, client):
    house.start("holds_the_lock")
    house.ready(1)
    assert right(client.submit(BEADS))
    assert not house.said("lost")
    assert house.said("done")[0]["elapsed"] > 4.9


def test_a_worker_without_a_parent_outlives_the_pool_and_joins_the_next(house, client):
    house.start_alone("quick", patience=30)
    house.ready(1)
    assert right(client.submit(BEADS))
    house.pool._to_worker = lambda *_: None  # as if killed: no farewell
    house.pool._send = lambda *_: True
    house.pool.stop()
    house.open()
    house.ready(1)
    assert house.pool.status().workers[0]["index"] == 7
    assert right(client.submit(BEADS))


def test_a_worker_ends_when_no_pool_comes_back(house):
    lonely = house.start_alone("quick", patience=2)
    house.ready(1)
    house.pool._send = lambda *_: True
    house.pool.stop()
    assert lonely.wait(10) == 4
    assert "no word from a pool" in (house.folder / "worker-0.log").read_text()
    house.open()


def test_out_of_memory_halves_the_batch_and_is_remembered(house, client):
    house.start("small_memory")
    house.ready(1)
    tried = house.folder / "odd.log"
    tried.unlink()  # the warm-up
    assert right(client.submit(BEADS))
    assert tried.read_text().split() == ["8", "4", "2", "2", "2", "2"]
    assert house.said("memory") == [{"worker": 0, "atoms": 16, "structures": 2}]
    assert right(client.submit(BEADS))
    assert tried.read_text().split()[6:] == ["2", "2", "2", "2"]
    assert len(house.said("memory")) == 1
    assert "out of memory with 4 structures" in (house.folder / "worker-0.log").read_text()


def test_one_structure_that_fits_nowhere_is_an_error_with_a_way_out(house, client):
    house.start("no_memory")
    house.start("no_memory")
    house.ready(2)
    with pytest.raises(PoolError, match="A structure of 16 atoms does not fit") as caught:
        client.submit(BEADS)
    assert "group of workers" in caught.value.fix
    assert {fields["worker"] for fields in house.said("given")} == {0, 1}  # the other one was asked too


def other_environment(folder):
    """A virtual environment with numpy and pyzmq and nothing else; nnqmd is not installed in it."""
    import numpy
    import zmq

    venv.create(folder, symlinks=True)
    (place,) = folder.glob("lib/python*/site-packages")
    for module in (numpy, zmq):
        home = Path(module.__file__).parents[1]
        for part in [*home.glob(f"{module.__name__}"), *home.glob("numpy.libs"), *home.glob("pyzmq.libs")]:
            link = place / part.name
            if not link.exists():
                link.symlink_to(part)
    return folder


def test_a_potential_may_name_its_own_interpreter(tmp_path):
    env = other_environment(tmp_path / "env")
    models = parse_models([f"mine={ODD}:confesses", f"theirs={ODD}:confesses@{env}"])
    with LocalPool(models, tmp_path / "logs", workers=1, device="cpu") as pool:
        pool.wait_ready(30)
        forms = {name: form for w in pool.status().workers for name, form in w["forms"].items()}
        assert forms["mine"] == f"{sys.prefix} torch ase yaml numpy zmq"
        assert forms["theirs"] == f"{env} numpy zmq"
        for name in models:
            client = PoolClient(pool.address, 10.0, name)
            assert right(client.submit(BEADS))
            client.close()
        assert sorted(w["structures"] for w in pool.status().workers) == [8, 8]


def test_a_worker_that_dies_is_started_again_but_not_for_ever(tmp_path):
    with LocalPool({"p": f"{ODD}:quick"}, tmp_path / "logs", workers=1, device="cpu", restarts=1) as pool:
        pool.wait_ready(30)
        client = PoolClient(pool.address, 30.0, "p")
        (first,) = pool.pids
        time.sleep(0.5)  # it has been seen to be ready
        os.kill(first, signal.SIGKILL)
        wait(lambda: pool.pids != [first])
        assert right(client.submit(BEADS))
        pool.check()
        (second,) = pool.pids
        assert [w["pid"] for w in pool.status().workers] == [second] != [first]
        time.sleep(0.5)
        os.kill(second, signal.SIGKILL)
        with pytest.raises(PoolError, match="All workers have ended"):
            client.submit(BEADS)
        client.close()
        assert pool.pids == [second]


def test_a_worker_that_was_asked_to_leave_is_not_started_again(tmp_path):
    with LocalPool({"p": f"{ODD}:quick"}, tmp_path / "logs", workers=2, device="cpu", restarts=9) as pool:
        pool.wait_ready(30)
        before = pool.pids
        time.sleep(0.5)
        os.kill(before[0], signal.SIGTERM)
        wait(lambda: len(pool.status().workers) == 1)
        time.sleep(0.5)
        assert pool.pids == before


@pytest.mark.parametrize(
    ("text", "source", "interpreter"),
    [
        ("a.nequip.zip", "a.nequip.zip", None),
        ("file.py:maker", "file.py:maker", None),
        (f"file.py:maker@{sys.executable}", "file.py:maker", sys.executable),
        (f"file.py:maker@{sys.prefix}", "file.py:maker", f"{sys.prefix}/bin/python"),
        ("/data/me@home/a.nequip.zip", "/data/me@home/a.nequip.zip", None),
    ],
)
def test_where_a_source_says_its_interpreter(text, source, interpreter):
    assert interpreter_of(text) == (source, interpreter)


def test_an_interpreter_that_is_not_there_is_said_at_once():
    with pytest.raises(InputError, match="no Python interpreter /nowhere/python"):
        parse_models(["mace=mace.py:maker@/nowhere/python"])


def test_folders_of_killed_pools_are_cleared_when_the_next_one_starts(monkeypatch, tmp_path):
    """But not those of a pool that lives, that is just being started, or of anything else."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, living, starting = (Path(tempfile.mkdtemp(prefix=PREFIX)) for _ in range(3))
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(other)
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(str(living / "pool"))
        here.listen()
        for path in (killed / "pool", other / "pool"):
            with socket.socket(socket.AF_UNIX) as gone:
                gone.bind(str(path))
        mine = own_folder()
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {living.name, starting.name, mine.name, "other", f"{PREFIX}link"}
    assert (other / "pool").exists()
    assert mine.stat().st_mode & 0o777 == 0o700
