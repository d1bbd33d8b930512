"""The ``nnqmd`` command: one short file per subcommand; parse, call, print.

The command files import the rooms they use inside their functions, so that ``nnqmd --help``
does not wait for torch.
"""

from __future__ import annotations

import sys

import typer

from nnqmd_server import __version__
from nnqmd_server.cli import (
    bench,
    data,
    dipole,
    fidelity,
    keys,
    label,
    model,
    replay,
    run,
    serve,
    spectrum,
    status,
    train,
    worker,
)
from nnqmd_server.cli.terminal import console, show_error
from nnqmd_server.doors.mpi_job import end_job, has_joined, started_by_mpiexec
from nnqmd_server.errors import NnqmdError

app = typer.Typer(
    help="Neural-network forces for i-PI path-integral dynamics, and the spectra that follow.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("label", epilog=label.EXAMPLES)(label.label)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("worker", epilog=worker.EXAMPLES)(worker.worker)
app.command("keys", epilog=keys.EXAMPLES)(keys.keys)
app.command("run", epilog=run.EXAMPLES)(run.run)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
app.command("fidelity", epilog=fidelity.EXAMPLES)(fidelity.fidelity)
app.command("status", epilog=status.STATUS_EXAMPLES)(status.status)
app.command("top", epilog=status.TOP_EXAMPLES)(status.top)
app.command("replay", epilog=replay.EXAMPLES)(replay.replay)
app.command("dipole", epilog=dipole.EXAMPLES)(dipole.dipole)
app.add_typer(spectrum.app, name="spectrum")
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        console.print(f"nnqmd-server {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors that a user can mend are shown in words, without a traceback."""
    status: str | int | None = 0
    try:
        app()
    except NnqmdError as error:
        show_error(error)
        status = 1
    except SystemExit as end:
        status = end.code
    if status and "--door" in sys.argv and started_by_mpiexec() and not has_joined():
        end_job()  # i-PI waits for this process
    sys.exit(status)
