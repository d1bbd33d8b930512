"""``nnqmd keys``: keys for pools that are reached over TCP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnqmd_server.cli.terminal import console

EXAMPLES = """
Examples:

  nnqmd keys ~/pool-keys
      makes pool.key, door.key and worker.key

  nnqmd keys ~/pool-keys --add alice --role door
      one more key for doors, in alice.key

  nnqmd keys ~/pool-keys --revoke alice
"""


def keys(
    folder: Annotated[Path, typer.Argument(help="folder of the key files")],
    add: Annotated[str, typer.Option(metavar="NAME", help="make one more key of this name")] = "",
    role: Annotated[str, typer.Option(help="who it is for: door or worker")] = "door",
    revoke: Annotated[str, typer.Option(metavar="NAME", help="take the key of this name back")] = "",
) -> None:
    """Make the keys with which a pool, its doors and its workers know each other over TCP."""
    from nnqmd_server.errors import InputError
    from nnqmd_server.pool.keys import ROLES, add_key, make_keys, revoke_key

    if add and revoke:
        raise InputError("--add and --revoke are two steps.", "Give one of them.")
    if role not in ROLES:
        raise InputError(f"There is no role {role!r}.", "Use --role door or --role worker.")
    if revoke:
        revoke_key(folder, revoke)
        console.print(f"{revoke} is let in no more once the pool has been started again.")
        return
    if add:
        if not add.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{add!r} is not a name for a key.", "Use letters, digits, hyphen, underscore.")
        file = add_key(folder, role, add)
        console.print(f"{file}: for {add}'s {role}s; the pool lets it in once it has been started again.")
        return
    pool, door, worker = make_keys(folder)
    console.print(f"{pool}: stays with the pool.          nnqmd serve ... --keys {pool}")
    console.print(f"{door}: copy to where i-PI runs.      <parameters>{{..., keys: door.key}}")
    console.print(f"{worker}: copy to where workers run.  nnqmd worker ... --keys worker.key")
    console.print("Nobody else may be able to read the copies: scp -p keeps the mode.")
    console.print("Instead of --keys, NNQMD_KEYS may hold the file or its folder.")
