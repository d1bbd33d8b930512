"""One simulation of a study: its i-PI input, its folder, how it goes on after a stop, and its outcome."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from nnqmd_server.errors import DataError, InputError, NnqmdError, ProgramError
from nnqmd_server.fidelity.criteria import (
    Criteria,
    Failure,
    judge_temperature,
    load_failure,
    save,
    temperature_limit,
)
from nnqmd_server.fidelity.watched import CRITERIA, FAILURE
from nnqmd_server.inputs.run import Run, make_folder
from nnqmd_server.inputs.xml import read_input
from nnqmd_server.structures import Array

STRIDE = 10
"""Steps between two temperatures, as published."""

_CHECKPOINT = 500
_PES = """# Loaded by i-PI: the direct door with a watch (nnqmd fidelity).
from nnqmd_server.fidelity.watched import *
"""


@dataclass(frozen=True)
class Case:
    """One simulation: which potential, how many atoms and beads, and the seed of its random numbers."""

    model: str
    atoms: int
    beads: int
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.model}-{self.atoms}atoms-{self.beads}beads-seed{self.seed}"


@dataclass(frozen=True)
class Protocol:
    """How every simulation of a study is done.

    Parameters
    ----------
    temperature : float
        Set-point [K].
    timestep : float
        [fs].
    steps : int
        A run that reaches this one without failing is censored.
    tau : float
        Time of the thermostat [fs]: stochastic velocity rescaling of the centroid (a global thermostat, as
        the published Nose-Hoover one is), and Langevin thermostats on the internal modes of ring polymers.
    isotopes : mapping of str to str
        Elements that another isotope stands for ({"H": "D"}).
    criteria : Criteria
        What counts as a failure.
    """

    temperature: float
    timestep: float
    steps: int
    tau: float = 100.0
    isotopes: Mapping[str, str] = field(default_factory=dict)
    criteria: Criteria = field(default_factory=Criteria)


@dataclass(frozen=True)
class Outcome:
    """How a simulation ended: after which step, and with which failure; None for one that lives."""

    step: int
    failure: Failure | None


def supercell(cell: Atoms, atoms: int) -> Atoms:
    """A supercell with a given number of atoms, as near to a cube as can be.

    Raises
    ------
    InputError
        The number is not a multiple of the cell's.
    """
    times, rest = divmod(atoms, len(cell))
    if rest or not times:
        near = sorted({max(1, times), times + 1})
        raise InputError(
            f"{atoms} atoms are not a multiple of the {len(cell)} of the structure.",
            f"Take {' or '.join(str(k * len(cell)) for k in near)}.",
        )
    lengths = cell.cell.lengths()
    ways = [
        (a, b, times // (a * b))
        for a in range(1, times + 1)
        if times % a == 0
        for b in range(1, times // a + 1)
        if (times // a) % b == 0
    ]
    best = min(ways, key=lambda way: (float(np.ptp(np.log(lengths * way))), [-n for n in way]))
    return cell.repeat(best)


def write_input(folder: Path, structure: Atoms, case: Case, protocol: Protocol) -> Path:
    """Write the i-PI input of a simulation, with its structure and PES, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [protocol.isotopes.get(chemical_symbols[z], chemical_symbols[z]) for z in structure.numbers]
    vectors = " ".join(f"{x:.10f}" for x in structure.cell.array.T.ravel())
    rows = [
        f"{name} {x:.10f} {y:.10f} {z:.10f}"
        for name, (x, y, z) in zip(names, structure.positions, strict=True)
    ]
    comment = f"# CELL(GENH): {vectors} positions{{angstrom}} cell{{angstrom}}"
    (folder / "init.xyz").write_text("\n".join([str(len(rows)), comment, *rows]) + "\n")
    (folder / "nnqmd_pes.py").write_text(_PES)
    path = folder / "input.xml"
    path.write_text(
        f"""<simulation verbosity='medium' safe_stride='100'>
  <output prefix='run'>
    <properties filename='out' stride='{STRIDE}'>
      [ step, time{{femtosecond}}, temperature{{kelvin}}, potential{{electronvolt}},
        conserved{{electronvolt}} ]
    </properties>
    <checkpoint filename='chk' stride='{_CHECKPOINT}' overwrite='True'/>
  </output>
  <total_steps>{protocol.steps}</total_steps>
  <prng><seed>{case.seed}</seed></prng>
  <ffdirect name='model' threaded='False'>
    <pes>custom</pes> <pes_path>nnqmd_pes.py</pes_path>
    <batch_size>{case.beads}</batch_size>
    <parameters>{{template: init.xyz, potential: {case.model}, dipoles: none}}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='{case.beads}'>
      <file mode='xyz'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>{protocol.temperature:.6f}</velocities>
    </initialize>
    <forces> <force forcefield='model'/> </forces>
    <ensemble> <temperature units='kelvin'>{protocol.temperature:.6f}</temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'>{protocol.timestep:.6f}</timestep>
        <thermostat mode='pile_g'>
          <tau units='femtosecond'>{protocol.tau:.6f}</tau> <pile_lambda>0.5</pile_lambda>
        </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""
    )
    return path


def outcome(folder: Path, case: Case, protocol: Protocol) -> Outcome:
    """What the files of a simulation tell: the first failure of all its pieces, or how far it came."""
    last, failures = 0, []
    for piece in _pieces(folder):
        first = _first_step(piece)
        steps, kelvin = _temperatures(piece / "run.out")
        limit = temperature_limit(protocol.criteria, protocol.temperature, case.atoms, case.beads)
        found = judge_temperature(
            steps, kelvin, protocol.criteria, protocol.temperature, limit, protocol.timestep
        )
        if found:
            failures.append(found)
        if seen := load_failure(piece / FAILURE):
            failures.append(_later(seen, first))
        if refused := _refused_by_pool(piece):
            failures.append(_later(refused, first))
        last = max([last, first, *steps[-1:].tolist()])
        if restart := _usable(piece / "RESTART"):
            last = max(last, read_input(restart).first_step)
    if not failures:
        return Outcome(last, None)
    earliest = min(failures, key=lambda failure: failure.step)
    return Outcome(earliest.step, earliest)


def _later(failure: Failure, first: int) -> Failure:
    return Failure(
        first + failure.step, failure.criterion, failure.value, failure.limit, failure.unit, failure.detail
    )


def _pieces(folder: Path) -> list[Path]:
    """The pieces of a simulation in order; one after each stop."""
    found = [path for path in folder.glob("piece-*") if (path / "input.xml").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("piece-")))


def _first_step(piece: Path) -> int:
    return read_input(piece / "input.xml").first_step


def _usable(path: Path) -> Path | None:
    """A checkpoint that was written to its end."""
    try:
        whole = path.read_text().rstrip().endswith("</simulation>")
    except OSError:
        return None
    return path if whole else None


def _temperatures(path: Path) -> tuple[Array, Array]:
    """Steps and temperatures [K] that i-PI has printed; a last line that was cut off is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return np.empty(0), np.empty(0)
    rows = [line.split() for line in text.splitlines()[: text.count("\n")] if line[:1] != "#"]
    whole = [row for row in rows if len(row) == 5]
    table = np.array(whole, dtype=float).reshape(-1, 5)
    return table[:, 0].astype(int), table[:, 2]


def _refused_by_pool(piece: Path) -> Failure | None:
    """What the pool did not let through to i-PI: NaN, or forces that no simulation survives."""
    path = piece / "quarantine.extxyz"
    if not path.is_file():
        return None
    text = path.read_text().splitlines()[1]
    number = re.search(r"\bforce_set=(\d+)", text)
    reason = re.search(r'\breason="([^"]*)"', text)
    words = reason.group(1) if reason else "set aside by the pool"
    force = re.search(r"forces of ([-+.\deE]+) eV/A", words)
    if number is None:
        raise DataError(f"{path} does not tell the force set.", "Remove the folder; the run is done again.")
    if force:
        return Failure(int(number[1]), "force", float(force[1]), None, "eV/Angstrom", words)
    return Failure(int(number[1]), "not finite", None, None, "", words)


class _StoppedError(Exception):
    """Ends :meth:`Run.wait` from inside."""


def advance(
    case: Case,
    structure: Atoms,
    protocol: Protocol,
    folder: Path,
    pool: str,
    stop: threading.Event,
    tell: Callable[[Case, int], None],
) -> Outcome | None:
    """Run a simulation to its end, from where it stands.

    Parameters
    ----------
    case, structure, protocol
        What is simulated and how.
    folder : Path
        The folder of this simulation.
    pool : str
        Address of the pool.
    stop : threading.Event
        Set when everything is to stop softly.
    tell : callable
        Told the step now and then.

    Returns
    -------
    Outcome or None
        None when it was stopped before its end.

    Raises
    ------
    NnqmdError
        The run broke for a reason that says nothing about the model: the disk, the pool, i-PI itself.
    """
    found = outcome(folder, case, protocol)
    if found.failure or found.step >= protocol.steps:
        return found
    if stop.is_set():
        return None
    pieces = _pieces(folder)
    source = None
    for last in reversed(pieces):
        source = _usable(last / "RESTART") or _usable(last / "run.chk")
        if source:
            break
    source = source or write_input(folder, structure, case, protocol)
    piece = folder / f"piece-{1 + max([int(p.name.removeprefix('piece-')) for p in pieces], default=0)}"
    make_folder(piece, force=True)
    save(protocol.criteria, piece / CRITERIA)
    limit = temperature_limit(protocol.criteria, protocol.temperature, case.atoms, case.beads)
    trouble: NnqmdError | None = None
    job = Run(source, piece, pool, protocol.steps)

    def look() -> None:
        tell(case, job.plan.first_step + job.steps_printed())
        kelvin = job.temperature()
        settled = (job.plan.first_step + job.steps_printed()) * protocol.timestep >= protocol.criteria.settle
        if stop.is_set() or (
            settled and kelvin is not None and not abs(kelvin - protocol.temperature) <= limit
        ):
            raise _StoppedError

    try:
        with contextlib.suppress(_StoppedError):
            job.wait(look)
    except ProgramError as error:
        trouble = error  # of a failing simulation as well
    finally:
        job.stop()
    found = outcome(folder, case, protocol)
    if found.failure or found.step >= protocol.steps:
        return found
    if trouble is not None and not stop.is_set():
        raise trouble
    return None
