"""A study: many simulations over one pool, and the file of results from which a stopped one goes on."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from nnqmd_server import __version__
from nnqmd_server.errors import InputError, OutputError
from nnqmd_server.fidelity.criteria import as_settings
from nnqmd_server.fidelity.simulation import Case, Outcome, Protocol, advance, supercell
from nnqmd_server.structures import Array

SETTINGS = "settings.json"
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Record:
    """One line of the results file: what was simulated, and how it ended.

    ``steps`` is how far it came, ``time_fs`` the same in fs, ``limit_fs`` the time at which it would have
    been censored; ``failure`` is empty for a run that lives.
    """

    model: str
    sha256: str
    atoms: int
    beads: int
    seed: int
    failed: bool
    steps: int
    time_fs: float
    limit_fs: float
    criterion: str
    failure: str
    seconds: float

    @property
    def case(self) -> Case:
        """The simulation."""
        return Case(self.model, self.atoms, self.beads, self.seed)


@dataclass(frozen=True)
class Runs:
    """The runs of one model and number of beads, as arrays of shape (n_runs,); times in fs."""

    model: str
    beads: int
    times: Array
    failed: Array
    atoms: Array
    limits: Array

    @property
    def name(self) -> str:
        """For legends and tables."""
        return f"{self.model}, {self.beads} {'bead' if self.beads == 1 else 'beads'}"


def make_cases(
    models: Iterable[str], sizes: Iterable[int], beads: Iterable[int], seeds: Iterable[int]
) -> list[Case]:
    """All simulations of a study; every size has its first seed before any has its second."""
    return [
        Case(model, size, count, seed)
        for seed in sorted(seeds)
        for count in sorted(beads)
        for size in sorted(sizes)
        for model in models
    ]


def claim(folder: Path, structure: Atoms, protocol: Protocol) -> None:
    """Make the folder of a study, or check that it holds one with the same protocol.

    Raises
    ------
    InputError
        It was begun with another protocol.
    OutputError
        It cannot be written.
    """
    ours = _settings(structure, protocol)
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            path.write_text(json.dumps(ours, indent=1) + "\n")
            return
        theirs = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written or read: {error}.", "Choose another --out.") from error
    other = [
        f"{key} is {ours.get(key)} and was {theirs.get(key)}"
        for key in ours
        if key != "version" and ours[key] != theirs.get(key)
    ]
    if other:
        raise InputError(
            f"{folder} holds a study that was done otherwise: {'; '.join(other)}.",
            "Choose another --out, or give the same options to go on with it.",
        )


def _settings(structure: Atoms, protocol: Protocol) -> dict[str, Any]:
    """What must be the same in all runs of a study; not the number of steps, which may grow."""
    return {
        "version": __version__,
        "ensemble": "NVT, stochastic velocity rescaling of the centroid, PILE on internal modes",
        "temperature_K": protocol.temperature,
        "timestep_fs": protocol.timestep,
        "tau_fs": protocol.tau,
        "isotopes": dict(protocol.isotopes),
        "cell_A": np.round(structure.cell.array, 8).tolist(),
        "elements": structure.get_chemical_symbols(),
        "positions_A": np.round(structure.positions, 8).tolist(),
        **as_settings(protocol.criteria),
    }


def read_results(folder: Path) -> list[Record]:
    """The results of a study, the newest of each simulation; a last line that was cut off is left out.

    Raises
    ------
    InputError
        There are none, or they are not a results file.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    text = path.read_text()
    newest: dict[tuple[Case, str], Record] = {}
    for number, line in enumerate(text.splitlines()[: text.count("\n")], 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(f"Line {number} of {path} is no result: {error}.", "Remove the line.") from error
        newest[record.case, record.sha256] = record
    return list(newest.values())


def _append(folder: Path, record: Record) -> None:
    path = folder / RESULTS
    try:
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            _cut_last_line(path)
        with path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error}.", "Make room, then repeat the command."
        ) from error


def _cut_last_line(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(data.rfind(b"\n") + 1)


def run_study(
    cases: Sequence[Case],
    hashes: Mapping[str, str],
    structure: Atoms,
    protocol: Protocol,
    folder: Path,
    pool: str,
    parallel: int,
    tell: Callable[[list[Record], Mapping[Case, int]], None],
    check: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Do what is not done yet of a study, several simulations at a time.

    Parameters
    ----------
    cases : sequence of Case
        The simulations.
    hashes : mapping of str to str
        SHA-256 of each model by name; "" where it has none.
    structure : Atoms
        The cell of which supercells are made.
    protocol : Protocol
        How each is done.
    folder : Path
        The folder of the study, see :func:`claim`.
    pool : str
        Address of the pool.
    parallel : int
        Simulations at one time.
    tell : callable
        Told the records so far, and the step of each simulation that runs.
    check : callable
        Raises when it is no use to go on.

    Returns
    -------
    list of Record
        All results of these cases.

    Raises
    ------
    NnqmdError
        A simulation could not be done; those that ran beside it have been stopped softly.
    """
    wanted = {(case, hashes[case.model]) for case in cases}
    done = {
        (r.case, r.sha256): r
        for r in read_results(folder)
        if (r.case, r.sha256) in wanted and (r.failed or r.steps >= protocol.steps)
    }
    left = [case for case in cases if (case, hashes[case.model]) not in done]
    cells = {size: supercell(structure, size) for size in {case.atoms for case in cases}}
    stop = threading.Event()
    steps: dict[Case, int] = {}
    tell(list(done.values()), {})

    def one(case: Case) -> tuple[Outcome | None, float]:
        began = time.monotonic()
        # A model that was trained again under the same name is another model.
        own = folder / "simulations" / f"{case.name}-{hashes[case.model][:8]}".rstrip("-")
        try:
            return advance(case, cells[case.atoms], protocol, own, pool, stop, steps.__setitem__), (
                time.monotonic() - began
            )
        finally:
            steps.pop(case, None)

    with ThreadPoolExecutor(parallel, thread_name_prefix="nnqmd-fidelity") as threads:
        running: dict[Future, Case] = {threads.submit(one, case): case for case in left}
        try:
            while running:
                ended, _ = wait(running, 0.25, FIRST_COMPLETED)
                for future in ended:
                    case = running.pop(future)
                    found, seconds = future.result()
                    if found is not None:
                        record = _record(case, hashes[case.model], found, protocol, seconds)
                        _append(folder, record)
                        done[case, record.sha256] = record
                tell(list(done.values()), dict(steps))
                check()
        except BaseException:  # Ctrl-C too: what runs is to write its RESTART
            stop.set()
            for future in running:
                future.cancel()
            raise
    return list(done.values())


def _record(case: Case, sha256: str, found: Outcome, protocol: Protocol, seconds: float) -> Record:
    failure = found.failure
    if failure and failure.step == 0:
        raise InputError(
            f"{case.name} has failed before its first step: {failure.words()}.",
            "Give another --structure, or looser criteria.",
        )
    return Record(
        model=case.model,
        sha256=sha256,
        atoms=case.atoms,
        beads=case.beads,
        seed=case.seed,
        failed=failure is not None,
        steps=found.step,
        time_fs=found.step * protocol.timestep,
        limit_fs=protocol.steps * protocol.timestep,
        criterion=failure.criterion if failure else "",
        failure=failure.words() if failure else "",
        seconds=round(seconds, 1),
    )


def by_series(records: Sequence[Record]) -> list[Runs]:
    """The results by model and number of beads, in the order in which models were first seen."""
    models = list(dict.fromkeys(r.model for r in records))
    keys = {(r.model, r.beads) for r in records}
    series = []
    for model, beads in sorted(keys, key=lambda key: (models.index(key[0]), key[1])):
        own = [r for r in records if (r.model, r.beads) == (model, beads)]
        series.append(
            Runs(
                model,
                beads,
                np.array([r.time_fs for r in own]),
                np.array([r.failed for r in own]),
                np.array([r.atoms for r in own]),
                np.array([r.limit_fs for r in own]),
            )
        )
    return series
