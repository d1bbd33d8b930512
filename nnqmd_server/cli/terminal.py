"""What every command prints through."""

from rich.console import Console
from rich.text import Text

from nnqmd_server.errors import NnqmdError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def show_error(error: NnqmdError) -> None:
    """Print what is wrong and the fix."""
    errors.print(Text("Error: ", style="bold red") + Text(error.what))
    if error.fix:
        errors.print(Text("Fix:   ", style="bold") + Text(error.fix))
