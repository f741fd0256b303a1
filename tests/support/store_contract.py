"""What every `Store` must do: one set of tests for the fake and for each real etcd.

A test module makes a subclass named `Test...` and provides the fixture `lab`. Revisions are
relative to the store's revision at the start of a test; the keyspace is empty then.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from etcdfs.errors import (
    CompactedError,
    FutureRevisionError,
    LeaseExistsError,
    StoreError,
    StoreValueTooLargeError,
    TooManyOperationsError,
    TransactionAbortedError,
)
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Abort,
    Committed,
    Compare,
    Delete,
    Get,
    KeyValue,
    Operation,
    Page,
    Put,
    Revision,
    Store,
    Tombstone,
    Transaction,
    Watch,
    WatchEvents,
    WatchMessage,
    WatchOpened,
    WatchProgress,
    absent,
    exists,
    range_end,
    unchanged,
)

BOUND_S = 20.0
"""How long anything here may take on a busy machine; nothing waits for it to pass."""


@dataclass(frozen=True, slots=True)
class Lab:
    """A store to test, and what the port does not offer."""

    store: Store
    compact: Callable[[int], Awaitable[None]]


async def do(lab: Lab, *operations: Operation) -> Committed:
    return await lab.store.commit(Transaction(then=operations))


async def put(lab: Lab, key: bytes, value: bytes = b"v") -> Revision:
    return (await do(lab, Put(key, value))).revision


async def get(lab: Lab, key: bytes, revision: int = 0) -> KeyValue | None:
    page = await lab.store.range(key, revision=revision)
    return page.entries[0] if page.entries else None


async def holds(lab: Lab, *compares: Compare) -> bool:
    return (await lab.store.commit(Transaction(when=compares))).succeeded


async def receive(watch: Watch) -> WatchMessage:
    with trio.fail_after(BOUND_S):
        return await watch.receive()


async def batches(watch: Watch, until: int) -> list[WatchEvents]:
    """Receive batches until revision `until` has come."""
    found: list[WatchEvents] = []
    while not found or found[-1].revision < until:
        message = await receive(watch)
        if isinstance(message, WatchEvents):
            found.append(message)
    return found


async def last_word(watch: Watch) -> None:
    """Receive until the watch ends; only that it was opened may come before."""
    while True:
        assert isinstance(await receive(watch), WatchOpened)


def everything(lab: Lab, from_revision: int) -> AbstractAsyncContextManager[Watch]:
    return lab.store.watch(b"", END_OF_KEYS, from_revision)


def keys(page: Page) -> list[bytes]:
    return [kv.key for kv in page.entries]


def page_of(committed: Committed, index: int) -> Page:
    result = committed.results[index]
    assert isinstance(result, Page)
    return result


class RangeContract:
    async def test_a_key_that_was_put_can_be_read(self, lab: Lab) -> None:
        revision = await put(lab, b"a", b"\x00\xff")
        assert await get(lab, b"a") == KeyValue(
            key=b"a",
            value=b"\x00\xff",
            create_revision=revision,
            mod_revision=revision,
            version=1,
        )

    async def test_an_absent_key_is_an_empty_page(self, lab: Lab) -> None:
        revision = await put(lab, b"a")
        assert await lab.store.range(b"b") == Page((), revision, more=False)

    async def test_a_second_put_keeps_create_revision(self, lab: Lab) -> None:
        first = await put(lab, b"a", b"1")
        second = await put(lab, b"a", b"2")
        kv = await get(lab, b"a")
        assert second == first + 1
        assert kv == KeyValue(b"a", b"2", first, second, 2)

    async def test_a_deleted_key_starts_anew(self, lab: Lab) -> None:
        await put(lab, b"a")
        await do(lab, Delete(b"a"))
        assert await get(lab, b"a") is None
        revision = await put(lab, b"a")
        assert await get(lab, b"a") == KeyValue(b"a", b"v", revision, revision, 1)

    async def test_a_range_is_half_open_and_sorted_by_bytes(self, lab: Lab) -> None:
        for key in (b"c", b"a/b", b"\xff", b"a", b"b", b"a-b"):
            await put(lab, key)
        assert keys(await lab.store.range(b"a", b"c")) == [b"a", b"a-b", b"a/b", b"b"]
        assert keys(await lab.store.range(b"b", END_OF_KEYS)) == [b"b", b"c", b"\xff"]
        assert keys(await lab.store.range(b"c", b"a")) == []

    async def test_the_empty_start_means_every_key(self, lab: Lab) -> None:
        for key in (b"\x00", b"a", b"\xff\xff"):
            await put(lab, key)
        page = await lab.store.range(b"", END_OF_KEYS)
        assert keys(page) == [b"\x00", b"a", b"\xff\xff"]

    async def test_the_empty_key_is_refused(self, lab: Lab) -> None:
        with pytest.raises(StoreError, match="key is not provided"):
            await lab.store.range(b"")
        with pytest.raises(StoreError, match="key is not provided"):
            await put(lab, b"")

    async def test_a_prefix_range_ends_where_the_prefix_does(self, lab: Lab) -> None:
        for key in (b"a", b"a/", b"a/x", b"a/\xff", b"a0", b"a-"):
            await put(lab, key)
        page = await lab.store.range(b"a/", range_end(b"a/"))
        assert keys(page) == [b"a/", b"a/x", b"a/\xff"]

    async def test_a_limit_cuts_and_says_so(self, lab: Lab) -> None:
        for key in (b"a", b"b", b"c"):
            await put(lab, key)
        cut = await lab.store.range(b"a", END_OF_KEYS, limit=2)
        whole = await lab.store.range(b"a", END_OF_KEYS, limit=3)
        assert (keys(cut), cut.more) == ([b"a", b"b"], True)
        assert (keys(whole), whole.more) == ([b"a", b"b", b"c"], False)

    async def test_the_newest_key_of_a_range_and_how_many_others_there_are(self, lab: Lab) -> None:
        for key in (b"a", b"c", b"b"):
            await put(lab, key)
        newest = await put(lab, b"b")
        await put(lab, b"d")
        last = (await do(lab, Delete(b"c"))).revision
        page = await lab.store.range(b"a", b"d", keys_only=True, newest=True)
        assert [(kv.key, kv.mod_revision, kv.value) for kv in page.entries] == [(b"b", newest, b"")]
        assert (page.remaining, page.revision) == (1, last)
        page = await lab.store.range(b"a", b"d", revision=newest, newest=True)
        assert (keys(page), page.remaining) == ([b"b"], 2)
        assert await lab.store.range(b"x", b"y", newest=True) == Page((), last, more=False)

    async def test_keys_only_leaves_the_values_out(self, lab: Lab) -> None:
        revision = await put(lab, b"a", b"value")
        page = await lab.store.range(b"a", END_OF_KEYS, keys_only=True)
        assert page.entries == (KeyValue(b"a", b"", revision, revision, 1),)

    async def test_an_old_revision_can_be_read(self, lab: Lab) -> None:
        first = await put(lab, b"a", b"1")
        await put(lab, b"b")
        await put(lab, b"a", b"2")
        last = (await do(lab, Delete(b"a"))).revision
        old = await lab.store.range(b"a", END_OF_KEYS, revision=first)
        assert [(kv.key, kv.value) for kv in old.entries] == [(b"a", b"1")]
        assert old.revision == last  # the store's revision, not the one that was read
        assert keys(await lab.store.range(b"a", END_OF_KEYS, revision=first - 1)) == []

    async def test_a_future_revision_is_refused(self, lab: Lab) -> None:
        revision = await put(lab, b"a")
        with pytest.raises(FutureRevisionError):
            await lab.store.range(b"a", revision=revision + 1)

    async def test_a_compacted_revision_is_refused(self, lab: Lab) -> None:
        first = await put(lab, b"a", b"1")
        second = await put(lab, b"a", b"2")
        await lab.compact(second)
        with pytest.raises(CompactedError):
            await lab.store.range(b"a", revision=first)
        at_the_edge = await get(lab, b"a", second)
        assert at_the_edge is not None
        assert at_the_edge.value == b"2"

    async def test_it_is_ready(self, lab: Lab) -> None:
        before = lab.store.statistics()
        await lab.store.ready()
        assert lab.store.statistics() == before

    async def test_status_knows_the_revision(self, lab: Lab) -> None:
        revision = await put(lab, b"a")
        status = await lab.store.status()
        assert status.revision == revision
        assert status.version.startswith("3.")
        assert status.database_size > 0

    async def test_requests_are_counted(self, lab: Lab) -> None:
        before = lab.store.statistics()
        await put(lab, b"a")
        await get(lab, b"a")
        await get(lab, b"a")
        async with everything(lab, 0) as watch:
            await receive(watch)
        after = lab.store.statistics()
        assert after.transactions - before.transactions == 1
        assert after.ranges - before.ranges == 2
        assert after.watches - before.watches == 1


class CommitContract:
    async def test_a_transaction_is_one_revision(self, lab: Lab) -> None:
        before = await put(lab, b"x")
        committed = await do(lab, Put(b"a", b"1"), Put(b"b", b"2"), Delete(b"x"))
        assert committed == Committed(True, committed.revision, (None, None, 1))
        assert committed.revision == before + 1
        page = await lab.store.range(b"a", END_OF_KEYS)
        assert [kv.mod_revision for kv in page.entries] == [committed.revision] * 2

    async def test_a_transaction_that_changes_nothing_is_no_revision(self, lab: Lab) -> None:
        before = await put(lab, b"x")
        assert (await do(lab, Get(b"x"), Delete(b"absent"))).revision == before

    async def test_otherwise_runs_when_a_condition_fails(self, lab: Lab) -> None:
        await put(lab, b"a")
        committed = await lab.store.commit(
            Transaction(
                when=(absent(b"a"), absent(b"b")),
                then=(Put(b"a", b"new"),),
                otherwise=(Get(b"a"), Put(b"b", b"o")),
            )
        )
        assert not committed.succeeded
        assert [kv.value for kv in page_of(committed, 0).entries] == [b"v"]
        assert await get(lab, b"b") is not None

    async def test_compare_kinds(self, lab: Lab) -> None:
        await put(lab, b"old")
        created = await put(lab, b"a")
        modified = await put(lab, b"a")
        for field, number in (
            ("create_revision", created),
            ("mod_revision", modified),
            ("version", 2),
        ):
            for operator, results in {
                "==": (False, True, False),
                "!=": (True, False, True),
                "<": (False, False, True),
                ">": (True, False, False),
            }.items():
                got = tuple(
                    [
                        await holds(lab, Compare(b"a", field, operator, number + delta))  # type: ignore[arg-type]
                        for delta in (-1, 0, 1)
                    ]
                )
                assert got == results, (field, operator)

    async def test_the_helpers_mean_what_they_say(self, lab: Lab) -> None:
        revision = await put(lab, b"a")
        assert await holds(lab, exists(b"a"), unchanged(b"a", revision))
        assert await holds(lab, absent(b"b"), unchanged(b"b", 0))
        assert not await holds(lab, absent(b"a"))
        assert not await holds(lab, exists(b"b"))
        assert not await holds(lab, unchanged(b"a", revision - 1))
        assert not await holds(lab, unchanged(b"a", 0))

    async def test_a_compare_of_a_range_is_about_every_key(self, lab: Lab) -> None:
        await put(lab, b"d/a")
        last = await put(lab, b"d/b")
        end = range_end(b"d/")
        assert await holds(lab, Compare(b"d/", "mod_revision", "<", last + 1, end))
        assert not await holds(lab, Compare(b"d/", "mod_revision", "<", last, end))
        assert await holds(lab, Compare(b"d/", "version", "==", 1, end))
        assert not await holds(lab, absent(b"d/", end))

    async def test_a_compare_of_an_empty_range_is_about_zero(self, lab: Lab) -> None:
        await put(lab, b"d")
        end = range_end(b"d/")
        assert await holds(lab, absent(b"d/", end))
        assert await holds(lab, Compare(b"d/", "mod_revision", "<", 1, end))
        assert not await holds(lab, Compare(b"d/", "version", ">", 0, end))

    async def test_a_compare_of_everything(self, lab: Lab) -> None:
        assert await holds(lab, absent(b"", END_OF_KEYS))
        await put(lab, b"a")
        assert not await holds(lab, absent(b"", END_OF_KEYS))

    async def test_conditions_inside_are_judged_on_the_state_before(self, lab: Lab) -> None:
        inner = Transaction(
            when=(absent(b"a"),), then=(Put(b"b", b"before"),), otherwise=(Put(b"b", b"after"),)
        )
        committed = await do(lab, Put(b"a", b"1"), inner)
        assert committed.results == (None, Committed(True, committed.revision, (None,)))
        kv = await get(lab, b"b")
        assert kv is not None
        assert (kv.value, kv.mod_revision) == (b"before", committed.revision)

    async def test_a_get_sees_the_puts_and_deletes_before_it(self, lab: Lab) -> None:
        await put(lab, b"d/x")
        committed = await do(
            lab,
            Get(b"d/", range_end(b"d/")),
            Put(b"d/a", b"1"),
            Delete(b"d/x"),
            Get(b"d/", range_end(b"d/")),
            Transaction(then=(Get(b"d/a", keys_only=True), Get(b"", END_OF_KEYS, limit=1))),
        )
        assert keys(page_of(committed, 0)) == [b"d/x"]
        after = page_of(committed, 3)
        assert after.entries == (KeyValue(b"d/a", b"1", committed.revision, committed.revision, 1),)
        assert after.revision == committed.revision
        inner = committed.results[4]
        assert isinstance(inner, Committed)
        assert [kv.value for kv in page_of(inner, 0).entries] == [b""]
        assert not page_of(inner, 1).more

    async def test_a_delete_counts(self, lab: Lab) -> None:
        for key in (b"d/a", b"d/b", b"e"):
            await put(lab, key)
        committed = await do(lab, Delete(b"d/", range_end(b"d/")), Delete(b"e"), Delete(b"f"))
        assert committed.results == (2, 1, 0)

    @pytest.mark.parametrize(
        "operations",
        [
            (Put(b"a", b"1"), Put(b"a", b"2")),
            (Put(b"a", b"1"), Delete(b"a")),
            (Delete(b"a"), Put(b"a", b"1")),
            (Put(b"a/b", b"1"), Delete(b"a/", b"a0")),
            (Put(b"a", b"1"), Transaction(then=(Put(b"a", b"2"),))),
            (Transaction(otherwise=(Delete(b"a"),)), Put(b"a", b"1")),
        ],
        ids=["puts", "put-delete", "delete-put", "range", "inner-put", "inner-delete"],
    )
    async def test_a_key_changes_once_in_a_transaction(
        self, lab: Lab, operations: tuple[Operation, ...]
    ) -> None:
        before = await put(lab, b"a", b"old")
        with pytest.raises(StoreError, match="duplicate key"):
            await do(lab, *operations)
        kv = await get(lab, b"a")
        assert kv is not None
        assert (kv.value, kv.mod_revision) == (b"old", before)

    async def test_branches_may_change_the_same_key(self, lab: Lab) -> None:
        inner = Transaction(then=(Put(b"a", b"1"),), otherwise=(Put(b"a", b"2"),))
        committed = await do(lab, inner, Delete(b"b"), Delete(b"b"))
        assert committed.succeeded

    async def test_too_many_operations_change_nothing(self, lab: Lab) -> None:
        before = await put(lab, b"x")
        puts = tuple(Put(b"k%d" % n, b"") for n in range(129))
        with pytest.raises(TooManyOperationsError):
            await do(lab, *puts)
        with pytest.raises(TooManyOperationsError):
            await do(lab, Transaction(then=puts[:128]))
        assert (await lab.store.range(b"x")).revision == before
        await do(lab, *puts[:128])

    async def test_inner_transactions_hold_more_operations(self, lab: Lab) -> None:
        committed = await do(
            lab,
            *(
                Transaction(then=tuple(Put(b"%d/%d" % (i, n), b"") for n in range(64)))
                for i in range(64)
            ),
        )
        page = await lab.store.range(b"", END_OF_KEYS, keys_only=True)
        assert len(page.entries) == 64 * 64
        assert {kv.mod_revision for kv in page.entries} == {committed.revision}

    async def test_an_abort_undoes_all(self, lab: Lab) -> None:
        before = await put(lab, b"a", b"1")
        broken = Transaction((unchanged(b"a", before - 1),), (Put(b"c", b"3"),), (Abort(b"a"),))
        for place in (broken, Transaction(then=(broken,))):
            with pytest.raises(TransactionAbortedError):
                await do(lab, Put(b"b", b"2"), Delete(b"a"), place)
        page = await lab.store.range(b"", END_OF_KEYS)
        assert [(kv.key, kv.value) for kv in page.entries] == [(b"a", b"1")]
        assert page.revision == before

    async def test_an_abort_that_is_not_reached(self, lab: Lab) -> None:
        before = await put(lab, b"a", b"1")
        kept = Transaction((unchanged(b"a", before),), (Put(b"c", b"3"),), (Abort(b"a"),))
        committed = await do(lab, Delete(b"a"), Transaction(then=(kept, Put(b"d", b""))))
        assert committed.revision == before + 1
        page = await lab.store.range(b"", END_OF_KEYS)
        assert [(kv.key, kv.value) for kv in page.entries] == [(b"c", b"3"), (b"d", b"")]

    async def test_operations_count_on_the_way_in(self, lab: Lab) -> None:
        def nested(*widths: int) -> Transaction:
            width, *inner = widths
            operations = [Get(b"a")] * (width - bool(inner))
            return Transaction(then=(*operations, *([nested(*inner)] if inner else [])))

        await lab.store.commit(nested(20, 36, 36, 36))
        await lab.store.commit(nested(*[4] * 32))
        for widths in ((21, 36, 36, 36), (*[4] * 32, 1)):
            with pytest.raises(TooManyOperationsError):
                await lab.store.commit(nested(*widths))

    @pytest.mark.parametrize("size", [1_600_000, 4_000_000], ids=["etcd", "grpc"])
    async def test_too_large_a_request_changes_nothing(self, lab: Lab, size: int) -> None:
        before = await put(lab, b"x")
        with pytest.raises(StoreValueTooLargeError):
            await put(lab, b"a", bytes(size))
        assert await get(lab, b"a") is None
        assert await put(lab, b"a", bytes(1_500_000)) == before + 1

    async def test_keeping_a_lease_takes_a_key(self, lab: Lab) -> None:
        with pytest.raises(StoreError, match="key not found"):
            await do(lab, Put(b"a", b"1", keep_lease=True))
        await put(lab, b"a")
        await do(lab, Put(b"a", b"2", keep_lease=True))
        with pytest.raises(StoreError, match="lease not found"):
            await do(lab, Put(b"a", b"3", lease=12345))
        kv = await get(lab, b"a")
        assert kv is not None
        assert kv.value == b"2"


class LeaseContract:
    async def test_a_lease_takes_its_keys_along(self, lab: Lab) -> None:
        lease = await lab.store.lease_grant(60)
        await do(lab, Put(b"a", b"1", lease=lease), Put(b"b", b"2", lease=lease))
        await do(lab, Put(b"b", b"3"))
        kv = await get(lab, b"a")
        assert kv is not None
        assert kv.lease == lease
        async with everything(lab, 0) as watch:
            await receive(watch)
            await lab.store.lease_revoke(lease)
            message = await receive(watch)
        assert isinstance(message, WatchEvents)
        assert message.events == (Tombstone(b"a", message.revision),)
        kept = await get(lab, b"b")
        assert kept is not None
        assert (kept.value, kept.lease) == (b"3", 0)

    async def test_a_lease_says_how_long_it_lasts(self, lab: Lab) -> None:
        lease = await lab.store.lease_grant(60)
        left = await lab.store.lease_time_to_live(lease)
        assert left is not None
        assert 30 < left <= 60
        await lab.store.lease_revoke(lease)
        assert await lab.store.lease_time_to_live(lease) is None

    async def test_a_lease_of_a_number_of_ones_own(self, lab: Lab) -> None:
        lease = await lab.store.lease_grant(60, 0x1234567)
        assert lease == 0x1234567
        with pytest.raises(LeaseExistsError):
            await lab.store.lease_grant(60, lease)
        assert not await lab.store.lease_has_keys(lease)
        await do(lab, Put(b"a", b"1", lease=lease))
        assert await lab.store.lease_has_keys(lease)
        await do(lab, Put(b"a", b"1"))
        assert not await lab.store.lease_has_keys(lease)
        await lab.store.lease_revoke(lease)
        assert not await lab.store.lease_has_keys(lease)

    async def test_a_lease_that_has_ended_can_be_revoked_again(self, lab: Lab) -> None:
        lease = await lab.store.lease_grant(60)
        await lab.store.lease_revoke(lease)
        await lab.store.lease_revoke(lease)
        with pytest.raises(StoreError, match="lease not found"):
            await do(lab, Put(b"a", b"1", lease=lease))

    async def test_a_put_that_keeps_the_lease(self, lab: Lab) -> None:
        lease = await lab.store.lease_grant(60)
        await do(lab, Put(b"a", b"1", lease=lease))
        await do(lab, Put(b"a", b"2", keep_lease=True))
        kv = await get(lab, b"a")
        assert kv is not None
        assert (kv.value, kv.lease) == (b"2", lease)


class WatchContract:
    async def test_a_watch_first_says_that_it_is_open(self, lab: Lab) -> None:
        revision = await put(lab, b"a")
        async with everything(lab, 0) as watch:
            assert await receive(watch) == WatchOpened(revision)

    async def test_a_watch_from_zero_begins_with_the_next_revision(self, lab: Lab) -> None:
        await put(lab, b"a", b"1")
        async with everything(lab, 0) as watch:
            await receive(watch)
            revision = await put(lab, b"a", b"2")
            message = await receive(watch)
        assert isinstance(message, WatchEvents)
        assert message.revision == revision
        assert [e.mod_revision for e in message.events] == [revision]

    async def test_a_watch_from_the_next_revision(self, lab: Lab) -> None:
        revision = await put(lab, b"a", b"1")
        async with everything(lab, revision + 1) as watch:
            await receive(watch)
            await put(lab, b"a", b"2")
            (batch,) = await batches(watch, revision + 1)
        (event,) = batch.events
        assert event == KeyValue(b"a", b"2", revision, revision + 1, 2)  # type: ignore[arg-type]

    async def test_a_watch_from_the_past_includes_its_revision(self, lab: Lab) -> None:
        first = await put(lab, b"a")
        await put(lab, b"b")
        await do(lab, Delete(b"a"))
        last = await put(lab, b"c")
        async with everything(lab, first) as watch:
            await receive(watch)
            events = [e for batch in await batches(watch, last) for e in batch.events]
        assert [e.key for e in events] == [b"a", b"b", b"a", b"c"]
        assert [e.mod_revision for e in events] == [first, first + 1, first + 2, last]
        assert events[2] == Tombstone(b"a", first + 2)  # type: ignore[arg-type]

    async def test_revisions_come_in_order_old_and_new(self, lab: Lab) -> None:
        first = await put(lab, b"k", b"0")
        for number in range(1, 20):
            await put(lab, b"k", b"%d" % number)
        async with everything(lab, first) as watch:
            await receive(watch)
            for number in range(20, 40):
                await put(lab, b"k", b"%d" % number)
            found = await batches(watch, first + 39)
        events = [e for batch in found for e in batch.events]
        assert [e.mod_revision for e in events] == list(range(first, first + 40))
        assert [e.value for e in events if isinstance(e, KeyValue)] == [
            b"%d" % n for n in range(40)
        ]
        assert [b.revision for b in found] == [b.events[-1].mod_revision for b in found]

    async def test_a_transaction_comes_whole(self, lab: Lab) -> None:
        await put(lab, b"x")
        async with everything(lab, 0) as watch:
            await receive(watch)
            puts = tuple(Put(b"k%03d" % n, b"v") for n in range(100))
            revision = (await do(lab, *puts, Delete(b"x"))).revision
            message = await receive(watch)
        assert isinstance(message, WatchEvents)
        assert {e.mod_revision for e in message.events} == {revision}
        assert [e.key for e in message.events] == [*(p.key for p in puts), b"x"]
        assert isinstance(message.events[-1], Tombstone)

    async def test_a_deleted_range_is_a_tombstone_for_each_key(self, lab: Lab) -> None:
        for key in (b"d/a", b"d/b", b"e"):
            await put(lab, key)
        async with everything(lab, 0) as watch:
            await receive(watch)
            revision = (await do(lab, Delete(b"d/", range_end(b"d/")))).revision
            message = await receive(watch)
        assert isinstance(message, WatchEvents)
        assert message.events == (Tombstone(b"d/a", revision), Tombstone(b"d/b", revision))

    async def test_a_watch_sees_its_range_only(self, lab: Lab) -> None:
        async with lab.store.watch(b"d/", range_end(b"d/"), 0) as watch:
            await receive(watch)
            for key in (b"d", b"d/a", b"d-", b"d0"):
                await put(lab, key)
            last = await put(lab, b"d/b")
            found = await batches(watch, last)
        assert [e.key for batch in found for e in batch.events] == [b"d/a", b"d/b"]

    async def test_a_large_backlog_comes_whole(self, lab: Lab) -> None:
        value = bytes(1_400_000)
        first = await put(lab, b"big0", value)
        for number in range(1, 4):
            await put(lab, b"big%d" % number, value)
        async with everything(lab, first) as watch:
            await receive(watch)
            found = await batches(watch, first + 3)
        events = [e for batch in found for e in batch.events]
        assert [(e.key, e.mod_revision) for e in events] == [
            (b"big%d" % n, first + n) for n in range(4)
        ]
        assert all(isinstance(e, KeyValue) and e.value == value for e in events)

    async def test_a_long_backlog_comes_whole(self, lab: Lab) -> None:
        """A replay comes 1000 revisions at a time; each batch says how far it goes."""
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(_put_many, lab, 240)
        last = (await lab.store.range(b"n")).revision
        async with everything(lab, last - 1199) as watch:
            await receive(watch)
            found = await batches(watch, last)
        revisions = [e.mod_revision for batch in found for e in batch.events]
        assert revisions == list(range(last - 1199, last + 1))
        assert [b.revision for b in found] == [b.events[-1].mod_revision for b in found]

    async def test_progress_is_told_on_request(self, lab: Lab) -> None:
        async with everything(lab, 0) as watch:
            await receive(watch)
            revision = await put(lab, b"a")
            await batches(watch, revision)
            await watch.request_progress()
            assert await receive(watch) == WatchProgress(revision)
            await watch.request_progress()
            assert isinstance(await receive(watch), WatchProgress)

    async def test_a_watch_of_compacted_history_ends(self, lab: Lab) -> None:
        first = await put(lab, b"a", b"1")
        await put(lab, b"a", b"2")
        last = await put(lab, b"a", b"3")
        await lab.compact(last)
        async with everything(lab, first) as watch:
            with pytest.raises(CompactedError) as caught:
                await last_word(watch)
            assert caught.value.compact_revision == last
            with pytest.raises(CompactedError):
                await receive(watch)

    async def test_a_watch_from_the_compacted_revision_goes_on(self, lab: Lab) -> None:
        await put(lab, b"a", b"1")
        last = await put(lab, b"a", b"2")
        await lab.compact(last)
        async with everything(lab, last) as watch:
            await receive(watch)
            (batch,) = await batches(watch, last)
        assert [e.mod_revision for e in batch.events] == [last]

    async def test_compaction_does_not_disturb_a_watch_that_is_abreast(self, lab: Lab) -> None:
        await put(lab, b"a", b"1")
        async with everything(lab, 0) as watch:
            await receive(watch)
            second = await put(lab, b"a", b"2")
            third = await put(lab, b"a", b"3")
            await lab.compact(third)
            found = await batches(watch, third)
        assert [e.mod_revision for batch in found for e in batch.events] == [second, third]

    async def test_a_cancelled_receiver_loses_nothing(self, lab: Lab) -> None:
        async with everything(lab, 0) as watch:
            await receive(watch)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch.receive)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            revision = await put(lab, b"a")
            (batch,) = await batches(watch, revision)
        assert [e.key for e in batch.events] == [b"a"]

    async def test_watches_do_not_disturb_each_other(self, lab: Lab) -> None:
        async with everything(lab, 0) as first, everything(lab, 0) as second:
            await receive(first)
            await receive(second)
            revision = await put(lab, b"a")
            assert len(await batches(first, revision)) == 1
            async with everything(lab, 0) as third:
                await receive(third)
            assert len(await batches(second, revision)) == 1
            revision = await put(lab, b"a")
            assert len(await batches(first, revision)) == 1


async def _put_many(lab: Lab, count: int) -> None:
    for _ in range(count):
        await put(lab, b"n")


class StoreContract(RangeContract, CommitContract, LeaseContract, WatchContract):
    """The whole contract."""
