"""Wannier centroids as an equivariant vector read-out of Allegro's edge features."""

from collections.abc import Mapping, Sequence

import torch
from nequip.data import AtomicDataDict
from nequip.nn import GraphModuleMixin, ScalarMLPFunction, scatter, with_edge_vectors_

from nnqmd_server.networks.keys import WANNIER_CENTROID_KEY


class WannierReadout(GraphModuleMixin, torch.nn.Module):
    r"""Displacement of an atom's valence electrons from the atom.

    .. math:: v_i = \frac{1}{\sqrt{\bar N_i}} \sum_j f(x_{ij})\, \hat r_{ij}

    where :math:`x_{ij}` are the scalar edge features and :math:`f` a perceptron without bias. It
    is a sum of true vectors with invariant weights, hence equivariant under O(3); the edge
    features vanish at the cutoff, hence smooth. Atoms that carry no centroid get exact zeros.

    Parameters
    ----------
    type_names
        Names of the atom types, in the model's order.
    carriers
        Atom type -> number of electrons whose centroid it carries.
    avg_num_neighbors
        Mean number of neighbours, one number or one per type: keeps the sum of order one.
    hidden_width
        Width of the one hidden layer of ``f``.
    irreps_in
        Irreps of the fields that the modules before this one leave.
    """

    def __init__(
        self,
        type_names: Sequence[str],
        carriers: Mapping[str, float],
        avg_num_neighbors: float | Mapping[str, float],
        hidden_width: int = 32,
        irreps_in: Mapping | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(carriers) - set(type_names))
        if unknown or not carriers:
            raise ValueError(f"carriers {sorted(carriers)} must be some of the atom types {list(type_names)}")
        features = AtomicDataDict.EDGE_FEATURES_KEY
        self._init_irreps(
            irreps_in=irreps_in, required_irreps_in=[features], irreps_out={WANNIER_CENTROID_KEY: "1o"}
        )
        self.weight = ScalarMLPFunction(
            input_dim=self.irreps_in[features].num_irreps,
            output_dim=1,
            hidden_layers_depth=1,
            hidden_layers_width=hidden_width,
            nonlinearity="silu",
            bias=False,
        )
        self.register_buffer("scale", _scale_per_type(type_names, carriers, avg_num_neighbors))

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """Add ``wannier_centroid`` [Angstrom], shape (n_atoms, 3)."""
        data = with_edge_vectors_(data, with_lengths=True)
        vectors = data[AtomicDataDict.EDGE_VECTORS_KEY]
        directions = vectors / data[AtomicDataDict.EDGE_LENGTH_KEY].view(-1, 1)
        weights = self.weight(data[AtomicDataDict.EDGE_FEATURES_KEY]).to(vectors.dtype)
        centroids = scatter(
            weights * directions,
            data[AtomicDataDict.EDGE_INDEX_KEY][0],
            dim=0,
            dim_size=AtomicDataDict.num_nodes(data),
        )
        scale = torch.index_select(self.scale, 0, data[AtomicDataDict.ATOM_TYPE_KEY].view(-1))
        data[WANNIER_CENTROID_KEY] = centroids * scale.to(vectors.dtype)
        return data


def _scale_per_type(
    type_names: Sequence[str],
    carriers: Mapping[str, float],
    avg_num_neighbors: float | Mapping[str, float],
) -> torch.Tensor:
    """One factor per type, shape (n_types, 1): 1/sqrt(neighbours) for carriers, 0 for all others."""
    neighbors = (
        avg_num_neighbors
        if isinstance(avg_num_neighbors, Mapping)
        else dict.fromkeys(type_names, avg_num_neighbors)
    )
    return torch.tensor([[neighbors[t] ** -0.5 if t in carriers else 0.0] for t in type_names])
