"""Connections within a machine: messages stay whole; strangers, sleepers and losses are survived."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnqmd_server.pool.line import MARK, Inbox, Line, encode
from nnqmd_server.pool.lines import MAX_LATE, Lines
from nnqmd_server.pool.messages import MAX_FRAMES, BadMessageError


def bytes_of(frames):
    return b"".join(encode(frames))


def plain(messages):
    return [[bytes(frame) for frame in frames] for frames in messages]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=4), max_size=6),
    st.lists(st.integers(1, 30), min_size=1, max_size=30),
)
def test_messages_are_whole_however_they_are_cut(messages, sizes):
    data = b"".join(map(bytes_of, messages))
    inbox, got, place, k = Inbox(), [], 0, 0
    while place < len(data):
        step = sizes[k % len(sizes)]
        got += inbox.add(bytearray(data[place : place + step]))
        place, k = place + step, k + 1
    assert plain(got) == messages


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.booleans())
def test_anything_is_a_message_or_our_error(data, marked):
    try:
        for frames in Inbox().add(bytearray((MARK if marked else b"") + data)):
            assert 1 <= len(frames) <= MAX_FRAMES
    except BadMessageError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\xff\0\0\0\0\0\0\0\0\x7f\x03",
        MARK + (0).to_bytes(4, "little"),
        MARK + (MAX_FRAMES + 1).to_bytes(4, "little"),
        MARK + (2).to_bytes(4, "little") + ((1 << 63) - 1).to_bytes(8, "little") * 2,
        MARK + (1).to_bytes(4, "little") + (1 << 31).to_bytes(8, "little"),
    ],
)
def test_what_is_no_message_is_refused_before_anything_is_kept(data):
    with pytest.raises(BadMessageError):
        Inbox().add(bytearray(data))


@pytest.fixture
def lines(tmp_path):
    made = Lines()
    made.listen(tmp_path / "s")
    yield made
    made.close()
    assert not (tmp_path / "s").exists()


def take(lines, count=1, seconds=10.0):
    """So many messages, or fewer when the time is over."""
    got, until = [], time.monotonic() + seconds
    while len(got) < count and time.monotonic() < until:
        got += lines.receive()
    return got


def settle(lines, condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        list(lines.receive())
    assert condition()


def test_long_messages_go_both_ways(lines, tmp_path):
    line, long = Line(tmp_path / "s"), [b"head", os.urandom(5_000_001), b""]
    sending = threading.Thread(target=lambda: line.send(long))
    sending.start()
    ((who, frames),) = take(lines)
    sending.join(10)
    assert plain([frames]) == [long]
    assert lines.send(who, long)
    assert lines.send(who, [b"next"])
    answers = []
    reading = threading.Thread(target=lambda: answers.extend(line.receive(10.0) for _ in range(2)))
    reading.start()
    while reading.is_alive():
        list(lines.receive())  # writes the rest
    assert plain(answers) == [long, [b"next"]]
    line.close()
    settle(lines, lambda: lines.gone == [who])
    assert not lines.send(who, [b"x"])


def test_who_does_not_read_stops_nobody_and_is_dropped(lines, tmp_path):
    line, other = Line(tmp_path / "s"), Line(tmp_path / "s")
    assert line.send([b"here"])
    ((who, _),) = take(lines)
    began, sent = time.monotonic(), 0
    while lines.send(who, [bytes(1 << 20)]):
        sent += 1
    assert sent <= MAX_LATE + 1
    assert time.monotonic() - began < 10
    assert lines.gone == [who]
    assert other.send([b"still served"])
    assert plain([frames for _, frames in take(lines)]) == [[b"still served"]]


def test_strangers_are_counted_and_shown_out(lines, tmp_path):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(tmp_path / "s"))
        stranger.sendall(b"\x80\x04rubbish" * 10)
        settle(lines, lambda: lines.strangers == 1)
        stranger.settimeout(5)
        with pytest.raises(ConnectionResetError):  # or the end
            if not stranger.recv(1):
                raise ConnectionResetError
    line = Line(tmp_path / "s")
    assert line.send([b"hello"])
    assert take(lines)


def test_a_listener_that_is_no_pool_is_our_error(tmp_path):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "s"))
        stranger.listen()
        line = Line(tmp_path / "s")
        assert line.send([b"hello"])
        connection, _ = stranger.accept()
        connection.sendall(b"ERR unknown command\r\n")
        with pytest.raises(BadMessageError):
            line.receive(5.0)
        connection.close()
        line.close()


def test_nobody_there_takes_no_longer_than_was_said(tmp_path):
    line, began = Line(tmp_path / "s"), time.monotonic()
    assert not line.send([b"x"])
    assert not line.send([b"x"], wait=0.2)
    assert line.receive(0.2) is None
    assert time.monotonic() - began < 5


def test_a_lost_connection_is_made_again(tmp_path):
    line = Line(tmp_path / "s")
    for k in range(3):
        lines = Lines()
        lines.listen(tmp_path / "s")
        assert line.send([b"%d" % k], wait=5.0)
        ((who, frames),) = take(lines)
        assert plain([frames]) == [[b"%d" % k]]
        assert lines.send(who, [b"yes"])
        lines.close()
        assert plain([line.receive(5.0)]) == [[b"yes"]]  # what was sent before the end arrives
        assert line.receive(5.0) is None


def test_a_pool_that_reads_nothing_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("nnqmd_server.pool.line.BEAT", 0.1)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "s"))
        deaf.listen()
        line, began = Line(tmp_path / "s"), time.monotonic()
        assert not line.send([bytes(1 << 24)])
        assert time.monotonic() - began < 10
        line.close()


SLEEPER = """
import sys, time
from pathlib import Path
from nnqmd_server.pool.line import Line
line = Line(Path(sys.argv[1]))
line.send([b"here"], wait=10.0)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells")
def test_a_process_that_is_held_is_told_from_one_that_computes(lines, tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path / "s")]) for _ in range(2)]
    try:
        assert len(take(lines, 2, 60.0)) == 2
        assert not [who for _ in range(5) for who in lines.frozen()]
        processes[0].send_signal(signal.SIGSTOP)
        held = []
        for _ in range(50):  # the signal takes its time; then three more looks
            held = lines.frozen()
            if held:
                break
            time.sleep(0.02)
        assert len(held) == 1
        processes[0].send_signal(signal.SIGCONT)
        settle(lines, lambda: not lines.frozen())
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_without_file_descriptors_it_waits_until_one_is_free(lines, tmp_path):
    line = Line(tmp_path / "s")
    assert line.send([b"first"])
    assert take(lines)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(tmp_path / "s"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        for _ in range(3):
            assert not take(lines, 1, 0.02)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    waiting.sendall(bytes_of([b"second"]))
    assert not take(lines, 1, 0.05)  # it does not even listen
    line.close()
    assert plain([frames for _, frames in take(lines)]) == [[b"second"]]
    waiting.close()


def test_who_never_had_anybody_listens_again_at_the_next_beat(lines, tmp_path, caplog):
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(tmp_path / "s"))
    waiting.sendall(bytes_of([b"hello"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert not take(lines, 1, 0.02)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in caplog.text
    assert not take(lines, 1, 0.05)
    lines.listen_again()
    assert plain([frames for _, frames in take(lines)]) == [[b"hello"]]
    waiting.close()


def test_a_socket_file_of_somebody_else_stays(tmp_path):
    first, second = Lines(), Lines()
    first.listen(tmp_path / "s")
    with pytest.raises(OSError, match="in use"):
        second.listen(tmp_path / "s")
    (tmp_path / "s").unlink()
    second.listen(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    first.close()
    assert (tmp_path / "s").exists()
    second.close()
    second.close()
