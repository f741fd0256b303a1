"""Inodes and dentries: files, each one version of a key at a time, and directories.

Knows: what is noted of each, what the kernel may have cached of it, and what stays for an inode
that no name leads to any more. Does not know: how they hang together (`etcdfs.tree.tree`).

The kernel may hold an inode without a name: by a bind mount, a working directory, an O_PATH
descriptor, the lower layer of an overlay, or merely because it has memory to spare. `Held`
remembers where each was, and is to be found when it comes back. `Times` remembers when things
changed that the kernel, short of memory, forgot and will ask for again: etcd keeps no times.

Concurrency: owned by the tree, on the trio thread.

`Dentry` and its like are tuples, and not frozen dataclasses: a batch makes several of each key, and
puts them into sets, in a quarter of the time. No two kinds have the same length, so none equals
another.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType, Protocol, final

from cachetools import LRUCache

from etcdfs.keyspace.attribute_records import Record, Type
from etcdfs.keyspace.store import KeyValue, Revision

Inode = NewType("Inode", int)


class Dentry(NamedTuple):
    """A name in a directory, as the kernel may have it cached."""

    directory: Inode
    name: bytes


class Expiry(NamedTuple):
    """A name that is to be asked for again, but not thrown out of the kernel's memory.

    Linux unmounts whatever is mounted on, or below, a name that is thrown out.
    """

    within: Dentry


class CachedAttributes(NamedTuple):
    """The attributes of an inode; `within` is its entry, None for the root.

    With `pages`, the content of a file as well.
    """

    inode: Inode
    within: Dentry | None
    pages: bool = False


class Content(NamedTuple):
    """All that the kernel has of an inode of a file, its name not included, if nobody has it open.

    Where the kernel opens files without asking, it is found out whether somebody has: then what it
    has is right for as long as the file is open, but for its attributes.
    """

    inode: Inode
    within: Dentry | None
    pages: bool = True
    unless_open: bool = True


Cached = Dentry | Expiry | CachedAttributes | Content
"""What the kernel is told to invalidate."""


def contents_in(stale: Iterable[Cached]) -> set[Inode]:
    """Return the inodes of which it is to be found out whether they are open."""
    return {cached.inode for cached in stale if isinstance(cached, Content)}


class KeyState(NamedTuple):  # as `KeyValue`: one per key
    """What etcd says of a key, without its value. `size` in bytes."""

    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: int
    size: int


def key_state_of(entry: KeyValue) -> KeyState:
    """Return the key state of a key that was read with its value."""
    return KeyState(
        entry.create_revision, entry.mod_revision, entry.version, entry.lease, len(entry.value)
    )


class StoredRecord(NamedTuple):
    """Attributes of a key's own, and what etcd says of the record key that has them."""

    record: Record
    key_state: KeyState


NOT_IN_ETCD: Final = KeyState(Revision(0), Revision(0), 0, 0, 0)  # not yet, or no longer


@final
class File:
    """One version of a key. Owned by `Tree`; `handles`, `value` and `write buffer` by the services.

    While nobody has it open, it follows its key: it becomes the version that another client
    writes. `pages` is the version whose content the kernel may have cached.
    """

    __slots__ = (
        "buffer",
        "ctime_ns",
        "directory",
        "gone",
        "handles",
        "inode",
        "kernel_may_cache",
        "key_state",
        "lookups",
        "lost_key",
        "mtime_ns",
        "name",
        "pages",
        "pages_invalidated",
        "pages_pushed",
        "removed",
        "reopened",
        "stored_record",
        "value",
    )

    def __init__(self, inode: Inode, key_state: KeyState | None, now_ns: int) -> None:
        self.inode = inode
        self.key_state = key_state  # None: created here, not yet in etcd
        self.directory: Directory | None = None
        self.name = b""
        self.lost_key: bytes | None = None  # the key it had when its name was taken away
        self.gone = False  # by a deletion: no path leads here, an O_PATH may
        self.removed = False  # by this mount: for the kernel it is deleted, and never comes back
        self.mtime_ns = now_ns
        self.ctime_ns = now_ns
        self.stored_record: StoredRecord | None = None
        self.lookups = 0
        self.kernel_may_cache = False  # the kernel may have the name cached
        self.reopened: File | None = None  # the version that newcomers have open in its place
        self.pages_pushed = False  # the kernel was given the content
        self.pages: int | None = None  # None: the kernel has none
        self.pages_invalidated = False  # not opened since they were invalidated
        self.handles = 0
        self.value: bytes | None = None  # pinned while there are handles
        self.buffer: object | None = None

    @property
    def version(self) -> int:
        """The key's mod_revision, 0 if it is not in etcd yet."""
        return 0 if self.key_state is None else self.key_state.mod_revision


@final
class Directory:
    """A prefix of keys.

    `marker` is what etcd says of its marker key, None without one; `NOT_IN_ETCD` of part of a
    long name, which has no key, and was made here. `changes` counts changes of its names.
    """

    __slots__ = (
        "changes",
        "children",
        "ctime_ns",
        "directory",
        "evidence_key",
        "inode",
        "kernel_may_cache",
        "listed",
        "lookups",
        "marker",
        "mtime_ns",
        "name",
        "removed",
        "stored_record",
        "subdirectories",
        "was_in",
    )

    def __init__(self, inode: Inode, now_ns: int) -> None:
        self.inode = inode
        self.directory: Directory | None = None
        self.name = b""
        self.removed = False  # by this mount: for the kernel it is dead, and never comes back
        self.was_in: Directory | None = None  # while it is not there
        self.children: dict[bytes, Node] = {}
        self.changes = 0
        self.marker: KeyState | None = None
        self.mtime_ns = now_ns
        self.ctime_ns = now_ns
        self.stored_record: StoredRecord | None = None
        self.evidence_key: bytes | None = None  # a key below it, when etcd was last asked
        self.listed = 0  # the revision of its last listing, when etcd was asked
        self.subdirectories = 0
        self.lookups = 0
        self.kernel_may_cache = False

    version: Final = 0


Node = File | Directory


def is_local(node: Node) -> bool:
    """Tell whether a node is, or has below it, what was made here and is not in etcd."""
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, Directory):
            if node.marker is NOT_IN_ETCD:
                return True
            pending.extend(node.children.values())
        elif node.key_state is None:
            return True
    return False


def is_within(node: Node, top: Node) -> bool:
    """Tell whether a node is another, or somewhere below it."""
    at: Node | None = node
    while at is not None and at is not top:
        at = at.directory
    return at is top


MAX_VANISHED: Final = 1024
"""Directories without a key left whose names the kernel is not told to throw out; past it, that
of the first one is, and what is mounted there with it."""


@final
class Held:
    """Those nodes, by the name each had; the last one of each name."""

    def __init__(self) -> None:
        # INVARIANT: each has lookups, and is in no directory
        self._nodes: dict[Dentry, Node] = {}
        self._where: dict[Node, Dentry] = {}
        self._vanished: OrderedDict[Directory, Dentry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._where)

    def add(self, where: Dentry, node: Node) -> None:
        """Take in a node that was under a name, and is to be there again when that is."""
        before = self._nodes.get(where)
        if before is not None:
            self.drop(before)
        self._nodes[where] = node
        self._where[node] = where
        if isinstance(node, Directory):
            self._vanished[node] = where

    def drop(self, node: Node) -> None:
        """Forget a node: it has a name again, or the kernel has forgotten it."""
        where = self._where.pop(node, None)
        if where is not None:
            del self._nodes[where]
        if isinstance(node, Directory):
            self._vanished.pop(node, None)

    def find(self, where: Dentry) -> Node | None:
        """Return the node that was last under a name."""
        return self._nodes.get(where)

    def excess(self) -> set[Dentry]:
        """Return, once, names of vanished directories that are too many to be kept."""
        many = len(self._vanished) - MAX_VANISHED
        return {self._vanished.popitem(last=False)[1] for _ in range(many)}

    def clear(self) -> None:
        """Forget all."""
        self._nodes.clear()
        self._where.clear()
        self._vanished.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeStatistics:
    """Sizes of the tree's tables.

    Attributes:
        inodes_known: Inodes that the kernel holds.
        old_versions: Those of them that no path leads to any more: held, or not forgotten.
        negatives: Missing names that the kernel may remember.
    """

    inodes_known: int
    old_versions: int
    negatives: int


@final
class UnseenOpens:
    """What is known of who has files open, where the kernel opens them without asking.

    Attributes:
        is_so: Whether it does: whatever it holds may be open then.
        deciding: Inodes of files that are about to follow their keys, if nobody has them open.
        opened: Those of them that somebody has been seen to have open, or is not known not to.
        superseded: The files that the kernel holds and that have no name. Each stays the version
            that it is until it is known not to be open (`etcdfs.files.unopened`).
    """

    def __init__(self) -> None:
        self.is_so = False
        self.deciding: set[Inode] = set()
        self.opened: set[Inode] = set()
        # INVARIANT: each has lookups, and is in no directory
        self.superseded: set[File] = set()

    def add(self, file: File) -> None:
        """Note that a file has lost its name."""
        if self.is_so and file.lookups and not _has_type(file):
            self.superseded.add(file)

    def drop(self, file: File) -> None:
        """Note that a file has a name again, or is forgotten."""
        if file in self.superseded:
            self.superseded.discard(file)
            file.value = None

    def keeps(self, file: File) -> bool:
        """Say whether a file that has lost its name stays the version that it is."""
        return self.is_so and not _has_type(file)

    def judge(self, unopened: set[Inode]) -> set[Inode]:
        """Take for open what is not known to be closed; return what was not yet."""
        found = self.deciding - unopened - self.opened
        self.opened |= found
        return found

    def decided(self) -> None:
        """Note that what was to be decided is."""
        self.deciding, self.opened = set(), set()


def type_of(stored_record: StoredRecord | None) -> Type | None:
    """Return what a node is, if not a file or a directory."""
    return None if stored_record is None else stored_record.record.type


def _has_type(file: File) -> bool:
    """Tell whether what looks like a file is a link, say: nobody can have that open."""
    return type_of(file.stored_record) is not None


def take_over(file: File, target: File) -> None:
    """Make of a superseded file that nobody has open the version that has taken its place.

    What the kernel had cached of it must have been invalidated.
    """
    file.key_state, file.stored_record = target.key_state, target.stored_record
    file.mtime_ns, file.ctime_ns = target.mtime_ns, target.ctime_ns
    file.value = None
    file.pages_pushed = False
    file.gone = False


NAMES_MAX: Final = 65_536
"""Names whose times are kept; about 20 MiB at most. Of others the times begin anew."""


class Timed(Protocol):
    """What has times, in nanoseconds since the epoch, and a version: 0 for a directory."""

    mtime_ns: int
    ctime_ns: int

    @property
    def version(self) -> int:
        """The key's mod_revision, 0 for a directory."""
        ...


class _Kept(NamedTuple):
    version: int
    mtime_ns: int
    ctime_ns: int


@final
class Times:
    """The times of dropped names."""

    def __init__(self) -> None:
        self._kept: LRUCache[tuple[bytes, ...], _Kept] = LRUCache(NAMES_MAX)

    def keep(self, names: tuple[bytes, ...], node: Timed) -> None:
        """Keep the times of what is dropped."""
        self._kept[names] = _Kept(node.version, node.mtime_ns, node.ctime_ns)

    def restore(self, names: tuple[bytes, ...], node: Timed) -> bool:
        """Give what is found again the times it had; say whether it is no new name.

        Another version is later than the one that was dropped, even if the clock went back.
        """
        kept = self._kept.pop(names, None)
        if kept is None or bool(kept.version) != bool(node.version):
            return False
        if kept.version == node.version:
            node.mtime_ns, node.ctime_ns = kept.mtime_ns, kept.ctime_ns
        else:
            node.mtime_ns = max(node.mtime_ns, kept.mtime_ns + 1)
            node.ctime_ns = max(node.ctime_ns, kept.ctime_ns + 1)
        return True

    def drop(self, names: tuple[bytes, ...]) -> None:
        """Note that there is nothing under a name any more."""
        self._kept.pop(names, None)
