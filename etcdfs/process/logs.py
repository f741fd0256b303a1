"""Where the daemon's log goes, and what a line of it looks like.

Knows: the three places a log can go to. Does not know: who logs what.

* `--log-file FILE`: appended to; reopened when logrotate moves it away. What cannot be written
  is lost. It is made for its owner alone: it names files of directories that others may not read.
* in the foreground: stderr, where systemd and container engines expect it. What whoever reads it
  leaves unread is lost, and counted.
* in the background: syslog (the journal under systemd), if there is one; else nowhere.
* `--log-format journal`: systemd's journal, by its own protocol, wherever the daemon runs.

`--log-format json` and `journal` have fields beside the text: the mountpoint, and for an event in
the life of a mount its name and figures, which whoever logs it hands over as `extra`: `event`, a
word, and `fields`, a dictionary. What repeats itself without end is cut off (`Repeats`).

What is logged may be anybody's text, so that it is made printable, and each line of a traceback
begins with blanks: nobody can write a line of their own.

Concurrency: handlers are called on any thread, under their own locks. None of them waits for
another process: a daemon that waits for its own log can hang every user of the mount.
"""

import contextlib
import json
import logging
import os
import queue
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, final

from etcdfs.options import LogSettings
from etcdfs.process.printable import printable

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SYSLOG_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"  # syslog adds the time
_SYSLOG_SOCKET: Final = "/dev/log"
_JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_MESSAGE_MAX: Final = 64 * 1024
"""Characters of a message to the journal: a datagram must fit into the socket's buffer."""
_STDERR: Final = 2

_FILE_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
_FILE_MODE: Final = 0o600
_INDENT: Final = "    "

LOOK_S: Final = 0.5
"""How long a record waits to hear whether the log file is still in its place."""
LOOK_PAUSE_S: Final = 1.0
"""How long nobody looks where the log file's place has come to be inside the mount."""

LINES_MAX: Final = 1000
"""Records that wait for whoever reads stderr; more are lost."""
PARTING_S: Final = 1.0
"""How long the end of the daemon waits for the last of them to be read."""

REPEATS_S: Final = 60.0
REPEATS_MAX: Final = 10
"""So many lines that say the same are logged in `REPEATS_S`."""
_WINDOWS_MAX: Final = 256
"""Texts of which it is known how often they were logged; more are forgotten, the oldest first."""

_FACILITY_DAEMON: Final = 3 << 3  # syslog(3)


def setup_logging(settings: LogSettings, *, foreground: bool, mountpoint: str = "") -> None:
    """Send everything that is logged from `settings.level` on to its place.

    Args:
        settings: What is logged, and how.
        foreground: Whether stderr is read by somebody.
        mountpoint: Tells the lines of several mounts apart, where there are fields.

    Raises:
        OSError: The log file cannot be opened.
    """
    root = logging.getLogger()
    root.setLevel(settings.level.upper())
    handler = _handler(settings, foreground=foreground, mountpoint=mountpoint)
    handler.addFilter(Repeats())
    root.addHandler(handler)
    sys.excepthook = _say_last_words
    if settings.file is not None and not foreground:
        _connect_output(settings.file)


def keep_out_of(device: int) -> None:
    """Never open a log file on a file system, this process' own: it would wait for itself.

    Args:
        device: As `st_dev` has it.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFileHandler):
            handler.avoided = device


def open_log(file: str | Path) -> int:
    """Open a log file to append to.

    Raises:
        OSError: It cannot be.
    """
    return os.open(file, _FILE_FLAGS, _FILE_MODE)


def _connect_output(file: str) -> None:
    """Send what is written past the log, such as the last words of a crash, to its file, too."""
    fd = open_log(file)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def has_journal() -> bool:
    """Tell whether systemd's journal takes messages here."""
    return _JOURNAL_SOCKET.is_socket()


def _handler(settings: LogSettings, *, foreground: bool, mountpoint: str) -> logging.Handler:
    handler: logging.Handler
    if settings.format == "journal":
        return JournalHandler(_JOURNAL_SOCKET, mountpoint)
    line = _FORMAT
    if settings.file is not None:
        handler = LogFileHandler(Path(settings.file))
    elif foreground:
        handler = StderrHandler()
    else:
        handler = SyslogHandler(_SYSLOG_SOCKET)
        line = _SYSLOG_FORMAT
    is_text = settings.format == "text"
    handler.setFormatter(Formatter(line) if is_text else JsonFormatter(mountpoint))
    return handler


@final
class Repeats(logging.Filter):
    """Cuts off what is logged again and again, and says later how much that was.

    An etcd that comes and goes would fill a disk. What is an error is told apart by its whole text,
    so that each lost file is named; else what was written into the code counts, whatever is put
    into it. What is only logged at the level debug is wanted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make it; `clock` is in seconds."""
        super().__init__()
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is to be logged; the first after a pause says what was not."""
        if record.levelno <= logging.DEBUG:
            return True
        text = str(record.msg)
        is_named = record.levelno >= logging.ERROR or text == "%s"
        key = f"{record.name} {text} {record.args if is_named else ''}"
        now = self._clock()
        window = self._windows.pop(key, None)
        if window is None or now >= window.until:
            if window is not None and window.count > REPEATS_MAX:
                _add_to(record, f" (and {window.count - REPEATS_MAX} more like it before)")
            window = _Window(now + REPEATS_S)
        self._windows[key] = window  # at the end: the one that was used last
        if len(self._windows) > _WINDOWS_MAX:
            del self._windows[next(iter(self._windows))]
        window.count += 1
        return window.count <= REPEATS_MAX


@dataclass(slots=True)
class _Window:
    until: float
    count: int = 0


def _add_to(record: logging.LogRecord, note: str) -> None:
    if isinstance(record.args, tuple):  # not the dictionary that there may be instead
        text = str(record.msg)
        record.msg = f"{text if record.args else text.replace('%', '%%')}%s"
        record.args = (*record.args, note)


@final
class Formatter(logging.Formatter):
    """Makes a record printable: one line, and the indented ones of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return all of it, whatever another handler has made of its traceback."""
        record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's name
        """Return the one line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 -- of logging, too
        """Return the traceback; the texts of exceptions in it may be anybody's."""
        return _printable_lines(super().formatException(ei))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record says beside its text: its event's name and figures, printable."""
    event = getattr(record, "event", None)
    if event is None:
        return {}
    figures = getattr(record, "fields", {})
    return {
        "event": event,
        **{n: printable(v) if isinstance(v, str) else v for n, v in figures.items()},
    }


@final
class JsonFormatter(logging.Formatter):
    """Makes an object of a record, in one line."""

    def __init__(self, mountpoint: str) -> None:
        """Name the mount in each of them."""
        super().__init__()
        self._mountpoint = printable(mountpoint)

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        told = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": told.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
            "mountpoint": self._mountpoint,
            "pid": os.getpid(),
            **_fields(record),
        }
        if record.exc_info:
            fields["exception"] = _printable_lines(self.formatException(record.exc_info))
        return json.dumps(fields)


def _printable_lines(text: str) -> str:
    return "\n".join(_INDENT + printable(line) for line in text.split("\n"))


def _say_last_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print what ends the process, as Python does, but printable."""
    lines = "".join(traceback.format_exception(kind, error, trace)).rstrip("\n")
    sys.stderr.write(f"{_printable_lines(lines)}\n")


class _InsideError(OSError):
    """The log file's path leads into the mount."""


@final
class LogFileHandler(logging.Handler):
    """Appends each record to a file, and opens it again when it was moved away, or loses it.

    A thread of its own follows the path, which may come to lead anywhere: into the mount, so that
    who serves that would wait for himself, or into a network file system that does not answer. A
    record waits a moment for what it finds, but no longer once it did so in vain.

    Attributes:
        avoided: Of which device no file is to be opened.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
        """
        super().__init__()
        self.avoided: int | None = None
        self._path = path
        self._fd: int | None = open_log(path)
        self._is_patient = True
        self._looks = False
        self._looks_from = 0.0
        self._questions: queue.SimpleQueue[tuple[int | None] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int | _InsideError | None] = queue.SimpleQueue()
        threading.Thread(target=self._look_out, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; the file is looked for anew with each."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 - logging's own rule: a wrong call must not end anything
            self.handleError(record)
            return
        self._look()
        with contextlib.suppress(OSError):  # there is no room on the disk
            if self._fd is not None:
                os.write(self._fd, line)

    def close(self) -> None:
        """Close the file and end the thread."""
        self._questions.put(None)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        super().close()

    def _look(self) -> None:
        """Have the thread look for the file, and take what it has found."""
        if not self._looks:
            if time.monotonic() < self._looks_from:
                return
            self._looks = True
            self._questions.put((self._fd,))
        try:
            found = self._answers.get(timeout=LOOK_S if self._is_patient else 0)
        except queue.Empty:
            self._is_patient = False
            return
        self._looks = False
        if isinstance(found, _InsideError):
            self._looks_from = time.monotonic() + LOOK_PAUSE_S
            found = None
        else:
            self._is_patient = True
        if self._fd is not None and found != self._fd:
            os.close(self._fd)
        self._fd = found

    # --- on the thread ----------------------------------------------------------------------

    def _look_out(self) -> None:
        while (question := self._questions.get()) is not None:
            try:
                found = question[0] if self._is_in_place(question[0]) else self._reopen()
            except _InsideError as exc:
                self._answers.put(exc)
            except OSError:
                self._answers.put(None)
            else:
                self._answers.put(found)

    def _is_in_place(self, fd: int | None) -> bool:
        try:
            return fd is not None and os.path.samestat(os.fstat(fd), self._path.stat())
        except FileNotFoundError:
            return False

    def _reopen(self) -> int:
        directory = Path(os.path.realpath(self._path)).parent
        if directory.stat().st_dev == self.avoided:
            raise _InsideError
        return open_log(self._path)


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


@final
class JournalHandler(logging.Handler):
    """Sends each record to systemd's journal with its fields, or drops it; never waits.

    systemd's "Native Journal Protocol": a datagram of fields. A value that may have line breaks in
    it comes after its length, so that no text can begin a field of its own.
    """

    def __init__(self, path: Path, mountpoint: str) -> None:
        super().__init__()
        self._path = str(path)
        self._mountpoint = mountpoint
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a missing or stalled journal loses it."""
        text = Formatter("%(message)s").format(record)[:_MESSAGE_MAX]
        fields = {
            "MESSAGE": text,
            "PRIORITY": _severity(record),
            "SYSLOG_IDENTIFIER": "etcdfs",
            "SYSLOG_FACILITY": _FACILITY_DAEMON >> 3,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            "LOGGER": record.name,
            "ETCDFS_MOUNTPOINT": printable(self._mountpoint),
            **{f"ETCDFS_{name.upper()}": value for name, value in _fields(record).items()},
        }
        with contextlib.suppress(OSError):
            self._socket.sendto(b"".join(map(_journal_field, fields.items())), self._path)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def _journal_field(field: tuple[str, object]) -> bytes:
    value = str(field[1]).encode(errors="backslashreplace")
    return b"%s\n%s%s\n" % (field[0].encode(), struct.pack("<Q", len(value)), value)


def _severity(record: logging.LogRecord) -> int:
    """Return the severity that syslog(3) has for a level."""
    if record.levelno >= logging.ERROR:
        return 3
    if record.levelno >= logging.WARNING:
        return 4
    return 6 if record.levelno >= logging.INFO else 7
