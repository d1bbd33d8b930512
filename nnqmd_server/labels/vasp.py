"""VASP's vasprun.xml and OUTCAR, through ASE.

Energies are VASP's free energy (TOTEN, ``e_fr_energy``), of which its forces are the derivatives; the
energy extrapolated to zero smearing is not consistent with them.
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from ase import Atoms
from ase.io import ParseError, read

from nnqmd_server.errors import DataError
from nnqmd_server.labels.frames import GROUP, SOURCE, bad_frame, labelled


def read_vasp(path: Path, group: str) -> list[Atoms]:
    """All ionic steps of a vasprun.xml or OUTCAR.

    Raises
    ------
    DataError
        The file cannot be read, or the electrons of a step did not converge.
    """
    is_xml = path.suffix == ".xml"
    broken = "Use the file of a run that ended, or leave its last step out."
    try:
        frames = read(path, ":", format="vasp-xml" if is_xml else "vasp-out", parallel=False)
        text = path.read_text(errors="replace")
        steps, limit = _electronic_steps_xml(path) if is_xml else _electronic_steps(text)
    except (
        ValueError, KeyError, IndexError, OSError, AttributeError, AssertionError, ParseError,
        ElementTree.ParseError,
    ) as error:  # fmt: skip
        raise DataError(f"{path} cannot be read as VASP's: {error}.", broken) from error
    made = []
    for number, frame in enumerate(frames):
        results = frame.calc.results if frame.calc is not None else {}
        if "forces" not in results or not {"free_energy", "energy"} & set(results):
            raise bad_frame(path, number, "lacks energy or forces", broken)
        if limit and number < len(steps) and steps[number] >= limit:
            raise bad_frame(
                path,
                number,
                f"is not converged: it took all {limit} electronic steps (NELM)",
                "Compute it again with a higher NELM, or leave it out.",
            )
        info = {GROUP: group, SOURCE: f"{group}_f{number:06d}", "label_code": _version(text)}
        stress = frame.get_stress(voigt=False) if "stress" in results else None
        energy = results.get("free_energy", results.get("energy"))
        made.append(labelled(frame, energy, results["forces"], stress, info, (path, number)))
    return made


def _electronic_steps_xml(path: Path) -> tuple[list[int], int]:
    steps, limit = [], 0
    for _, element in ElementTree.iterparse(path):
        if element.tag == "calculation":
            steps.append(len(element.findall("scstep")))
            element.clear()
        elif element.tag == "i" and element.get("name") == "NELM" and element.text:
            limit = int(element.text)
    return steps, limit


def _electronic_steps(text: str) -> tuple[list[int], int]:
    last: dict[int, int] = {}
    for ionic, electronic in re.findall(r"-+ Iteration\s+(\d+)\(\s*(\d+)\)", text):
        last[int(ionic)] = int(electronic)
    limit = re.search(r"NELM\s*=\s*(\d+)", text)
    return [last[k] for k in sorted(last)], int(limit[1]) if limit else 0


def _version(text: str) -> str:
    found = re.search(r'<i name="version"[^>]*>\s*(\S+)|^\s*vasp\.(\S+)', text, re.MULTILINE)
    return f"VASP {found[1] or found[2]}" if found else "VASP"
