"""One force set over the pools of several nodes: the root of a group cuts it, the other nodes' ranks answer.

What goes between them are the messages that doors and pools exchange anyway, each as one run of bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from nnqmd_server.doors.mpi_job import Job
from nnqmd_server.errors import NnqmdError, PoolError
from nnqmd_server.pool.client import PoolClient
from nnqmd_server.pool.cutting import cut
from nnqmd_server.pool.messages import (
    BadMessageError,
    Message,
    arrays_to_results,
    arrays_to_structures,
    pack,
    results_to_arrays,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.pool.ranks import wait_politely
from nnqmd_server.structures import Array, Results, Structures, join

TAG = 101
"""Kind of our own messages; i-PI uses small numbers, and these never reach it."""

START_TIMEOUT = 1500.0
"""Longest wait for the pool of another node to become ready [s]; the first start compiles the model."""

PATIENCE = 900.0
"""Longest wait for a share that another node computes [s]."""


def to_bytes(message: Message) -> Array:
    """A message as one run of bytes: how many frames, how long each is, and the frames."""
    frames = [np.frombuffer(frame, np.uint8) for frame in pack(message)]
    head = np.array([len(frames), *(frame.size for frame in frames)], np.int64)
    return np.concatenate([head.view(np.uint8), *frames])


def from_bytes(data: Array) -> Message:
    """The message in a run of bytes.

    Raises
    ------
    BadMessageError
        It is none.
    """
    raw = data.tobytes()
    count = int.from_bytes(raw[:8], "little")
    first = 8 * (1 + count)
    if not 0 < count < 1000 or len(raw) < first:
        raise BadMessageError("a message of another kind")
    ends = first + np.cumsum(np.frombuffer(raw, np.int64, count, offset=8))
    return unpack([raw[low:high] for low, high in zip([first, *ends[:-1]], ends, strict=True)])


class NodePools:
    """The pools of all nodes of a group, asked as one; for the root of the group.

    Parameters
    ----------
    own : PoolClient
        The pool on the root's own node.
    job : Job
        The root in its MPI job.
    """

    def __init__(self, own: PoolClient, job: Job) -> None:
        self._own = own
        self._job = job
        self._others = job.place.carriers[1:]
        self._speeds = [1.0] * len(job.place.carriers)

    def card(self) -> dict:
        """The card of the model, the same on all nodes, as soon as all are ready.

        Raises
        ------
        PoolError
            A node has no pool, or one of another model.
        """
        for other in self._others:
            self._job.send(to_bytes(Message("card")), other, TAG)
        card = self._own.card()
        answers = [self._answer_of(other, START_TIMEOUT) for other in self._others]
        for other, answer in zip(self._others, answers, strict=True):
            if answer.fields["card"]["sha256"] != card["sha256"]:
                raise PoolError(
                    f"Rank {other} serves another model than rank {self._job.number}, for one force field.",
                    "Give all ranks of a force field the same model.",
                )
        return card

    def submit(self, structures: Structures, given_up: Callable[[], bool] | None = None) -> Results:
        """Evaluate a force set, or a part of one, on all nodes; see :meth:`PoolClient.submit`."""
        counts = cut(len(structures), self._speeds)
        ends = np.cumsum(counts).tolist()
        parts = [structures[end - count : end] for count, end in zip(counts, ends, strict=True)]
        asked = [(k, rank) for k, rank in enumerate(self._others, 1) if counts[k]]
        for k, rank in asked:
            message = Message("evaluate", arrays=structures_to_arrays(parts[k]))
            self._job.send(to_bytes(message), rank, TAG)
        results = []
        if counts[0]:
            began = time.monotonic()
            results.append(self._own.submit(parts[0], given_up))
            self._measure(0, counts[0], time.monotonic() - began)
        for k, rank in asked:
            answer = self._answer_of(rank, PATIENCE)
            try:
                results.append(arrays_to_results(answer.arrays, parts[k]))
            except BadMessageError as error:
                raise PoolError(f"Rank {rank} answered with {error}.", "See its node's logs.") from error
            self._measure(k, counts[k], answer.fields["seconds"])
        return join(results)

    def _measure(self, k: int, count: int, seconds: float) -> None:
        """Learn how many structures per second a node does."""
        self._speeds[k] = (self._speeds[k] + count / max(seconds, 1e-6)) / 2

    def close(self) -> None:
        """Let the other nodes go and hang up."""
        for other in self._others:
            self._job.send(to_bytes(Message("stop")), other, TAG)
        self._own.close()

    def _answer_of(self, other: int, limit: float) -> Message:
        if not wait_politely(lambda: self._job.heard(other, TAG) is not None, limit):
            raise PoolError(f"Rank {other} has not answered for {limit:.0f} s.", "See its node's logs.")
        answer = from_bytes(self._job.receive(other, TAG, np.uint8))
        if answer.kind == "failed":
            raise PoolError(f"On the node of rank {other}: {answer.fields['what']}", answer.fields["fix"])
        return answer


def serve_root(job: Job, client: PoolClient) -> None:
    """Answer the root of our group with the pool of this node until it lets us go.

    Parameters
    ----------
    job : Job
        This rank, a carrier of its group.
    client : PoolClient
        The pool of this node.
    """
    root = job.place.root

    def heard() -> bool:
        return job.heard(root, TAG) is not None

    # Without a limit: the root, which hears i-PI, ends the job when there is reason to.
    while wait_politely(heard, float("inf")):
        request = from_bytes(job.receive(root, TAG, np.uint8))
        if request.kind == "stop":
            return
        try:
            if request.kind == "card":
                answer = Message("card", {"card": client.card(START_TIMEOUT)})
            else:
                began = time.monotonic()
                results = client.submit(arrays_to_structures(request.arrays))
                seconds = {"seconds": time.monotonic() - began}
                answer = Message("done", seconds, results_to_arrays(results))
        except NnqmdError as error:
            answer = Message("failed", {"what": error.what, "fix": error.fix})
        # A root that says something else meanwhile has given up on this answer.
        job.send(to_bytes(answer), root, TAG, heard)
