"""What a simulation will cost on this machine, measured before it is started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ase.data import atomic_masses, chemical_symbols

from nnqmd_server.errors import ProgramError
from nnqmd_server.inputs.own_time import own_time
from nnqmd_server.pool.processes import count_gpus, plan
from nnqmd_server.pool.sizing import Loaded, WorkerTime, best, time_in_process, time_workers, worker_counts
from nnqmd_server.potentials.base import unknown_elements
from nnqmd_server.potentials.einstein import spreads
from nnqmd_server.potentials.load import card_of
from nnqmd_server.potentials.timing import BatchTime, Rings, batches_up_to
from nnqmd_server.structures import Structures

_DAY = 86400e3  # milliseconds
_FS_PER_NS = 1e6

BATCH_SHARE = 0.25
"""Part of the time that the batches in one process get; the workers get as much, the rest is for loading."""


@dataclass(frozen=True)
class Question:
    """What is to be measured.

    Parameters
    ----------
    source : str
        The potential.
    structure : Structures
        One structure.
    n_beads : int
        Beads of the ring polymer.
    timestep : float
        [fs].
    temperature : float
        [K].
    device : str
        "auto", "cpu" or "cuda".
    eager : bool
        Do not compile the model.
    seconds : float
        How long it may take, about, without the compilation of the model.
    most_workers : int, optional
        Largest number of workers that is tried; one per core, or two per GPU, unless given.
    """

    source: str
    structure: Structures
    n_beads: int
    timestep: float = 0.5
    temperature: float = 300.0
    device: str = "auto"
    eager: bool = False
    seconds: float = 60.0
    most_workers: int | None = None

    @property
    def rings(self) -> Rings:
        """The ring polymers that are evaluated."""
        numbers = self.structure.numbers
        return Rings(
            numbers=numbers.tolist(),
            masses=atomic_masses[numbers].tolist(),
            places=self.structure.positions.tolist(),
            cell=self.structure.cells[0].tolist(),
            n_beads=self.n_beads,
            temperature=self.temperature,
            timestep=self.timestep,
        )


@dataclass(frozen=True)
class Forecast:
    """What was measured, so far.

    Parameters
    ----------
    question : Question
        What was asked.
    device : str
        "cpu" or "cuda".
    loaded : Loaded, optional
        The model.
    batches : tuple of BatchTime
        In one process.
    workers : tuple of WorkerTime
        Whole force sets through a pool.
    ipi_ms : float, optional
        i-PI's own time per step [ms]; None when it could not be measured.
    ipi_trouble : str
        Why not.
    """

    question: Question
    device: str
    loaded: Loaded | None = None
    batches: tuple[BatchTime, ...] = ()
    workers: tuple[WorkerTime, ...] = ()
    ipi_ms: float | None = None
    ipi_trouble: str = ""
    left_out: tuple[int, ...] = field(default=())

    @property
    def best(self) -> WorkerTime:
        """The number of workers to take."""
        return best(self.workers)

    @property
    def step_ms(self) -> float:
        """Milliseconds per step: forces, and i-PI itself where that was measured."""
        return self.best.per_set + (self.ipi_ms or 0.0)

    @property
    def ns_per_day(self) -> float:
        """Simulated nanoseconds per day."""
        return self.question.timestep / _FS_PER_NS * _DAY / self.step_ms

    def spreads(self) -> dict[str, tuple[float, float]]:
        """Of each element: width of its beads about its place, and about their centroid [Angstrom]."""
        found = sorted(set(self.question.structure.numbers.tolist()))
        asked = self.question
        return {
            chemical_symbols[z]: spreads(float(atomic_masses[z]), asked.n_beads, asked.temperature)
            for z in found
        }

    def figures(self) -> dict[str, float | int | str]:
        """Everything as one flat object; units are in the names."""
        asked, batches = self.question, self.batches
        figures: dict[str, float | int | str] = {
            "model": self.loaded.name,
            "form": self.loaded.form,
            "device": self.device,
            "atoms": asked.structure.n_atoms,
            "beads": asked.n_beads,
            "timestep_fs": asked.timestep,
            "temperature_K": asked.temperature,
            "load_s": self.loaded.seconds,
            "memory_mb.loaded": self.loaded.memory_mb,
        }
        for name, (width, ring) in self.spreads().items():
            figures |= {f"spread_angstrom.{name}": width, f"bead_spread_angstrom.{name}": ring}
        for one in batches:
            figures[f"ms_per_bead.{one.batch}"] = one.per_bead
            figures |= {f"{name}_share.{one.batch}": part for name, part in shares(one).items()}
            figures[f"memory_mb.{one.batch}"] = one.memory_mb
            if one.gpu_mb:
                figures[f"gpu_mb.{one.batch}"] = one.gpu_mb
        figures |= {f"ms_per_set.workers{one.workers}": one.per_set for one in self.workers}
        figures["best_workers"] = self.best.workers
        if self.ipi_ms is not None:
            figures["ipi_ms_per_step"] = self.ipi_ms
        return figures | {"ms_per_step": self.step_ms, "ns_per_day": self.ns_per_day}


def shares(found: BatchTime) -> dict[str, float]:
    """Shares of list building, copies, model and the rest in an evaluation; empty when it does not tell."""
    if not found.shares:
        return {}
    return found.shares | {"rest": max(0.0, 1.0 - sum(found.shares.values()))}


def counts_to_try(device: str, most: int | None) -> list[int]:
    """Numbers of workers that are worth trying on a device."""
    if device == "cuda":
        gpus = count_gpus()
        counts = sorted({*worker_counts(gpus), 2 * gpus})
    else:
        counts = worker_counts(len(os.sched_getaffinity(0)))
    return sorted({min(n, most or n) for n in counts})


def forecast(question: Question, logs: Path, tell: Callable[[str, float], None]) -> Iterator[Forecast]:
    """Measure, and say what is known after every part.

    Parameters
    ----------
    question : Question
        What is to be measured.
    logs : Path
        Folder for what the processes write.
    tell : callable
        Given what is being measured, and which part of all is done.

    Yields
    ------
    Forecast
        With more in it each time; the last one has everything.

    Raises
    ------
    NnqmdError
        The model, the structure, a worker or the device is not as it should be.
    """
    card = card_of(question.source)
    symbols = {chemical_symbols[z] for z in question.structure.numbers.tolist()}
    if card and (unknown := sorted(symbols - set(card.elements))):
        raise unknown_elements(card, unknown)
    device = plan(1, question.device).device
    counts = counts_to_try(device, question.most_workers)
    batches = batches_up_to(question.n_beads)
    parts = 2 + len(batches) + len(counts)
    found = Forecast(question, device)
    tell("loading the model (the first time it is compiled, about a minute)", 0.0)
    rings, share = question.rings, BATCH_SHARE * question.seconds
    timed = time_in_process(question.source, device, question.eager, rings, share, logs / "process.log")
    for one in timed:
        if isinstance(one, Loaded):
            found = replace(found, loaded=one)
        else:
            found = replace(found, batches=(*found.batches, one))
        following = batches[min(len(found.batches), len(batches) - 1)]
        tell(f"batches of {following}", (1 + len(found.batches)) / parts)
        yield found
    found = replace(found, left_out=tuple(batches[len(found.batches) :]))
    done = 1 + len(batches)  # those that were left out too
    timed = time_workers(
        question.source,
        device,
        question.eager,
        rings,
        counts,
        share / len(counts),
        logs,
        lambda line: tell(line, done / parts),
    )
    for one in timed:
        found = replace(found, workers=(*found.workers, one))
        done += 1
        yield found
    tell("i-PI alone", done / parts)
    try:
        milliseconds = own_time(
            question.structure.numbers,
            question.structure.positions,
            question.n_beads,
            question.temperature,
            question.timestep,
        )
        found = replace(found, ipi_ms=milliseconds)
    except ProgramError as error:  # the forces are known without it
        found = replace(found, ipi_trouble=error.what)
    tell("done", 1.0)
    yield found
