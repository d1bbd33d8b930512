"""What stands in a model file, read without executing any of it, and without torch.

All forms are zip files; which of them a file is, its contents tell:

- a package (``.nequip.zip``) of ``nequip-package``: configuration and metadata as text;
- a checkpoint (``.ckpt``) of ``nequip-train``: a pickle, of which only the plain data are read;
- a compiled model (``.nequip.pt2``) of ``nequip-compile``: metadata as JSON;
- TorchScript (``.pth``) of ``nequip-deploy``, nequip 0.5 and 0.6: metadata as text.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.archives import PLAIN, WANTED, names_in, opened, plain_data, text_of
from nnqmd_server.potentials.base import Card

PACKAGE_SUFFIX = ".nequip.zip"

FORMS = {
    "package": "packaged model (.nequip.zip)",
    "checkpoint": "checkpoint of nequip-train (.ckpt)",
    "compiled": "compiled by AOTInductor (.nequip.pt2)",
    "torchscript": "TorchScript of nequip-deploy (.pth)",
}
"""The forms of a model file, in words."""

PRECISIONS = ("float32", "float64", "tf32")
"""What a network can compute in; TF32 is float32 with products of 10 bits, on NVIDIA GPUs."""

CARD_KEY = "nnqmd_card"
"""Under which a model that we compiled carries what nequip's metadata have no place for."""

# Allegro passes no messages between atoms; other nequip models do.
_STRICTLY_LOCAL = {"allegro.model.AllegroModel", "nnqmd_server.networks.allegro_wannier.AllegroWannier"}

_TARGETED = {"pos", "edge_index", "atom_types", "cell", "edge_cell_shift", "batch", "num_atoms"}
"""What we hand to a compiled model."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def form_of(path: str | Path) -> str:
    """Which of :data:`FORMS` a file has, by its contents.

    Raises
    ------
    ModelError
        The file is missing, or has none of them.
    """
    path = Path(path)
    with opened(path) as archive:
        return _form(path, archive)


def read_card(path: str | Path) -> Card:
    """Read what a model file says of itself; nothing in it is executed.

    Raises
    ------
    ModelError
        The file is missing or is not a model.
    """
    path = Path(path)
    with opened(path) as archive:
        form = _form(path, archive)
        try:
            return _READERS[form](path, archive)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = FORMS[form].partition(" (")[0]
            raise ModelError(f"{path} lacks an entry of a {what}: {error}.", WANTED) from error


def with_precision(path: str | Path, precision: str | None) -> Card:
    """The card of a model that is to run in another precision than it was trained in.

    Parameters
    ----------
    path : str or Path
        The model file.
    precision : str or None
        One of :data:`PRECISIONS`; None leaves it as it is.

    Raises
    ------
    ModelError
        See :func:`read_card`; or the precision is unknown, or fixed in a file of this form.
    """
    card = read_card(path)
    if precision is None or precision == card.dtype:
        return card
    if precision not in PRECISIONS:
        raise ModelError(f"There is no precision {precision!r}.", f"Choose one of {', '.join(PRECISIONS)}.")
    form = form_of(path)
    if form not in {"package", "checkpoint"}:
        raise ModelError(
            f"{path} is {FORMS[form]}: its precision is {card.dtype} and cannot be changed.",
            "Give the package or the checkpoint that it was made from.",
        )
    return replace(card, dtype=precision)


def model_config(path: str | Path) -> dict[str, Any]:
    """How the network of a package or checkpoint is built: nequip's ``training_module.model``.

    Raises
    ------
    ModelError
        See :func:`read_card`.
    """
    path = Path(path)
    with opened(path) as archive:
        if _form(path, archive) == "checkpoint":
            return _checkpoint_config(path, archive)
        return _package_texts(path, archive)[0]["training_module"]["model"]


def torchscript_texts(path: str | Path) -> dict[str, str]:
    """The metadata of a deployed model: ``r_max``, ``type_names``, ``config`` and others.

    Raises
    ------
    ModelError
        See :func:`read_card`.
    """
    with opened(Path(path)) as archive:
        return _extras(archive)


def compiled_texts(path: str | Path) -> dict[str, str]:
    """The metadata of a compiled model: nequip's and those of AOTInductor.

    Raises
    ------
    ModelError
        See :func:`read_card`.
    """
    with opened(Path(path)) as archive:
        return _metadata(archive)


def _form(path: Path, archive: zipfile.ZipFile) -> str:
    # Every form stands in one folder, whose name is arbitrary.
    inside = {name.partition("/")[2] for name in archive.namelist()}
    if "data/aotinductor" in {"/".join(name.split("/")[:2]) for name in inside}:
        return "compiled"
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        if {"extra/r_max", "extra/type_names"} <= inside:
            return "torchscript"
        raise ModelError(
            f"{path} is TorchScript, but not of nequip-deploy.",
            "A model of another program (DeePMD, MACE) is served through an adapter, see docs/potentials.md.",
        )
    if _member(archive, "model/config.yaml") and _member(archive, "model/package_metadata.txt"):
        return "package"
    if "data.pkl" in inside:
        found = names_in(path, archive)
        if found - PLAIN:
            names = ", ".join(sorted(found - PLAIN)[:5])
            raise ModelError(
                f"{path} is a pickle that would call {names} when it is loaded; it was not loaded.", WANTED
            )
        if isinstance(plain_data(path, archive), Mapping):
            return "checkpoint"
    raise ModelError(f"{path} is a zip file but not a packaged model.", WANTED)


def _member(archive: zipfile.ZipFile, ending: str) -> str | None:
    return next((name for name in archive.namelist() if name.endswith(f"/{ending}")), None)


# --- packages ---


def _package_texts(path: Path, archive: zipfile.ZipFile) -> tuple[Any, Any]:
    import yaml  # here: a worker of a foreign interpreter may lack it, and reads no packages

    try:
        return tuple(
            yaml.safe_load(text_of(archive, _member(archive, name) or ""))
            for name in ("model/config.yaml", "model/package_metadata.txt")
        )
    except yaml.YAMLError as error:
        raise ModelError(f"{path} is not a model: {error}.", WANTED) from error


def _of_package(path: Path, archive: zipfile.ZipFile) -> Card:
    config, metadata = _package_texts(path, archive)
    elements = tuple(metadata["atom_types"][k] for k in sorted(metadata["atom_types"]))
    return _of_config(path, config["training_module"]["model"], elements)


def _of_config(path: Path, model: Mapping[str, Any], elements: tuple[str, ...]) -> Card:
    carriers = model.get("carriers")
    return Card(
        name=path.name,
        sha256=file_hash(path),
        elements=elements,
        cutoff=float(model["r_max"]),
        dtype=str(model["model_dtype"]),
        properties=("wannier_centroid", "dipole") if carriers else (),
        ion_charges=model.get("ion_charges") if carriers else None,
        carriers=carriers,
        strictly_local=model.get("_target_") in _STRICTLY_LOCAL,
    )


# --- checkpoints ---


def _checkpoint_config(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    content = plain_data(path, archive)
    try:
        return content["hyper_parameters"]["info_dict"]["training_module"]["model"]
    except (KeyError, TypeError) as error:
        old = "config" in content or "model_builders" in content
        raise ModelError(
            f"{path} is not a checkpoint of nequip 0.7 or newer: it lacks {error}.",
            "nequip-deploy of the version that made it gives a .pth that can be used." if old else WANTED,
        ) from error


def _of_checkpoint(path: Path, archive: zipfile.ZipFile) -> Card:
    model = _checkpoint_config(path, archive)
    if "type_names" not in model:
        raise ModelError(
            f"{path} continues the training of another model file and cannot be used without it.",
            "Package it where it was trained: nequip-package build FILE.ckpt FILE.nequip.zip.",
        )
    return _of_config(path, model, tuple(model["type_names"]))


# --- compiled models ---


def _metadata(archive: zipfile.ZipFile) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in archive.namelist():
        if "/data/aotinductor/" in name and name.endswith("_metadata.json"):
            found |= json.loads(text_of(archive, name))
    return found


def _of_compiled(path: Path, archive: zipfile.ZipFile) -> Card:
    texts = _metadata(archive)
    if "type_names" not in texts:
        raise ModelError(
            f"{path} was compiled by AOTInductor, but not by nequip-compile.",
            "Compile it with nequip-compile --mode aotinductor --target batch.",
        )
    needs = set(texts.get("nequip_aoti_inputs", "").split())
    gives = texts.get("nequip_aoti_outputs", "").split()
    if needs != _TARGETED or not {"total_energy", "forces", "stress"} <= set(gives):
        raise ModelError(
            f"{path} was not compiled for batches: it takes {' '.join(sorted(needs)) or 'unknown input'}.",
            "Compile it with --target batch, or give the package: it is compiled where it runs.",
        )
    said = json.loads(texts.get(CARD_KEY, "{}"))
    carriers = said.get("carriers") if "wannier_centroid" in gives else None
    properties = ("wannier_centroid",) if "wannier_centroid" in gives else ()
    return Card(
        name=path.name,
        sha256=file_hash(path),
        elements=tuple(texts["type_names"].split()),
        cutoff=float(texts["r_max"]),
        dtype="tf32" if texts.get("allow_tf32") == "1" else str(texts["model_dtype"]),
        properties=(*properties, "dipole") if carriers else properties,
        ion_charges=said.get("ion_charges") if carriers else None,
        carriers=carriers,
        strictly_local=bool(said.get("strictly_local", False)),
    )


# --- TorchScript ---


def _extras(archive: zipfile.ZipFile) -> dict[str, str]:
    found = {}
    for name in archive.namelist():
        folder, _, key = name.partition("/")[2].rpartition("/")
        if folder == "extra":
            found[key] = text_of(archive, name).decode("utf-8")
    return found


def _of_torchscript(path: Path, archive: zipfile.ZipFile) -> Card:
    texts = _extras(archive)
    if "n_species" not in texts:
        raise ModelError(
            f"{path} is TorchScript of nequip 0.7 or newer, which is not supported.",
            "Give the package or the checkpoint that it was made from.",
        )
    return Card(
        name=path.name,
        sha256=file_hash(path),
        elements=tuple(texts["type_names"].split()),
        cutoff=float(texts["r_max"]),
        # nequip 0.5 did not say it, and had float32 unless told otherwise.
        dtype=texts.get("model_dtype") or texts.get("default_dtype") or "float32",
        strictly_local="allegro.model" in texts.get("config", ""),
    )


_READERS = {
    "package": _of_package,
    "checkpoint": _of_checkpoint,
    "compiled": _of_compiled,
    "torchscript": _of_torchscript,
}
