"""New neighbour lists for many structures at once, made where the model runs, by nvalchemi-toolkit-ops.

Beads share a list that is kept (:mod:`nnqmd_server.potentials.neighbours`): next to nothing is left to make.
Structures that share none would each have one of their own, which the host makes one after another, in
milliseconds each, and which a GPU then cuts one after another. One call here makes the edges of all of them.

Not run on a GPU: the kernels are Warp's, which compiles them for CPUs too, and the tests run them there.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import numpy as np
import torch

from nnqmd_server.structures import Array, Structures

MANY = 8
"""Structures of a batch from which on this is used; fewer have kept lists."""

log = logging.getLogger("nnqmd.worker")

_given_up: list[str] = []  # why, if so

_GUARD = 1e-6  # for the round-off of its distances; what is within the cutoff is decided here [Angstrom]


def usable(device: torch.device) -> bool:
    """Whether lists are made on a device: on a GPU, where nvalchemi-toolkit-ops is installed and works."""
    return device.type == "cuda" and not _given_up and find_spec("nvalchemiops") is not None


def give_up(error: Exception) -> None:
    """Make no more lists on devices in this process, which then has kept ones as without the package."""
    _given_up.append(repr(error))
    log.warning("lists are made on the host: nvalchemi-toolkit-ops failed on the GPU: %.500r", error)


def fresh_edges_on_device(
    structures: Structures, cutoff: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """The edges of all structures, as :func:`.device_pairs.edges_on_device` gives them.

    Parameters
    ----------
    structures : Structures
        The structures, each with atoms in it.
    cutoff : float
        Cutoff radius [Angstrom].
    device : torch.device
        Where they are made.

    Returns
    -------
    edges, shifts, counts : torch.Tensor, torch.Tensor, Array
        Shapes (2, n_edges), (n_edges, 3) and (n_structures,); in the order of kept lists: by centre,
        neighbour and shift.
    """
    count = len(structures)
    positions, cells = _on(structures.positions, device), _on(structures.cells, device)
    owner = _on(np.repeat(np.arange(count), np.diff(structures.offsets)), device)
    edges, turns = _candidates(positions, cells, owner, _on(structures.offsets, device), cutoff + _GUARD)
    shifts = turns.to(torch.float64)
    near = _near(positions, cells[owner[edges[0]]], edges, shifts, cutoff)
    edges, turns, shifts = edges[:, near], turns[near].to(torch.int64), shifts[near]
    order = _order(edges, turns, len(positions))
    counts = torch.bincount(owner[edges[0]], minlength=count).cpu().numpy()
    return edges[:, order], shifts[order], counts


def _on(array: Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _candidates(
    positions: torch.Tensor, cells: torch.Tensor, owner: torch.Tensor, offsets: torch.Tensor, cutoff: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from nvalchemiops.torch.neighbors import NeighborOverflowError, neighbor_list

    periodic = torch.ones((len(cells), 3), dtype=torch.bool, device=positions.device)
    room = None  # for the neighbours of an atom: its own guess, and then what it found
    while True:
        try:
            edges, _, turns = neighbor_list(
                positions,
                cutoff,
                cell=cells,
                pbc=periodic,
                batch_idx=owner.to(torch.int32),
                batch_ptr=offsets.to(torch.int32),
                return_neighbor_list=True,
                max_neighbors=room,
            )
        except NeighborOverflowError as error:
            room = max(error.num_neighbors, 2 * error.max_neighbors)
        else:
            return edges.to(torch.int64), turns


def _near(
    positions: torch.Tensor, cells: torch.Tensor, edges: torch.Tensor, t: torch.Tensor, cutoff: float
) -> torch.Tensor:
    """Which edges are within the cutoff; with the arithmetic of kept lists, so that both say the same."""
    square = 0.0
    for k in range(3):
        across = t[:, 0] * cells[:, 0, k] + t[:, 1] * cells[:, 1, k] + t[:, 2] * cells[:, 2, k]
        apart = positions[edges[1], k] - positions[edges[0], k] + across
        square = square + apart * apart
    return torch.nonzero(square <= cutoff * cutoff).squeeze(1)


def _order(edges: torch.Tensor, turns: torch.Tensor, n_atoms: int) -> torch.Tensor:
    if not len(turns):
        return torch.empty(0, dtype=torch.int64, device=edges.device)
    low, high = torch.aminmax(turns, dim=0)
    wide = (high - low + 1).tolist()
    if n_atoms * n_atoms * wide[0] * wide[1] * wide[2] < 2.0**62:
        s = turns - low
        which = (s[:, 0] * wide[1] + s[:, 1]) * wide[2] + s[:, 2]
        kinds = wide[0] * wide[1] * wide[2]
    else:  # atoms have drifted very far
        found, which = torch.unique(turns, dim=0, return_inverse=True)
        kinds = len(found)
    return torch.argsort((edges[0] * n_atoms + edges[1]) * kinds + which)
