"""Labelled arrays: values with a unit, coordinates, standard errors, and how they were made.

Every command turns what it has computed into one `Result`; the files, pictures and the report are made
from that alone, so that they say the same thing and a NeXus file can be drawn again later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nnqmd_server.errors import DataError, NnqmdError

if TYPE_CHECKING:
    import scipp

Array = np.ndarray


@dataclass(frozen=True)
class Quantity:
    """Values of one thing.

    Parameters
    ----------
    name : str
        A Python identifier: column in a table, field in a NeXus file, name in a formula.
    values : Array
        The numbers.
    unit : str
        As scipp and UDUNITS write it: ``meV``, ``1/cm``, ``barn/(sr*meV)``; empty for a pure number.
    title : str
        What a reader would call it.
    error : Array or None
        Standard error of the mean, same shape and unit.
    formula : str
        How it follows from other quantities and `Constant`s of the same `Result`: an expression in Python,
        where the functions are numpy's. Empty where that needs more than one line; then
        `Result.formulas` says it.
    """

    name: str
    values: Array
    unit: str
    title: str = ""
    error: Array | None = None
    formula: str = ""


@dataclass(frozen=True)
class Labelled:
    """Curves or maps that share their axes.

    Parameters
    ----------
    name, title : str
        An identifier, and what a reader would call it.
    axes : tuple of Quantity
        One per dimension, in order; each is one-dimensional.
    curves : tuple of Quantity
        Each with the shape that the axes span. The first is the main one.
    coordinates : tuple of Quantity
        Further coordinates along the only axis of a one-dimensional block: the same energies in another
        unit, Q on a bank of detectors.
    """

    name: str
    title: str
    axes: tuple[Quantity, ...]
    curves: tuple[Quantity, ...]
    coordinates: tuple[Quantity, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(len(axis.values) for axis in self.axes)
        for curve in (*self.curves, *self.coordinates):
            for values in (curve.values, curve.error):
                if values is not None and values.shape != shape:
                    raise ValueError(f"{self.name}/{curve.name} has shape {values.shape}, its axes {shape}")

    def __getitem__(self, name: str) -> Quantity:
        for quantity in (*self.axes, *self.coordinates, *self.curves):
            if quantity.name == name:
                return quantity
        raise KeyError(name)

    def startswith(self, prefix: str) -> tuple[Quantity, ...]:
        """Curves whose names begin with ``prefix``."""
        return tuple(c for c in self.curves if c.name.startswith(prefix))


@dataclass(frozen=True)
class Constant:
    """A number that formulas use."""

    value: float
    unit: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A small table of words and numbers, such as one row per element."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Result:
    """Everything that one command found.

    Parameters
    ----------
    kind : str
        ``ins``, ``dos``, ``ir``, ``raman``; begins the names of its files.
    title : str
        One line.
    data : tuple of Labelled
        The first one is the spectrum itself.
    constants : mapping of str to Constant
        What the formulas of the quantities use.
    formulas : tuple of str
        Lines that say how the numbers were made, with every prefactor and the sources.
    settings : mapping of str to str
        What was chosen or read: temperature, window, instrument, files.
    tables : tuple of Table
        Numbers that belong to no curve.
    notes : tuple of str
        Warnings, and what the reader should know.
    """

    kind: str
    title: str
    data: tuple[Labelled, ...]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    formulas: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Labelled:
        for block in self.data:
            if block.name == name:
                return block
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(block.name == name for block in self.data)

    def main_axis(self) -> tuple[Labelled, ...]:
        """Blocks of curves along the axis of the first block."""
        axis = self.data[0].axes[0]
        return tuple(b for b in self.data if len(b.axes) == 1 and _same(b.axes[0], axis))


def _same(one: Quantity, other: Quantity) -> bool:
    return one.name == other.name and np.array_equal(one.values, other.values)


def to_scipp(result: Result) -> scipp.DataGroup:
    """The result as scipp's labelled arrays, with units and variances (squared standard errors).

    Needs the optional package scipp (``pip install 'nnqmd-server[scipp]'``).

    Returns
    -------
    scipp.DataGroup
        One `scipp.Dataset` per block, by name; the settings, formulas and notes as text beside them.
    """
    try:
        import scipp
    except ImportError as error:
        raise NnqmdError(
            "The package scipp is not installed.", "pip install 'nnqmd-server[scipp]', or read the .nxs file."
        ) from error

    def variable(quantity: Quantity, dims: list[str]) -> scipp.Variable:
        unit = quantity.unit or "one"
        variances = None if quantity.error is None else quantity.error**2
        return scipp.array(dims=dims, values=quantity.values, variances=variances, unit=unit)

    group = scipp.DataGroup()
    for block in result.data:
        dims = [axis.name for axis in block.axes]
        coords = {axis.name: variable(axis, [axis.name]) for axis in block.axes}
        coords |= {other.name: variable(other, dims) for other in block.coordinates}
        group[block.name] = scipp.Dataset(
            data={curve.name: variable(curve, dims) for curve in block.curves}, coords=coords
        )
    group["title"] = result.title
    group["settings"] = scipp.DataGroup(dict(result.settings))
    group["formulas"] = "\n".join(result.formulas)
    group["notes"] = "\n".join(result.notes)
    return group


def find_block(result: Result, name: str) -> Labelled:
    """A block of a result by name, or an error that names those that are there."""
    if name not in result:
        raise DataError(
            f"This {result.kind} result holds no {name!r}.",
            f"It holds {', '.join(b.name for b in result.data)}.",
        )
    return result[name]
