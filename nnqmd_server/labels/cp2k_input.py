"""CP2K inputs: a user's own file, with the structure put in and with what must be printed switched on."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.cp2k import InputSection, parse_input

from nnqmd_server.errors import InputError

FORCES, WANNIER = "cp2k_forces.inp", "cp2k_wannier.inp"
K_LENGTH = 10.0
"""Length of k-points x cell [Angstrom] of our own input: 2 x 2 x 2 for cells of 5 to 10 Angstrom."""


def shipped(name: str) -> str:
    """The text of one of our own inputs."""
    return files("nnqmd_server.labels").joinpath(name).read_text()


def read_template(path: Path) -> str:
    """The text of a user's input.

    Raises
    ------
    InputError
        It cannot be read, is no CP2K input, or needs other files or CP2K's preprocessor.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.", "Give an input file of CP2K.") from error
    if re.search(r"^\s*@(IF|ENDIF|INCLUDE|XCTYPE)", text, re.MULTILINE | re.IGNORECASE):
        raise InputError(
            f"{path} uses @IF or @INCLUDE, which `nnqmd label` does not follow.",
            "Write the file out: the section that CP2K would see.",
        )
    if _find(_parse(text), "FORCE_EVAL") is None:
        raise InputError(f"{path} has no &FORCE_EVAL: it is not an input of CP2K.", "Give one that runs.")
    return text


def forces_input(template: str, atoms: Atoms, project: str, k_length: float | None) -> str:
    """Input for energy, forces and stress; ``k_length`` as in `with_k_points`, None to keep the mesh."""
    tree = _with_structure(template, atoms, project)
    _set(tree, "GLOBAL", "RUN_TYPE ENERGY_FORCE")
    evaluation = tree.get_subsection("FORCE_EVAL")
    if not any(k.split()[0].upper() == "STRESS_TENSOR" for k in evaluation.keywords):
        evaluation.keywords.append("STRESS_TENSOR ANALYTICAL")
    printing = evaluation.get_subsection("PRINT")
    for name, keywords in (("FORCES", ["NDIGITS 10"]), ("STRESS_TENSOR", [])):
        section = printing.get_subsection(name)
        section.params, section.keywords, section.subsections = "ON", keywords, []
    if k_length is not None:
        with_k_points(tree, atoms, k_length)
    return _text(tree)


def wannier_input(template: str, atoms: Atoms, project: str, stride: int) -> str:
    """Input for Wannier centres, which are written as cube files with this stride.

    Raises
    ------
    InputError
        The template has k-points: CP2K localises at Gamma only.
    """
    tree = _with_structure(template, atoms, project)
    if _find(tree, "FORCE_EVAL/DFT/KPOINTS") is not None:
        raise InputError(
            "The input for Wannier centres has &KPOINTS; CP2K localises orbitals at Gamma only.",
            "Remove &KPOINTS from it. Forces may have k-points: they have an input of their own.",
        )
    printing = tree.get_subsection("FORCE_EVAL/DFT/LOCALIZE/PRINT")
    for name, keywords in (
        ("WANNIER_CENTERS", ["IONS+CENTERS", f"FILENAME ={project}-wan.xyz"]),
        # more than there are orbitals: CP2K stops at the last
        ("WANNIER_CUBES", [f"CUBES_LU_BOUNDS 1 {40 * len(atoms)}", f"STRIDE {stride} {stride} {stride}"]),
    ):
        section = printing.get_subsection(name)
        section.params, section.keywords, section.subsections = None, keywords, []
    return _text(tree)


def with_k_points(tree: InputSection, atoms: Atoms, length: float) -> None:
    """A Monkhorst-Pack mesh of n points along each axis, n x (height of the cell) >= ``length`` [Angstrom].

    So all cells of a data set are equally well converged; a mesh of one point becomes CP2K's Gamma code.
    """
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    mesh = [max(1, math.ceil(length / height - 1e-6)) for height in heights]
    dft = tree.get_subsection("FORCE_EVAL/DFT")
    if mesh == [1, 1, 1]:
        dft.subsections = [s for s in dft.subsections if s.name != "KPOINTS"]
        return
    points = dft.get_subsection("KPOINTS")
    points.keywords = [k for k in points.keywords if k.split()[0].upper() not in {"SCHEME", "KPOINT"}]
    points.keywords.insert(0, "SCHEME MONKHORST-PACK {} {} {}".format(*mesh))


def _with_structure(template: str, atoms: Atoms, project: str) -> InputSection:
    tree = _parse(template)
    settings = tree.get_subsection("GLOBAL")
    settings.keywords = [
        k for k in settings.keywords if k.split()[0].upper() not in {"PROJECT", "PROJECT_NAME"}
    ]
    settings.keywords.insert(0, f"PROJECT {project}")
    subsystem = tree.get_subsection("FORCE_EVAL/SUBSYS")
    kinds = {(s.params or "").upper() for s in subsystem.subsections if s.name == "KIND"}
    missing = sorted({s for s in atoms.symbols if s.upper() not in kinds})
    if missing and "DEFAULT" not in kinds:
        raise InputError(
            f"The CP2K input has no &KIND for {', '.join(missing)}.",
            "Add &KIND with BASIS_SET and POTENTIAL for every element, or &KIND DEFAULT.",
        )
    # a user's CELL, COORD and TOPOLOGY are of another structure
    kept = [s for s in subsystem.subsections if s.name not in {"CELL", "COORD", "TOPOLOGY"}]
    cell, places = InputSection("CELL"), InputSection("COORD")
    cell.keywords = [_row(name, vector) for name, vector in zip("ABC", atoms.cell.array, strict=True)]
    cell.keywords.append("PERIODIC XYZ")
    places.keywords = [_row(*row) for row in zip(atoms.symbols, atoms.positions, strict=True)]
    subsystem.subsections = [cell, places, *kept]
    return tree


def _row(name: str, vector: np.ndarray) -> str:
    return f"{name} " + " ".join(f"{x:.10f}" for x in vector)


def _parse(text: str) -> InputSection:
    # ASE's parser knows only ! as the sign of a comment
    return parse_input("\n".join(line.split("#", 1)[0].replace("\t", " ") for line in text.splitlines()))


def _text(tree: InputSection) -> str:
    return "\n".join(tree.write()) + "\n"


def _find(tree: InputSection, path: str) -> InputSection | None:
    section: InputSection | None = tree
    for name in path.split("/"):
        section = next((s for s in section.subsections if s.name == name), None) if section else None
    return section


def _set(tree: InputSection, path: str, line: str) -> None:
    section = tree.get_subsection(path)
    key = line.split()[0]
    section.keywords = [k for k in section.keywords if k.split()[0].upper() != key]
    section.keywords.append(line)
