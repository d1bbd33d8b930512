"""What every door costs: i-PI's time per step, structures and model calls per force set.

256 atoms, a potential that costs nothing, i-PI's ring-polymer thermostat, no output. Every door is served by
``nnqmd serve`` with one worker, as a user would start it. Beside them, i-PI's Python driver serves its own
``dummy``: in the classic protocol (1, 4, 8 and 32 clients), in batches and through shared memory. "ipi_alone"
is <ffdirect> with forces that stand ready. All ways are measured in turn, round after round, so that a busy
machine is busy for all; medians over the rounds are printed. The MPI door needs mpi4py and mpiexec, and is
left out without.

    python benchmarks/doors.py [--beads 1 8 32 64] [--steps 500] [--rounds 3] [--awake] [--json FILE]

The figures in FILE are those at 32 beads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from awake import awake

from nnqmd_server.inputs.run import find_ipi

ATOMS = 256
BIN = Path(find_ipi()).parent
HERE = Path(__file__).resolve().parent
DOORS = ("direct", "unix", "inet", "batched", "shm", "mpi")
CLASSIC_CLIENTS = (1, 4, 8, 32)
WAIT = 300.0  # longest time for one run [s]

STILL = """
import numpy as np

__DRIVER_NAME__, __DRIVER_CLASS__ = "still", "Still"

class Still:
    def __init__(self, verbosity=None):
        self.answer = (0.0, np.zeros(({atoms}, 3)), np.zeros((3, 3)), "")
    def __call__(self, cell, pos):
        return [self.answer] * len(cell) if isinstance(cell, list) else self.answer
"""


@dataclass(frozen=True)
class Way:
    """One way to answer i-PI: its name, who answers, the input's force field, and the driver's clients."""

    name: str
    who: str
    field: str
    clients: int = 0


@dataclass(frozen=True)
class Figure:
    """Time per step [ms]; structures evaluated and model calls per force set, where they can be counted."""

    step: float
    structures: float = float("nan")
    calls: float = float("nan")


def ways(beads: int, latency: float) -> list[Way]:
    """Every way that this machine can measure."""
    late = f"<latency>{latency:g}</latency>"
    batch = f"<batch_size>{beads}</batch_size>"
    direct = f"<ffdirect name='f'>{late}{batch}<pes>{{}}</pes>{{}}</ffdirect>"
    socket = f"<ffsocket name='f' mode='{{}}'>{late}<address>NAME</address>{{}}</ffsocket>"
    ours = direct.format(
        "custom", "<pes_path>nnqmd_pes.py</pes_path><parameters>{template: init.xyz, pool: POOL}</parameters>"
    )
    inet = f"<ffsocket name='f' mode='inet'>{late}<address>localhost</address><port>PORT</port></ffsocket>"
    found = [
        Way("ipi_alone", "nobody", direct.format("custom", "<pes_path>still.py</pes_path>")),
        Way("ipi_ffdirect_dummy", "nobody", direct.format("dummy", "")),
        Way("direct", "direct", ours),
        Way("unix", "unix:NAME", socket.format("unix", "")),
        Way("inet", "inet:localhost:PORT", inet),
        Way("batched", "unix:NAME", socket.format("unix", batch)),
        Way("shm", "shm:NAME", socket.format("shm", batch)),
    ]
    if shutil.which("mpiexec") and importlib.util.find_spec("mpi4py"):
        found.append(Way("mpi", "mpi", f"<ffmpi name='f'>{late}{batch}</ffmpi>"))
    found += [
        Way(f"peer_classic_{n}", "driver", socket.format("unix", ""), n)
        for n in CLASSIC_CLIENTS
        if n <= beads
    ]
    found += [
        Way("peer_batched", "driver", socket.format("unix", batch), 1),
        Way("peer_shm", "driver --shm", socket.format("shm", batch), 1),
    ]
    return found


def write_input(folder: Path, field: str, beads: int, steps: int) -> None:
    """A gas of 256 atoms in the ring polymer's thermostat, with no output."""
    rng = np.random.default_rng(0)
    head = "# CELL(abcABC): 15 15 15 90 90 90 cell{angstrom} positions{angstrom}"
    middle, places = 15 * rng.random((ATOMS, 3)), ""
    # Beads that are apart from the first step on: equal ones at the end of a batch are evaluated once.
    for name in ("init", *(f"bead{k}" for k in range(beads))):
        apart = 0.0 if name == "init" else 0.05 * rng.standard_normal((ATOMS, 3))
        rows = [f"H {x:.5f} {y:.5f} {z:.5f}" for x, y, z in middle + apart]
        (folder / f"{name}.xyz").write_text("\n".join([str(ATOMS), head, *rows, ""]))
    for k in range(beads):
        places += f"\n      <positions mode='xyz' bead='{k}'> bead{k}.xyz </positions>"
    (folder / "nnqmd_pes.py").write_text("from nnqmd_server.doors.direct import *\n")
    (folder / "still.py").write_text(STILL.format(atoms=ATOMS))
    (folder / "input.xml").write_text(
        f"""<simulation verbosity='medium' safe_stride='100000'>
  <output prefix='run'></output> <total_steps>{steps}</total_steps> <prng><seed>1</seed></prng>
  {field}
  <system>
    <initialize nbeads='{beads}'> <file mode='xyz'>init.xyz</file>{places}
      <velocities mode='thermal' units='kelvin'>100</velocities> </initialize>
    <forces><force forcefield='f'/></forces>
    <ensemble><temperature units='kelvin'>100</temperature></ensemble>
    <motion mode='dynamics'><dynamics mode='nvt'> <timestep units='femtosecond'>0.5</timestep>
      <thermostat mode='pile_l'><tau units='femtosecond'>100</tau></thermostat> </dynamics></motion>
  </system>
</simulation>
"""
    )


def start(command: list, folder: Path, log: str) -> subprocess.Popen:
    """A process in the folder of the run, with one thread."""
    with (folder / log).open("w") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "400"},
        )


def measure(way: Way, beads: int, steps: int) -> Figure:
    """One run of i-PI: the median of its time per step over its own windows, and what was evaluated."""
    with tempfile.TemporaryDirectory(prefix="nnqmd-bench-") as place:
        folder, name = Path(place), f"bench-{os.getpid()}"
        (folder / "pool").mkdir(mode=0o700)
        known = {"NAME": name, "PORT": str(20000 + os.getpid() % 20000), "POOL": f"ipc://{folder}/pool/p"}
        field, who = way.field, way.who
        for word, meaning in known.items():
            field, who = field.replace(word, meaning), who.replace(word, meaning)
        write_input(folder, field, beads, steps)
        # `-m` finds the nnqmd of this Python, installed or on PYTHONPATH.
        serve = [
            sys.executable,
            "-m",
            "nnqmd_server",
            "serve",
            f"{HERE}/nothing.py:nothing",
            "--workers",
            1,
        ]
        serve += ["--device", "cpu", "--template", "init.xyz", "--address", known["POOL"]]
        ipi = [sys.executable, BIN / "i-pi", "input.xml"]  # this Python: mpi4py may be here only
        others = []
        if who == "mpi":
            door = [*serve, "--door", "mpi", "--beads", beads]
            others.append(start(["mpiexec", "-n", 1, *ipi, ":", "-n", 1, *door], folder, "ipi.log"))
            main = others[0]
        else:
            if who == "direct":
                others.append(start(serve, folder, "other.log"))
                until(lambda: "is served at" in (folder / "other.log").read_text(), others[0], folder)
            main = start(ipi, folder, "ipi.log")
            if who.startswith(("unix", "shm", "inet")):
                others.append(start([*serve, "--socket", who, "--beads", beads], folder, "other.log"))
            elif who.startswith("driver"):
                until(Path(f"/tmp/ipi_{name}").exists, main, folder)
                driver = [BIN / "i-pi-driver-py", "-u", "-a", name, "-m", "dummy", *who.split()[1:]]
                others = [start(driver, folder, "other.log") for _ in range(way.clients)]
        try:
            main.wait(WAIT)
            if who == "direct":
                others[0].send_signal(signal.SIGTERM)
            for other in others:
                other.wait(20)
        finally:
            for process in (main, *others):
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return read_figures(folder, steps)


def until(done: object, process: subprocess.Popen, folder: Path) -> None:
    """Wait for a condition while a process lives."""
    limit = time.monotonic() + 60
    while not done():
        if process.poll() is not None or time.monotonic() > limit:
            sys.exit("\n".join(path.read_text() for path in folder.glob("*.log")))
        time.sleep(0.005)


def read_figures(folder: Path, steps: int) -> Figure:
    """From i-PI's log and what ``nnqmd serve`` says at its end."""
    log = (folder / "ipi.log").read_text()
    said = log + (folder / "other.log").read_text() if (folder / "other.log").exists() else log
    windows = [float(x) for x in re.findall(r"t/step: ([0-9.e+-]+)", log)]
    if len(windows) < 3:
        sys.exit(f"i-PI did not run:\n{said[-4000:]}")
    sets = steps + 1  # one before the first step
    found = re.search(r"(\d+) force sets \((\d+) structures\)", said)
    counted = (int(found[2]) / sets, int(found[1]) / sets) if found else ()
    return Figure(1e3 * float(np.median(windows[2:])), *counted)


def main() -> None:
    """Measure every way in turn, round after round, and print a table for each number of beads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beads", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=1e-4, help="i-PI's <latency> [s]")
    parser.add_argument("--awake", action="store_true", help="keep the processors from sleeping: awake.py")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="some of the ways, for example direct unix")
    parser.add_argument("--json", type=Path, help="also write the figures at 32 beads into this file")
    options = parser.parse_args()
    for beads in options.beads:
        found: dict[str, list[Figure]] = {}
        for _ in range(options.rounds):
            for way in ways(beads, options.latency):
                if not options.only or way.name in options.only:
                    with awake(options.awake):
                        figure = measure(way, beads, options.steps)
                    found.setdefault(way.name, []).append(figure)
        figures = summary(found)
        show(beads, options, figures)
        if options.json and beads == 32:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


def summary(found: dict[str, list[Figure]]) -> dict[str, float]:
    """Medians over the rounds, as flat keys; the peers' best classic is by its median."""
    figures: dict[str, float] = {}
    for name, each in found.items():
        figures[f"step_ms.{name}"] = round(float(np.median([f.step for f in each])), 3)
        if name in DOORS:
            figures[f"structures_per_set.{name}"] = round(float(np.median([f.structures for f in each])), 3)
            figures[f"calls_per_set.{name}"] = round(float(np.median([f.calls for f in each])), 3)
    classic = [value for key, value in figures.items() if key.startswith("step_ms.peer_classic")]
    if classic:
        figures["step_ms.peer_classic_best"] = min(classic)
    return figures


def show(beads: int, options: argparse.Namespace, figures: dict[str, float]) -> None:
    """The table, and how our doors stand beside their yardsticks."""
    print(
        f"\n{beads} beads, {ATOMS} atoms, {options.steps} steps, {options.rounds} rounds,"
        f" latency {options.latency:g} s{', processors kept awake' if options.awake else ''}"
    )
    print(f"{'':22s} {'ms/step':>9s} {'structures/set':>15s} {'calls/set':>10s}")
    for key, value in figures.items():
        name = key.removeprefix("step_ms.")
        if name != key:
            counted = [figures.get(f"{what}.{name}") for what in ("structures_per_set", "calls_per_set")]
            more = "".join(f" {x:>{w}.2f}" for x, w in zip(counted, (15, 10), strict=True) if x is not None)
            print(f"{name:22s} {value:9.2f}{more}")
    for ours, peer, wanted in (
        ("direct", "ipi_ffdirect_dummy", 1.25),
        ("unix", "peer_classic_best", 1.0),
        ("inet", "peer_classic_best", 1.0),
        ("batched", "peer_batched", 1.0),
        ("shm", "peer_shm", 1.0),
    ):
        a, b = figures.get(f"step_ms.{ours}"), figures.get(f"step_ms.{peer}")
        if a and b:
            print(f"{ours} / {peer}: {a / b:.2f} (wanted at 32 beads: at most {wanted:g})")


if __name__ == "__main__":
    main()
