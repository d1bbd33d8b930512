"""How frames are refused: by number, all bad ones of a kind at once."""

from __future__ import annotations

from collections.abc import Sequence

from nnqmd_server.errors import DataError

SHOWN = 12


def refuse(bad: Sequence[int], what: str, fix: str) -> None:
    """Raise a DataError that names the frames, counted from 0; nothing if there are none."""
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        noun, verb = ("Frame", "has") if len(bad) == 1 else ("Frames", "have")
        listed = ", ".join(str(k) for k in bad[:SHOWN]) + more
        raise DataError(f"{noun} {listed} (counted from 0) {verb} {what}.", fix)
