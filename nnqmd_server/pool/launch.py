"""Start and stop a pool with its worker processes on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from nnqmd_server.errors import AddressError, NnqmdError, OutputError, PoolError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.scheduler import Pool, Status
from nnqmd_server.potentials.package import read_card

STOP_TIMEOUT = 10.0
"""How long a worker may take to finish its last share before it is killed [s]."""


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"])
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


@dataclass(frozen=True)
class Plan:
    """How many workers on which device, and how many threads each has."""

    workers: int
    device: str
    threads: int = 1


def plan(workers: int | None = None, device: str = "auto") -> Plan:
    """One worker per GPU, or one single-threaded worker per core where there is no GPU."""
    gpus = count_gpus() if device in {"auto", "cuda"} else 0
    if device == "cuda" and not gpus:
        raise PoolError("No GPU was found.", "Leave out --device, or use --device cpu.")
    if gpus:
        return Plan(workers or gpus, "cuda")
    return Plan(workers or len(os.sched_getaffinity(0)), "cpu")


def worker_settings(threads: int = 1) -> dict[str, str]:
    """Environment of a worker process.

    The workers share the cores among them, one thread each. Every evaluation takes and frees the same large
    buffers; glibc would give them back to the system each time and spend a quarter of a CPU worker's time
    on fresh pages, so it is told to keep them (mallopt(3)).
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 26),
    }


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user can enter, or check that it is one.

    Raises
    ------
    AddressError
        It exists and belongs to, or is open to, somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise AddressError(
            f"The socket folder {folder} is open to other users.", f"chmod 700 {folder}, or choose another."
        )
    return folder


def _free(address: str) -> None:
    """Make sure that nobody listens at an address yet; a socket file that nobody listens on is removed."""
    if address.startswith("tcp://"):
        host = address.removeprefix("tcp://").rpartition(":")[0]
        if host not in {"127.0.0.1", "localhost", "[::1]"}:
            raise AddressError(
                f"{address} can be reached from other machines, and connections are not authenticated.",
                "Use tcp://127.0.0.1:PORT, or an ipc:// address.",
            )
        return
    if not address.startswith("ipc://"):
        raise AddressError(f"{address} is not an address.", "Use ipc:///folder/name or tcp://127.0.0.1:PORT.")
    path = Path(address.removeprefix("ipc://"))
    if len(str(path)) > 100:
        raise AddressError(f"The socket path {path} is longer than 100 characters.", "Choose a shorter one.")
    private_folder(path.parent)
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
                return
        raise AddressError(
            f"Another pool is listening at {address}.", "Stop it, or give this one another --address."
        )


class LocalPool:
    """A pool and its workers on this machine.

    Parameters
    ----------
    model : Path
        The packaged model.
    logs : Path
        Folder for the workers' logs.
    address : str, optional
        Where doors ask; a private ipc socket unless given.
    workers, device : optional
        See :func:`plan`.
    eager : bool
        Do not compile the model.
    """

    def __init__(
        self,
        model: Path,
        logs: Path,
        address: str | None = None,
        workers: int | None = None,
        device: str = "auto",
        eager: bool = False,
    ) -> None:
        self.card = read_card(model)
        self.plan = plan(workers, device)
        self._folder = Path(tempfile.mkdtemp(prefix="nnqmd-"))
        self.address = address or f"ipc://{self._folder}/pool"
        back = f"ipc://{self._folder}/workers"
        self._processes: list[subprocess.Popen] = []
        self._watching = threading.Event()
        self._logs = logs
        self._pool: Pool | None = None
        try:
            _free(self.address)
            self._pool = Pool(self.address, back)
            self._pool.start()
            for index in range(self.plan.workers):
                self._processes.append(self._start_worker(model, back, index, eager))
        except zmq.ZMQError as error:
            self.stop()
            raise AddressError(
                f"Cannot listen at {self.address}: {error}.", "Choose another address or port."
            ) from error
        except OSError as error:
            self.stop()
            raise OutputError(f"Cannot start workers: {error}.", f"Check that {logs} is writable.") from error
        except NnqmdError:
            self.stop()
            raise
        self._watch = threading.Thread(target=self._watch_workers, name="nnqmd-watch", daemon=True)
        self._watch.start()

    def _start_worker(self, model: Path, back: str, index: int, eager: bool) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "nnqmd_server.pool.worker",
            "--pool",
            back,
            "--model",
            str(model.resolve()),
        ]
        command += ["--index", str(index), "--device", self.plan.device] + (["--eager"] if eager else [])
        settings = os.environ | worker_settings(self.plan.threads)
        if self.plan.device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            cards = visible.split(",") if visible else [str(k) for k in range(count_gpus())]
            settings["CUDA_VISIBLE_DEVICES"] = cards[index % len(cards)]
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"worker-{index}.log").open("w") as output:
            # A session of their own: mpiexec and terminals signal whole groups, and the last share is to be
            # finished. The pool stops its workers itself, and they end when it is gone.
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=settings,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _watch_workers(self) -> None:
        reported: set[int] = set()
        while not self._watching.wait(0.1):
            for process in self._processes:
                if process.pid not in reported and process.poll() is not None:
                    reported.add(process.pid)
                    self._pool.worker_died(process.pid)
            if len(reported) == len(self._processes):
                self._pool.give_up(f"All workers have ended. {self.last_words()}")
                return

    def check(self) -> None:
        """Raise when no worker is left.

        Raises
        ------
        PoolError
            All workers have ended.
        """
        if all(process.poll() is not None for process in self._processes):
            raise PoolError(f"All workers have ended. {self.last_words()}", f"See {self._logs}.")

    def last_words(self) -> str:
        """The last line that each worker logged, for error messages."""
        lines = []
        for log in sorted(self._logs.glob("worker-*.log")):
            text = log.read_text(errors="replace").strip().splitlines()
            lines += [f"{log}: {text[-1][:300]}"] if text else []
        return " | ".join(lines)

    def wait_ready(self, timeout: float = 1500.0, tell: Callable[[str], None] | None = None) -> None:
        """Wait until every worker has loaded its model.

        Parameters
        ----------
        timeout : float
            Longest wait [s]; the first start compiles the model.
        tell : callable, optional
            Called now and then with a line that says what is being waited for.

        Raises
        ------
        PoolError
            A worker has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while len(self.status().workers) < self.plan.workers:
            if any(process.poll() is not None for process in self._processes):
                raise PoolError(
                    f"A worker ended while it was loading the model. {self.last_words()}",
                    f"See {self._logs}.",
                )
            if time.monotonic() > deadline:
                raise PoolError(f"The workers were not ready after {timeout:.0f} s.", f"See {self._logs}.")
            if tell:
                ready = len(self.status().workers)
                tell(f"{ready} of {self.plan.workers} workers ready (the first start compiles the model)")
            time.sleep(0.1)

    def status(self) -> Status:
        """See :meth:`Pool.status`."""
        return self._pool.status()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [process.pid for process in self._processes]

    def stop(self) -> None:
        """Stop the workers and the pool, and remove their sockets."""
        self._watching.set()
        if self._pool is not None:
            self._pool.stop()
        deadline = time.monotonic() + STOP_TIMEOUT
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self.address.startswith("ipc://") and self._pool is not None:
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def pool_card(address: str, patience: float = 5.0) -> dict:
    """Card of the pool at an address."""
    client = PoolClient(address, patience)
    try:
        return client.card()
    finally:
        client.close()
