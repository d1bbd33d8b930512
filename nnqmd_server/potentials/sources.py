"""Sources that begin with a word and a colon: other programs' potentials, and potentials made of potentials.

``ase:MODULE.CLASS``, ``ipi:DRIVER``, ``deepmd:FILE`` and ``torchsim:MODULE:MAKER``, each followed by as many
``,key=value`` as it takes; ``sum:`` and ``committee:`` followed by sources, separated by commas. A
``key=value`` belongs to the source before it. Only text is read here: nothing is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import Card
from nnqmd_server.potentials.composites import card_of as composite_card
from nnqmd_server.potentials.package import file_hash

ADAPTERS = ("ase", "ipi", "deepmd", "torchsim")
COMPOSITES = ("sum", "committee")

_OPTION = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_WEIGHT = re.compile(r"(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\*(?P<source>.+)", re.DOTALL)
_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "'\""
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Foreign:
    """A source of another program.

    Parameters
    ----------
    kind : str
        One of ``ADAPTERS``.
    what : str
        A class, a driver, a file or a maker.
    options : dict
        What follows it.
    """

    kind: str
    what: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Composite:
    """A source made of sources: ``sum`` or ``committee``, the members' sources, and the weight of each."""

    kind: str
    members: tuple[str, ...]
    weights: tuple[float, ...]


def is_prefixed(source: str) -> bool:
    """Whether a source (without its interpreter) is one of these."""
    kind, colon, rest = source.partition(":")
    return bool(colon and rest) and kind in ADAPTERS + COMPOSITES


def read(source: str) -> Foreign | Composite:
    """What a source says.

    Parameters
    ----------
    source : str
        One for which :func:`is_prefixed` is true.

    Raises
    ------
    InputError
        It cannot be read.
    """
    kind, _, rest = source.partition(":")
    pieces = _split(rest, source)
    if kind in ADAPTERS:
        return _read_foreign(kind, pieces, source)
    members: list[str] = []
    for piece in pieces:
        if members and _OPTION.fullmatch(piece):
            members[-1] += f",{piece}"
        else:
            members.append(piece)
    weighted = [_WEIGHT.fullmatch(member) for member in members]
    if kind == "committee" and any(weighted):
        raise InputError(
            f"{source} gives its members weights; a committee is their plain mean.",
            "Leave the weights out, or write sum: in place of committee:.",
        )
    sources = tuple(match["source"] if match else text for match, text in zip(weighted, members, strict=True))
    for member in sources:
        if member.partition(":")[0] in COMPOSITES and is_prefixed(member):
            raise InputError(
                f"{source} has {member} in it.",
                "On the command line a composite has no composites in it; in Python it may:"
                " nnqmd_server.potentials.composites, given as file.py:maker.",
            )
        if "@" in member and member.rpartition("@")[2][:1] in {"/", ".", "~"}:
            raise InputError(
                f"{source} has an interpreter in the middle of it.",
                "All members run in one process: give one interpreter, at the end.",
            )
    if kind == "committee" and len(sources) < 2:
        raise InputError(f"{source} has one member.", "A committee has two or more: committee:a.zip,b.zip.")
    return Composite(kind, sources, tuple(float(match["weight"]) if match else 1.0 for match in weighted))


def _split(text: str, source: str) -> list[str]:
    """Pieces between commas that stand outside of brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in _QUOTES:
            quote = sign
        else:
            depth += (sign in _OPEN) - (sign in _CLOSE)
        if sign == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += sign
    pieces = [piece.strip() for piece in pieces]
    if depth or quote or not all(pieces):
        raise InputError(
            f"{source} cannot be read: a bracket or quotation mark is open, or a piece is empty.",
            "Write it like ase:ase.calculators.emt.EMT,asap_cutoff=true, and quote it for the shell where it"
            " has brackets, quotation marks or *.",
        )
    return pieces


def _read_foreign(kind: str, pieces: list[str], source: str) -> Foreign:
    options: dict[str, Any] = {}
    for piece in pieces[1:]:
        match = _OPTION.fullmatch(piece)
        if match is None or match[1] in options:
            wrong = f"{match[1]} is given twice" if match else f"{piece!r} is not of the form key=value"
            raise InputError(f"{source} cannot be read: {wrong}.", f"Write {kind}:{pieces[0]},key=value,...")
        options[match[1]] = _value(match[2])
    return Foreign(kind, pieces[0], options)


def _value(text: str) -> Any:
    """A Python literal, or true, false and none in small letters; everything else is text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def own_name(source: str) -> str:
    """The name of such a source that was given none: of the class, driver, file or maker; or the kind."""
    found = read(source)
    if isinstance(found, Composite):
        return found.kind
    what = found.what
    if found.kind in {"deepmd", "ipi"} or what.endswith(".py"):
        return Path(what).stem
    return what.rpartition(":")[2].rpartition(".")[2]


def _is_file(value: object) -> bool:
    """Whether an option's value names a file; a bare word does not, even where there is such a file."""
    return isinstance(value, str) and ("." in value or "/" in value) and Path(value).expanduser().is_file()


def _file_of(found: Foreign) -> str | None:
    """The file that is executed or read as the model, if it is one."""
    if found.kind == "deepmd":
        return found.what
    head = found.what.rpartition(":")[0] if found.kind in {"ase", "torchsim"} else found.what
    return head if head.endswith(".py") else None


def _files_of(found: Foreign) -> list[Path]:
    own = _file_of(found)
    if own is not None and not Path(own).is_file():
        raise ModelError(f"There is no file {own} ({found.kind}:{found.what}).", "Check the path.")
    named = [Path(own)] if own is not None else []
    return named + [Path(value).expanduser() for value in found.options.values() if _is_file(value)]


def card_of(source: str, of_member: Callable[[str], Card | None]) -> Card | None:
    """What a composite says of itself where all its members do; None for other programs.

    Raises
    ------
    ModelError
        A file is not there, or a member is no model.
    """
    found = read(source)
    if isinstance(found, Composite):
        cards = [of_member(member) for member in found.members]
        told = [card for card in cards if card is not None]
        return composite_card(found.kind, told, found.weights) if len(told) == len(cards) else None
    _files_of(found)
    return None


def lacks_virial(source: str) -> bool:
    """Whether the user has said that a source (without its interpreter), or a member of it, has no virial."""
    if not is_prefixed(source):
        return False
    found = read(source)
    if isinstance(found, Composite):
        return any(lacks_virial(member) for member in found.members)
    return "stress" in found.options and found.options["stress"] is None


def absolute(source: str, of_member: Callable[[str], str]) -> str:
    """The same source, for a process that was started in another folder; ``of_member`` does a member."""
    found = read(source)
    if isinstance(found, Composite):
        pairs = zip(found.members, found.weights, strict=True)
        members = [of_member(m) if w == 1 else f"{w!r}*{of_member(m)}" for m, w in pairs]
        return f"{found.kind}:{','.join(members)}"
    pieces = _split(source.partition(":")[2], source)
    own = _file_of(found)
    if own is not None:
        pieces[0] = str(Path(own).resolve()) + found.what[len(own) :]
    for k, piece in enumerate(pieces[1:], start=1):
        key, _, text = piece.partition("=")
        if _is_file(text) and found.options[key] == text:
            pieces[k] = f"{key}={Path(text).expanduser().resolve()}"
    return f"{found.kind}:{','.join(pieces)}"


def source_hash(source: str, of_member: Callable[[str], str]) -> str:
    """SHA-256 of the file that a source names; of the hashes of several, one a line; "" if one has none.

    Raises
    ------
    ModelError
        A file cannot be read.
    """
    found = read(source)
    if isinstance(found, Composite):
        return combined([of_member(member) for member in found.members])
    digests = [_digest(path) for path in _files_of(found)]
    return digests[0] if len(digests) == 1 else combined(digests)


def combined(digests: Sequence[str]) -> str:
    """One SHA-256 of several; nothing where one is missing, or there are none."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests and all(digests) else ""


def identity(found: Foreign) -> str:
    """SHA-256 of what a source says, with the contents of its files in place of their names.

    Workers whose sources have the same identity compute the same, as far as a text can tell.

    Raises
    ------
    ModelError
        A file cannot be read.
    """
    own = _file_of(found)
    what = found.what if own is None else _digest(Path(own)) + found.what[len(own) :]
    options = {
        key: _digest(Path(value).expanduser()) if _is_file(value) else repr(value)
        for key, value in found.options.items()
    }
    return hashlib.sha256(json.dumps([found.kind, what, options], sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Check the path.") from error
