"""Play a recording at a pool: how fast it answers, and whether it answers the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nnqmd_server.errors import DataError, InputError, NnqmdError, PoolError
from nnqmd_server.pool.client import PoolClient, cards_of
from nnqmd_server.pool.recording import Recording, Request
from nnqmd_server.structures import Results, Structures

MAX_SIMULATIONS = 256


@dataclass
class Differences:
    """How far answers are from the recorded ones.

    Attributes
    ----------
    force_sets, identical : int
        How many were compared, and how many of these are the same to the last bit.
    energy, energy_per_atom : float
        Largest difference of an energy [eV], and per atom of its structure [eV].
    forces, forces_rms : float
        Largest difference of a component of a force, and root mean square of all [eV/Angstrom].
    virial : float
        Largest difference of a component of a virial [eV].
    properties : dict of float
        Largest difference of each further property, in its own unit.
    worst : str
        Simulation and force set with the largest difference of a force.
    """

    force_sets: int = 0
    identical: int = 0
    energy: float = 0.0
    energy_per_atom: float = 0.0
    forces: float = 0.0
    forces_rms: float = 0.0
    virial: float = 0.0
    properties: dict[str, float] = field(default_factory=dict)
    worst: str = ""
    _squares: float = field(default=0.0, repr=False)
    _components: int = field(default=0, repr=False)

    def add(self, which: str, structures: Structures, ours: Results, theirs: Results) -> None:
        """Compare one force set."""
        pairs = [(ours.energy, theirs.energy), (ours.forces, theirs.forces), (ours.virial, theirs.virial)]
        named = ours.properties | ours.atom_properties
        before = theirs.properties | theirs.atom_properties
        shared = sorted(set(named) & set(before))
        pairs += [(named[name], before[name]) for name in shared]
        if any(a.shape != b.shape for a, b in pairs):
            raise DataError(
                f"{which}: the answer has another shape than the recorded one.", "Leave out --compare."
            )
        far = [float(np.abs(a - b).max(initial=0.0)) for a, b in pairs]
        self.force_sets += 1
        self.identical += all(np.array_equal(a, b) for a, b in pairs)
        per_atom = np.abs(ours.energy - theirs.energy) / np.diff(structures.offsets)
        self.energy_per_atom = _larger(self.energy_per_atom, float(per_atom.max()))
        if not far[1] <= self.forces or not self.worst:
            self.worst = which
        self.energy, self.forces = _larger(self.energy, far[0]), _larger(self.forces, far[1])
        self.virial = _larger(self.virial, far[2])
        for name, value in zip(shared, far[3:], strict=True):
            self.properties[name] = _larger(self.properties.get(name, 0.0), value)
        self._squares += float(((ours.forces - theirs.forces) ** 2).sum())
        self._components += ours.forces.size
        self.forces_rms = (self._squares / self._components) ** 0.5


def _larger(a: float, b: float) -> float:
    """The larger one; not a number where one of them is none."""
    return float(np.maximum(a, b))


@dataclass
class Played:
    """What came of one simulation of a recording; times in seconds, one per force set answered.

    ``failed`` are force sets that failed as they did when they were recorded.
    """

    name: str
    potential: str
    asked: int = 0
    structures: int = 0
    seconds: list[float] = field(default_factory=list)
    recorded: list[float] = field(default_factory=list)
    failed: int = 0
    first_failure: str = ""
    late: float = 0.0


@dataclass
class Report:
    """What came of a replay.

    Attributes
    ----------
    seconds, recorded_seconds : float
        From the first question to the last answer: now, and when it was recorded.
    simulations : list of Played
        One by one.
    differences : Differences, optional
        When asked for.
    other_models : list of str
        Potentials that are another model here than in the recording.
    """

    seconds: float
    recorded_seconds: float
    simulations: list[Played]
    differences: Differences | None
    other_models: list[str]

    def figures(self) -> dict[str, Any]:
        """All figures as one flat object, for ``--json``."""
        all_now = [t for one in self.simulations for t in one.seconds]
        answered = len(all_now)
        structures = sum(one.structures for one in self.simulations)
        flat: dict[str, Any] = {
            "simulations": len(self.simulations),
            "force_sets": answered,
            "structures": structures,
            "failed": sum(one.failed for one in self.simulations),
            "seconds": self.seconds,
            "recorded_seconds": self.recorded_seconds,
            "force_sets_per_second": answered / max(self.seconds, 1e-9),
            "structures_per_second": structures / max(self.seconds, 1e-9),
            **_quantiles("answer_ms", all_now),
            **_quantiles("recorded_answer_ms", [t for one in self.simulations for t in one.recorded]),
            "late_s": max((one.late for one in self.simulations), default=0.0),
            "other_models": self.other_models,
        }
        if self.differences is not None:
            found = {k: v for k, v in asdict(self.differences).items() if not k.startswith("_")}
            further = found.pop("properties")
            flat |= {f"difference.{k}": v for k, v in found.items()}
            flat |= {f"difference.{k}": v for k, v in further.items()}
        return flat


def _quantiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{name}.median": None, f"{name}.p95": None, f"{name}.max": None}
    median, p95, largest = 1e3 * np.quantile(seconds, [0.5, 0.95, 1.0])
    return {f"{name}.median": float(median), f"{name}.p95": float(p95), f"{name}.max": float(largest)}


def potentials_there(
    recording: Recording, cards: dict[str, dict[str, Any]]
) -> tuple[dict[str, str], list[str]]:
    """Under which name this pool holds each recorded potential, and which of them are another model here.

    Raises
    ------
    InputError
        The pool has several potentials, and none of a recorded one's name.
    """
    names, others = {}, []
    for name in sorted({request.potential for request in recording.requests}):
        here = name if name in cards else next(iter(cards)) if len(cards) == 1 else None
        if here is None:
            there = ", ".join(sorted(cards))
            raise InputError(
                f"The recording asks for {name!r}; the pool has {there}.",
                "Serve the model under that name: nnqmd serve NAME=MODEL.",
            )
        names[name] = here
        if recording.cards.get(name, {}).get("sha256") != cards[here].get("sha256"):
            others.append(name)
    return names, others


def replay(
    recording: Recording,
    address: str,
    *,
    recorded_pace: bool = False,
    compare: bool = False,
    patience: float = 600.0,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Ask a pool for everything in a recording.

    Every recorded simulation asks as it did: one force set after the other, each as soon as the one before is
    answered; with ``recorded_pace`` not before its time.

    Parameters
    ----------
    recording : Recording
        What is asked.
    address : str
        Where the pool listens for doors.
    recorded_pace : bool
        Keep the recorded times instead of asking as fast as possible.
    compare : bool
        Compare the answers with the recorded ones.
    patience : float
        Longest wait for an answer [s].
    progress : callable, optional
        Told the part that has been answered, from 0 to 1, in several threads.

    Raises
    ------
    DataError, InputError
        There is nothing to play, or the pool does not hold the potentials.
    PoolError
        The pool does not answer, or fails where it did not fail when recorded.
    """
    by_client: dict[str, list[Request]] = {}
    for request in recording.requests:
        by_client.setdefault(request.client, []).append(request)
    if not by_client:
        raise DataError(f"{recording.path} holds no force set.", "Record while simulations run.")
    if len(by_client) > MAX_SIMULATIONS:
        raise DataError(
            f"{recording.path} holds more than {MAX_SIMULATIONS} simulations.", "Record a shorter time."
        )
    names, others = potentials_there(recording, cards_of(address, patience))
    player = _Player(recording, address, names, recorded_pace, compare, patience, progress)
    played = player.play(list(by_client.values()))
    ends = [r.ended for r in recording.requests if r.ended is not None]
    begins = [r.time for r in recording.requests]
    recorded = max(ends, default=max(begins)) - min(begins)
    return Report(player.seconds, recorded, played, player.differences, others)


class _Player:
    """The threads of a replay and what they share."""

    def __init__(
        self,
        recording: Recording,
        address: str,
        names: dict[str, str],
        recorded_pace: bool,
        compare: bool,
        patience: float,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._recording, self._address, self._names = recording, address, names
        self._recorded_pace, self._patience, self._progress = recorded_pace, patience, progress
        self.differences = Differences() if compare else None
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._trouble: list[NnqmdError] = []
        self._ended = 0
        self._begin = 0.0

    def play(self, simulations: list[list[Request]]) -> list[Played]:
        """Play all simulations side by side."""
        played = [Played(requests[0].name, requests[0].potential) for requests in simulations]
        threads = [
            threading.Thread(target=self._simulate, args=pair, daemon=True)
            for pair in zip(simulations, played, strict=True)
        ]
        self._begin = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop.set()
            raise
        self.seconds = time.monotonic() - self._begin
        if self._trouble:
            raise self._trouble[0]
        return played

    def _simulate(self, requests: list[Request], played: Played) -> None:
        client = PoolClient(self._address, self._patience, name=f"replay of {played.name}")
        try:
            for request in requests:
                if not self._wait_for(request, played):
                    return
                self._ask(client, request, played)
        except NnqmdError as error:
            self._trouble.append(error)
            self._stop.set()
        finally:
            client.close()

    def _wait_for(self, request: Request, played: Played) -> bool:
        if self._recorded_pace:
            due = self._begin + request.time - self._recording.requests[0].time
            late = time.monotonic() - due
            played.late = max(played.late, late)
            return not self._stop.wait(max(0.0, -late))
        return not self._stop.is_set()

    def _ask(self, client: PoolClient, request: Request, played: Played) -> None:
        structures = self._recording.structures(request)
        theirs = self._recording.results(request, structures) if self.differences is not None else None
        client.potential = self._names[request.potential]
        played.asked += 1
        begun = time.monotonic()
        try:
            ours = client.submit(structures, given_up=self._stop.is_set)
        except PoolError as error:
            if request.failure is None:
                raise type(error)(
                    f"{played.name}, force set {request.number}: {error.what}", error.fix
                ) from error
            played.failed += 1
            played.first_failure = played.first_failure or error.what
        else:
            played.seconds.append(time.monotonic() - begun)
            played.structures += request.structures
            if request.ended is not None and request.failure is None:
                played.recorded.append(request.ended - request.time)
            if theirs is not None:
                with self._lock:
                    self.differences.add(
                        f"{played.name}, force set {request.number}", structures, ours, theirs
                    )
        with self._lock:
            self._ended += 1
            if self._progress:
                self._progress(self._ended / len(self._recording.requests))
