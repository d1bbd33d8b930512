"""What all adapters to other programs share: finding their code, calling it, and reading what comes back.

Light: numpy is all that it needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnqmd_server.errors import InputError, ModelError
from nnqmd_server.potentials.base import SYMBOLS
from nnqmd_server.structures import Array, Structures

STRESS = ("required", "finite", "none")
"""What a user may say of the stress of a potential; ``none`` means a virial of zero."""

NO_VIRIAL = "no virial: zero is given, so constant volume only"


def find(where: str) -> Callable[..., Any]:
    """A class or function by its address.

    Parameters
    ----------
    where : str
        ``module.name``, ``module:name`` or ``file.py:name``.

    Raises
    ------
    ModelError
        There is no such module, file or name, or it fails when it is imported.
    """
    module, _, name = where.rpartition(":" if ":" in where else ".")
    if not module:
        raise ModelError(
            f"{where!r} is not the address of a Python class or function.",
            "Write module.name or file.py:name, for example ase.calculators.emt.EMT.",
        )
    if module.endswith(".py") and not Path(module).is_file():
        raise ModelError(f"There is no file {module}.", "Check the path.")
    try:
        found = load_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"There is no Python module {error.name or module} in {sys.prefix} ({where}).",
            f"Check the spelling, install it there, or name the environment that has it: {where}@/envs/NAME.",
        ) from error
    except Exception as error:  # foreign code, and anything may come of it
        raise ModelError(
            f"{module} cannot be imported: {error.__class__.__name__}: {str(error)[:500]}.",
            "Mend that first: the same import must work in a Python session of its own.",
        ) from error
    try:
        return getattr(found, name)
    except AttributeError as error:
        offered = [key for key, value in vars(found).items() if key[0] != "_" and callable(value)]
        raise ModelError(
            f"{module} has no {name}.", f"It has: {', '.join(offered[:20]) or 'nothing to call'}."
        ) from error


def load_module(name: str) -> Any:
    """A module by its name or its ``.py`` file; raises what importing it raises."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"nnqmd_potential_{Path(name).stem}", name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not Python code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make(
    what: str,
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    device: Any,
    known: Sequence[str] | None = None,
) -> Any:
    """Call a class or function of another program with what the user wrote.

    ``device`` is passed on when it takes one and the user has not chosen.

    Parameters
    ----------
    what : str
        The source, for error messages.
    factory : callable
        The class or function.
    options : mapping
        Its keyword arguments.
    device : object
        The worker's device, in the form that it takes.
    known : sequence of str, optional
        Arguments that it understands, where its signature takes any and drops what it does not know.

    Raises
    ------
    ModelError
        The arguments do not fit, or it fails.
    """
    arguments = dict(options)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # compiled code has none
        signature = None
    if signature is not None:
        if "device" in signature.parameters:
            arguments.setdefault("device", device)
        unknown = sorted(set(arguments) - set(known)) if known is not None else []
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise _does_not_fit(what, factory, str(error), signature, known) from error
        if unknown:
            raise _does_not_fit(what, factory, f"unknown: {', '.join(unknown)}", signature, known)
    try:
        return factory(**arguments)
    except Exception as error:  # foreign code, and anything may come of it
        raise ModelError(
            f"{what} cannot be made: {error.__class__.__name__}: {str(error)[:500]}.",
            "These are the words of that program: its documentation tells more.",
        ) from error


def _does_not_fit(
    what: str,
    factory: Callable[..., Any],
    why: str,
    signature: inspect.Signature,
    known: Sequence[str] | None,
) -> ModelError:
    names = sorted(known) if known else [name for name in signature.parameters if name != "self"]
    return ModelError(
        f"{what}: the arguments do not fit {getattr(factory, '__name__', factory)}: {why}.",
        f"It takes: {', '.join(names) or 'none'}.",
    )


def named_parameters(cls: type) -> set[str]:
    """The arguments that the constructors of a class and of its bases name."""
    found: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            found |= {
                name
                for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
                if parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
            }
    return found - {"self"}


def take(options: dict[str, Any], key: str, choices: Sequence[str], default: str) -> str:
    """An option of the adapter's own, taken out of those for the other program; one of ``choices``.

    Raises
    ------
    InputError
        It is something else.
    """
    value = options.pop(key, default)
    value = "none" if value is None else str(value)
    if value not in choices:
        raise InputError(
            f"{key}={value} is not possible.", f"Write {key}= with one of: {', '.join(choices)}."
        )
    return value


def take_names(options: dict[str, Any], key: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Names joined by ``+``, of an option of the adapter's own.

    Raises
    ------
    InputError
        One is not among the ``choices``.
    """
    text = options.pop(key, None)
    names = tuple(str(text).split("+")) if text else ()
    wrong = [name for name in names if name not in choices]
    if wrong:
        raise InputError(
            f"{key}={text}: {', '.join(wrong)} cannot be had.",
            f"Choose from {', '.join(choices)}; join with +.",
        )
    return names


def runs_of_equal(structures: Structures) -> Iterator[slice]:
    """Runs of neighbouring structures that have the same atoms in the same order, such as beads."""
    first = 0
    for k in range(1, len(structures) + 1):
        if k == len(structures) or not np.array_equal(
            structures.numbers[structures.atoms_of(k)], structures.numbers[structures.atoms_of(first)]
        ):
            yield slice(first, k)
            first = k


def symbols_of(numbers: Array) -> tuple[str, ...]:
    """The elements of some atoms, each once, by atomic number."""
    return tuple(SYMBOLS[z] for z in sorted(set(np.asarray(numbers).tolist())))


def shaped(what: str, name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """What another program gave, as float64 of the right shape, in memory of our own.

    Raises
    ------
    ModelError
        It is missing, is no array of numbers, or has another shape.
    """
    if value is None:
        raise ModelError(f"{what} gave no {name}.", "See its documentation: it must be computed.")
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{what} gave a {name} that is no array of numbers: {error}.", "Correct it."
        ) from error
    if array.size != int(np.prod(shape)):
        raise ModelError(
            f"{what} gave {name} of shape {array.shape}; wanted was {shape}.",
            "Correct it; if it was made for a template, give it structures with the atoms of that template.",
        )
    return array.reshape(shape)
