"""Any model of TorchSim as a potential: ``torchsim:MODULE:MAKER[,key=value]...``.

TorchSim has one interface, ``ModelInterface``, to MACE, SevenNet, ORB, MatterSim, metatomic and others, which
takes structures of any sizes in one batch. MAKER is the class of the model, or a function that returns one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch_sim.state import SimState

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.foreign import NO_VIRIAL, find, make, shaped, take
from nnqmd_server.potentials.sources import Foreign, identity
from nnqmd_server.structures import Results, Structures


class TorchSimModel:
    """A model of TorchSim.

    Parameters
    ----------
    model : torch_sim.models.interface.ModelInterface
        What computes, on its own device and in its own precision.
    card : Card
        Its name, hash and precision.
    stress : str
        "required", or "none" for a virial of zero.
    periodic : bool
        Whether the structures repeat. If not, the virial is made from the forces.
    """

    def __init__(self, model: Any, card: Card, stress: str = "required", periodic: bool = True) -> None:
        self.card = card
        self.form = f"TorchSim, {type(model).__name__}, {card.dtype} on {model.device}"
        self._model = model
        self._stress = stress
        self._periodic = periodic
        self.together = torch.device(model.device).type != "cpu"
        if not model.compute_forces:
            raise ModelError(f"{card.name} computes no forces.", "Make it with compute_forces=True.")
        if not periodic:
            self.form += ", not periodic"
        elif stress == "none":
            self.form += f", {NO_VIRIAL}"
        elif not model.compute_stress:
            raise ModelError(
                f"{card.name} computes no stress, which i-PI's virial and pressure are made of.",
                "Make it with compute_stress=True; or at constant volume add stress=none (a virial of zero).",
            )

    def warm_up(self) -> None:
        """Nothing: the model does not tell which elements it knows."""

    def evaluate(self, structures: Structures) -> Results:
        """Energies, forces and virials of the whole batch at once.

        Raises
        ------
        ModelError
            The model answers arrays of wrong shapes.
        """
        model, count = self._model, len(structures)
        sizes = np.diff(structures.offsets)
        state = SimState(
            positions=self._tensor(structures.positions),
            masses=torch.ones(structures.n_atoms, device=model.device, dtype=model.dtype),
            cell=self._tensor(structures.cells.swapaxes(1, 2)),  # vectors as columns
            pbc=self._periodic,
            atomic_numbers=torch.tensor(structures.numbers, device=model.device),
            system_idx=torch.tensor(np.repeat(np.arange(count), sizes), device=model.device),
        )
        answer = {
            key: value.detach().to("cpu", torch.float64).numpy()
            for key, value in model(state).items()
            if key in {"energy", "forces", "stress"}
        }
        name = self.card.name
        energy = shaped(name, "energy", answer.get("energy"), (count,))
        forces = shaped(name, "forces", answer.get("forces"), (structures.n_atoms, 3))
        if not self._periodic:
            parts = [structures.atoms_of(k) for k in range(count)]
            virial = np.array([structures.positions[part].T @ forces[part] for part in parts])
            virial = (virial + virial.swapaxes(1, 2)) / 2  # -dE/d(strain) of a system without images
        elif self._stress == "none":
            virial = np.zeros((count, 3, 3))
        else:
            stress = shaped(name, "stress", answer.get("stress"), (count, 3, 3))
            virial = -stress * structures.volumes[:, None, None]
        return Results(energy, forces, virial)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(array), device=self._model.device, dtype=self._model.dtype)


def load(source: Foreign, device: str = "cpu") -> TorchSimModel:
    """The model that a source names.

    Options of our own are ``stress=none`` and ``pbc=none``; all others are the maker's. ``device`` and
    ``dtype`` may be given as text (``dtype=float32``).

    Raises
    ------
    InputError
        An option of our own cannot be read.
    ModelError
        The model cannot be found or made, or gives no forces or stress.
    """
    options = dict(source.options)
    stress = take(options, "stress", ("required", "none"), "required")
    periodic = options.pop("pbc", True)
    if periodic not in (True, None):
        raise InputError(f"pbc={periodic} is not possible.", "Leave it out, or write pbc=none for molecules.")
    text = f"torchsim:{source.what}"
    if isinstance(options.get("dtype"), str):
        options["dtype"] = getattr(torch, options["dtype"], None)
        if not isinstance(options["dtype"], torch.dtype):
            raise InputError(
                f"{source.options['dtype']} is not a precision.", "Write dtype=float32 or dtype=float64."
            )
    if "device" in options:
        options["device"] = torch.device(options["device"])
    model = make(text, find(source.what), options, torch.device(device))
    if not all(hasattr(model, name) for name in ("compute_stress", "compute_forces", "device", "dtype")):
        raise ModelError(
            f"{text} made a {type(model).__name__}, which is not a model of TorchSim.",
            "Name a class of torch_sim.models, or a function that returns one.",
        )
    card = Card(text, identity(source), (), 0.0, str(model.dtype).removeprefix("torch."))
    return TorchSimModel(model, card, stress, periodic is True)
