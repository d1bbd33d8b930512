"""Which forces of an i-PI input we compute, and with which potential.

i-PI tells a force field neither the system nor the ``<force>`` that a structure belongs to, and threads of
several systems fill its queue in any order. So in the copy of the input that is run every ``<force>`` of
every ``<system>`` asks a force field of its own: where several share one, it is doubled. Each door then has
one list of elements, one number of beads and one record of dipoles, batches of different systems are
computed side by side, and i-PI computes the same: it keeps no forces that two of them could share.
"""

from __future__ import annotations

import copy
import re
import socket
import xml.etree.ElementTree as ET
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnqmd_server.doors.template import read_numbers
from nnqmd_server.errors import InputError
from nnqmd_server.inputs.xml import Force, ForceField, IpiInput, describe, elements_of, read_parameters
from nnqmd_server.structures import Array


@dataclass(frozen=True)
class Part:
    """What one door answers: a force on one system, from one potential.

    ``numbers`` are the atomic numbers of the atoms that i-PI sends, shape (n_atoms,); ``system`` counts
    from 0.
    """

    field: ForceField
    force: Force
    system: int
    potential: str
    numbers: Array

    @property
    def name(self) -> str:
        """Name of the force field, fit for a file name."""
        return _plain(self.field.name) or self.field.kind


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)


def separate(root: ET.Element, path: Path, leave: Collection[str] = ()) -> None:
    """Give every force its own force field, of those that we answer.

    Parameters
    ----------
    root : Element
        The input; changed.
    path : Path
        Where it was read.
    leave : collection of str
        Names of force fields that somebody else answers.

    Raises
    ------
    InputError
        A committee or an average over rotations is shared, or systems have the same prefix.
    """
    plan = describe(root, path)
    _check_prefixes(plan)
    systems = root.findall("system")
    for field in _ours(plan, leave):
        asking = [
            (index, node)
            for index, system in enumerate(systems)
            for node in [*system.iterfind("forces/force"), *system.iterfind("ensemble/bias/force")]
            if node.get("forcefield", "").strip() == field.asked_as
        ]
        if len(asking) < 2:
            continue
        if field.around:
            raise InputError(
                f"{len(asking)} forces ask the <{field.around} name='{field.asked_as}'> of {path}, whose"
                " members could not tell them apart.",
                f"Give each <force> a <{field.around}> of its own.",
            )
        block = next(node for node in root if node.get("name", "").strip() == field.name)
        place = list(root).index(block)
        root.remove(block)
        names = _labels(plan, [index for index, _ in asking], [node for _, node in asking])
        for copy_number, ((index, node), label) in enumerate(zip(asking, names, strict=True)):
            n_beads = min(int(node.get("nbeads", "0")) or 10**6, plan.systems[index].n_beads)
            own = _double(block, label, n_beads, copy_number)
            node.set("forcefield", own.get("name"))
            root.insert(place + copy_number, own)


def _check_prefixes(plan: IpiInput) -> None:
    prefixes = [system.prefix for system in plan.systems]
    if len(set(prefixes)) < len(prefixes):
        raise InputError(
            f"The {len(prefixes)} systems of {plan.path} would write into the same files.",
            "Give each its own name: <system prefix='a'>, <system prefix='b'>.",
        )


def _labels(plan: IpiInput, systems: Sequence[int], forces: Sequence[ET.Element]) -> list[str]:
    """What tells forces apart: the prefix of the system, and the name or number of the force in it."""
    labels = []
    for k, (index, node) in enumerate(zip(systems, forces, strict=True)):
        words = []
        if len(set(systems)) > 1:
            words.append(plan.systems[index].prefix or f"system{index + 1}")
        if systems.count(index) > 1:
            words.append(node.get("name", "").strip() or f"force{1 + systems[:k].count(index)}")
        label = _plain("-".join(words))
        labels.append(label if label not in labels else f"{label}-{k + 1}")
    return labels


def _double(block: ET.Element, label: str, n_beads: int, number: int) -> ET.Element:
    """A force field of the same kind under another name, and where nobody else listens."""
    own = copy.deepcopy(block)
    own.set("name", f"{block.get('name', '').strip()}-{label}")
    size, address, port = own.find("batch_size"), own.find("address"), own.find("port")
    if size is not None and int(size.text) > 1:
        size.text = str(n_beads)
    elif size is None and own.tag == "ffdirect":
        ET.SubElement(own, "batch_size").text = str(n_beads)
    if own.tag == "ffsocket" and own.get("mode", "inet").strip() == "inet":
        if number:
            port = ET.SubElement(own, "port") if port is None else port
            port.text = str(_free_port())
    elif own.tag == "ffsocket" and address is not None:
        address.text = f"{(address.text or '').strip()}-{label}"
    if own.tag == "ffdirect":
        parameters = read_parameters(own)
        parameters.pop("template", None)  # each system has its own
        record = Path(parameters.get("dipoles", "none"))
        if record.name != "none":
            parameters["dipoles"] = str(record.with_name(f"{record.stem}-{label}{record.suffix}"))
        _write_parameters(own, parameters)
    return own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def find_parts(
    root: ET.Element, path: Path, potentials: Collection[str], leave: Collection[str] = ()
) -> list[Part]:
    """The parts of the forces that we answer, of an input that has been through :func:`separate`.

    Parameters
    ----------
    root : Element
        The input.
    path : Path
        Where it was read.
    potentials : collection of str
        Names of the potentials that there are.
    leave : collection of str
        Names of force fields that somebody else answers.

    Raises
    ------
    InputError
        There is none, one is set up so that it would be slow or never answered, or it is not clear which
        potential it asks for.
    """
    plan = describe(root, path)
    systems = root.findall("system")
    parts = []
    for field in _ours(plan, leave):
        for index, system in enumerate(plan.systems):
            for force in system.forces:
                if force.asks == field.asked_as:
                    numbers = _sent(field, elements_of(systems[index], path), path)
                    potential = _potential(field, potentials)
                    _check(field, force, numbers, path)
                    parts.append(Part(field, force, index, potential, numbers))
    if not parts:
        raise InputError(
            f"{path} has no force field that nnqmd can answer.",
            "Add <ffdirect> with <pes>custom</pes> and the nnqmd_pes.py of ipi_inputs/, an <ffsocket> or an"
            " <ffmpi>, and name it in <forces>.",
        )
    return parts


def check_all_are_asked(parts: Sequence[Part], potentials: Collection[str], path: Path) -> None:
    """Refuse potentials that no force field asks for: a name is probably misspelt."""
    unused = sorted(set(potentials) - {part.potential for part in parts})
    if unused:
        raise InputError(
            f"No force field of {path} asks for the potential {', '.join(unused)}.",
            "Name it as the force field is: "
            + ", ".join(f"--model {part.field.name}=MODEL" for part in parts),
        )


def _ours(plan: IpiInput, leave: Collection[str]) -> list[ForceField]:
    names = {field.name for field in plan.force_fields}
    unknown = sorted(set(leave) - names)
    if unknown:
        raise InputError(
            f"{plan.path} has no force field {', '.join(unknown)} to leave alone.",
            f"It has {', '.join(sorted(names))}.",
        )
    return [
        field
        for field in plan.force_fields
        if not {field.name, field.asked_as} & set(leave)
        and (field.kind != "direct" or _is_our_pes(field, plan))
    ]


def _is_our_pes(field: ForceField, plan: IpiInput) -> bool:
    if field.mode != "custom":
        return False
    try:
        return "nnqmd_server" in (plan.path.resolve().parent / field.pes_path).read_text()
    except OSError as error:
        raise InputError(
            f"{plan.path} names the PES {field.pes_path}, which cannot be read: {error}.",
            "Correct <pes_path>.",
        ) from error


def _potential(field: ForceField, potentials: Collection[str]) -> str:
    named = field.parameters.get("potential")
    if named and named not in potentials:
        raise InputError(
            f"The force field {field.name} asks for the potential {named}; there is {', '.join(potentials)}.",
            f"Give it: --model {named}=MODEL",
        )
    if named:
        return named
    if field.name in potentials:
        return field.name
    if len(potentials) == 1:
        return next(iter(potentials))
    # A force field that was doubled is called NAME-WHICH, in its RESTART as well.
    fitting = [name for name in potentials if field.name.startswith(f"{name}-")]
    if fitting:
        return max(fitting, key=len)
    raise InputError(
        f"Which potential is the force field {field.name or 'without a name'} to ask: "
        f"{', '.join(potentials)}?",
        f"Name one like the force field (--model {field.name or 'NAME'}=MODEL), or, in <ffdirect>, say"
        " `potential` in <parameters>; --leave NAME for a force field that somebody else answers.",
    )


def _sent(field: ForceField, numbers: Array, path: Path) -> Array:
    """Atomic numbers of the atoms that this force field is sent."""
    if not field.active or field.kind != "socket":  # i-PI heeds activelist in sockets only
        return numbers
    if max(field.active) >= len(numbers) or min(field.active) < 0:
        raise InputError(
            f"The <activelist> of the force field {field.name} in {path} has atoms that the system of"
            f" {len(numbers)} atoms has not.",
            "Atoms count from 0.",
        )
    return numbers[list(field.active)]


def _check(field: ForceField, force: Force, numbers: Array, path: Path) -> None:
    if field.batch_size < 1:
        raise InputError(f"<batch_size> is {field.batch_size}.", "Set it to the number of beads.")
    if field.kind == "socket" and field.mode not in {"unix", "inet", "shm"}:
        raise InputError(
            f"The <ffsocket> has mode {field.mode!r}.",
            "Use mode='unix', 'inet' or 'shm', or the direct door (<ffdirect>).",
        )
    if field.kind != "direct" or field.around == "ffrotations":
        return
    if field.batch_size != force.n_beads:
        whose = "the simulation has" if not force.name else f"the force {force.name} has"
        raise InputError(
            f"<batch_size> of {field.name or 'the <ffdirect>'} is {field.batch_size} and {whose}"
            f" {force.n_beads} beads.",
            f"Set <batch_size>{force.n_beads}</batch_size>, so that i-PI asks for all beads at once.",
        )
    templates = field.parameters.get("template", "").split()
    sizes = {len(read_numbers(path.resolve().parent / file)) for file in templates}
    if sizes and len(numbers) not in sizes:
        told = " or ".join(str(size) for size in sorted(sizes))
        raise InputError(
            f"The template {', '.join(templates)} has {told} atoms, the system has {len(numbers)}.",
            "Use the file that initialises the system as the template.",
        )


def equip(root: ET.Element, parts: Sequence[Part], records: Sequence[Path | None], folder: Path) -> None:
    """Tell our direct doors what they need, in the copy that is run.

    Parameters
    ----------
    root : Element
        The input; changed.
    parts : sequence of Part
        The parts of its forces, see :func:`find_parts`.
    records : sequence of Path or None
        For each part, where its dipoles go.
    folder : Path
        Where templates are written that the input does not name.
    """
    blocks = {node.get("name", "").strip(): node for node in root.iter("ffdirect")}
    for part, record in zip(parts, records, strict=True):
        if part.field.kind != "direct":
            continue
        block = blocks[part.field.name]
        parameters = read_parameters(block) | {"potential": part.potential}
        if part.field.around != "ffrotations":
            parameters["beads"] = str(part.force.n_beads)
        if len(parameters.get("template", "").split()) != 1:
            parameters["template"] = str(write_template(part, folder))
        parameters.setdefault("dipoles", record.name if record else "none")
        _write_parameters(block, parameters)


def write_template(part: Part, folder: Path) -> Path:
    """A structure file that tells the elements of a part; nothing but these is meant by it."""
    from ase.data import chemical_symbols

    path = folder.resolve() / f"template-{part.name}.xyz"
    rows = [f"{chemical_symbols[z]} 0 0 0" for z in part.numbers]
    path.write_text("\n".join([str(len(rows)), "elements only", *rows]) + "\n")
    return path


def _write_parameters(block: ET.Element, parameters: dict[str, str]) -> None:
    node = block.find("parameters")
    if node is None:
        node = ET.SubElement(block, "parameters")
    node.text = "{" + ", ".join(f"{key}: {value}" for key, value in parameters.items()) + "}"


def records_of(parts: Sequence[Part], plan: IpiInput, with_dipoles: Collection[str]) -> list[Path | None]:
    """File names for the dipoles of each part; None where they are not kept.

    They are kept where the potential has them and is asked once in a step, so that a force set is a step.
    The only one with all beads of the only system is ``dipoles.h5``, which ``nnqmd spectrum`` reads.

    Parameters
    ----------
    parts : sequence of Part
        The parts.
    plan : IpiInput
        The input.
    with_dipoles : collection of str
        Potentials that give dipoles.
    """
    kept = [
        part.potential in with_dipoles and part.force.per_step == 1 and part.field.around != "ffrotations"
        for part in parts
    ]
    whole = [
        k
        for k, part in enumerate(parts)
        if kept[k] and part.force.n_beads == plan.systems[part.system].n_beads
    ]
    alone = whole[0] if len(whole) == 1 and len(plan.systems) == 1 else None
    return [
        Path("dipoles.h5" if k == alone else f"dipoles-{part.name}.h5") if keep else None
        for k, (part, keep) in enumerate(zip(parts, kept, strict=True))
    ]
