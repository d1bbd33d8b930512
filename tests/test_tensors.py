"""The one place where arrays become tensors: nothing but the right dtype, strides and memory gets through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import triclinic

from nnqmd_server.potentials.package import _TARGETED
from nnqmd_server.potentials.tensors import geometry, model_input, with_types
from nnqmd_server.structures import Structures, from_ase

REAL = ("pos", "cell", "edge_cell_shift")
WHOLE = ("edge_index", "atom_types", "batch", "num_atoms")


def good():
    random = np.random.default_rng(2)
    return {
        "pos": random.normal(size=(5, 3)),
        "edge_index": random.integers(0, 5, (2, 7)),
        "atom_types": random.integers(0, 2, 5),
        "cell": random.normal(size=(2, 3, 3)),
        "edge_cell_shift": random.integers(-2, 3, (7, 3)).astype(float),
        "batch": np.array([0, 0, 0, 1, 1]),
        "num_atoms": np.array([3, 2]),
    }


def unaligned(array):
    """The same numbers at an address that is no multiple of anything."""
    buffer = bytearray(array.nbytes + 1)
    view = np.frombuffer(buffer, array.dtype, array.size, 1).reshape(array.shape)
    view[...] = array
    return view


def readonly(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def expanded(array):
    """All zeros, with strides of zero."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "a transposed view": lambda a: np.ascontiguousarray(a.T).T,
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "negative strides": lambda a: np.ascontiguousarray(a[::-1, ...])[::-1, ...],
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "not aligned": unaligned,
    "read-only": readonly,
    "strides of zero": expanded,
}


def check(made, wanted):
    assert set(made) == set(wanted)
    for name, tensor in made.items():
        assert tensor.dtype == (torch.float64 if name in REAL else torch.int64), name
        assert tensor.is_contiguous(), name
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name
        assert tensor.data_ptr() % 64 == 0, name
        assert np.array_equal(tensor.numpy(), np.asarray(wanted[name], dtype=float)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*REAL, *WHOLE])
def test_whatever_the_layout(layout, name):
    data = good()
    data[name] = LAYOUTS[layout](data[name])
    check(model_input(data, "cpu"), data)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [(REAL, np.float32), (REAL, np.float16), (REAL, np.int64), (WHOLE, np.int32), (WHOLE, np.int16),
     (WHOLE, np.uint8)],
)  # fmt: skip
def test_whatever_the_dtype(names, dtype):
    data = good()
    for name in names:
        data[name] = data[name].astype(dtype)
    check(model_input(data, "cpu"), data)
    check(model_input({k: torch.from_numpy(v) for k, v in data.items()}, "cpu"), data)


def test_tensors_with_any_strides():
    data = good()
    tensors = {k: torch.from_numpy(v) for k, v in data.items()}
    tensors["cell"] = tensors["cell"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["edge_index"] = tensors["edge_index"].repeat_interleave(2, 1)[:, ::2]
    tensors["pos"] = tensors["pos"].float().requires_grad_()
    data["pos"] = data["pos"].astype(np.float32)
    assert not tensors["cell"].is_contiguous()
    made = model_input(tensors, "cpu")
    assert not made["pos"].requires_grad
    check(made, data)
    tensors["batch"] = torch.zeros(1, dtype=torch.int64).expand(5)  # what nequip's own with_batch_ makes
    assert model_input(tensors, "cpu")["batch"].stride() == (1,)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", [float, complex])
def test_indices_are_never_rounded(name, kind):
    data = good()
    data[name] = data[name].astype(kind)
    with pytest.raises(ValueError, match=f"{name} cannot be of"):
        model_input(data, "cpu")
    data[name] = torch.from_numpy(data[name])
    with pytest.raises(ValueError, match=f"{name} cannot be of"):
        model_input(data, "cpu")


@pytest.mark.parametrize(
    "spoil",
    [
        {"pos": np.zeros((5, 2))},
        {"pos": np.zeros((6, 3))},
        {"cell": np.zeros((3, 3))},
        {"cell": np.zeros((3, 3, 3))},
        {"edge_index": np.zeros((7, 2), int)},
        {"edge_cell_shift": np.zeros((6, 3))},
        {"atom_types": np.zeros((5, 1), int)},
        {"more": np.zeros(1)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(spoil):
    with pytest.raises(ValueError, match=r"shape|needs"):
        model_input(good() | spoil, "cpu")


def test_types_come_to_a_geometry():
    data = good()
    types = data["atom_types"].astype(np.uint8)
    made = geometry({k: v for k, v in data.items() if k != "atom_types"}, "cpu")
    check(with_types(made, types, "cpu"), data)
    with pytest.raises(ValueError, match="needs"):
        geometry(data, "cpu")
    with pytest.raises(ValueError, match="shape"):
        with_types(made, types[:-1], "cpu")
    with pytest.raises(ValueError, match="cannot be of"):
        with_types(made, types.astype(float), "cpu")


def test_tensors_that_stand_anywhere_are_moved():
    data = {k: torch.from_numpy(v) for k, v in good().items()}
    data["edge_cell_shift"] = torch.zeros(23, dtype=torch.float64)[1:22].reshape(7, 3)
    check(model_input(data, "cpu"), data)


def test_nothing_is_shared_with_the_arrays():
    data = good()
    made = model_input(data, "cpu")
    before = made["pos"].clone()
    data["pos"] += 1.0
    assert torch.equal(made["pos"], before)


def test_compiled_files_take_what_is_made_here():
    assert set(good()) == _TARGETED


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"strides of zero"}))
def test_a_compiled_model_gives_the_same_whatever_the_layout(potential, layout):
    """Without the cast a transposed cell changes forces by 0.3 eV/Angstrom; float32 positions give NaN."""
    straight = from_ase([triclinic()])
    crooked = Structures(*(LAYOUTS[layout](a) for a in (
        straight.numbers, straight.positions, straight.cells, straight.offsets)))  # fmt: skip
    one, other = potential.evaluate(straight), potential.evaluate(crooked)
    assert np.array_equal(one.forces, other.forces)
    assert np.array_equal(one.virial, other.virial)
