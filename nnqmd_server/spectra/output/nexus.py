"""NeXus files: HDF5 with the names that neutron facilities agreed on, and back to a `Result`.

One ``NXentry`` holds the result. Every block is an ``NXdata`` group: ``@signal`` and
``@auxiliary_signals`` name its curves, ``@axes`` its axes, ``NAME_errors`` the standard errors, and every
field has ``@units`` and ``@long_name`` (manual.nexusformat.org, NXdata). A NeXus viewer opens the main
spectrum at once (``@default``). Formulas, settings, tables and notes are text in an ``NXcollection``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnqmd_server import __version__
from nnqmd_server.errors import DataError
from nnqmd_server.spectra.output.files import whole_file
from nnqmd_server.spectra.output.labelled import Constant, Labelled, Quantity, Result, Table

if TYPE_CHECKING:
    import h5py

FORMAT = "nnqmd spectrum 1"


def write_nexus(path: Path, result: Result) -> Path:
    """Write a result as NeXus/HDF5; returns the path.

    Raises
    ------
    OutputError
        The file cannot be written; nothing partial is left.
    """
    with whole_file(path) as temporary:
        _check_room(path, result)
        try:
            _write(temporary, path.name, result)
        except RuntimeError as error:  # how HDF5 says some of the errors of a disk
            raise OSError(str(error).splitlines()[0]) from error
    return path


def _check_room(path: Path, result: Result) -> None:
    """Refuse a full disk before HDF5 meets it, which may not survive that."""
    needed = sum(
        q.values.nbytes * (1 if q.error is None else 2)
        for data in result.data
        for q in (*data.axes, *data.coordinates, *data.curves)
    )
    if shutil.disk_usage(path.parent).free < needed + (1 << 20):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write(temporary: Path, name: str, result: Result) -> None:
    import h5py

    with h5py.File(temporary, "w", track_order=True) as file:
        file.attrs["NX_class"] = "NXroot"
        file.attrs["default"] = "entry"
        file.attrs["creator"] = f"nnqmd-server {__version__}"
        file.attrs["file_name"] = name
        file.attrs["file_time"] = datetime.now(UTC).isoformat(timespec="seconds")
        entry = _group(file, "entry", "NXentry")
        entry.attrs["default"] = result.data[0].name
        entry["title"] = result.title
        entry["program_name"] = "nnqmd-server"
        entry["program_name"].attrs["version"] = __version__
        for block in result.data:
            _write_block(entry, block)
        _write_words(entry, result)


def _group(parent: h5py.Group, name: str, kind: str) -> h5py.Group:
    group = parent.create_group(name, track_order=True)
    group.attrs["NX_class"] = kind
    return group


def _write_block(entry: h5py.Group, block: Labelled) -> None:
    data = _group(entry, block.name, "NXdata")
    data["title"] = block.title
    data.attrs["signal"] = block.curves[0].name
    data.attrs["axes"] = [axis.name for axis in block.axes]
    if len(block.curves) > 1:
        data.attrs["auxiliary_signals"] = [curve.name for curve in block.curves[1:]]
    for dimension, axis in enumerate(block.axes):
        _write_quantity(data, axis)
        data.attrs[f"{axis.name}_indices"] = dimension
    for other in block.coordinates:
        _write_quantity(data, other)
        data.attrs[f"{other.name}_indices"] = 0
    for curve in block.curves:
        _write_quantity(data, curve)


def _write_quantity(data: h5py.Group, quantity: Quantity) -> None:
    compressed = {"compression": "gzip", "shuffle": True} if quantity.values.ndim > 1 else {}
    field = data.create_dataset(quantity.name, data=quantity.values, **compressed)
    field.attrs["units"] = quantity.unit
    field.attrs["long_name"] = f"{quantity.title or quantity.name} ({quantity.unit or '1'})"
    field.attrs["title"] = quantity.title
    if quantity.formula:
        field.attrs["formula"] = quantity.formula
    if quantity.error is not None:
        errors = data.create_dataset(f"{quantity.name}_errors", data=quantity.error, **compressed)
        errors.attrs["units"] = quantity.unit
        errors.attrs["long_name"] = f"standard error of the mean of {quantity.name}"


def _write_words(entry: h5py.Group, result: Result) -> None:
    words = _group(entry, "nnqmd", "NXcollection")
    words.attrs["format"] = FORMAT
    words["kind"] = result.kind
    words["formulas"] = "\n".join(result.formulas)
    words["notes"] = list(result.notes)
    words["tables"] = json.dumps([[t.title, t.columns, t.rows] for t in result.tables])
    settings = _group(words, "settings", "NXcollection")
    for name, value in result.settings.items():
        settings[name.replace("/", "|")] = value
    constants = _group(words, "constants", "NXcollection")
    for name, constant in result.constants.items():
        constants[name] = constant.value
        constants[name].attrs["units"] = constant.unit
        constants[name].attrs["meaning"] = constant.meaning


def read_nexus(path: Path) -> Result:
    """A result that `write_nexus` wrote.

    Raises
    ------
    DataError
        No such file, not one of ours, or damaged.
    """
    import h5py

    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Give a .nxs file that `nnqmd spectrum` wrote.")
    try:
        with h5py.File(path, "r") as file:
            entry = file["entry"]
            words = entry["nnqmd"]
            found = words.attrs.get("format")
            if found != FORMAT:
                raise DataError(
                    f"{path} has the format {found!r}, not {FORMAT!r}.",
                    "Give a .nxs file that this version of `nnqmd spectrum` wrote.",
                )
            return Result(
                _text(words["kind"]),
                _text(entry["title"]),
                tuple(
                    _read_block(name, group)
                    for name, group in entry.items()
                    if group.attrs.get("NX_class") == "NXdata"
                ),
                {
                    name: Constant(float(c[()]), c.attrs["units"], c.attrs["meaning"])
                    for name, c in words["constants"].items()
                },
                tuple(_text(words["formulas"]).split("\n")),
                {name.replace("|", "/"): _text(value) for name, value in words["settings"].items()},
                tuple(
                    Table(title, tuple(columns), tuple(map(tuple, rows)))
                    for title, columns, rows in json.loads(_text(words["tables"]))
                ),
                tuple(n.decode() for n in words["notes"][()]) if len(words["notes"]) else (),
            )
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is not a spectrum of nnqmd ({error}).", "Give a .nxs file that `nnqmd spectrum` wrote."
        ) from error


def _read_block(name: str, data: h5py.Group) -> Labelled:
    axes = np.atleast_1d(data.attrs["axes"])
    curves = [data.attrs["signal"], *data.attrs.get("auxiliary_signals", ())]
    coordinates = [n.removesuffix("_indices") for n in data.attrs if n.endswith("_indices")]
    return Labelled(
        name,
        _text(data["title"]),
        tuple(_read_quantity(data, str(axis)) for axis in axes),
        tuple(_read_quantity(data, str(curve)) for curve in curves),
        tuple(_read_quantity(data, name) for name in coordinates if name not in axes),
    )


def _read_quantity(data: h5py.Group, name: str) -> Quantity:
    field = data[name]
    errors = data.get(f"{name}_errors")
    return Quantity(
        name,
        field[()],
        field.attrs["units"],
        field.attrs["title"],
        None if errors is None else errors[()],
        field.attrs.get("formula", ""),
    )


def _text(field: h5py.Dataset) -> str:
    value = field[()]
    return value.decode() if isinstance(value, bytes) else str(value)
