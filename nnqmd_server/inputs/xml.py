"""Read an i-PI input and prepare a copy of it that runs in another folder."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ipi.utils.units import unit_to_internal, unit_to_user

from nnqmd_server.doors.template import read_numbers, to_numbers
from nnqmd_server.errors import InputError
from nnqmd_server.structures import Array

_KINDS = ("ffdirect", "ffsocket", "ffmpi")

# The templates of the direct door's PES: file names inside i-PI's {key: value} dictionary.
_TEMPLATE = re.compile(r"""(\btemplate\s*:\s*)["']?([^,}"']+)["']?""")


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
    """One ``<ffdirect>``, ``<ffsocket>`` or ``<ffmpi>`` block.

    ``kind`` is "direct", "socket" or "mpi"; ``mode`` is "unix", "inet" or "shm" for sockets, the name
    of the PES for direct ones. ``around`` is the tag of the block that it is a member of
    ("ffcommittee", "ffrotations"), and ``asked_as`` the name of that block or else its own: what a
    ``<force>`` says. ``active`` are the atoms that are sent; all unless given.
    """

    name: str
    kind: str
    mode: str = ""
    address: str = ""
    port: int = 0
    batch_size: int = 1
    pes_path: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    active: tuple[int, ...] = ()
    around: str = ""
    asked_as: str = ""


@dataclass(frozen=True)
class Force:
    """One ``<force>`` of a system: whom it asks, for how many beads, and how often in a step.

    ``per_step`` counts the force sets of a step of dynamics: more than one on an inner level of
    multiple time stepping, none when the weight is zero.
    """

    asks: str
    n_beads: int
    per_step: int
    name: str = ""


@dataclass(frozen=True)
class System:
    """One ``<system>``: the prefix of its files, its beads, and the forces on it."""

    prefix: str
    n_beads: int
    forces: tuple[Force, ...]


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
    systems: tuple[System, ...]
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


def read_parameters(node: ET.Element) -> dict[str, str]:
    """The ``<parameters>`` of a force field, ``{key: value, ...}``, as text."""
    pairs = _text(node, "parameters", "").strip("{} \n\t").split(",")
    split = (pair.partition(":") for pair in pairs if pair.strip())
    return {key.strip(): value.strip().strip("\"'") for key, _, value in split}


def _force_field(node: ET.Element, parent: ET.Element) -> ForceField:
    name = node.get("name", "").strip()
    inside = parent.tag != "simulation"
    common = {
        "batch_size": int(_text(node, "batch_size", "1")),
        "parameters": read_parameters(node),
        "active": _active(node),
        "around": parent.tag if inside else "",
        "asked_as": parent.get("name", "").strip() if inside else name,
    }
    if node.tag == "ffdirect":
        pes, path = _text(node, "pes", ""), _text(node, "pes_path", "")
        return ForceField(name, "direct", mode=pes, pes_path=path, **common)
    if node.tag == "ffmpi":
        return ForceField(name, "mpi", mode=node.get("mode", "mpi").strip(), **common)
    return ForceField(
        name,
        "socket",
        mode=node.get("mode", "inet").strip(),
        address=_text(node, "address", "localhost"),
        port=int(_text(node, "port", "65535")),
        **common,
    )


def _active(node: ET.Element) -> tuple[int, ...]:
    found = tuple(int(atom) for atom in _list(_text(node, "activelist", "")))
    return () if -1 in found else found


def _list(text: str) -> list[str]:
    """The words of i-PI's ``[ a, b ]``."""
    return text.replace("[", " ").replace("]", " ").replace(",", " ").split()


def _system(node: ET.Element) -> System:
    sized = [n for n in node.iter() if n.tag in {"initialize", "beads"} and n.get("nbeads")]
    n_beads = max([int(n.get("nbeads", "1")) for n in sized], default=1)
    substeps = [int(n) for n in _list(node.findtext(".//dynamics/nmts", ""))] or [1]
    forces = [_force(force, n_beads, substeps) for force in node.iterfind("forces/force")]
    # A bias acts on the outermost level, whatever its weights.
    forces += [_force(force, n_beads, substeps[:1]) for force in node.iterfind("ensemble/bias/force")]
    return System(node.get("prefix", "").strip(), n_beads, tuple(forces))


def _force(node: ET.Element, n_beads: int, substeps: Sequence[int]) -> Force:
    weights = [float(w) for w in _list(_text(node, "mts_weights", ""))] or [1.0]
    levels = [level for level, weight in enumerate(weights[: len(substeps)]) if weight != 0.0]
    asked = bool(levels) and float(node.get("weight", "1")) != 0.0
    return Force(
        node.get("forcefield", "").strip(),
        min(int(node.get("nbeads", "0")) or n_beads, n_beads),
        # Positions move on the innermost level; a force is asked for where its own innermost level kicks.
        math.prod(substeps[: levels[-1] + 1]) if asked else 0,
        node.get("name", "").strip(),
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


def parse(path: Path) -> ET.Element:
    """The XML of an i-PI input, with every ``<system_template>`` as the systems that it stands for.

    Raises
    ------
    InputError
        The file is missing, or is not an i-PI input.
    """
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
    for node in root.findall("system_template"):
        place = list(root).index(node)
        root.remove(node)
        root[place:place] = _instances(node, path)
    return root


def _instances(node: ET.Element, path: Path) -> list[ET.Element]:
    """The systems of a ``<system_template>``, as i-PI makes them: each label is replaced by its value."""
    template = node.find("template")
    text = "" if template is None else "".join(ET.tostring(child, encoding="unicode") for child in template)
    labels = _list(_text(node, "labels", ""))
    systems = []
    for instance in node.findall("instance"):
        values = _list(instance.text or "")
        if len(values) != len(labels):
            raise InputError(
                f"{path}: an <instance> of the <system_template> has {len(values)} values for {len(labels)}"
                " labels.",
                "Give one value for each label.",
            )
        filled = text
        for label, value in sorted(zip(labels, values, strict=True), reverse=True):
            filled = filled.replace(label, value)
        try:
            systems.append(ET.fromstring(filled))
        except ET.ParseError as error:
            raise InputError(
                f"{path}: the <system_template> is no <system> once it is filled in: {error}.", "Correct it."
            ) from error
    return systems


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
    return describe(parse(path), path)


def describe(root: ET.Element, path: Path) -> IpiInput:
    """What an input says that has been parsed; see :func:`read_input`."""
    output = root.find("output")
    prefix = "i-pi" if output is None else output.get("prefix", "i-pi").strip()
    timestep = root.find(".//dynamics/timestep")
    try:
        systems = tuple(_system(node) for node in root.findall("system"))
        return IpiInput(
            path=path,
            prefix=prefix,
            n_beads=max([system.n_beads for system in systems], default=1),
            n_steps=int(_text(root, "total_steps", "1000")),
            first_step=int(_text(root, "step", "0")),
            timestep=_number(timestep, "time", "femtosecond", "timestep", path),
            temperature=_number(
                root.find(".//ensemble/temperature"), "temperature", "kelvin", "temperature", path
            ),
            force_fields=tuple(
                _force_field(node, parent) for parent in root.iter() for node in parent if node.tag in _KINDS
            ),
            systems=systems,
            trajectories=tuple(
                _trajectory(node) for node in ([] if output is None else output.iter("trajectory"))
            ),
        )
    except ValueError as error:
        raise InputError(
            f"{path} holds something that is not a whole number: {error}.", "Correct it."
        ) from error


def read_elements(path: str | Path, system: int = 0) -> Array:
    """Atomic numbers of a system, from the file that initialises it or from a RESTART's own list.

    Parameters
    ----------
    path : str or Path
        The input.
    system : int
        Which of its systems, from 0 on.

    Raises
    ------
    InputError
        The input names no structure, or one that cannot be read.
    """
    path = Path(path)
    root = parse(path)
    return elements_of(root.findall("system")[system] if system else root, path)


def elements_of(node: ET.Element, path: Path) -> Array:
    """Atomic numbers of the first system in a part of an input; see :func:`read_elements`."""
    for file in node.iter("file"):
        name, mode = (file.text or "").strip(), file.get("mode", "").strip()
        if mode in {"xyz", "pdb", "ase", "manual"} and name:
            return read_numbers(path.resolve().parent / name)
        if mode == "chk" and name:
            return read_elements(path.resolve().parent / name)
    names = node.find(".//beads/names")
    if names is not None and names.text:
        return to_numbers(_list(names.text), path)
    raise InputError(
        f"{path} has no <initialize><file mode='xyz'>, so the elements are not known.",
        "Initialise the system from an xyz file.",
    )


def with_full_paths(root: ET.Element, path: Path) -> None:
    """Give every file that an input names as an absolute path.

    i-PI writes its output into the folder in which it is started, so a run in a folder of its own
    needs the files beside the original input under their full names.

    Parameters
    ----------
    root : Element
        The input; changed.
    path : Path
        Where it was read.
    """
    home = path.resolve().parent
    for node in root.iter():
        text = (node.text or "").strip()
        if text and len(text) < 1000 and not any(c in text for c in " \n[{") and (home / text).is_file():
            node.text = f" {home / text} "
        if node.tag == "parameters":
            node.text = _TEMPLATE.sub(
                lambda found: found[1] + " ".join(str(home / file) for file in found[2].split()),
                node.text or "",
            )


def set_steps(root: ET.Element, steps: int) -> None:
    """Give an input another ``<total_steps>``."""
    node = root.find("total_steps")
    if node is None:
        node = ET.SubElement(root, "total_steps")
    node.text = str(steps)
