"""A TCP proxy between a client and etcd, for what a network does to them.

Knows: sockets and threads. Does not know: what is said through it.

Concurrency: a thread per direction of each connection; the switches may be thrown at any time.
"""

import contextlib
import socket
import threading
from typing import Final, final

from etcdfs.options import Endpoint

_CHUNK: Final = 65536


@final
class Proxy:
    """Passes bytes on, or not. A context manager; owned by the test that made it.

    Attributes:
        endpoint: Where clients connect.
        target: Where they are led; may be changed, for connections to come.
        lose_answers: Whether what the server says is dropped, while what it is told arrives.
        swallow: Whether nothing arrives any more, in either direction, and nobody is told.
    """

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.lose_answers = False
        self.swallow = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self._start(self._accept)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End all connections."""
        while self._sockets:
            with contextlib.suppress(OSError):
                self._sockets.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection((self.target.host, self.target.port))
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                self._start(self._pass_on, client, server, False)
                self._start(self._pass_on, server, client, True)

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(_CHUNK):
                if not self.swallow and not (is_answer and self.lose_answers):
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    @staticmethod
    def _start(target: object, *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]
