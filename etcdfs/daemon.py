"""The parent of the daemon: starts it, waits for its word, and leaves it alone.

What this room knows: how the daemon's process is started and how its start can end. What it
must not know: what the daemon does (it must not even import it: the command line stays quick).

The daemon is a re-executed Python, not a fork of this one: threads, and libraries that have
them (grpc), do not survive a fork.

Concurrency: plain blocking code in a process of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO, Final, NoReturn, final

from etcdfs.errors import UnmountError
from etcdfs.handshake import (
    Failed,
    Handover,
    Progress,
    Ready,
    Waiting,
    read_reports,
    send_handover,
)
from etcdfs.mountpoint import DAEMON_MODULE, clear_dead

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
    os.execve(sys.executable, _command(handover, options_fd), _environment())


def start_in_background(handover: Handover) -> Ready | Failed:
    """Start the daemon and wait for its last word, showing its progress on a terminal.

    A signal that ends this process while it waits ends the daemon too.
    """
    try:
        with _signals_raise(), _daemon(handover) as (process, reports, errors):
            return _await_word(process, reports, errors)
    except _InterruptedError as exc:
        _clear_quietly(handover.options.mountpoint)
        name = signal.Signals(exc.number).name
        return Failed(message=f"interrupted by {name}; not mounted", exit_code=128 + exc.number)


def _command(handover: Handover, options_fd: int, status_fd: int | None = None) -> list[str]:
    # -P: the current directory must not get a say in what is imported.
    command = [sys.executable, "-P", "-m", DAEMON_MODULE, handover.options.mountpoint]
    command += ["--options-fd", str(options_fd)]
    return command if status_fd is None else [*command, "--status-fd", str(status_fd)]


def _environment() -> dict[str, str]:
    # gRPC's core writes to stderr, in its own form and for every broken connection; what matters
    # of that reaches our log as an error of a call. It reads this when it is loaded.
    return {"GRPC_VERBOSITY": "NONE"} | os.environ


@contextlib.contextmanager
def _daemon(
    handover: Handover,
) -> Iterator[tuple["subprocess.Popen[bytes]", BinaryIO, BinaryIO]]:
    """Start the daemon; yield it, its reports, and what it writes to stderr.

    It is ended when the body raises, or returns while it has not been let go.
    """
    with contextlib.ExitStack() as stack:
        options_fd = send_handover(handover)
        stack.callback(os.close, options_fd)
        status_read, status_write = os.pipe()
        reports = stack.enter_context(os.fdopen(status_read, "rb"))
        errors = stack.enter_context(_errors_file(handover.log.file))
        try:
            process = subprocess.Popen(
                _command(handover, options_fd, status_write),
                cwd="/",  # it must not keep anybody's disk busy
                env=_environment(),
                pass_fds=(options_fd, status_write),
                start_new_session=True,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                stdout=errors,
            )
        finally:
            os.close(status_write)  # or the end of the daemon would not end the reports
        stack.callback(_end, process)
        yield process, reports, errors


def _errors_file(log_file: str | None) -> BinaryIO:
    """Return where the daemon's stderr goes: its log, or memory until it is `Ready`."""
    if log_file is not None:
        return Path(log_file).open("ab")
    return os.fdopen(os.memfd_create("etcdfs-errors"), "w+b")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a daemon that was not let go."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    # Popen would warn that the process still runs; that is what a daemon is for.
    process.returncode = 0


# --- waiting --------------------------------------------------------------------------------


def _await_word(
    process: "subprocess.Popen[bytes]", reports: BinaryIO, errors: BinaryIO
) -> Ready | Failed:
    with contextlib.closing(_ProgressLine()) as line, contextlib.suppress(ValueError):
        for report in read_reports(reports):
            match report:
                case Progress():
                    line.show(report)
                case Waiting(reason=reason, left_s=left_s):
                    line.close()
                    sys.stderr.write(f"etcdfs: waiting for etcd ({left_s:.0f} s left): {reason}\n")
                case Ready():
                    _let_go(process)
                    return report
                case Failed():
                    _await_end(process)
                    return report
    _await_end(process)
    return Failed(message=_how_it_died(process, errors), exit_code=_DIED)


def _await_end(process: "subprocess.Popen[bytes]") -> None:
    """Let a daemon that gave up end by itself; it may have an etcd to stop."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_TIMEOUT_S)


def _how_it_died(process: "subprocess.Popen[bytes]", errors: BinaryIO) -> str:
    code = process.poll()
    if code is None:
        how = "hangs"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with status {code}"
    last = _last_line(errors) if errors.readable() else f"see {errors.name}"
    return f"the daemon {how} before the mount was usable" + (f": {last}" if last else "")


def _last_line(errors: BinaryIO) -> str:
    """Return the last line of a traceback, which says the most."""
    errors.seek(0)
    lines = errors.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


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
