"""`--metrics-listen`: the metrics of a mount by HTTP, for Prometheus, and whether it serves.

Knows: HTTP, as far as Python's own server does not. Does not know: what the metrics are.

    GET /metrics    200, Prometheus' text format
    GET /healthz    200 while the mount shows what it has, 503 when it shows nothing; the body says why

That etcd is away is no reason to be unhealthy: a mount goes on showing what it had, and whoever
restarts it then has nothing.

Concurrency: each request has a thread, which asks the trio thread for the answer; a reader who is
slow holds up his own thread only, and not for longer than `REQUEST_TIMEOUT_S`.
"""

import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final, final

import trio

from etcdfs.errors import MetricsAddressError

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 5.0
"""How long a client may take to send a request, or to read a part of the answer."""

LOOK_S: Final = 0.5
"""How often the server looks whether it is to end."""

CLIENTS_MAX: Final = 16
"""Clients at once; the connection of one more is closed at once."""

_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format

Page = tuple[HTTPStatus, bytes]


@asynccontextmanager
async def serving_metrics(
    address: tuple[str, int], pages: Mapping[str, Callable[[], Page]]
) -> AsyncIterator[int]:
    """Answer requests while the context lasts; yield the port, which was chosen if it is 0.

    Args:
        address: Where to listen: a host and a port.
        pages: What makes each page, on the trio thread.

    Raises:
        MetricsAddressError: Nobody can listen there.
    """
    token = trio.lowlevel.current_trio_token()

    def answer(path: str) -> Page | None:
        make = pages.get(path)
        return None if make is None else trio.from_thread.run_sync(make, trio_token=token)

    try:
        found = await trio.socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        server = _Server(found[0], answer)
    except OSError as exc:
        host, port = address
        msg = f"--metrics-listen: nobody can listen on {host}:{port}: {exc.strerror or exc}"
        raise MetricsAddressError(msg) from None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, partial(server.serve_forever, LOOK_S))
        try:
            log.info("metrics at http://%s:%d/metrics", *server.server_address[:2])
            yield int(server.server_address[1])
        finally:
            with trio.CancelScope(shield=True):  # for `LOOK_S` at most
                await trio.to_thread.run_sync(server.shutdown)
            server.server_close()


@final
class _Server(ThreadingHTTPServer):
    """The server; a thread for each client, up to `CLIENTS_MAX`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = CLIENTS_MAX

    def __init__(self, where: tuple[Any, ...], answer: Callable[[str], Page | None]) -> None:
        self.address_family, _, _, _, address = where
        self.answer = answer
        self._places = threading.BoundedSemaphore(CLIENTS_MAX)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- of socketserver
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- the same
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, *_: object) -> None:
        log.debug("a request for metrics failed: %r", sys.exception())


@final
class _Handler(BaseHTTPRequestHandler):
    """One client."""

    timeout: ClassVar[float | None] = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        page = self.server.answer(self.path.partition("?")[0])
        status, body = page or (HTTPStatus.NOT_FOUND, b"/metrics or /healthz\n")
        self.send_response(status)
        self.send_header("Content-Type", _TEXT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "etcdfs"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of http.server
        log.debug(format, *args)
