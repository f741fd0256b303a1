"""What an answer of etcd's says, and whether it can be one to what was asked.

Knows: how a transaction's operations and their results become the events that the watch will tell,
and what etcd guarantees of a range, of a transaction's results and of events, as far as one answer
shows it. Does not know: what is done about an answer that cannot be (`etcdfs.etcd` refuses it),
gRPC's messages, what the keys are for.

Whatever comes after this relies on it: keys are in the range that was asked for and in order, each
page leads on, no revision is from the future. What only several answers show is for the state
machine to judge.

Concurrency: none; pure functions.
"""

from collections.abc import Sequence
from operator import attrgetter, ge, gt
from typing import Final

from etcdfs.keyspace.store import (
    END_OF_KEYS,
    Abort,
    Committed,
    Delete,
    Event,
    Get,
    KeyValue,
    Operation,
    Page,
    Put,
    Tombstone,
    Transaction,
)


def events_of(committed: Committed) -> tuple[Event, ...]:
    """Return all that a transaction did, as events.

    Each `Put` in it is read back (`transactions.put_and_read`), each `Delete` is of one key.
    """
    found: list[Event] = []
    for operation in committed.operations:
        if isinstance(operation, Put):
            (put,) = committed[Get(operation.key, keys_only=True)].entries
            # Of keys only, etcd 3.7 does not say the lease.
            found.append(put._replace(value=operation.value, lease=operation.lease))
        elif isinstance(operation, Delete) and committed[operation]:
            found.append(Tombstone(operation.key, committed.revision))
        elif isinstance(operation, Transaction):
            found.extend(events_of(committed[operation]))
    return tuple(found)


REVISION_MAX: Final = 2**62
"""A revision beyond any that an etcd reaches; the one after it is still a number for etcd."""

_KEY: Final = attrgetter("key")
_CREATED: Final = attrgetter("create_revision")
_MODIFIED: Final = attrgetter("mod_revision")
_VERSION: Final = attrgetter("version")


def fault_in_page(page: Page, get: Get, revision: int = 0) -> str | None:
    """Return why a page cannot be the answer to `get` at `revision` (0: the newest), if so.

    Nothing here is done key by key in Python: a start waits for it.
    """
    entries = page.entries
    if not max(revision, 1) <= page.revision <= REVISION_MAX:
        return f"a range at revision {revision} was answered at {page.revision}"
    if page.more and not (entries and get.limit):
        return "there is more of a range than was sent, for no reason"
    if page.more and page.remaining is not None and page.remaining < 1:
        return "there is more of a range, and it counts no key"
    if not entries:
        return None
    if get.limit and len(entries) > get.limit:
        return f"{len(entries)} keys came where {get.limit} were asked for"
    return _fault_in_keys(get, list(map(_KEY, entries))) or _fault_in_revisions(
        entries, revision or page.revision
    )


def _fault_in_keys(get: Get, keys: list[bytes]) -> str | None:
    if get.end is None:
        return None if keys == [get.key] else f"{keys[0]!r} came for {get.key!r}"
    if any(map(ge, keys, keys[1:])):
        return "the keys of a range are out of order"
    for key in (keys[0], keys[-1]):
        if not is_in(key, get.key, get.end):
            return f"{key!r} is outside of the range {get.key!r} to {get.end!r}"
    return None


def _fault_in_revisions(entries: Sequence[KeyValue], newest: int) -> str | None:
    created = list(map(_CREATED, entries))
    modified = list(map(_MODIFIED, entries))
    if max(modified) > newest:
        return f"a key of revision {max(modified)} was seen at {newest}"
    if min(created) < 1 or any(map(gt, created, modified)) or min(map(_VERSION, entries)) < 1:
        return f"the revisions of {entries[0].key!r} or a key after it make no sense"
    return None


def fault_in_results(committed: Committed, transaction: Transaction) -> str | None:
    """Return why results cannot be those of a transaction, if so; inner ones included."""
    if not 0 < committed.revision <= REVISION_MAX:
        return f"it was carried out in revision {committed.revision}"
    if not committed.succeeded and not transaction.when:
        return "a condition failed where there is none"
    operations = transaction.then if committed.succeeded else transaction.otherwise
    if len(operations) != len(committed.results):
        return f"{len(committed.results)} results came for {len(operations)} operations"
    found = (
        _fault_in_result(operation, result)
        for operation, result in zip(operations, committed.results, strict=True)
    )
    return next((fault for fault in found if fault is not None), None)


def _fault_in_result(operation: Operation, result: object) -> str | None:
    match operation, result:
        case Get(), Page():
            return fault_in_page(result, operation)
        case Transaction(), Committed():
            return fault_in_results(result, operation)
        case (Put(), None) | (Delete(), int()):
            return None
        case (Abort(), _):
            return "it went past where it was to be given up"
        case _:
            return f"a {type(operation).__name__} came back as {type(result).__name__}"


def fault_in_events(events: Sequence[Event], start: bytes, end: bytes, newest: int) -> str | None:
    """Return why events cannot be those of a range in a store at revision `newest`, if so."""
    for event in events:
        if not is_in(event.key, start, end):
            return f"an event of {event.key!r}, which is not watched"
        if not 0 < event.mod_revision <= min(newest, REVISION_MAX):
            return f"an event of revision {event.mod_revision} in a store at {newest}"
        if isinstance(event, KeyValue) and (
            not 0 < event.create_revision <= event.mod_revision or event.version < 1
        ):
            return f"the revisions of {event.key!r} make no sense"
    return None


def is_in(key: bytes, start: bytes, end: bytes) -> bool:
    """Tell whether a key is in a range; there is no empty key."""
    return key != b"" and start <= key and (end == END_OF_KEYS or key < end)
