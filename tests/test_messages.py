import json

import numpy as np
import pytest
from conftest import crystal

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
from nnqmd_server.structures import Results, from_ase


def results_for(structures):
    count, n = len(structures), structures.n_atoms
    return Results(
        np.arange(float(count)), np.ones((n, 3)), np.ones((count, 3, 3)), {"dipole": np.ones((count, 3))}
    )


def test_structures_and_results_survive_the_wire_bit_for_bit():
    structures = from_ase([crystal(seed=1), crystal(seed=2, repeat=(2, 1, 1))])
    frames = [bytes(f) for f in pack(Message("evaluate", {"request": 4}, structures_to_arrays(structures)))]
    message = unpack(frames)
    assert (message.kind, message.fields) == ("evaluate", {"request": 4})
    back = arrays_to_structures(message.arrays)
    for name in ("numbers", "positions", "cells", "offsets"):
        assert np.array_equal(getattr(back, name), getattr(structures, name))
    results = results_for(structures)
    again = arrays_to_results(
        unpack([bytes(f) for f in pack(Message("done", {}, results_to_arrays(results)))]).arrays, structures
    )
    assert np.array_equal(again.forces, results.forces)
    assert np.array_equal(again.properties["dipole"], results.properties["dipole"])


def spoilt_frames():
    arrays = {"cells": np.zeros((4, 3)), "positions": np.zeros((800, 3))}
    good = [bytes(f) for f in pack(Message("evaluate", {"request": 1}, arrays))]
    assert len(good) == 3
    unpack(good)
    header = json.loads(good[0])
    yield []
    yield good[:1]
    yield [b"\x80\x04\x95rubbish", *good[1:]]
    yield [b"{" * 70_000, b""]
    yield [good[0], good[1][:-8], good[2]]
    yield [good[0], good[1] + bytes(8), good[2]]
    yield [good[0], good[1], good[2][:-8]]
    yield [good[0], good[1], good[2] + bytes(8)]
    yield good[:2]
    yield [*good, good[2]]
    for change in (
        {"protocol": 99},
        {"kind": 3},
        {"arrays": [["positions", "<O8", [4, 3]]]},
        {"arrays": [["positions", "<f8", [-4, -3]]]},
        {"arrays": [["positions", "<f8", [1 << 40, 1 << 40]]]},
        {"arrays": [["positions", "<f8"]]},
        {"arrays": "positions"},
        {"arrays": [["a", "<f8", [0]]] * 100},
    ):
        yield [json.dumps(header | change).encode(), *good[1:]]


@pytest.mark.parametrize("frames", list(spoilt_frames()))
def test_rubbish_is_refused(frames):
    with pytest.raises(BadMessageError):
        unpack(frames)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offsets", np.array([0, 99])),
        ("offsets", np.array([0, 0, 16])),
        ("numbers", np.full(16, 200, np.uint8)),
        ("numbers", np.full(16, 1.0)),
        ("positions", np.zeros((15, 3))),
        ("cells", np.zeros((2, 3, 3))),
    ],
)
def test_arrays_that_are_no_structures_are_refused(name, value):
    arrays = structures_to_arrays(from_ase([crystal()])) | {name: value}
    with pytest.raises(BadMessageError):
        arrays_to_structures(arrays)


@pytest.mark.parametrize("name", ["forces", "energy", "virial", "structure:dipole"])
def test_results_that_are_too_short_are_refused(name):
    structures = from_ase([crystal()])
    good = results_to_arrays(results_for(structures))
    arrays_to_results(good, structures)
    with pytest.raises(BadMessageError):
        arrays_to_results(good | {name: good[name][:-1]}, structures)
    if not name.startswith("structure"):
        with pytest.raises(BadMessageError):
            arrays_to_results({k: v for k, v in good.items() if k != name}, structures)
