"""Workers and pools that are killed under a real i-PI: the trajectory is the same to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from test_runs import EVERY_STEP, simulate, variant
from test_workers import ODD, House, wait

from nnqmd_server.pool.client import PoolClient

STEPS = 60
FILES = ("nh3.xc.xyz", "nh3.vc.xyz", "nh3.f_0.xyz", "nh3.f_7.xyz", "nh3.out")


class At:
    """Where a pool listens, for `simulate`."""

    def __init__(self, address):
        self.address = address


def same(one, other):
    for name in FILES:
        assert (one.folder / name).read_text() == (other.folder / name).read_text(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    house = House(folder)
    try:
        house.start("quick")
        house.ready(1)
        return simulate(variant(folder, "in", EVERY_STEP), folder / "run", At(house.doors), steps=STEPS)
    finally:
        house.close()


@pytest.mark.parametrize("parts", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_killing_workers_again_and_again_changes_no_bit(tmp_path, undisturbed, parts):
    """Again and again one of three workers is killed (-9) and another one started, whatever it is doing.

    After each kill one force set is let through: the same share killed twice is set aside, by intention.
    """
    (tmp_path / "pool").mkdir()
    house = House(tmp_path / "pool")
    house.pool.stop()
    house.open(deterministic=parts)
    over, rng, kills = threading.Event(), random.Random(4), []

    def kill():
        present, last = [house.start("quick") for _ in range(3)], 0
        while not over.wait(rng.uniform(0.0, 0.1)):
            alive = {w["pid"] for w in house.pool.status().workers}
            victims = [p for p in present if p.pid in alive]
            answered = house.pool.status().force_sets
            if answered > last and len(victims) > 1:
                last = answered
                victim = rng.choice(victims)
                victim.kill()
                victim.wait()
                house.pool.worker_died(victim.pid)
                kills.append(victim.pid)
                present = [p for p in present if p is not victim] + [house.start("quick")]

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        source = variant(tmp_path, "in", EVERY_STEP)
        done = simulate(source, tmp_path / "run", At(house.doors), steps=STEPS)
        over.set()
        killer.join(10)
        # The pool hears of the last death a moment after us.
        wait(lambda: house.pool.status().lost_workers >= len(kills))
        lost = house.pool.status().lost_workers
    finally:
        over.set()
        killer.join(10)
        house.close()
    same(done, undisturbed)
    assert len(kills) >= 5
    assert lost == len(kills)
    assert house.said("retried")  # some of them were at work


def serve(address, folder):
    command = [sys.executable, "-c", "from nnqmd_server.cli import main; main()", "serve", f"p={ODD}:quick"]
    command += ["--address", address, "--workers", "2", "--logs", str(folder / "logs"), "--deterministic"]
    with (folder / "serve.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def workers_of(address):
    client = PoolClient(address, patience=20.0)
    client.card()
    try:
        return [w["pid"] for w in client.status()["workers"]]
    finally:
        client.close()


def test_a_pool_that_is_killed_and_started_again_changes_no_bit(tmp_path, undisturbed):
    """kill -9 of `nnqmd serve` in the middle, twice; its workers end, the simulation waits and goes on."""
    (tmp_path / "pool").mkdir(mode=0o700)
    address = f"ipc://{tmp_path}/pool/doors"
    pool = serve(address, tmp_path)
    done, source = [], variant(tmp_path, "in", EVERY_STEP)
    asking = threading.Thread(
        target=lambda: done.append(simulate(source, tmp_path / "run", At(address), steps=STEPS))
    )
    try:
        orphans = workers_of(address)
        asking.start()
        out = tmp_path / "run/nh3.out"
        for lines in (20, 40):
            wait(lambda lines=lines: out.exists() and len(out.read_text().splitlines()) > lines, 30)
            pool.kill()
            pool.wait()
            pool = serve(address, tmp_path)
            wait(lambda pids=orphans: not any(_runs(pid) for pid in pids))
            orphans = workers_of(address)
        asking.join(60)
        assert not asking.is_alive()
    finally:
        pool.send_signal(signal.SIGTERM)
        assert pool.wait(20) == 0, (tmp_path / "serve.log").read_text()
    same(done[0], undisturbed)
    assert np.loadtxt(done[0].folder / "nh3.out")[-1, 0] == STEPS


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
