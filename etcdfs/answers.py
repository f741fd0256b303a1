"""What a transaction's answer says, as the events that the watch will tell of it.

What this room knows: the shape of the answers to `transactions`: each `Put` is followed by a
`Get` of the same key, which tells its revisions; an inner transaction comes last. What it must
not know: what the events are for.

Concurrency: none; pure functions.
"""

from etcdfs.errors import StoreProtocolError
from etcdfs.store import Committed, Event, KeyValue, Page, Tombstone
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


def inner_of(committed: Committed) -> Committed:
    """Return the answer to an inner transaction that was the only operation.

    Raises:
        StoreProtocolError: It is something else.
    """
    inner = committed.results[0]
    if not isinstance(inner, Committed):
        msg = "an inner transaction came back as something else"
        raise StoreProtocolError(msg)
    return inner


def put_event(committed: Committed, index: int, key: bytes, value: bytes) -> KeyValue:
    """Return the event of a put whose `Get` is the result `index`."""
    (found,) = page_of(committed.results[index]).entries
    return KeyValue(
        key, value, found.create_revision, found.mod_revision, found.version, found.lease
    )


def tombstone(committed: Committed, key: bytes) -> Tombstone:
    """Return the event of a deletion."""
    return Tombstone(key, committed.revision)


def parent_event(committed: Committed, key: bytes, root: bytes) -> tuple[Event, ...]:
    """Return the event of the marker that an inner transaction put, if it did."""
    inner = committed.results[-1]
    parent = parent_prefix(key, root)
    if not isinstance(inner, Committed) or not inner.succeeded or parent is None:
        return ()
    return (put_event(inner, 1, parent, b""),)
