"""The wire between doors, pool and workers: a small JSON header and raw arrays. No pickle.

A message is a list of frames: the header, then one frame per array in the order in which the header
names them. Everything that arrives is checked against the header before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnqmd_server.structures import Array, Results, Structures

PROTOCOL = 1
MAX_HEADER = 1 << 16
MAX_MESSAGE = 1 << 30
_DTYPES = {"<f8": np.dtype("<f8"), "<i8": np.dtype("<i8")}
_MAX_ARRAYS = 64


class BadMessageError(ValueError):
    """Frames that are not a message of this protocol."""


@dataclass(frozen=True)
class Message:
    """One message: its kind, plain fields, and arrays by name."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)


def pack(message: Message) -> list[bytes | memoryview]:
    """Frames of a message; arrays are not copied when they are contiguous already."""
    described, frames = [], []
    for name, array in message.arrays.items():
        kind = "<i8" if np.issubdtype(array.dtype, np.integer) else "<f8"
        raw = np.ascontiguousarray(array, dtype=_DTYPES[kind])
        described.append([name, kind, list(raw.shape)])
        frames.append(raw.reshape(-1).view(np.uint8).data if raw.size else b"")
    header = {"protocol": PROTOCOL, "kind": message.kind, "fields": message.fields, "arrays": described}
    return [json.dumps(header).encode(), *frames]


def unpack(frames: Sequence[bytes | memoryview]) -> Message:
    """The message that the frames hold.

    Raises
    ------
    BadMessageError
        The frames are not such a message: wrong header, version, types or lengths.
    """
    if not frames or len(frames[0]) > MAX_HEADER:
        raise BadMessageError("no header, or one that is too long")
    try:
        header = json.loads(bytes(frames[0]))
        kind, fields, described = header["kind"], header["fields"], header["arrays"]
        if header["protocol"] != PROTOCOL:
            raise BadMessageError(f"protocol {header['protocol']}, this side speaks {PROTOCOL}")
        if not isinstance(kind, str) or not isinstance(fields, dict) or not isinstance(described, list):
            raise BadMessageError("malformed header")
        if len(described) != len(frames) - 1 or len(described) > _MAX_ARRAYS:
            raise BadMessageError("the header and the frames disagree")
        arrays = {
            name: _array(dtype, shape, raw)
            for (name, dtype, shape), raw in zip(described, frames[1:], strict=True)
        }
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadMessageError(f"malformed header: {error}") from error
    return Message(kind, fields, arrays)


def _array(dtype: str, shape: list[int], raw: bytes | memoryview) -> Array:
    if dtype not in _DTYPES or len(shape) > 4 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise BadMessageError("malformed array description")
    if math.prod(shape) * 8 != len(raw):
        raise BadMessageError("an array is not as long as announced")
    return np.frombuffer(raw, dtype=_DTYPES[dtype]).reshape(shape)


def structures_to_arrays(structures: Structures) -> dict[str, Array]:
    """Arrays of a batch of structures, under the names of its fields."""
    return {
        "numbers": structures.numbers,
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
        found = Structures(arrays["numbers"], arrays["positions"], arrays["cells"], arrays["offsets"])
    except KeyError as error:
        raise BadMessageError(f"no array {error}") from None
    n, count = len(found.numbers), len(found.cells)
    fits = (
        found.numbers.shape == (n,)
        and found.numbers.dtype == np.int64
        and found.positions.shape == (n, 3)
        and found.cells.shape == (count, 3, 3)
        and found.offsets.shape == (count + 1,)
        and found.offsets.dtype == np.int64
    )
    if not fits or found.offsets[0] != 0 or found.offsets[-1] != n or (np.diff(found.offsets) < 1).any():
        raise BadMessageError("the arrays do not describe structures")
    if ((found.numbers < 1) | (found.numbers > 118)).any():
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
