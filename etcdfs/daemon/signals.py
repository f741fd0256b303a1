"""What others ask of a running daemon, and are told: signals, and the service manager.

Knows: which signal means what, and when; systemd's protocol (sd_notify(3)), its socket, its
watchdog. Does not know: how a mount is taken down, what its state is, what it counts.

SIGTERM and SIGINT end the mount in order. SIGHUP does, too, where it can only mean that the
terminal is gone on which the daemon runs; a daemon without a terminal reads again what may have
changed under it, as daemons do. One that is ignored (nohup) stays so. SIGUSR1 logs the counters.

The watchdog is fed by the loop that answers the kernel: what hangs there hangs everybody who
touches the mount. An etcd that is away is no reason to be started again.

Concurrency: trio thread; one signal after the other, and nothing waits for the manager.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import trio

from etcdfs.errors import StoreError

log = logging.getLogger(__name__)

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


_TERMINAL: Final = "/dev/tty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a mount that is being served can do.

    Attributes:
        statistics: Return all counters.
        reread: Connect to etcd with what certificates and password files hold now.
        end: Publish what was written, and have the mount taken away.
    """

    statistics: Callable[[], Mapping[str, Any]]
    reread: Callable[[], Awaitable[None]]
    end: Callable[[], Awaitable[None]]


@final
class Signals:
    """Hears signals. One for each daemon."""

    def __init__(self, manager: ServiceManager, give_up: Callable[[], None]) -> None:
        """Make it; nothing is heard before `run`.

        Args:
            manager: Told of reloads and of the end.
            give_up: Ends a start that has not come to a mount yet.
        """
        # --- dependencies
        self._manager = manager
        self._give_up = give_up
        # --- mutable state
        self.serving: Serving | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wait for signals, for ever."""
        wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        hangs_up = _has_terminal()
        with trio.open_signal_receiver(*wanted) as signals:
            task_status.started()
            async for number in signals:
                match number:
                    case signal.SIGUSR1:
                        self._log_statistics()
                    case signal.SIGHUP if not hangs_up:
                        await self._reload()
                    case _:
                        await self._end(signal.Signals(number).name)

    def _log_statistics(self) -> None:
        if self.serving is not None:
            log.info("statistics: %s", json.dumps(self.serving.statistics()))

    async def _reload(self) -> None:
        if self.serving is None:  # what is read now will be what is there now
            return
        self._manager.reloading()
        # The log looks for its file with each line, so that this one opens it again.
        log.info("SIGHUP: reading certificates and the password again")
        try:
            await self.serving.reread()
        except StoreError as exc:
            log.warning("the connection to etcd stays as it was: %s", exc)
        finally:
            self._manager.tell("READY=1")

    async def _end(self, name: str) -> None:
        if self.serving is None:
            self._give_up()
            return
        self._manager.tell("STOPPING=1", "STATUS=Unmounting")
        log.info("%s: taking down the mount", name)
        await self.serving.end()


def _has_terminal() -> bool:
    """Tell whether this process has a controlling terminal (tty(4)): only that can hang up."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
