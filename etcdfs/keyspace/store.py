"""The port to etcd: what the filesystem asks of a store, in etcd's own terms.

Knows: revisions, keys, transactions and watches as etcd v3 defines them
(https://etcd.io/docs/v3.5/learning/api/). Does not know: gRPC, sockets, time.

Keys and values are `bytes`, revisions are etcd's cluster-wide 64-bit counter. A range is
`[start, end)`; `end=None` means the single key `start`, `end=END_OF_KEYS` means everything from
`start` on.

Concurrency: declarations only. The one real implementation is the etcd door; the fake one of
the tests passes the same contract.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, NewType, Protocol, overload

Revision = NewType("Revision", int)

END_OF_KEYS = b"\0"
"""As a range's end: all keys from its start on (etcd API, RangeRequest.range_end)."""


# A tuple and not a frozen dataclass: one is made per key while the keyspace is loaded, in 0.6 of
# the time.
class KeyValue(NamedTuple):
    """One key at one revision (etcd's mvccpb.KeyValue)."""

    key: bytes
    value: bytes
    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Tombstone:
    """The deletion of a key."""

    key: bytes
    mod_revision: Revision


Event = KeyValue | Tombstone


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a range, in key order.

    Attributes:
        entries: The keys; their values are empty when only keys were asked for.
        revision: The revision of the store at which the range was read.
        more: Whether the limit cut it short.
        remaining: The keys that were cut off, if the store counts them.
    """

    entries: tuple[KeyValue, ...]
    revision: Revision
    more: bool
    remaining: int | None = None


# --- transactions ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Get:
    """Read a range inside a transaction."""

    key: bytes
    end: bytes | None = None
    limit: int = 0
    keys_only: bool = False


@dataclass(frozen=True, slots=True)
class Put:
    """Set a key; keeps its lease when `keep_lease` (the key must exist then, and have `lease`)."""

    key: bytes
    value: bytes
    lease: int = 0
    keep_lease: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key or a range."""

    key: bytes
    end: bytes | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Refuse the whole transaction, nothing of it done, if this is in a branch that is to run.

    In the `otherwise` of inner transactions it joins their conditions to those of the outer one,
    which is how a transaction can have any number of them. `key` is any key that may be read.
    """

    key: bytes


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on a key, or on every key of a range (an empty range compares as 0)."""

    key: bytes
    field: Literal["create_revision", "mod_revision", "version"]
    operator: Literal["==", "!=", "<", ">"]
    number: int
    end: bytes | None = None


def absent(key: bytes, end: bytes | None = None) -> Compare:
    """Return the condition that `key` (or every key of the range) does not exist."""
    return Compare(key, "create_revision", "==", 0, end)


def exists(key: bytes) -> Compare:
    """Return the condition that `key` exists."""
    return Compare(key, "create_revision", ">", 0)


def unchanged(key: bytes, mod_revision: int) -> Compare:
    """Return the condition that `key` was last written at `mod_revision` (0: is absent)."""
    return Compare(key, "mod_revision", "==", mod_revision)


@dataclass(frozen=True, slots=True)
class Transaction:
    """Carry out `then` if all of `when` hold, else `otherwise`; atomic, one revision.

    A transaction may stand inside another; all conditions, inner ones too, are judged on the
    state before the whole transaction (etcd: server/etcdserver/apply.go, compareToPath).

    Of those that `claims`, one of many that ask for the same may succeed; etcd is not told.
    """

    when: tuple[Compare, ...] = ()
    then: tuple["Operation", ...] = ()
    otherwise: tuple["Operation", ...] = ()
    claims: bool = False

    @property
    def only_reads(self) -> bool:
        """Whether it changes nothing whatever happens, so that it may be sent again."""
        return all(
            isinstance(operation, Get)
            or (isinstance(operation, Transaction) and operation.only_reads)
            for operation in (*self.then, *self.otherwise)
        )


Operation = Get | Put | Delete | Abort | Transaction


@dataclass(frozen=True, slots=True)
class Committed:
    """What a transaction did.

    Attributes:
        succeeded: Whether `then` ran (else `otherwise`).
        revision: The store's revision after it.
        results: One per operation that ran: a `Page` for `Get`, the number of deleted keys
            for `Delete`, None for `Put`, a `Committed` for an inner transaction.
        of: The transaction that it is the answer to.
    """

    succeeded: bool
    revision: Revision
    results: tuple["Page | Committed | int | None", ...]
    of: Transaction = field(default=Transaction(), compare=False, repr=False)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations that ran."""
        return self.of.then if self.succeeded else self.of.otherwise

    @property
    def entries(self) -> list[KeyValue]:
        """All that was read, in the order of the operations."""
        pages = (result for result in self.results if isinstance(result, Page))
        return [entry for page in pages for entry in page.entries]

    @overload
    def __getitem__(self, operation: Get) -> Page: ...
    @overload
    def __getitem__(self, operation: Delete) -> int: ...
    @overload
    def __getitem__(self, operation: Transaction) -> "Committed": ...
    def __getitem__(self, operation: Operation) -> "Page | Committed | int | None":
        """Return the result of an operation that ran."""
        result = self.results[self.operations.index(operation)]
        if isinstance(operation, Transaction):
            assert isinstance(result, Committed)
            return replace(result, of=operation)
        return result


# --- watching -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WatchOpened:
    """The watch stands. `revision` is the store's revision at that moment."""

    revision: Revision


@dataclass(frozen=True, slots=True)
class WatchEvents:
    """All events of one or more whole revisions, oldest first; never part of a revision.

    `revision` is that of the last event. The header that etcd sends along may be far ahead while
    a watch catches up (seen: header 2501 with events up to 1002).
    """

    events: tuple[Event, ...]
    revision: Revision


@dataclass(frozen=True, slots=True)
class WatchProgress:
    """Everything up to `revision` has been delivered (etcd's progress notice)."""

    revision: Revision


WatchMessage = WatchOpened | WatchEvents | WatchProgress


class Watch(Protocol):
    """A standing recursive watch."""

    async def receive(self) -> WatchMessage:
        """Wait for the next message.

        Raises:
            CompactedError: The start revision is gone from history; list again.
            StorePermissionError: The watch was refused.
            WatchLostError: Any other end of the stream; resume.
        """
        ...

    async def request_progress(self) -> None:
        """Ask etcd to say how far this watch is; the answer comes as `WatchProgress`."""
        ...


# --- the port -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What the member in use says of itself. Sizes in bytes.

    Attributes:
        version: Its release.
        database_size: Of the file of its database.
        revision: The newest it has.
        cluster: Which cluster it is of.
        problems: Alarms and errors that it reports.
    """

    version: str
    database_size: int
    revision: Revision
    cluster: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """How often the store was asked, since the start, and who is.

    Attributes:
        ranges: Reads of ranges.
        transactions: Transactions.
        watches: Watches that were opened.
        endpoints: The members, in order of preference.
        endpoint: The one in use.
        moves: Times that another was taken into use.
        revision: The newest revision that etcd has answered with; 0: none yet.
    """

    ranges: int
    transactions: int
    watches: int
    endpoints: tuple[str, ...] = ()
    endpoint: str = ""
    moves: int = 0
    revision: int = 0


class Store(Protocol):
    """A linearizable key-value store with history and watches: etcd v3.

    Every call is bounded by the store's own timeout, and may be refused (`BusyError`) if a request
    of the kernel's makes it and too many wait already. Reads raise `StoreUnavailableError` or
    `StoreTimeoutError` when etcd cannot be asked; they are safe to repeat. All raise
    `StorePermissionError` when roles forbid it.
    """

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
        """Read a range, linearizable; at `revision` if that is not 0.

        Args:
            start: The first key.
            end: The end of the range; None for the one key.
            limit: The most keys to return; 0: all.
            revision: See above.
            keys_only: Whether values are left out.
            newest: Whether to return the key alone that was changed last, and count the others;
                etcd looks at all of the range for it.

        Raises:
            CompactedError: `revision` is no longer in history.
            FutureRevisionError: `revision` is not yet in history.
            StoreProtocolError: The answer is none to this question (`transaction_results`).
        """
        ...

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction, at most once unless it only reads.

        Raises:
            StoreTimeoutError: No answer came, and it only reads.
            OutcomeUnknownError: No answer came, and the request may have reached etcd.
            StoreUnavailableError: The request did not reach etcd.
            StoreFullError: The quota is used up.
            StoreValueTooLargeError: The request is too large.
            TooManyOperationsError: The transaction has too many operations.
            TransactionAbortedError: An `Abort` was to run.
            StoreProtocolError: It only reads, and the answer is none to this question.
        """
        ...

    def watch(
        self, start: bytes, end: bytes, from_revision: int
    ) -> AbstractAsyncContextManager[Watch]:
        """Watch a range from `from_revision` on (its own events included); 0: from the next.

        The first message is `WatchOpened`. Leaving the context ends the watch.
        """
        ...

    async def ready(self) -> None:
        """Return if etcd can be expected to carry out a write: it has just answered, or does now.

        Raises:
            StoreUnavailableError: It does not, or no majority does.
            StorePermissionError: It does not let us in.
        """
        ...

    async def lease_grant(self, ttl_s: int, lease: int = 0) -> int:
        """Make a lease that ends by itself; return its number, which etcd chooses if it is 0.

        If no answer comes, a lease may be left that nobody uses; it ends.

        Raises:
            LeaseExistsError: There is one of that number.
        """
        ...

    async def lease_time_to_live(self, lease: int) -> int | None:
        """Return the seconds a lease has left, rounded down; None if it has ended."""
        ...

    async def lease_revoke(self, lease: int) -> None:
        """End a lease now, and delete the keys it holds; nothing if it has ended."""
        ...

    async def lease_has_keys(self, lease: int) -> bool:
        """Tell whether a lease holds any key."""
        ...

    async def status(self) -> StoreStatus:
        """Ask the member in use for its version and size."""
        ...

    def statistics(self) -> StoreStatistics:
        """Count the requests so far."""
        ...


def range_end(prefix: bytes) -> bytes:
    """Return the end of the range of all keys that begin with `prefix`.

    The empty prefix, and one of 0xff bytes only, reach to the end of the keyspace.
    """
    stem = prefix.rstrip(b"\xff")
    if not stem:
        return END_OF_KEYS
    return stem[:-1] + bytes((stem[-1] + 1,))


Clock = Callable[[], int]
"""Nanoseconds since the epoch; injected, so that the core has no clock of its own."""
