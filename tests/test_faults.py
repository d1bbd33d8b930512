"""Failures under a real i-PI: it stops with RESTART and a clear message, and never hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from conftest import MODEL
from test_runs import simulate, variant
from toys import ToyWorker

from nnqmd_server.errors import ProgramError
from nnqmd_server.inputs.xml import read_input
from nnqmd_server.pool.messages import Message
from nnqmd_server.pool.scheduler import Pool

GOOD_SETS = 6
DOORS = {
    "direct": {r"\{template: init.xyz\}": "{template: init.xyz, patience: 3}"},
    "unix": {
        r"<ffdirect.*?</ffdirect>": "<ffsocket name='allegro' mode='unix'><address>NAME</address></ffsocket>"
    },
}


def nan(answer):
    forces = answer.arrays["forces"].copy()
    forces[5, 1] = np.nan
    answer.arrays["forces"] = forces
    return answer


def too_short(answer):
    answer.arrays["forces"] = answer.arrays["forces"][:-1]
    return answer


def crash(answer):
    return Message("failed", {"share": answer.fields["share"], "what": "CUDA out of memory", "fix": "none"})


def hang(answer):
    return None


@pytest.fixture
def staged(tmp_path):
    """A pool of one toy worker that is good for some force sets and then fails as told."""
    started = []

    def stage(fault):
        doors, backs = f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/w"
        pool = Pool(doors, backs)
        pool.address = doors
        pool.start()
        seen = []

        def spoil(answer):
            seen.append(answer)
            # Small forces, so that i-PI has something stable to move.
            answer.arrays["forces"] = -1e-3 * answer.arrays["forces"]
            return answer if len(seen) <= GOOD_SETS else fault(answer)

        started.append((pool, ToyWorker(backs, 1, spoil=spoil)))
        return pool

    yield stage
    for pool, worker in started:
        worker.left.set()
        pool.stop()


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize(
    ("fault", "message"),
    [(nan, "not finite"), (too_short, "wrong size"), (crash, "CUDA out of memory")],
)
def test_bad_answers_end_the_run_with_a_restart(staged, tmp_path, door, fault, message):
    pool = staged(fault)
    changes = {k: v.replace("NAME", f"nnqmd-faults-{os.getpid()}-{door}") for k, v in DOORS[door].items()}
    source = variant(tmp_path, "in", changes | {"safe_stride='100'": "safe_stride='1'"})
    started = time.monotonic()
    with pytest.raises(ProgramError, match=message) as caught:
        simulate(source, tmp_path / "run", pool, steps=200)
    assert time.monotonic() - started < 40
    plan = read_input(tmp_path / "run/RESTART")
    # Over a socket a force set may come in two parts, each of which is an answer of the worker.
    assert plan.first_step == GOOD_SETS - 1 if door == "direct" else 2 <= plan.first_step < GOOD_SETS
    assert "RESTART was written" in str(caught.value)
    if fault is nan:
        (frame,) = read(tmp_path / "run/quarantine.extxyz", ":")
        assert frame.info["force_set"] == plan.first_step + 1
        assert frame.info["bead"] == 0 if door == "direct" else 0 <= frame.info["bead"] < 8
    # NaN never got as far as the trajectory.
    assert np.isfinite(np.loadtxt(tmp_path / "run/nh3.out", ndmin=2)).all()


def test_a_pool_that_falls_silent_ends_the_run_after_the_patience(staged, tmp_path):
    pool = staged(hang)
    source = variant(tmp_path, "in", DOORS["direct"] | {"safe_stride='100'": "safe_stride='1'"})
    started = time.monotonic()
    with pytest.raises(ProgramError, match=r"has not answered for 3 s.*RESTART was written"):
        simulate(source, tmp_path / "run", pool, steps=200)
    assert time.monotonic() - started < 30
    assert read_input(tmp_path / "run/RESTART").first_step == GOOD_SETS - 1


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    return [
        int(k)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for k in (task / "children").read_text().split()
    ]


@pytest.fixture
def running(tmp_path):
    """A real `nnqmd run` that has done some steps: its process, its folder, and all processes under it."""
    changes = {"stride='10'": "stride='1'", "nbeads='8'": "nbeads='1'", "<batch_size>8": "<batch_size>1"}
    source = variant(tmp_path, "in", changes)
    command = [sys.executable, "-c", "from nnqmd_server.cli import main; main()", "run", str(source)]
    command += ["--model", str(MODEL), "--workers", "1", "--eager", "--out", str(tmp_path / "run")]
    with (tmp_path / "out").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    started = tmp_path / "run/nh3.out"
    while not (started.exists() and started.stat().st_size > 2000) and time.monotonic() < until:
        time.sleep(0.05)
    family = children(process.pid)
    assert len(family) == 2, (tmp_path / "out").read_text()
    yield process, tmp_path / "run", family
    process.kill()
    process.wait()
    for pid in family:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def ends_within(seconds, pids):
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_when_we_are_killed_ipi_stops_softly_and_the_workers_end(running):
    process, folder, family = running
    process.kill()
    process.wait()
    assert ends_within(4, family)  # i-PI looks for signals once a second, a worker for its parent likewise
    assert "RESTART" in [p.name for p in folder.iterdir()]


def test_when_ipi_is_killed_all_of_us_ends_and_says_so(running):
    process, folder, family = running
    (ipi,) = [pid for pid in family if b"i-pi" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ipi, signal.SIGKILL)
    assert process.wait(timeout=10) == 1
    assert ends_within(0.5, family)
    text = (folder.parent / "out").read_text()
    assert "i-PI ended early (exit status -9)" in text
    assert "Traceback" not in text


def test_ctrl_c_stops_softly_and_says_how_to_go_on(running):
    process, folder, family = running
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert ends_within(0.5, family)
    assert (folder / "RESTART").exists()
    text = (folder.parent / "out").read_text().replace("\n", "")
    assert "nnqmd run" in text
    assert "Traceback" not in text
