"""Models deployed by nequip 0.5 and 0.6 (``.pth``), such as those of Allegro-Legato, in TorchScript.

They take float32 positions (0.6: what their default was), types of shape (n_atoms, 1), and many have no
stress, since they were trained with ForceOutput. So an Allegro model is used as LAMMPS uses it: neighbours
across a cell's faces become *ghost* atoms, which stand where they are seen and have no edges of their own.
Then the virial is the sum of r_k f_k over all atoms and ghosts, and the force on an atom is the sum over it
and its ghosts: W_ab = sum_k r_ka f_kb, F_i = sum_{k of i} f_k. The energies of ghosts are left out.
This is exact because Allegro is strictly local (Musaelian et al., Nat. Commun. 14, 579 (2023), and the
``pair_allegro`` of its authors); a model that passes messages must bring its own virial.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.package import torchscript_texts

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

Tensors = dict[str, torch.Tensor]


class Deployed:
    """A deployed model behind the names and units of today's nequip.

    Parameters
    ----------
    path : Path
        The ``.pth`` file; TorchScript in it is executed.
    card : Card
        Its card.
    device : str
        "cpu" or "cuda".

    Raises
    ------
    ModelError
        It cannot be loaded, or has no way to a virial.
    """

    def __init__(self, path: Path, card: Card, device: str) -> None:
        texts = torchscript_texts(path)
        self._ghosts = card.strictly_local
        self._cutoff = card.cutoff
        if not self._ghosts and "Stress" not in texts.get("config", ""):
            raise ModelError(
                f"{path} passes messages between atoms and has no stress output, so it has no virial.",
                "Deploy it again with StressForceOutput among its model_builders; its weights stay the same.",
            )
        try:
            # No fused kernels: they would be made anew for new numbers of edges, in the middle of a run.
            torch.jit.set_fusion_strategy([])
            self._dtype = _DTYPES[texts.get("default_dtype") or "float32"]
            model = torch.jit.load(str(path), map_location=device).eval()
            # Freezing is only for modules that are not frozen already.
            self._model = torch.jit.freeze(model) if hasattr(model, "training") else model
        except (RuntimeError, KeyError, ValueError) as error:
            raise ModelError(
                f"{path} cannot be loaded: {error.__class__.__name__}: {str(error)[:500]}.",
                "The file is damaged, or this torch cannot read it: deploy it again.",
            ) from error

    def __call__(self, data: Tensors) -> Tensors:
        """Energies, forces and stress of a batch.

        Parameters
        ----------
        data : dict of str to Tensor
            See :func:`nnqmd_server.potentials.tensors.model_input`.

        Returns
        -------
        dict of str to Tensor
            ``total_energy`` [eV] (B, 1), ``atomic_energy`` [eV] (N, 1), ``forces`` [eV/Angstrom] (N, 3) and
            ``stress`` [eV/Angstrom^3] (B, 3, 3), float64.
        """
        data = _centred(data)
        energies, forces, virial = self._with_ghosts(data) if self._ghosts else self._with_cells(data)
        total = virial.new_zeros(len(data["cell"]), 1).index_add_(0, data["batch"], energies)
        volume = torch.linalg.det(data["cell"]).abs()
        return {
            "total_energy": total,
            "atomic_energy": energies,
            "forces": forces,
            "stress": -virial / volume[:, None, None],
        }

    def _run(self, data: Tensors) -> Tensors:
        narrow = {k: v.to(self._dtype) if v.is_floating_point() else v for k, v in data.items()}
        with _default_dtype(self._dtype):
            return self._model(narrow)

    def _with_cells(self, data: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        names = ("pos", "edge_index", "edge_cell_shift", "cell", "batch")
        counts = data["num_atoms"]
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # nequip 0.6 reads it
        types = data["atom_types"][:, None]
        out = self._run({k: data[k] for k in names} | {"atom_types": types, "ptr": ptr})
        virial = out["virial"].reshape(-1, 3, 3)
        return tuple(
            x.detach().double() for x in (out["atomic_energy"].reshape(-1, 1), out["forces"], virial)
        )

    def _with_ghosts(self, data: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n = len(data["pos"])
        edges, owners, shifts = _ghosts(data["edge_index"], data["edge_cell_shift"], n)
        all_owners = torch.cat([torch.arange(n, device=owners.device), owners])
        structure = data["batch"][all_owners]
        positions = data["pos"][all_owners]
        positions[n:] += torch.einsum("gi,gij->gj", shifts, data["cell"][structure[n:]])
        types = data["atom_types"][all_owners][:, None]
        own = len(positions)
        if not edges.shape[1]:
            positions, edges, types = self._with_a_stray_pair(positions, types)
        out = self._run({"pos": positions, "edge_index": edges, "atom_types": types})
        positions, forces = positions[:own], out["forces"].detach().double()[:own]
        each = positions[:, :, None] * forces[:, None, :]
        virial = each.new_zeros(len(data["cell"]), 3, 3).index_add_(0, structure, each)
        folded = forces.new_zeros(n, 3).index_add_(0, all_owners, forces)
        energies = out["atomic_energy"].detach().double().reshape(-1, 1)[:n]
        # No torque on the whole: what is not symmetric is round-off.
        return energies, folded, (virial + virial.mT) / 2

    def _with_a_stray_pair(
        self, positions: torch.Tensor, types: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Atoms without any edge, and two more with one, which nobody looks at: these models need one."""
        far = positions.new_tensor([[0.0, 0.0, 0.0], [self._cutoff / 2, 0.0, 0.0]])
        n = len(positions)
        edges = torch.tensor([[n], [n + 1]], device=positions.device)
        return torch.cat([positions, far]), edges, torch.cat([types, types.new_zeros(2, 1)])


def _centred(data: Tensors) -> Tensors:
    """The same batch with every atom moved by cell vectors to near the origin, where float32 is finest."""
    pos, cell, batch = data["pos"], data["cell"], data["batch"]
    count = data["num_atoms"].clamp(min=1)[:, None]
    middle = torch.zeros_like(cell[:, 0]).index_add_(0, batch, pos) / count
    pos = pos - middle[batch]
    turns = torch.einsum("ni,nij->nj", pos, torch.linalg.inv(cell)[batch]).round()
    i, j = data["edge_index"]
    return data | {
        "pos": pos - torch.einsum("ni,nij->nj", turns, cell[batch]),
        "edge_cell_shift": data["edge_cell_shift"] + turns[j] - turns[i],
    }


def _ghosts(
    edges: torch.Tensor, shifts: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Edges that lead to ghosts where they crossed a cell's face, and whose ghosts these are, and where."""
    whole = shifts.round().long()
    across = whole.any(dim=1)
    if not across.any():
        return edges, edges.new_empty(0), shifts.new_empty(0, 3)
    seen, far = edges[1][across], whole[across]
    reach = int(far.abs().max())
    base = 2 * reach + 1
    # One number for an atom and its image: sorting numbers is many times faster than sorting rows.
    keys = seen
    for axis in range(3):
        keys = keys * base + far[:, axis] + reach
    found, place = torch.unique(keys, return_inverse=True)
    images = []
    for _ in range(3):
        images.append(found % base - reach)
        found = found // base
    edges = edges.clone()
    edges[1, across] = n + place
    return edges, found, torch.stack(images[::-1], dim=1).to(shifts.dtype)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # TorchScript reads it while it runs, and nequip of today has set it to float64.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
