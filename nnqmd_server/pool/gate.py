"""The way into a pool: for processes of this machine and of others, with keys, and a count of strangers.

Processes of one machine come over unix sockets in a folder that only the user can enter; they need no keys.
TCP beyond this machine is encrypted and authenticated on both sides with ZeroMQ's CURVE.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.addresses import is_loopback, is_tcp, needs_keys, socket_path
from nnqmd_server.pool.keys import ROLES, PoolKeys, Role
from nnqmd_server.pool.lines import Lines
from nnqmd_server.pool.messages import Frame
from nnqmd_server.pool.remote import bound

_COUNTED = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Entry:
    """Where one kind of peers comes in, doors or workers; made by :meth:`Gate.listen`.

    Attributes
    ----------
    lines : Lines
        Those of this machine.
    addresses : tuple of str
        Where it listens.
    """

    def __init__(self, lines: Lines, router: zmq.Socket | None, addresses: Sequence[str]) -> None:
        self.lines = lines
        self.addresses = tuple(addresses)
        self._router = router

    def register(self, poller: zmq.Poller) -> None:
        """Let a poller wake when something comes."""
        poller.register(self.lines.fileno(), zmq.POLLIN)
        if self._router is not None:
            poller.register(self._router, zmq.POLLIN)

    def receive(self, ready: dict[object, int]) -> Iterator[tuple[bytes, list[memoryview], bool]]:
        """What has come, as the poller says: who, the frames, whether over the network.

        Of each a bounded part, so that nobody who floods one way silences another.
        """
        if self.lines.fileno() in ready:
            for identity, frames in self.lines.receive():
                yield identity, frames, False
        if self._router in ready:
            who, *frames = self._router.recv_multipart(copy=False)
            yield who.bytes, [frame.buffer for frame in frames], True

    def send(self, identity: bytes, frames: Sequence[Frame]) -> bool:
        """Send to somebody who may have gone; whether the connection is there and takes it."""
        if self.lines.holds(identity):
            return self.lines.send(identity, frames)
        if self._router is None:
            return False
        try:
            self._router.send_multipart([identity, *frames], flags=zmq.NOBLOCK)
        except zmq.ZMQError:  # EHOSTUNREACH: gone; EAGAIN: takes nothing any more
            return False
        return True


class Gate:
    """Opens the entries of a pool, checks keys, counts those who are turned away.

    Parameters
    ----------
    keys : PoolKeys, optional
        Without them the pool listens on unix sockets and loopback only.
    """

    def __init__(self, keys: PoolKeys | None = None) -> None:
        self._context = zmq.Context()
        self._keys = keys
        self._entries: list[Entry] = []
        self._routers: list[zmq.Socket] = []
        self._events: list[zmq.Socket] = []
        self._counts: Counter[int] = Counter()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._authenticator: ThreadAuthenticator | None = None
        if keys:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            for role in ROLES:
                self._authenticator.configure_curve_callback(role, _Allowed(keys.allowed[role].values()))

    def listen(self, addresses: str | Iterable[str], role: Role) -> Entry:
        """An entry at one or several addresses; those of TCP let in only the keys of ``role``.

        Raises
        ------
        AddressError
            TCP beyond this machine without keys, no address, or one that is taken.
        """
        several = [addresses] if isinstance(addresses, str) else list(addresses)
        lines, router = Lines(), None
        if any(map(is_tcp, several)):
            router = self._context.socket(zmq.ROUTER)
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tells when a connection is gone
            bound(router)
            self._routers.append(router)
            self._events.append(router.get_monitor_socket(_COUNTED))
        entry = Entry(lines, router, several)
        self._entries.append(entry)
        for address in several:
            try:
                if is_tcp(address):
                    self._bind(router, address, role)
                else:
                    lines.listen(socket_path(address))
            except (OSError, zmq.ZMQError) as error:
                raise AddressError(
                    f"Cannot listen at {address}: {error}.", "Choose another address or port."
                ) from error
        return entry

    def _bind(self, router: zmq.Socket, address: str, role: Role) -> None:
        if self._keys is not None:
            router.curve_server = True
            router.curve_publickey = self._keys.public.encode()
            router.curve_secretkey = self._keys.secret.encode()
            router.zap_domain = role.encode()
        elif not is_loopback(address):
            raise needs_keys(address)
        router.bind(address)

    def open(self) -> None:
        """Begin to count; after the last :meth:`listen`."""
        if self._events:
            self._thread = threading.Thread(target=self._watch, name="nnqmd-gate", daemon=True)
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
        strangers = sum(entry.lines.strangers for entry in self._entries)
        return {"wrong_key": wrong, "no_handshake": max(0, others) + strangers}

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
        """Close the gate and its entries; from the thread that uses them, or where none does yet."""
        self._closing.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(5)
        for router in self._routers:
            with contextlib.suppress(zmq.ZMQError):
                router.disable_monitor()
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        for entry in self._entries:
            entry.lines.close()
        self._context.destroy(linger=100)


class _Allowed:
    """Public keys that may come in, as the authenticator asks for them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(key.encode() for key in keys)

    def callback(self, _domain: str, key: bytes) -> bool:
        return key in self._keys
