"""What tests of services stand on: an etcd that is a fake, and both ways to see it.

Fixtures:
    store: A fresh one, with nothing in it.
    cache: Whether there is a mirror, in turn.
"""

import pytest

from tests.support.fake_store import FakeStore


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture(params=[True, False], ids=["cache", "no-cache"])
def cache(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found
