"""Run i-PI on an input, with forces from a pool."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ase.data import chemical_symbols

from nnqmd_server.doors.address import free_socket, ipi_address, stale_socket
from nnqmd_server.doors.extras import share_extras
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.errors import InputError, OutputError, ProgramError
from nnqmd_server.inputs.parts import Part, check_all_are_asked, equip, find_parts, records_of, separate
from nnqmd_server.inputs.xml import (
    ForceField,
    IpiInput,
    describe,
    parse,
    read_input,
    set_steps,
    with_full_paths,
)
from nnqmd_server.pool.client import Client, PoolClient, cards_of
from nnqmd_server.potentials.base import unknown_elements
from nnqmd_server.potentials.load import card_of, interpreter_of
from nnqmd_server.potentials.sources import lacks_virial

SOFT_EXIT_TIMEOUT = 20.0
"""How long i-PI may take to write RESTART after it was asked to stop [s]."""

LAST_STEP = 3.0
"""How long it may take over its last step meanwhile; then forces that it still waits for are given up [s]."""

_MOVING_CELLS = {"npt", "nst", "scnpt"}
"""Modes of i-PI's ``<dynamics>`` in which the virial moves the cell."""

_FULL = 1 << 16  # bytes; a disk with less than this left is full for all that is written here


@dataclass(frozen=True)
class Finished:
    """How a run ended: steps done, seconds taken, and the folder with everything in it."""

    steps: int
    seconds: float
    folder: Path


def find_ipi() -> str:
    """The i-PI program beside this Python, or on the PATH.

    Raises
    ------
    ProgramError
        There is none.
    """
    beside = Path(sys.executable).parent / "i-pi"
    found = str(beside) if beside.is_file() else shutil.which("i-pi")
    if found is None:
        raise ProgramError("i-PI was not found.", "Install it: pip install 'ipi>=3.3'.")
    return found


def _socket_file(field: ForceField) -> Path | None:
    """The unix socket at which an i-PI with this force field listens."""
    if field.kind != "socket" or field.mode == "inet":
        return None
    return Path(ipi_address(field.mode, field.address).path)


def check(
    source: Path, models: Mapping[str, str], remove_stale: bool = False, leave: Collection[str] = ()
) -> tuple[IpiInput, list[Part]]:
    """Find what would stop a run before anything is started.

    Parameters
    ----------
    source : Path
        The i-PI input.
    models : mapping of str to str
        Sources of the potentials by name.
    remove_stale : bool
        Remove the socket files that a killed i-PI has left behind.
    leave : collection of str
        Names of force fields that somebody else answers.

    Returns
    -------
    tuple
        The input as it will be run, and the parts of its forces that we answer.

    Raises
    ------
    NnqmdError
        The input, a model, the elements, i-PI itself or a socket it needs is not as it should be.
    """
    cards = {name: card_of(model) for name, model in models.items()}
    root = parse(source)
    separate(root, source, leave)
    parts = find_parts(root, source, models, leave)
    check_virials(root, source, [models[part.potential] for part in parts])
    check_all_are_asked(parts, models, source)
    find_ipi()
    for part in parts:
        if path := _socket_file(part.field):
            free_socket(path, remove_stale)
        card = cards[part.potential]
        symbols = {chemical_symbols[z] for z in part.numbers.tolist()}
        if card and (unknown := sorted(symbols - set(card.elements))):
            raise unknown_elements(card, unknown)
    return describe(root, source), parts


def check_virials(root: ET.Element, path: Path, sources: Iterable[str]) -> None:
    """Make sure that no barostat would follow a virial of zero.

    Raises
    ------
    InputError
        The cell moves, and a potential was told to do without its stress.
    """
    modes = {node.get("mode", "") for node in root.iter("dynamics")}
    moving = sorted(mode for mode in modes if mode in _MOVING_CELLS)
    if moving and any(lacks_virial(interpreter_of(source)[0]) for source in sources):
        raise InputError(
            f"{path} moves the cell ({moving[0]}), and a potential with stress=none has a virial of zero.",
            "Use stress=finite, or another potential; or mode nvt.",
        )


def make_folder(folder: Path, force: bool) -> None:
    """Make the folder of a run; an earlier run in it is kept unless ``force``.

    Raises
    ------
    OutputError
        The folder cannot be made or written, or holds a run already.
    """
    if (folder / "input.xml").exists() and not force:
        raise OutputError(
            f"{folder} holds a run already.", "Choose another --out, or say --force to replace it."
        )
    try:
        if force and (folder / "input.xml").exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise OutputError(
            f"Cannot write into {folder}: {error}.", "Choose another --out, or make room."
        ) from error


class Run:
    """An i-PI process with its door, in a folder of its own.

    Parameters
    ----------
    source : Path
        The i-PI input.
    folder : Path
        Where everything goes; see :func:`make_folder`.
    pool : str
        Address of the pool.
    steps : int, optional
        Another number of steps.
    extras : tuple of str
        Properties that i-PI gets as extras, for sockets; the direct door reads them from the input.
    leave : collection of str
        Names of force fields that somebody else answers.
    client : callable, optional
        Makes a client for a potential where the pool is of this process; one of its address unless given.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        pool: str,
        steps: int | None = None,
        extras: tuple[str, ...] = (),
        leave: Collection[str] = (),
        client: Callable[[str], Client] | None = None,
    ) -> None:
        cards = cards_of(pool)
        with_dipoles = [name for name, card in cards.items() if "dipole" in card["properties"]]
        self._prepare(source, folder, cards, with_dipoles, steps, leave)
        command = [sys.executable, "-m", "nnqmd_server.inputs.leash", find_ipi(), "input.xml"]
        sockets = [
            (part, record)
            for part, record in zip(self.parts, self.records, strict=True)
            if part.field.kind == "socket"
        ]
        shared = share_extras(extras, [cards[part.potential] for part, _ in sockets])
        ask = client or (lambda potential: PoolClient(pool, potential=potential))
        self._doors = [
            self._make_door(part, record, ask(part.potential), wanted)
            for (part, record), wanted in zip(sockets, shared, strict=True)
        ]
        self._start(command, {"NNQMD_POOL": pool})

    def _prepare(
        self,
        source: Path,
        folder: Path,
        potentials: Collection[str],
        with_dipoles: Collection[str],
        steps: int | None,
        leave: Collection[str],
    ) -> None:
        """Write the input that is run, and find who answers which part of its forces."""
        root = parse(source)
        with_full_paths(root, source)
        separate(root, source, leave)
        self.parts = find_parts(root, source, potentials, leave)
        self.with_dipoles = with_dipoles
        self.records = records_of(self.parts, describe(root, source), with_dipoles)
        equip(root, self.parts, self.records, folder)
        if steps is not None:
            set_steps(root, steps)
        ET.ElementTree(root).write(folder / "input.xml", encoding="unicode")
        self.plan = read_input(folder / "input.xml")
        self.folder = folder
        self.log = folder / "i-pi.log"
        self._doors: list[SocketDoor] = []

    def _start(self, command: Sequence[str], settings: Mapping[str, str]) -> None:
        self._started = time.monotonic()
        with self.log.open("w") as output:
            # A session of its own: Ctrl-C is ours to pass on, as a request to stop softly.
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._threads = [serve_in_thread(door) for door in self._doors]

    def _make_door(
        self, part: Part, record: Path | None, client: Client, extras: Sequence[str]
    ) -> SocketDoor:
        own = "" if len(self.parts) == 1 else f"-{part.name}"
        sets = ForceSets(
            client,
            part.numbers,
            part.force.n_beads,
            self.folder / record if record else None,
            extras,
            self.folder / f"quarantine{own}.extxyz",
        )
        where = ipi_address(part.field.mode, part.field.address, part.field.port)
        return SocketDoor(where, sets, part.force.n_beads, part.field.batch_size)

    def steps_done(self, structures: int) -> int:
        """Steps that are done when the pool has evaluated some number of structures for this run.

        Each part has been asked once for the initial configuration, and since then as often as its level
        of multiple time stepping says.
        """
        per_step = sum(part.force.n_beads * part.force.per_step for part in self.parts)
        first = sum(part.force.n_beads for part in self.parts if part.force.per_step)
        return max(0, structures - first) // max(1, per_step)

    def temperature(self) -> float | None:
        """The newest temperature [K] in i-PI's property file, if it writes one."""
        return self._printed("temperature")

    def steps_printed(self) -> int:
        """The newest step in i-PI's property file, less those of earlier runs; 0 if it writes none."""
        return max(0, int(self._printed("step") or 0) - self.plan.first_step)

    def _printed(self, name: str) -> float | None:
        prefixes = [f"{system.prefix}_" * bool(system.prefix) for system in self.plan.systems]
        paths = [path for p in prefixes for path in sorted(self.folder.glob(f"{p}{self.plan.prefix}.*"))]
        for path in paths:
            found = _last_property(path, name)
            if found is not None:
                return found
        return None

    def wait(self, tell: Callable[[], None], interval: float = 0.25) -> Finished:
        """Wait until i-PI has ended, calling ``tell`` now and then.

        Raises
        ------
        ProgramError
            i-PI failed or ended early; the message says why, as far as its log tells.
        """
        while self._process.poll() is None:
            tell()
            if any(door.failure for door in self._doors):
                break
            time.sleep(interval)
        self.stop()
        for error in [door.failure for door in self._doors if door.failure][:1]:
            raise ProgramError(f"{error.what}{self._kept()}", error.fix) from error
        tell()
        self._check_end()
        return Finished(
            self.plan.n_steps - self.plan.first_step, time.monotonic() - self._started, self.folder
        )

    def stop(self) -> None:
        """Ask i-PI to stop softly, so that it writes RESTART; kill it if it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            if not self._ends_within(LAST_STEP):
                # It looks at signals when no client owes it an answer.
                self._stop_doors()
                if not self._ends_within(SOFT_EXIT_TIMEOUT):
                    self._process.kill()
                    self._process.wait()
        self._stop_doors()
        for thread in self._threads:
            thread.join(timeout=10)
        self._clear_sockets()

    def _stop_doors(self) -> None:
        for door in self._doors:
            door.stop()

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _clear_sockets(self) -> None:
        """Remove the socket files that our i-PI leaves behind when it is killed."""
        for part in self.parts:
            path = _socket_file(part.field)
            if path and stale_socket(path):
                path.unlink(missing_ok=True)

    def _kept(self) -> str:
        restart = self.folder / "RESTART"
        return f" {restart} was written." if restart.exists() else ""

    def _check_end(self) -> None:
        text = self.log.read_text(errors="replace")
        ours = re.search(r"^nnqmd: (.*?)(?:\nFix: (.*))?$", text, re.MULTILINE)
        kept = self._kept()
        if "No space left on device" in text or shutil.disk_usage(self.folder).free < _FULL:
            raise OutputError(
                f"The disk is full: i-PI could not write into {self.folder}.{kept}",
                "Make room, then restart.",
            )
        if ours:
            raise ProgramError(f"{ours.group(1)}{kept}", ours.group(2) or f"See {self.log}.")
        if self._process.returncode != 0 or "Restartable as is: YES" in text:
            last = [line for line in text.strip().splitlines() if line.strip()][-1:]
            raise ProgramError(
                f"i-PI ended early (exit status {self._process.returncode}): {' '.join(last)}{kept}",
                f"See {self.log}.",
            )


def _last_property(path: Path, name: str) -> float | None:
    """Last value of a column of an i-PI property file, or None when this is not one."""
    try:
        with path.open("rb") as file:
            head = file.read(8192).decode(errors="replace")
            column = re.search(rf"^# column +(\d+).*--> {name}\b", head, re.MULTILINE)
            if column is None:
                return None
            file.seek(max(0, path.stat().st_size - 4096))
            rows = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    numbers = [row.split() for row in rows if row.strip() and not row.startswith("#")]
    index = int(column.group(1)) - 1
    try:
        return float(numbers[-1][index])
    except (IndexError, ValueError):
        return None
