"""Batches that do not fit into a worker's memory are halved, and what fitted is remembered."""

from __future__ import annotations

import gc
import logging
import sys

from nnqmd_server.errors import PoolError
from nnqmd_server.potentials.base import Potential
from nnqmd_server.structures import Results, Structures, join

log = logging.getLogger("nnqmd.worker")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so: Python's, torch's, or a library's that only has words for it."""
    named = error.__class__.__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "out of memory" in str(error).lower()


class Limits:
    """What fits into this process at once, learned for each potential and size of structure."""

    def __init__(self) -> None:
        self._most: dict[tuple[str, int], int] = {}
        self.learned: dict[str, int] | None = None

    def evaluate(self, name: str, potential: Potential, structures: Structures) -> Results:
        """Evaluate a batch, in as many parts as memory asks for.

        Parameters
        ----------
        name : str
            The potential's name in the pool.
        potential : Potential
            What evaluates.
        structures : Structures
            The batch.

        Raises
        ------
        PoolError
            One structure alone does not fit.
        """
        self.learned = None
        largest = int((structures.offsets[1:] - structures.offsets[:-1]).max())
        size = name, largest.bit_length()
        parts, first = [], 0
        while first < len(structures):
            count = min(len(structures) - first, self._most.get(size, len(structures)))
            try:
                parts.append(potential.evaluate(structures[first : first + count]))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._halve(size, count, largest, error)
            else:
                first += count
        return join(parts)

    def _halve(self, size: tuple[str, int], count: int, atoms: int, error: Exception) -> None:
        _release()
        if count == 1:
            raise PoolError(
                f"A structure of {atoms} atoms does not fit into the memory of a worker.",
                "Use a larger GPU, or let a group of workers share each structure.",
            ) from error
        self._most[size] = count // 2
        self.learned = {"atoms": atoms, "structures": count // 2}
        log.warning(
            "out of memory with %s structures of up to %s atoms: from now on %s at once",
            count,
            atoms,
            count // 2,
        )


def _release() -> None:
    gc.collect()
    torch = sys.modules.get("torch")  # where the potential has brought it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
