"""The wires between the members of a cluster, for partitions that clients do not notice.

Knows: sockets and threads, and that etcd's members say in the header of their requests to one
another who they are. Does not know: what else they say.

Concurrency: a thread per direction of each connection; partitions may be made at any time.
"""

import contextlib
import re
import socket
import threading
from typing import Final, final

_CHUNK: Final = 65536
_FROM: Final = re.compile(rb"^X-Server-From: ([0-9a-f]+)\r$", re.MULTILINE | re.IGNORECASE)


@final
class Wires:
    """Passes on what members tell one another, or not. A context manager of its cluster's.

    Attributes:
        members: The ids of the members, by the address at which the others find them.
        silenced: Who is not heard by whom any more, by their ids; nobody is told.
    """

    def __init__(self) -> None:
        self.members: dict[str, int] = {}
        self.silenced: set[tuple[int, int]] = set()
        self._sockets: list[socket.socket] = []
        self._listeners: list[socket.socket] = []

    def to(self, port: int) -> str:
        """Return the address at which others find the member that listens on a port."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._start(self._accept, listener, port, address)
        return address

    def heal(self) -> None:
        """Let everybody hear everybody; what was under way is lost with its connection."""
        self.silenced.clear()
        while self._sockets:
            with contextlib.suppress(OSError):
                self._sockets.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all connections, for good."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.heal()

    def _accept(self, listener: socket.socket, port: int, address: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._start(self._lead, listener.accept()[0], port, address)

    def _lead(self, client: socket.socket, port: int, address: str) -> None:
        """Pass on what a member, which says who it is, and the member it asks have to say."""
        with contextlib.suppress(OSError), client:
            first = client.recv(_CHUNK)
            with socket.create_connection(("127.0.0.1", port)) as server:
                self._sockets += [client, server]
                said = _FROM.search(first)
                sender = int(said[1], 16) if said else 0
                self._start(self._pass_on, server, client, address, sender, True)
                server.sendall(first)
                self._pass_on(client, server, address, sender, False)

    def _pass_on(
        self, source: socket.socket, sink: socket.socket, address: str, sender: int, is_answer: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                receiver = self.members.get(address, 0)
                way = (receiver, sender) if is_answer else (sender, receiver)
                if way not in self.silenced:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    @staticmethod
    def _start(target: object, *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]
