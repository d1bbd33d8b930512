"""How a door asks the pool: submit a force set, get results. Light: no torch, no ASE."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

import zmq

from nnqmd_server.errors import PoolError, StructureError
from nnqmd_server.pool.messages import (
    MAX_MESSAGE,
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


RESEND = 1.0
"""How often a door asks whether the pool still knows its request [s]."""


class GivenUpError(PoolError):
    """Whoever asked does not wait for the answer any more."""


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
    """

    def __init__(self, address: str, patience: float = 600.0) -> None:
        self.address = address
        self.patience = patience
        self._request = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        # Nothing is queued for a pool that is not there: it would all arrive at the next one.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(address)

    def close(self) -> None:
        """Close the connection."""
        self._context.destroy(linger=0)

    def card(self, patience: float | None = None) -> dict:
        """The card of the model that is served, as soon as a worker is ready.

        Raises
        ------
        PoolError
            Nobody answers, or no worker has become ready in time.
        """
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        heard = False
        while True:
            if self._send(Message("status")):
                status = self._receive(min(RESEND, max(0.05, deadline - time.monotonic())))
                heard = heard or status is not None
                if status is not None and status.kind == "status" and status.fields.get("card"):
                    return status.fields["card"]
            if time.monotonic() > deadline:
                if heard:
                    raise PoolError(
                        f"No worker of the pool at {self.address} is ready.", "See the workers' logs."
                    )
                raise self._silence(deadline)
            time.sleep(0.05)

    def submit(self, structures: Structures, given_up: Callable[[], bool] | None = None) -> Results:
        """Evaluate one force set; blocks until its results are there.

        Parameters
        ----------
        structures : Structures
            The force set.
        given_up : callable, optional
            Asked every second whether nobody waits for the answer any more.

        Raises
        ------
        GivenUpError
            Nobody waits any more.
        PoolError
            The pool does not answer within ``patience``, or could not evaluate anything.
        StructureError
            Some structures could not be evaluated, or have forces that may not reach a simulation.
        """
        self._request += 1
        evaluate = Message("evaluate", {"request": self._request}, structures_to_arrays(structures))
        waiting = Message("waiting", {"request": self._request})
        deadline = time.monotonic() + self.patience
        sent = self._send(evaluate)
        while True:
            answer = self._receive(min(RESEND, max(0.0, deadline - time.monotonic())))
            if answer is not None and answer.fields.get("request") == self._request:
                if answer.kind == "done":
                    return self._results(answer, structures)
                if answer.kind in {"failed", "refused"}:
                    raise self._failure(answer)
                if answer.kind == "unknown":
                    sent = self._send(evaluate)
            elif answer is None:
                if given_up is not None and given_up():
                    raise GivenUpError("Nobody waits for these forces any more.")
                if time.monotonic() > deadline:
                    raise self._silence(deadline)
                sent = self._send(waiting if sent else evaluate) or sent

    def _results(self, answer: Message, structures: Structures) -> Results:
        try:
            return arrays_to_results(answer.arrays, structures)
        except BadMessageError as error:
            raise PoolError(
                f"The pool at {self.address} answered with {error}.", "Use one version of nnqmd everywhere."
            ) from error

    @staticmethod
    def _failure(answer: Message) -> PoolError:
        what, fix = str(answer.fields.get("what")), str(answer.fields.get("fix", ""))
        suspects = tuple(int(k) for k in answer.fields.get("suspects") or ())
        return StructureError(what, fix, suspects) if suspects else PoolError(what, fix)

    def _silence(self, deadline: float) -> PoolError:
        waited = self.patience + time.monotonic() - deadline
        return PoolError(
            f"The pool at {self.address} has not answered for {waited:.0f} s.",
            "Start it with `nnqmd serve`, or give the address at which it listens.",
        )

    def _send(self, message: Message) -> bool:
        """Send if somebody is there; whether it was sent."""
        try:
            self._socket.send_multipart(pack(message), flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self, timeout: float) -> Message | None:
        if not self._socket.poll(timeout * 1000):
            return None
        try:
            return unpack(self._socket.recv_multipart())
        except BadMessageError as error:
            raise PoolError(
                f"What answers at {self.address} is not our pool: {error}.", "Check the address."
            ) from error
