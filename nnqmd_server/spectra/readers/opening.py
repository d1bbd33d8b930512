"""Which reader a file needs, seen from its first bytes."""

from __future__ import annotations

from pathlib import Path

from nnqmd_server.errors import DataError, NnqmdError
from nnqmd_server.spectra.readers.source import Source, empty_file


def open_source(path: Path, quantity: str, unit: str, symbols: tuple[str, ...], drop_cut: bool) -> Source:
    """Read the head of a file with the reader of its format."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}).",
            "Give a trajectory of a finished run, and check the <output> part of its input.xml.",
        ) from error
    if not head.strip():
        raise empty_file(path, f"it holds {len(head)} bytes")
    first = head.lstrip()
    try:
        if first.startswith(b"\x89HDF"):
            from nnqmd_server.spectra.store import open_store

            return open_store(path, quantity)
        if first.startswith(b"- of Ulm"):
            from nnqmd_server.spectra.readers.asetraj import open_ase

            return open_ase(path, quantity)
        if first.startswith(b"ITEM:"):
            from nnqmd_server.spectra.readers.lammps import open_lammps

            return open_lammps(path, quantity, unit, symbols, drop_cut)
        if first.startswith((b"TITLE", b"CRYST1", b"ATOM", b"HETATM", b"REMARK", b"MODEL")):
            from nnqmd_server.spectra.readers.pdb import open_pdb

            return open_pdb(path, drop_cut)
        from nnqmd_server.spectra.readers.xyz import open_xyz

        return open_xyz(path, quantity, drop_cut)
    except NnqmdError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}).", "Check the disk and the file.") from error
