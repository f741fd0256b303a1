"""What the tree consists of: files, each one version of a key at a time, and directories.

What this room knows: what is noted of each. What it must not know: how they hang together.

Concurrency: owned by the tree, on the trio thread.
"""

from typing import Final, final

from etcdfs.cached import Inode
from etcdfs.facts import NOT_IN_ETCD, Facts, Side


@final
class File:
    """One version of a key. Owned by `Tree`; `handles`, `value` and `draft` by the services.

    While nobody has it open, it follows its key: it becomes the version that another client
    writes. `pages` is the version whose content the kernel may have cached.
    """

    __slots__ = (
        "ctime_ns",
        "directory",
        "draft",
        "facts",
        "gone",
        "handles",
        "inode",
        "lookups",
        "lost_key",
        "mtime_ns",
        "name",
        "pages",
        "removed",
        "reopened",
        "side",
        "stored",
        "told",
        "unpaged",
        "value",
    )

    def __init__(self, inode: Inode, facts: Facts | None, now_ns: int) -> None:
        self.inode = inode
        self.facts = facts  # None: created here, not yet in etcd
        self.directory: Directory | None = None
        self.name = b""
        self.lost_key: bytes | None = None  # the key it had when its name was taken away
        self.gone = False  # by a deletion: no path leads here, an O_PATH may
        self.removed = False  # by this mount: for the kernel it is deleted, and never comes back
        self.mtime_ns = now_ns
        self.ctime_ns = now_ns
        self.side: Side | None = None
        self.lookups = 0
        self.told = False  # the kernel may have the name cached
        self.reopened: File | None = None  # the version that newcomers have open in its place
        self.stored = False  # the kernel was given the content
        self.pages: int | None = None  # None: the kernel has none
        self.unpaged = False  # not opened since the kernel was told to let go of them
        self.handles = 0
        self.value: bytes | None = None  # pinned while there are handles
        self.draft: object | None = None

    @property
    def version(self) -> int:
        """The key's mod_revision, 0 if it is not in etcd yet."""
        return 0 if self.facts is None else self.facts.mod_revision


@final
class Directory:
    """A prefix of keys.

    `marker` is what etcd says of its marker key, None without one; `NOT_IN_ETCD` of part of a
    long name, which has no key, and was made here.
    """

    __slots__ = (
        "children",
        "ctime_ns",
        "directory",
        "inode",
        "lookups",
        "marker",
        "mtime_ns",
        "name",
        "removed",
        "side",
        "subdirectories",
        "told",
        "was_in",
        "witness",
    )

    def __init__(self, inode: Inode, now_ns: int) -> None:
        self.inode = inode
        self.directory: Directory | None = None
        self.name = b""
        self.removed = False  # by this mount: for the kernel it is dead, and never comes back
        self.was_in: Directory | None = None  # while it is not there
        self.children: dict[bytes, Node] = {}
        self.marker: Facts | None = None
        self.mtime_ns = now_ns
        self.ctime_ns = now_ns
        self.side: Side | None = None
        self.witness: bytes | None = None  # a key below it, when etcd was last asked
        self.subdirectories = 0
        self.lookups = 0
        self.told = False

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
        elif node.facts is None:
            return True
    return False


def is_within(node: Node, top: Node) -> bool:
    """Tell whether a node is another, or somewhere below it."""
    at: Node | None = node
    while at is not None and at is not top:
        at = at.directory
    return at is top
