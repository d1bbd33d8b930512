"""The one place where arrays become the tensors of a model call.

A compiled model checks nothing: a cell with other strides gives wrong forces, float32 positions give NaN, and
narrow or byte-swapped numbers give anything. So every tensor is made here: of the dtype that its name
demands, in memory of its own, C-contiguous, and on the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from nnqmd_server.structures import Array

_INPUTS = {
    "pos": (torch.float64, ("N", 3)),
    "edge_index": (torch.int64, (2, "E")),
    "atom_types": (torch.int64, ("N",)),
    "cell": (torch.float64, ("B", 3, 3)),
    "edge_cell_shift": (torch.float64, ("E", 3)),
    "batch": (torch.int64, ("N",)),
    "num_atoms": (torch.int64, ("B",)),
}
"""What a nequip model takes: dtype and shape, for B structures with N atoms and E edges."""

TYPES = "atom_types"

_ALIGNED = 64
"""Addresses are multiples of it [bytes], as torch's own: what reads a tensor may go another way, with other
round-off, when it stands elsewhere."""


def model_input(
    data: Mapping[str, Array | torch.Tensor], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The input of a model call, whatever the layout of what is given.

    Parameters
    ----------
    data : mapping of str to array or tensor
        By nequip's names: ``pos`` [Angstrom] (N, 3), ``edge_index`` (2, E), ``atom_types`` (N,),
        ``cell`` [Angstrom] (B, 3, 3), ``edge_cell_shift`` (E, 3), ``batch`` (N,), ``num_atoms`` (B,). Of any
        real dtype, byte order and strides; read-only, expanded and shared memory are fine.
    device : torch.device or str
        Where the model is.

    Returns
    -------
    dict of str to Tensor
        float64 and int64, C-contiguous; arrays are copied, tensors that are right already are not.

    Raises
    ------
    ValueError
        A name is unknown or missing, the shapes do not fit each other, or real numbers stand for indices.
    """
    return _checked(data, device, tuple(_INPUTS))


def geometry(data: Mapping[str, Array | torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """As :func:`model_input`, but without the atoms' types, which every model numbers for itself."""
    return _checked(data, device, tuple(name for name in _INPUTS if name != TYPES))


def with_types(
    made: Mapping[str, torch.Tensor], types: Array, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The input of a model call out of what :func:`geometry` has made, which is not looked at again.

    Parameters
    ----------
    made : mapping of str to Tensor
        On the same device.
    types : Array
        Of the atoms, shape (N,).
    device : torch.device or str
        Where the model is.

    Raises
    ------
    ValueError
        There is not one type for each atom, or it is not an index.
    """
    if types.shape != made["pos"].shape[:1]:
        raise ValueError(f"{TYPES} has the shape {types.shape} for positions of {tuple(made['pos'].shape)}")
    return {**made, TYPES: _tensor(TYPES, types, _INPUTS[TYPES][0], device)}


def _checked(
    data: Mapping[str, Array | torch.Tensor], device: torch.device | str, names: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    if set(data) != set(names):
        raise ValueError(f"a model call needs {sorted(names)}, not {sorted(data)}")
    sizes: dict[str, int] = {}
    made = {}
    for name in names:
        dtype, shape = _INPUTS[name]
        given = data[name]
        if len(given.shape) != len(shape) or any(
            size != (sizes.setdefault(want, size) if isinstance(want, str) else want)
            for size, want in zip(given.shape, shape, strict=True)
        ):
            raise ValueError(f"{name} has the shape {tuple(given.shape)}, wanted is {shape} with {sizes}")
        made[name] = _tensor(name, given, dtype, device)
    return made


def _tensor(
    name: str, given: Array | torch.Tensor, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        if given.is_complex() or (given.is_floating_point() and not dtype.is_floating_point):
            raise ValueError(f"{name} cannot be of {given.dtype}")
        made = given.detach().to(device, dtype).contiguous()
        return made.clone() if made.device.type == "cpu" and made.data_ptr() % _ALIGNED else made
    # torch's own memory: aligned, native, writable, whatever the array was. For a GPU page-locked, and kept
    # by torch until the copy is over, so that nobody waits for it.
    far = torch.device(device).type == "cuda"
    fresh = torch.empty(given.shape, dtype=dtype, pin_memory=far)
    try:
        np.copyto(fresh.numpy(), given, casting="same_kind")
    except TypeError as error:
        raise ValueError(f"{name} cannot be of {given.dtype}") from error
    return fresh.to(device, non_blocking=True) if far else fresh
