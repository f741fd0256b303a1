"""Signals: what is asked of a running daemon from outside.

Knows: which signal means what, and when. Does not know: how a mount is taken down, or what it
counts.

SIGTERM and SIGINT end the mount in order. SIGHUP does, too, where it can only mean that the
terminal is gone on which the daemon runs; a daemon without a terminal reads again what may have
changed under it, as daemons do. One that is ignored (nohup) stays so. SIGUSR1 logs the counters.

Concurrency: trio thread; one signal after the other.
"""

import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import trio

from etcdfs.daemon.service_manager import ServiceManager
from etcdfs.errors import StoreError

log = logging.getLogger(__name__)

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
