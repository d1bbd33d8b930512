"""A pool that is none: springs to the origin, as i-PI's own ``harmonic`` potential has them, at no cost."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from conftest import INPUT, ROOT
from spring_potential import SPRING, SpringPotential
from toys import ToyWorker

from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.doors.template import read_numbers
from nnqmd_server.inputs.run import find_ipi
from nnqmd_server.pool.client import GivenUpError
from nnqmd_server.pool.scheduler import Pool
from nnqmd_server.structures import Results

NUMBERS = read_numbers(INPUT.parent / "init.xyz")


class Springs:
    """Stands for a :class:`~nnqmd_server.pool.client.PoolClient`; counts what it is asked.

    Parameters
    ----------
    spring : float
        Spring constant [hartree/bohr^2].
    seconds : float
        How long an evaluation takes.
    """

    def __init__(self, spring: float = SPRING, seconds: float = 0.0) -> None:
        self.potential = SpringPotential(spring)
        self.seconds = seconds
        self.calls: list[int] = []
        self.closed = 0

    def card(self) -> dict:
        return self.potential.card.as_dict()

    def submit(self, structures, given_up=None) -> Results:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if given_up is not None and given_up():
                raise GivenUpError("gone")
            time.sleep(min(0.1, self.seconds))
        self.calls.append(len(structures))
        return self.potential.evaluate(structures)

    def close(self) -> None:
        self.closed += 1


@contextlib.contextmanager
def spring_pool(folder: Path, address: str = "", **worker) -> Iterator[Pool]:
    """A pool of one worker with the springs, in threads; ``worker`` as for :class:`ToyWorker`."""
    folder.mkdir(parents=True, exist_ok=True)
    potential = SpringPotential()
    pool = Pool(address or f"ipc://{folder}/doors", f"ipc://{folder}/workers")
    pool.address = address or f"ipc://{folder}/doors"
    pool.start()
    settings = {"card": potential.card.as_dict(), "evaluate": potential.evaluate, "name": "springs"} | worker
    toy = ToyWorker(f"ipc://{folder}/workers", 1, **settings)
    try:
        yield pool
    finally:
        toy.left.set()
        pool.stop()
        toy.join(5)


def write_input(
    folder: Path,
    force_field: str,
    beads: int,
    steps: int,
    output: str = "",
    init: str = "",
    safe_stride: int = 1000,
    precise: bool = False,
) -> Path:
    """An i-PI input: NVT of the ammonia crystal with any force field named ``springs``.

    ``precise`` (for i-PI 3.1 and newer) keeps every digit of the last step, see :func:`last_step`.
    """
    digits = "floatformat='%24.17e'" if precise else ""
    if precise:
        output += f"<checkpoint filename='last' stride='{steps}' overwrite='True'/>"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "init.xyz").write_text(init or (INPUT.parent / "init.xyz").read_text())
    path = folder / "input.xml"
    path.write_text(
        f"""<simulation verbosity='medium' {digits} safe_stride='{safe_stride}'>
  <output prefix='run'>
    <properties filename='out' stride='1'> [ step, conserved, temperature, potential ] </properties>
    {output}
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>31415</seed></prng>
  {force_field}
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>100</velocities>
    </initialize>
    <forces> <force forcefield='springs'/> </forces>
    <ensemble> <temperature units='kelvin'>100</temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'>0.5</timestep>
        <thermostat mode='pile_g'> <tau units='femtosecond'>100</tau> </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""
    )
    return path


POSITIONS = "<trajectory filename='pos' stride='1' format='xyz'> positions </trajectory>"


def direct_door(beads: int, parameters: str = "") -> str:
    """Our ``<ffdirect>``; the PES file is written by :func:`start_ipi`."""
    return f"""<ffdirect name='springs'> <pes>custom</pes> <pes_path>nnqmd_pes.py</pes_path>
    <batch_size>{beads}</batch_size>
    <parameters>{{template: init.xyz{parameters}}}</parameters> </ffdirect>"""


def start_ipi(path: Path, program: Path | None = None, pool: str = "", pes: str = "") -> subprocess.Popen:
    """i-PI, on an input in its own folder, output into ``i-pi.log``; ``pool`` is for the direct door."""
    (path.parent / "nnqmd_pes.py").write_text(f"from nnqmd_server.doors.direct import *\n{pes}")
    ours = {"NNQMD_POOL": pool, "PYTHONPATH": str(ROOT)} if pool else {"PYTHONPATH": ""}
    program = program or find_ipi()
    with (path.parent / "i-pi.log").open("w") as output:
        return subprocess.Popen(
            [program, path.name],
            cwd=path.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **ours},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )


def wait_for(path: Path, ipi: subprocess.Popen, seconds: float = 20.0) -> None:
    """Until i-PI has made its socket file."""
    until = time.monotonic() + seconds
    while not path.exists() and ipi.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists(), "i-PI does not listen"


def answer(
    address,
    ipi,
    client: Springs,
    beads=None,
    batch_size=None,
    record=None,
    numbers=NUMBERS,
    limit=120,
    extras=(),
):
    """Serve an i-PI that has been started until it ends; the door, which must have ended too."""
    sets = ForceSets(client, numbers, beads, record, extras)
    door = SocketDoor(address, sets, beads, batch_size, patience=30)
    thread = serve_in_thread(door)
    try:
        assert ipi.wait(limit) == 0
    finally:
        if ipi.poll() is None:
            ipi.kill()
            ipi.wait()
        thread.join(5)
    assert not thread.is_alive()
    assert door.failure is None
    assert client.closed == 1
    return door


def own_drivers(
    program: Path, where: list[str], count: int = 1, spring: float = SPRING
) -> list[subprocess.Popen]:
    """i-PI's own Python drivers with the same springs."""
    return [
        subprocess.Popen(
            [program, *where, "-m", "harmonic", "-o", str(spring)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(count)
    ]


def frames(path: Path, atoms: int = len(NUMBERS)) -> np.ndarray:
    """Positions of an i-PI xyz trajectory, (n_frames, n_atoms, 3)."""
    lines = path.read_text().splitlines()
    rows = [line.split()[1:4] for k, line in enumerate(lines) if k % (atoms + 2) > 1]
    return np.array(rows, dtype=float).reshape(-1, atoms, 3)


def positions(folder: Path, beads: int) -> np.ndarray:
    """Positions of every bead [bohr], (n_frames, n_beads, n_atoms, 3)."""
    width = len(str(beads - 1))
    return np.stack([frames(folder / f"run.pos_{k:0{width}d}.xyz") for k in range(beads)], axis=1)


def last_step(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Positions and momenta of every bead at the last step, in i-PI's units and to the last digit."""
    text = (folder / "run.last").read_text()
    found = [re.search(rf"<{name} shape=[^>]*>\s*\[(.*?)\]", text, re.DOTALL) for name in ("q", "p")]
    q, p = (np.array([float(x) for x in part.group(1).split(",")]) for part in found)
    return q, p
