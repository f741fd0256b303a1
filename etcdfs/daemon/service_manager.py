"""What the service manager that started this process is told: systemd's protocol, sd_notify(3).

Knows: the socket, the watchdog, and which words there are. Does not know: what the state of a mount
is.

The watchdog is fed by the loop that answers the kernel: what hangs there hangs everybody who
touches the mount. An etcd that is away is no reason to be started again.

Concurrency: trio thread; nothing waits for the manager.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Final, final

import trio

STATUS_S: Final = 5.0
"""How often the status is looked at, at least."""

_FEEDINGS: Final = 2
"""Times that the watchdog is fed in the time it waits; sd_watchdog_enabled(3) advises two."""


@final
class ServiceManager:
    """The manager, if there is one; else nothing is said."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        """Talk to a socket.

        Args:
            address: Its path, or `@` and an abstract name; empty: there is no manager.
            watchdog_s: How long it waits for a sign of life.
        """
        # --- constants
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._is_watched = bool(address) and watchdog_s is not None
        self._pause_s = min(STATUS_S, (watchdog_s or STATUS_S * _FEEDINGS) / _FEEDINGS)
        # --- mutable state
        self._status = ""

    def tell(self, *lines: str) -> None:
        """Say something; what cannot be said is lost."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(errors="surrogateescape"), self._address)

    def reloading(self) -> None:
        """Say that what can be read again is being read; `READY=1` says that it was."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def run(self, status: Callable[[], str]) -> None:
        """Feed the watchdog and keep the status up to date, for ever.

        Args:
            status: Returns one line for a person.
        """
        if not self._address:
            return
        while True:
            lines = ["WATCHDOG=1"] if self._is_watched else []
            if (line := status()) != self._status:
                self._status = line
                lines.append(f"STATUS={line}")
            if lines:
                self.tell(*lines)
            await trio.sleep(self._pause_s)


def find_service_manager() -> ServiceManager:
    """Return the manager that the environment names, and take it out of there.

    Nobody that the daemon starts has anything to say to it.
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    wait_us, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    is_meant = wait_us.isdigit() and int(wait_us) > 0 and pid in {"", str(os.getpid())}
    return ServiceManager(address, int(wait_us) / 1e6 if is_meant else None)
