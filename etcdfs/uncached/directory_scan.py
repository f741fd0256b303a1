"""One directory's level of the keyspace, as it is found page by page.

Knows: which keys are entries of the level, how to jump over what is below them, and how far to look
at a time. Does not know: how etcd is asked, the tree.

Whatever the limit, etcd walks its index of all keys in a range that is asked for, to count them
(3.4: mvcc/index.go, Revisions; 3.5 and later: server/storage/mvcc/index.go). A level that asked
for all the rest of its prefix after each subdirectory would have etcd walk everything below once
for each. So after a jump the range ends where names that begin like the last one end; if there
is nothing, it is widened. Siblings mostly begin alike; how far, is learnt on the way.

Concurrency: none; one owner.
"""

from dataclasses import dataclass, field
from typing import final

from etcdfs.keyspace.attribute_records import ATTRIBUTES_END, is_record_key, owner_of, record_key
from etcdfs.keyspace.keys import Keyspace, is_part
from etcdfs.keyspace.store import END_OF_KEYS, KeyValue, Page, range_end


@final
@dataclass(slots=True)
class Level:
    """What is found of it.

    Attributes:
        keyspace: Which keys are shown.
        names: The directory's path.
        start: What all its keys begin with, or the first key of the keyspace.
        end: The end of all its keys.
        revision: At which revision it is read.
        next_start: From where on nothing is known yet.
        marker: The directory's own marker, if it has one.
        found: What is under each name: a file's key, or None for a directory.
        kept: Files whose version is known already.
        runs: Files that follow one another.
        markers: The subdirectories' markers.
        evidence_keys: Of each subdirectory, a key below it.
        stored_records: Record keys, by name and whether it is the marker's.
        has_sides: Whether they were read.
    """

    keyspace: Keyspace
    names: tuple[bytes, ...]
    start: bytes
    end: bytes
    revision: int = 0
    next_start: bytes = b""
    marker: bytes | None = None
    found: dict[bytes, KeyValue | None] = field(default_factory=dict)
    kept: set[bytes] = field(default_factory=set)
    runs: list[list[tuple[bytes, KeyValue]]] = field(default_factory=list)
    markers: dict[bytes, KeyValue] = field(default_factory=dict)
    evidence_keys: dict[bytes, bytes] = field(default_factory=dict)
    stored_records: dict[tuple[bytes, bool], KeyValue] = field(default_factory=dict)
    has_records: bool = False
    _jumped: bytes = b""  # the last subdirectory's prefix, without its `/`
    _alike: int = 0  # so many bytes of it bound the next range; 0: nothing does
    _usual: int = 0  # so many mostly do
    _misses: int = 0  # how often in a row that was too many
    _widened: int = 0

    def __post_init__(self) -> None:
        """Begin at the start."""
        self.next_start = self.start

    @property
    def stop(self) -> bytes:
        """Where the next range is to end."""
        return range_end(self._jumped[: self._alike]) if self._alike else self.end

    def passed(self, page: Page, stop: bytes, used: int) -> bool:
        """Note that a page has been taken, so much of it of use; return whether it is over."""
        if not page.more:
            if stop == self.end:
                return True
            self.next_start = max(self.next_start, stop)
        elif 2 * used > len(page.entries):
            self._alike = 0  # there is not much to walk over
        while self._alike and self.stop <= self.next_start:
            self._widen()
        return self.end != END_OF_KEYS and self.next_start >= self.end

    def _widen(self) -> None:
        """Look farther next time, at ever more: what the names have in common has ended."""
        self._widened = self._widened * 2 + 1
        self._bound(self._alike - self._widened)

    def _bound(self, alike: int) -> None:
        self._alike = alike if alike > len(self.start) else 0

    def _jump_over(self, below: bytes) -> None:
        """Go on after a subdirectory, and expect the next one as near as they were so far.

        A bound that was too narrow twice in a row is too narrow. One that was wide enough may be
        wider than it need be, if the last two names have more than that in common.
        """
        before, self._jumped = self._jumped, below[:-1]
        self.next_start = range_end(below)
        if not before:
            self._usual = len(self._jumped) - 1
        elif self._widened:
            self._misses += 1
            if self._misses > 1:
                self._usual, self._misses = self._alike, 0
        else:
            self._misses = 0
            if _alike(before, self._jumped) > self._usual:
                self._usual = max(self._usual, len(self.start)) + 1
        self._widened = 0
        self._bound(min(self._usual, len(self._jumped)))

    def take(self, page: Page) -> int:
        """Sort a page's keys into entries; return how many were not jumped over."""
        used = 0
        unbroken = bool(self.runs)
        for entry in page.entries:
            if entry.key < self.next_start:
                continue
            used += 1
            self.next_start = entry.key + b"\0"
            unbroken = self._sort(entry, unbroken=unbroken)
        return used

    def keep(self, entry: KeyValue) -> None:
        """Take over a file's value."""
        names, _ = self.keyspace.locate(entry.key)
        if self.found.get(names[-1]) is not None:
            self.found[names[-1]] = entry

    def take_record(self, entry: KeyValue) -> bytes:
        """Take over a record key; return the next one of interest."""
        names, is_marker = self.keyspace.locate(owner_of(entry.key))
        depth = len(self.names)
        after = entry.key + b"\0"
        if names[:depth] != self.names or len(names) == depth:
            return after
        if len(names) == depth + 1:
            self.stored_records[names[depth], is_marker] = entry
        elif not is_part(names[depth]):
            below = self.keyspace.directory_prefix(names[: depth + 1])
            return range_end(record_key(below))
        return after

    def _sort(self, entry: KeyValue, *, unbroken: bool) -> bool:
        if is_record_key(entry.key):
            self.next_start = ATTRIBUTES_END
            return False
        names, is_marker = self.keyspace.locate(entry.key)
        depth = len(self.names)
        if names[:depth] != self.names:
            return False  # a neighbour of a long name that begins alike
        if is_marker and len(names) == depth:
            self.marker = entry.key
            return False
        name = names[depth]
        if is_marker or len(names) > depth + 1:
            self.found[name] = None
            self.evidence_keys.setdefault(name, entry.key)
            if is_marker and len(names) == depth + 1:
                self.markers[name] = entry
            if not is_part(name):
                self._jump_over(self.keyspace.directory_prefix((*self.names, name)))
            return False
        if name in self.found:
            return False
        self.found[name] = entry
        if not unbroken:
            self.runs.append([])
        self.runs[-1].append((name, entry))
        return True


def _alike(first: bytes, second: bytes) -> int:
    """Return how many bytes two names have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
