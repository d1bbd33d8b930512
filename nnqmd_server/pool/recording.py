"""Real requests and their answers in a file, to be played at a pool again: see :mod:`replay`.

The file is a first line and then messages as they go over the wire (a JSON header and raw arrays, no
pickle), each behind the number of its frames and their lengths. It may end in the middle of a message, as
after a power failure: what is whole before is read. The kinds are

``recording``  version, host and time of the pool that wrote it
``card``       of a potential, before its first request
``asked``      client, name, request, potential, time [Unix time], and the structures
``answered``   client, request, time, and the results
``failed``     client, request, time, and what was wrong
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nnqmd_server import __version__
from nnqmd_server.errors import DataError, OutputError
from nnqmd_server.pool.crew import HOST
from nnqmd_server.pool.messages import (
    MAX_MESSAGE,
    BadMessageError,
    Message,
    arrays_to_results,
    arrays_to_structures,
    pack,
    results_to_arrays,
    structures_to_arrays,
    unpack,
)
from nnqmd_server.pool.shares import Fault, Job
from nnqmd_server.structures import Array, Results, Structures

FIRST_LINE = b"nnqmd recording 1\n"

MAX_BYTES = 1 << 30
"""Default for the largest size of a recording: 2300 force sets of 32 x 256 atoms."""

MAX_HELD = 1 << 28
"""Bytes that may wait for the disk; force sets are left out rather than more memory taken."""

_MAX_FRAMES = 80


class Recorder:
    """Writes what a pool is asked and answers, in a thread of its own.

    Parameters
    ----------
    path : Path
        The file; one that is there is not replaced.
    cards : callable
        The cards of the pool's potentials by name.
    max_bytes : int
        The recording ends before it grows past this size.

    Attributes
    ----------
    written, left_out : int
        Force sets in the file, and force sets that were not written: the disk was too slow, or the file full.
    full : bool
        Whether the file has its largest size.
    trouble : str
        Why the file could not be written to the end.

    Raises
    ------
    OutputError
        The file is there already or cannot be written.
    """

    def __init__(
        self, path: Path, cards: Callable[[], dict[str, dict[str, Any]]], max_bytes: int = MAX_BYTES
    ) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except FileExistsError:
            raise OutputError(f"The recording {path} is there already.", "Choose another --record.") from None
        except OSError as error:
            raise OutputError(f"Cannot write the recording {path}: {error}.", "Choose another.") from error
        self._cards = cards
        self._described: set[str] = set()
        self._max_bytes, self._bytes = max_bytes, len(FIRST_LINE)
        self._held = 0
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()
        self.written = self.left_out = 0
        self.full, self.trouble = False, ""
        self._file.write(FIRST_LINE)
        begin = Message("recording", {"version": __version__, "host": HOST, "time": time.time()})
        self._put(begin, 0)
        self._thread = threading.Thread(target=self._write_all, name="nnqmd-record", daemon=True)
        self._thread.start()

    def __call__(self, kind: str, job: Job, what: Structures | Results | Fault) -> None:
        """A force set is asked, answered or has failed; returns at once."""
        fields = {"client": job.simulation, "request": job.request, "time": time.time()}
        if isinstance(what, Structures):
            fields |= {"name": job.name, "potential": job.potential}
            self._put_arrays(kind, fields, structures_to_arrays(what))
        elif isinstance(what, Results):
            self._put_arrays(kind, fields, results_to_arrays(what))
        else:
            self._put(Message(kind, {**fields, "what": what.what}), 100)

    def _put_arrays(self, kind: str, fields: dict[str, Any], arrays: dict[str, Array]) -> None:
        # Copies: what lies in memory shared with a door is overwritten by its next force set.
        size = sum(array.nbytes for array in arrays.values())
        if self._has_room(size):
            copies = {name: np.array(array) for name, array in arrays.items()}
            self._put(Message(kind, fields, copies), size)
        else:
            self.left_out += kind == "asked"

    def _has_room(self, size: int) -> bool:
        return not self.full and self._held + size <= MAX_HELD

    def _put(self, message: Message, size: int) -> None:
        if not self._has_room(size):
            return
        with self._lock:
            self._held += size
        self._waiting.put((size, message))

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            size, message = item
            try:
                self._describe(message)
                self._write(message)
            except OSError as error:
                self.full, self.trouble = True, str(error)
            with self._lock:
                self._held -= size

    def _describe(self, message: Message) -> None:
        name = message.fields.get("potential")
        card = self._cards().get(name) if name not in self._described else None
        if card is not None:
            self._described.add(name)
            self._write(Message("card", {"potential": name, "card": card}))

    def _write(self, message: Message) -> None:
        frames = pack(message)
        lengths = [len(frame) for frame in frames]
        head = struct.pack(f"<I{len(lengths)}Q", len(lengths), *lengths)
        size = len(head) + sum(lengths)
        if self.full or self._bytes + size > self._max_bytes:
            self.full = True
            self.left_out += message.kind == "asked"
            return
        self._file.write(head)
        for frame in frames:
            self._file.write(frame)
        if self._waiting.empty():
            self._file.flush()
        self._bytes += size
        self.written += message.kind == "asked"

    def close(self) -> None:
        """Write what is waiting, and end."""
        self._waiting.put(None)
        self._thread.join(30)
        if not self._thread.is_alive():
            try:
                self._file.close()
            except OSError as error:
                self.trouble = str(error)


@dataclass
class Request:
    """One recorded force set: who asked when, and where in the file it and its answer stand.

    Times are Unix times [s]; ``failure`` says why there is no answer.
    """

    client: str
    name: str
    number: int
    potential: str
    time: float
    structures: int
    atoms: int
    place: int
    answer: int | None = None
    ended: float | None = None
    failure: str | None = None


@dataclass
class Recording:
    """A recording that was looked through; the arrays stay in the file until they are asked for.

    Attributes
    ----------
    info : dict
        Version, host and time of the pool that wrote it.
    cards : dict
        Cards of its potentials by name.
    requests : list of Request
        In the order in which they arrived.
    cut_off : bool
        Whether the file ends in the middle of a message.
    """

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cut_off: bool = False

    def structures(self, request: Request) -> Structures:
        """What was asked."""
        return arrays_to_structures(self._read(request.place).arrays)

    def results(self, request: Request, structures: Structures) -> Results | None:
        """What was answered; None when it was not."""
        if request.answer is None:
            return None
        return arrays_to_results(self._read(request.answer).arrays, structures)

    def _read(self, place: int) -> Message:
        with self.path.open("rb") as file:
            file.seek(place)
            return unpack(next(_frames(file))[1])


def _frames(file: BinaryIO) -> Iterator[tuple[int, list[bytes] | None]]:
    """Place and frames of each message; None for one that is cut off."""
    size = os.fstat(file.fileno()).st_size
    while (place := file.tell()) < size:
        head = file.read(4)
        count = struct.unpack("<I", head)[0] if len(head) == 4 else 0
        if count > _MAX_FRAMES:
            raise BadMessageError(f"{count} frames")
        packed = file.read(8 * count)
        if len(head) < 4 or len(packed) < 8 * count:
            yield place, None
            return
        lengths = struct.unpack(f"<{count}Q", packed)
        if sum(lengths) > MAX_MESSAGE:
            raise BadMessageError("a message that is too long")
        if file.tell() + sum(lengths) > size:
            yield place, None
            return
        yield place, [file.read(length) for length in lengths]


def read_recording(path: Path, progress: Callable[[float], None] | None = None) -> Recording:
    """Look through a recording.

    Parameters
    ----------
    path : Path
        The file.
    progress : callable, optional
        Told the part that has been read, from 0 to 1.

    Raises
    ------
    DataError
        It cannot be read, is no recording, or is damaged.
    """
    found = Recording(path)
    asked: dict[tuple[str, int], Request] = {}
    place = 0
    try:
        with path.open("rb") as file:
            if file.readline(len(FIRST_LINE)) != FIRST_LINE:
                raise DataError(f"{path} is no recording.", "Make one with nnqmd serve --record.")
            size = path.stat().st_size
            for place, frames in _frames(file):
                if frames is None:
                    found.cut_off = True
                    break
                _take(found, asked, place, unpack(frames))
                if progress:
                    progress(file.tell() / size)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.", "Check the name.") from error
    except (BadMessageError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read from byte {place} on: {error}.",
            "It is damaged, or of another version: make another recording.",
        ) from error
    return found


def _take(found: Recording, asked: dict[tuple[str, int], Request], place: int, message: Message) -> None:
    fields = message.fields
    if message.kind == "recording":
        found.info = fields
    elif message.kind == "card":
        found.cards[str(fields["potential"])] = dict(fields["card"])
    elif message.kind == "asked":
        structures = arrays_to_structures(message.arrays)
        key = str(fields["client"]), int(fields["request"])
        request = Request(
            *(key[0], str(fields["name"]), key[1], str(fields["potential"]), float(fields["time"])),
            *(len(structures), structures.n_atoms, place),
        )
        asked[key] = request
        found.requests.append(request)
    else:
        request = asked.get((str(fields["client"]), int(fields["request"])))
        if request is None:
            return  # asked before the recording began, or left out of it
        request.ended = float(fields["time"])
        if message.kind == "answered":
            request.answer = place
        elif message.kind == "failed":
            request.failure = str(fields["what"])
