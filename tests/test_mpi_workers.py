"""Workers under a real mpiexec: one per rank, and groups of ranks that share a structure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, crystal, triclinic
from test_centres import scattered, tolerance
from test_mpi_door import mpiexec, needs_mpi

from nnqmd_server.errors import PoolError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.launch import LocalPool, join_address
from nnqmd_server.structures import from_ase

pytestmark = [pytest.mark.peer, needs_mpi]

ODD = Path(__file__).with_name("odd_potentials.py")
NNQMD = [sys.executable, "-m", "nnqmd_server.cli"]
START = 90.0


def start(folder, ranks, *words):
    with (folder / "mpi.out").open("a") as output:
        return subprocess.Popen(
            [*mpiexec(), "-n", str(ranks), *NNQMD, "worker", "--device", "cpu", *map(str, words)],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def end(process):
    """A job that does not end by itself is ended, and has failed."""
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait(condition, seconds=START):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


class House:
    """A pool without workers of its own, and a client."""

    def __init__(self, folder, models):
        self.folder = folder
        self.address = f"ipc://{folder}/s/pool"
        self.pool = LocalPool(models, folder / "logs", self.address, workers=0)
        self.join = join_address(self.address)
        self.client = PoolClient(self.address, patience=60.0)

    def ready(self, count):
        wait(lambda: len(self.pool.status().workers) == count)

    def close(self):
        self.client.close()
        self.pool.stop()


@pytest.fixture
def ammonia(tmp_path, potential):
    house = House(tmp_path, {"ammonia": str(MODEL)})
    yield house
    house.close()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_group_gives_what_one_process_gives(ammonia, potential, ranks):
    """Energy, forces, virial, centroids and dipole of structures of several shapes, to round-off."""
    job = start(ammonia.folder, ranks, "--group", ranks, "--pool", ammonia.join, f"ammonia={MODEL}")
    ammonia.ready(1)
    assert f"split over {ranks} MPI ranks" in ammonia.pool.status().workers[0]["forms"]["ammonia"]
    frames = [scattered(crystal()), scattered(triclinic()), crystal(repeat=(3, 2, 2)), crystal(seed=11)]
    for atoms in frames:
        structures = from_ase([atoms])
        whole, split = potential.evaluate(structures), ammonia.client.submit(structures)
        tol, size = tolerance(structures, whole, np.float32, potential.card.cutoff), len(atoms)
        assert abs(split.energy - whole.energy).max() < tol * size
        assert abs(split.forces - whole.forces).max() < tol
        assert abs(split.virial - whole.virial).max() < tol * size
        name = "wannier_centroid"
        assert abs(split.atom_properties[name] - whole.atom_properties[name]).max() < tol
        dipole = whole.properties["dipole"]
        assert abs(split.properties["dipole"] - dipole).max() < 8 * tol * size  # 8 electrons each
    beads = from_ase([crystal(seed=k) for k in range(5)])  # several in one batch
    together = ammonia.client.submit(beads)
    assert abs(together.forces - potential.evaluate(beads).forces).max() < 1e-4
    assert np.array_equal(together.forces, ammonia.client.submit(beads).forces)  # to the last bit again
    ammonia.pool.stop()
    assert end(job) == 0


def test_a_group_that_is_asked_for_what_it_does_not_know_goes_on(ammonia, potential):
    job = start(ammonia.folder, 2, "--group", 2, "--pool", ammonia.join, f"ammonia={MODEL}")
    ammonia.ready(1)
    atoms = crystal()
    atoms.numbers[3] = 8
    for _ in range(2):
        with pytest.raises(PoolError, match="does not know O"):
            ammonia.client.submit(from_ase([atoms]))
    good = from_ase([crystal()])
    assert abs(ammonia.client.submit(good).forces - potential.evaluate(good).forces).max() < 1e-4
    ammonia.pool.stop()
    assert end(job) == 0


def test_a_killed_rank_ends_its_group_and_another_worker_takes_the_structure(ammonia, potential):
    job = start(ammonia.folder, 2, "--group", 2, "--pool", ammonia.join, f"ammonia={MODEL}")
    ammonia.ready(1)
    plain = subprocess.Popen(
        [*NNQMD, "worker", "--device", "cpu", "--workers", "1", "--pool", ammonia.join, f"ammonia={MODEL}"],
        cwd=ammonia.folder,
    )
    ammonia.ready(2)
    group = next(w for w in ammonia.pool.status().workers if "split" in w["forms"]["ammonia"])
    beads = from_ase([crystal(seed=k) for k in range(8)])
    expected = potential.evaluate(beads).forces
    os.kill(group["pid"], signal.SIGKILL)
    for _ in range(3):
        assert abs(ammonia.client.submit(beads).forces - expected).max() < 1e-4
    assert end(job) != 0
    ammonia.ready(1)
    ammonia.pool.stop()
    assert plain.wait(20) == 0


def test_two_groups_in_one_job(ammonia):
    job = start(ammonia.folder, 4, "--group", 2, "--pool", ammonia.join, "--eager", f"ammonia={MODEL}")
    ammonia.ready(2)
    assert sorted(w["index"] for w in ammonia.pool.status().workers) == [0, 1]
    ammonia.pool.stop()
    assert end(job) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--group", "2", f"ammonia={MODEL}"], "3 ranks cannot be divided into groups of 2"),
        (["--group", "3", f"p={ODD}:quick"], "cannot be split by centre atoms"),
        (["none.nequip.zip"], "There is no model file"),
        (["--group", "3", "none.nequip.zip"], "There is no model file"),
    ],
)
def test_what_cannot_be_ends_on_all_ranks_with_a_line(tmp_path, words, line):
    job = start(tmp_path, 3, "--pool", f"ipc://{tmp_path}/none", *words)
    assert end(job) != 0
    said = " ".join((tmp_path / "mpi.out").read_text().split())
    assert line in said
    assert "Traceback" not in said


def test_every_rank_is_a_worker_and_one_that_dies_leaves_the_others(tmp_path):
    house = House(tmp_path, {"p": f"{ODD}:quick"})
    job = start(tmp_path, 2, "--pool", house.join, f"p={ODD}:quick")
    house.ready(2)
    beads = from_ase([crystal(seed=k) for k in range(8)])
    os.kill(house.pool.status().workers[0]["pid"], signal.SIGKILL)
    for _ in range(20):
        assert np.array_equal(house.client.submit(beads).forces, -1e-3 * np.sin(beads.positions))
        time.sleep(0.05)
    assert len(house.pool.status().workers) == 1
    house.close()
    assert end(job) != 0  # one of them has failed, and that is said


HAND_OUT = """
import sys
from pathlib import Path
from nnqmd_server.potentials.package import file_hash
from nnqmd_server.pool.ranks import find_rank, handed_out, leave
rank = find_rank(messages=True)
with handed_out(rank, {"a": sys.argv[1], "p": "json:loads"}) as models:
    leave(rank)
    path = Path(models["a"])
    Path(f"rank-{rank.number}").write_text(
        f"{rank.number} {rank.local} {path} {oct(path.parent.parent.stat().st_mode)} {file_hash(path)}"
        f" {models['p']} {path.stat().st_ino}"
    )
"""


def test_the_model_is_read_once_and_handed_out_to_one_rank_of_each_node(tmp_path):
    def section(node, count):
        return ["-n", str(count), "env", f"NNQMD_NODE={node}", sys.executable, "-c", HAND_OUT, str(MODEL)]

    command = [*mpiexec(), *section("x", 1), ":", *section("y", 2)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rows = [(tmp_path / f"rank-{k}").read_text().split() for k in range(3)]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "0"], ["2", "1"]]
    assert rows[0][2] == str(MODEL)
    assert len({row[2] for row in rows}) == 3
    assert rows[1][6] == rows[2][6] != rows[0][6]  # one copy on the other node
    assert rows[1][3] == rows[2][3] == "0o40700"
    assert len({row[4] for row in rows}) == 1
    assert {row[5] for row in rows} == {"json:loads"}
    assert not any(Path(row[2]).exists() for row in rows[1:])  # the copy does not stay behind
