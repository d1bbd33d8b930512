"""Read an i-PI input and prepare a copy of it that runs in another folder."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from ipi.utils.units import unit_to_internal, unit_to_user

from nnqmd_server.doors.template import read_numbers, to_numbers
from nnqmd_server.errors import InputError
from nnqmd_server.structures import Array

# The template of the direct door's PES: a file name inside i-PI's {key: value} dictionary.
_TEMPLATE = re.compile(r"""(\btemplate\s*:\s*["']?)([^\s,}"']+)""")


@dataclass(frozen=True)
class Trajectory:
    """One ``<trajectory>`` of the output: what is written, in which unit and how often [steps]."""

    filename: str
    quantity: str
    unit: str
    stride: int
    format: str


@dataclass(frozen=True)
class ForceField:
    """One ``<ffdirect>`` or ``<ffsocket>`` block.

    ``kind`` is "direct" or "socket"; ``mode`` is "unix", "inet" or "shm" for sockets, the name
    of the PES for direct ones.
    """

    name: str
    kind: str
    mode: str = ""
    address: str = ""
    port: int = 0
    batch_size: int = 1
    pes_path: str = ""


@dataclass(frozen=True)
class IpiInput:
    """What the house needs to know of an i-PI input; timestep in fs, temperature in K.

    ``first_step`` is not zero in a RESTART, whose ``n_steps`` counts from the very beginning.
    """

    path: Path
    prefix: str
    n_beads: int
    n_steps: int
    first_step: int
    timestep: float
    temperature: float
    force_fields: tuple[ForceField, ...]
    trajectories: tuple[Trajectory, ...]


def _number(node: ET.Element | None, family: str, unit: str, what: str, path: Path) -> float:
    """A number with i-PI's unit attribute (atomic units when absent), in the unit asked for."""
    if node is None or not (node.text or "").strip():
        raise InputError(f"{path} has no {what}.", f"Add <{what}> as the i-PI manual describes.")
    try:
        value = float(node.text or "")
    except ValueError:
        raise InputError(
            f"{path}: {what} is {(node.text or '').strip()!r}, not a number.", "Correct it."
        ) from None
    internal = value * unit_to_internal(family, node.get("units", ""), 1.0)
    return float(unit_to_user(family, unit, internal))


def _text(node: ET.Element, tag: str, default: str) -> str:
    found = node.find(tag)
    return default if found is None or found.text is None else found.text.strip()


def _force_field(node: ET.Element) -> ForceField:
    name = node.get("name", "")
    if node.tag == "ffdirect":
        return ForceField(
            name,
            "direct",
            mode=_text(node, "pes", ""),
            batch_size=int(_text(node, "batch_size", "1")),
            pes_path=_text(node, "pes_path", ""),
        )
    return ForceField(
        name,
        "socket",
        mode=node.get("mode", "inet").strip(),
        address=_text(node, "address", "localhost"),
        port=int(_text(node, "port", "65535")),
        batch_size=int(_text(node, "batch_size", "1")),
    )


def _trajectory(node: ET.Element) -> Trajectory:
    quantity, _, unit = (node.text or "").strip().partition("{")
    return Trajectory(
        node.get("filename", "").strip(),
        quantity.strip(),
        unit.rstrip("}").strip(),
        int(node.get("stride", "1")),
        node.get("format", "xyz").strip(),
    )


def _parse(path: Path) -> ET.Element:
    try:
        root = ET.parse(path).getroot()
    except FileNotFoundError:
        raise InputError(f"There is no input file {path}.", "Check the path.") from None
    except (OSError, ET.ParseError) as error:
        raise InputError(f"{path} cannot be read as XML: {error}.", "Correct the line named.") from error
    if root.tag != "simulation":
        raise InputError(
            f"{path} is not an i-PI input: it begins with <{root.tag}>.",
            "Give an input that begins with <simulation>.",
        )
    return root


def read_input(path: str | Path) -> IpiInput:
    """Read an i-PI input file.

    Parameters
    ----------
    path : str or Path
        The XML file.

    Returns
    -------
    IpiInput
        Beads, steps, timestep [fs], temperature [K], force fields and trajectories.

    Raises
    ------
    InputError
        The file is missing, is not an i-PI input, or lacks something that is needed.
    """
    path = Path(path)
    root = _parse(path)
    sized = [node for node in root.iter() if node.tag in {"initialize", "beads"} and node.get("nbeads")]
    output = root.find("output")
    prefix = "i-pi" if output is None else output.get("prefix", "i-pi").strip()
    timestep = root.find(".//dynamics/timestep")
    try:
        return IpiInput(
            path=path,
            prefix=prefix,
            n_beads=max([int(node.get("nbeads", "1")) for node in sized], default=1),
            n_steps=int(_text(root, "total_steps", "1000")),
            first_step=int(_text(root, "step", "0")),
            timestep=_number(timestep, "time", "femtosecond", "timestep", path),
            temperature=_number(
                root.find(".//ensemble/temperature"), "temperature", "kelvin", "temperature", path
            ),
            force_fields=tuple(
                _force_field(node) for node in root.iter() if node.tag in {"ffdirect", "ffsocket"}
            ),
            trajectories=tuple(
                _trajectory(node) for node in ([] if output is None else output.iter("trajectory"))
            ),
        )
    except ValueError as error:
        raise InputError(
            f"{path} holds something that is not a whole number: {error}.", "Correct it."
        ) from error


def read_elements(path: str | Path) -> Array:
    """Atomic numbers of the system, from the file that initialises it or from a RESTART's own list.

    Raises
    ------
    InputError
        The input names no structure, or one that cannot be read.
    """
    path = Path(path)
    root = _parse(path)
    for node in root.iter("file"):
        name = (node.text or "").strip()
        if node.get("mode", "").strip() in {"xyz", "pdb", "ase", "manual"} and name:
            return read_numbers(path.resolve().parent / name)
    names = root.find(".//beads/names")
    if names is not None and names.text:
        return to_numbers(names.text.replace("[", " ").replace("]", " ").replace(",", " ").split(), path)
    raise InputError(
        f"{path} has no <initialize><file mode='xyz'>, so the elements are not known.",
        "Initialise the system from an xyz file.",
    )


def write_run_copy(path: str | Path, folder: Path, steps: int | None = None) -> Path:
    """Write ``folder/input.xml``: the same input, with every file that it names as an absolute path.

    i-PI writes its output into the folder in which it is started, so a run in a folder of its own
    needs the files beside the original input under their full names.

    Parameters
    ----------
    path : str or Path
        The input.
    folder : Path
        Where the copy goes; must exist.
    steps : int, optional
        Another ``<total_steps>``.
    """
    path = Path(path)
    root = _parse(path)
    home = path.resolve().parent
    for node in root.iter():
        text = (node.text or "").strip()
        if text and len(text) < 1000 and not any(c in text for c in " \n[{") and (home / text).is_file():
            node.text = f" {home / text} "
        if node.tag == "parameters":
            node.text = _TEMPLATE.sub(lambda found: f"{found[1]}{home / found[2]}", node.text or "")
    if steps is not None:
        node = root.find("total_steps")
        if node is None:
            node = ET.SubElement(root, "total_steps")
        node.text = str(steps)
    copy = folder / "input.xml"
    ET.ElementTree(root).write(copy, encoding="unicode")
    return copy
