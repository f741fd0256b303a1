"""How the daemon's process begins and ends; nothing is mounted."""

import errno
import logging
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

import etcdfs.daemon.main
from etcdfs.daemon.signals import ServiceManager
from etcdfs.errors import EtcdUnreachableError
from etcdfs.options import LogSettings, MountOptions
from etcdfs.process.startup_protocol import Handover, Reporter, send_handover


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """Return where the daemon logs to; what it adds to the root logger is taken away again."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield tmp_path / "log"
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)


def run_daemon(
    monkeypatch: pytest.MonkeyPatch, log_file: Path, error: Exception, *, grouped: bool
) -> int:
    """Run the daemon with a mount that ends by an error."""

    async def serve(
        options: MountOptions, reporter: Reporter, manager: ServiceManager, claim: None
    ) -> None:
        raise ExceptionGroup("nursery", [error]) if grouped else error

    def claimed(mountpoint: str) -> AbstractContextManager[None]:
        return nullcontext()

    handover = Handover(
        options=MountOptions(mountpoint="/mnt"),
        log=LogSettings(level="error", file=str(log_file)),
    )
    monkeypatch.setattr(etcdfs.daemon.main, "serve", serve)
    monkeypatch.setattr(etcdfs.daemon.main, "claimed", claimed)
    arguments = ["etcdfs.daemon.main", "/mnt", "--options-fd", str(send_handover(handover))]
    monkeypatch.setattr("sys.argv", arguments)
    return etcdfs.daemon.main.main()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_failure_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    log_file: Path,
    capsys: pytest.CaptureFixture[str],
    grouped: bool,
) -> None:
    error = EtcdUnreachableError("nobody there")
    assert run_daemon(monkeypatch, log_file, error, grouped=grouped) == 20
    assert capsys.readouterr().err == "etcdfs: nobody there\n"
    assert log_file.read_text() == ""


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.expect_log("the daemon dies: %s")
def test_a_crash_leaves_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, log_file: Path, grouped: bool
) -> None:
    # Nobody reads its stderr by then.
    with pytest.raises((RuntimeError, ExceptionGroup)):
        run_daemon(monkeypatch, log_file, RuntimeError("a bug"), grouped=grouped)
    log = log_file.read_text()
    assert "CRITICAL etcdfs.daemon.main: the daemon dies" in log
    assert "RuntimeError: a bug" in log


@pytest.mark.expect_log("the daemon dies: %s")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_b99_a_daemon_that_dies_for_want_of_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, log_file: Path, error: Exception, grouped: bool
) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**31, limit))
    with pytest.raises(ExceptionGroup if grouped else type(error)):
        run_daemon(monkeypatch, log_file, error, grouped=grouped)
    said = log_file.read_text().splitlines()[0]
    assert "the daemon dies: no memory is left; this process has " in said
    assert said.endswith(" MiB of address space, and may have 2048 (ulimit -v)")
