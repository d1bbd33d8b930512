"""The key files of a pool, its doors and its workers.

Each holds a pair of CURVE keys (Curve25519); the pool's also the public keys of those that it lets in, and
theirs also the pool's, so that both sides know whom they talk to.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import zmq

from nnqmd_server.errors import AddressError, OutputError

Role = Literal["door", "worker"]
ROLES: tuple[Role, ...] = ("door", "worker")

KEYS_VARIABLE = "NNQMD_KEYS"
"""Environment variable with the key file, or the folder of key files, of a process that is given none."""

_FORMAT = "nnqmd key 1"
_MAX_FILE = 1 << 20


@dataclass(frozen=True)
class PoolKeys:
    """The keys of a pool: its own pair, and the public keys that may come in, by role and name."""

    public: str
    secret: str
    allowed: dict[Role, dict[str, str]]


@dataclass(frozen=True)
class PeerKeys:
    """The keys of a door or a worker: its own pair, and the pool's public key."""

    role: Role
    public: str
    secret: str
    pool: str


def make_keys(folder: Path) -> list[Path]:
    """Make the key files of a pool, of its doors and of its workers, each with mode 0600.

    Raises
    ------
    OutputError
        There are keys in the folder already, or it cannot be written.
    """
    files = [folder / "pool.key", *(folder / f"{role}.key" for role in ROLES)]
    for file in files:
        if file.exists():
            raise OutputError(
                f"{file} exists already.", "Choose another folder, or add a key to it with --add NAME."
            )
    public, secret = _pair()
    peers = {role: _pair() for role in ROLES}
    allowed = {role: {role: peers[role][0]} for role in ROLES}
    _write(files[0], {"role": "pool", "public": public, "secret": secret, "allowed": allowed})
    for role, file in zip(ROLES, files[1:], strict=True):
        _write(file, _peer(role, peers[role], public))
    return files


def add_key(folder: Path, role: Role, name: str) -> Path:
    """Make one more key for a door or a worker, so that it can be taken back alone; returns its file.

    Raises
    ------
    OutputError
        There is a key of this name already, or the folder cannot be written.
    """
    pool = _read(folder / "pool.key")
    file = folder / f"{name}.key"
    taken = {known for keys in pool["allowed"].values() for known in keys}
    if file.exists() or name in taken:
        raise OutputError(f"{folder} has a key {name} already.", "Choose another name.")
    pair = _pair()
    pool["allowed"][role][name] = pair[0]
    _write(file, _peer(role, pair, pool["public"]))
    _write(folder / "pool.key", pool)
    return file


def revoke_key(folder: Path, name: str) -> None:
    """Take a key back: the pool lets it in no more once it has been started again.

    Raises
    ------
    AddressError
        The pool has no such key.
    """
    pool = _read(folder / "pool.key")
    if not any(keys.pop(name, None) for keys in pool["allowed"].values()):
        known = ", ".join(sorted(k for keys in pool["allowed"].values() for k in keys))
        raise AddressError(f"{folder / 'pool.key'} has no key {name!r}.", f"It has {known or 'none'}.")
    _write(folder / "pool.key", pool)


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _peer(role: Role, pair: tuple[str, str], pool: str) -> dict:
    return {"role": role, "public": pair[0], "secret": pair[1], "pool": pool}


def _write(file: Path, content: dict) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made with its mode: a file that is narrowed later was open for a moment.
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
            json.dump({"format": _FORMAT, **content}, output, indent=1)
            output.write("\n")
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(
            f"The key file {file} cannot be written: {error}.", "Choose another folder."
        ) from error


def _read(file: Path) -> dict:
    wrong = f"{file} is not a key file"
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE:
            raise AddressError(f"{wrong}.", "Make keys with `nnqmd keys FOLDER`.")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise AddressError(f"The key file {file} can be read by other users.", f"chmod 600 {file}")
        content = json.loads(file.read_text())
        if content["format"] != _FORMAT or content["role"] not in {"pool", *ROLES}:
            raise AddressError(f"{wrong} of this version.", "Make keys with `nnqmd keys FOLDER`.")
        public, secret = str(content["public"]), str(content["secret"])
        matches = zmq.curve_public(secret.encode()).decode() == public
        others = [content["pool"]] if "pool" in content else _all_of(content["allowed"])
        whole = all(len(key.encode()) == 40 for key in others)
    except FileNotFoundError as error:
        raise AddressError(f"There is no key file {file}.", "Make keys with `nnqmd keys FOLDER`.") from error
    except OSError as error:
        raise AddressError(f"The key file {file} cannot be read: {error}.", "Check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, zmq.ZMQError) as error:
        raise AddressError(f"{wrong}: {error}.", "Make keys with `nnqmd keys FOLDER`.") from error
    if not matches or not whole:
        raise AddressError(f"The keys in {file} do not belong together.", "Copy the file again.")
    return content


def _all_of(allowed: dict[str, dict[str, str]]) -> list[str]:
    return [key for role in ROLES for key in allowed[role].values()]


def pool_keys(path: str | Path | None = None) -> PoolKeys | None:
    """The keys of a pool from ``pool.key`` or a folder that holds it; ``$NNQMD_KEYS`` unless given.

    Raises
    ------
    AddressError
        The file is missing, is not a pool's, or can be read by others.
    """
    file = _key_file(path, "pool")
    if file is None:
        return None
    content = _read(file)
    if content["role"] != "pool":
        raise AddressError(f"{file} is the key of a {content['role']}.", "Give the pool its pool.key.")
    return PoolKeys(content["public"], content["secret"], content["allowed"])


def peer_keys(path: str | Path | None, role: Role) -> PeerKeys | None:
    """The keys of a door or a worker from its file or folder; ``$NNQMD_KEYS`` unless given.

    Raises
    ------
    AddressError
        The file is missing, is of another role, or can be read by others.
    """
    file = _key_file(path, role)
    if file is None:
        return None
    content = _read(file)
    if content["role"] != role:
        raise AddressError(f"{file} is the key of a {content['role']}.", f"Give the {role} its {role}.key.")
    return PeerKeys(role, content["public"], content["secret"], content["pool"])


def _key_file(path: str | Path | None, role: str) -> Path | None:
    given = path or os.environ.get(KEYS_VARIABLE)
    if not given:
        return None
    given = Path(given).expanduser()
    return given / f"{role}.key" if given.is_dir() else given
