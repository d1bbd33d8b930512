"""Allegro (and every other nequip model) as a potential.

:meth:`Allegro.prepare` makes neighbour lists and tensors, :meth:`Allegro.run` evaluates them: models that are
evaluated on the same structures share the first.

On a CPU the structures are evaluated one by one: what a structure gives then does not depend, to the last
bit, on which others are evaluated with it. On a GPU they are evaluated together, in calls
that are cut by the number of edges. Compiled models take any number of atoms and edges, so nothing is ever
padded for them or compiled again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from nequip.data import AtomicDataDict

from nnqmd_server.dipoles import obey_sum_rule, structure_charges, total_dipoles
from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials import batch
from nnqmd_server.potentials.base import BORN, Card, unknown_elements, with_born
from nnqmd_server.potentials.born import WithBorn
from nnqmd_server.potentials.centres import edges_of
from nnqmd_server.potentials.forms import load_network
from nnqmd_server.potentials.neighbours import Lists
from nnqmd_server.potentials.tensors import with_types
from nnqmd_server.structures import Array, Results, Structures, plain

CENTROID = "wannier_centroid"
ATOM_FIELDS = (CENTROID, BORN)
"""What models may give for each atom, besides forces."""

_OUTPUTS = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY, AtomicDataDict.STRESS_KEY)

BYTES_PER_EDGE = 20_000
"""What a model takes for each edge [bytes], until more has been seen; of all networks tried, the most."""


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
    most_edges : int, optional
        Evaluate structures together, with no more edges than that at once. On a CPU they are evaluated one
        by one unless it is given; on a GPU it follows from the free memory.

    Attributes
    ----------
    lists : Lists
        The neighbour lists that are kept.
    spent : dict of float
        Seconds since the beginning in "lists", "copies" and "model"; add ``timing`` on a GPU, which else is
        still computing when the model returns.
    timing : bool
        Wait for the GPU around every call, so that ``spent`` is right there too.
    """

    def __init__(
        self, model: torch.nn.Module, card: Card, device: str, form: str, most_edges: int | None = None
    ) -> None:
        self.card = card
        self.form = form
        self.lists = Lists(card.cutoff)
        self.spent = {"lists": 0.0, "copies": 0.0, "model": 0.0}
        self.timing = False
        self._model = model
        self._device = torch.device(device)
        self._most_edges = most_edges
        self._bytes_per_edge = BYTES_PER_EDGE
        self.together = most_edges is not None or self._device.type != "cpu"
        self._types = np.full(len(chemical_symbols) + 1, -1, dtype=np.int64)
        for index, symbol in enumerate(card.elements):
            self._types[atomic_numbers[symbol]] = index
        self._longer: dict[float, Lists] = {}

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
        return self.run(self.prepare(structures))

    def prepare(self, structures: Structures, cutoff: float | None = None) -> batch.Batch:
        """Make the neighbour lists and the tensors of a batch, for this potential and others.

        Parameters
        ----------
        structures : Structures
            Positions and cells in Angstrom.
        cutoff : float, optional
            Longest edges [Angstrom], where another potential needs longer ones than this.

        Raises
        ------
        UnknownElementError, InputError
            See :meth:`evaluate`.
        """
        structures = plain(structures)
        self._check(structures)
        started = perf_counter()
        lists = self.lists
        if cutoff is not None and cutoff > self.card.cutoff:
            lists = self._longer.setdefault(cutoff, Lists(cutoff))
        if self.together:
            ready = batch.together(structures, lists, self._device, self._edges_at_once())
        else:
            ready = batch.one_by_one(structures, lists)
        self._clock("lists", started)
        return ready

    def run(self, ready: batch.Batch) -> Results:
        """Evaluate a batch that this or another potential has prepared.

        Parameters
        ----------
        ready : Batch
            On the device of this potential, with edges at least as long as its cutoff.

        Raises
        ------
        UnknownElementError
            A structure holds an element that the model does not know.
        InputError
            The batch has only shorter edges.
        """
        self._check_elements(ready.structures)
        if ready.cutoff < self.card.cutoff:
            raise InputError(
                f"The batch has edges up to {ready.cutoff} Angstrom; the model needs {self.card.cutoff}.",
                "Prepare it with the largest cutoff of the models.",
            )
        results = self._raw(ready)
        self.add_dipoles(ready.structures, results)
        return results

    def _raw(self, ready: batch.Batch) -> Results:
        """What the model itself says."""
        started = perf_counter()
        fit = ready.cutoff == self.card.cutoff
        parts = ready.parts if fit else [batch.shortened(part, self.card.cutoff) for part in ready.parts]
        inputs = [self._typed(part.structures, part.inputs) for part in parts]
        self._clock("copies", started)
        names = [name for name in ATOM_FIELDS if name in self.card.properties]
        found = [
            self._evaluate_part(part, data, [*_OUTPUTS, *names])
            for part, data in zip(parts, inputs, strict=True)
        ]
        # All at once, after the last call: between two calls little is in the cache that this needs.
        started = perf_counter()
        arrays = [self._arrays(tensors) for tensors in found]
        energy, forces, stress, *fields = (np.concatenate(some) for some in zip(*arrays, strict=True))
        results = Results(
            energy=energy.reshape(-1),
            forces=forces,
            virial=_virial(stress, ready.structures),
            atom_properties=dict(zip(names, fields, strict=True)),
        )
        self._clock("copies", started)
        return results

    def _clock(self, what: str, started: float) -> float:
        """Book the time since ``started``; returns the time now."""
        if self.timing and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        self.spent[what] += now - started
        return now

    def _edges_at_once(self) -> float:
        """Most edges of a call: what is asked for, or what fits into the free memory of the GPU."""
        if self._most_edges is not None:
            return self._most_edges
        if self._device.type != "cuda":
            return float("inf")
        free = torch.cuda.mem_get_info(self._device)[0]
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return 0.8 * (free + unused) / self._bytes_per_edge

    def _check(self, structures: Structures) -> None:
        if not len(structures):
            raise InputError("There is no structure to evaluate.", "Give at least one.")
        self._check_elements(structures)
        if not np.isfinite(structures.positions).all() or not (structures.volumes > 1e-6).all():
            raise InputError(
                "A structure has positions that are not finite or a cell without volume.",
                "The dynamics has broken down before: try a shorter timestep, and look at the last frames.",
            )

    def _check_elements(self, structures: Structures) -> None:
        unknown = sorted(set(structures.numbers[self._types[structures.numbers] < 0].tolist()))
        if unknown:
            raise unknown_elements(self.card, [chemical_symbols[z] for z in unknown])

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
        # Born charges are derivatives with respect to all atoms, and do not belong to the centres alone.
        atom_properties = {CENTROID: np.zeros((n, 3))} if CENTROID in self.card.properties else {}
        if not len(centres):
            return Results(np.zeros(1), forces, np.zeros((1, 3, 3)), {}, atom_properties)
        edges, shifts = edges_of(structure.positions, structure.cells[0], centres, self.card.cutoff)
        atoms, places = np.unique(np.concatenate([centres, edges.ravel()]), return_inverse=True)
        own, edges = places[: len(centres)], places[len(centres) :].reshape(2, -1)
        around = Structures(
            structure.numbers[atoms], structure.positions[atoms], structure.cells, np.array([0, len(atoms)])
        )
        inputs = batch.inputs(around, edges, shifts, self._device)
        out = self._call(self._typed(around, inputs))
        forces[atoms] = self._array(out[AtomicDataDict.FORCE_KEY])
        for name, values in atom_properties.items():
            values[centres] = self._array(out[name])[own]
        # The neighbours without edges of their own still have the constant energy of their element.
        energy = self._array(out[AtomicDataDict.PER_ATOM_ENERGY_KEY]).reshape(-1)[own].sum()
        return Results(
            np.array([energy]),
            forces,
            _virial(self._array(out[AtomicDataDict.STRESS_KEY]), structure),
            {},
            atom_properties=atom_properties,
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

    def _evaluate_part(
        self, part: batch.Part, data: dict[str, torch.Tensor], wanted: Sequence[str]
    ) -> list[torch.Tensor]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        out = self._call(data)
        if self._device.type == "cuda" and part.n_edges > 10_000:
            taken = torch.cuda.max_memory_allocated(self._device) - before
            self._bytes_per_edge = max(self._bytes_per_edge, taken / part.n_edges)
        return [out[name] for name in wanted]

    def _typed(self, structures: Structures, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return with_types(inputs, self._types[structures.numbers], self._device)

    def _call(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        started = perf_counter()
        out = self._model(data)
        self._clock("model", started)
        return out

    def _arrays(self, tensors: list[torch.Tensor]) -> list[Array]:
        """Several tensors on the host, from a GPU in one copy."""
        if not self.together:
            return [self._array(tensor) for tensor in tensors]
        whole = self._array(torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors]))
        ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
        return [
            part.reshape(tuple(tensor.shape))
            for part, tensor in zip(np.split(whole, ends), tensors, strict=True)
        ]

    @staticmethod
    def _array(tensor: torch.Tensor) -> Array:
        if tensor.dtype is torch.float64 and tensor.is_cpu and not tensor.requires_grad:
            return tensor.numpy()
        return tensor.detach().to("cpu", torch.float64).numpy()


def _virial(stress: Array, structures: Structures) -> Array:
    return -stress.reshape(-1, 3, 3) * structures.volumes[:, None, None]


def load(
    path: str | Path,
    device: str = "cpu",
    compiled: bool = True,
    precision: str | None = None,
    born: bool = False,
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
    born : bool
        Give Born charges too, with every evaluation; the model is then not compiled.

    Raises
    ------
    ModelError
        The file is missing, is not a model, cannot be loaded, or cannot have this precision.
    """
    model, card, form = load_network(Path(path), device, compiled and not born, precision)
    if born:
        if not isinstance(model, torch.nn.Module) or form.startswith(("compiled", "TorchScript")):
            raise ModelError(
                f"Born charges need a network that can be differentiated; {card.name} is {form}.",
                "Give the packaged model (.nequip.zip).",
            )
        model = WithBorn(model, card).to(device).eval()
        card = with_born(card)
    return Allegro(model, card, device, form)
