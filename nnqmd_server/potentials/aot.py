"""Compile a model for the machine at hand: ``python -m nnqmd_server.potentials.aot``, a process of its own.

nequip-compile does the work. What it is given here that it cannot find by itself: the network in another
precision, structures to compile a checkpoint with (it would look for the training data), and the parts of
our card that its metadata have no place for.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nequip.model.modify_utils import get_all_modifiers
from nequip.model.saved_models.package import data_dict_from_package
from nequip.scripts import compile as nequip_compile

from nnqmd_server.potentials.batch import contraction_modifiers
from nnqmd_server.potentials.package import CARD_KEY, PACKAGE_SUFFIX, read_card
from nnqmd_server.potentials.saved import example, saved_model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--plain", action="store_true", help="with nequip's own tensor product")
    options = parser.parse_args()
    card = replace(read_card(options.model), dtype=options.precision)
    model = saved_model(options.model, card)
    said = {k: getattr(card, k) for k in ("carriers", "ion_charges", "strictly_local")}
    model._metadata[CARD_KEY] = json.dumps(said)
    packaged = options.model.name.endswith(PACKAGE_SUFFIX)
    data = data_dict_from_package(str(options.model)) if packaged else example(card)

    def load(*_: object, **__: object) -> tuple[torch.nn.Module, dict[str, Any]]:
        return model, data

    nequip_compile.load_saved_model = load
    words = [str(options.model), str(options.output), "--mode", "aotinductor", "--device", options.device]
    words += ["--target", "nnqmd_batch" if "wannier_centroid" in card.properties else "batch"]
    words += ["--tf32"] if options.precision == "tf32" else []
    modifiers = contraction_modifiers(options.device, model.metadata["model_dtype"], get_all_modifiers(model))
    words += ["--modifiers", *modifiers] if modifiers and not options.plain else []
    nequip_compile.main(words)


if __name__ == "__main__":
    main()
