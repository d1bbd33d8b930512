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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ase.data import chemical_symbols

from nnqmd_server.doors.address import free_socket, ipi_address, stale_socket
from nnqmd_server.doors.force_sets import ForceSets
from nnqmd_server.doors.socket import SocketDoor, serve_in_thread
from nnqmd_server.errors import InputError, OutputError, ProgramError
from nnqmd_server.inputs.xml import ForceField, IpiInput, read_elements, read_input, write_run_copy
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.potentials.base import unknown_elements
from nnqmd_server.potentials.package import read_card

SOFT_EXIT_TIMEOUT = 20.0
"""How long i-PI may take to write RESTART after it was asked to stop [s]."""

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


def our_force_field(plan: IpiInput) -> ForceField:
    """The force field of an input that we can answer.

    Raises
    ------
    InputError
        There is none, or it is set up so that it would be slow or never answered.
    """
    usable = [f for f in plan.force_fields if f.kind == "socket" or _is_ours(f, plan.path)]
    if not usable:
        raise InputError(
            f"{plan.path} has no force field that nnqmd can answer.",
            "Add <ffdirect> with <pes>custom</pes> and the nnqmd_pes.py of ipi_inputs/, or an <ffsocket>.",
        )
    if len(usable) > 1:
        raise InputError(
            f"{plan.path} has {len(usable)} force fields that nnqmd could answer.",
            "`nnqmd run` takes inputs with one.",
        )
    field = usable[0]
    if field.kind == "direct" and field.batch_size != plan.n_beads:
        raise InputError(
            f"<batch_size> is {field.batch_size} and the simulation has {plan.n_beads} beads.",
            f"Set <batch_size>{plan.n_beads}</batch_size>, so that i-PI asks for all beads at once.",
        )
    if field.kind == "socket" and field.mode not in {"unix", "inet", "shm"}:
        raise InputError(
            f"The <ffsocket> has mode {field.mode!r}.",
            "Use mode='unix', 'inet' or 'shm', or the direct door (<ffdirect>).",
        )
    if field.batch_size < 1:
        raise InputError(f"<batch_size> is {field.batch_size}.", "Set it to the number of beads.")
    return field


def _is_ours(field: ForceField, path: Path) -> bool:
    if field.kind != "direct" or field.mode != "custom":
        return False
    try:
        return "nnqmd_server" in (path.resolve().parent / field.pes_path).read_text()
    except OSError as error:
        raise InputError(
            f"{path} names the PES {field.pes_path}, which cannot be read: {error}.", "Correct <pes_path>."
        ) from error


def _socket_file(field: ForceField) -> Path | None:
    """The unix socket at which an i-PI with this force field listens."""
    if field.kind != "socket" or field.mode == "inet":
        return None
    return Path(ipi_address(field.mode, field.address).path)


def check(source: Path, model: Path, remove_stale: bool = False) -> IpiInput:
    """Find what would stop a run before anything is started.

    Parameters
    ----------
    source : Path
        The i-PI input.
    model : Path
        The packaged model.
    remove_stale : bool
        Remove the socket file that a killed i-PI has left behind.

    Raises
    ------
    NnqmdError
        The input, the model, the elements, i-PI itself or a socket it needs is not as it should be.
    """
    plan = read_input(source)
    card = read_card(model)
    field = our_force_field(plan)
    find_ipi()
    if path := _socket_file(field):
        free_socket(path, remove_stale)
    numbers = set(read_elements(source).tolist())
    unknown = sorted(chemical_symbols[z] for z in numbers if chemical_symbols[z] not in card.elements)
    if unknown:
        raise unknown_elements(card, unknown)
    return plan


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
    """

    def __init__(
        self, source: Path, folder: Path, pool: str, steps: int | None = None, extras: tuple[str, ...] = ()
    ) -> None:
        self.field = our_force_field(read_input(source))
        program = find_ipi()
        copy = write_run_copy(source, folder, steps)
        self.plan = read_input(copy)
        self.folder = folder
        self.log = folder / "i-pi.log"
        self._door: SocketDoor | None = None
        self._started = time.monotonic()
        if self.field.kind == "socket":
            self._door = self._make_door(pool, extras)
        environment = {**os.environ, "NNQMD_POOL": pool, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as output:
            # A session of its own: Ctrl-C is ours to pass on, as a request to stop softly.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nnqmd_server.inputs.leash", program, copy.name],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._thread = serve_in_thread(self._door) if self._door else None

    def _make_door(self, pool: str, extras: tuple[str, ...]) -> SocketDoor:
        sets = ForceSets(
            PoolClient(pool),
            read_elements(self.plan.path),
            self.plan.n_beads,
            self.folder / "dipoles.h5",
            extras,
            self.folder / "quarantine.extxyz",
        )
        where = ipi_address(self.field.mode, self.field.address, self.field.port)
        return SocketDoor(where, sets, self.plan.n_beads, self.field.batch_size)

    def temperature(self) -> float | None:
        """The newest temperature [K] in i-PI's property file, if it writes one."""
        for path in sorted(self.folder.glob(f"{self.plan.prefix}.*")):
            found = _last_property(path, "temperature")
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
            if self._door and self._door.failure:
                break
            time.sleep(interval)
        self.stop()
        if self._door and self._door.failure:
            error = self._door.failure
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
            try:
                self._process.wait(SOFT_EXIT_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._door:
            self._door.stop()
        if self._thread:
            self._thread.join(timeout=10)
        self._clear_socket()

    def _clear_socket(self) -> None:
        """Remove the socket file that our i-PI leaves behind when it is killed."""
        path = _socket_file(self.field)
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
