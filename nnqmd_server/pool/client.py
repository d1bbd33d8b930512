"""How a door asks the pool: submit a force set, get results. Light: no torch, no ASE."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Protocol
from uuid import uuid4

import numpy as np

from nnqmd_server.errors import InputError, PoolError, StructureError
from nnqmd_server.memory import keep_buffers
from nnqmd_server.pool.bulk import Bulk, near
from nnqmd_server.pool.link import connect
from nnqmd_server.pool.messages import (
    LARGE,
    BadMessageError,
    Message,
    arrays_to_results,
    pack,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.structures import Results, Structures


def default_address() -> str:
    """Where ``nnqmd serve`` listens and doors ask: ``$NNQMD_POOL``, or an ipc socket of this user."""
    return os.environ.get("NNQMD_POOL") or f"ipc://{tempfile.gettempdir()}/nnqmd-{os.getuid()}/pool"


def default_name() -> str:
    """What a simulation is called unless it says more: the folder that it runs in, and its process."""
    try:
        folder = Path.cwd().name
    except OSError:  # the folder has been removed meanwhile
        folder = ""
    return f"{folder or gethostname()}:{os.getpid()}"


RESEND = 1.0
"""How often a door asks whether the pool still knows its request [s]."""

GLANCE = 0.2
"""How often it is looked whether anybody still waits for the answer [s]."""


class GivenUpError(PoolError):
    """Whoever asked does not wait for the answer any more."""


class Client(Protocol):
    """What a door needs of a pool, wherever that is."""

    potential: str

    def card(self, patience: float | None = None) -> dict:
        """The card of the potential that is asked, as soon as a worker is ready for it."""

    def submit(self, structures: Structures, given_up: Callable[[], bool] | None = None) -> Results:
        """Evaluate one force set; blocks until its results are there.

        Parameters
        ----------
        structures : Structures
            The force set.
        given_up : callable, optional
            Asked several times a second whether nobody waits for the answer any more.

        Raises
        ------
        GivenUpError
            Nobody waits any more.
        PoolError
            The pool does not answer within its patience, was stopped, or could not evaluate anything.
        StructureError
            Some structures could not be evaluated, or have forces that may not reach a simulation.
        """

    def close(self) -> None:
        """Hang up."""


class PoolClient:
    """A connection to a pool, which may be restarted meanwhile.

    A door that waits asks every second whether the pool still knows its request, and sends it again to a
    pool that does not (one that was restarted); requests are numbered, so an answer counts once.

    Parameters
    ----------
    address : str
        Where the pool listens for doors.
    patience : float
        Longest wait for an answer [s].
    potential : str
        Which of the pool's potentials is asked; may be left out when it has one.
    name : str
        What this simulation is called in displays; its folder and process unless given.
    keys : str or Path, optional
        Key file for TCP; ``$NNQMD_KEYS`` unless given.

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, or unusable ones.
    """

    def __init__(
        self,
        address: str,
        patience: float = 600.0,
        potential: str = "",
        name: str = "",
        keys: str | Path | None = None,
    ) -> None:
        keep_buffers()
        self.address = address
        self.potential = potential
        self.patience = patience
        self._request = 0
        self._bulk = Bulk() if near(address) else None
        self._near = False
        # Whoever it is that asks, also after the connection was lost; the name is for displays.
        self._who = {"client": uuid4().hex, "name": name or default_name()}
        self._link = connect(address, keys, "door")

    def close(self) -> None:
        """Close the connection."""
        self._link.close()
        if self._bulk is not None:
            self._bulk.close()

    def card(self, patience: float | None = None) -> dict:
        """The card of the potential that is asked, as soon as a worker is ready for it.

        Raises
        ------
        InputError
            The pool has several potentials and none was named.
        PoolError
            Nobody answers, or no worker has become ready in time.
        """
        patience = self.patience if patience is None else patience
        deadline = time.monotonic() + patience
        heard: list[str] | None = None
        while True:
            if self._send(Message("status", self._probe())):
                status = self._receive(min(RESEND, max(0.05, deadline - time.monotonic())))
                if status is not None and status.kind == "status":
                    cards = status.fields["cards"]
                    self._near = bool(status.fields.get("near"))
                    heard = sorted(cards)
                    self.potential = chosen(self.potential, heard, f"at {self.address}")
                    if self.potential in cards:
                        return cards[self.potential]
            if time.monotonic() > deadline:
                if heard:
                    what = f"The pool at {self.address} has no potential {self.potential!r}, but "
                    raise PoolError(what + f"{', '.join(heard)}.", "Name one of these.")
                if heard is not None:
                    raise PoolError(
                        f"No worker of the pool at {self.address} is ready.", "See the workers' logs."
                    )
                raise self._silence(patience)
            time.sleep(0.05)

    def _probe(self) -> dict[str, list[int]]:
        """A piece of our memory, to see whether the pool can reach it."""
        return {} if self._bulk is None else {"memory": self._bulk.find(self._bulk.room(8))}

    def status(self, patience: float | None = None) -> dict:
        """What the pool says of itself; see :class:`~nnqmd_server.pool.status.Status`.

        Raises
        ------
        PoolError
            Nobody answers in time.
        """
        patience = self.patience if patience is None else patience
        deadline = time.monotonic() + patience
        sent = False
        while True:
            sent = self._send(Message("status")) or sent
            status = self._receive(min(RESEND if sent else 0.05, max(0.0, deadline - time.monotonic())))
            if status is not None and status.kind == "status":
                return status.fields
            if time.monotonic() > deadline:
                raise self._silence(patience)

    def submit(self, structures: Structures, given_up: Callable[[], bool] | None = None) -> Results:
        """Evaluate one force set; as :meth:`Client.submit`."""
        self._request += 1
        evaluate = self._evaluate(structures)
        waiting = Message("waiting", {"request": self._request, **self._who})
        deadline = time.monotonic() + self.patience
        clean = False
        sent = times = int(self._send(evaluate))
        again = time.monotonic() + RESEND
        try:
            while True:
                answer = self._receive(min(GLANCE, max(0.0, deadline - time.monotonic())))
                if answer is not None and answer.fields.get("request") == self._request:
                    if answer.kind == "done":
                        clean = times == 1 and bool(answer.fields.get("clean"))
                        return self._results(answer, structures)
                    if answer.kind == "refused" and self._near:  # another pool, which cannot reach our memory
                        self._near = False
                        evaluate = self._evaluate(structures)
                        sent = self._send(evaluate)
                    elif answer.kind in {"failed", "refused"}:
                        fields = answer.fields
                        what, fix = str(fields.get("what")), str(fields.get("fix", ""))
                        raise failure(what, fix, [int(k) for k in fields.get("suspects") or ()])
                    elif answer.kind == "unknown":
                        sent = self._send(evaluate)
                        times += 1
                elif answer is None:
                    if given_up is not None and given_up():
                        raise GivenUpError("Nobody waits for these forces any more.")
                    if time.monotonic() > deadline:
                        raise self._silence(self.patience)
                    if not sent:
                        sent = self._send(evaluate)
                        times += sent
                    elif time.monotonic() > again:
                        self._send(waiting)
                        again = time.monotonic() + RESEND
        finally:
            if self._bulk is not None and not clean:
                self._bulk.retire()  # somebody may still write forces of this force set into it

    def _evaluate(self, structures: Structures) -> Message:
        fields = {"request": self._request, "potential": self.potential, **self._who}
        arrays = structures_to_arrays(structures)
        size = structures.positions.nbytes
        if self._near and size >= LARGE:
            room = self._bulk.room(2 * size)
            arrays["positions"] = room[:size].view(np.float64).reshape(-1, 3)
            arrays["positions"][:] = structures.positions
            fields["forces"] = self._bulk.find(room[size:])
        return Message("evaluate", fields, arrays)

    def _results(self, answer: Message, structures: Structures) -> Results:
        try:
            results = arrays_to_results(answer.arrays, structures)
        except BadMessageError as error:
            raise PoolError(
                f"The pool at {self.address} answered with {error}.", "Use one version of nnqmd everywhere."
            ) from error
        # The next force set is written where these forces lie.
        return replace(results, forces=results.forces.copy()) if self._near else results

    def _silence(self, waited: float) -> PoolError:
        return PoolError(
            f"The pool at {self.address} has not answered for {waited:.0f} s.",
            "Start it with `nnqmd serve`, or give the address at which it listens.",
        )

    def _send(self, message: Message) -> bool:
        """Send if somebody is there; whether it was sent."""
        return self._link.send(pack(message, self._bulk if self._near else None))

    def _receive(self, seconds: float) -> Message | None:
        try:
            frames = self._link.receive(seconds)
            if frames is not None:
                return unpack(frames, self._bulk)
        except BadMessageError as error:
            raise PoolError(
                f"What answers at {self.address} is not our pool: {error}.",
                "Check the address, and that nnqmd is of one version everywhere.",
            ) from error
        refused = self._link.why()
        if refused is not None:
            raise refused
        return None


def chosen(potential: str, names: Collection[str], where: str) -> str:
    """The potential that is asked: the one that was named, or the only one; "" as long as there is none.

    Raises
    ------
    InputError
        There are several, and none was named.
    """
    if not potential and len(names) > 1:
        raise InputError(
            f"The pool {where} has several potentials: {', '.join(sorted(names))}.",
            "Say which one: `potential` in <parameters>, or --potential.",
        )
    return potential or next(iter(names), "")


def failure(what: str, fix: str, suspects: Sequence[int]) -> PoolError:
    """What to raise for a force set that could not be evaluated; with the structures, where it is theirs."""
    return StructureError(what, fix, tuple(suspects)) if suspects else PoolError(what, fix)


def cards_of(address: str, patience: float = 60.0) -> dict[str, dict]:
    """The cards of all potentials of a pool, by name, as soon as a worker is ready.

    Raises
    ------
    PoolError
        Nobody answers, or no worker has become ready in time.
    """
    client = PoolClient(address, patience)
    deadline = time.monotonic() + patience
    try:
        while True:
            cards = client.status(max(0.1, deadline - time.monotonic()))["cards"]
            if cards:
                return cards
            if time.monotonic() > deadline:
                raise PoolError(f"No worker of the pool at {address} is ready.", "See the workers' logs.")
            time.sleep(0.05)
    finally:
        client.close()
