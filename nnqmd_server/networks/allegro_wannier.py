"""Allegro with a Wannier read-out: energy, forces, stress and centroids of one network."""

from collections.abc import Mapping
from typing import Any

from allegro.model import AllegroModel
from nequip.data import AtomicDataDict
from nequip.model import model_builder
from nequip.nn import AtomwiseReduce, ForceStressOutput, GraphModuleMixin, SequentialGraphNetwork

from nnqmd_server.networks.wannier import WannierReadout


@model_builder
def AllegroWannier(
    carriers: Mapping[str, float],
    ion_charges: Mapping[str, float],
    wannier_hidden_width: int = 32,
    **allegro: Any,
) -> GraphModuleMixin:
    """Build an Allegro model that also predicts Wannier centroids.

    Parameters
    ----------
    carriers
        Atom type -> valence electrons whose centroid it carries, such as ``{"N": 8}`` for NH3.
    ion_charges
        Atom type -> charge of the ion core [e], such as ``{"N": 5, "H": 1}``. The network does not
        use it; it stands here so that a packaged model says how its centroids become dipoles.
    wannier_hidden_width
        Width of the hidden layer of the read-out.
    **allegro
        Parameters of :func:`allegro.model.AllegroModel`.
    """
    if set(ion_charges) != set(allegro["type_names"]):
        raise ValueError(f"ion_charges {sorted(ion_charges)} must name the types {allegro['type_names']}")
    # Called inside a model builder, AllegroModel gives the bare module and not a GraphModel.
    plain = AllegroModel(**allegro)
    modules: dict[str, GraphModuleMixin] = {}
    irreps: Mapping = {}
    for name, module in plain.func.named_children():
        if name == "total_energy_sum":
            readout = WannierReadout(
                type_names=allegro["type_names"],
                carriers=carriers,
                avg_num_neighbors=allegro["avg_num_neighbors"],
                hidden_width=wannier_hidden_width,
                irreps_in=irreps,
            )
            modules["wannier_readout"] = readout
            # Rebuilt, because a module learns the fields before it when it is made.
            modules[name] = AtomwiseReduce(
                irreps_in=readout.irreps_out,
                reduce="sum",
                field=AtomicDataDict.PER_ATOM_ENERGY_KEY,
                out_field=AtomicDataDict.TOTAL_ENERGY_KEY,
            )
        else:
            modules[name] = module
            irreps = module.irreps_out
    return ForceStressOutput(SequentialGraphNetwork(modules), allegro.get("do_derivatives", True))
