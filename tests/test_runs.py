"""Real i-PI simulations through both doors."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import INPUT, MODEL

from nnqmd_server.inputs.run import Run, make_folder
from nnqmd_server.inputs.xml import read_input
from nnqmd_server.units import BOHR

STEPS = 20


def variant(folder, name, changes):
    """A copy of the shipped input, in a folder of its own, with some parts replaced."""
    home = folder / name
    home.mkdir()
    for file in ("init.xyz", "nnqmd_pes.py"):
        (home / file).write_text((INPUT.parent / file).read_text())
    text = INPUT.read_text()
    for pattern, new in changes.items():
        text, count = re.subn(pattern, new, text, flags=re.DOTALL)
        assert count == 1, pattern
    (home / "input.xml").write_text(text)
    return home / "input.xml"


EVERY_STEP = {
    r"stride='10'": "stride='1'",
    r"<trajectory filename='xc'.*?</trajectory>": "<trajectory filename='xc'> x_centroid </trajectory>"
    "<trajectory filename='f' stride='1'> forces </trajectory>",
}


def sockets(mode, address, batch=1):
    batched = f"<batch_size>{batch}</batch_size>" if batch > 1 else ""
    return EVERY_STEP | {
        r"<ffdirect.*?</ffdirect>": f"<ffsocket name='allegro' mode='{mode}'>{address}{batched}</ffsocket>",
    }


def simulate(source, folder, pool, **options):
    make_folder(folder, force=False)
    job = Run(source, folder, pool.address, **options)
    try:
        return job.wait(lambda: None, interval=0.05)
    finally:
        job.stop()


def numbers(path):
    """Every number that stands in an i-PI trajectory, frame by frame, without comments."""
    rows = [
        line.split()[1:]
        for line in path.read_text().splitlines()
        if line and not line[0].isdigit() and line[0] != "#"
    ]
    return np.array([[float(x) for x in row] for row in rows if len(row) == 3])


@pytest.fixture(scope="module")
def direct(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("direct")
    source = variant(folder, "in", EVERY_STEP)
    return simulate(source, folder / "run", pool, steps=STEPS)


@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        ("unix", 1),
        pytest.param("inet", 1, marks=pytest.mark.slow),
        pytest.param("unix", 8, marks=pytest.mark.slow),
        pytest.param("inet", 8, marks=pytest.mark.slow),
        ("shm", 8),
    ],
)
def test_the_same_trajectory_through_the_direct_and_the_socket_door(direct, pool, tmp_path, mode, batch):
    name = f"nnqmd-test-{os.getpid()}"
    port = 20000 + os.getpid() % 20000
    address = (
        f"<address>{name}</address>" if mode != "inet" else f"<address>localhost</address><port>{port}</port>"
    )
    source = variant(tmp_path, "in", sockets(mode, address, batch))
    before = pool.status()
    over_socket = simulate(source, tmp_path / "run", pool, steps=STEPS, extras=("dipole",))
    after = pool.status()
    # No bead is computed twice; a batch of beads that all are where the first is, once.
    asked = after.structures - before.structures
    assert 8 * STEPS + (8 if batch == 1 else 1) <= asked <= 8 * (STEPS + 1)
    assert after.force_sets - before.force_sets <= 2 * (STEPS + 1)
    assert not Path(f"/tmp/ipi_{name}").exists()
    # float32 forces carry a relative error of 1e-7; printed positions have 6 digits.
    for what, tolerance in (("xc", 1e-5), ("vc", 1e-6)):
        mine = numbers(over_socket.folder / f"nh3.{what}.xyz")
        other = numbers(direct.folder / f"nh3.{what}.xyz")
        assert len(mine) == 64 * (STEPS + 1 if what == "xc" else STEPS // 2 + 1)
        assert mine == pytest.approx(other, abs=tolerance)
    conserved = [np.loadtxt(f.folder / "nh3.out")[:, 2] for f in (direct, over_socket)]
    assert conserved[0] == pytest.approx(conserved[1], abs=1e-4)
    with (
        h5py.File(direct.folder / "dipoles.h5") as one,
        h5py.File(over_socket.folder / "dipoles.h5") as other,
    ):
        assert one["dipole"].shape == other["dipole"].shape == (STEPS + 1, 8, 3)
        # Beads stand in the same order in both, though sockets bring them in any order.
        assert other["dipole"][:] == pytest.approx(one["dipole"][:], abs=1e-5)
        spread = np.abs(one["dipole"][STEPS] - one["dipole"][STEPS].mean(axis=0)).max()
        assert spread > 1e-3


def test_the_dipoles_are_recorded_step_by_step_and_as_extras(pool, tmp_path):
    extras = "<trajectory filename='dip' stride='1' extra_type='dipole'> extras </trajectory>"
    changes = {
        r"<checkpoint": extras + "<checkpoint",
        r"\{template: init.xyz\}": "{template: init.xyz, extras: dipole}",
    }
    source = variant(tmp_path, "in", changes)
    done = simulate(source, tmp_path / "run", pool, steps=3)
    with h5py.File(done.folder / "dipoles.h5") as file:
        assert file["force_set"][:].tolist() == [0, 1, 2, 3]
        recorded = file["dipole"][:]
        energies = file["energy"][:]
        assert file["cell"][0] == pytest.approx(np.diag([10.26, 10.26, 5.13]), abs=1e-5)
    for bead in range(8):
        text = (done.folder / f"nh3.dip_{bead}").read_text()
        rows = np.array([line.split() for line in text.splitlines() if "#" not in line], dtype=float)
        assert rows.reshape(-1, 3) * BOHR == pytest.approx(recorded[:, bead], abs=1e-5)
    potential = np.loadtxt(done.folder / "nh3.out", ndmin=2)[:, 4]
    assert energies.mean(axis=1)[0] == pytest.approx(potential[0], rel=1e-6)


def test_the_conserved_quantity_of_an_nve_run_does_not_drift(pool, tmp_path):
    changes = {
        r"stride='10'": "stride='1'",
        r"nbeads='8'": "nbeads='1'",
        r"<batch_size>8": "<batch_size>1",
        r"<dynamics mode='nvt'>": "<dynamics mode='nve'>",
        r">0.5</timestep>": ">0.25</timestep>",
        r"<thermostat.*?</thermostat>": "",
    }
    done = simulate(variant(tmp_path, "in", changes), tmp_path / "run", pool, steps=600)
    table = np.loadtxt(done.folder / "nh3.out")
    time_ps, conserved, kelvin = table[:, 1], table[:, 2], table[:, 3]
    assert len(table) == 601
    assert kelvin[100:].mean() > 20  # it does move
    slope = np.polyfit(time_ps, 1e3 * conserved / 64, 1)[0]
    assert abs(slope) < 1.0  # meV per atom and ps


def test_a_killed_worker_changes_nothing_in_the_trajectory(direct, tmp_path):
    """kill -9 of one of two workers in the middle: the run goes on and gives the same trajectory."""
    from nnqmd_server.pool.launch import LocalPool

    source = variant(tmp_path, "in", EVERY_STEP)
    with LocalPool({"ammonia": str(MODEL)}, tmp_path / "logs", workers=2, device="cpu") as own:
        own.wait_ready(timeout=200)

        def kill():
            while own.status().force_sets < 6:
                time.sleep(0.01)
            os.kill(own.pids[1], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        done = simulate(source, tmp_path / "run", own, steps=STEPS)
        killer.join(10)
        assert own.status().lost_workers == 1
    for name in ("nh3.xc.xyz", "nh3.vc.xyz", "nh3.f_0.xyz", "nh3.out"):
        assert (done.folder / name).read_text() == (direct.folder / name).read_text()


def test_a_pool_that_dies_ends_the_run_with_a_restart_that_works(direct, pool, tmp_path):
    """All workers are killed: i-PI writes RESTART, and the run goes on from it as if nothing had been."""
    from nnqmd_server.errors import ProgramError
    from nnqmd_server.pool.launch import LocalPool

    source = variant(tmp_path, "in", EVERY_STEP | {"safe_stride='100'": "safe_stride='1'"})
    with LocalPool({"ammonia": str(MODEL)}, tmp_path / "logs", workers=1, device="cpu") as own:
        own.wait_ready(timeout=200)

        def kill():
            while own.status().force_sets < 6:
                time.sleep(0.01)
            os.kill(own.pids[0], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ProgramError, match=r"All workers have ended.*RESTART was written"):
            simulate(source, tmp_path / "run", own, steps=STEPS)
        killer.join(10)
    assert (tmp_path / "run/dipoles.h5").exists()
    plan = read_input(tmp_path / "run/RESTART")
    assert 4 <= plan.first_step < STEPS
    done = simulate(tmp_path / "run/RESTART", tmp_path / "again", pool)
    assert done.steps == STEPS - plan.first_step
    last = [np.loadtxt(f / "nh3.out")[-1] for f in (direct.folder, tmp_path / "again")]
    assert last[1] == pytest.approx(last[0], rel=1e-6)


def test_sigterm_stops_a_run_softly(pool, tmp_path):
    from nnqmd_server.errors import ProgramError

    source = variant(tmp_path, "in", {"safe_stride='100'": "safe_stride='1'"})
    make_folder(tmp_path / "run", force=False)
    job = Run(source, tmp_path / "run", pool.address)
    before = pool.status().force_sets
    until = time.monotonic() + 60
    while pool.status().force_sets < before + 5 and time.monotonic() < until:
        time.sleep(0.05)
    job._process.send_signal(signal.SIGTERM)
    with pytest.raises(ProgramError, match="RESTART was written"):
        job.wait(lambda: None)
    assert read_input(tmp_path / "run/RESTART").first_step >= 4


def test_a_killed_ipi_is_reported_and_its_socket_is_cleared_away(pool, tmp_path):
    from nnqmd_server.errors import ProgramError

    name = f"nnqmd-killed-{os.getpid()}"
    source = variant(tmp_path, "in", sockets("unix", f"<address>{name}</address>"))
    make_folder(tmp_path / "run", force=False)
    before = pool.status().force_sets
    job = Run(source, tmp_path / "run", pool.address)
    until = time.monotonic() + 60
    while pool.status().force_sets < before + 5 and time.monotonic() < until:
        time.sleep(0.05)
    job._process.kill()
    began = time.monotonic()
    with pytest.raises(ProgramError, match="exit status -9"):
        job.wait(lambda: None, interval=0.05)
    assert time.monotonic() - began < 2.0
    assert not job._threads[0].is_alive()
    assert not Path(f"/tmp/ipi_{name}").exists()


def test_the_input_is_read(tmp_path):
    plan = read_input(INPUT)
    assert (plan.n_beads, plan.prefix, plan.timestep) == (8, "nh3", pytest.approx(0.5, rel=1e-6))
    assert plan.temperature == pytest.approx(100, rel=1e-6)
    assert plan.force_fields[0].batch_size == 8
    assert [(t.quantity, t.unit) for t in plan.trajectories] == [
        ("v_centroid", ""),
        ("x_centroid", "angstrom"),
    ]
