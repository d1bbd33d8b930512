"""Any of i-PI's own Python drivers as a potential: ``ipi:NAME[,key=value]...`` or ``ipi:FILE.py...``.

So its ``mace``, ``metatomic``, ``pet``, ``xtb``, ``so3lr``, ``harmonic`` and a user's own driver serve a pool
as they stand. They speak hartree and bohr, have cell vectors as columns, and learn the elements from their
``template``, not from us. Those that are built on i-PI's class take a batch as a list; others one structure.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ipi.pes import __drivers__, load_pes
from ipi.pes.dummy import Dummy_driver

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import SYMBOLS, Card
from nnqmd_server.potentials.foreign import (
    NO_VIRIAL,
    make,
    named_parameters,
    runs_of_equal,
    shaped,
    symbols_of,
    take_names,
)
from nnqmd_server.potentials.sources import Foreign, identity
from nnqmd_server.structures import Array, Results, Structures, join
from nnqmd_server.units import BOHR, HARTREE

log = logging.getLogger("nnqmd.worker")

_EXTRAS = {
    "dipole": ("dipole", BOHR),
    "charge": ("charges", 1.0),
    "committee_energy": ("committee_pot", HARTREE),
    "committee_forces": ("committee_force", HARTREE / BOHR),
    "committee_virial": ("committee_virial", HARTREE),
}
"""Our names of further properties: i-PI's name in the driver's extras, and i-PI's unit in ours."""

_OF_ATOMS = {"charge", "committee_forces"}
_ISOTOPES = {"D": "H", "T": "H"}


class IpiDriver:
    """A Python driver of i-PI.

    Parameters
    ----------
    driver : callable
        ``driver(cell, positions)`` gives energy, forces, virial and a text, for one structure; one that is
        built on :class:`ipi.pes.dummy.Dummy_driver` takes lists too. The virial is what the driver says: zero
        from i-PI's model potentials (``harmonic`` and others), whose pressure is then that of an ideal gas.
    card : Card
        Name, hash, and which of the extras are wanted.
    template : Array, optional
        Atomic numbers for which the driver was made.
    """

    def __init__(self, driver: Any, card: Card, template: Array | None = None) -> None:
        self.card = card
        self.form = f"i-PI driver {type(driver).__name__}"
        self._driver = driver
        self._template = template
        self._in_lists = isinstance(driver, Dummy_driver)
        # A driver that has only its serial loop gains nothing from a batch.
        self.together = self._in_lists and type(driver).compute is not Dummy_driver.compute
        self._warned = False

    def warm_up(self) -> None:
        """Nothing: a driver with a template can do no other structures, and its template may have no cell."""

    def evaluate(self, structures: Structures) -> Results:
        """Energies, forces and virials, and of the extras what the card names.

        Raises
        ------
        InputError
            A structure has other atoms than the template.
        ModelError
            The driver's arrays have wrong shapes, or an extra is missing.
        """
        if self._template is not None:
            for k in range(len(structures)):
                if not np.array_equal(structures.numbers[structures.atoms_of(k)], self._template):
                    raise InputError(
                        f"A structure has other atoms than the template of {self.card.name}.",
                        "Give the simulation's first structure as template=..., its atoms in the same order.",
                    )
        return join([self._run(structures[part]) for part in runs_of_equal(structures)])

    def _run(self, structures: Structures) -> Results:
        count, n = len(structures), structures.n_atoms // len(structures)
        positions = list(structures.positions.reshape(count, n, 3) / BOHR)
        cells = [np.ascontiguousarray(cell.T) / BOHR for cell in structures.cells]
        if self._in_lists and count > 1:
            answers = self._driver(cells, positions)
        else:
            answers = [self._driver(cell, q) for cell, q in zip(cells, positions, strict=True)]
        name = self.card.name
        if len(answers) != count or any(len(answer) != 4 for answer in answers):
            raise ModelError(
                f"{name} did not give energy, forces, virial and extras of each structure.",
                "Correct the driver: i-PI's own `harmonic` shows what is wanted.",
            )
        energy = np.array([shaped(name, "an energy", a[0], (1,))[0] for a in answers])
        forces = np.concatenate([shaped(name, "forces", a[1], (n, 3)) for a in answers])
        virial = np.array([shaped(name, "a virial", a[2], (3, 3)) for a in answers])
        if not self._warned and forces.any() and not virial.any():
            self._warned = True
            log.warning("%s: %s", name, NO_VIRIAL)
        further = {wanted: [self._extra(wanted, a[3], n) for a in answers] for wanted in self.card.properties}
        return Results(
            energy * HARTREE,
            forces * (HARTREE / BOHR),
            virial * HARTREE,
            {key: np.array(values) for key, values in further.items() if key not in _OF_ATOMS},
            {key: np.concatenate(values) for key, values in further.items() if key in _OF_ATOMS},
        )

    def _extra(self, wanted: str, text: str, n: int) -> Array:
        key, unit = _EXTRAS[wanted]
        try:
            found = json.loads(text)
            values = np.array(found[key], dtype=np.float64) * unit
            if wanted == "dipole":
                return values.reshape(3)
            if wanted == "charge":
                return values.reshape(n)
            if wanted == "committee_forces":
                return values.reshape(-1, n, 3).swapaxes(0, 1)
            return values.reshape(-1, 3, 3) if wanted == "committee_virial" else values.reshape(-1)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.card.name} did not give {key} in its extras: {text!r:.200}.",
                "Leave it out of give=..., or set the driver's option that makes it.",
            ) from error


def load(source: Foreign, device: str = "cpu") -> IpiDriver:
    """The driver that a source names: one of ``ipi.pes``, or a file with ``__DRIVER_CLASS__`` in it.

    The one option of our own is ``give``: ``dipole``, ``charge``, ``committee_energy``, ``committee_forces``
    and ``committee_virial``, joined by ``+``, out of the driver's extras. All others are the driver's
    parameters, under i-PI's names and in i-PI's units.

    Raises
    ------
    InputError
        The option of our own, or the template, cannot be read.
    ModelError
        The driver cannot be found or made.
    """
    options = dict(source.options)
    gives = take_names(options, "give", list(_EXTRAS))
    text = f"ipi:{source.what}"
    if not source.what.endswith(".py") and source.what not in __drivers__:
        raise ModelError(
            f"i-PI has no driver {source.what}.",
            f"It has: {', '.join(__drivers__)}; or give a file of your own: ipi:my_driver.py.",
        )
    try:
        driver_class = load_pes("custom" if source.what.endswith(".py") else source.what, source.what)
    except Exception as error:  # foreign code, and anything may come of it
        raise ModelError(
            f"{text} cannot be loaded: {error.__class__.__name__}: {str(error)[:500]}.",
            "Install what it needs, or name an environment that has it: SOURCE@/envs/NAME.",
        ) from error
    known = sorted(named_parameters(driver_class)) if issubclass(driver_class, Dummy_driver) else None
    driver = make(text, driver_class, options, device, known)
    template = _numbers(options["template"]) if "template" in options else None
    elements = symbols_of(template) if template is not None else ()
    return IpiDriver(driver, Card(text, identity(source), elements, 0.0, "float64", gives), template)


def _numbers(template: str) -> Array:
    """Atomic numbers of a template; i-PI's own xyz files are read by their first column."""
    path = Path(template)
    try:
        if path.suffix == ".xyz":
            lines = path.read_text().splitlines()
            symbols: Sequence[str] = [line.split()[0] for line in lines[2 : 2 + int(lines[0])]]
        else:
            from ase.io import read  # here: an environment with i-PI may lack it

            symbols = read(path, parallel=False).get_chemical_symbols()
        return np.array([SYMBOLS.index(_ISOTOPES.get(s, s)) for s in symbols], dtype=np.int64)
    except (OSError, ValueError, IndexError, KeyError, ImportError) as error:
        raise InputError(
            f"The template {template} cannot be read: {error}.", "Give the file that initialises i-PI."
        ) from error
