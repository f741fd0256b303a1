"""etcd's transactions in memory: what is refused, what runs, and what each operation sees.

Knows: etcd's rules for transactions (v3rpc/key.go, apply.go). Does not know: history and watches;
those are `fake_store`'s.

Concurrency: none; the state is read, never changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, assert_never, final

from etcdfs.errors import (
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
    Event,
    Get,
    KeyValue,
    Operation,
    Page,
    Put,
    Revision,
    Tombstone,
    Transaction,
)

MAX_OPERATIONS = 128
MAX_REQUEST_BYTES = 1536 * 1024
_OPERATION_OVERHEAD = 16
"""Bytes that protobuf adds to a key and a value, roughly: do not test the exact border."""


class State(Protocol):
    """What a transaction reads."""

    leases: set[int]

    @property
    def revision(self) -> Revision:
        """The store's revision."""
        ...

    def current(self, key: bytes) -> KeyValue | None:
        """Return a key as it is now."""
        ...

    def keys_between(self, start: bytes, end: bytes | None) -> Sequence[bytes]:
        """Return every key of a range that ever was, in order."""
        ...


def carry_out(state: State, transaction: Transaction) -> tuple[Committed, tuple[Event, ...]]:
    """Return the answer and the events of a transaction; raises what etcd refuses it with."""
    _check_operations(transaction, MAX_OPERATIONS)
    _check_duplicates(transaction.then)
    _check_duplicates(transaction.otherwise)
    if _size(transaction) > MAX_REQUEST_BYTES:
        raise StoreValueTooLargeError("etcdserver: request is too large")
    run = _Run(state, Revision(state.revision + 1))
    plan = run.judge(transaction)
    run.check_puts(plan)
    results = run.carry_out(plan)
    revision = Revision(state.revision + 1) if run.events else state.revision
    committed = replace(_answer(plan, results, revision), of=transaction)
    return committed, tuple(run.events)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A transaction whose conditions have been judged: the operations that run."""

    succeeded: bool
    steps: tuple["Get | Put | Delete | Abort | _Plan", ...]


@final
class _Run:
    """One transaction at work; the store is not changed by it."""

    def __init__(self, store: State, revision: Revision) -> None:
        self._store = store
        self._revision = revision
        self._changed: dict[bytes, KeyValue | None] = {}
        self.events: list[Event] = []

    def judge(self, transaction: Transaction) -> _Plan:
        """Judge every condition on the state before, inner ones too."""
        succeeded = all(self._holds(compare) for compare in transaction.when)
        operations = transaction.then if succeeded else transaction.otherwise
        return _Plan(
            succeeded,
            tuple(self.judge(o) if isinstance(o, Transaction) else o for o in operations),
        )

    def check_puts(self, plan: _Plan) -> None:
        """Refuse what etcd refuses only for operations that run."""
        for step in plan.steps:
            if isinstance(step, _Plan):
                self.check_puts(step)
            elif isinstance(step, Abort):
                raise TransactionAbortedError("required revision is a future revision")
            elif isinstance(step, Put):
                if step.keep_lease and self._store.current(step.key) is None:
                    raise StoreError("etcdserver: key not found")
                if step.lease and step.lease not in self._store.leases:
                    raise StoreError("etcdserver: requested lease not found")

    def carry_out(self, plan: _Plan) -> tuple[object, ...]:
        """Run the operations in order; each sees what the ones before it did."""
        return tuple(self._step(step) for step in plan.steps)

    def _step(self, step: "Get | Put | Delete | Abort | _Plan") -> object:
        match step:
            case Get():
                return page(
                    self._range(step.key, step.end), self._revision, step.limit, step.keys_only
                )
            case Put():
                self._put(step)
                return None
            case Delete():
                return self._delete(step)
            case _Plan():
                return self.carry_out(step)
            case Abort():
                raise AssertionError("refused before anything was carried out")
            case _:
                assert_never(step)

    def _holds(self, compare: Compare) -> bool:
        found = self._range(compare.key, compare.end)
        numbers = [int(getattr(kv, compare.field)) for kv in found] or [0]
        match compare.operator:
            case "==":
                return all(number == compare.number for number in numbers)
            case "!=":
                return all(number != compare.number for number in numbers)
            case "<":
                return all(number < compare.number for number in numbers)
            case ">":
                return all(number > compare.number for number in numbers)
            case _:
                assert_never(compare.operator)

    def _get(self, key: bytes) -> KeyValue | None:
        return self._changed[key] if key in self._changed else self._store.current(key)

    def _range(self, start: bytes, end: bytes | None) -> list[KeyValue]:
        keys = set(self._store.keys_between(start, end))
        keys.update(k for k in self._changed if within(k, start, end))
        return [kv for key in sorted(keys) if (kv := self._get(key)) is not None]

    def _put(self, put: Put) -> None:
        old = self._get(put.key)
        new = KeyValue(
            put.key,
            put.value,
            old.create_revision if old else self._revision,
            self._revision,
            old.version + 1 if old else 1,
            old.lease if old and put.keep_lease else put.lease,
        )
        self._changed[put.key] = new
        self.events.append(new)

    def _delete(self, delete: Delete) -> int:
        doomed = self._range(delete.key, delete.end)
        for kv in doomed:
            self._changed[kv.key] = None
            self.events.append(Tombstone(kv.key, self._revision))
        return len(doomed)


def _answer(plan: _Plan, results: Sequence[object], revision: Revision) -> Committed:
    """Return the transaction's answer, with the store's revision after it throughout."""
    return Committed(
        plan.succeeded,
        revision,
        tuple(
            _result(step, result, revision)
            for step, result in zip(plan.steps, results, strict=True)
        ),
    )


def _result(
    step: "Get | Put | Delete | Abort | _Plan", result: object, revision: Revision
) -> Page | Committed | int | None:
    if isinstance(step, _Plan):
        assert isinstance(result, tuple)
        return _answer(step, result, revision)
    if isinstance(result, Page):
        return replace(result, revision=revision)
    assert result is None or isinstance(result, int)
    return result


def page(found: list[KeyValue], revision: Revision, limit: int, keys_only: bool) -> Page:
    more = 0 < limit < len(found)
    entries = found[:limit] if more else found
    if keys_only:
        entries = [_without_value(kv) for kv in entries]
    return Page(tuple(entries), revision, more, len(found) - limit if more else None)


def _without_value(kv: KeyValue) -> KeyValue:
    return KeyValue(kv.key, b"", kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def within(key: bytes, start: bytes, end: bytes | None) -> bool:
    if end is None:
        return key == start
    return key >= start and (end == END_OF_KEYS or key < end)


def _size(transaction: Transaction) -> int:
    size = sum(len(compare.key) + _OPERATION_OVERHEAD for compare in transaction.when)
    for operation in (*transaction.then, *transaction.otherwise):
        size += _OPERATION_OVERHEAD
        if isinstance(operation, Transaction):
            size += _size(operation)
        else:
            size += len(operation.key)
            size += len(operation.value) if isinstance(operation, Put) else 0
    return size


def _check_operations(transaction: Transaction, allowed: int) -> None:
    """Refuse too many operations, and empty keys (etcd: v3rpc/key.go, checkTxnRequest).

    What a level uses is taken off what the levels inside it may use.
    """
    used = max(len(transaction.when), len(transaction.then), len(transaction.otherwise))
    if used > allowed:
        raise TooManyOperationsError("etcdserver: too many operations in txn request")
    for compare in transaction.when:
        check_key(compare.key, compare.end)
    for operation in (*transaction.then, *transaction.otherwise):
        if isinstance(operation, Transaction):
            _check_operations(operation, allowed - used)
        elif isinstance(operation, Put | Abort):
            check_key(operation.key, None)
        else:
            check_key(operation.key, operation.end)


def check_key(key: bytes, end: bytes | None) -> None:
    if not key and end is None:
        raise StoreError("etcdserver: key is not provided")


def _check_duplicates(operations: Sequence[Operation]) -> tuple[set[bytes], list[Delete]]:
    """Refuse keys that are changed twice (etcd: v3rpc/key.go, checkIntervals).

    Returns:
        The keys that are put and the ranges that are deleted, inner transactions included.
    """
    deletes = [operation for operation in operations if isinstance(operation, Delete)]
    puts: set[bytes] = set()
    for operation in operations:
        if isinstance(operation, Transaction):
            then_puts, then_deletes = _check_duplicates(operation.then)
            else_puts, else_deletes = _check_duplicates(operation.otherwise)
            _refuse_duplicates(then_puts, puts, deletes)
            # Only one of the two branches runs, so they may put the same key.
            _refuse_duplicates(else_puts, puts - then_puts, deletes)
            puts |= then_puts | else_puts
            deletes += then_deletes + else_deletes
    for operation in operations:
        if isinstance(operation, Put):
            _refuse_duplicates({operation.key}, puts, deletes)
            puts.add(operation.key)
    return puts, deletes


def _refuse_duplicates(keys: set[bytes], puts: set[bytes], deletes: Sequence[Delete]) -> None:
    for key in keys:
        if key in puts or any(_collides(key, delete) for delete in deletes):
            raise StoreError("etcdserver: duplicate key given in txn request")


def _collides(key: bytes, delete: Delete) -> bool:
    """Tell whether etcd sees that a delete covers a key.

    It does not see it when the range is open-ended: its interval tree takes END_OF_KEYS for a
    key. Such a put and delete are then carried out in order.
    """
    if delete.end is None:
        return key == delete.key
    return delete.key <= key < delete.end
