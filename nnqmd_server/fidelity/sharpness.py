"""Sharpness: how much the loss of a model rises when its weights are shaken.

The published proxy adds N(0, 0.05) to every weight and averages the rise of the training loss over 100 draws
(measure_sharpness.py of Allegro-Legato). Here the noise is relative: epsilon times the root mean square of
the tensor that a weight stands in, so that networks whose weights have another scale are compared alike.
In the networks of Allegro 0.8 weights are of order one, and both are nearly the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from nequip.model.saved_models.load_utils import load_saved_model
from nequip.utils.global_state import set_global_state

from nnqmd_server.errors import DataError, ModelError
from nnqmd_server.potentials.allegro import Allegro
from nnqmd_server.potentials.base import Potential, unknown_elements
from nnqmd_server.potentials.package import PACKAGE_SUFFIX, read_card
from nnqmd_server.structures import from_ase


@dataclass(frozen=True)
class Sharpness:
    """Loss and force error of one model at one strength of noise.

    Parameters
    ----------
    model : str
        Name of the model.
    epsilon : float
        Noise on each weight, in units of the root mean square of its tensor.
    draws, frames : int
        How many times noise was drawn, and on how many frames the loss was taken.
    loss : float
        Without noise: mean squared force component [eV^2/A^2] plus mean squared energy error per atom
        [eV^2], the sum that the published models were trained on.
    rise, rise_error : float
        Mean rise of the loss, and its standard error over the draws.
    force_rmse, force_rmse_shaken : float
        Root mean square error of force components without and with noise [eV/A]; the latter over all draws.
    """

    model: str
    epsilon: float
    draws: int
    frames: int
    loss: float
    rise: float
    rise_error: float
    force_rmse: float
    force_rmse_shaken: float

    def as_dict(self) -> dict[str, str | float]:
        """As plain JSON types."""
        return asdict(self)


def measure(
    name: str,
    path: Path,
    frames: Sequence[Atoms],
    epsilons: Sequence[float],
    draws: int = 10,
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Sharpness]:
    """Shake the weights of a packaged model and measure what becomes of its loss.

    Parameters
    ----------
    name : str
        What the model is called.
    path : Path
        A packaged model (.nequip.zip); loading it executes what it holds.
    frames : sequence of Atoms
        With energies [eV] and forces [eV/Angstrom].
    epsilons : sequence of float
        Strengths of the noise, see :class:`Sharpness`.
    draws : int
        Draws for each strength, the same for every model of the same shape.
    seed : int
        Of the noise.
    tell : callable
        Told how many evaluations of the loss are done, of ``1 + draws * len(epsilons)``.

    Raises
    ------
    ModelError
        It is not a packaged model.
    DataError
        Frames have no energies and forces.
    """
    if not path.name.endswith(PACKAGE_SUFFIX):
        raise ModelError(
            f"The weights of {path} cannot be shaken.",
            f"Give a packaged model ({PACKAGE_SUFFIX}); the weights of others cannot be reached.",
        )
    card = read_card(path)
    symbols = {symbol for frame in frames for symbol in frame.get_chemical_symbols()}
    if unknown := sorted(symbols - set(card.elements)):
        raise unknown_elements(card, unknown)
    set_global_state()
    network = load_saved_model(path).eval()
    potential = Allegro(network, card, "cpu", "eager")
    weights = [weight for _, weight in network.named_parameters() if weight.numel()]
    originals = [weight.detach().clone() for weight in weights]
    labels = _labels(frames)
    still, still_force = _loss(potential, frames, *labels)
    tell(1)
    found, done = [], 1
    for epsilon in epsilons:
        random = torch.Generator().manual_seed(seed)
        rises, squares = [], []
        for _ in range(draws):
            with torch.no_grad():
                for weight, original in zip(weights, originals, strict=True):
                    noise = torch.randn(original.shape, generator=random, dtype=torch.float64)
                    size = original.double().square().mean().sqrt()
                    weight.copy_(original + (epsilon * size * noise).to(original.dtype))
            loss, force = _loss(potential, frames, *labels)
            rises.append(loss - still)
            squares.append(force)
            done += 1
            tell(done)
        error = float(np.std(rises, ddof=1) / np.sqrt(draws)) if draws > 1 else float("nan")
        found.append(
            Sharpness(
                name,
                epsilon,
                draws,
                len(frames),
                still,
                float(np.mean(rises)),
                error,
                float(np.sqrt(still_force)),
                float(np.sqrt(np.mean(squares))),
            )
        )
    return found


def _labels(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    bare = [
        k
        for k, frame in enumerate(frames)
        if frame.calc is None or not {"energy", "forces"} <= set(frame.calc.results)
    ]
    if bare:
        numbers = ", ".join(str(k) for k in bare[:10])
        raise DataError(f"Frames {numbers} (from 0) have no energy or no forces.", "Give labelled frames.")
    energies = np.array([frame.get_potential_energy() for frame in frames])
    return energies, np.concatenate([frame.get_forces() for frame in frames])


def _loss(
    potential: Potential, frames: Sequence[Atoms], energies: np.ndarray, forces: np.ndarray
) -> tuple[float, float]:
    """The loss, and the mean squared force component [eV^2/A^2] in it."""
    structures = from_ase(frames)
    results = potential.evaluate(structures)
    force = float(np.square(results.forces - forces).mean())
    energy = float(np.square((results.energy - energies) / np.diff(structures.offsets)).mean())
    return force + energy, force
