"""The codes that can label: CP2K with Wannier centres, and whatever has an ASE calculator.

A code is a frozen value that travels to the worker processes; `prepare` runs there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from nnqmd_server.errors import InputError, ProgramError
from nnqmd_server.labels import cp2k_run
from nnqmd_server.labels.cp2k_input import FORCES, K_LENGTH, WANNIER, read_template, shipped
from nnqmd_server.labels.frames import labelled
from nnqmd_server.potentials.foreign import load_module
from nnqmd_server.potentials.sources import read

Labeller = Callable[[Atoms, Path], Atoms]
"""Labels one structure; works in a folder of its own, which exists and is empty."""


class Code(Protocol):
    """What `label` needs to know of a code."""

    @property
    def name(self) -> str:
        """Code and version, for the provenance."""

    def identity(self, atoms: Atoms) -> str:
        """Everything that a frame's labels depend on, the structure included."""

    def settings(self) -> dict[str, Any]:
        """For the provenance file."""

    def prepare(self) -> Labeller:
        """Make the labeller, in the process where it will work."""


@dataclass(frozen=True)
class AseCode:
    """A calculator of ASE, or a Python function that makes one.

    Parameters
    ----------
    source : str
        ``MODULE.CLASS`` or ``FILE.py:MAKER``.
    options : tuple of pairs
        Keywords for it.
    version : str
        Of the package it is in, or the hash of the file.
    """

    source: str
    options: tuple[tuple[str, Any], ...]
    version: str

    @property
    def name(self) -> str:
        """Code and version."""
        return f"{self.source} {self.version}"

    def identity(self, atoms: Atoms) -> str:
        """Structure to 1e-10 Angstrom, calculator and options."""
        structure = [
            atoms.numbers.tolist(),
            (np.round(atoms.positions, 10) + 0.0).tolist(),
            (np.round(atoms.cell.array, 10) + 0.0).tolist(),
            atoms.pbc.tolist(),
        ]
        return json.dumps([self.name, sorted(self.options), structure])

    def settings(self) -> dict[str, Any]:
        """For the provenance file."""
        return {"calculator": self.source, "options": dict(self.options)}

    def prepare(self) -> Labeller:
        """Make the calculator."""
        calculator = make_calculator(self.source, dict(self.options))

        def label(atoms: Atoms, folder: Path) -> Atoms:
            work = atoms.copy()
            work.calc = calculator
            if hasattr(calculator, "directory"):
                calculator.directory = str(folder)
            forces = work.get_forces()
            stress = work.get_stress(voigt=False) if "stress" in calculator.implemented_properties else None
            # forces are the derivatives of the free energy, where the calculator tells it from the energy
            energy = calculator.results.get("free_energy", work.get_potential_energy())
            return labelled(atoms, energy, forces, stress, {}, (self.name, 0))

        return label


def make_calculator(source: str, options: Mapping[str, Any]) -> Calculator:
    """An ASE calculator from ``MODULE.CLASS`` or ``FILE.py:MAKER``.

    Raises
    ------
    InputError
        There is no such class, or it does not take these options.
    """
    try:
        maker = _maker(source)
        return maker(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source} cannot be made into a calculator: {error}.",
            "Use ase:MODULE.CLASS,key=value or FILE.py:MAKER,key=value with the options that it has.",
        ) from error


def _maker(source: str) -> Callable[..., Calculator]:
    path, colon, name = source.rpartition(":")
    if colon:
        if not path.endswith(".py") or not Path(path).is_file():
            raise InputError(f"There is no Python file {path}.", "Use FILE.py:MAKER.")
        module = load_module(path)
    else:
        package, _, name = source.rpartition(".")
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise ProgramError(
                f"{source} cannot be imported: {error}.", _how_to_install(package.partition(".")[0])
            ) from error
    return getattr(module, name)


def _how_to_install(package: str) -> str:
    if package == "tblite":
        return "pip install 'nnqmd-server[tblite]'"
    return f"Install the package that {package} is in."


def _version(source: str) -> str:
    path, colon, _ = source.rpartition(":")
    if colon:
        try:
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}).", "Use FILE.py:MAKER.") from error
    package = source.partition(".")[0]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ProgramError(f"{package} is not installed.", _how_to_install(package)) from error


def parse_code(text: str, **cp2k: Any) -> Code:
    """What follows ``--with``.

    Parameters
    ----------
    text : str
        ``cp2k``, ``tblite[,method=...]``, ``ase:MODULE.CLASS[,key=value]...`` or ``FILE.py:MAKER[,...]``.
    **cp2k
        For `find_cp2k`; read for CP2K only.

    Raises
    ------
    InputError, ProgramError
        It is none of these, or not installed.
    """
    if text == "cp2k":
        return find_cp2k(**cp2k)
    head, comma, rest = text.partition(",")
    if head == "tblite":
        source = "tblite.ase.TBLite"
    elif head.startswith("ase:") and "." in head[4:]:
        source = head[4:]
    elif head.partition(":")[0].endswith(".py") and head.partition(":")[2].isidentifier():
        source = head
    else:
        raise InputError(
            f"{text!r} is not a code that can label.",
            "Use cp2k, tblite, ase:MODULE.CLASS,key=value or FILE.py:MAKER.",
        )
    options = read(f"ase:{source}{comma}{rest}").options  # as nnqmd serve reads it
    if head == "tblite":
        # its table of every SCF step would fill the logs
        options = {"method": "GFN1-xTB", "verbosity": 0} | options
    return AseCode(source, tuple(options.items()), _version(source))


def find_cp2k(
    command: str = "",
    forces: Path | None = None,
    wannier: Path | None = None,
    with_wannier: bool = True,
    k_length: float | None = None,
    carriers: tuple[str, ...] = (),
    timeout: float = 3600.0,
    threads: int = 1,
) -> cp2k_run.Cp2k:
    """CP2K as it is installed here, with a user's inputs or ours.

    Raises
    ------
    ProgramError
        CP2K is not there or does not start.
    InputError
        An input cannot be used.
    """
    words = tuple(shlex.split(command)) if command else ("cp2k.psmp",)
    if not words or shutil.which(words[0]) is None:
        raise ProgramError(
            f"There is no program {words[0] if words else command!r}.",
            "Install CP2K (Debian, Ubuntu: apt-get install cp2k), or say how it is started with --command.",
        )
    if forces is None and k_length is None:
        k_length = K_LENGTH
    template = read_template(forces) if forces else shipped(FORCES)
    if not with_wannier:
        centres = ""
    elif wannier is None and forces is not None:
        raise InputError(
            "Your own CP2K input gives forces; the Wannier centres need one with the same functional.",
            "Give it with --wannier-input, or leave the centres out with --no-wannier.",
        )
    else:
        centres = read_template(wannier) if wannier else shipped(WANNIER)
    version = cp2k_run.version(words)
    return cp2k_run.Cp2k(words, version, template, centres, k_length, carriers, timeout, threads)
