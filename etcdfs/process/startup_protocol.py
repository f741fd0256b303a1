"""The words between `etcdfs mount` and the daemon it starts.

Knows: what the daemon is handed (its options, through one file descriptor) and what it reports back
(one JSON line each, through another). Does not know: who starts whom, and what a mount is.

    parent                                child (python -m etcdfs.daemon.main)
      |                                      |   loads its modules
      |  -- Handover (options, logging) -->  |   or the end of the pipe: it is not wanted
      |  <-- Waiting ... Waiting ----------  |   while etcd does not answer (--wait-for-etcd)
      |  <-- Progress ... Progress --------  |   while keys load
      |  <-- Ready, or Failed -------------  |   the last word; then the child closes its end

The end of the stream without a last word means that the child died. With `--foreground` there
is no parent: the reports go to the terminal, and to systemd where that started the daemon.

Concurrency: the reporter never blocks the daemon, even when the parent is stopped or gone.
"""

import array
import contextlib
import fcntl
import json
import os
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, final

from etcdfs.options import LogSettings, MountOptions, decode_options, encode_options
from etcdfs.process.printable import printable

_QUEUED_MAX: Final = 32 * 1024
"""Bytes that may wait in the status pipe before progress is dropped.

A pipe holds 64 KiB (pipe(7)): the other half is for the last word, so that it always fits even
when the parent is stopped and reads nothing.
"""

_LOADING_PAUSE_US: Final = 60_000_000
"""How long systemd waits for more of the first listing before it gives up a start."""

_MESSAGE_MAX: Final = 4000
"""Characters of a failure; a last word must fit into the pipe whatever etcd had to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Everything the daemon is told at its start."""

    options: MountOptions
    log: LogSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """So much of the first listing is here."""

    keys: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """etcd does not answer, and is tried again.

    Attributes:
        reason: What the last attempt came to.
        left_s: Seconds for which it will be tried.
    """

    reason: str
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The mount is usable and, with a cache, in step with etcd.

    Attributes:
        revision: The revision of etcd that it shows; 0 without a cache.
        keys: The number of keys in it; 0 without a cache.
        client_url: Where the embedded etcd listens; None without one.
        etcd: Which etcd that is, for a person; empty without one.
        note: What else a person should know; empty if there is nothing.
        offline: Why etcd does not answer, so that a snapshot is shown; empty if it does.
    """

    revision: int
    keys: int
    client_url: str | None = None
    etcd: str = ""
    note: str = ""
    offline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """There will be no mount; nothing was left behind."""

    message: str
    exit_code: int


Report = Progress | Waiting | Ready | Failed

_KINDS: Final[dict[str, type[Progress] | type[Waiting] | type[Ready] | type[Failed]]] = {
    kind.__name__: kind for kind in (Progress, Waiting, Ready, Failed)
}


# --- the way in -----------------------------------------------------------------------------


def encode_handover(handover: Handover) -> bytes:
    """Return the hand-over as the child reads it."""
    message = {"options": encode_options(handover.options), "log": asdict(handover.log)}
    return json.dumps(message).encode()


def decode_handover(encoded: bytes) -> Handover:
    """Return the hand-over that `encode_handover` was given."""
    message: dict[str, Any] = json.loads(encoded)
    return Handover(options=decode_options(message["options"]), log=LogSettings(**message["log"]))


def hand_over(handover: Handover, fd: int) -> None:
    """Write the hand-over into the pipe of a child that waits for it, and close that.

    Raises:
        BrokenPipeError: The child has ended.
    """
    with open(fd, "wb") as pipe:
        pipe.write(encode_handover(handover))


def send_handover(handover: Handover) -> int:
    """Return a file descriptor from which the program that this process becomes reads it.

    A file in memory rather than a pipe: it takes any length at once, and its writer is gone.
    It is closed on exec unless made inheritable.
    """
    fd = os.memfd_create("etcdfs-options")
    with open(os.dup(fd), "wb") as file:  # noqa: PTH123 -- a descriptor, not a path
        file.write(encode_handover(handover))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_options(fd: int) -> Handover | None:
    """Wait for the hand-over in the child, and close the descriptor.

    Returns:
        None when the parent has ended, or has found that no daemon is wanted.
    """
    with open(fd, "rb") as file:
        encoded = file.read()
    return decode_handover(encoded) if encoded else None


# --- the way back ---------------------------------------------------------------------------


def encode_report(report: Report) -> bytes:
    """Return one report as a line."""
    return json.dumps({"report": type(report).__name__, **asdict(report)}).encode() + b"\n"


def decode_report(line: bytes) -> Report:
    """Return the report that a line holds.

    Raises:
        ValueError: The line is no report (somebody else wrote into the pipe, or died writing).
    """
    try:
        message: dict[str, Any] = json.loads(line)
        return _KINDS[message.pop("report")](**message)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"{line!r} is not a report") from exc


def read_reports(stream: BinaryIO) -> Iterator[Report]:
    """Yield the reports up to the last word, or up to the end of the stream."""
    for line in stream:
        report = decode_report(line)
        yield report
        if not isinstance(report, Progress | Waiting):
            return


class Reporter(Protocol):
    """Where the daemon says how its start goes. `Ready` or `Failed` is said once, last."""

    def report(self, report: Report) -> None:
        """Say it; never blocks, never raises."""
        ...


@final
class PipeReporter:
    """Reports to the waiting parent. Owned by the daemon's composition root."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_done = False
        os.set_inheritable(fd, False)  # an etcd of ours must not keep the pipe open
        os.set_blocking(fd, False)

    def report(self, report: Report) -> None:
        """Send it; progress only while the parent keeps reading.

        After the last word the pipe is closed and what is still connected to the parent's
        terminal is let go: from here on the daemon is on its own, and says nothing more. The
        number of the pipe may be somebody else's by then.
        """
        if self._is_done:
            return
        if isinstance(report, Waiting):
            report = Waiting(reason=report.reason[:_MESSAGE_MAX], left_s=report.left_s)
        if isinstance(report, Progress | Waiting):
            if _queued(self._fd) < _QUEUED_MAX:
                self._send(report)
            return
        if isinstance(report, Failed):
            report = Failed(message=report.message[:_MESSAGE_MAX], exit_code=report.exit_code)
        else:
            report = replace(report, offline=report.offline[:_MESSAGE_MAX])
            _let_go_of_errors()
        self._send(report)
        self._is_done = True
        os.close(self._fd)

    def _send(self, report: Report) -> None:
        try:
            os.write(self._fd, encode_report(report))
        except (BrokenPipeError, BlockingIOError):
            # The parent was killed, or does not read: nobody wants to know.
            return


@final
class TerminalReporter:
    """Reports to whoever started the daemon in the foreground: a person, or systemd."""

    def __init__(self, tell_manager: Callable[[str], None]) -> None:
        """Report to stdout and stderr, and to the service manager, if there is one."""
        self._tell_manager = tell_manager

    def report(self, report: Report) -> None:
        """Print the client URL of an embedded etcd, a failure, a wait; progress is not shown."""
        self._tell_manager(_service_state(report))
        with contextlib.suppress(OSError):  # the terminal is gone
            _print(report)


def waiting_line(report: Waiting) -> str:
    """Return what a person reads while etcd does not answer."""
    return f"etcdfs: waiting for etcd ({report.left_s:.0f} s left): {printable(report.reason)}\n"


def offline_line(report: Ready) -> str:
    """Return what a person reads when a snapshot is shown; empty if none is."""
    if not report.offline:
        return ""
    return (
        f"etcdfs: etcd does not answer; a snapshot of revision {report.revision} is mounted"
        f" ({report.keys} keys), and nothing can be written: {printable(report.offline)}\n"
    )


def _print(report: Report) -> None:
    if isinstance(report, Ready) and report.note:
        sys.stderr.write(f"etcdfs: {printable(report.note)}\n")
    match report:
        case Ready(offline=offline) if offline:
            sys.stderr.write(offline_line(report))
        case Ready(client_url=str(url), etcd=etcd):
            sys.stderr.write(f"etcdfs: {etcd}\n")
            sys.stdout.write(f"{url}\n")
            sys.stdout.flush()
        case Failed(message=message):
            sys.stderr.write(f"etcdfs: {printable(message)}\n")
        case Waiting():
            sys.stderr.write(waiting_line(report))
        case Ready() | Progress():
            return


def open_reporter(status_fd: int | None, tell_manager: Callable[[str], None]) -> Reporter:
    """Return the reporter for `--status-fd`; without one the daemon is in the foreground."""
    return TerminalReporter(tell_manager) if status_fd is None else PipeReporter(status_fd)


def _service_state(report: Report) -> str:
    """Return what systemd is told (sd_notify(3)); it waits on while keys are coming in."""
    match report:
        case Ready(offline=offline, revision=revision):
            what = f"a snapshot of revision {revision}, without etcd" if offline else ""
            return f"READY=1\nSTATUS=Mounted{what and f': {what}'}"
        case Progress(keys=keys):
            return f"STATUS=Loading: {keys} keys\nEXTEND_TIMEOUT_USEC={_LOADING_PAUSE_US}"
        case Waiting(reason=reason):
            return f"STATUS=Waiting: {printable(reason)}\nEXTEND_TIMEOUT_USEC={_LOADING_PAUSE_US}"
        case Failed(message=message):
            return f"STATUS={printable(' '.join(message.split()))}"


def _queued(fd: int) -> int:
    """Return how many bytes in a pipe have not been read yet."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, size)
    return size[0]


def _let_go_of_errors() -> None:
    """Close the file in memory in which the parent collects the last words of a crash.

    It would grow for as long as the daemon lives. A log file stays connected.
    """
    if str(Path("/proc/self/fd/2").readlink()).startswith("/memfd:"):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
