"""What a transaction's answer says, as the events that the watch will tell of it.

What this room knows: the shape of the answers to `transactions`: each `Put` is followed by a
`Get` of the same key, which tells its revisions; an inner transaction comes last. What it must
not know: what the events are for.

Concurrency: none; pure functions.
"""

from collections.abc import Sequence

from etcdfs.errors import StoreProtocolError
from etcdfs.store import (
    Committed,
    Delete,
    Event,
    KeyValue,
    Operation,
    Page,
    Put,
    Tombstone,
    Transaction,
)
from etcdfs.transactions import parent_prefix


def page_of(result: object) -> Page:
    """Return the answer to a `Get`.

    Raises:
        StoreProtocolError: It is something else.
    """
    if not isinstance(result, Page):
        msg = f"a range was asked for and {type(result).__name__} came back"
        raise StoreProtocolError(msg)
    return result


def put_event(committed: Committed, index: int, key: bytes, value: bytes) -> KeyValue:
    """Return the event of a put whose `Get` is the result `index`."""
    (found,) = page_of(committed.results[index]).entries
    return KeyValue(
        key, value, found.create_revision, found.mod_revision, found.version, found.lease
    )


def parent_event(committed: Committed, key: bytes, root: bytes) -> tuple[Event, ...]:
    """Return the event of the marker that an inner transaction put, if it did."""
    inner = committed.results[-1]
    parent = parent_prefix(key, root)
    if not isinstance(inner, Committed) or not inner.succeeded or parent is None:
        return ()
    return (put_event(inner, 1, parent, b""),)


def events_of(transaction: Transaction, committed: Committed) -> tuple[Event, ...]:
    """Return all that a transaction did, as events.

    Each `Put` in it is followed by a `Get` of its key, each `Delete` is of one key.
    """
    ran = transaction.then if committed.succeeded else transaction.otherwise
    return events_of_operations(ran, committed.results, committed)


def events_of_operations(
    operations: Sequence[Operation], results: Sequence[object], committed: Committed
) -> tuple[Event, ...]:
    """Return what some operations of a transaction did; `results` are theirs."""
    found: list[Event] = []
    for index, (operation, result) in enumerate(zip(operations, results, strict=True)):
        if isinstance(operation, Put):
            (put,) = page_of(results[index + 1]).entries
            # Of keys only, etcd 3.7 does not say the lease.
            found.append(put._replace(value=operation.value, lease=operation.lease))
        elif isinstance(operation, Delete) and result:
            found.append(Tombstone(operation.key, committed.revision))
        elif isinstance(operation, Transaction) and isinstance(result, Committed):
            found.extend(events_of(operation, result))
    return tuple(found)
