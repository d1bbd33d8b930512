"""Worker processes on this machine: how many, on which device, started, watched and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nnqmd_server
from nnqmd_server.errors import PoolError
from nnqmd_server.potentials.load import absolute, interpreter_of

STOP_TIMEOUT = 0.5
"""How long a worker may take to end before it is killed [s]; nobody waits for its last share any more."""

DRAIN_TIMEOUT = 60.0
"""How long a worker that is asked to leave may take to finish its last share [s]."""


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
    """One worker per GPU, or one single-threaded worker per core where there is no GPU; 0 is allowed."""
    if workers == 0:
        return Plan(0, "cpu")
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


def by_interpreter(models: Mapping[str, str]) -> dict[str | None, dict[str, str]]:
    """The sources that each interpreter loads; None is ours."""
    found: dict[str | None, dict[str, str]] = {}
    for name, source in models.items():
        found.setdefault(interpreter_of(source)[1], {})[name] = source
    return found


def worker_command(python: str | None = None, module: str = "nnqmd_server.pool.worker") -> list[str]:
    """How a worker process is started, in this interpreter or in another one; or another ``module`` of ours.

    The other one need not have nnqmd installed: it is given ours, and nothing else of this environment.
    """
    if python is None:
        return [sys.executable, "-m", module]
    package = Path(nnqmd_server.__file__).parent
    lines = [
        "import sys, importlib.util as u",
        f"s = u.spec_from_file_location('nnqmd_server', {str(package / '__init__.py')!r},"
        f" submodule_search_locations=[{str(package)!r}])",
        "sys.modules['nnqmd_server'] = m = u.module_from_spec(s)",
        "s.loader.exec_module(m)",
        f"from {module} import main",
        "main()",
    ]
    return [python, "-c", "\n".join(lines)]


@dataclass(frozen=True)
class Recipe:
    """What every worker process is started with.

    Parameters
    ----------
    models : mapping of str to str
        Sources of the potentials by name; each interpreter that they ask for gets workers of its own.
    pool : str
        Address at which they join.
    logs : Path
        Folder for their logs.
    eager : bool
        Do not compile the models.
    hashes : mapping of str to str
        SHA-256 that a model must have, by name.
    keys : Path, optional
        Key file for TCP.
    patience : float, optional
        How long a worker waits for a pool that is gone [s]; for ever unless given.
    """

    models: Mapping[str, str]
    pool: str
    logs: Path
    eager: bool = False
    hashes: Mapping[str, str] | None = None
    keys: Path | None = None
    patience: float | None = None


class Processes:
    """Worker processes that were started here.

    Parameters
    ----------
    recipe : Recipe
        What they are started with.
    plan : Plan
        How many for each interpreter, and where.
    first : int
        Number of the first one; chooses its device too.
    """

    def __init__(self, recipe: Recipe, plan: Plan, first: int = 0) -> None:
        self.recipe = recipe
        self.plan = plan
        self.all: list[subprocess.Popen] = []
        self.logs: list[Path] = []
        self._made: list[tuple[str | None, Mapping[str, str], int, int]] = []
        try:
            for python, sources in by_interpreter(recipe.models).items():
                for rank in range(plan.workers):
                    self._made.append((python, sources, first + len(self.all), first + rank))
                    self.all.append(self._start(*self._made[-1]))
        except OSError:
            self.stop()
            raise

    def again(self, ended: subprocess.Popen) -> None:
        """Start one that has ended once more: with the same number, on the same device, in the same log."""
        place = self.all.index(ended)
        self.all[place] = self._start(*self._made[place])

    def _start(
        self, python: str | None, sources: Mapping[str, str], index: int, local: int
    ) -> subprocess.Popen:
        recipe = self.recipe
        command = worker_command(python)
        command += ["--pool", recipe.pool, "--index", str(index), "--device", self.plan.device]
        for name, source in sources.items():
            command += ["--model", f"{name}={absolute(source)}"]
            if recipe.hashes and name in recipe.hashes:
                command += ["--sha256", f"{name}={recipe.hashes[name]}"]
        command += ["--eager"] if recipe.eager else []
        command += ["--keys", str(recipe.keys)] if recipe.keys else []
        command += ["--patience", str(recipe.patience)] if recipe.patience else []
        settings = os.environ | worker_settings(self.plan.threads)
        if self.plan.device == "cuda":
            settings["CUDA_VISIBLE_DEVICES"] = gpu_of(local)
        recipe.logs.mkdir(parents=True, exist_ok=True)
        log = recipe.logs / f"worker-{index}.log"
        if log not in self.logs:
            log.unlink(missing_ok=True)
            self.logs.append(log)
        with log.open("a") as output:
            # A session of their own: mpiexec and terminals signal whole groups, and the last share is to be
            # finished. Who starts workers stops them, and they end when it is gone.
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=settings,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def ended(self) -> list[subprocess.Popen]:
        """Those that have ended."""
        return [process for process in self.all if process.poll() is not None]

    def last_words(self) -> str:
        """The last line that each worker logged, for error messages."""
        lines = []
        for log in self.logs:
            text = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            lines += [f"{log}: {text[-1][:300]}"] if text else []
        return " | ".join(lines)

    def drain(self) -> None:
        """Ask all to finish what they have and to leave."""
        for process in self.all:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def stop(self, patience: float = STOP_TIMEOUT) -> None:
        """Wait until all have ended; kill those that take longer than ``patience`` [s]."""
        deadline = time.monotonic() + patience
        for process in self.all:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def gpu_of(local: int) -> str:
    """The GPU of the worker with a number on this machine, for ``CUDA_VISIBLE_DEVICES``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = visible.split(",") if visible else [str(k) for k in range(count_gpus())]
    if not cards:
        raise PoolError("No GPU was found.", "Leave out --device, or use --device cpu.")
    return cards[local % len(cards)]
