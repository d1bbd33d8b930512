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
    broken = "Use the file of a run that ended, or try --format dpdata:vasp/" + (
        "xml" if is_xml else "outcar"
    )
    try:
        frames = read(path, ":", format="vasp-xml" if is_xml else "vasp-out", parallel=False)
        text = path.read_text(errors="replace")
        stopped = _stopped_xml(path) if is_xml else _stopped(text)
    except (
        ValueError, KeyError, IndexError, OSError, AttributeError, AssertionError, ParseError,
        ElementTree.ParseError,
    ) as error:  # fmt: skip
        raise DataError(f"{path} cannot be read as VASP's: {error}.", broken + ".") from error
    made = []
    for number, frame in enumerate(frames):
        results = frame.calc.results if frame.calc is not None else {}
        if "forces" not in results or not {"free_energy", "energy"} & set(results):
            raise bad_frame(path, number, "lacks energy or forces", broken + ".")
        if number < len(stopped) and stopped[number]:
            raise bad_frame(
                path,
                number,
                "is not converged: its electronic steps ended at NELM",
                "Compute it again with a higher NELM, or leave it out.",
            )
        info = {GROUP: group, SOURCE: f"{group}_f{number:06d}", "label_code": _version(text)}
        stress = frame.get_stress(voigt=False) if "stress" in results else None
        energy = results.get("free_energy", results.get("energy"))
        made.append(labelled(frame, energy, results["forces"], stress, info, (path, number)))
    return made


def _stopped_xml(path: Path) -> list[bool]:
    """Whether the electrons of each ionic step took all NELM steps: the file does not say more."""
    steps, limit = [], 0
    for _, element in ElementTree.iterparse(path):
        if element.tag == "calculation":
            steps.append(len(element.findall("scstep")))
            element.clear()
        elif element.tag == "i" and element.get("name") == "NELM" and element.text and not limit:
            limit = int(element.text)  # the first one; that of the response functions comes later
    return [limit > 1 and count >= limit for count in steps]


def _stopped(text: str) -> list[bool]:
    found = re.search(r"NELM\s*=\s*(\d+)", text)
    limit = int(found[1]) if found else 0
    marks = list(re.finditer(r"-+ Iteration\s+(\d+)\(\s*(\d+)\)", text))
    last: dict[int, bool] = {}
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        part = text[mark.end() : following.start() if following else len(text)]
        at_limit = bool(limit) and int(mark[2]) >= limit and "EDIFF is reached" not in part
        last[int(mark[1])] = at_limit or "EDIFF was not reached" in part
    return [last[step] for step in sorted(last)]


def _version(text: str) -> str:
    found = re.search(r'<i name="version"[^>]*>\s*(\S+)|^\s*vasp\.(\S+)', text, re.MULTILINE)
    return f"VASP {found[1] or found[2]}" if found else "VASP"
