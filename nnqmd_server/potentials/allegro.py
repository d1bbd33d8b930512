"""Allegro (and every other nequip model) as a potential.

On a CPU the structures are evaluated one by one: a batch is up to 2.4 times slower per frame there,
since one frame stays in the cache and a batch does not. On a GPU they are evaluated together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from nequip.data import AtomicDataDict
from vesin import NeighborList

from nnqmd_server.dipoles import total_dipoles
from nnqmd_server.errors import InputError
from nnqmd_server.potentials.base import Card, unknown_elements
from nnqmd_server.potentials.centres import edges_of
from nnqmd_server.potentials.forms import load_network
from nnqmd_server.potentials.tensors import model_input
from nnqmd_server.structures import Array, Results, Structures, join

CENTROID = "wannier_centroid"


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
        """Make the total dipoles from the centroids, where the model has these."""
        if CENTROID in results.atom_properties and self.card.carriers:
            results.properties["dipole"] = total_dipoles(
                structures, results.atom_properties[CENTROID], self.card.ion_charges or {}, self.card.carriers
            )

    def _evaluate_together(self, structures: Structures) -> Results:
        out = self._run(structures, *self._edges(structures))
        atom_properties = {}
        if CENTROID in self.card.properties:
            atom_properties[CENTROID] = self._array(out[CENTROID])
        return Results(
            energy=self._array(out[AtomicDataDict.TOTAL_ENERGY_KEY]).reshape(-1),
            forces=self._array(out[AtomicDataDict.FORCE_KEY]),
            virial=self._virial(out, structures),
            atom_properties=atom_properties,
        )

    def _run(self, structures: Structures, edge_index: Array, shifts: Array) -> dict[str, torch.Tensor]:
        counts = np.diff(structures.offsets)
        data = {
            AtomicDataDict.POSITIONS_KEY: structures.positions,
            AtomicDataDict.EDGE_INDEX_KEY: edge_index,
            AtomicDataDict.ATOM_TYPE_KEY: self._types[structures.numbers],
            AtomicDataDict.CELL_KEY: structures.cells,
            AtomicDataDict.EDGE_CELL_SHIFT_KEY: shifts,
            AtomicDataDict.BATCH_KEY: np.repeat(np.arange(len(structures)), counts),
            AtomicDataDict.NUM_NODES_KEY: counts,
        }
        return self._model(model_input(data, self._device))

    def _virial(self, out: dict[str, torch.Tensor], structures: Structures) -> Array:
        stress = self._array(out[AtomicDataDict.STRESS_KEY]).reshape(-1, 3, 3)
        return -stress * structures.volumes[:, None, None]

    @staticmethod
    def _array(tensor: torch.Tensor) -> Array:
        return tensor.detach().to("cpu", torch.float64).numpy()


def load(
    path: str | Path, device: str = "cpu", compiled: bool = True, precision: str | None = None
) -> Allegro:
    """Load a model of any form.

    A model is code: loading it executes what the file holds.

    Parameters
    ----------
    path : str or Path
        A package, a checkpoint, a compiled model or one deployed by nequip 0.5 or 0.6; see
        :mod:`nnqmd_server.potentials.package`.
    device : str
        "cpu" or "cuda".
    compiled : bool
        Compile it for this machine (cached); eager when there is no compiler.
    precision : str, optional
        "float32", "float64" or "tf32"; as it was trained unless given.

    Raises
    ------
    ModelError
        The file is missing, is not a model, cannot be loaded, or cannot have this precision.
    """
    model, card, form = load_network(Path(path), device, compiled, precision)
    return Allegro(model, card, device, form)
