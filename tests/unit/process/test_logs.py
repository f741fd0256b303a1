"""Where the log goes."""

import fcntl
import json
import logging
import os
import re
import resource
import select
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import etcdfs.process.logs
from etcdfs.options import OPTIONS, LogSettings
from etcdfs.process.logs import (
    LINES_MAX,
    REPEATS_MAX,
    REPEATS_S,
    LogFileHandler,
    Repeats,
    StderrHandler,
    SyslogHandler,
    has_journal,
    keep_out_of,
    setup_logging,
)
from etcdfs.process.printable import printable

log = logging.getLogger("etcdfs.test")

LEVELS = OPTIONS["log-level"].choices

ODD = "odd \udcff"  # a path that is no UTF-8


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """Let a test set up logging, and take it back."""
    root = logging.getLogger()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    level, handlers = root.level, list(root.handlers)
    try:
        yield root
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)


@pytest.mark.parametrize("level", LEVELS)
def test_level(root: logging.Logger, tmp_path: Path, level: str) -> None:
    file = tmp_path / "log"
    setup_logging(LogSettings(level=level, file=str(file)), foreground=False)
    log.debug("debug")
    log.info("info")
    logged = [line.split()[2].lower() for line in file.read_text().splitlines()]
    assert logged == [
        other for other in ("debug", "info") if LEVELS.index(other) >= LEVELS.index(level)
    ]


def test_file_is_appended_to_and_reopened(root: logging.Logger, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    setup_logging(LogSettings(file=str(file)), foreground=True)
    log.info("one %s", ODD)
    file.rename(tmp_path / "log.1")
    log.info("two")
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO etcdfs\.test: "
    assert re.fullmatch(rf"before\n{line}one odd \\udcff\n", (tmp_path / "log.1").read_text())
    assert re.fullmatch(rf"{line}two\n", file.read_text())


def test_a_file_that_cannot_be_opened_again_is_no_error_of_who_logs(
    root: logging.Logger, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    setup_logging(LogSettings(file=str(home / "log")), foreground=False)
    log.info("one")
    (home / "log").rename(tmp_path / "log.1")
    home.rmdir()
    log.info("lost")
    log.info("lost, too")
    home.mkdir()
    log.info("two")
    assert (tmp_path / "log.1").read_text().endswith("one\n")
    assert (home / "log").read_text().endswith("two\n")
    assert "lost" not in (home / "log").read_text()


def record(message: str, *arguments: object) -> logging.LogRecord:
    return log.makeRecord(log.name, logging.INFO, __file__, 1, message, arguments, None)


def test_a_full_disk_is_no_error_of_who_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = LogFileHandler(tmp_path / "log")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as good as a full disk
    try:
        handler.handle(record("lost"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log").read_text() == ""
    handler.close()


def test_a_mistake_in_a_log_call_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = LogFileHandler(tmp_path / "log")
    handler.handle(record("%d", "no number"))
    handler.close()
    assert "--- Logging error ---" in capsys.readouterr().err


# --- whose words they are -------------------------------------------------------------------

FORGED = "\x1b[2J\n2026-01-01 00:00:00,000 INFO etcdfs.daemon.main: all is well\r\x9b\u202e"


@pytest.mark.expect_log("%s")
def test_b105_what_others_say_is_one_printable_line(root: logging.Logger, tmp_path: Path) -> None:
    setup_logging(LogSettings(file=str(tmp_path / "log")), foreground=False)
    log.info("etcd says: %s", FORGED)
    log.error("%s", FORGED, exc_info=ValueError(FORGED))
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum(not line.startswith("    ") for line in lines) == 2
    assert r"\x1b[2J\n2026-01-01" in lines[0]
    assert any(line.startswith("    2026-01-01 00:00:00,000 INFO") for line in lines)


def test_b105_last_words_are_printable(
    root: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(LogSettings(file=str(tmp_path / "log")), foreground=True)
    error = ValueError(FORGED)
    sys.excepthook(ValueError, error, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.isprintable() and line.startswith("    ") for line in lines)


def test_b105_a_log_file_is_its_owners_alone(root: logging.Logger, tmp_path: Path) -> None:
    setup_logging(LogSettings(file=str(tmp_path / "log")), foreground=False)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    (tmp_path / "log").unlink()
    log.info("another")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


# --- a path that does not lead to a file any more -------------------------------------------


def test_a_place_that_nobody_can_look_at_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.process.logs, "LOOK_S", 0.05)
    handler = LogFileHandler(tmp_path / "log")
    answers = threading.Event()
    look = handler._is_in_place

    def hangs(fd: int | None) -> bool:
        answers.wait()
        return look(fd)

    monkeypatch.setattr(handler, "_is_in_place", hangs)
    handler.handle(record("one"))
    monkeypatch.setattr(etcdfs.process.logs, "LOOK_S", 3600)
    handler.handle(record("two"))
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    answers.set()
    while not handler._is_patient:
        handler.handle(record("more"))
    (tmp_path / "log").rename(tmp_path / "log.1")
    handler.handle(record("three"))
    assert (tmp_path / "log").read_text() == "three\n"
    handler.close()


def test_a_file_system_that_is_to_be_avoided(root: logging.Logger, tmp_path: Path) -> None:
    setup_logging(LogSettings(file=str(tmp_path / "log")), foreground=False)
    keep_out_of(tmp_path.stat().st_dev)
    log.info("open already")
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.info("lost")
    assert not (tmp_path / "log").exists()
    assert "lost" not in (tmp_path / "log.1").read_text()


def test_foreground_goes_to_stderr(root: logging.Logger, capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogSettings(), foreground=True)
    log.info("here %s", ODD)
    root.handlers[-1].flush()
    assert capfd.readouterr().err.endswith(" INFO etcdfs.test: here odd \\udcff\n")


def test_a_reader_of_stderr_that_stops_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What there is no room for is lost, and counted, once there is room to say so."""
    reading, writing = os.pipe()
    monkeypatch.setattr(etcdfs.process.logs, "_STDERR", writing)
    monkeypatch.setattr(etcdfs.process.logs, "PARTING_S", 0.01)
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    handler = StderrHandler()
    handler.handle(record("%s", "x" * room))
    select.select([reading], [], [])  # its thread waits for room from here on
    for n in range(2 * LINES_MAX):
        handler.handle(record("line %d", n))
    handler.flush()
    monkeypatch.setattr(etcdfs.process.logs, "PARTING_S", 60.0)
    with os.fdopen(reading, "rb") as file, ThreadPoolExecutor(1) as pool:
        read = pool.submit(file.read)
        handler.flush()
        os.close(writing)
        first, *kept = read.result().decode().splitlines()
    assert first == "x" * room
    *kept, last = kept
    assert kept == [f"line {n}" for n in range(len(kept))]
    lost = 2 * LINES_MAX - len(kept)
    assert lost >= LINES_MAX - 1
    assert last == f"{lost} line(s) of the log were lost: nobody read them"


def test_a_reader_of_stderr_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(etcdfs.process.logs, "_STDERR", writing)
    handler = StderrHandler()
    handler.handle(record("lost"))
    handler.flush()
    os.close(writing)


def test_a_mistake_in_a_log_call_is_shown_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    handler = StderrHandler()
    handler.handle(record("%d", "no number"))
    handler.flush()
    assert "TypeError" in capfd.readouterr().err


@pytest.mark.expect_log("%s")
def test_background_goes_to_syslog(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        monkeypatch.setattr(etcdfs.process.logs, "_SYSLOG_SOCKET", str(tmp_path / "log"))
        setup_logging(LogSettings(level="debug"), foreground=False)
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.CRITICAL):
            log.log(level, "%s", ODD)
        heard = [syslog.recv(1000).decode() for _ in range(4)]
    name = f"etcdfs[{os.getpid()}]"
    assert heard == [
        f"<31>{name}: DEBUG etcdfs.test: odd \\udcff",
        f"<30>{name}: INFO etcdfs.test: odd \\udcff",
        f"<28>{name}: WARNING etcdfs.test: odd \\udcff",
        f"<27>{name}: CRITICAL etcdfs.test: odd \\udcff",
    ]


def test_a_syslog_that_is_missing_or_stalled_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = SyslogHandler(str(path))
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "lost", None, None)
    handler.emit(record)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(path))
        for _ in range(2000):  # more than a socket's queue (net.unix.max_dgram_qlen)
            handler.emit(record)
    handler.close()


# --- fields for programs --------------------------------------------------------------------

NASTY = "\x1b[31mred\x1b[0m\nPRIORITY=0\n2026-01-01 forged"


def objects(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.expect_log("lost %s")
@pytest.mark.expect_log("100%% wrong: %s")
def test_json_has_an_object_in_each_line(root: logging.Logger, tmp_path: Path) -> None:
    file = tmp_path / "log"
    settings = LogSettings(file=str(file), format="json")
    setup_logging(settings, foreground=False, mountpoint=f"/mnt/{ODD}")
    figures = {"revision": 7, "reason": NASTY}
    log.warning("lost %s", NASTY, extra={"event": "lost", "fields": figures})
    log.error("100%% wrong: %s", ODD, exc_info=RuntimeError(NASTY))
    lost, wrong = objects(file)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(lost.pop("time")))
    assert lost == {
        "level": "warning",
        "logger": "etcdfs.test",
        "message": f"lost {printable(NASTY)}",
        "mountpoint": "/mnt/odd \\udcff",
        "pid": os.getpid(),
        "event": "lost",
        "revision": 7,
        "reason": printable(NASTY),
    }
    assert wrong["message"] == "100% wrong: odd \\udcff"
    trace = str(wrong["exception"]).split("\n")
    assert trace[-1].startswith("    ")
    assert "\x1b" not in file.read_text()


def parse_journal(datagram: bytes) -> dict[str, str]:
    """Read a datagram as journald does ("Native Journal Protocol")."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(datagram[:8], "little")
            value, datagram = datagram[8 : 8 + size], datagram[8 + size + 1 :]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.mark.expect_log(NASTY)
def test_the_journal_gets_fields_that_nobody_can_forge(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.setblocking(False)
        monkeypatch.setattr(etcdfs.process.logs, "_JOURNAL_SOCKET", tmp_path / "journal")
        assert has_journal()
        setup_logging(LogSettings(format="journal"), foreground=True, mountpoint=f"/mnt/{NASTY}")
        log.error(NASTY, extra={"event": "lost", "fields": {"revision": 7, "reason": NASTY}})
        log.info("x" * 1_000_000)
        fields = parse_journal(journal.recv(1 << 20))
        long = parse_journal(journal.recv(1 << 20))
    assert fields.pop("CODE_FILE") == __file__
    assert int(fields.pop("CODE_LINE")) > 0
    assert fields == {
        "MESSAGE": printable(NASTY),
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "etcdfs",
        "SYSLOG_FACILITY": "3",
        "CODE_FUNC": "test_the_journal_gets_fields_that_nobody_can_forge",
        "LOGGER": "etcdfs.test",
        "ETCDFS_MOUNTPOINT": f"/mnt/{printable(NASTY)}",
        "ETCDFS_EVENT": "lost",
        "ETCDFS_REVISION": "7",
        "ETCDFS_REASON": printable(NASTY),
    }
    assert 10_000 < len(long["MESSAGE"]) < 1_000_000


@pytest.mark.expect_log("lost")
def test_a_journal_that_is_gone_loses_what_is_logged(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.process.logs, "_JOURNAL_SOCKET", tmp_path / "nothing")
    assert not has_journal()
    setup_logging(LogSettings(format="journal"), foreground=True)
    log.warning("lost")


# --- what repeats itself --------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def logged(filtered: Repeats, level: int, message: str, *arguments: object) -> str | None:
    record = logging.LogRecord("etcdfs.test", level, "", 0, message, arguments, None)
    return record.getMessage() if filtered.filter(record) else None


def test_b94_what_is_logged_again_and_again_is_cut_off_and_counted() -> None:
    clock = Clock()
    filtered = Repeats(clock)
    shown = [logged(filtered, logging.WARNING, "lost %s", n) for n in range(100)]
    assert shown == [f"lost {n}" for n in range(REPEATS_MAX)] + [None] * (100 - REPEATS_MAX)
    assert logged(filtered, logging.INFO, "regained") == "regained"
    clock.now += REPEATS_S
    left_out = 100 - REPEATS_MAX
    assert logged(filtered, logging.WARNING, "lost %s", 100) == (
        f"lost 100 (and {left_out} more like it before)"
    )
    assert logged(filtered, logging.WARNING, "lost %s", 101) == "lost 101"
    clock.now += REPEATS_S
    assert logged(filtered, logging.WARNING, "lost %s", 102) == "lost 102"


def test_b94_no_lost_file_and_nothing_that_was_asked_for_is_left_out() -> None:
    filtered = Repeats(Clock())
    for level, message in (
        (logging.ERROR, "what was written to %s is lost"),
        (logging.INFO, "%s"),
        (logging.DEBUG, "asked %s"),
    ):
        assert None not in [logged(filtered, level, message, n) for n in range(3 * REPEATS_MAX)]
    assert None in [logged(filtered, logging.ERROR, "bug") for _ in range(2 * REPEATS_MAX)]


def test_the_count_can_be_added_to_any_line() -> None:
    clock = Clock()
    filtered = Repeats(clock)
    for arguments, text in (((), "100 % %s"), (({"a": 1},), "%(a)s")):
        for _ in range(REPEATS_MAX + 1):
            logged(filtered, logging.INFO, text, *arguments)
        clock.now += REPEATS_S
        assert logged(filtered, logging.INFO, text, *arguments) is not None


def test_only_so_many_texts_are_remembered() -> None:
    filtered = Repeats(Clock())
    for n in range(10_000):
        logged(filtered, logging.INFO, f"text {n}")
    assert len(filtered._windows) < 1000
