"""The parent of the daemon: tells it its options, waits for its word, and leaves it alone.

Knows: how the start of a daemon can end. Does not know: what the daemon does (it must not even
import it: the command line stays quick).

Concurrency: plain blocking code in a process of its own.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import BinaryIO, Final, NoReturn, final

from etcdfs.errors import UnmountError
from etcdfs.process.mountpoint import clear_dead
from etcdfs.process.processes import has_ended
from etcdfs.process.spawn import Spawned, daemon_command, daemon_environment, spawn
from etcdfs.process.startup_protocol import (
    Failed,
    Handover,
    Progress,
    Ready,
    Waiting,
    hand_over,
    read_reports,
    send_handover,
    waiting_line,
)

_END_TIMEOUT_S: Final = 15.0
"""How long a daemon that is told to end may take to unmount and to stop an embedded etcd."""

_ENDING_SIGNALS: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_DIED: Final = 1


class _InterruptedError(BaseException):
    """A signal asked this process to end; a BaseException, as KeyboardInterrupt is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_in_foreground(handover: Handover) -> NoReturn:
    """Become the daemon."""
    options_fd = send_handover(handover)
    os.set_inheritable(options_fd, True)
    command = daemon_command(handover.options.mountpoint, options_fd)
    os.execve(sys.executable, command, daemon_environment())


def become_doctor(handover: Handover, *arguments: str) -> NoReturn:
    """Become the process that runs the checklist of `etcdfs doctor`."""
    options_fd = send_handover(handover)
    os.set_inheritable(options_fd, True)
    command = [sys.executable, "-P", "-m", "etcdfs.doctor.main", handover.options.mountpoint]
    command += ["--options-fd", str(options_fd), *arguments]
    os.execve(sys.executable, command, daemon_environment())


def start_in_background(handover: Handover, early: Spawned | None = None) -> Ready | Failed:
    """Have a daemon mount and wait for its last word, showing its progress on a terminal.

    A signal that ends this process while it waits ends the daemon too.

    Args:
        handover: What the daemon is told.
        early: One that waits for its options; it is taken if it was started for this mountpoint.
            The caller dismisses it afterwards, whatever became of it.
    """
    mountpoint = handover.options.mountpoint
    fits = early is not None and early.mountpoint == mountpoint
    daemon = early if early is not None and fits else spawn(mountpoint)
    try:
        with _signals_raise(), _told(daemon, handover) as (reports, errors):
            word = _await_word(reports)
            if isinstance(word, Ready):
                daemon.released = True
                return word
            _wait(daemon, _END_TIMEOUT_S)  # it ends by itself; it may have an etcd to stop
            return word or _how_it_died(daemon, errors, handover.log.file)
    except _InterruptedError as exc:
        _clear_quietly(mountpoint)
        name = signal.Signals(exc.number).name
        return Failed(message=f"interrupted by {name}; not mounted", exit_code=128 + exc.number)


def dismiss(daemon: Spawned) -> None:
    """End a daemon that waits for its options; nothing if it was told them."""
    if daemon.told:
        return
    os.kill(daemon.pid, signal.SIGKILL)  # it has done nothing yet that would have to be undone
    os.waitpid(daemon.pid, 0)
    for fd in (daemon.options, daemon.reports, daemon.errors):
        os.close(fd)
    daemon.told = True


@contextlib.contextmanager
def _told(daemon: Spawned, handover: Handover) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Tell a daemon its options; yield its reports, and what it writes to stderr.

    It is ended when the body raises, or returns while it has not been released.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_end, daemon)
        daemon.told = True
        reports = stack.enter_context(os.fdopen(daemon.reports, "rb"))
        errors = stack.enter_context(os.fdopen(daemon.errors, "rb"))
        with contextlib.suppress(BrokenPipeError):  # it has died, which its reports tell
            hand_over(handover, daemon.options)
        yield reports, errors


def _end(daemon: Spawned) -> None:
    """End a daemon that was not released."""
    if daemon.released:
        return
    if _wait(daemon, 0) is None:
        os.kill(daemon.pid, signal.SIGTERM)
    if _wait(daemon, _END_TIMEOUT_S) is None:
        os.kill(daemon.pid, signal.SIGKILL)
        os.waitpid(daemon.pid, 0)


def _wait(daemon: Spawned, timeout_s: float) -> int | None:
    """Wait for a daemon's end and return its status, as of `subprocess.Popen`."""
    if daemon.returncode is None:
        pidfd = os.pidfd_open(daemon.pid)
        try:
            if has_ended(pidfd, timeout_s):
                _, status = os.waitpid(daemon.pid, 0)
                daemon.returncode = os.waitstatus_to_exitcode(status)
        finally:
            os.close(pidfd)
    return daemon.returncode


# --- waiting --------------------------------------------------------------------------------


def _await_word(reports: BinaryIO) -> Ready | Failed | None:
    """Return the last word; None when it never came."""
    with contextlib.closing(_ProgressLine()) as line, contextlib.suppress(ValueError):
        for report in read_reports(reports):
            match report:
                case Progress():
                    line.show(report)
                case Waiting():
                    line.close()
                    sys.stderr.write(waiting_line(report))
                case Ready() | Failed():
                    return report
    return None


def _how_it_died(daemon: Spawned, errors: BinaryIO, log_file: str | None) -> Failed:
    code = daemon.returncode
    if code is None:
        how = "hangs"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with status {code}"
    last = _last_line(errors) or ("" if log_file is None else f"see {log_file}")
    if code == -signal.SIGKILL and not last:
        last = "if nobody killed it, the kernel's log tells whether memory ran out"
    message = f"the daemon {how} before the mount was usable" + (f": {last}" if last else "")
    return Failed(message=message, exit_code=_DIED)


def _last_line(errors: BinaryIO) -> str:
    """Return the last line of a traceback, which says the most, without an exception group's frame."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    return next(filter(None, (line.strip(" |+-") for line in reversed(lines))), "")


@final
class _ProgressLine:
    """Shows how many keys are loaded, on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._shown = False
        self._since = time.monotonic()

    def show(self, progress: Progress) -> None:
        if not sys.stderr.isatty():
            return
        if not self._shown:
            self._shown = True
            self._open()
        self._bar.update(self._task, completed=progress.keys, rate=self._rate(progress.keys))

    def _rate(self, keys: int) -> str:
        elapsed_s = time.monotonic() - self._since
        return f"{keys / elapsed_s:,.0f} keys/s" if elapsed_s else ""

    def _open(self) -> None:
        # Only who waits long enough to see it pays for loading rich.
        from rich import console, progress  # noqa: PLC0415

        self._bar = progress.Progress(
            progress.TextColumn("Loading"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed:,.0f} keys, {task.fields[rate]}"),
            progress.TimeElapsedColumn(),
            console=console.Console(stderr=True),
            transient=True,
        )
        self._stack.enter_context(self._bar)
        self._task = self._bar.add_task("load", total=None, rate="")

    def close(self) -> None:
        self._stack.close()
        self._shown = False


# --- ending ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn the signals that end a process into exceptions, so that the daemon ends too."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        raise _InterruptedError(number)

    before = {number: signal.signal(number, interrupt) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clear_quietly(mountpoint: str) -> None:
    """Take away what a daemon left that had to be killed in the middle of mounting."""
    with contextlib.suppress(UnmountError):
        clear_dead(mountpoint)
