"""``nnqmd fidelity`` from end to end, and the sharpness of the shipped model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, ROOT
from typer.testing import CliRunner

from nnqmd_server.cli import app
from nnqmd_server.errors import DataError, InputError, ModelError, UnknownElementError
from nnqmd_server.fidelity.sharpness import measure
from nnqmd_server.training.data import read_frames

POTENTIAL = f"{ROOT}/tests/odd_potentials.py:quick"
CELL = f"{ROOT}/examples/ammonia/phase1.xyz"


def test_the_command_measures_fits_draws_and_adds_to_what_is_there(tmp_path):
    """Nearly free atoms meet after some tens of fs."""
    arguments = ["fidelity", POTENTIAL, "--structure", CELL, "--out", str(tmp_path), "--sizes", "16,32"]
    arguments += ["--temperature", "900", "--timestep", "1", "--steps", "60", "--distance-factor", "0.75"]
    arguments += ["--workers", "1", "--parallel", "3", "--replicates", "200"]

    def go(*more):
        done = subprocess.run(
            [sys.executable, "-m", "nnqmd_server", *arguments, *more],
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    first = go("--seeds", "1")
    assert "2 runs of at most 60 steps of 1 fs at 900 K" in first
    text = go("--seeds", "2")
    assert re.search(r"failed by: .*distance \d", text)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    done = sorted((line["atoms"], line["seed"]) for line in lines)
    assert done == [(16, 1), (16, 2), (32, 1), (32, 2)]
    assert all(len(line["sha256"]) == 64 for line in lines)
    found = json.loads((tmp_path / "fidelity.json").read_text())
    (series,) = found["series"]
    assert (series["model"], series["runs"]) == ("quick", 4)
    assert series["failures"] == sum(line["failed"] for line in lines) >= 2
    assert [size["atoms"] for size in series["sizes"]] == [16, 32]
    assert (tmp_path / "fidelity.png").read_bytes()[:4] == b"\x89PNG"
    # nothing is run: results as they might be, with a fit
    for line in lines:
        line |= {"failed": True, "time_fs": 20.0 + 7 * line["seed"] - line["atoms"] / 4}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--seeds", "2", "--analyse-only", "--distribution", "exponential"]
    (tmp_path / "fidelity.svg").unlink()
    again = CliRunner().invoke(app, [*arguments, *options])
    assert again.exit_code == 0
    found = json.loads((tmp_path / "fidelity.json").read_text())["series"][0]
    assert found["fit"]["distribution"] == "exponential"
    low, high = found["beta_intervals"][1]["low"], found["beta_intervals"][1]["high"]
    assert low < found["fit"]["beta"] < high
    assert (tmp_path / "fidelity.svg").stat().st_size > 5000


def _rows(study: Path, seed: int) -> dict[int, list[float]]:
    """What i-PI printed in all pieces of a simulation, by step; what was done twice must be the same."""
    found: dict[int, list[float]] = {}
    for table in sorted(study.glob(f"simulations/*-seed{seed}*/piece-*/run.out")):
        text = table.read_text()
        for line in text.splitlines()[: text.count("\n")]:  # the last one may be half
            if line[:1] != "#":
                row = [float(word) for word in line.split()]
                assert row == pytest.approx(found.setdefault(int(row[0]), row), rel=1e-6)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_command_that_is_killed_goes_on_where_it_was(tmp_path):
    """SIGKILL in the second of two simulations: none is lost, none done again, and the steps are the same."""
    arguments = [sys.executable, "-m", "nnqmd_server", "fidelity", POTENTIAL, "--structure", CELL]
    arguments += ["--sizes", "16", "--seeds", "2", "--steps", "600", "--temperature", "50"]
    arguments += ["--temperature-window", "1e9", "--distance-factor", "0.01", "--max-jump", "1e6"]
    arguments += ["--workers", "1", "--parallel", "1", "--out", str(tmp_path)]
    results = tmp_path / "results.jsonl"
    killed = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 500
        while not any(step >= 530 for step in _rows(tmp_path, 2)):  # there is a checkpoint every 500 steps
            assert killed.poll() is None, "ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
    before = results.read_text()
    assert before.count("\n") == 1
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    after = results.read_text()
    assert after.startswith(before)
    ends = [json.loads(line) for line in after.splitlines()]
    assert [(end["seed"], end["steps"], end["failed"]) for end in ends] == [(1, 600, False), (2, 600, False)]
    pieces = [sorted(tmp_path.glob(f"simulations/*-seed{seed}*/piece-*")) for seed in (1, 2)]
    assert [len(each) for each in pieces] == [1, 2]
    assert min(np.loadtxt(pieces[1][1] / "run.out")[:, 0]) >= 500
    assert _rows(tmp_path, 2).keys() == set(range(0, 601, 10))  # 500 to 530 twice, and the same


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sizes", "100"], "100 atoms are not a multiple of the 16"),
        (["--sizes", "many"], "--sizes 'many' are not whole numbers"),
        (["--sizes", "16", "--distribution", "normal"], "no distribution 'normal'"),
        (["--sizes", "16", "--min-distance", "N-H"], "is not a pair and a length"),
        (["--sizes", "16", "--isotope", "N=15N"], "--isotope 'N=15N' is not known"),
        (["--sizes", "16", "--noise", "0"], "--noise '0'"),
        (["--sizes", "16", "--analyse-only"], "has no results of these runs"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(tmp_path, options, words):
    arguments = ["fidelity", POTENTIAL, "--structure", CELL, "--out", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert words in done.exception.what
    assert done.exception.fix


def test_a_structure_with_foreign_elements_is_refused(tmp_path):
    water = tmp_path / "water.xyz"
    water.write_text('3\nLattice="8 0 0 0 8 0 0 0 8"\nO 0 0 0\nH 1 0 0\nH 0 1 0\n')
    arguments = ["fidelity", str(MODEL), "--structure", str(water), "--sizes", "3", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UnknownElementError)


def test_shaken_weights_raise_the_loss_and_no_noise_leaves_it():
    frames = read_frames(ROOT / "examples/ammonia/data/ammonia_train.xyz")[:2]
    told = []
    found = measure("small", MODEL, frames, [1e-9, 0.02, 0.1], draws=2, tell=told.append)
    assert told == list(range(1, 8))
    none, little, much = found
    assert abs(none.rise) < 1e-5 * none.loss
    assert none.force_rmse_shaken == pytest.approx(none.force_rmse, rel=1e-4)
    assert 0 < little.rise < much.rise
    assert little.force_rmse < little.force_rmse_shaken < much.force_rmse_shaken
    # trained on these frames: the card says 50 meV/A on all of them
    assert 0.02 < none.force_rmse < 0.12
    again = measure("small", MODEL, frames, [0.02], draws=2)
    assert again[0].rise == pytest.approx(little.rise, rel=1e-6)
    assert np.isfinite(little.rise_error)


def test_sharpness_has_a_command_of_its_own(tmp_path):
    from ase.io import write

    frames = read_frames(ROOT / "examples/ammonia/data/ammonia_train.xyz")[:1]
    write(tmp_path / "one.xyz", frames, format="extxyz", parallel=False)
    arguments = [
        "model",
        "sharpness",
        f"mine={MODEL}",
        "--frames",
        str(tmp_path / "one.xyz"),
        "--noise",
        "0.05",
    ]
    done = CliRunner().invoke(app, [*arguments, "--draws", "2", "--json", str(tmp_path / "s.json")])
    assert done.exit_code == 0, done.output
    (line,) = json.loads((tmp_path / "s.json").read_text())
    (found,) = measure("mine", MODEL, frames, [0.05], draws=2)
    assert (line["model"], line["draws"], line["frames"]) == ("mine", 2, 1)
    assert line["rise"] == pytest.approx(found.rise, rel=1e-6)
    assert "rise of the loss" in done.output
    assert "mine" in done.output
    done = CliRunner().invoke(app, [*arguments[:-1], "none"])
    assert isinstance(done.exception, InputError)


def test_sharpness_needs_labels_and_a_package():
    frames = read_frames(ROOT / "examples/ammonia/data/ammonia_train.xyz")[:1]
    bare = frames[0].copy()
    with pytest.raises(DataError, match="Frames 0 "):
        measure("small", MODEL, [bare], [0.1], draws=2)
    with pytest.raises(ModelError, match="cannot be shaken"):
        measure("odd", Path(POTENTIAL), frames, [0.1])
