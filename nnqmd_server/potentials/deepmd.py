"""A DeePMD-kit model as a potential: ``deepmd:FILE[,key=value]...``.

``DeepPot.eval`` takes any number of frames of the same atoms at once, in eV and Angstrom, and its virial is
ours. Where it runs is DeePMD-kit's affair: it takes the GPU that it sees. Its wheel does not work beside
torch 2.13, so it has an environment of its own: ``deepmd:FILE@/envs/deepmd``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import SYMBOLS, Card, unknown_elements
from nnqmd_server.potentials.foreign import make, runs_of_equal, shaped
from nnqmd_server.potentials.sources import Foreign, identity
from nnqmd_server.structures import Array, Results, Structures, join


class DeepPotential:
    """A deep potential of DeePMD-kit.

    Parameters
    ----------
    model : deepmd.infer.DeepPot
        What computes.
    card : Card
        Its elements in the order of its types.
    periodic : bool
        Whether the structures repeat; DeePMD-kit knows all or nothing.
    parameters : mapping of str to Array
        ``fparam`` and ``aparam``: the model's frame parameters (n,) and atom parameters (n,), if it has any.
    """

    def __init__(
        self, model: Any, card: Card, periodic: bool = True, parameters: Mapping[str, Array] | None = None
    ) -> None:
        self.card = card
        self.form = f"DeePMD-kit, {type(model.deep_eval).__module__.split('.')[1]}"
        self.form += "" if periodic else ", not periodic"
        self._model = model
        self._periodic = periodic
        self._parameters = dict(parameters or {})
        self._types = np.full(len(SYMBOLS), -1, dtype=np.int64)
        for index, symbol in enumerate(model.get_type_map()):
            if symbol in SYMBOLS:
                self._types[SYMBOLS.index(symbol)] = index

    def evaluate(self, structures: Structures) -> Results:
        """Energies, forces and virials; beads, which have the same atoms, in one call.

        Raises
        ------
        UnknownElementError
            A structure holds an element that is not among the model's types.
        ModelError
            The model answers arrays of wrong shapes.
        """
        unknown = np.unique(structures.numbers[self._types[structures.numbers] < 0])
        if len(unknown):
            raise unknown_elements(self.card, [SYMBOLS[z] for z in unknown])
        return join([self._run(structures[part]) for part in runs_of_equal(structures)])

    def _run(self, structures: Structures) -> Results:
        count, n = len(structures), structures.n_atoms // len(structures)
        energy, forces, virial = self._model.eval(
            structures.positions.reshape(count, 3 * n),
            structures.cells.reshape(count, 9) if self._periodic else None,
            self._types[structures.numbers[:n]],
            **self._parameters,
        )[:3]
        name = self.card.name
        return Results(
            shaped(name, "energies", energy, (count,)),
            shaped(name, "forces", forces, (count * n, 3)),
            shaped(name, "virials", virial, (count, 3, 3)),
        )


def load(source: Foreign, device: str = "cpu") -> DeepPotential:
    """The model that a source names: what ``dp freeze`` or ``dp compress`` writes (.pth, .pb, .dp, ...).

    Options are ``pbc=none`` for molecules, ``fparam`` and ``aparam`` (numbers or lists), and ``head`` of a
    model with several; all others go to ``deepmd.infer.DeepPot``. ``device`` is ignored, see above.

    Raises
    ------
    InputError
        An option cannot be read.
    ModelError
        DeePMD-kit is not there, or cannot load the file.
    """
    path = Path(source.what)
    if not path.exists():
        raise ModelError(f"There is no model file {path}.", "Give what `dp freeze` writes.")
    try:
        from deepmd.infer import DeepPot
    except Exception as error:  # its libraries may not fit each other, in any way
        raise ModelError(
            f"DeePMD-kit cannot be imported: {error.__class__.__name__}: {str(error)[:300]}.",
            "Install deepmd-kit in an environment of its own, and name it: deepmd:FILE@/envs/deepmd.",
        ) from error
    options = dict(source.options)
    periodic = options.pop("pbc", True)
    if periodic not in (True, None):
        raise InputError(f"pbc={periodic} is not possible.", "Leave it out, or write pbc=none for molecules.")
    parameters = {key: _numbers(key, options.pop(key)) for key in ("fparam", "aparam") if key in options}
    model = make(f"deepmd:{source.what}", DeepPot, {"model_file": str(path), **options}, device)
    elements = tuple(symbol for symbol in model.get_type_map() if symbol in SYMBOLS)
    card = Card(path.name, identity(source), elements, float(model.get_rcut()), "float64")
    return DeepPotential(model, card, periodic is True, parameters)


def _numbers(key: str, value: object) -> Array:
    try:
        return np.array(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={value} is no number.", f"Write {key}=0.1, or '{key}=[0.1,0.2]'.") from error
