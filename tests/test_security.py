"""Strangers at a pool over TCP: whatever they send, it goes on serving, counts them, and does not grow."""

from __future__ import annotations

import json
import os
import pickle
import platform
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zmq
from conftest import INPUT, crystal

from nnqmd_server.doors.direct import NnqmdPES
from nnqmd_server.errors import AddressError, OutputError, PoolError
from nnqmd_server.pool import remote
from nnqmd_server.pool.addresses import check_keys, is_loopback
from nnqmd_server.pool.bulk import Bulk
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.keys import add_key, make_keys, peer_keys, pool_keys, revoke_key
from nnqmd_server.pool.lines import Lines
from nnqmd_server.pool.link import connect
from nnqmd_server.pool.messages import (
    MAX_HEADER,
    PROTOCOL,
    BadMessageError,
    Message,
    pack,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.structures import from_ase

ODD = Path(__file__).with_name("odd_potentials.py")
BEADS = from_ase([crystal(seed=k) for k in range(4)])
HOST = "127.0.0.1"


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def right(results):
    return np.array_equal(results.forces, -1e-3 * np.sin(BEADS.positions))


def wait(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


class Served:
    """``nnqmd serve`` with TCP on both sides, and one ``nnqmd worker`` that joined over it."""

    def __init__(self, folder, guarded):
        self.folder, self.keys = folder, folder / "keys" if guarded else None
        if guarded:
            make_keys(self.keys)
        self.doors, self.join = (f"tcp://{HOST}:{free_port()}" for _ in range(2))
        keys = ["--keys", self.keys] if guarded else []
        self.pool = self.run(
            "serve", "--workers", "0", "--address", self.doors, "--join", self.join, *keys, "--logs", "logs"
        )
        worker = ["worker", "--pool", self.join, "--workers", "1", "--device", "cpu", *keys]
        self.worker = self.run(*worker, "--logs", "worker-logs", f"p={ODD}:quick")
        self.client = self.door()
        self.client.card()
        assert right(self.client.submit(BEADS))

    def run(self, *words):
        command = [sys.executable, "-m", "nnqmd_server.cli", *map(str, words)]
        with (self.folder / f"{words[0]}.out").open("w") as output:
            return subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT)

    def door(self, patience=20.0):
        return PoolClient(self.doors, patience, keys=self.keys)

    def status(self):
        client = self.door()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            if client._send(Message("status")) and (answer := client._receive(1.0)):
                client.close()
                return answer.fields
            time.sleep(0.02)
        raise AssertionError("no status")

    def memory(self):
        """Resident memory of the pool's process [MB]."""
        lines = Path(f"/proc/{self.pool.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def close(self):
        self.client.close()
        for process in (self.pool, self.worker):
            process.send_signal(signal.SIGTERM)
        for process in (self.pool, self.worker):
            assert process.wait(20) == 0, (self.folder / "worker.out").read_text()


@pytest.fixture(scope="module", params=[True, False], ids=["keys", "loopback"])
def served(request, tmp_path_factory):
    running = Served(tmp_path_factory.mktemp("served"), request.param)
    yield running
    running.close()


@pytest.fixture
def unharmed(served):
    """After whatever the test does, the pool answers as before and has not grown."""
    before = served.memory()
    yield served
    assert right(served.client.submit(BEADS))
    assert served.memory() - before < 25, "the pool has grown"
    assert served.pool.poll() is None
    assert served.worker.poll() is None


def raw(address, data, seconds=2.0):
    """Send bytes and wait until the other side hangs up; whether it does."""
    host, port = address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as link:
        try:
            link.sendall(data)
            while link.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True


def greeting(mechanism=b"NULL"):
    """How a ZMTP 3.0 peer begins."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


READY = b"\x04\x26\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + bytes(0)
READY = b"\x04" + bytes([len(READY) - 2]) + READY[2:]


# ---- before a word is said


def test_a_flood_of_rubbish_bytes(unharmed):
    rng = np.random.default_rng(3)
    before = sum(unharmed.status()["turned_away"].values())
    for address in (unharmed.doors, unharmed.join):
        for k in range(60):
            raw(address, [b"", greeting(), b"GET / HTTP/1.1\r\n\r\n"][k % 3] + rng.bytes(20000), seconds=0.05)
    wait(lambda: sum(unharmed.status()["turned_away"].values()) >= before + 60)


def test_many_silent_connections(unharmed):
    host, port = unharmed.doors.removeprefix("tcp://").split(":")
    links = [socket.create_connection((host, int(port))) for _ in range(200)]
    assert right(unharmed.client.submit(BEADS))
    for link in links:
        link.close()


@pytest.mark.parametrize("length", [1 << 62, remote.MAX_TCP_MESSAGE + 1])
def test_an_oversize_frame_is_cut_off_before_anything_is_allocated(unharmed, length):
    hello = greeting() + READY
    if unharmed.keys:
        hello = greeting(b"CURVE")
    assert raw(unharmed.doors, hello + b"\x02" + struct.pack(">Q", length) + bytes(1000), seconds=5.0)


def test_a_truncated_frame_harms_nobody(unharmed):
    host, port = unharmed.doors.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as link:
        link.sendall(greeting() + READY + b"\x02" + struct.pack(">Q", 100_000) + bytes(10))
        time.sleep(0.2)
        assert right(unharmed.client.submit(BEADS))


# ---- those who may speak, and say nothing sensible


class Touch:
    """What a pickle can do to who loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def header(**changes):
    described = {"protocol": PROTOCOL, "kind": "evaluate", "fields": {}, "arrays": []} | changes
    return json.dumps(described).encode()


def rubbish(tmp_path):
    yield [pickle.dumps(Touch(tmp_path / "touched"))]
    yield [header(), pickle.dumps(Touch(tmp_path / "touched"))]
    yield [b"{" * 50_000]
    yield [b"[" * 60_000]
    yield [b" " * (MAX_HEADER + 1)]
    yield [header(protocol=PROTOCOL + 1)]
    yield [header(arrays=[["positions", "<f8", [1 << 40, 3]]]), b""]
    yield [header(arrays=[["positions", "<f8", [-1, 3]]]), b""]
    yield [header(arrays=[["positions", "|O", [1]]]), bytes(8)]
    yield [header(), *[b""] * 1000]
    for kind in ("evaluate", "waiting", "ready", "done", "failed", "alive?", "stop"):
        for request in (None, -1, 1e400, "x", [], {}, 10**30):
            yield [header(kind=kind, fields={"request": request, "potential": [], "share": request})]
    for fields in (None, [], "x", {"potentials": 3}, {"potentials": {"p": "x"}}, {"potentials": [["p"]]}):
        yield [header(kind="ready", fields=fields)]
    yield pack(Message("ready", {"index": "x", "pid": {}, "potentials": {"p": {"card": [], "form": 1}}}))


def test_messages_that_are_none_are_refused_and_counted(unharmed, tmp_path):
    before = unharmed.status()["refused"]
    said = 0
    strangers = []
    for address, role in ((unharmed.doors, "door"), (unharmed.join, "worker")):
        stranger = connect(address, unharmed.keys, role)
        strangers.append(stranger)
        for frames in rubbish(tmp_path):
            assert stranger.send(frames, wait=5.0)
            said += 1
        assert stranger.receive(5.0)
    # Some of these are only strange: "alive" of a worker that nobody knows is asked back.
    wait(lambda: unharmed.status()["refused"] >= before + said // 2)
    for stranger in strangers:  # not before: what has not left yet would be dropped
        stranger.close()
    assert not (tmp_path / "touched").exists()


def test_a_flood_of_rubbish_messages(unharmed):
    stranger = connect(unharmed.doors, unharmed.keys, "door")
    stop = time.monotonic() + 1.0
    while time.monotonic() < stop:
        stranger.send([b"{" + bytes(10_000)], wait=1.0)  # never reads what it is answered
    assert right(unharmed.client.submit(BEADS))
    stranger.close()


def test_a_replayed_request_is_computed_once_and_answered(unharmed):
    """The same request id again while it is at work, and again after it was answered."""
    before = unharmed.status()["structures"]
    fields = {"request": 7, "potential": "p", "client": "replay", "name": "replay"}
    frames = pack(Message("evaluate", fields, structures_to_arrays(BEADS)))
    stranger = connect(unharmed.doors, unharmed.keys, "door")
    for _ in range(5):
        assert stranger.send(frames, wait=5.0)
    answer = unpack(stranger.receive(10.0))
    assert np.array_equal(answer.arrays["forces"], -1e-3 * np.sin(BEADS.positions))
    time.sleep(0.3)
    late = 1
    while (frames := stranger.receive(0.0)) is not None:
        assert unpack(frames).fields["request"] == 7
        late += 1
    stranger.close()
    assert unharmed.status()["structures"] - before == late * len(BEADS)
    assert late < 5


def test_nobody_names_memory_over_the_network(unharmed):
    """Shared memory is for processes of this machine: who came over TCP could name anybody's."""
    bulk = Bulk()
    place = bulk.find(bulk.room(1 << 20))
    stranger = connect(unharmed.doors, unharmed.keys, "door")
    assert stranger.send(pack(Message("status", {"memory": place})), wait=5.0)
    assert unpack(stranger.receive(10.0)).fields["near"] is False
    assert stranger.send([header(arrays=[["positions", "<f8", [100, 3], place]]), b""])
    answer = unpack(stranger.receive(10.0))
    assert answer.kind == "refused"
    assert "not shared" in answer.fields["what"]
    bulk.close()
    stranger.close()


# ---- keys


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    running = Served(tmp_path_factory.mktemp("guarded"), guarded=True)
    yield running
    running.close()


def test_who_has_no_key_or_another_one_is_told_so_and_counted(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SURE", 0.5)
    make_keys(tmp_path / "other")
    stolen = json.loads((guarded.keys / "door.key").read_text())
    stolen["public"], stolen["secret"] = (key.decode() for key in zmq.curve_keypair())
    (tmp_path / "stranger.key").touch(mode=0o600)
    (tmp_path / "stranger.key").write_text(json.dumps(stolen))
    before = guarded.status()["turned_away"]
    for keys in (None, tmp_path / "other", tmp_path / "stranger.key"):
        client = PoolClient(guarded.doors, 20.0, keys=keys)
        began = time.monotonic()
        with pytest.raises(AddressError, match="turns this process away"):
            client.submit(BEADS)
        assert time.monotonic() - began < 10  # told before the patience is over
        client.close()
    after = guarded.status()["turned_away"]
    assert after["wrong_key"] > before["wrong_key"]
    assert after["no_handshake"] > before["no_handshake"]
    assert right(guarded.client.submit(BEADS))


def test_a_door_cannot_come_in_as_a_worker(guarded, monkeypatch):
    """The keys of doors open the doors' address only, and the files say whose they are."""
    monkeypatch.setattr(remote, "SURE", 0.5)
    with pytest.raises(AddressError, match="key of a door"):
        check_keys(guarded.join, guarded.keys / "door.key", "worker")
    stranger = connect(guarded.join, guarded.keys, "door")  # its own key, the other address
    stranger.send(pack(Message("alive")))
    wait(lambda: stranger.why() is not None)
    assert not stranger.receive(0.0)
    stranger.close()


def test_a_worker_with_a_wrong_key_ends_and_says_why(guarded, tmp_path):
    make_keys(tmp_path / "other")
    worker = [sys.executable, "-m", "nnqmd_server.cli", "worker", "--pool", guarded.join, "--workers", "1"]
    done = subprocess.run(
        [*worker, "--keys", str(tmp_path / "other"), "--device", "cpu", f"p={ODD}:quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "turns this process away" in " ".join(done.stderr.split())


def test_the_direct_door_takes_its_key_from_the_parameters_or_the_environment(guarded, monkeypatch, capsys):
    template = str(INPUT.parent / "init.xyz")
    for given, variable in ((str(guarded.keys / "door.key"), ""), ("", str(guarded.keys))):
        monkeypatch.setenv("NNQMD_KEYS", variable)
        pes = NnqmdPES(template, guarded.doors, patience=20, dipoles="none", keys=given, potential="p")
        assert pes._client.card()["name"] == "odd"
        pes._client.close()
    with pytest.raises(SystemExit):
        NnqmdPES(template, guarded.doors, keys="nowhere.key")
    assert "no key file" in capsys.readouterr().err


def test_tcp_beyond_this_machine_needs_keys(tmp_path):
    beyond = f"tcp://{platform.node()}:{free_port()}"
    for address in (beyond, f"tcp://*:{free_port()}", f"tcp://0.0.0.0:{free_port()}"):
        with pytest.raises(AddressError, match="reached from other machines") as caught:
            Pool(f"ipc://{tmp_path}/d", ["ipc://" + str(tmp_path / "w"), address])
        assert "nnqmd keys" in caught.value.fix
    with pytest.raises(AddressError, match="reached from other machines"):
        PoolClient(beyond)
    for address in ("tcp://localhost:1", "tcp://127.3.2.1:1", "tcp://[::1]:1"):
        assert is_loopback(address)
    for address in (
        "tcp://localhost.evil:1",
        "tcp://1127.0.0.1:1",
        "tcp://eth0:1",
        "tcp://*:1",
        "tcp://[::]:1",
    ):
        assert not is_loopback(address)


def test_ipc_beside_guarded_tcp_needs_no_key(tmp_path):
    """Own workers and doors use the private socket of the same pool."""
    make_keys(tmp_path / "keys")
    pool = Pool(
        [f"ipc://{tmp_path}/d", f"tcp://{HOST}:{free_port()}"],
        f"ipc://{tmp_path}/w",
        keys=pool_keys(tmp_path / "keys"),
    )
    pool.start()
    client = PoolClient(f"ipc://{tmp_path}/d", 3.0)
    with pytest.raises(PoolError, match="No worker"):
        client.card(0.5)
    client.close()
    pool.stop()


# ---- key files


def test_key_files_are_private_whole_and_not_overwritten(tmp_path):
    folder = tmp_path / "keys"
    umask = os.umask(0)
    try:
        files = make_keys(folder)
    finally:
        os.umask(umask)
    assert [file.name for file in files] == ["pool.key", "door.key", "worker.key"]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    with pytest.raises(OutputError, match="exists already"):
        make_keys(folder)
    pool, door = pool_keys(folder), peer_keys(folder, "door")
    assert pool.allowed["door"] == {"door": door.public}
    assert door.pool == pool.public
    files[1].chmod(0o640)
    with pytest.raises(AddressError, match="read by other users") as caught:
        peer_keys(folder, "door")
    assert "chmod 600" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "x" * 100, '{"format": "nnqmd key 1", "role": "door"}', None]
)
def test_files_that_are_no_keys_are_refused(tmp_path, text):
    file = make_keys(tmp_path / "keys")[1]
    if text is None:  # one half of a pair
        content = json.loads(file.read_text())
        text = json.dumps(content | {"public": content["pool"]})
    file.write_text(text)
    with pytest.raises(AddressError):
        peer_keys(file, "door")


def test_keys_are_added_and_taken_back_one_by_one(tmp_path):
    make_keys(tmp_path)
    alice = peer_keys(add_key(tmp_path, "door", "alice"), "door")
    assert pool_keys(tmp_path).allowed["door"]["alice"] == alice.public
    with pytest.raises(OutputError, match="alice"):
        add_key(tmp_path, "worker", "alice")
    revoke_key(tmp_path, "alice")
    assert set(pool_keys(tmp_path).allowed["door"]) == {"door"}
    with pytest.raises(AddressError, match="no key 'alice'"):
        revoke_key(tmp_path, "alice")


# ---- versions


def test_the_other_protocol_is_named_on_both_sides(tmp_path):
    later = json.dumps({"protocol": PROTOCOL + 1, "kind": "ready", "fields": {}, "arrays": []}).encode()
    with pytest.raises(
        BadMessageError, match=rf"version {PROTOCOL + 1} .* this side {PROTOCOL}.*one version"
    ):
        unpack([later])
    said = []
    pool = Pool(f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/w", observe=lambda what, f: said.append((what, f)))
    pool.start()
    stranger = connect(f"ipc://{tmp_path}/w", None, "worker")
    assert stranger.send([later])
    answer = unpack(stranger.receive(5.0))
    assert answer.kind == "refused"
    pool.status()  # by then all is told that was answered
    for line in (answer.fields["what"], dict(said)["refused"]["what"]):
        assert f"version {PROTOCOL + 1}" in line
    stranger.close()
    pool.stop()


def test_a_worker_that_meets_another_protocol_ends_and_says_why(tmp_path):
    later_pool = Lines()
    later_pool.listen(tmp_path / "w")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "nnqmd_server.pool.worker", "--pool", f"ipc://{tmp_path}/w"]
    with log.open("w") as output:
        worker = subprocess.Popen([*command, "--model", f"p={ODD}:quick"], stdout=output, stderr=output)
    came = []
    wait(lambda: came.extend(later_pool.receive()) or came)
    header_ = json.dumps({"protocol": PROTOCOL + 1, "kind": "refused", "fields": {}, "arrays": []})
    assert later_pool.send(came[0][0], [header_.encode()])
    assert worker.wait(20) == 3
    assert "cannot be joined" in log.read_text()
    later_pool.close()
