"""The way into a pool: sockets with keys where they can be reached from elsewhere, and a count of strangers.

Sockets between processes of one machine are ipc files in a folder that only the user can enter; they need no
keys. TCP beyond this machine is encrypted and authenticated on both sides with ZeroMQ's CURVE.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.keys import KEYS_VARIABLE, ROLES, PeerKeys, PoolKeys, Role, peer_keys
from nnqmd_server.pool.messages import MAX_MESSAGE

HANDSHAKE = 10_000
"""How long a stranger may take to say who he is [ms]; then the connection is closed."""

MAX_TCP_MESSAGE = 1 << 28
"""Longest frame over TCP [bytes]: what a stranger may make us allocate before he has proved who he is."""

SURE = 3.0
"""So long must a pool have turned us away, whenever we tried, before that is believed [s]."""

QUEUE = 64
"""Messages of one peer that may wait to be read; a peer that sends more is slowed down."""


def is_tcp(address: str) -> bool:
    """Whether an address is one of TCP."""
    return address.startswith("tcp://")


def is_loopback(address: str) -> bool:
    """Whether a TCP address can be reached from this machine only."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or * for all interfaces
        return False


def needs_keys(address: str) -> AddressError:
    """The error for TCP beyond this machine without keys."""
    return AddressError(
        f"{address} can be reached from other machines, where everybody could connect or listen.",
        f"Make keys with `nnqmd keys FOLDER` and give --keys (or ${KEYS_VARIABLE}); or use ipc://.",
    )


def _bound(socket: zmq.Socket, address: str) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_TCP_MESSAGE if is_tcp(address) else MAX_MESSAGE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    if is_tcp(address):
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


def check_keys(address: str, keys: str | Path | None, role: Role) -> PeerKeys | None:
    """The keys with which an address can be used; None where it needs none.

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, or unusable ones.
    """
    if not is_tcp(address):
        return None
    found = peer_keys(keys, role)
    if found is None and not is_loopback(address):
        raise needs_keys(address)
    return found


def connect(socket: zmq.Socket, address: str, keys: str | Path | None, role: Role) -> Refusals:
    """Connect a door or a worker to its pool, with its keys where the address asks for them.

    Parameters
    ----------
    socket : zmq.Socket
        Not connected yet.
    address : str
        Where the pool listens.
    keys : str or Path, optional
        Key file or folder; ``$NNQMD_KEYS`` unless given. Not used for ipc.
    role : str
        "door" or "worker".

    Returns
    -------
    Refusals
        Says afterwards whether the pool has turned us away.

    Raises
    ------
    AddressError
        TCP beyond this machine without keys, unusable keys, or no address.
    """
    _bound(socket, address)
    found = check_keys(address, keys, role)
    if found is not None:
        socket.curve_publickey, socket.curve_secretkey = found.public.encode(), found.secret.encode()
        socket.curve_serverkey = found.pool.encode()
    refusals = Refusals(socket, address)
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        refusals.close()
        raise AddressError(
            f"{address} is not an address: {error}.", "Use ipc:///folder/name or tcp://HOST:PORT."
        ) from error
    return refusals


_TURNED_AWAY = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

_COUNTED = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Refusals:
    """Whether a pool has turned this connection away; to be read in the thread of the socket.

    Without this a wrong key would look like a pool that does not answer.
    """

    def __init__(self, socket: zmq.Socket, address: str) -> None:
        self._socket = socket
        self._address = address
        self._events = None
        self._since: float | None = None
        if is_tcp(address):
            self._events = socket.get_monitor_socket(_TURNED_AWAY | zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def why(self) -> AddressError | None:
        """The reason, or None; one failure may be of a pool that was just going."""
        while self._events is not None and self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())["event"]
            failed = bool(event & _TURNED_AWAY)
            self._since = (self._since or time.monotonic()) if failed else None
        if self._since is None or time.monotonic() - self._since < SURE:
            return None
        return AddressError(
            f"The pool at {self._address} turns this process away: its key is not one that the pool knows, or"
            " only one of both has keys.",
            f"Give the key file that was made for this pool (--keys, or ${KEYS_VARIABLE}).",
        )

    def close(self) -> None:
        """Stop to watch."""
        if self._events is not None:
            self._socket.disable_monitor()
            self._events = None


def from_network(frame: zmq.Frame) -> bool:
    """Whether a message came over TCP, from this machine or another one."""
    try:
        ipaddress.ip_address(frame.get("Peer-Address"))  # of a socket file it is user, group and process
    except (zmq.ZMQError, ValueError):
        return False
    return True


class Gate:
    """The way into a pool: binds its sockets, checks keys, counts those who are turned away.

    Parameters
    ----------
    context : zmq.Context
        The context of the pool's sockets.
    keys : PoolKeys, optional
        Without them the pool listens on ipc and loopback only.
    """

    def __init__(self, context: zmq.Context, keys: PoolKeys | None = None) -> None:
        self._context = context
        self._keys = keys
        self._events: list[zmq.Socket] = []
        self._watched: list[zmq.Socket] = []
        self._counts: Counter[int] = Counter()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._authenticator: ThreadAuthenticator | None = None
        if keys:
            self._authenticator = ThreadAuthenticator(context)
            self._authenticator.start()
            for role in ROLES:
                self._authenticator.configure_curve_callback(role, _Allowed(keys.allowed[role].values()))

    def listen(self, socket: zmq.Socket, addresses: str | Iterable[str], role: Role) -> None:
        """Bind a socket to one or several addresses; those of TCP let in only the keys of ``role``.

        Raises
        ------
        AddressError
            TCP beyond this machine without keys.
        zmq.ZMQError
            The address is taken.
        """
        for address in [addresses] if isinstance(addresses, str) else addresses:
            # These options hold for the addresses that are bound after them.
            _bound(socket, address)
            guarded = is_tcp(address) and self._keys is not None
            socket.curve_server = guarded
            if guarded:
                socket.curve_publickey = self._keys.public.encode()
                socket.curve_secretkey = self._keys.secret.encode()
                socket.zap_domain = role.encode()
            elif is_tcp(address) and not is_loopback(address):
                raise needs_keys(address)
            if socket not in self._watched:
                self._watched.append(socket)
                self._events.append(socket.get_monitor_socket(_COUNTED))
            socket.bind(address)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="nnqmd-gate", daemon=True)

    def open(self) -> None:
        """Begin to count; after the last :meth:`listen`."""
        if self._thread is not None:
            self._thread.start()

    @property
    def guarded(self) -> bool:
        """Whether TCP asks for keys."""
        return self._keys is not None

    @property
    def turned_away(self) -> dict[str, int]:
        """How many connections came no further than the gate.

        ``wrong_key``: they had a key that is not allowed here. ``no_handshake``: they spoke something else,
        or had no key; one that is just shaking hands counts until it is done.
        """
        wrong = self._counts[zmq.EVENT_HANDSHAKE_FAILED_AUTH]
        others = self._counts[zmq.EVENT_ACCEPTED] - self._counts[zmq.EVENT_HANDSHAKE_SUCCEEDED] - wrong
        return {"wrong_key": wrong, "no_handshake": max(0, others)}

    def _watch(self) -> None:
        poller = zmq.Poller()
        for events in self._events:
            poller.register(events, zmq.POLLIN)
        while not self._closing.is_set():
            for events, _ in poller.poll(100):
                self._counts[int(parse_monitor_message(events.recv_multipart())["event"])] += 1
        for events in self._events:
            events.close(linger=0)

    def close(self) -> None:
        """Close the gate; before the context of the sockets ends, and from the thread that owns them."""
        self._closing.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(5)
        for socket in self._watched:
            with contextlib.suppress(zmq.ZMQError):
                socket.disable_monitor()
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None


class _Allowed:
    """Public keys that may come in, as the authenticator asks for them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(key.encode() for key in keys)

    def callback(self, _domain: str, key: bytes) -> bool:
        return key in self._keys
