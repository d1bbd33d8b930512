"""The edges of a batch on the device of the model, with torch: what a GPU needs not be sent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from nnqmd_server.potentials import device_lists
from nnqmd_server.potentials.neighbours import Lists
from nnqmd_server.potentials.pairs import Pairs
from nnqmd_server.structures import Array, Structures, concatenate

_AT_ONCE = 4_000_000  # pairs times structures: 100 MB of distances


class _Copy(NamedTuple):
    """The pairs of a list on a device."""

    first: torch.Tensor
    second: torch.Tensor
    turns: torch.Tensor
    edges: torch.Tensor
    shifts: torch.Tensor
    pair: torch.Tensor


def edges_on_device(
    structures: Structures, lists: Lists, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """The edges of all structures, those of each together and in the order of :meth:`Lists.edges`.

    Parameters
    ----------
    structures : Structures
        The structures.
    lists : Lists
        Their lists, which are looked up and made on the host.
    device : torch.device
        Where the pairs are cut to the cutoff.

    Returns
    -------
    edges : torch.Tensor
        Centres and neighbours, int64, shape (2, n_edges), atoms numbered through the batch.
    shifts : torch.Tensor
        Cell vectors between them, float64, shape (n_edges, 3).
    counts : Array
        Edges of each structure, on the host, shape (n_structures,).
    """
    positions = torch.from_numpy(np.ascontiguousarray(structures.positions)).to(device)
    edges, shifts, owners = [], [], []
    shared = len(structures) >= device_lists.MANY and device_lists.usable(device)
    chosen = lists.chosen(structures, shared)
    for which, cell, one in chosen:
        copy = one.copies.get(device)
        if copy is None:
            copy = one.copies[device] = _copy(one.pairs, device)
        size = len(one.positions)
        step = max(1, _AT_ONCE // max(1, len(one.pairs)))
        for low in range(0, len(which), step):
            some = torch.from_numpy(which[low : low + step]).to(device)
            first = torch.from_numpy(structures.offsets[which[low : low + step]]).to(device)
            atoms = first[:, None] + torch.arange(size, device=device)
            near = _near(copy, positions[atoms], torch.from_numpy(cell).to(device), lists.cutoff)
            member, edge = torch.nonzero(near.index_select(1, copy.pair), as_tuple=True)
            edges.append(copy.edges.index_select(1, edge) + first[member])
            shifts.append(copy.shifts.index_select(0, edge))
            owners.append(some[member])
    left = np.diff(structures.offsets) > 0
    for which, _, _ in chosen:
        left[which] = False
    if left.any():
        try:
            more = _made_there(structures, left, lists, device)
        except torch.OutOfMemoryError:
            raise  # the pool halves the share
        except Exception as error:  # noqa: BLE001 - what a GPU or its driver lacks shows here
            device_lists.give_up(error)
            return edges_on_device(structures, lists, device)
        for known, new in zip((edges, shifts, owners), more, strict=True):
            known.append(new)
    if not owners:
        none = torch.empty((2, 0), dtype=torch.int64, device=device)
        no_shifts = torch.empty((0, 3), dtype=torch.float64, device=device)
        return none, no_shifts, np.zeros(len(structures), dtype=np.int64)
    owner = torch.cat(owners)
    counts = torch.bincount(owner, minlength=len(structures)).cpu().numpy()
    if len(owners) == 1:
        return edges[0], shifts[0], counts
    order = torch.sort(owner, stable=True).indices
    return torch.cat(edges, dim=1)[:, order], torch.cat(shifts)[order], counts


def _made_there(
    structures: Structures, left: Array, lists: Lists, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Edges, shifts and owners of structures without a list."""
    which = np.flatnonzero(left)
    some = concatenate([structures[k : k + 1] for k in which])
    edges, shifts, counts = device_lists.fresh_edges_on_device(some, lists.cutoff, device)
    atoms = torch.from_numpy(np.flatnonzero(np.repeat(left, np.diff(structures.offsets)))).to(device)
    return atoms[edges], shifts, torch.from_numpy(np.repeat(which, counts)).to(device)


def _copy(pairs: Pairs, device: torch.device) -> _Copy:
    arrays = (pairs.first, pairs.second, pairs.turns, pairs.edges, pairs.shifts, pairs.pair)
    return _Copy(*(torch.from_numpy(a).to(device) for a in arrays))


def _near(pairs: _Copy, positions: torch.Tensor, cell: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Whether each pair is within the cutoff, bool, shape (n_structures, n_pairs)."""
    square = 0.0
    for k in range(3):
        t = pairs.turns
        across = t[0] * cell[0, k] + t[1] * cell[1, k] + t[2] * cell[2, k]
        x = positions[:, :, k].contiguous()
        apart = x.index_select(1, pairs.second) - x.index_select(1, pairs.first) + across
        square = square + apart * apart
    return square <= cutoff * cutoff
