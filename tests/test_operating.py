"""The operator's way, with real processes: serve, a real i-PI, look, stop, play what was recorded again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families
from springs import write_input
from watching import wait_until

POTENTIAL = """
import hashlib
import numpy as np
from nnqmd_server.potentials.base import Card
from nnqmd_server.structures import Results

class Springs:
    form = "springs"
    card = Card("springs", hashlib.sha256(b"springs").hexdigest(), ("N", "H"), 4.0, "float64")

    def evaluate(self, structures):
        beads = [structures.positions[structures.atoms_of(k)] for k in range(len(structures))]
        energy = np.array([0.05 * (bead**2).sum() for bead in beads])
        return Results(energy, -0.1 * structures.positions, np.zeros((len(beads), 3, 3)))

def springs(device):
    return Springs()
"""

DOOR = """<ffdirect name='springs'> <pes>custom</pes> <pes_path>pes.py</pes_path> <batch_size>4</batch_size>
    <parameters>{template: init.xyz}</parameters> </ffdirect>"""

STEPS, BEADS = 5, 4


def nnqmd(*words, **kwargs):
    command = [sys.executable, "-m", "nnqmd_server", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)


@pytest.fixture
def serve(tmp_path):
    """Start ``nnqmd serve`` with options; ends all of them in the end."""
    (tmp_path / "springs.py").write_text(POTENTIAL)
    (tmp_path / "s").mkdir(mode=0o700)
    address, running = f"ipc://{tmp_path}/s/p", []

    def start(*options):
        command = [sys.executable, "-m", "nnqmd_server", "serve"]
        command += [f"springs={tmp_path}/springs.py:springs", "--workers", "2", "--device", "cpu"]
        command += ["--address", address, *map(str, options)]
        output = tmp_path / f"serve-{len(running)}.out"
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )
        running.append(process)
        wait_until(lambda: "is served at" in output.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, output.read_text()
        return process, output

    yield address, start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def end(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def simulate(folder, address, seed):
    path = write_input(folder, DOOR, BEADS, STEPS)
    path.write_text(path.read_text().replace("31415", str(seed)))
    (folder / "pes.py").write_text("from nnqmd_server.doors.direct import *\n")
    with (folder / "i-pi.log").open("w") as output:
        return subprocess.Popen(
            [Path(sys.executable).parent / "i-pi", path.name],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NNQMD_POOL": address},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def test_serve_watch_stop_and_replay(serve, tmp_path):
    address, start = serve
    process, output = start(
        "--metrics-port", 0, "--log-json", "pool.log", "--log-all", "--record", "real.nnqmd"
    )
    url = re.search(r"page at (http://127\.0\.0\.1:\d+/)", output.read_text()).group(1)
    names = "cold", "warm"
    simulations = [simulate(tmp_path / name, address, seed) for seed, name in enumerate(names)]
    assert [ipi.wait(60) for ipi in simulations] == [0, 0]

    # one force set before the first step, then one per step
    sets = len(names) * (STEPS + 1)
    shown = nnqmd("status", "--pool", address, "--least", 2, "--json")
    assert shown.returncode == 0, shown.stderr
    status = json.loads(shown.stdout)
    assert (status["force_sets"], status["structures"]) == (sets, sets * BEADS)
    found = {one["name"]: one for one in status["simulations"]}
    # a simulation is named by its folder and process, by itself
    assert set(found) == {f"{name}:{ipi.pid}" for name, ipi in zip(names, simulations, strict=True)}
    assert {(one["beads"], one["force_sets"]) for one in found.values()} == {(BEADS, STEPS + 1)}
    with urllib.request.urlopen(url + "metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert sum(s.value for s in samples if s.name == "nnqmd_force_sets_total") == sets
    with urllib.request.urlopen(url + "status.json", timeout=10) as answer:
        assert json.load(answer)["force_sets"] == sets
    end(process)
    assert f"{sets} force sets are in real.nnqmd" in output.read_text()
    lines = [json.loads(line) for line in (tmp_path / "pool.log").read_text().splitlines()]
    assert sum(line["event"] == "answered" for line in lines) == sets
    assert [lines[0]["event"], lines[-1]["event"]] == ["opened", "closed"]

    started = time.monotonic()
    gone = nnqmd("status", "--pool", address, "--patience", 0.5)
    assert gone.returncode == 1
    assert "has not answered" in gone.stderr
    assert "Traceback" not in gone.stderr
    assert time.monotonic() - started < 20

    process, _ = start()
    figures = tmp_path / "figures.json"
    played = nnqmd(
        *(
            "replay",
            tmp_path / "real.nnqmd",
            "--pool",
            address,
            "--compare",
            "--tolerance",
            0,
            "--json",
            figures,
        )
    )
    assert played.returncode == 0, played.stdout + played.stderr
    flat = json.loads(figures.read_text())
    assert (flat["simulations"], flat["force_sets"], flat["structures"]) == (2, sets, sets * BEADS)
    assert flat["difference.identical"] == sets
    assert flat["force_sets_per_second"] > 0
    end(process)
