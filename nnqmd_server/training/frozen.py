"""Trainings that begin with a trained model: all of it goes on, or the read-out alone is trained."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from nequip.model.saved_models.load_utils import load_saved_model
from nequip.utils.global_state import set_global_state

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.package import PACKAGE_SUFFIX
from nnqmd_server.training.sam import EMASAMLightningModule

READOUT = "wannier_readout"


class StartedModule(EMASAMLightningModule):
    """Begins with the weights of a trained model; a read-out that it has not begins as ever.

    Parameters
    ----------
    backbone : str
        File that `save_backbone` wrote; its network must have the same sizes.
    """

    def __init__(self, backbone: str, **kwargs: Any) -> None:
        self._backbone = backbone
        super().__init__(**kwargs)

    def _build_model(self, model_config: dict[str, Any]) -> torch.nn.Module:
        # nequip's place for a say in how the model is built; the moving average is made of it afterwards
        model = super()._build_model(model_config)
        weights = torch.load(self._backbone, map_location="cpu", weights_only=True)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or [name for name in missing if READOUT not in name]:
            raise ValueError(f"the trained model does not fit the network: {unexpected or missing}")
        return model


class FrozenBackboneModule(StartedModule):
    """Trains the read-out alone; energy and forces are those of the backbone, to the last bit."""

    def _build_model(self, model_config: dict[str, Any]) -> torch.nn.Module:
        model = super()._build_model(model_config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(READOUT in name)
        return model


STATISTICS = ("avg_num_neighbors", "per_type_energy_shifts", "per_type_energy_scales")
"""What the backbone took from its own data; not all of it is among its weights."""


def save_backbone(model: Path, target: Path, readout: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the weights of a trained model to a file; a Wannier read-out it may have if ``readout``.

    Returns
    -------
    description : dict
        What the model says of itself: cutoff, elements, precision.
    statistics : dict
        The statistics of its data that it was built with, under the names of Allegro's parameters.

    Raises
    ------
    ModelError
        It cannot be loaded.
    """
    set_global_state()  # nequip builds nothing without
    try:
        network = load_saved_model(model)
        settings = _settings(model)
        statistics = {name: settings[name] for name in STATISTICS}
    except Exception as error:  # a model is code, and anything may come of it
        raise ModelError(
            f"The trained model {model} cannot be loaded: {error.__class__.__name__}: {error}.",
            "Give a packaged model (.nequip.zip) or a checkpoint of nequip.",
        ) from error
    weights = {name: value for name, value in network.state_dict().items() if readout or READOUT not in name}
    torch.save(weights, target)
    return dict(network.metadata), statistics


def _settings(model: Path) -> dict[str, Any]:
    """What the model was built with."""
    if not model.name.endswith(PACKAGE_SUFFIX):
        return torch.load(model, map_location="cpu", weights_only=False)["hyper_parameters"]["model"]
    with zipfile.ZipFile(model) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/model/config.yaml"))
        return yaml.safe_load(archive.read(name))["training_module"]["model"]
