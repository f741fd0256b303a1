"""What a mirror holds, compared slice by slice with what etcd lists.

Knows: how all keys that are held are gone through while they change, when what is held under a key
is what etcd has there, which of a new listing differs (`Staging`), and how many there are
(`Census`). Does not know: etcd, when an audit is due, how a tree is changed.

There are two of these: the keys of the mount's prefix, and the record keys of that prefix where
they are not among them (`etcdfs.mirror.attribute_mirror`).

Most of what is listed again is as it was: of that only the key state is kept, and of what differs
the values, up to a bound. What differs beyond it had better be a tree of its own, which needs no
values.

Concurrency: trio thread. Between two slices anything may change; what the tree then has is newer
than the listing, or of no account.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from struct import Struct
from typing import Final, Protocol, final

import trio

from etcdfs.keyspace.attribute_records import encode, is_record_key, owner_of, record_key
from etcdfs.keyspace.keys import MARKER_NAME, Keyspace
from etcdfs.keyspace.store import Event, KeyValue, Revision, Tombstone
from etcdfs.tree.inodes import NOT_IN_ETCD, Directory, File, KeyState, key_state_of
from etcdfs.tree.node_attributes import (
    find_key_state,
    is_foreign,
    record_key_state,
    stored_record_of,
)
from etcdfs.tree.tree import Tree
from etcdfs.tree.value_cache import ValueCache, entry_size

SLICE: Final = 100
"""Keys looked at at a time; well below a millisecond."""

Holder = Directory | File | bytes
"""Who stands for a key: its node, for a marker the directory, for a record key itself."""


class Audited(Protocol):
    """What is audited."""

    @property
    def keyspace(self) -> Keyspace:
        """The keys that are compared."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether it is still to be audited."""
        ...

    def slices(self) -> Iterator[Sequence[tuple[Holder, KeyState]]]:
        """Iterate over all that is held, a slice at a time."""
        ...

    def key_of(self, holder: Holder) -> bytes | None:
        """Return the key that somebody stands for now; None if he is gone."""
        ...

    def directories(self) -> Iterator[Sequence[Directory]]:
        """Iterate over all directories, a slice at a time."""
        ...


@final
class HeldKeys:
    """The keys of a tree, record keys among them if they come with the others."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.keyspace = tree.keyspace
        self.is_kept = True

    def slices(self) -> Iterator[Sequence[tuple[Holder, KeyState]]]:
        """See `Audited`."""
        for directory in self._tree.directories():
            found: list[tuple[Holder, KeyState]] = []
            if directory.marker is not None and directory.marker is not NOT_IN_ETCD:
                found.append((directory, directory.marker))
            # A list, as the directory may change between two slices.
            children = list(directory.children.values())
            for first in range(0, len(children) or 1, SLICE):
                found += [
                    (child, child.key_state)
                    for child in children[first : first + SLICE]
                    if isinstance(child, File) and child.key_state is not None
                ]
                yield found
                found = []
        yield from _sliced(list(record_key_state(self._tree)))

    def key_of(self, holder: Holder) -> bytes | None:
        """See `Audited`."""
        if isinstance(holder, bytes):
            return holder
        if not self._tree.is_attached(holder):
            return None
        if isinstance(holder, Directory):
            return None if holder.marker is None else self._tree.prefix_of(holder)
        # A marker's value: its directory counts.
        return None if holder.name == MARKER_NAME else self._tree.key_of(holder)

    def directories(self) -> Iterator[Sequence[Directory]]:
        """See `Audited`."""
        found = self._tree.directories()
        while some := list(islice(found, SLICE)):
            yield some


@final
class HeldRecords:
    """The record keys of a prefix, where they come by a watch of their own."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.keyspace = Keyspace(record_key(tree.keyspace.prefix))

    @property
    def is_kept(self) -> bool:
        """See `Audited`."""
        return self._tree.attributes

    def slices(self) -> Iterator[Sequence[tuple[Holder, KeyState]]]:
        """See `Audited`."""
        yield from _sliced(
            [
                (record_key(key), stored_record.key_state)
                for key, stored_record in self._tree.stored_records.items()
            ]
        )

    def key_of(self, holder: Holder) -> bytes | None:
        """See `Audited`."""
        return holder if isinstance(holder, bytes) else None

    def directories(self) -> Iterator[Sequence[Directory]]:
        """See `Audited`: there are none."""
        yield from ()


def _sliced(
    found: Sequence[tuple[Holder, KeyState]],
) -> Iterator[Sequence[tuple[Holder, KeyState]]]:
    for first in range(0, len(found), SLICE):
        yield found[first : first + SLICE]


# --- counting -------------------------------------------------------------------------------

COUNT_S: Final = 2.0
"""Time between two counts, at least."""

COUNT_SHARE: Final = 50
"""The pause after a count is so much longer than it took, at least: a million keys take a second."""


@final
class Census:
    """How many keys are held, and the bytes of their values, as last counted.

    What a program writes is in the tree before it is in etcd, and changes there in many places: to
    count all now and then is simpler than to keep account, and an operator needs no more.

    Attributes:
        keys: So many; record keys too, where they are among the keys.
        bytes: So large are their values.
    """

    def __init__(self, held: Audited, revision: Callable[[], int]) -> None:
        # --- dependencies
        self._held = held
        self._revision = revision
        # --- mutable state
        self.keys = self.bytes = 0

    async def run(self) -> None:
        """Count whenever something has changed, for ever."""
        counted = -1
        while True:
            begun = trio.current_time()
            if counted != (counted := self._revision()):
                await self._count()
            took_s = trio.current_time() - begun
            await trio.sleep(max(COUNT_S, COUNT_SHARE * took_s))

    async def _count(self) -> None:
        keys = size = 0
        for some in self._held.slices():
            keys += len(some)
            size += sum(key_state.size for _, key_state in some)
            await trio.lowlevel.checkpoint()
        self.keys, self.bytes = keys, size


# --- comparing ------------------------------------------------------------------------------


def holder_of(tree: Tree, key: bytes) -> Holder | None:
    """Return who stands for a key; None if nobody does."""
    if is_record_key(key):
        return key if find_key_state(tree, key) is not None else None
    found = tree.find(key)
    return None if found is None else found[0]


def is_hollow(tree: Tree, directory: Directory) -> bool:
    """Tell whether nothing keeps a directory: no key of its own, and none below it."""
    return (
        directory is not tree.root
        and directory.marker is None
        and not directory.children
        and tree.is_attached(directory)
    )


def is_as(tree: Tree, value_cache: ValueCache, entry: KeyValue) -> bool:
    """Tell whether what is held under a key is what etcd has there, as far as values are held."""
    found = find_key_state(tree, entry.key)
    if found is None or found[1] != key_state_of(entry):
        return False
    if is_record_key(entry.key):
        return tree.stored_records[owner_of(entry.key)] == stored_record_of(entry)
    return value_cache.peek(entry.key, entry.mod_revision) in {None, entry.value}


@dataclass(frozen=True, slots=True)
class Expected:
    """What etcd has under a key: None if nothing; `digest` is its value's."""

    key_state: KeyState | None
    digest: int = 0


NOTHING: Final = Expected(None)


def expected_of(entry: KeyValue) -> Expected:
    """Return what is to be held for an entry of etcd's; its value is not kept."""
    if is_record_key(entry.key):
        return Expected(key_state_of(entry), hash(encode(stored_record_of(entry).record)))
    return Expected(key_state_of(entry), hash(entry.value))


def agrees(tree: Tree, value_cache: ValueCache, key: bytes, expected: Expected) -> bool:
    """Tell whether what is held under a key is what is expected, as far as values are held."""
    found = find_key_state(tree, key)
    if found is None or expected.key_state is None:
        return found is None and expected.key_state is None
    if found[1] != expected.key_state:
        return False
    if is_record_key(key):
        return hash(encode(tree.stored_records[owner_of(key)].record)) == expected.digest
    held = value_cache.peek(key, expected.key_state.mod_revision)
    return held is None or hash(held) == expected.digest


STAGING_SLICE: Final = 500
"""Keys looked at at a time; a few milliseconds."""


_packed: Final = Struct("5q").pack
"""Puts the numbers of `KeyState` together; etcd's have 64 bits."""


class TooDifferentError(Exception):
    """More differs than is to be held in memory, or changed while it was looked at."""


@final
class Staging:
    """What has been listed so far."""

    def __init__(self, tree: Tree, value_cache: ValueCache, *, most_bytes: int) -> None:
        """Compare with a tree, and keep values of at most so many bytes."""
        # --- dependencies
        self._tree = tree
        self._value_cache = value_cache
        # --- mutable state
        self._room = most_bytes
        # Facts as bytes: a million tuples, and Python's collector would walk them for a second.
        self._same: dict[bytes, bytes] = {}
        self._different: dict[bytes, KeyValue] = {}

    def add(self, entries: Iterable[KeyValue]) -> None:
        """Take in part of a listing.

        Raises:
            TooDifferentError: Its values do not fit.
        """
        for entry in entries:
            if is_foreign(self._tree, entry.key):
                continue
            if is_as(self._tree, self._value_cache, entry):
                self._same[entry.key] = _packed(*key_state_of(entry))
                continue
            self._different[entry.key] = entry
            self._room -= entry_size(entry.value)
        if self._room < 0:
            raise TooDifferentError("more differs than is to be held in memory")

    async def differences(self, revision: Revision) -> list[Event]:
        """Return the events that make the tree what was listed at a revision.

        Raises:
            TooDifferentError: What was alike has changed since it was listed.
        """
        events: list[Event] = []
        held = HeldKeys(self._tree)
        for some in held.slices():
            for holder, _ in some:
                key = held.key_of(holder)
                if key is not None and key not in self._same and key not in self._different:
                    events.append(Tombstone(key, revision))
            await trio.lowlevel.checkpoint()
        while self._same:
            for _ in range(min(STAGING_SLICE, len(self._same))):
                key, key_state = self._same.popitem()  # letting go of all at once takes long, too
                found = find_key_state(self._tree, key)
                if found is None or _packed(*found[1]) != key_state:
                    raise TooDifferentError(f"{key!r} has changed since it was listed")
            await trio.lowlevel.checkpoint()
        return [*events, *self._different.values()]
