"""What stands in a packaged model (``.nequip.zip``), read without executing any of it."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.base import Card

PACKAGE_SUFFIX = ".nequip.zip"

_MAX_TEXT = 1 << 20

# Allegro passes no messages between atoms; other nequip models do.
_STRICTLY_LOCAL = {"allegro.model.AllegroModel", "nnqmd_server.networks.allegro_wannier.AllegroWannier"}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _member(archive: zipfile.ZipFile, ending: str) -> str | None:
    return next((name for name in archive.namelist() if name.endswith(ending)), None)


def read_card(path: str | Path) -> Card:
    """Read what a packaged model says of itself; nothing in it is executed.

    Raises
    ------
    ModelError
        The file is missing or is not a packaged model.
    """
    import yaml  # here: a worker of a foreign interpreter may lack it, and reads no packages

    path = Path(path)
    wanted = "Give a packaged model (.nequip.zip), as `nnqmd train` or `nequip-package build` writes it."
    if not path.is_file():
        raise ModelError(f"There is no model file {path}.", wanted)
    try:
        with zipfile.ZipFile(path) as archive:
            config_name = _member(archive, "/model/config.yaml")
            metadata_name = _member(archive, "/model/package_metadata.txt")
            if config_name is None or metadata_name is None:
                raise ModelError(f"{path} is a zip file but not a packaged model.", wanted)
            for name in (config_name, metadata_name):
                if archive.getinfo(name).file_size > _MAX_TEXT:
                    raise ModelError(f"{path} is not a model: its {name} is too long.", wanted)
            config = yaml.safe_load(archive.read(config_name))
            metadata = yaml.safe_load(archive.read(metadata_name))
    except (OSError, zipfile.BadZipFile, zlib.error, RecursionError, yaml.YAMLError) as error:
        raise ModelError(f"{path} is not a model: {error}.", wanted) from error
    try:
        model = config["training_module"]["model"]
        elements = tuple(metadata["atom_types"][k] for k in sorted(metadata["atom_types"]))
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
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} lacks an entry of a packaged model: {error}.", wanted) from error
