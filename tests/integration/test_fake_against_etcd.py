"""Random histories on etcd and on the fake, side by side: every answer must be the same.

The contract says what is known to matter; this looks for what nobody thought of.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdfs.errors import StoreError
from etcdfs.etcd.client import open_store
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Committed,
    Compare,
    Delete,
    Event,
    Get,
    Operation,
    Page,
    Put,
    Store,
    Transaction,
    WatchEvents,
)
from tests.support.etcd_process import EtcdProcess
from tests.support.fake_store import FakeStore

pytestmark = [pytest.mark.etcd, pytest.mark.oldest_and_newest_etcd, pytest.mark.slow]

Answer = Committed | Page | str

KEYS = st.sampled_from([b"a", b"a/", b"a/x", b"b"])
ENDS = st.sampled_from([None, None, b"a0", b"b", b"a", END_OF_KEYS])
COMPARES = st.builds(
    Compare,
    key=KEYS,
    field=st.sampled_from(["create_revision", "mod_revision", "version"]),
    operator=st.sampled_from(["==", "!=", "<", ">"]),
    number=st.integers(0, 3),
    end=ENDS,
)
PUTS = st.builds(Put, KEYS, st.sampled_from([b"", b"1", b"2"]), keep_lease=st.booleans())
GETS = st.builds(Get, KEYS, ENDS, limit=st.integers(0, 2), keys_only=st.booleans())
SIMPLE = st.one_of(PUTS, GETS, st.builds(Delete, KEYS, ENDS))


def transactions(operations: st.SearchStrategy[Operation]) -> st.SearchStrategy[Transaction]:
    some = st.lists(operations, max_size=3).map(tuple)
    return st.builds(Transaction, st.lists(COMPARES, max_size=2).map(tuple), some, some)


def deletes(operation: Operation) -> bool:
    if isinstance(operation, Transaction):
        return any(deletes(inner) for inner in (*operation.then, *operation.otherwise))
    return isinstance(operation, Delete)


def without_kept_leases(operation: Operation) -> Operation:
    if isinstance(operation, Put):
        return replace(operation, keep_lease=False)
    return unleased(operation) if isinstance(operation, Transaction) else operation


def unleased(transaction: Transaction) -> Transaction:
    return Transaction(
        transaction.when,
        tuple(map(without_kept_leases, transaction.then)),
        tuple(map(without_kept_leases, transaction.otherwise)),
    )


def harmless(transaction: Transaction) -> Transaction:
    """Return it without what kills every member of an etcd, 3.5 to 3.7.

    A put that keeps the lease of a key which the same transaction has deleted: "index out of
    range" where the transaction is applied (server/etcdserver/txn/put.go). Nothing in etcdfs
    sends one: the only put that keeps a lease is in a transaction that deletes no such key.
    """
    return unleased(transaction) if deletes(transaction) else transaction


OPERATIONS: st.SearchStrategy[Operation] = st.recursive(SIMPLE, transactions, max_leaves=6)
HISTORIES = st.lists(transactions(OPERATIONS).map(harmless), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def etcd(etcd_binary: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(etcd_binary) as process:
        yield process


@settings(max_examples=50)  # each is a dozen round trips
@given(histories=st.lists(HISTORIES, min_size=1, max_size=3))
def test_the_fake_answers_as_etcd_does(
    etcd: EtcdProcess, histories: list[list[Transaction]]
) -> None:
    trio.run(_compare, etcd, histories)


async def _compare(etcd: EtcdProcess, histories: list[list[Transaction]]) -> None:
    with trio.fail_after(30):
        async with open_store([etcd.endpoint], timeout_s=20) as real:
            for history in histories:
                wiped = await real.commit(Transaction(then=(Delete(b"", END_OF_KEYS),)))
                first = wiped.revision
                fake = FakeStore(revision=first)
                for relative in history:
                    transaction = _shifted(relative, first)
                    assert await _commit(fake, transaction) == await _commit(real, transaction)
                last = fake.revision
                for revision in range(first, last + 2):
                    assert await _range(fake, revision) == await _range(real, revision)
                if last > first:
                    expected = await _watch(fake, first + 1, last)
                    assert await _watch(real, first + 1, last) == expected


def _shifted(transaction: Transaction, first: int) -> Transaction:
    """Return it with revisions compared to the recent ones (0 stays: it means absent)."""
    return Transaction(
        when=tuple(_shifted_compare(compare, first) for compare in transaction.when),
        then=tuple(_shifted_operation(o, first) for o in transaction.then),
        otherwise=tuple(_shifted_operation(o, first) for o in transaction.otherwise),
    )


def _shifted_operation(operation: Operation, first: int) -> Operation:
    return _shifted(operation, first) if isinstance(operation, Transaction) else operation


def _shifted_compare(compare: Compare, first: int) -> Compare:
    if compare.field == "version" or not compare.number:
        return compare
    return Compare(
        compare.key, compare.field, compare.operator, compare.number + first, compare.end
    )


async def _commit(store: Store, transaction: Transaction) -> Answer:
    try:
        return await store.commit(transaction)
    except StoreError as exc:
        return _what(exc)


async def _range(store: Store, revision: int) -> Answer:
    try:
        return await store.range(b"", END_OF_KEYS, revision=revision)
    except StoreError as exc:
        return _what(exc)


def _what(error: StoreError) -> str:
    """Return the error's class and etcd's text, without the endpoint."""
    return f"{type(error).__name__}: {str(error).partition('etcdserver: ')[2]}"


async def _watch(store: Store, first: int, last: int) -> list[Event]:
    events: list[Event] = []
    async with store.watch(b"", END_OF_KEYS, first) as watch:
        while not events or events[-1].mod_revision < last:
            message = await watch.receive()
            if isinstance(message, WatchEvents):
                events += message.events
    return events
