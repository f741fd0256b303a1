"""The values held in memory, and where to get one again.

Knows: the value of a key as it was written at one mod_revision. Such a value never changes, so
nothing in here is ever stale; it can only be missing, least recently used first, when there are too
many bytes. Then it is read from etcd's history. Does not know: which version is the current one
(the tree's), who reads it.

Concurrency: owned by the trio thread; only what reads from etcd waits.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

from etcdfs.errors import CompactedError, StaleError, StoreError, StoreFullError
from etcdfs.keyspace.store import Committed, Get, Page, Revision, Store, Transaction
from etcdfs.tree.inodes import File
from etcdfs.tree.tree import Tree

# What an entry takes beside the bytes of its value: the headers of both objects, the key with its
# revision, and a node and a slot in the table. Measured with tracemalloc: 150-190 bytes and the key
# itself, so keys of up to about 70 bytes are paid for. Without it, a million values of 10 bytes would
# take twenty times what they say.
ENTRY_OVERHEAD: Final = 256


def entry_size(value: bytes) -> int:
    """Return how many bytes of memory holding a value is counted as."""
    return ENTRY_OVERHEAD + len(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCacheStatistics:
    """What is held now, and what has happened since the start.

    Attributes:
        entries: Values held.
        size: Bytes of memory they are counted as, overhead included.
        capacity: The most that `size` may be.
        hits: Values asked for and found.
        misses: Values asked for and not found.
        evictions: Values dropped to make room for others.
    """

    entries: int
    size: int
    capacity: int
    hits: int
    misses: int
    evictions: int


@final
class ValueCache:
    """A cache of values by key and mod_revision, bounded by the memory they take.

    Args:
        capacity: The most bytes to take, overhead included; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        # --- constants ---
        self._capacity = capacity

        # --- mutable state ---
        # One table, and one object for key and revision: cachetools' cache has three tables, and
        # takes 400 bytes an entry.
        # INVARIANT: the sizes of all entries add up to `_size`, at most the capacity; those used
        # last come last.
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._size = 0
        self._hits = self._misses = self._evictions = 0

    @property
    def capacity(self) -> int:
        """The most bytes to take, overhead included."""
        return self._capacity

    def put(self, key: bytes, mod_revision: Revision, value: bytes) -> None:
        """Keep a value, and drop those not used for longest until it fits.

        A value that can never fit is not kept, and nothing is dropped for it.
        """
        if entry_size(value) > self._capacity:
            return
        self.discard(key, mod_revision)
        self._values[_name_of(key, mod_revision)] = value
        self._size += entry_size(value)
        while self._size > self._capacity:
            self._size -= entry_size(self._values.popitem(last=False)[1])
            self._evictions += 1

    def put_if_room(self, key: bytes, mod_revision: Revision, value: bytes) -> bool:
        """Keep a value if it fits as things are; return whether it did.

        For loading in bulk, where no value is likelier to be wanted than those it would drop:
        a load of more than the capacity then costs half as much, and drops nothing in use.
        """
        size = self._size + entry_size(value)
        if size > self._capacity:
            return False
        self._values[_name_of(key, mod_revision)] = value
        self._size = size
        return True

    def get(self, key: bytes, mod_revision: Revision) -> bytes | None:
        """Return the value that a key was given at a revision, or None if it is not held."""
        version = _name_of(key, mod_revision)
        value = self._values.get(version)
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
            self._values.move_to_end(version)
        return value

    def peek(self, key: bytes, mod_revision: Revision) -> bytes | None:
        """Return what `get` would, without counting it as a use."""
        return self._values.get(_name_of(key, mod_revision))

    def discard(self, key: bytes, mod_revision: Revision) -> None:
        """Let go of a value, if it is held: its version can no longer be asked for."""
        value = self._values.pop(_name_of(key, mod_revision), None)
        if value is not None:
            self._size -= entry_size(value)

    def statistics(self) -> ValueCacheStatistics:
        """Count what is held and what has happened."""
        return ValueCacheStatistics(
            entries=len(self._values),
            size=self._size,
            capacity=self._capacity,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def check_invariants(self) -> None:
        """Assert what always holds; slow."""
        size = sum(map(entry_size, self._values.values()))
        assert size == self._size <= self._capacity


def _name_of(key: bytes, mod_revision: Revision) -> bytes:
    return mod_revision.to_bytes(8) + key


Recall = Callable[[bytes, Revision], Awaitable[bytes | None]]
"""Returns the value that a key was given at a revision, if it is at hand."""


async def value_of(
    store: Store, value_cache: ValueCache, tree: Tree, file: File, recall: Recall | None = None
) -> bytes:
    """Return the value of the version that `file` is, from memory or at its own revision.

    Args:
        store: etcd.
        value_cache: The values in memory.
        tree: The file's tree.
        file: The file.
        recall: Asked before etcd is; None: nobody is.

    Raises:
        StaleError: The version is not the newest, and no longer in etcd's history, or etcd cannot
            be asked: the kernel looks the path up again, and finds a newer one.
        StoreError: etcd cannot be asked for the newest.
    """
    if file.value is not None:
        return file.value
    # Of what is deleted, history has the value for a while.
    key, key_state = tree.key_of(file) or file.lost_key, file.key_state
    if key_state is None:
        return b""
    if key is None or not key_state.mod_revision:
        msg = f"inode {file.inode} was deleted and its value not kept"
        raise StaleError(msg)
    kept = value_cache.get(key, key_state.mod_revision)
    if kept is None and recall is not None:
        kept = await recall(key, key_state.mod_revision)
    if kept is not None:
        return kept
    try:
        page = await _version(store, key, key_state.mod_revision)
    except StoreError as exc:
        if file.directory is not None:
            raise
        msg = (
            f"revision {key_state.mod_revision} of {key!r} is old, and etcd does not tell it: {exc}"
        )
        raise StaleError(msg) from exc
    if not page.entries or page.entries[0].mod_revision != key_state.mod_revision:
        msg = f"revision {key_state.mod_revision} of {key!r} has been compacted away"
        raise StaleError(msg)
    value_cache.put(key, key_state.mod_revision, page.entries[0].value)
    return page.entries[0].value


async def _version(store: Store, key: bytes, revision: Revision) -> Page:
    try:
        return await store.range(key, revision=revision)
    except CompactedError:
        # A compaction takes old versions, never the newest one of a key that is there.
        return await store.range(key)


async def read_together(store: Store, gets: Sequence[Get]) -> Committed:
    """Return what several reads find at one revision, as one transaction does.

    When its quota is used up, etcd 3.4 refuses every transaction, even one that only reads
    (server/storage/quota.go, Available; 3.5 lets it through), but never a range.
    """
    asked = Transaction((), tuple(gets))
    try:
        return await store.commit(asked)
    except StoreFullError:
        pages: list[Page] = []
        for get in gets:
            revision = pages[0].revision if pages else 0
            pages.append(
                await store.range(
                    get.key,
                    get.end,
                    limit=get.limit,
                    revision=revision,
                    keys_only=get.keys_only,
                )
            )
        return Committed(True, pages[0].revision, tuple(pages), asked)
