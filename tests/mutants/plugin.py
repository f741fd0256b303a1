"""What a run of pytest for mutants does besides: record which test runs what, or run chosen tests.

Knows: pytest and coverage. Does not know: mutants.

Environment:
    MUTANTS_RECORD: A directory: `coverage` there gets the lines that each test runs, `seconds`
        how long each test takes (JSON).
    MUTANTS_TESTS: A file (JSON): the tests to run, in this order, and no other.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from coverage import Coverage
from hypothesis import Phase, settings

_RECORD: Final = os.environ.get("MUTANTS_RECORD")
_TESTS: Final = os.environ.get("MUTANTS_TESTS")

_coverage: Coverage | None = None
_seconds: dict[str, float] = {}

if _RECORD is not None:  # before anything of ours is loaded
    _coverage = Coverage(data_file=f"{_RECORD}/coverage", config_file=False, source=["etcdfs"])
    _coverage.start()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Have the same examples each time, and no smaller ones: that a test fails is all."""
    settings.register_profile(
        "mutants",
        settings.get_profile("dev"),
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        database=None,
    )
    settings.load_profile("mutants")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the chosen tests, in the order of the choice."""
    if _TESTS is None:
        return
    wanted = {name: place for place, name in enumerate(json.loads(Path(_TESTS).read_text()))}
    items[:] = sorted(
        (item for item in items if item.nodeid in wanted), key=lambda item: wanted[item.nodeid]
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note what the test runs, and how long it takes."""
    if _coverage is not None:
        _coverage.switch_context(item.nodeid)
    begin = time.process_time()
    try:
        return (yield)
    finally:
        _seconds[item.nodeid] = time.process_time() - begin
        if _coverage is not None:
            _coverage.switch_context("")


def pytest_sessionfinish() -> None:
    """Write down what was recorded."""
    if _coverage is not None:
        _coverage.stop()
        _coverage.save()
        (Path(_RECORD or "") / "seconds").write_text(json.dumps(_seconds))
