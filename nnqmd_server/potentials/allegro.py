"""Allegro (and every other nequip model) as a potential.

On a CPU the structures are evaluated one by one: a batch is up to 2.4 times slower per frame there,
since one frame stays in the cache and a batch does not. On a GPU they are evaluated together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from nequip.data import AtomicDataDict
from nequip.model.inference_models import load_compiled_model
from nequip.model.saved_models.load_utils import load_saved_model
from nequip.utils.global_state import set_global_state
from vesin import NeighborList

from nnqmd_server.dipoles import obey_sum_rule, structure_charges, total_dipoles
from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import Card, unknown_elements
from nnqmd_server.potentials.born import BORN, WithBorn
from nnqmd_server.potentials.centres import edges_of
from nnqmd_server.potentials.compiled import compiled_model
from nnqmd_server.potentials.package import read_card
from nnqmd_server.structures import Array, Results, Structures, join

CENTROID = "wannier_centroid"
ATOM_FIELDS = (CENTROID, BORN)


class Allegro:
    """A packaged nequip or Allegro model that evaluates batches of structures.

    Parameters
    ----------
    model : torch.nn.Module
        Takes and returns nequip's dictionary of tensors.
    card : Card
        What the model says of itself.
    device : str
        "cpu" or "cuda".
    form : str
        How it runs, in words.
    """

    def __init__(self, model: torch.nn.Module, card: Card, device: str, form: str) -> None:
        self.card = card
        self.form = form
        self._model = model
        self.together = device != "cpu"
        self._device = torch.device(device)
        self._types = np.full(len(chemical_symbols) + 1, -1, dtype=np.int64)
        for index, symbol in enumerate(card.elements):
            self._types[atomic_numbers[symbol]] = index
        self._neighbours = NeighborList(cutoff=card.cutoff, full_list=True)

    def evaluate(self, structures: Structures) -> Results:
        """Energies, forces, virials and, with a Wannier read-out, centroids and dipoles.

        Parameters
        ----------
        structures : Structures
            Positions and cells in Angstrom.

        Returns
        -------
        Results
            In the order of the structures.

        Raises
        ------
        UnknownElementError
            A structure holds an element that the model does not know.
        InputError
            Positions are not finite, or a cell has no volume.
        """
        self._check(structures)
        if self._device.type == "cpu":
            results = join([self._evaluate_together(structures[k : k + 1]) for k in range(len(structures))])
        else:
            results = self._evaluate_together(structures)
        self.add_dipoles(structures, results)
        return results

    def _check(self, structures: Structures) -> None:
        if not len(structures):
            raise InputError("There is no structure to evaluate.", "Give at least one.")
        unknown = sorted(set(structures.numbers[self._types[structures.numbers] < 0].tolist()))
        if unknown:
            raise unknown_elements(self.card, [chemical_symbols[z] for z in unknown])
        if not np.isfinite(structures.positions).all() or not (structures.volumes > 1e-6).all():
            raise InputError(
                "A structure has positions that are not finite or a cell without volume.",
                "The dynamics has broken down before: try a shorter timestep, and look at the last frames.",
            )

    def _edges(self, structures: Structures) -> tuple[Array, Array]:
        centres, shifts = [], []
        for k in range(len(structures)):
            atoms = structures.atoms_of(k)
            i, j, s = self._neighbours.compute(
                points=structures.positions[atoms], box=structures.cells[k], periodic=True, quantities="ijS"
            )
            centres.append(np.stack([i, j]).astype(np.int64) + atoms.start)
            shifts.append(s)
        return np.concatenate(centres, axis=1), np.concatenate(shifts).astype(np.float64)

    def evaluate_centres(self, structure: Structures, centres: Array) -> Results:
        """What some of a structure's atoms contribute; over all atoms these add up to :meth:`evaluate`.

        Their energies, the forces of these on all atoms, their virial, and their own centroids. Exact for
        a strictly local model, which is given the edges of these centres, all of them and no others.

        Parameters
        ----------
        structure : Structures
            One structure.
        centres : Array
            Atoms of it, int64, shape (n_centres,); may be empty.

        Returns
        -------
        Results
            Of the shapes of the whole structure: zeros where these atoms contribute nothing. No dipole.

        Raises
        ------
        UnknownElementError, InputError
            See :meth:`evaluate`.
        """
        self._check(structure)
        n = structure.n_atoms
        forces = np.zeros((n, 3))
        atom_properties = {CENTROID: np.zeros((n, 3))} if CENTROID in self.card.properties else {}
        if not len(centres):
            return Results(np.zeros(1), forces, np.zeros((1, 3, 3)), {}, atom_properties)
        edges, shifts = edges_of(structure.positions, structure.cells[0], centres, self.card.cutoff)
        atoms, places = np.unique(np.concatenate([centres, edges.ravel()]), return_inverse=True)
        own, edges = places[: len(centres)], places[len(centres) :].reshape(2, -1)
        around = Structures(
            structure.numbers[atoms], structure.positions[atoms], structure.cells, np.array([0, len(atoms)])
        )
        out = self._run(around, edges, shifts)
        forces[atoms] = self._array(out[AtomicDataDict.FORCE_KEY])
        if atom_properties:
            atom_properties[CENTROID][centres] = self._array(out[CENTROID])[own]
        # The neighbours without edges of their own still have the constant energy of their element.
        energy = self._array(out[AtomicDataDict.PER_ATOM_ENERGY_KEY]).reshape(-1)[own].sum()
        return Results(
            np.array([energy]), forces, self._virial(out, structure), {}, atom_properties=atom_properties
        )

    def add_dipoles(self, structures: Structures, results: Results) -> None:
        """Make the total dipoles from the centroids, where the model has these; settle Born charges' sum."""
        charges, carriers = self.card.ion_charges or {}, self.card.carriers
        if CENTROID in results.atom_properties and carriers:
            results.properties["dipole"] = total_dipoles(
                structures, results.atom_properties[CENTROID], charges, carriers
            )
        if BORN in results.atom_properties and carriers:
            total = structure_charges(structures, charges, carriers)
            born = obey_sum_rule(results.atom_properties[BORN], structures.offsets, total)
            results.atom_properties[BORN] = born

    def _evaluate_together(self, structures: Structures) -> Results:
        out = self._run(structures, *self._edges(structures))
        atom_properties = {key: self._array(out[key]) for key in ATOM_FIELDS if key in self.card.properties}
        return Results(
            energy=self._array(out[AtomicDataDict.TOTAL_ENERGY_KEY]).reshape(-1),
            forces=self._array(out[AtomicDataDict.FORCE_KEY]),
            virial=self._virial(out, structures),
            atom_properties=atom_properties,
        )

    def _run(self, structures: Structures, edge_index: Array, shifts: Array) -> dict[str, torch.Tensor]:
        counts = np.diff(structures.offsets)
        # AOTInductor checks nothing: dtype and contiguity are settled here and nowhere else.
        data = {
            AtomicDataDict.POSITIONS_KEY: self._tensor(structures.positions, np.float64),
            AtomicDataDict.EDGE_INDEX_KEY: self._tensor(edge_index, np.int64),
            AtomicDataDict.ATOM_TYPE_KEY: self._tensor(self._types[structures.numbers], np.int64),
            AtomicDataDict.CELL_KEY: self._tensor(structures.cells, np.float64),
            AtomicDataDict.EDGE_CELL_SHIFT_KEY: self._tensor(shifts, np.float64),
            AtomicDataDict.BATCH_KEY: self._tensor(np.repeat(np.arange(len(structures)), counts), np.int64),
            AtomicDataDict.NUM_NODES_KEY: self._tensor(counts, np.int64),
        }
        return self._model(data)

    def _virial(self, out: dict[str, torch.Tensor], structures: Structures) -> Array:
        stress = self._array(out[AtomicDataDict.STRESS_KEY]).reshape(-1, 3, 3)
        return -stress * structures.volumes[:, None, None]

    def _tensor(self, array: Array, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.array(array, dtype=dtype, order="C")).to(self._device)

    @staticmethod
    def _array(tensor: torch.Tensor) -> Array:
        return tensor.detach().to("cpu", torch.float64).numpy()


def load(path: str | Path, device: str = "cpu", compiled: bool = True, born: bool = False) -> Allegro:
    """Load a packaged model.

    A model is code: loading it executes what the package holds.

    Parameters
    ----------
    path : str or Path
        A ``.nequip.zip`` file.
    device : str
        "cpu" or "cuda".
    compiled : bool
        Compile it for this machine (cached); eager when there is no compiler.
    born : bool
        Give Born charges too, with every evaluation; the model is then not compiled.

    Raises
    ------
    ModelError
        The file is missing, is not a model, or cannot be loaded.
    """
    path = Path(path)
    card = read_card(path)
    set_global_state()
    if compiled and not born:
        file, form = compiled_model(path, card, device)
        if file is not None:
            try:
                model, claims = load_compiled_model(str(file), device)
            except Exception as error:  # noqa: BLE001 - what AOTInductor raises for a foreign file is not documented
                form = f"eager: {file} cannot be loaded ({error!r:.200}); removing it may help"
            else:
                _check_claims(path, card, claims)
                return Allegro(model, card, device, form)
    else:
        form = "eager"
    try:
        model = load_saved_model(path).to(device).eval()
    except Exception as error:  # a package runs its own code, and anything may come of it
        raise ModelError(
            f"{path} cannot be loaded: {error.__class__.__name__}: {error}.",
            "Package it again with the nequip of this installation.",
        ) from error
    _check_claims(path, card, getattr(model, "metadata", {}))
    if born:
        model = WithBorn(model, card).to(device).eval()
        card = replace(card, properties=(*card.properties, BORN))
    return Allegro(model, card, device, form)


def _check_claims(path: Path, card: Card, claims: Mapping[str, object]) -> None:
    """Compare what the network says of itself with what is written beside it in the package.

    Elements in another order, or another cutoff, would give wrong forces without any sign.
    """
    types = claims.get("type_names", card.elements)
    inside = {
        "elements": tuple(types.split() if isinstance(types, str) else types),
        "cutoff": float(claims.get("r_max", card.cutoff)),
        "dtype": str(claims.get("model_dtype", card.dtype)),
    }
    for what, found in inside.items():
        if found != getattr(card, what):
            raise ModelError(
                f"{path} is not what it claims: it says {what} {getattr(card, what)}, its network {found}.",
                "Package it again, or get it from where you trust it; clear the cache of compiled models.",
            )
