"""Packages and checkpoints as torch modules, in the precision that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from nequip.data import AtomicDataDict, compute_neighborlist_, from_dict
from nequip.model.modify_utils import only_apply_persistent_modifiers
from nequip.model.saved_models.load_utils import load_saved_model
from nequip.utils.global_state import set_global_state

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.package import PACKAGE_SUFFIX, form_of, model_config


def saved_model(path: Path, card: Card) -> torch.nn.Module:
    """Load a package or a checkpoint; this executes what it holds.

    A checkpoint is built with the nequip of this installation and has the averaged weights where there are
    any.

    Parameters
    ----------
    path : Path
        The file.
    card : Card
        Its card. If its precision is not the one of the file, the network is built again from the
        configuration, in that precision, and gets the same weights: constants are then exact to the new one.

    Raises
    ------
    ModelError
        It cannot be loaded.
    """
    form = form_of(path)  # a checkpoint is a pickle: whatever is not plain has been refused here
    if (form == "package") != path.name.endswith(PACKAGE_SUFFIX):
        raise ModelError(
            f"{path} is a {form}, and its name says something else.",
            f"Rename it: packages end in {PACKAGE_SUFFIX}, checkpoints in .ckpt.",
        )
    set_global_state(allow_tf32=card.dtype == "tf32")
    try:
        model = load_saved_model(path).eval()
        config = model_config(path)
        wanted = "float64" if card.dtype == "float64" else "float32"
        return model if config["model_dtype"] == wanted else _rebuilt(model, config, wanted)
    except Exception as error:  # what a file holds is code, and anything may come of it
        raise ModelError(
            f"{path} cannot be loaded: {error.__class__.__name__}: {error}.",
            "Package it again with the nequip of this installation."
            if form == "package"
            else "Package it where it was trained: nequip-package build FILE.ckpt FILE.nequip.zip.",
        ) from error


def _rebuilt(model: torch.nn.Module, config: dict[str, Any], dtype: str) -> torch.nn.Module:
    with only_apply_persistent_modifiers(persistent_only=True):
        fresh = hydra.utils.instantiate({**config, "model_dtype": dtype}, _recursive_=False)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


def example(card: Card, spacing: float = 2.0, side: int = 4) -> AtomicDataDict.Type:
    """A made-up crystal with all elements of a model, to compile it with: shapes matter, not values.

    Parameters
    ----------
    card : Card
        Of the model.
    spacing : float
        Distance of the sites [Angstrom].
    side : int
        Sites along each direction.
    """
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * spacing
    positions = grid + np.random.default_rng(1).normal(scale=0.05 * spacing, size=grid.shape)
    data = from_dict(
        {
            AtomicDataDict.POSITIONS_KEY: positions,
            AtomicDataDict.CELL_KEY: np.eye(3) * spacing * side,
            AtomicDataDict.PBC_KEY: np.array([True] * 3),
            AtomicDataDict.ATOM_TYPE_KEY: np.arange(len(grid)) % len(card.elements),
        }
    )
    return compute_neighborlist_(AtomicDataDict.with_batch_(data), card.cutoff)
