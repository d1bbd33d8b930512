"""Whole trainings by the command: killed and resumed, on two processes, with files of nequip's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.io import write
from test_training import TINY, sensible, state_of, write_config

from nnqmd_server.potentials.allegro import load
from nnqmd_server.structures import from_ase
from nnqmd_server.training.config import read_config
from nnqmd_server.training.expansion import expand
from nnqmd_server.training.progress import read_epochs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WAIT = 280


def command(*words):
    return [sys.executable, "-m", "nnqmd_server", "train", *map(str, words)]


def finish(*words, cwd=None, wait=WAIT):
    done = subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=wait, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def settings(tmp_path):
    write(tmp_path / "frames.xyz", [sensible(k) for k in range(10)], format="extxyz")
    return TINY | {"training": {"epochs": 6, "batch_size": 2, "rho": 0.01}}


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, settings):
    config = write_config(tmp_path / "tiny.yaml", **settings)
    finish(config, "--out", tmp_path / "whole")
    started = subprocess.Popen(command(config, "--out", tmp_path / "parts"), start_new_session=True)
    until = time.monotonic() + WAIT
    while len(read_epochs(tmp_path / "parts/epochs.csv")) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)  # the trainer too
    started.wait()
    before = len(read_epochs(tmp_path / "parts/epochs.csv"))
    assert before >= 2
    finish(config, "--out", tmp_path / "parts", "--resume")
    expected, counts = state_of(tmp_path / "whole")
    found, same_counts = state_of(tmp_path / "parts")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert counts[:2] == same_counts[:2]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_trainer_is_left_behind(tmp_path, settings, how):
    config = write_config(
        tmp_path / "tiny.yaml", **settings | {"training": {"epochs": 5000, "batch_size": 2}}
    )
    started = subprocess.Popen(command(config, "--out", tmp_path / "run"), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + WAIT
    while len(read_epochs(tmp_path / "run/epochs.csv")) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) == 1
    started.send_signal(how)
    said, _ = started.communicate(timeout=60)
    if how == signal.SIGTERM:
        assert started.returncode == 130
        assert "--resume goes on" in " ".join(said.split())
    until = time.monotonic() + 30
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{children[0]}").exists()


def test_tensorboards_files_hold_what_the_table_holds(tmp_path, settings):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    table = settings | {"tensorboard": True, "training": {**settings["training"], "epochs": 3}}
    finish(write_config(tmp_path / "tiny.yaml", **table), "--out", tmp_path / "run")
    found = events.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    epochs = read_epochs(tmp_path / "run/epochs.csv")
    for tag, column in (("forces_rmse", "forces_rmse"), ("weighted_sum", "score")):
        scalars = [event.value for event in found.Scalars(f"val0_epoch/{tag}")]
        assert scalars == pytest.approx([getattr(epoch, column) for epoch in epochs], rel=1e-6)
    assert any(tag.startswith("train_loss_step") for tag in found.Tags()["scalars"])


def test_two_processes_train_the_same_network_on_both(tmp_path, settings):
    config = write_config(tmp_path / "two.yaml", **(settings | {"processes": 2}))
    finish(config, "--out", tmp_path / "run")
    epochs = read_epochs(tmp_path / "run/epochs.csv")
    assert [e.epoch for e in epochs] == list(range(6))  # one process writes
    assert np.isfinite([e.score for e in epochs]).all()
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["training"]["settings"]["processes"] == 2
    model = load(tmp_path / "run/tiny.nequip.zip", compiled=False)
    assert np.isfinite(model.evaluate(from_ase([sensible(50)])).forces).all()


def test_a_training_goes_on_from_a_checkpoint_of_another(tmp_path, settings):
    """In a process that has built no model before."""
    once = settings | {"training": {"epochs": 2, "batch_size": 2, "rho": 0.0}}
    finish(write_config(tmp_path / "tiny.yaml", **once), "--out", tmp_path / "first")
    still = settings | {"training": {"epochs": 1, "rho": 0.0, "learning_rate": 1e-300}}
    config = write_config(tmp_path / "still.yaml", **still)
    finish(config, "--out", tmp_path / "again", "--start", tmp_path / "first/best.ckpt")
    first, again = (read_epochs(tmp_path / name / "epochs.csv") for name in ("first", "again"))
    assert again[0].score == pytest.approx(min(epoch.score for epoch in first), rel=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.01])
def test_compiled_steps_are_those_of_eager_ones(tmp_path, settings, rho):
    for compiled in (False, True):
        training = {"epochs": 3, "batch_size": 2, "rho": rho, "compile": compiled}
        config = write_config(tmp_path / f"{compiled}.yaml", **settings | {"training": training})
        finish(config, "--out", tmp_path / f"{compiled}", wait=1000)
    eager, compiled = (read_epochs(tmp_path / f"{kind}/epochs.csv") for kind in (False, True))
    for one, other in zip(eager, compiled, strict=True):  # double precision; only the order of sums differs
        assert other.forces_rmse == pytest.approx(one.forces_rmse, rel=1e-8)
        assert other.wannier_centroid_rmse == pytest.approx(one.wannier_centroid_rmse, rel=1e-8)
    weights, counts = state_of(tmp_path / "False")
    same, same_counts = state_of(tmp_path / "True")
    assert counts[:2] == same_counts[:2]
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-6, atol=1e-9, msg=name)
    model = load(tmp_path / "True/tiny.nequip.zip", compiled=False)  # a package like any other
    assert np.isfinite(model.evaluate(from_ase([sensible(50)])).forces).all()


@pytest.mark.parametrize("kind", ["ours", "nequip's module"])
def test_a_configuration_of_nequips_own_is_used_as_it_is(tmp_path, settings, kind):
    """File names are relative to the present directory; the checkpoint callback is nequip's or none."""
    short = read_config(write_config(tmp_path / "tiny.yaml", **settings))
    full = expand(short, 2)
    for name in ("train", "val", "test"):
        write(tmp_path / f"{name}.xyz", [sensible(30 + k) for k in range(4)], format="extxyz")
    full["trainer"] |= {"callbacks": []}
    if kind != "ours":
        full["training_module"] = {
            k: v
            for k, v in full["training_module"].items()
            if k not in ("rho", "adaptive", "sam_start_epoch", "sam_every", "cpu_matmul")
        } | {"_target_": "nequip.train.EMALightningModule"}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(full))
    said = finish(path, "--out", tmp_path / "run", cwd=tmp_path)
    assert "own.nequip.zip" in said
    assert len(read_epochs(tmp_path / "run/epochs.csv")) == 2
    model = load(tmp_path / "run/own.nequip.zip", compiled=False)
    assert np.isfinite(model.evaluate(from_ase([sensible(50)])).forces).all()
