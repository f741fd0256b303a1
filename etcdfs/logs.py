"""Where the daemon's log goes, and what a line of it looks like.

What this room knows: the three places a log can go to. What it must not know: who logs what.

* `--log-file FILE`: appended to; reopened when logrotate moves it away. What cannot be written
  is lost.
* in the foreground: stderr, where systemd and container engines expect it. What whoever reads it
  leaves unread is lost, and counted.
* in the background: syslog (the journal under systemd), if there is one; else nowhere.

Concurrency: handlers are called on any thread, under their own locks. None of them waits for
another process: a daemon that waits for its own log can hang every user of the mount.
"""

import contextlib
import logging
import logging.handlers
import os
import queue
import socket
import sys
import threading
import traceback
from typing import Final, final

from etcdfs.handshake import LogSettings

LEVELS: Final = ("debug", "info", "warning", "error")

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SYSLOG_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"  # syslog adds the time
_SYSLOG_SOCKET: Final = "/dev/log"
_STDERR: Final = 2

LINES_MAX: Final = 1000
"""Records that wait for whoever reads stderr; more are lost."""
PARTING_S: Final = 1.0
"""How long the end of the daemon waits for the last of them to be read."""

_FACILITY_DAEMON: Final = 3 << 3  # syslog(3)


def setup_logging(settings: LogSettings, *, foreground: bool) -> None:
    """Send everything that is logged from `settings.level` on to its place.

    Raises:
        OSError: The log file cannot be opened.
    """
    root = logging.getLogger()
    root.setLevel(settings.level.upper())
    root.addHandler(_handler(settings, foreground=foreground))
    if settings.file is not None and not foreground:
        _connect_output(settings.file)


def _connect_output(file: str) -> None:
    """Send what is written past the log, such as the last words of a crash, to its file, too."""
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _handler(settings: LogSettings, *, foreground: bool) -> logging.Handler:
    handler: logging.Handler
    if settings.file is not None:
        handler = LogFileHandler(settings.file, errors="backslashreplace")
    elif foreground:
        handler = StderrHandler()
    else:
        handler = SyslogHandler(_SYSLOG_SOCKET)
        handler.setFormatter(logging.Formatter(_SYSLOG_FORMAT))
        return handler
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler


@final
class LogFileHandler(logging.handlers.WatchedFileHandler):
    """Appends each record to a file, and opens it again when it was moved away, or loses it.

    Its base class raises when the file cannot be opened again (the directory was removed, the
    disk is gone or full): whoever logs would get that error, and a mount would end by it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; the file is tried anew with each."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        """Lose a record quietly that the disk has no room for.

        The traceback that logging would print goes to the same file.
        """
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)


@final
class StderrHandler(logging.Handler):
    """Writes each record to stderr, from a thread of its own: only that waits for the reader.

    A pipe that nobody reads is full after 64 KiB, and who writes into it then stops. It cannot be
    made not to block: whoever else has it open would be surprised. Python's own `sys.stderr` is
    passed by, as its lock would be held for as long as that takes, and the interpreter wants it
    when it ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(LINES_MAX)
        self._lost = 0
        threading.Thread(target=self._write_all, name="stderr", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one record over, or lose it."""
        try:
            self._offer(self.format(record))
        except Exception:  # noqa: BLE001 - logging's own rule: a wrong call must not end anything
            self._offer(traceback.format_exc())

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        if self._is_written() and self._lost:
            self._confess()
            self._is_written()

    def _is_written(self) -> bool:
        with self._lines.all_tasks_done:
            return self._lines.all_tasks_done.wait_for(
                lambda: not self._lines.unfinished_tasks, PARTING_S
            )

    def _offer(self, text: str) -> None:
        self._confess()
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self._lost += 1

    def _confess(self) -> None:
        """Say how many records were lost, as soon as there is room for that."""
        if not self._lost or self._lines.full():
            return
        note = "%d line(s) of the log were lost: nobody read them"
        level, count = logging.WARNING, self._lost
        self._lines.put_nowait(
            self.format(logging.LogRecord(__name__, level, "", 0, note, (count,), None))
        )
        self._lost = 0

    def _write_all(self) -> None:
        while True:
            rest = f"{self._lines.get()}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # whoever read it is gone
                while rest:
                    rest = rest[os.write(_STDERR, rest) :]
            self._lines.task_done()


@final
class SyslogHandler(logging.Handler):
    """Sends each record to syslog as one datagram, or drops it; never waits.

    `logging.handlers.SysLogHandler` would do but for its blocking socket: a stalled syslog
    would stall the mount.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a missing or stalled syslog loses it."""
        text = (
            f"<{_FACILITY_DAEMON | _severity(record)}>etcdfs[{os.getpid()}]: {self.format(record)}"
        )
        with contextlib.suppress(OSError):
            self._socket.sendto(text.encode(errors="backslashreplace"), self._path)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def _severity(record: logging.LogRecord) -> int:
    """Return the severity that syslog(3) has for a level."""
    if record.levelno >= logging.ERROR:
        return 3
    if record.levelno >= logging.WARNING:
        return 4
    return 6 if record.levelno >= logging.INFO else 7
