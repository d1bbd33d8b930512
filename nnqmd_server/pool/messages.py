"""The wire between doors, pool and workers: a small JSON header and raw arrays. No pickle.

A message is a list of frames: the header; all small arrays behind one another, in the order in which the
header names them, each beginning at a multiple of eight bytes; and each large array, unless it lies in memory
that both sides share: then the header says where. Everything that arrives is checked against the header
before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    import orjson
except ImportError:  # a worker of a foreign interpreter may lack it
    orjson = None

from nnqmd_server.pool.bulk import Bulk, UnreachableError
from nnqmd_server.structures import Array, Results, Structures

PROTOCOL = 3
MAX_HEADER = 1 << 20
"""Longest header [bytes]: the status of a pool of a thousand workers fits."""
MAX_MESSAGE = 1 << 30
LARGE = 1 << 14
"""From this size on an array is a frame of its own [bytes]: below, a frame costs more than a copy."""
_DTYPES = {"<f8": np.dtype("<f8"), "<i8": np.dtype("<i8"), "|u1": np.dtype("|u1")}
_MAX_ARRAYS = 64
MAX_FRAMES = 2 + _MAX_ARRAYS

Frame = bytes | memoryview


UNITS = "eV Angstrom"
"""What every number on this wire is in; a worker says so when it joins."""


class BadMessageError(ValueError):
    """Frames that are not a message of this protocol."""


class OtherProtocolError(BadMessageError):
    """A message of another version of this protocol."""

    def __init__(self, theirs: object) -> None:
        super().__init__(
            f"it speaks version {str(theirs)[:20]} of the pool's protocol, this side {PROTOCOL}: use one"
            " version of nnqmd everywhere"
        )


class NotSharedError(BadMessageError):
    """A message whose arrays lie in memory that cannot be reached; ``fields`` are its plain fields."""

    def __init__(self, what: str, fields: dict[str, Any]) -> None:
        super().__init__(what)
        self.fields = fields


@dataclass(frozen=True)
class Message:
    """One message: its kind, plain fields, and arrays by name."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)


def pack(message: Message, bulk: Bulk | None = None) -> list[Frame]:
    """Frames of a message; large arrays are not copied when they are contiguous already.

    With ``bulk``, the receiver can reach memory that we share: what lies there is named, not sent.
    """
    described, small, frames = [], [], []
    for name, array in message.arrays.items():
        kind = array.dtype.str if array.dtype.str in _DTYPES else "<f8"
        raw = np.ascontiguousarray(array, dtype=_DTYPES[kind])
        described.append([name, kind, raw.shape])
        place = bulk.find(raw) if bulk is not None and raw.nbytes >= LARGE else None
        if place is not None:
            described[-1].append(place)
        elif raw.nbytes >= LARGE:
            frames.append(raw.reshape(-1).view(np.uint8).data)
        elif raw.size:
            small.append(raw.tobytes().ljust(-(-raw.nbytes // 8) * 8))
    header = {"protocol": PROTOCOL, "kind": message.kind, "fields": message.fields, "arrays": described}
    return [_encode(header), b"".join(small), *frames]


def unpack(frames: Sequence[Frame], bulk: Bulk | None = None) -> Message:
    """The message that the frames hold; ``bulk`` reaches what lies in shared memory.

    Raises
    ------
    BadMessageError
        The frames are not such a message: wrong header, version, types or lengths.
    """
    if not frames or len(frames[0]) > MAX_HEADER:
        raise BadMessageError("no header, or one that is too long")
    try:
        header = _decode(frames[0])
        if header["protocol"] != PROTOCOL:
            raise OtherProtocolError(header["protocol"])
        if len(frames) < 2:
            raise BadMessageError("a header without its arrays")
        kind, fields, described = header["kind"], header["fields"], header["arrays"]
        if not isinstance(kind, str) or not isinstance(fields, dict) or not isinstance(described, list):
            raise BadMessageError("malformed header")
        if len(described) > _MAX_ARRAYS:
            raise BadMessageError("too many arrays")
        arrays, first, large = {}, 0, iter(frames[2:])
        for name, dtype, shape, *place in described:
            number, count = _DTYPES[dtype], _count(shape)
            size = count * number.itemsize
            if place:
                if bulk is None:
                    raise BadMessageError("an array in memory that is not shared")
                arrays[name] = bulk.view(place[0], number, shape)
                continue
            raw, offset = (next(large, b""), 0) if size >= LARGE else (frames[1], first)
            if offset + size > len(raw) or (size >= LARGE and size != len(raw)):
                raise BadMessageError("an array is not as long as announced")
            arrays[name] = np.ndarray(shape, number, raw, offset) if count else np.empty(shape, number)
            if size < LARGE:
                first += -(-size // 8) * 8
        if first != len(frames[1]) or next(large, None) is not None:
            raise BadMessageError("the header and the frames disagree")
    except BadMessageError:
        raise
    except UnreachableError as error:
        raise NotSharedError(str(error), fields) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadMessageError(f"malformed header: {str(error)[:200]}") from error
    return Message(kind, fields, arrays)


def _encode(header: dict[str, Any]) -> bytes:
    if orjson is not None:
        try:
            return orjson.dumps(header, option=orjson.OPT_NON_STR_KEYS)
        except TypeError:  # longer integers, halves of surrogate pairs: the standard library knows more
            pass
    return json.dumps(header).encode()


def _decode(frame: Frame) -> dict[str, Any]:
    if orjson is not None:
        try:
            return orjson.loads(frame)
        except ValueError:
            pass
    return json.loads(bytes(frame))


def _count(shape: list[int]) -> int:
    """Numbers in an array of this shape."""
    count = 1
    for n in shape:
        if type(n) is not int or n < 0:
            raise BadMessageError("malformed array description")
        count *= n
    if len(shape) > 4 or count > MAX_MESSAGE:
        raise BadMessageError("malformed array description")
    return count


def structures_to_arrays(structures: Structures) -> dict[str, Array]:
    """Arrays of a batch of structures, under the names of its fields."""
    return {
        "numbers": structures.numbers.astype(np.uint8),
        "positions": structures.positions,
        "cells": structures.cells,
        "offsets": structures.offsets,
    }


def arrays_to_structures(arrays: dict[str, Array]) -> Structures:
    """The batch of structures that a message holds, checked.

    Raises
    ------
    BadMessageError
        An array is missing or the shapes do not fit together.
    """
    try:
        numbers = arrays["numbers"]
        found = Structures(numbers.astype(np.int64), arrays["positions"], arrays["cells"], arrays["offsets"])
    except KeyError as error:
        raise BadMessageError(f"no array {error}") from None
    n, count = len(found.numbers), len(found.cells)
    fits = (
        found.numbers.shape == (n,)
        and numbers.dtype == np.uint8
        and found.positions.shape == (n, 3)
        and found.cells.shape == (count, 3, 3)
        and found.offsets.shape == (count + 1,)
        and found.offsets.dtype == np.int64
    )
    offsets = found.offsets
    if not fits or offsets[0] != 0 or offsets[-1] != n or (offsets[1:] <= offsets[:-1]).any():
        raise BadMessageError("the arrays do not describe structures")
    if n and not 1 <= numbers.min() <= numbers.max() <= 118:
        raise BadMessageError("an atomic number is not one")
    return found


def results_to_arrays(results: Results) -> dict[str, Array]:
    """Arrays of results; properties are marked with ``structure:`` or ``atom:``."""
    return {
        "energy": results.energy,
        "forces": results.forces,
        "virial": results.virial,
        **{f"structure:{k}": v for k, v in results.properties.items()},
        **{f"atom:{k}": v for k, v in results.atom_properties.items()},
    }


def arrays_to_results(arrays: dict[str, Array], structures: Structures) -> Results:
    """The results that a message holds, checked against the structures that were asked for.

    Raises
    ------
    BadMessageError
        Something is missing or has the wrong size.
    """
    try:
        found = Results(
            arrays["energy"],
            arrays["forces"],
            arrays["virial"],
            {k.removeprefix("structure:"): v for k, v in arrays.items() if k.startswith("structure:")},
            {k.removeprefix("atom:"): v for k, v in arrays.items() if k.startswith("atom:")},
        )
    except KeyError as error:
        raise BadMessageError(f"no array {error}") from None
    count, n = len(structures), structures.n_atoms
    sized = (
        found.energy.shape == (count,)
        and found.forces.shape == (n, 3)
        and found.virial.shape == (count, 3, 3)
        and all(len(v) == count for v in found.properties.values())
        and all(len(v) == n for v in found.atom_properties.values())
    )
    if not sized:
        raise BadMessageError("results of the wrong size")
    return found
