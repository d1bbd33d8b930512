"""From what a user writes on the command line to a potential: ``[NAME=]SOURCE``. Light: no torch here.

A source is a model file or a Python callable, and may be followed by words: ``model.nequip.zip@float64``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials import sources
from nnqmd_server.potentials.base import Card, Potential, with_born
from nnqmd_server.potentials.foreign import load_module
from nnqmd_server.potentials.package import PRECISIONS, file_hash, with_precision

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PYTHON = re.compile(r"(?P<module>[\w.]+|.+\.py):(?P<maker>[A-Za-z_]\w*)")

_SUFFIXES = (".nequip.zip", ".nequip.pt2", ".nequip.pth", ".ckpt", ".pt2", ".pth")


def parse_models(texts: Iterable[str]) -> dict[str, str]:
    """Sources of potentials by the name under which doors ask for them.

    Parameters
    ----------
    texts : iterable of str
        ``SOURCE`` or ``NAME=SOURCE``; a source is a model file, or ``module:maker`` or
        ``file.py:maker`` for a Python callable that takes the device and returns a potential; see
        :func:`words_of` and :func:`interpreter_of` for what may follow it.
        Without a name a file goes by its own, without the ending, and a callable by its.

    Raises
    ------
    InputError
        Two have the same name, a name is not one, or an interpreter is not there.
    """
    found: dict[str, str] = {}
    for text in texts:
        head, equals, rest = text.partition("=")
        named = bool(equals) and _NAME.fullmatch(head) is not None
        source = rest if named else text
        words_of(source)  # a word or an interpreter that is none is found now
        name = head if named else own_name(source)
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is not a name for a potential.",
                "Use letters, digits, dot, hyphen and underscore, for example cheap=small.nequip.zip.",
            )
        if name in found:
            raise InputError(
                f"Two potentials are called {name}.", "Name them: first=a.nequip.zip second=b.nequip.zip."
            )
        found[name] = source
    return found


def interpreter_of(source: str) -> tuple[str, str | None]:
    """A source without its interpreter, and the interpreter that its workers run in.

    Parameters
    ----------
    source : str
        ``SOURCE``, or ``SOURCE@PYTHON`` with the path of a Python program or of a virtual environment
        (beginning with ``/``, ``.`` or ``~``), for potentials that need packages which cannot be installed
        beside ours. That environment needs numpy and pyzmq besides; nnqmd need not be installed in it.

    Raises
    ------
    InputError
        There is no such interpreter.
    """
    head, at, tail = source.rpartition("@")
    if not at or not head or tail[:1] not in {"/", ".", "~"} or Path(source).is_file():
        return source, None
    path = Path(tail).expanduser()
    if path.is_dir():
        path /= "bin/python"
    if not os.access(path, os.X_OK):
        raise InputError(
            f"There is no Python interpreter {path}.",
            "After @ give a Python program or a virtual environment: mace=mace.py:maker@/envs/mace.",
        )
    # Not resolved: what a link in an environment leads to would be Python without the environment.
    return head, os.path.abspath(path)  # noqa: PTH100


def words_of(source: str) -> tuple[str, tuple[str, ...]]:
    """A source without what follows it, and the words among that.

    Parameters
    ----------
    source : str
        ``FILE@float64``, ``FILE@float32`` or ``FILE@tf32`` for a model that is to compute in another
        precision than it was trained in, ``FILE@born`` for Born charges with every evaluation (not compiled
        then); both may be said, and an interpreter, see :func:`interpreter_of`, may follow.

    Raises
    ------
    InputError
        A word is unknown, or follows a Python callable; or there is no such interpreter.
    """
    source, _ = interpreter_of(source)
    words: list[str] = []
    while not Path(source).is_file():
        head, at, tail = source.rpartition("@")
        if not at or "/" in tail:
            break
        if tail not in {*PRECISIONS, "born"} or any((tail == "born") == (word == "born") for word in words):
            raise InputError(
                f"{'@'.join([tail, *words])} is not a precision.",
                f"After @ give one of {', '.join(PRECISIONS)}, and born: full=model.nequip.zip@float64.",
            )
        words.insert(0, tail)
        source = head
    if words and _PYTHON.fullmatch(source):
        raise InputError(
            f"{source} is Python code, which chooses its precision itself.", f"Leave out @{words[0]}."
        )
    return source, tuple(words)


def own_name(source: str) -> str:
    """The name of a source that was given none."""
    bare, _ = interpreter_of(source)
    if sources.is_prefixed(bare):
        return sources.own_name(bare)
    source, _ = words_of(source)
    python = _PYTHON.fullmatch(source)
    if python:
        return python["maker"]
    name = Path(source).name
    return next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)


def card_of(source: str) -> Card | None:
    """What a source says of itself without being executed; None for Python code, which cannot.

    Raises
    ------
    ModelError
        It is neither.
    """
    bare, _ = interpreter_of(source)
    if sources.is_prefixed(bare):
        return sources.card_of(bare, card_of)
    source, words = words_of(source)
    if _PYTHON.fullmatch(source):
        return None
    card = with_precision(source, _precision(words))
    return with_born(card) if "born" in words else card


def _precision(words: Iterable[str]) -> str | None:
    return next((word for word in words if word != "born"), None)


def absolute(source: str) -> str:
    """The same source, without its interpreter, for a process that was started in another folder."""
    bare, _ = interpreter_of(source)
    if sources.is_prefixed(bare):
        return sources.absolute(bare, absolute)
    source, words = words_of(source)
    python = _PYTHON.fullmatch(source)
    if python is None:
        return "@".join([str(Path(source).resolve()), *words])
    if not python["module"].endswith(".py"):
        return source
    return f"{Path(python['module']).resolve()}:{python['maker']}"


def source_hash(source: str) -> str:
    """SHA-256 of the file that a source names; nothing for a Python module, which is not one file.

    Raises
    ------
    ModelError
        The file cannot be read.
    """
    bare, _ = interpreter_of(source)
    if sources.is_prefixed(bare):
        return sources.source_hash(bare, source_hash)
    source, _ = words_of(source)
    python = _PYTHON.fullmatch(source)
    if python is not None and not python["module"].endswith(".py"):
        return ""
    path = Path(python["module"] if python else source)
    try:
        return file_hash(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Check the path.") from error


def parse_hashes(texts: Iterable[str], models: Mapping[str, str]) -> dict[str, str]:
    """The hashes that models must have, by name, from ``[NAME=]SHA256`` texts.

    Raises
    ------
    InputError
        A text is no hash, or does not say of which of several models.
    """
    found = {}
    for text in texts:
        name, _, digest = text.rpartition("=")
        name = name or (next(iter(models)) if len(models) == 1 else "")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest) or name not in models:
            raise InputError(
                f"--sha256 {text} is not the hash of one of {', '.join(models) or 'the models'}.",
                "Give [NAME=] and the 64 hexadecimal digits that `nnqmd model info` or `sha256sum` print.",
            )
        found[name] = digest.lower()
    return found


def check_hashes(models: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Refuse models that are not the files they should be; before anything in them is executed.

    Raises
    ------
    ModelError
        A file has another hash, or what should be checked is not a file.
    """
    for name, wanted in hashes.items():
        digest = source_hash(models[name])
        if digest != wanted:
            what = f"has the SHA-256 {digest}" if digest else "is a Python module, which has no hash"
            raise ModelError(
                f"{name} ({models[name]}) {what}; wanted was {wanted}.",
                "A model is code: do not load it. Get the file again from where you trust it.",
            )


def load(source: str, device: str = "cpu", compiled: bool = True) -> Potential:
    """Load a potential; a model is code, and this executes it.

    Raises
    ------
    ModelError
        It is missing, is not what it claims, or cannot be loaded.
    """
    bare, _ = interpreter_of(source)
    if sources.is_prefixed(bare):
        return _load_prefixed(bare, device, compiled)
    source, words = words_of(source)
    python = _PYTHON.fullmatch(source)
    if python is None:
        from nnqmd_server.potentials.allegro import load as load_allegro

        return load_allegro(source, device, compiled, _precision(words), "born" in words)
    try:
        maker = getattr(load_module(python["module"]), python["maker"])
        return maker(device)
    except Exception as error:  # foreign code, and anything may come of it
        raise ModelError(
            f"{source} cannot be loaded: {error.__class__.__name__}: {error}.",
            f"{python['maker']}(device) in it must return a potential (nnqmd_server.potentials.base).",
        ) from error


def _load_prefixed(source: str, device: str, compiled: bool) -> Potential:
    found = sources.read(source)
    if isinstance(found, sources.Composite):
        from nnqmd_server.potentials.composites import Committee, Sum

        members = [load(member, device, compiled) for member in found.members]
        return Committee(members) if found.kind == "committee" else Sum(members, found.weights)
    module = "ipi_pes" if found.kind == "ipi" else found.kind
    try:
        adapter = importlib.import_module(f"nnqmd_server.potentials.{module}")
    except ImportError as error:
        raise ModelError(
            f"{source} needs {error.name}, which is not in {sys.prefix}.",
            f"Install it there, or name the environment that has it: {source}@/envs/NAME.",
        ) from error
    return adapter.load(found, device)
