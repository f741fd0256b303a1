"""The values held in memory: least recently used first out, bounded by bytes.

What this room knows: the value of a key as it was written at one mod_revision. Such a value
never changes, so nothing in here is ever stale; it can only be missing.
What it must not know: which version is the current one (the tree's), where to get one again.

Concurrency: owned by the trio thread; no operation waits.
"""

from dataclasses import dataclass
from typing import Final, final

from cachetools import Cache, LRUCache

from etcdfs.store import Revision

# What an entry takes beside the bytes of its value: the headers of value and key, the revision,
# the pair of both, and a slot in each of cachetools' three hash tables (values, sizes, order).
# Measured with tracemalloc: 360-400 bytes and the key itself, so keys of up to about 110 bytes
# are paid for. Without it, a million values of 10 bytes would take forty times what they say.
ENTRY_OVERHEAD: Final = 512

_Version = tuple[bytes, Revision]


def entry_size(value: bytes) -> int:
    """Return how many bytes of memory holding a value is counted as."""
    return ENTRY_OVERHEAD + len(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentsStatistics:
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


class _CountingLru(LRUCache[_Version, bytes]):
    """An LRU that counts what it evicts."""

    evictions = 0

    def popitem(self) -> tuple[_Version, bytes]:
        self.evictions += 1
        return super().popitem()


@final
class Contents:
    """A cache of values by key and mod_revision, bounded by the memory they take.

    Args:
        capacity: The most bytes to take, overhead included; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        # --- constants ---
        self._capacity = capacity

        # --- mutable state ---
        # INVARIANT: the sizes of all entries add up to what the LRU says, at most the capacity.
        self._lru = _CountingLru(capacity, getsizeof=entry_size)
        self._hits = 0
        self._misses = 0

    @property
    def capacity(self) -> int:
        """The most bytes to take, overhead included."""
        return self._capacity

    def put(self, key: bytes, mod_revision: Revision, value: bytes) -> None:
        """Keep a value, and drop those not used for longest until it fits.

        A value that can never fit is not kept, and nothing is dropped for it.
        """
        if entry_size(value) <= self._capacity:
            self._lru[key, mod_revision] = value

    def put_if_room(self, key: bytes, mod_revision: Revision, value: bytes) -> bool:
        """Keep a value if it fits as things are; return whether it did.

        For loading in bulk, where no value is likelier to be wanted than those it would drop:
        a load of more than the capacity then costs half as much, and drops nothing in use.
        """
        if self._lru.currsize + entry_size(value) > self._capacity:
            return False
        self._lru[key, mod_revision] = value
        return True

    def get(self, key: bytes, mod_revision: Revision) -> bytes | None:
        """Return the value that a key was given at a revision, or None if it is not held."""
        value = self._lru.get((key, mod_revision))
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
        return value

    def peek(self, key: bytes, mod_revision: Revision) -> bytes | None:
        """Return what `get` would, without counting it as a use."""
        version = (key, mod_revision)
        # Not `self._lru[version]`: reading through LRUCache moves the entry to the end.
        return Cache.__getitem__(self._lru, version) if version in self._lru else None

    def discard(self, key: bytes, mod_revision: Revision) -> None:
        """Let go of a value, if it is held: its version can no longer be asked for."""
        self._lru.pop((key, mod_revision), None)

    def statistics(self) -> ContentsStatistics:
        """Count what is held and what has happened."""
        return ContentsStatistics(
            entries=len(self._lru),
            size=int(self._lru.currsize),
            capacity=self._capacity,
            hits=self._hits,
            misses=self._misses,
            evictions=self._lru.evictions,
        )

    def check_invariants(self) -> None:
        """Assert what always holds; slow."""
        # Not `values()`: it reads through LRUCache, and would count as a use of each entry.
        size = sum(entry_size(Cache.__getitem__(self._lru, version)) for version in self._lru)
        assert size == self._lru.currsize <= self._capacity
