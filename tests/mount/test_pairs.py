"""Two calls at the same moment, on a real mount, leave what some order would leave on tmpfs."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from tests.mount.lab import Lab
from tests.support.pairs import Outcome, World, pairs, possible
from tests.support.profile import NIGHTLY

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

CLOSING: Final = ("close f", "fsync f", "close g")

STRIDE: Final = 4 if NIGHTLY else 8
"""Of how many pairs of calls one is made."""

_SPREAD_S: Final = 0.003
"""A close takes about that long, so that the other call comes at any moment of it."""


def at_once(calls: list[Callable[[], int]], chance: random.Random) -> list[int]:
    """Make calls from threads, one a little before the other; return their errnos."""
    ready = threading.Barrier(len(calls))

    def make(call: Callable[[], int], delay_s: float) -> int:
        ready.wait()
        start = time.perf_counter()
        while time.perf_counter() - start < delay_s:
            pass
        return call()

    delays = [chance.uniform(0, _SPREAD_S) for _ in calls]
    with ThreadPoolExecutor(len(calls)) as executor:
        return list(executor.map(make, calls, delays))


@pytest.mark.parametrize("part", range(4))
def test_b20_two_calls_at_once(lab: Lab, part: int) -> None:
    chance = random.Random(part)
    closing = sorted(pair for pair in pairs() if not set(CLOSING).isdisjoint(pair))
    for number, (kind, first, second) in enumerate(closing[part::STRIDE]):
        root = lab.path / f"r{number}"
        root.mkdir()
        world = World(root, kind, has_leases=True)
        calls = [lambda: world.call(first), lambda: world.call(second)]  # noqa: B023
        errnos = (*at_once(calls, chance), *world.finish())
        found = Outcome(errnos, world.files())
        assert found in possible(kind, first, second), (kind, first, second)
        held = {found.path: lab.value(f"r{number}/{found.path}") for found in found.files}
        assert held == {found.path: found.content for found in found.files}
        keys = [key for key in lab.own_keys() if key.startswith(b"r%d/" % number)]
        assert len([key for key in keys if not key.endswith(b"/")]) == len(held)
