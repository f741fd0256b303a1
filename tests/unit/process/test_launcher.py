"""The parent of the daemon, with a stand-in for the daemon."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import etcdfs.process.launcher
import etcdfs.process.spawn
from etcdfs.options import Endpoint, LogSettings, MountOptions
from etcdfs.process.launcher import dismiss, start_in_background
from etcdfs.process.spawn import spawn
from etcdfs.process.startup_protocol import (
    Failed,
    Handover,
    PipeReporter,
    Progress,
    Ready,
    Report,
    TerminalReporter,
    Waiting,
    decode_handover,
    decode_report,
    encode_handover,
    encode_report,
    open_reporter,
    read_options,
    read_reports,
    send_handover,
)

HANDOVER = Handover(
    options=MountOptions(mountpoint="/m", endpoints=(Endpoint("a", 1),), prefix=b"/\xff/"),
    log=LogSettings(level="debug"),
)

numbers = st.integers(0, 2**63)
reports: st.SearchStrategy[Report] = st.one_of(
    st.builds(Progress, keys=numbers, bytes=numbers),
    st.builds(Waiting, reason=st.text(), left_s=st.floats(0, 1e9)),
    st.builds(Ready, revision=numbers, keys=numbers, client_url=st.one_of(st.none(), st.text())),
    st.builds(Failed, message=st.text(), exit_code=st.integers(1, 255)),
)

# --- messages -------------------------------------------------------------------------------


def test_handover_is_exact() -> None:
    assert decode_handover(encode_handover(HANDOVER)) == HANDOVER


def test_handover_of_any_length_goes_through_its_descriptor() -> None:
    long = Handover(
        options=MountOptions(mountpoint="/m", fuse_options=("x" * 1_000_000,)),
        log=LogSettings(file="/log"),
    )
    assert read_options(send_handover(long)) == long


@given(reports)
def test_report_is_one_exact_line(report: Report) -> None:
    line = encode_report(report)
    assert line.count(b"\n") == 1
    assert decode_report(line) == report


@pytest.mark.parametrize(
    "line", [b"", b"garbage\n", b"[]\n", b"{}\n", b'{"report": "Ready"}\n', b'{"report": "X"}\n']
)
def test_what_is_no_report_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="is not a report"):
        decode_report(line)


def test_reports_end_with_the_last_word() -> None:
    said: list[Report] = [
        Progress(keys=1, bytes=2),
        Ready(revision=3, keys=4),
        Progress(keys=5, bytes=6),
    ]
    stream = io.BytesIO(b"".join(encode_report(report) for report in said))
    assert list(read_reports(stream)) == said[:2]


# --- the daemon's side ----------------------------------------------------------------------


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Yield a pipe; the reporter under test closes the writing end."""
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)


def nobody(_: str) -> None:
    """Stand in for the service manager that is not there."""


def test_progress_is_dropped_when_nobody_reads_and_the_last_word_still_fits() -> None:
    with pipe() as (reading, writing):
        reporter = open_reporter(writing, nobody)
        for keys in range(10_000):
            reporter.report(Progress(keys=keys, bytes=0))
        reporter.report(Failed(message="x" * 1_000_000, exit_code=3))
        with os.fdopen(os.dup(reading), "rb") as stream:
            *progress, last = read_reports(stream)
    assert 100 < len(progress) < 10_000
    assert isinstance(last, Failed)
    assert last.exit_code == 3


def test_reports_to_a_parent_that_is_gone_are_lost_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    reporter = PipeReporter(writing)
    reporter.report(Progress(keys=1, bytes=1))
    reporter.report(Ready(revision=1, keys=1))


def test_nothing_is_said_after_the_last_word() -> None:
    """The number of the pipe belongs to somebody else by then: it once got our progress."""
    with pipe() as (reading, writing), pipe() as (elsewhere, other):
        reporter = open_reporter(writing, nobody)
        reporter.report(Ready(revision=1, keys=1))
        os.dup2(other, writing)
        os.close(other)
        reporter.report(Progress(keys=1, bytes=1))
        reporter.report(Failed(message="late", exit_code=1))
        os.close(writing)
        with os.fdopen(os.dup(reading), "rb") as stream:
            assert list(read_reports(stream)) == [Ready(revision=1, keys=1)]
        assert os.read(elsewhere, 100) == b""


def test_foreground_prints_the_url_and_the_failure(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = open_reporter(None, nobody)
    assert isinstance(reporter, TerminalReporter)
    reporter.report(Progress(keys=1, bytes=1))
    reporter.report(Ready(revision=1, keys=1))
    reporter.report(Ready(revision=1, keys=1, client_url="unix:///d/client:0", etcd="etcd 3"))
    reporter.report(Waiting(reason="nobody there", left_s=4.6))
    reporter.report(Failed(message="no", exit_code=1))
    said = "etcdfs: etcd 3\netcdfs: waiting for etcd (5 s left): nobody there\netcdfs: no\n"
    assert capsys.readouterr() == ("unix:///d/client:0\n", said)


def test_the_service_manager_hears_how_the_start_goes(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    reporter = open_reporter(None, told.append)
    reporter.report(Progress(keys=7, bytes=1))
    reporter.report(Waiting(reason="nobody there", left_s=4.6))
    reporter.report(Ready(revision=1, keys=1))
    reporter.report(Failed(message="no\nREADY=1", exit_code=1))
    assert told == [
        "STATUS=Loading: 7 keys\nEXTEND_TIMEOUT_USEC=60000000",
        "STATUS=Waiting: nobody there\nEXTEND_TIMEOUT_USEC=60000000",
        "READY=1\nSTATUS=Mounted",
        "STATUS=no READY=1",
    ]


# --- the parent's side ----------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "StandIn":
    return StandIn(tmp_path, monkeypatch)


class StandIn:
    """A daemon that is a few lines of Python, with `handover` and `reporter` at hand."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._home = tmp_path
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
        monkeypatch.setattr(etcdfs.process.spawn, "DAEMON_MODULE", "stand_in")

    def does(self, code: str) -> None:
        head = """
            import os, signal, sys
            from etcdfs.process.startup_protocol import *
            from etcdfs.process.logs import setup_logging
            _, mountpoint, _, options_fd, _, status_fd = sys.argv
            handover = read_options(int(options_fd))
            setup_logging(handover.log, foreground=False)
            reporter = open_reporter(int(status_fd), str)
        """
        text = textwrap.dedent(head) + textwrap.dedent(code)
        (self._home / "stand_in.py").write_text(text)


def test_ready_leaves_the_daemon_on_its_own(stand_in: StandIn) -> None:
    stand_in.does("""
        reporter.report(Progress(keys=1, bytes=1))
        state = [mountpoint, os.getsid(0) == os.getpid()]
        state += [os.readlink("/proc/self/fd/0"), handover.log.level]
        fd = os.open("/proc/self/fd/1", os.O_RDONLY)
        reporter.report(Ready(revision=os.getpid(), keys=1, client_url=repr(state)))
        signal.pause()
    """)
    word = start_in_background(HANDOVER)
    assert isinstance(word, Ready)
    try:
        assert word.client_url == repr(["/m", True, "/dev/null", "debug"])
        assert str(Path(f"/proc/{word.revision}/fd/2").readlink()) == "/dev/null"
    finally:
        os.kill(word.revision, signal.SIGKILL)
        os.waitpid(word.revision, 0)


def test_failure_is_passed_on(stand_in: StandIn) -> None:
    stand_in.does("""
        reporter.report(Failed(message="no etcd", exit_code=20))
    """)
    assert start_in_background(HANDOVER) == Failed(message="no etcd", exit_code=20)


@pytest.mark.parametrize(
    "crash",
    [
        'raise ZeroDivisionError("oops")',
        'raise ExceptionGroup("two", [ValueError(), ZeroDivisionError("oops")])',
    ],
)
def test_a_crash_is_reported_with_its_last_line(stand_in: StandIn, crash: str) -> None:
    stand_in.does(f"""
        reporter.report(Progress(keys=1, bytes=1))
        {crash}
    """)
    assert start_in_background(HANDOVER) == Failed(
        message="the daemon ended with status 1 before the mount was usable: ZeroDivisionError: oops",
        exit_code=1,
    )


def test_a_killed_daemon_is_reported(stand_in: StandIn) -> None:
    stand_in.does("os.kill(os.getpid(), signal.SIGKILL)")
    assert start_in_background(HANDOVER) == Failed(
        message="the daemon was killed by SIGKILL before the mount was usable: "
        "if nobody killed it, the kernel's log tells whether memory ran out",
        exit_code=1,
    )


def test_a_crash_points_to_the_log_file(stand_in: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "log"
    stand_in.does("sys.exit('oops')")
    handover = Handover(options=HANDOVER.options, log=LogSettings(file=str(file)))
    word = start_in_background(handover)
    assert isinstance(word, Failed)
    assert word.message.endswith(f"see {file}")
    assert file.read_text() == "oops\n"


def test_garbage_from_the_daemon_ends_it(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.process.launcher, "_END_TIMEOUT_S", 0.1)
    stand_in.does("""
        os.write(int(status_fd), b"garbage\\n")
        signal.pause()
    """)
    assert start_in_background(HANDOVER) == Failed(
        message="the daemon hangs before the mount was usable", exit_code=1
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_daemon_too(stand_in: StandIn, tmp_path: Path, number: int) -> None:
    ended = tmp_path / "ended"
    stand_in.does(f"""
        import threading
        def end(*_):
            open({str(ended)!r}, "w").close()
            sys.exit()
        signal.signal(signal.SIGTERM, end)
        os.kill(os.getppid(), {int(number)})
        signal.pause()
    """)
    word = start_in_background(HANDOVER)
    assert isinstance(word, Failed)
    assert word.exit_code == 128 + number
    assert ended.exists()


def test_a_daemon_that_does_not_end_is_killed(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.process.launcher, "_END_TIMEOUT_S", 0.1)
    stand_in.does("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
    """)
    word = start_in_background(HANDOVER)
    assert isinstance(word, Failed)
    assert word.exit_code == 130


# --- a daemon that waits for its options ----------------------------------------------------


def test_a_daemon_that_waits_is_taken(stand_in: StandIn) -> None:
    stand_in.does("reporter.report(Failed(message=str(os.getpid()), exit_code=1))")
    early = spawn("/m")
    assert start_in_background(HANDOVER, early) == Failed(message=str(early.pid), exit_code=1)
    dismiss(early)  # which now means nothing


def test_one_that_waits_to_mount_elsewhere_is_not(stand_in: StandIn) -> None:
    stand_in.does("reporter.report(Failed(message=str(os.getpid()), exit_code=1))")
    early = spawn("/elsewhere")
    word = start_in_background(HANDOVER, early)
    assert isinstance(word, Failed)
    assert word.message != str(early.pid)
    assert Path(f"/proc/{early.pid}").exists()
    dismiss(early)
    assert not Path(f"/proc/{early.pid}").exists()


def test_one_that_died_waiting_is_reported_with_its_last_line(
    stand_in: StandIn, tmp_path: Path
) -> None:
    (tmp_path / "stand_in.py").write_text("import nothing_of_this_name")
    handover = Handover(
        options=MountOptions(mountpoint="/m", fuse_options=("x" * 1_000_000,)),
        log=LogSettings(file=str(tmp_path / "log")),
    )
    word = start_in_background(handover, spawn("/m"))
    assert isinstance(word, Failed)
    assert word.message.endswith("ModuleNotFoundError: No module named 'nothing_of_this_name'")


def test_one_whose_parent_ends_goes_without_a_word() -> None:
    early = spawn("/m")
    os.close(early.options)
    _, status = os.waitpid(early.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    with os.fdopen(early.reports, "rb") as reports, os.fdopen(early.errors, "rb") as errors:
        assert (reports.read(), errors.read()) == (b"", b"")


# --- the terminal ---------------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.does("""
        for keys in (5, 12345):
            reporter.report(Progress(keys=keys, bytes=1))
        reporter.report(Failed(message="enough", exit_code=1))
    """)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    start_in_background(HANDOVER)
    assert "12,345 keys" in terminal.getvalue()


def test_progress_is_not_shown_elsewhere(
    stand_in: StandIn, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in.does("""
        reporter.report(Progress(keys=5, bytes=1))
        reporter.report(Failed(message="enough", exit_code=1))
    """)
    start_in_background(HANDOVER)
    assert capfd.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_foreground_becomes_the_daemon(stand_in: StandIn) -> None:
    (stand_in._home / "stand_in.py").write_text(
        "import os, sys\n"
        "from etcdfs.process.startup_protocol import *\n"
        "_, mountpoint, _, fd = sys.argv\n"
        "print(os.getpid(), mountpoint, read_options(int(fd)).options.prefix)\n"
    )
    code = (
        "import etcdfs.process.launcher\n"
        "from etcdfs.process.startup_protocol import *\n"
        "from etcdfs.options import *\n"
        "etcdfs.process.spawn.DAEMON_MODULE = 'stand_in'\n"
        "etcdfs.process.launcher.run_in_foreground(Handover(\n"
        "    options=MountOptions(mountpoint='/m', prefix=b'/p/'), log=LogSettings()))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == f"{process.pid} /m b'/p/'\n"


def test_what_a_person_should_know_is_said_in_the_foreground(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = open_reporter(None, lambda _state: None)
    reporter.report(Ready(revision=1, keys=1, note="--inotify does nothing\x1b here"))
    assert capsys.readouterr().err == "etcdfs: --inotify does nothing\\x1b here\n"
