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
    if set(data) != set(_INPUTS):
        raise ValueError(f"a model call needs {sorted(_INPUTS)}, not {sorted(data)}")
    sizes: dict[str, int] = {}
    made = {}
    for name, (dtype, shape) in _INPUTS.items():
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
        return given.detach().to(device, dtype).contiguous()
    # torch's own memory: aligned, native, writable, whatever the array was. For a GPU page-locked, and kept
    # by torch until the copy is over, so that nobody waits for it.
    far = torch.device(device).type == "cuda"
    fresh = torch.empty(given.shape, dtype=dtype, pin_memory=far)
    try:
        np.copyto(fresh.numpy(), given, casting="same_kind")
    except TypeError as error:
        raise ValueError(f"{name} cannot be of {given.dtype}") from error
    return fresh.to(device, non_blocking=far)
