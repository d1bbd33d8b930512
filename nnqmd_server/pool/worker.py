"""A worker: one process that holds one copy of the model and evaluates the shares it is given."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time

import numpy as np
import zmq
from ase.data import atomic_numbers

from nnqmd_server.errors import NnqmdError
from nnqmd_server.pool.messages import (
    MAX_MESSAGE,
    BadMessageError,
    Message,
    arrays_to_structures,
    pack,
    results_to_arrays,
    unpack,
)
from nnqmd_server.potentials.base import Potential
from nnqmd_server.structures import Structures

log = logging.getLogger("nnqmd.worker")


def _warm_up(potential: Potential) -> None:
    """Evaluate a small lattice once, so that the first share does not pay for first-call work."""
    numbers = np.array([atomic_numbers[s] for s in potential.card.elements], dtype=np.int64)
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * 2.0
    offsets = np.array([0, len(grid)], dtype=np.int64)
    potential.evaluate(Structures(np.resize(numbers, len(grid)), grid, np.eye(3)[None] * 6.0, offsets))


def _culprits(potential: Potential, request: Message) -> list[int]:
    """Which structures of a failed share fail on their own; all of them when none does."""
    structures = arrays_to_structures(request.arrays)
    found = []
    for k in range(len(structures)):
        try:
            potential.evaluate(structures[k : k + 1])
        except Exception:  # noqa: BLE001 - see _answer; what it says has been logged
            found.append(k)
    return found or list(range(len(structures)))


def _answer(potential: Potential, request: Message) -> Message:
    started = time.perf_counter()
    try:
        results = potential.evaluate(arrays_to_structures(request.arrays))
    except NnqmdError as error:
        fields = {"what": error.what, "fix": error.fix, "final": True}
        return Message("failed", {"share": request.fields["share"], **fields})
    except Exception as error:
        log.exception("a share failed")
        what = f"The model failed on a structure: {error.__class__.__name__}: {str(error)[:500]}"
        fields = {"what": what, "fix": "See the worker's log.", "suspects": _culprits(potential, request)}
        return Message("failed", {"share": request.fields["share"], **fields})
    spent = time.perf_counter() - started
    return Message("done", {"share": request.fields["share"], "seconds": spent}, results_to_arrays(results))


def serve(potential: Potential, address: str, index: int, parent: int) -> None:
    """Evaluate shares until the pool says stop or is gone.

    Parameters
    ----------
    potential : Potential
        The model, loaded.
    address : str
        Where the pool listens for workers.
    index : int
        Number of this worker, for logs.
    parent : int
        Process that started this one; the worker ends when it is gone.
    """
    _warm_up(potential)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    socket.connect(address)
    hello = {"index": index, "pid": os.getpid(), "card": potential.card.as_dict(), "form": potential.form}
    socket.send_multipart(pack(Message("ready", hello)))
    try:
        while os.getppid() == parent:
            if not socket.poll(1000):
                continue
            try:
                request = unpack(socket.recv_multipart())
            except BadMessageError as error:
                log.error("dropped a message: %s", error)
                continue
            if request.kind == "stop":
                return
            if request.kind == "refused":
                log.error("the pool refused this worker: %s", request.fields.get("what"))
                return
            socket.send_multipart(pack(_answer(potential, request)), copy=False)
    finally:
        socket.close()
        context.term()


def main() -> None:
    """Entry point of the worker process: ``python -m nnqmd_server.pool.worker``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pool", required=True, help="address at which the pool listens for workers")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # Ctrl-C reaches the whole process group; the pool stops its workers itself, after their last answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    import torch

    from nnqmd_server.potentials.allegro import load

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        potential = load(options.model, options.device, compiled=not options.eager)
    except NnqmdError as error:
        log.error("%s", error.what)
        sys.exit(3)
    log.info("model %s, %s", potential.card.name, potential.form)
    serve(potential, options.pool, options.index, parent)


if __name__ == "__main__":
    main()
