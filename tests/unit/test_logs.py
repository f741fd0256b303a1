"""Where the log goes."""

import logging
import os
import re
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import etcdfs.logs
from etcdfs.handshake import LogSettings
from etcdfs.logs import LEVELS, LogFileHandler, SyslogHandler, setup_logging

log = logging.getLogger("etcdfs.test")

ODD = "odd \udcff"  # a path that is no UTF-8


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Let a test set up logging, and take it back."""
    root = logging.getLogger()
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


def test_foreground_goes_to_stderr(
    root: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(LogSettings(), foreground=True)
    log.info("here")
    sys.stderr.flush()
    assert capsys.readouterr().err.endswith(" INFO etcdfs.test: here\n")


@pytest.mark.expect_log("%s")
def test_background_goes_to_syslog(
    root: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        monkeypatch.setattr(etcdfs.logs, "_SYSLOG_SOCKET", str(tmp_path / "log"))
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
