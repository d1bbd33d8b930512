"""What every command prints through, and options that several have."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from nnqmd_server.errors import NnqmdError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

EXTRAS_HELP = (
    "what i-PI gets as extras, as far as the model has it: dipole, BEC (Born charges), charges,"
    " committee_pot, committee_force, committee_virial"
)

Restarts = Annotated[
    int, typer.Option(min=0, help="how often in an hour a worker that has died is started again")
]


def show_error(error: NnqmdError) -> None:
    """Print what is wrong and the fix."""
    errors.print(Text("Error: ", style="bold red") + Text(error.what))
    if error.fix:
        errors.print(Text("Fix:   ", style="bold") + Text(error.fix))
