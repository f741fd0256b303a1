"""Real programs: each works in a directory on tmpfs, in a cached and in an uncached mount.

Without the mirror every path component of every call asks etcd, and a program that makes ten
thousands of calls takes a minute: such a test, marked `many_calls`, runs there with the Hypothesis
profile `nightly` only.
"""

import pytest

from tests.support.profile import NIGHTLY


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what takes too long."""
    if next(item.iter_markers("many_calls"), None) and "--no-cache" in item.name and not NIGHTLY:
        pytest.skip("too many calls without the mirror: runs with HYPOTHESIS_PROFILE=nightly")
