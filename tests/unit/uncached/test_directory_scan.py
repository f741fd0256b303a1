"""A level is listed completely, and with little of what is below it looked at."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import Put, Transaction, range_end
from etcdfs.uncached.directory_scan import Level
from tests.support.fake_store import FakeStore

PREFIX = b"/top/"

_component = st.text("ab\xff/-0", min_size=1, max_size=4).map(lambda text: text.encode("latin-1"))


def listed(store: FakeStore, limit: int, prefix: bytes = PREFIX) -> tuple[Level, int, int]:
    """List the root of a keyspace; return also what etcd would have walked, and how often."""
    level = Level(Keyspace(prefix), (), prefix or b"\0", range_end(prefix))
    walked = 0
    for requests in range(1, 100_000):
        stop = level.stop
        assert stop == b"\0" or level.next_start < stop, "each range has something to look at"
        walked += len(store.range_now(level.next_start, stop).entries)
        page = store.range_now(level.next_start, stop, limit=limit)
        if level.passed(page, stop, level.take(page)):
            return level, walked, requests
    raise AssertionError("it does not end")


@given(st.sets(_component, max_size=30), st.sampled_from([1, 2, 5]), st.sampled_from([PREFIX, b""]))
def test_every_name_is_found_once(keys: set[bytes], limit: int, prefix: bytes) -> None:
    store = FakeStore()
    for key in keys:
        store.put_now(prefix + key, b"")
    store.put_now(PREFIX[:-1] + b"0", b"after the prefix")
    keyspace = Keyspace(prefix)
    expected: dict[bytes, bool] = {}
    markers: dict[bytes, bytes] = {}
    for entry in store.range_now(prefix or b"\0", range_end(prefix)).entries:
        names, is_marker = keyspace.locate(entry.key)
        if names:
            is_directory = is_marker or len(names) > 1
            expected[names[0]] = expected.get(names[0], False) or is_directory
            if is_marker and len(names) == 1:
                markers[names[0]] = entry.key
    level, *_ = listed(store, limit, prefix)
    assert {name: value is None for name, value in level.found.items()} == expected
    assert {name: entry.key for name, entry in level.markers.items()} == markers
    for name, witness in level.evidence_keys.items():
        assert keyspace.locate(witness)[0][0] == name
    assert level.evidence_keys.keys() == {name for name, below in expected.items() if below}


@pytest.mark.parametrize("kind", ["numbered", "random", "words"])
def test_what_is_below_is_not_walked_again_and_again(kind: str) -> None:
    rng = random.Random(1)
    names = {
        "numbered": [b"svc-%03d" % n for n in range(200)],
        "random": [b"%032x" % rng.getrandbits(128) for _ in range(200)],
        "words": [bytes(rng.choices(range(97, 123), k=rng.randint(3, 9))) for _ in range(200)],
    }[kind]
    store = FakeStore()
    for name in names:
        puts = tuple(Put(PREFIX + name + b"/%d" % n, b"") for n in range(10))
        store.commit_now(Transaction(then=puts))
    level, walked, requests = listed(store, 4)
    assert sorted(level.found) == sorted(names)
    total = 10 * len(names)
    assert walked < 25 * total, "one walk for each would be 100 times all of it"
    assert requests < 2.5 * len(names)
