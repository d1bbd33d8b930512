"""How long a potential takes, batch by batch, in a process of its own.

The process (``python -m nnqmd_server.potentials.timing``) is started with a worker's environment by
:mod:`nnqmd_server.pool.sizing`, reads one line of JSON and writes lines of JSON, each behind :data:`MARK`,
since foreign code may print as well. Like a worker it needs nothing of ours but numpy.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nnqmd_server.errors import NnqmdError
from nnqmd_server.potentials.base import Potential
from nnqmd_server.potentials.einstein import RingPolymers, ring_polymers
from nnqmd_server.potentials.load import load
from nnqmd_server.structures import Structures

MARK = "nnqmd-timing "
"""What our lines begin with."""

STAGES = ("lists", "copies", "model")
"""Parts of an evaluation whose seconds a potential may add up in its ``spent``."""

QUICK = 0.5
"""An evaluation that takes longer than this is measured once rather than three times [s]."""

_WARM_UP = 2  # a compiled model allocates at the first call of a size, TorchScript compiles at the second


@dataclass(frozen=True)
class Rings:
    """What ring polymers are made of, as it is handed to another process.

    Parameters
    ----------
    numbers, masses, places, cell : list
        See :func:`~nnqmd_server.potentials.einstein.ring_polymers`.
    n_beads : int
        Beads of each ring.
    temperature : float
        [K].
    timestep : float
        Between two force sets [fs].
    """

    numbers: list[int]
    masses: list[float]
    places: list[list[float]]
    cell: list[list[float]]
    n_beads: int
    temperature: float
    timestep: float

    def draw(self) -> RingPolymers:
        """The ring polymers."""
        return ring_polymers(
            np.array(self.numbers),
            np.array(self.masses),
            np.array(self.places),
            np.array(self.cell),
            self.n_beads,
            self.temperature,
        )


@dataclass(frozen=True)
class BatchTime:
    """How long one batch takes.

    Parameters
    ----------
    batch : int
        Beads evaluated together.
    milliseconds : list of float
        Of each evaluation of the whole batch, in the order measured.
    shares : dict of float
        Of the time of an evaluation, in each of :data:`STAGES`; empty when the potential does not tell.
    memory_mb : float
        Largest resident memory of the process until now [MB].
    gpu_mb : float
        Largest memory of the GPU that torch held during this batch [MB]; 0 without one.
    """

    batch: int
    milliseconds: list[float]
    shares: dict[str, float] = field(default_factory=dict)
    memory_mb: float = 0.0
    gpu_mb: float = 0.0

    @property
    def per_bead(self) -> float:
        """Median milliseconds per bead."""
        return float(np.median(self.milliseconds)) / self.batch


def batches_up_to(n_beads: int) -> list[int]:
    """1, 2, 4 ... and the number of beads itself."""
    return sorted({1 << k for k in range(n_beads.bit_length())} | {n_beads})


def _cuda(device: str) -> Any:
    """``torch.cuda``, if that is where the potential runs."""
    torch = sys.modules.get("torch")
    return torch.cuda if device == "cuda" and torch is not None else None


def _measure(
    potential: Potential, rings: Rings, sets: Iterator[float], batch: int, seconds: float, device: str
) -> BatchTime:
    polymers, cuda = rings.draw(), _cuda(device)
    if cuda:
        cuda.reset_peak_memory_stats()
    slow = False
    for _ in range(_WARM_UP):
        if not slow:
            slow = _time(potential, polymers.at(next(sets))[:batch]) > QUICK
    times: list[float] = []
    while len(times) < (1 if slow else 3) or sum(times) < 1e3 * seconds:
        times.append(1e3 * _time(potential, polymers.at(next(sets))[:batch]))
    gpu = _peak_gpu(cuda)
    if not hasattr(potential, "spent"):
        return BatchTime(batch, times, {}, peak_memory(), gpu)
    # Evaluations of their own: with `timing` a GPU is waited for after every stage.
    potential.timing, before, total = True, dict(potential.spent), 0.0
    for _ in range(1 if slow else min(len(times), 20)):
        total += _time(potential, polymers.at(next(sets))[:batch])
    potential.timing = False
    shares = {name: (potential.spent[name] - before[name]) / total for name in STAGES}
    return BatchTime(batch, times, shares, peak_memory(), gpu)


def _time(potential: Potential, structures: Structures) -> float:
    """Seconds of one evaluation; its results are numpy arrays, so a GPU has finished."""
    started = time.perf_counter()
    potential.evaluate(structures)
    return time.perf_counter() - started


def peak_memory() -> float:
    """Largest resident memory of this process [MB]."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used / 1e3  # bytes there, kilobytes here


def _peak_gpu(cuda: Any) -> float:
    return cuda.max_memory_reserved() / 1e6 if cuda else 0.0


def time_batches(
    potential: Potential, rings: Rings, seconds: float, device: str = "cpu"
) -> Iterator[BatchTime]:
    """Evaluate larger and larger batches of beads that move from one evaluation to the next.

    Parameters
    ----------
    potential : Potential
        What is measured.
    rings : Rings
        What it evaluates.
    seconds : float
        For all batches together, about; those that would take longer are left out.
    device : str
        "cpu" or "cuda".

    Yields
    ------
    BatchTime
        For batches of 1, 2, 4 ... beads.
    """
    sets = (rings.timestep * k for k in range(1 << 40))
    batches = batches_up_to(rings.n_beads)
    end = time.perf_counter() + seconds
    expected = 0.0
    for place, batch in enumerate(batches):
        left = end - time.perf_counter()
        if place and 2 * expected > left:
            return
        found = _measure(potential, rings, sets, batch, left / (2 * (len(batches) - place)), device)
        yield found
        if place + 1 < len(batches):
            expected = 1e-3 * found.per_bead * batches[place + 1]


def _say(kind: str, **fields: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps({'kind': kind, **fields})}\n")
    sys.stdout.flush()


def answer(request: dict[str, Any], say: Callable[..., None] = _say) -> None:
    """Load a potential, time it, and say so line by line.

    Parameters
    ----------
    request : dict
        ``source``, ``device``, ``compiled``, ``seconds`` and ``rings`` (the fields of :class:`Rings`).
    say : callable
        Given the kind of a line and its fields.
    """
    started = time.perf_counter()
    try:
        potential = load(request["source"], request["device"], request["compiled"])
        loaded = time.perf_counter() - started
        card = potential.card
        say(
            "loaded",
            name=card.name,
            form=potential.form,
            cutoff=card.cutoff,
            dtype=card.dtype,
            seconds=loaded,
            memory_mb=peak_memory(),
        )
        rings = Rings(**request["rings"])
        for found in time_batches(potential, rings, request["seconds"], request["device"]):
            say("batch", **asdict(found))
    except NnqmdError as error:
        say("error", type=error.__class__.__name__, what=error.what, fix=error.fix)
    except Exception as error:  # noqa: BLE001 - a model is foreign code, and anything may come of it
        say("error", type="ModelError", what=f"The model failed: {error!r:.500}.", fix="")
    else:
        say("end")


def main() -> None:
    """Entry point of the process: one line of JSON in, lines of JSON out."""
    answer(json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
