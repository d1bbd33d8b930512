"""A worker: one process that holds one copy of the models and evaluates the batches it is given.

It runs in the interpreter that its potentials need; of ours it uses numpy and pyzmq only.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nnqmd_server import __version__
from nnqmd_server.errors import NnqmdError
from nnqmd_server.pool.beat import BEAT, LIVENESS
from nnqmd_server.pool.bulk import Bulk, near
from nnqmd_server.pool.crew import HOST
from nnqmd_server.pool.limits import Limits, out_of_memory
from nnqmd_server.pool.link import Link, connect
from nnqmd_server.pool.messages import (
    UNITS,
    BadMessageError,
    Message,
    NotSharedError,
    OtherProtocolError,
    arrays_to_structures,
    pack,
    results_to_arrays,
    unpack,
)
from nnqmd_server.potentials.base import Potential, warm_up
from nnqmd_server.potentials.load import check_hashes, load, parse_hashes, parse_models, source_hash
from nnqmd_server.structures import Structures

log = logging.getLogger("nnqmd.worker")

RETRY = 0.05, 5.0
"""First and longest wait before a lost connection is tried again [s]; it doubles in between."""


def _culprits(potential: Potential, structures: Structures) -> list[int]:
    """Which structures of a failed batch fail on their own; all of them when none does."""
    found = []
    for k in range(len(structures)):
        try:
            potential.evaluate(structures[k : k + 1])
        except Exception:  # noqa: BLE001 - see _answer; what it says has been logged
            found.append(k)
    return found or list(range(len(structures)))


def _answer(
    potentials: Mapping[str, Potential], limits: Limits, request: Message, bulk: Bulk | None
) -> Message:
    name, number = request.fields["potential"], request.fields["share"]
    structures = arrays_to_structures(request.arrays)
    started = time.perf_counter()
    try:
        results = limits.evaluate(name, potentials[name], structures)
    except NnqmdError as error:
        # What one worker has no memory for may fit into another.
        final = not (error.__cause__ and out_of_memory(error.__cause__))
        return Message("failed", {"share": number, "what": error.what, "fix": error.fix, "final": final})
    except Exception as error:
        log.exception("a batch failed")
        what = f"The model failed on a structure: {error.__class__.__name__}: {str(error)[:500]}"
        suspects = _culprits(potentials[name], structures)
        fields = {"what": what, "fix": "See the worker's log.", "suspects": suspects}
        return Message("failed", {"share": number, **fields})
    fields = {"share": number, "seconds": time.perf_counter() - started}
    if bulk is not None and request.fields.get("forces"):
        area = bulk.view(request.fields["forces"], "<f8", results.forces.shape)
        area[:] = results.forces
        results = replace(results, forces=area)
    if limits.learned:
        fields["memory"] = limits.learned
    return Message("done", fields, results_to_arrays(results))


class _Drain:
    """SIGTERM: finish what is in hand, say goodbye, end."""

    def __init__(self) -> None:
        self.asked = False
        self.said = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def serve(
    potentials: Mapping[str, Potential],
    address: str,
    index: int,
    parent: int | None,
    patience: float = 600.0,
    keys: str | Path | None = None,
) -> int:
    """Evaluate batches until the pool says stop or is gone.

    A pool that is restarted is joined again.

    Parameters
    ----------
    potentials : mapping of str to Potential
        The models, loaded, by the name under which doors ask for them.
    address : str
        Where the pool listens for workers.
    index : int
        Number of this worker, for logs.
    parent : int, optional
        Process that started this one; the worker ends when it is gone.
    patience : float
        How long to wait for a pool that is not there [s].
    keys : str or Path, optional
        Key file for TCP; ``$NNQMD_KEYS`` unless given.

    Returns
    -------
    int
        Exit status: 0, or 3 when the pool refused this worker, or 4 when it is gone.

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, or unusable ones.
    """
    drain = _Drain()
    for potential in potentials.values():
        warm_up(potential)
    bulk = Bulk() if near(address) else None
    link = connect(address, keys, "worker", RETRY)
    try:
        return _converse(link, address, potentials, index, parent, patience, drain, bulk)
    finally:
        link.close()


def _converse(
    link: Link,
    address: str,
    potentials: Mapping[str, Potential],
    index: int,
    parent: int | None,
    patience: float,
    drain: _Drain,
    bulk: Bulk | None,
) -> int:
    known = {
        name: {"card": p.card.as_dict(), "form": p.form, "together": getattr(p, "together", True)}
        for name, p in potentials.items()
    }
    who = {"index": index, "pid": os.getpid(), "host": HOST, "version": __version__, "units": UNITS}
    who["potentials"] = known
    if bulk is not None:
        who["memory"] = bulk.find(bulk.room(8))
    limits = Limits()
    link.send(pack(Message("ready", who)), wait=BEAT)
    heard = time.monotonic()
    while parent is None or os.getppid() == parent:
        if drain.asked and not drain.said:
            drain.said = link.send(pack(Message("leaving")))
            log.info("leaving")
        try:
            frames = link.receive(BEAT if not drain.asked else 0.1)
            request = None if frames is None else unpack(frames, bulk)
        except OtherProtocolError as error:
            log.error("the pool at %s cannot be joined: %s", address, error)
            return 3
        except NotSharedError as error:  # the door has gone, or lives in another container
            fields = {
                "share": error.fields["share"],
                "what": str(error),
                "fix": "Start the simulation again.",
            }
            link.send(pack(Message("failed", fields | {"far": True})))
            heard = time.monotonic()
            continue
        except BadMessageError as error:
            log.error("dropped a message: %s", error)
            continue
        if request is None:
            silent = time.monotonic() - heard
            if drain.asked and silent > BEAT * LIVENESS:
                return 0
            turned_away = link.why()
            if turned_away is not None:
                log.error("%s", turned_away.what)
                return 3
            if silent > patience:
                log.error("no word from a pool at %s for %.0f s", address, silent)
                return 4
            link.send(pack(Message("alive")))
            continue
        heard = time.monotonic()
        if request.kind == "stop":
            return 0
        if request.kind == "refused":
            log.error("the pool refused this worker: %s", request.fields.get("what"))
            return 3
        if request.kind == "who":
            link.send(pack(Message("ready", who)))
        elif request.kind == "evaluate":
            link.send(pack(_answer(potentials, limits, request, bulk), bulk))
            heard = time.monotonic()
    return 0


def load_all(
    models: Mapping[str, str], device: str, compiled: bool = True, hashes: Mapping[str, str] | None = None
) -> dict[str, Potential]:
    """Load potentials by name; a model is code, and this executes it.

    Parameters
    ----------
    models : mapping of str to str
        Their sources.
    device : str
        "cpu" or "cuda".
    compiled : bool
        Compile them for this machine.
    hashes : mapping of str to str, optional
        SHA-256 that a model must have.

    Raises
    ------
    ModelError
        One cannot be loaded, or is not the file that it should be.
    """
    check_hashes(models, hashes or {})
    potentials = {}
    for name, source in models.items():
        log.info("loading %s from %s, sha256 %s", name, source, source_hash(source) or "unknown")
        potentials[name] = load(source, device, compiled)
        log.info("model %s (%s), %s", name, potentials[name].card.name, potentials[name].form)
    return potentials


def main() -> None:
    """Entry point of the worker process: ``python -m nnqmd_server.pool.worker``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pool", required=True, help="address at which the pool listens for workers")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--sha256", action="append", default=[], metavar="NAME=HASH")
    parser.add_argument("--patience", type=float, default=float("inf"))
    parser.add_argument("--keys", help="key file for TCP")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # Ctrl-C reaches the whole process group; the pool stops its workers itself, after their last answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    try:
        models = parse_models(options.model)
        hashes = parse_hashes(options.sha256, models)
        potentials = load_all(models, options.device, not options.eager, hashes)
        sys.exit(serve(potentials, options.pool, options.index, parent, options.patience, options.keys))
    except NnqmdError as error:
        log.error("%s", error.what)
        sys.exit(3)


if __name__ == "__main__":
    main()
