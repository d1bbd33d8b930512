"""From a model file of any form to something that takes and returns nequip's dictionary of tensors."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from nequip.model.inference_models import load_aotinductor_model, load_compiled_model
from nequip.utils.global_state import set_global_state

from nnqmd_server.errors import ModelError
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.compiled import compiled_model
from nnqmd_server.potentials.legacy import Deployed
from nnqmd_server.potentials.package import compiled_texts, form_of, with_precision
from nnqmd_server.potentials.saved import saved_model

Network = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

_settled: dict[str, tuple[str, str]] = {}


def load_network(
    path: Path, device: str, compiled: bool = True, precision: str | None = None
) -> tuple[Network, Card, str]:
    """Load a model; a model is code, and this executes it.

    Parameters
    ----------
    path : Path
        A model file of any form that :mod:`nnqmd_server.potentials.package` knows.
    device : str
        "cpu" or "cuda".
    compiled : bool
        Compile packages and checkpoints for this machine (cached); eager when there is no compiler.
    precision : str, optional
        "float32", "float64" or, on a GPU, "tf32"; as it was trained unless given.

    Returns
    -------
    network : callable
        Takes and returns nequip's dictionary of tensors.
    card : Card
        What the model says of itself, in this precision.
    form : str
        How it runs, in words.

    Raises
    ------
    ModelError
        The file is missing, is not a model, cannot be loaded, or cannot have this precision.
    """
    card, form = with_precision(path, precision), form_of(path)
    _check_tf32(card, device)
    set_global_state(allow_tf32=card.dtype == "tf32")
    if form == "torchscript":
        return Deployed(path, card, device), card, f"TorchScript on {device}"
    if form == "compiled":
        return _given(path, card, device), card, f"compiled for {device}, as given"
    network, how = _ready(path, card, device) if compiled else (None, "eager")
    if network is None:
        network = saved_model(path, card).to(device)
        _check_claims(path, card, getattr(network, "metadata", {}))
    return network, card, f"{how}, {card.dtype}" if precision else how


def _ready(path: Path, card: Card, device: str) -> tuple[Network | None, str]:
    file, how = compiled_model(path, card, device)
    if file is None:
        return None, how
    try:
        network, claims = load_compiled_model(str(file), device)
    except Exception as error:  # noqa: BLE001 - what AOTInductor raises for a foreign file is not documented
        return None, f"eager: {file} cannot be loaded ({error!r:.200}); removing it may help"
    _check_claims(path, card, claims)
    return network, how


def _given(path: Path, card: Card, device: str) -> Network:
    check_hardware(path, compiled_texts(path), device)
    try:
        network, claims = load_aotinductor_model(str(path), device)
    except Exception as error:  # see _ready
        raise ModelError(
            f"{path} cannot be loaded: {error.__class__.__name__}: {str(error)[:500]}.",
            "Give the package instead: it is compiled on the machine where it runs.",
        ) from error
    _check_claims(path, card, claims)
    return network.eval()


def check_hardware(path: Path, texts: Mapping[str, str], device: str) -> None:
    """Refuse a compiled model that was made for another kind of machine; it would crash.

    Parameters
    ----------
    path : Path
        The file.
    texts : mapping of str to str
        Its metadata.
    device : str
        "cpu" or "cuda".

    Raises
    ------
    ModelError
        It was.
    """
    here = platform.machine()
    made = texts.get("AOTI_MACHINE") or here
    needs, has = texts.get("AOTI_DEVICE_KEY", device), device
    if made != here:
        needs, has = made, here
    elif needs == device == "cpu":
        levels = ("DEFAULT", "AVX2", "AVX512")
        has = torch.backends.cpu.get_cpu_capability()
        wanted = [level for level in levels if level in texts.get("AOTI_CPU_ISA", "").upper()]
        needs = wanted[-1] if wanted else has
        if has in levels and needs in levels and levels.index(needs) <= levels.index(has):
            return
    elif needs == device == "cuda":
        has = "compute capability {}{}".format(*torch.cuda.get_device_capability())
        needs = f"compute capability {texts.get('AOTI_COMPUTE_CAPABILITY') or has.split()[-1]}"
    if needs != has:
        raise ModelError(
            f"{path} was compiled for {needs}, and this is {has}.",
            "Give the package instead: it is compiled on the machine where it runs.",
        )


def _check_tf32(card: Card, device: str) -> None:
    """TF32 is a setting of the whole process: what one model is promised, another one must not undo."""
    if device == "cpu" or card.dtype == "float64":
        if card.dtype == "tf32":
            raise ModelError("TF32 is a precision of NVIDIA GPUs.", "Use float32 or float64 on a CPU.")
        return
    dtype, name = _settled.setdefault(device, (card.dtype, card.name))
    if dtype != card.dtype:
        raise ModelError(
            f"{name} runs in {dtype} and {card.name} in {card.dtype}: they cannot share a worker.",
            "Give both the same precision, or serve them from two pools.",
        )


def _check_claims(path: Path, card: Card, claims: Mapping[str, object]) -> None:
    """Compare what the network says of itself with what is written beside it in the file.

    Elements in another order, or another cutoff, would give wrong forces without any sign.
    """
    types = claims.get("type_names", card.elements)
    inside = {
        "elements": tuple(types.split() if isinstance(types, str) else types),
        "cutoff": float(claims.get("r_max", card.cutoff)),
        "dtype": str(claims.get("model_dtype", card.dtype)),
    }
    said = replace(card, dtype="float32") if card.dtype == "tf32" else card
    for what, found in inside.items():
        if found != getattr(said, what):
            raise ModelError(
                f"{path} is not what it claims: it says {what} {getattr(said, what)}, its network {found}.",
                "Package it again, or get it from where you trust it; clear the cache of compiled models.",
            )
