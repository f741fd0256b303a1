"""A copy that was resumed is caught up exactly when it shows what etcd had when it was asked."""

from collections.abc import Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from etcdfs.consistency.catch_up import catch_up
from etcdfs.errors import StoreTimeoutError
from etcdfs.keyspace.store import KeyValue
from tests.support.fake_store import FakeStore

RANGE = (b"/b", b"/x")
KEYS = (b"/a", b"/b", b"/c", b"/d", b"/e", b"/x")
TIMEOUT_S = 5.0


class Copy:
    """Goes on to the next change of its range when somebody waits for that; or not at all."""

    def __init__(self, store: FakeStore, bounds: Sequence[bytes], *, revision: int) -> None:
        self.bounds = bounds
        self.revision = revision
        self.doubts: list[str] = []
        self._store = store

    @property
    def shown(self) -> tuple[KeyValue, ...]:
        return self._store.range_now(*RANGE, revision=self.revision).entries

    async def advanced(self) -> None:
        while self.revision < self._store.revision:
            self.revision += 1
            changed = [event.key for event in self._store.events_of(self.revision)]
            if any(RANGE[0] <= key < RANGE[1] for key in changed):
                return
        await trio.sleep_forever()

    def doubt(self, reason: str) -> None:
        """List everything, as the mirror does."""
        self.doubts.append(reason)
        self.revision = self._store.revision


def filled(changes: Sequence[tuple[bytes, bool]]) -> FakeStore:
    store = FakeStore()
    store.put_now(b"/c", b"first")
    for key, is_put in changes:
        if is_put:
            store.put_now(key, b"")
        else:
            store.delete_now(key)
    return store


changes = st.lists(st.tuples(st.sampled_from(KEYS), st.booleans()), max_size=12)


@given(changes, st.sets(st.sampled_from(KEYS[2:5])), st.data())
def test_it_is_caught_up_as_soon_as_nothing_is_missing_and_no_sooner(
    changes: list[tuple[bytes, bool]], pages: set[bytes], data: st.DataObject
) -> None:
    store = filled(changes)
    revision = data.draw(st.integers(2, store.revision))
    copy = Copy(store, (RANGE[0], *sorted(pages), RANGE[1]), revision=revision)
    wanted = store.range_now(*RANGE).entries
    states = [
        store.range_now(*RANGE, revision=at).entries for at in range(revision, store.revision)
    ]

    trio.run(
        lambda: catch_up(store, copy, timeout_s=TIMEOUT_S), clock=MockClock(autojump_threshold=0)
    )

    assert copy.shown == wanted
    assert wanted not in states[: copy.revision - revision]
    assert not copy.doubts


async def test_a_watch_that_brings_nothing_is_given_up(autojump_clock: MockClock) -> None:
    store = filled([(b"/d", True)])
    copy = Copy(store, RANGE, revision=2)
    copy.advanced = trio.sleep_forever  # type: ignore[method-assign]
    with pytest.raises(StoreTimeoutError, match="it is at revision 2, and etcd at 3"):
        await catch_up(store, copy, timeout_s=TIMEOUT_S)
    assert trio.current_time() == TIMEOUT_S


async def test_what_is_compacted_cannot_be_counted_and_is_listed(autojump_clock: MockClock) -> None:
    store = filled([(b"/d", True), (b"/d", False), (b"/a", True)])
    store.compact_now(5)
    copy = Copy(store, RANGE, revision=4)
    await catch_up(store, copy, timeout_s=TIMEOUT_S)
    assert copy.doubts == ["what it was resumed from is compacted"]


async def test_a_copy_that_is_where_etcd_is_costs_one_question() -> None:
    store = filled([(b"/d", True)])
    await catch_up(store, Copy(store, (RANGE[0], b"/d", RANGE[1]), revision=3), timeout_s=1)
    assert len(store.range_calls) == 1
