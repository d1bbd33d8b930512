"""Run i-PI on an input with ``<ffmpi>``: one mpiexec with i-PI and a rank of ours for each force field."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnqmd_server.doors.extras import EXTRAS
from nnqmd_server.errors import InputError, ProgramError
from nnqmd_server.inputs.parts import Part, write_template
from nnqmd_server.inputs.run import Run, find_ipi
from nnqmd_server.potentials.load import absolute, card_of

_SERVE = [sys.executable, "-c", "from nnqmd_server.cli import main; main()", "serve"]


@dataclass(frozen=True)
class RankOptions:
    """How the ranks start their workers; see :class:`nnqmd_server.pool.launch.LocalPool`."""

    workers: int | None = None
    device: str = "auto"
    eager: bool = False
    extras: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """As options of ``nnqmd serve``."""
        return [
            *(["--workers", str(self.workers)] if self.workers else []),
            *["--device", self.device],
            *(["--eager"] if self.eager else []),
        ]


def is_over_mpi(parts: Sequence[Part]) -> bool:
    """Whether our part of the forces is asked for over MPI.

    Raises
    ------
    InputError
        Some of it is, and some is not.
    """
    kinds = {part.field.kind for part in parts}
    if "mpi" in kinds and len(kinds) > 1:
        raise InputError(
            "The input has <ffmpi> beside other force fields of ours; `nnqmd run` starts either.",
            "Use <ffmpi> for all, or <ffdirect> for all, which is faster; --leave NAME for what you start.",
        )
    return "mpi" in kinds


class MpiRun(Run):
    """An i-PI process and the ranks that answer it, in one mpiexec; the ranks start the workers.

    Parameters
    ----------
    source, folder, steps, leave
        As for :class:`Run`.
    models : mapping of str to str
        Sources of the potentials by name.
    options : RankOptions
        How the workers are started.

    Raises
    ------
    ProgramError
        mpi4py or mpiexec is missing. The folder has been prepared then, and the message says what to type.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        models: Mapping[str, str],
        steps: int | None = None,
        leave: Collection[str] = (),
        options: RankOptions | None = None,
    ) -> None:
        cards = {name: card_of(model) for name, model in models.items()}
        # What Python code gives is known when it runs; a rank writes no record for one without dipoles.
        with_dipoles = [name for name, card in cards.items() if card is None or "dipole" in card.properties]
        self._prepare(source, folder, models, with_dipoles, steps, leave)
        self._cards = cards
        ranks = self._ranks(models, options or RankOptions())
        program = find_ipi()
        mpiexec = find_mpiexec()
        if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
            typed = ["mpiexec", "-n", "1", "i-pi", "input.xml"]
            for rank in ranks:
                typed += [":", "-n", "1", "nnqmd", "serve", *rank]
            by_hand = f"cd {shlex.quote(str(folder))} && {shlex.join(typed)}"
            raise ProgramError(
                f"<ffmpi> needs {'mpi4py' if mpiexec else 'mpiexec'}, which is not here.",
                f"pip install 'nnqmd-server[mpi]', or with an MPI of your own: {by_hand}",
            )
        command = [mpiexec, *_flags(mpiexec), "-n", "1", sys.executable]
        command += ["-m", "nnqmd_server.inputs.leash", program, "input.xml"]
        for rank in ranks:
            command += [":", "-n", "1", *_SERVE, *rank]
        self._start(command, {})

    def _ranks(self, models: Mapping[str, str], options: RankOptions) -> list[list[str]]:
        """Arguments of ``nnqmd serve`` for each force field, with all models: ranks then share workers."""
        sources = [f"{name}={absolute(source)}" for name, source in models.items()]
        ranks = []
        for part, record in zip(self.parts, self.records, strict=True):
            words = [*sources, "--door", "mpi", "--potential", part.potential]
            words += ["--name", part.field.name] if part.field.name else []
            words += [
                "--template",
                write_template(part, self.folder).name,
                "--beads",
                str(part.force.n_beads),
            ]
            words += ["--dipoles", record.name] if record else []
            extras = self._extras(part, options.extras)
            words += ["--extras", " ".join(extras)] if extras else []
            ranks.append([*words, *options.words(), "--logs", "logs"])
        return ranks

    def _extras(self, part: Part, wanted: Sequence[str]) -> Sequence[str]:
        """The extras that a part gives; Python code and the only part say themselves what they cannot."""
        card = self._cards[part.potential]
        if card is None or len(self.parts) == 1:
            return wanted
        return [name for name in wanted if name in EXTRAS and EXTRAS[name].source in card.properties]


def find_mpiexec() -> str | None:
    """The mpiexec beside this Python, or on the PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.is_file() else shutil.which("mpiexec")


def _flags(mpiexec: str) -> list[str]:
    """What Open MPI must be told: i-PI and our ranks mostly wait, and the workers need the cores."""
    told = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if "Open MPI" not in told.stdout:
        return []
    return ["--oversubscribe", "--bind-to", "none", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
