"""Born effective charges from the same evaluation as energy and forces.

One pass through the network gives energy and centroids; four passes back give forces, stress and the slopes
of the three components of the total dipole. It needs the network as a graph that can be differentiated, so
the model runs as it was packaged and is not compiled.
"""

from __future__ import annotations

import torch
from nequip.data import AtomicDataDict

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.base import BORN, Card

CENTROID = "wannier_centroid"


class WithBorn(torch.nn.Module):
    """A network that also gives Born charges: the field ``born_charges`` [e], shape (n_atoms, 3, 3).

    ``born_charges[i, a, b]`` is dM_a/dR_ib.

    Parameters
    ----------
    network : torch.nn.Module
        nequip's graph model with a Wannier read-out, not compiled.
    card : Card
        Its card: elements in the order of its types, carriers and ion charges.

    Raises
    ------
    ModelError
        The network has no Wannier read-out.
    """

    def __init__(self, network: torch.nn.Module, card: Card) -> None:
        super().__init__()
        if CENTROID not in card.properties or not card.carriers or not card.ion_charges:
            raise ModelError(
                f"The model {card.name} has no Wannier read-out, so no Born charges.",
                "Train one with the section `wannier`, or leave out born.",
            )
        self.network = network
        self.metadata = dict(getattr(network, "metadata", {}))
        electrons = [card.carriers.get(symbol, 0.0) for symbol in card.elements]
        cores = [card.ion_charges.get(symbol, 0.0) for symbol in card.elements]
        self.register_buffer("electrons", torch.tensor(electrons, dtype=torch.float64))
        self.register_buffer("cores", torch.tensor(cores, dtype=torch.float64))

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Energies, forces, stress, centroids and Born charges of a batch."""
        with _keep_graph(self.network):
            positions = data[AtomicDataDict.POSITIONS_KEY].detach().requires_grad_(True)
            out = self.network({**data, AtomicDataDict.POSITIONS_KEY: positions})
        types = data[AtomicDataDict.ATOM_TYPE_KEY].view(-1)
        electrons = self.electrons[types]
        clouds = (electrons[:, None] * out[CENTROID].double()).sum(dim=0)
        # Structures of a batch do not see each other: the sum over all of them has each one's own slopes.
        slopes = [
            torch.autograd.grad(clouds[a], positions, retain_graph=a < 2, allow_unused=True)[0]
            for a in range(3)
        ]
        along = torch.stack([torch.zeros_like(positions) if s is None else s for s in slopes], dim=1)
        charge = self.cores[types] - electrons
        eye = torch.eye(3, dtype=charge.dtype, device=charge.device)
        out[BORN] = charge[:, None, None] * eye - along
        return {key: value.detach() for key, value in out.items()}


class _keep_graph:  # noqa: N801 - reads as the verb that it is
    """nequip frees what lies behind the forces unless it is training; nothing here differs otherwise."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._modules = [m for m in network.modules() if type(m).__name__ == "ForceStressOutput"]

    def __enter__(self) -> None:
        self._before = [m.training for m in self._modules]
        for module in self._modules:
            module.training = True  # of this module alone, not of what it holds

    def __exit__(self, *_: object) -> None:
        for module, training in zip(self._modules, self._before, strict=True):
            module.training = training
