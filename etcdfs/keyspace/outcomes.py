"""Writes whose answer was lost, resolved by reading back what became of them.

Knows: which traces of a transaction prove that it was carried out. Does not know: what the
transaction is for.

A name that was to go and is gone, or that has moved with its value, is as the caller wanted it,
whoever did it: that is success. A name that was claimed (its absence was a condition) and is
there may have been claimed by somebody else, and etcd's keys bear no names of their writers: that
stays unknown, so that of two who claim a name (or an attribute, XATTR_CREATE) never both succeed.
What has left no trace may still be carried out, and stays unknown, too. Nothing is sent again.

Write-back resolves the puts of files by itself: it knows what it has sent before.

Concurrency: as the store's.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeGuard, assert_never, final

from etcdfs.errors import OutcomeUnknownError, StoreError
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
    StoreStatistics,
    StoreStatus,
    Transaction,
    Watch,
)


@final
class ResolvingStore:
    """A store that looks after its writes. Otherwise the store that it is given."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction, at most once; see the port.

        Raises:
            OutcomeUnknownError: No answer came, and etcd does not show what became of it.
        """
        try:
            return await self._store.commit(transaction)
        except OutcomeUnknownError as unknown:
            try:
                found = await self._store.commit(Transaction((), tuple(_questions(transaction))))
            except StoreError:
                raise unknown from unknown.__cause__
            resolved = _resolve(transaction, found)
            if resolved is None:
                raise
            return resolved

    async def range(
        self,
        start: bytes,
        end: bytes | None = None,
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        newest: bool = False,
    ) -> Page:
        """See the port."""
        return await self._store.range(
            start, end, limit=limit, revision=revision, keys_only=keys_only, newest=newest
        )

    def watch(
        self, start: bytes, end: bytes, from_revision: int
    ) -> AbstractAsyncContextManager[Watch]:
        """See the port."""
        return self._store.watch(start, end, from_revision)

    async def ready(self) -> None:
        """See the port."""
        await self._store.ready()

    async def lease_grant(self, ttl_s: int, lease: int = 0) -> int:
        """See the port."""
        return await self._store.lease_grant(ttl_s, lease)

    async def lease_time_to_live(self, lease: int) -> int | None:
        """See the port."""
        return await self._store.lease_time_to_live(lease)

    async def lease_has_keys(self, lease: int) -> bool:
        """See the port."""
        return await self._store.lease_has_keys(lease)

    async def lease_revoke(self, lease: int) -> None:
        """See the port."""
        await self._store.lease_revoke(lease)

    async def status(self) -> StoreStatus:
        """See the port."""
        return await self._store.status()

    def statistics(self) -> StoreStatistics:
        """See the port."""
        return self._store.statistics()


def _questions(transaction: Transaction) -> Iterator[Get]:
    """Yield what shows whether each operation was carried out, one for each that is not inner."""
    for operation in transaction.then:
        if isinstance(operation, Transaction):
            yield from _questions(operation)
        elif not isinstance(operation, Abort):
            yield _question(operation)


def _question(operation: Get | Put | Delete) -> Get:
    match operation:
        case Put(key):
            return Get(key)
        case Delete(key, end):
            return Get(key, end, limit=1, keys_only=True)
        case Get():
            return operation


def _resolve(transaction: Transaction, found: Committed) -> Committed | None:
    """Return what etcd would have answered; None if it cannot be told."""
    traces = [_trace(operation, found, transaction.when) for operation in transaction.then]
    puts = [operation for operation in transaction.then if isinstance(operation, Put)]
    deletes = [operation for operation in transaction.then if isinstance(operation, Delete)]
    claims = transaction.claims or any(
        _wants_absent(c, put.key) for c in transaction.when for put in puts
    )
    if None in traces or not (puts or deletes) or (claims and not deletes):
        return None
    written = {
        revision for trace in traces if trace is not None for revision in (trace[0],) if revision
    }
    if len(written) > 1:
        return None  # one transaction has one revision
    revision = Revision(max(written, default=found.revision))
    results = tuple(trace[1] for trace in traces if trace is not None)
    return Committed(True, revision, results, transaction)


def _wants_absent(compare: Compare, key: bytes) -> bool:
    """Say whether a condition is that a key does not exist."""
    if (compare.field, compare.operator, compare.number) != ("create_revision", "==", 0):
        return False
    if compare.end is None:
        return compare.key == key
    return compare.key <= key and (key < compare.end or compare.end == END_OF_KEYS)


_Result = Page | Committed | int | None
_Trace = tuple[int, _Result]
"""The revision at which an operation wrote, 0 if that cannot be seen, and its result."""


def _trace(operation: Operation, found: Committed, when: Sequence[Compare]) -> _Trace | None:
    """Return the trace of an operation; None if there is none, or another one."""
    match operation:
        case Put():
            entry = _entry(found, operation)
            return (entry.mod_revision, None) if _is_of(entry, operation, when) else None
        case Delete():
            return (0, 1) if _entry(found, operation) is None else None
        case Get():
            return 0, found[operation]
        case Abort():
            return None
        case Transaction():
            # With conditions of its own it may have had nothing to do, unless they are those of
            # the whole (`Abort`). What it did is known by its revision, if at all.
            inner = [_trace(part, found, operation.when) for part in operation.then]
            done = tuple(trace[1] for trace in inner if trace is not None)
            ran = len(done) == len(inner)
            if ran or (operation.when and not operation.otherwise):
                return 0, Committed(ran, found.revision, done if ran else ())
            return None
        case _:
            assert_never(operation)


def _is_of(entry: KeyValue | None, put: Put, when: Sequence[Compare]) -> TypeGuard[KeyValue]:
    """Tell whether an entry can be what a put has made of its key, and not what was there before.

    What was there before may look just the same: a file is put again as it is to be given a
    lease. But it is still the version that the conditions ask for.
    """
    if entry is None or (entry.key, entry.value) != (put.key, put.value):
        return False
    if not put.keep_lease and entry.lease != put.lease:
        return False
    return not any(_names_version(compare, entry) for compare in when)


def _names_version(compare: Compare, entry: KeyValue) -> bool:
    if (compare.key, compare.end, compare.field) != (entry.key, None, "mod_revision"):
        return False
    if compare.operator == "==":
        return entry.mod_revision == compare.number
    return compare.operator == "<" and entry.mod_revision < compare.number


def _entry(found: Committed, operation: Put | Delete) -> KeyValue | None:
    return next(iter(found[_question(operation)].entries), None)
