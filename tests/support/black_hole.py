"""A way to etcd that can swallow every byte while connections stay open: a half-open TCP.

Knows: how to carry bytes between a client and one server, and how to stop doing so without either
noticing.

Concurrency: one thread of its own carries; `swallow` and `carry` may be called from anywhere.
"""

import contextlib
import selectors
import socket
import threading
from typing import final

from etcdfs.options import Endpoint

_CHUNK = 1 << 16


@final
class BlackHole:
    """A TCP proxy in front of one server. A context manager; owned by one test."""

    def __init__(self, server: Endpoint) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._swallowing = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, name="black-hole", daemon=True)

    @property
    def url(self) -> str:
        """Return the address to connect to."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "BlackHole":
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._wake.close()
        self._thread.join(10)
        for sock in (*self._peers, self._listener, self._woken):
            sock.close()
        self._selector.close()

    def swallow(self) -> None:
        """Take every byte and pass none on; new connections are accepted and lead nowhere."""
        self._swallowing.set()

    def carry(self) -> None:
        """Carry bytes again. Connections from which some were taken are closed."""
        self._swallowing.clear()
        self._wake.send(b"x")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    self._accept()
                elif sock is self._woken:
                    if not self._woken.recv(1):
                        return
                    for peer in list(self._peers):
                        self._drop(peer)
                else:
                    self._pass_on(sock)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection((self._server.host, self._server.port), 5)
        except OSError:
            client.close()
            return
        for sock, peer in ((client, server), (server, client)):
            self._peers[sock] = peer
            self._selector.register(sock, selectors.EVENT_READ)

    def _pass_on(self, sock: socket.socket) -> None:
        if sock not in self._peers:
            return
        with contextlib.suppress(OSError):
            data = sock.recv(_CHUNK)
            if data:
                if not self._swallowing.is_set():
                    self._peers[sock].sendall(data)
                return
        self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        if sock not in self._peers:
            return
        peer = self._peers.pop(sock)
        del self._peers[peer]
        for end in (sock, peer):
            self._selector.unregister(end)
            end.close()
