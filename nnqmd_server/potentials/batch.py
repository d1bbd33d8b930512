"""A batch that is ready for a model: neighbour lists made, cut into calls by the number of edges.

Several potentials can run on one batch: what depends on the model, its types, is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from nequip.data import AtomicDataDict

from nnqmd_server.potentials.device_pairs import edges_on_device
from nnqmd_server.potentials.neighbours import Lists
from nnqmd_server.potentials.tensors import geometry
from nnqmd_server.structures import Array, Structures


@dataclass(frozen=True)
class Part:
    """What one call of a model gets.

    Parameters
    ----------
    structures : Structures
        One or several, whole.
    inputs : dict of torch.Tensor
        nequip's dictionary without the atoms' types, on the device of the model.
    """

    structures: Structures
    inputs: dict[str, torch.Tensor]

    @property
    def n_edges(self) -> int:
        """Edges of all its structures."""
        return self.inputs[AtomicDataDict.EDGE_INDEX_KEY].shape[1]


@dataclass(frozen=True)
class Batch:
    """Structures with all edges within a cutoff.

    Parameters
    ----------
    structures : Structures
        What it was made of.
    cutoff : float
        Length of the longest edges [Angstrom].
    parts : tuple of Part
        The structures again, in order, one call after another.
    """

    structures: Structures
    cutoff: float
    parts: tuple[Part, ...]


def cut_by_edges(counts: Array, limit: float) -> list[tuple[int, int]]:
    """Runs of neighbouring structures with no more edges than a limit; one that has more stays alone.

    Parameters
    ----------
    counts : Array
        Edges of each structure, shape (n_structures,).
    limit : float
        Most edges of a run.

    Returns
    -------
    list of (first, last)
        Structures ``first:last`` of each run.
    """
    runs, first, total = [], 0, 0
    for k, count in enumerate(counts.tolist()):
        if k > first and total + count > limit:
            runs.append((first, k))
            first, total = k, 0
        total += count
    return [*runs, (first, len(counts))] if len(counts) else []


def one_by_one(structures: Structures, lists: Lists) -> Batch:
    """A batch whose structures are evaluated one after another."""
    device = torch.device("cpu")
    parts = []
    for k, (edges, shifts) in enumerate(lists.edges(structures)):
        one = structures[k : k + 1]
        # Made for this call alone: they need not be copied.
        parts.append(Part(one, inputs(one, torch.from_numpy(edges), torch.from_numpy(shifts), device)))
    return Batch(structures, lists.cutoff, tuple(parts))


def together(structures: Structures, lists: Lists, device: torch.device, most_edges: float) -> Batch:
    """A batch whose structures are evaluated in as few calls as a limit allows.

    Parameters
    ----------
    structures : Structures
        The structures.
    lists : Lists
        Where their edges come from.
    device : torch.device
        Where the model runs; pairs are cut to the cutoff there.
    most_edges : float
        Most edges of a call; a structure that has more is evaluated alone.
    """
    edges, shifts, counts = edges_on_device(structures, lists, device)
    ends = np.concatenate([[0], np.cumsum(counts)])
    parts = []
    for first, last in cut_by_edges(counts, most_edges):
        part = slice(int(ends[first]), int(ends[last]))
        some = structures[first:last]
        parts.append(
            Part(some, inputs(some, edges[:, part] - int(structures.offsets[first]), shifts[part], device))
        )
    return Batch(structures, lists.cutoff, tuple(parts))


def inputs(
    structures: Structures,
    edges: Array | torch.Tensor,
    shifts: Array | torch.Tensor,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The dictionary that nequip models take, without the atoms' types, on a device.

    Parameters
    ----------
    structures : Structures
        One or several.
    edges : Array or torch.Tensor
        Centres and neighbours, atoms numbered through the structures, shape (2, n_edges).
    shifts : Array or torch.Tensor
        Cell vectors between them, shape (n_edges, 3).
    device : torch.device
        Where the model runs.
    """
    counts = np.diff(structures.offsets)
    data = {
        AtomicDataDict.POSITIONS_KEY: structures.positions,
        AtomicDataDict.EDGE_INDEX_KEY: edges,
        AtomicDataDict.CELL_KEY: structures.cells,
        AtomicDataDict.EDGE_CELL_SHIFT_KEY: shifts,
        AtomicDataDict.BATCH_KEY: np.repeat(np.arange(len(structures)), counts),
        AtomicDataDict.NUM_NODES_KEY: counts,
    }
    return geometry(data, device)


def shortened(part: Part, cutoff: float) -> Part:
    """The same part without the edges beyond a smaller cutoff."""
    data = part.inputs
    edges, shifts = data[AtomicDataDict.EDGE_INDEX_KEY], data[AtomicDataDict.EDGE_CELL_SHIFT_KEY]
    positions, cells = data[AtomicDataDict.POSITIONS_KEY], data[AtomicDataDict.CELL_KEY]
    across = torch.einsum(
        "ea,eab->eb", shifts, cells.view(-1, 3, 3)[data[AtomicDataDict.BATCH_KEY][edges[0]]]
    )
    apart = positions[edges[1]] - positions[edges[0]] + across
    near = torch.nonzero((apart * apart).sum(dim=1) <= cutoff * cutoff).squeeze(1)
    fewer = {
        AtomicDataDict.EDGE_INDEX_KEY: edges.index_select(1, near),
        AtomicDataDict.EDGE_CELL_SHIFT_KEY: shifts.index_select(0, near),
    }
    return Part(part.structures, data | fewer)


def contraction_modifiers(device: str, dtype: str, available: Sequence[str]) -> list[str]:
    """Which of nequip's modifiers a model is compiled with: the fastest tensor product that is installed.

    Not run here: there was no GPU. The names are those of nequip-allegro 0.8.3.

    Parameters
    ----------
    device : str
        "cpu" or "cuda".
    dtype : str
        "float32" or "float64"; AOTInductor has no cuEquivariance in the latter.
    available : sequence of str
        Modifiers that the model says it has.
    """
    if device != "cuda":
        return []
    wanted = []
    if dtype == "float32" and find_spec("cuequivariance_torch"):
        wanted.append("enable_CuEquivarianceContracter")
    if find_spec("triton"):
        wanted.append("enable_TritonContracter")
    return [name for name in wanted if name in available][:1]
