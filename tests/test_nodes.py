"""Workers that are started elsewhere: the command that serve prints, mixed pools, hashes, ranks."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, crystal
from toys import CARD, ToyWorker

from nnqmd_server.errors import InputError, ModelError, PoolError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.crew import refusal
from nnqmd_server.pool.group import check_local
from nnqmd_server.pool.launch import LocalPool, join_address
from nnqmd_server.pool.ranks import Rank, find_rank, handed_out, rank_from_environment
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.potentials.load import check_hashes, parse_hashes
from nnqmd_server.potentials.package import read_card
from nnqmd_server.structures import from_ase

ODD = Path(__file__).with_name("odd_potentials.py")
BEADS = from_ase([crystal(seed=k) for k in range(8)])


def nnqmd(folder, *words, **environment):
    with (folder / f"{words[0]}.out").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "nnqmd_server.cli", *map(str, words)],
            cwd=folder,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def said(folder, command):
    """What a command has printed, in one line."""
    return " ".join((folder / f"{command}.out").read_text().split())


# ---- joining and leaving


def test_the_command_that_serve_prints_adds_a_worker_and_sigterm_takes_it_away(tmp_path):
    """A pool without workers of its own; simulations run on while workers come and go."""
    address = f"ipc://{tmp_path}/s/pool"
    pool = nnqmd(tmp_path, "serve", f"p={ODD}:quick", "--workers", "0", "--address", address)
    wait(lambda: "is served at" in said(tmp_path, "serve"))
    printed = re.search(r"add workers: nnqmd (worker --pool \S+ \S+)", said(tmp_path, "serve"))[1]
    client = PoolClient(address, 20.0)
    with pytest.raises(PoolError, match="No worker"):
        client.card(0.3)
    workers = [nnqmd(tmp_path, *printed.split(), "--workers", "1", "--device", "cpu")]
    expected = -1e-3 * np.sin(BEADS.positions)
    assert np.array_equal(client.submit(BEADS).forces, expected)
    workers.append(nnqmd(tmp_path, *printed.split(), "--workers", "1", "--device", "cpu", "--logs", "other"))
    for k in range(60):
        assert np.array_equal(client.submit(BEADS).forces, expected)
        if k == 40:
            workers[0].send_signal(signal.SIGTERM)
    assert workers[0].wait(10) == 0
    pool.send_signal(signal.SIGTERM)
    assert pool.wait(10) == 0
    assert workers[1].wait(10) == 0  # ends with the pool
    assert "stopped after 61 force sets" in said(tmp_path, "serve")
    client.close()


def test_a_worker_waits_for_a_pool_that_is_gone_only_as_long_as_it_is_told(tmp_path):
    began = time.monotonic()
    worker = nnqmd(
        tmp_path,
        "worker",
        "--pool",
        f"ipc://{tmp_path}/none",
        "--workers",
        "1",
        "--patience",
        "1",
        f"p={ODD}:quick",
    )
    assert worker.wait(30) == 1
    assert time.monotonic() - began < 20
    assert "no word from a pool" in said(tmp_path, "worker")


# ---- mixed pools


def hello(units="eV Angstrom", **card):
    brought = {"card": {**CARD, "cutoff": 5.0, "dtype": "float32", **card}, "form": "toy"}
    return {"index": 0, "pid": 1, "units": units, "potentials": {"toy": brought}}


OURS = {"toy": {**CARD, "cutoff": 5.0, "dtype": "float32", "elements": ("N", "H")}}


def test_a_worker_that_brings_the_same_is_let_in():
    assert refusal(hello(), OURS) is None
    assert refusal(hello(), {}) is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sha256": "b" * 64}, "another model, toy .sha256 bbbbbbbb"),
        ({"elements": ["H", "N"]}, r"elements \('N', 'H'\) in this pool and \['H', 'N'\] on the worker"),
        ({"cutoff": 6.0}, "cutoff 5.0 in this pool and 6.0 on the worker"),
        ({"dtype": "float64"}, "dtype float32 in this pool and float64"),
        ({"units": "hartree bohr"}, "computes in hartree bohr, this pool in eV Angstrom"),
    ],
)
def test_a_worker_that_brings_something_else_is_told_what(change, line):
    assert re.search(line, refusal(hello(**change), OURS))


def test_the_first_worker_is_held_to_what_the_pool_was_started_with(tmp_path):
    pool = Pool(f"ipc://{tmp_path}/d", f"ipc://{tmp_path}/w", expected=["toy"], known={"toy": dict(CARD)})
    pool.start()
    stranger = ToyWorker(f"ipc://{tmp_path}/w", 1, card={**CARD, "sha256": "b" * 64, "name": "other"})
    stranger.join(5)
    assert "another model, other" in stranger.refused
    assert not pool.status().workers
    pool.stop()


@pytest.mark.slow
def test_a_worker_with_another_model_ends_and_says_why(tmp_path):
    """Real processes: the same file with a byte more is another model."""
    other = tmp_path / "ammonia.nequip.zip"
    shutil.copy(MODEL, other)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("draft.nequip/extra", "x")
    address = f"ipc://{tmp_path}/s/pool"
    with LocalPool({"ammonia": str(MODEL)}, tmp_path / "logs", address, workers=0):
        worker = nnqmd(
            tmp_path,
            "worker",
            "--pool",
            join_address(address),
            "--eager",
            "--device",
            "cpu",
            "--workers",
            "1",
            f"ammonia={other}",
        )
        assert worker.wait(100) == 1
    line = said(tmp_path, "worker")
    ours = hashlib.sha256(MODEL.read_bytes()).hexdigest()[:8]
    assert f"refused this worker: ammonia is ammonia-small.nequip.zip (sha256 {ours}" in line
    assert "the worker brought another model, ammonia.nequip.zip" in line


# ---- a model is code


def test_a_model_with_another_hash_is_never_executed(tmp_path):
    """The file would leave a trace if anything of it were run."""
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    digest = hashlib.sha256(evil.read_bytes()).hexdigest()
    models = {"p": f"{evil}:make"}
    check_hashes(models, parse_hashes([digest.upper()], models))
    for command in (["serve", "--workers", "1", "--address", f"ipc://{tmp_path}/s/pool"], ["worker"]):
        done = nnqmd(tmp_path, *command, f"p={evil}:make", "--sha256", "0" * 64)
        assert done.wait(20) == 1
        assert digest in said(tmp_path, command[0])
    with pytest.raises(ModelError, match="no hash"):
        check_hashes({"p": "json:loads"}, {"p": digest})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["abc", "x=" + "a" * 64, "a" * 63 + "g", ""])
def test_what_is_no_hash_of_a_model_is_refused(text):
    with pytest.raises(InputError, match="not the hash"):
        parse_hashes([text], {"p": "p.nequip.zip"})
    with pytest.raises(InputError, match="not the hash"):
        parse_hashes(["a" * 64], {"p": "p.nequip.zip", "q": "q.nequip.zip"})


def repacked(target, name, change):
    """The shipped model with one text in it changed."""
    with zipfile.ZipFile(MODEL) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item, change(data) if item.filename.endswith(name) else data)
    return target


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        (
            "/model/config.yaml",
            b"r_max: 5.0\n    radial",
            b"r_max: 4.0\n    radial",
            "cutoff 4.0, its network 5.0",
        ),
        (
            "/model/package_metadata.txt",
            b"0: N\n  1: H",
            b"0: H\n  1: N",
            r"\('H', 'N'\), its network \('N', 'H'\)",
        ),
    ],
)
def test_a_package_whose_card_contradicts_its_network_is_refused(tmp_path, name, old, new, what):
    from nnqmd_server.potentials.allegro import load

    changed = repacked(tmp_path / "m.nequip.zip", name, lambda data: data.replace(old, new))
    assert read_card(changed).sha256 != read_card(MODEL).sha256
    with pytest.raises(ModelError, match=f"not what it claims: .*{what}"):
        load(changed, compiled=False)


def test_a_package_that_would_fill_the_memory_is_refused(tmp_path):
    """100 MB of blanks fit into 100 kB of zip file."""
    big = repacked(tmp_path / "m.nequip.zip", "/model/config.yaml", lambda data: data)
    with zipfile.ZipFile(tmp_path / "n.nequip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/model/config.yaml", b" " * 100_000_000)
        archive.writestr("m/model/package_metadata.txt", "")
    assert read_card(big)
    with pytest.raises(ModelError, match="too long"):
        read_card(tmp_path / "n.nequip.zip")


# ---- ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, Rank(5, 8, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "SLURM_PROCID": "0"}, Rank(2, 4, 0)),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Rank(3, 4, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Rank()),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, Rank(0, 2, 0)),
    ],
)
def test_without_mpi_the_launcher_tells_the_rank(environment, expected):
    assert rank_from_environment(environment) == expected


def test_slurm_without_mpi4py_starts_one_worker_per_task(tmp_path):
    """As srun would: each task has its number in the environment, and reads the model itself."""
    address = f"ipc://{tmp_path}/s/pool"
    with LocalPool({"p": f"{ODD}:quick"}, tmp_path / "logs", address, workers=0) as pool:
        tasks = [
            nnqmd(
                tmp_path,
                "worker",
                "--pool",
                join_address(address),
                "--device",
                "cpu",
                f"p={ODD}:quick",
                SLURM_PROCID=str(k),
                SLURM_LOCALID=str(k),
                SLURM_STEP_NUM_TASKS="2",
            )
            for k in range(2)
        ]
        wait(lambda: len(pool.status().workers) == 2)
        assert sorted(w["index"] for w in pool.status().workers) == [0, 1]
    assert [task.wait(15) for task in tasks] == [0, 0]
    assert (tmp_path / "nnqmd-logs/rank-1/worker-1.log").exists()


def test_one_process_is_alone_and_takes_the_models_as_they_are():
    rank = find_rank()
    assert rank == Rank()
    with handed_out(rank, {"a": "b"}) as models:
        assert models == {"a": "b"}


def test_only_strictly_local_models_can_be_split(potential):
    check_local({"a": potential})

    class Messages:
        card = read_card(MODEL).__class__("m", "0", ("N",), 5.0, "float32")

    with pytest.raises(ModelError, match="cannot be split by centre atoms"):
        check_local({"m": Messages()})
