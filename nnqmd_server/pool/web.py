"""The metrics and a small live page of a pool, over HTTP on this machine only. Nothing can be changed here.

``/`` is the page, ``/status.json`` what it shows, ``/metrics`` Prometheus text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socket import socket
from typing import Any

from nnqmd_server.errors import AddressError
from nnqmd_server.pool.metrics import CONTENT_TYPE, Metrics
from nnqmd_server.pool.watch import Watch

MAX_CONNECTIONS = 16
"""Connections that are served at once; more are closed."""

TIMEOUT = 10.0
"""How long a client may be silent [s]."""

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""What a browser on this machine, or one behind a tunnel, calls us. Any other name is that of a web site
which was made to point here, to read this page in the name of whoever visits it (DNS rebinding)."""


def page() -> tuple[bytes, str]:
    """The page, and the policy that lets a browser run only what is in it and ask only us."""
    text = files("nnqmd_server.pool").joinpath("page.html").read_text("utf-8")

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in inside)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(self, port: int, answers: dict[str, Callable[[], tuple[bytes, str]]], policy: str) -> None:
        self.answers, self.policy = answers, policy
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: socket, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: object, client_address: Any) -> None:
        """A client that hangs up in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT
    server_version = "nnqmd"
    sys_version = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").lower()
        answer = self.server.answers.get(self.path.partition("?")[0])
        if re.sub(r":\d+$", "", name) not in LOCAL_NAMES:
            self._say(HTTPStatus.FORBIDDEN, b"Only for this machine: ask for localhost.\n", "text/plain")
        elif answer is None:
            self._say(HTTPStatus.NOT_FOUND, b"There is /, /status.json and /metrics.\n", "text/plain")
        else:
            self._say(HTTPStatus.OK, *answer())

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _other(self) -> None:
        self.close_connection = True  # what it sends is not read
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, b"Nothing can be changed here.\n", "text/plain")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _other  # noqa: N815 - http.server's names

    def _say(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Whoever looks at the page makes no noise in the log."""


class Web:
    """Serves the metrics and the page of a pool until it is closed.

    Parameters
    ----------
    port : int
        On 127.0.0.1; 0 takes a free one, see ``url``.
    watch, status
        As for :class:`~nnqmd_server.pool.metrics.PoolCollector`.

    Raises
    ------
    AddressError
        The port is in use.
    """

    def __init__(self, port: int, watch: Watch, status: Callable[[], dict[str, Any]]) -> None:
        metrics = Metrics(watch, status)
        text, policy = page()
        answers = {
            "/": lambda: (text, "text/html"),
            "/status.json": lambda: (json.dumps(status()).encode(), "application/json"),
            "/metrics": lambda: (metrics.text(), CONTENT_TYPE),
        }
        try:
            self._server = _Server(port, answers, policy)
        except OSError as error:
            raise AddressError(
                f"Cannot listen at 127.0.0.1:{port}: {error.strerror}.", "Choose another --metrics-port."
            ) from error
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="nnqmd-web", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
