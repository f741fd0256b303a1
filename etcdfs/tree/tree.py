"""The tree of inodes: which names there are, what the kernel knows of them, what each one is.

Knows: directories, files, inode numbers, lookup counts, cached names. Does not know: etcd requests,
FUSE, time (the clock is handed in).

A *node* is a `Directory` or a `File`. A `File` object (one inode number) is one version of a key
for as long as somebody has it open: when another client writes the key meanwhile, the name gets a
new `File`, and whoever holds the old one open keeps it. A file that nobody has open follows its
key (`renew`): the kernel may hold its inode for a bind mount, say, which never looks a path up
again. Changes made through this mount keep the inode, as on any file system.

A file is in one of three states:

* *attached*: `directory` is set; it is what a lookup of its name finds;
* *superseded*: `directory` is None; another version stands under the key it was, `lost_key`, and
  answers for it once nobody has it open any more (`current`);
* *gone*: so is `directory`, and `gone` is set: its key was deleted, and its flush must not
  resurrect it. If another client did that, the key may come back, and the file with it
  (`returning`); if this mount did (`removed`), it stays what it was, as on any file system.

A directory that loses its last key is there again when a key is, as long as the kernel holds it.

Concurrency: one owner, the trio thread; every method is synchronous and leaves the invariants
(`check_invariants`) true.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Final, final

from etcdfs.errors import CallerError, NotADirectoryFileError, StaleError
from etcdfs.keyspace.attribute_records import Rights
from etcdfs.keyspace.keys import MARKER_NAME, VALUE_NAME, Keyspace
from etcdfs.keyspace.revision_times import RevisionTimes
from etcdfs.keyspace.store import Clock
from etcdfs.tree.inodes import (
    NOT_IN_ETCD,
    Cached,
    CachedAttributes,
    Dentry,
    Directory,
    File,
    Held,
    Inode,
    KeyState,
    Node,
    StoredRecord,
    Times,
    TreeStatistics,
    UnseenOpens,
    is_local,
    type_of,
)

ROOT_INODE: Final = Inode(1)  # FUSE_ROOT_ID, include/uapi/linux/fuse.h
MAX_NEGATIVES: Final = 65_536
"""Missing names remembered as told to the kernel; past it, further ones are not cached."""
TOLD_LATER_NS: Final = 1_000_000_000
"""How much later than we the kernel may begin to count the lifetime of an answer."""


@final
class Tree:
    """All nodes, by name and by inode number."""

    def __init__(
        self,
        keyspace: Keyspace,
        clock: Clock,
        *,
        monotonic: Clock | None = None,
        complete: bool,
        attributes: bool = True,
    ) -> None:
        """Make an empty tree.

        Args:
            keyspace: Which keys are shown, and how.
            clock: Nanoseconds since the epoch; may jump. For times that are shown.
            monotonic: Nanoseconds that pass and never jump; None: as `clock`. For what lasts.
            complete: Whether the tree will hold every key (a mirror), so that the kernel may
                cache what it says and an empty directory without a marker is known to be gone.
            attributes: Whether keys have attributes of their own, in record keys.
        """
        # --- dependencies
        self.keyspace = keyspace
        self.clock = clock
        self._monotonic = clock if monotonic is None else monotonic
        # --- constants
        self.complete = complete
        self.attributes = attributes
        # --- mutable state
        self.rights = Rights()  # to read and write them
        # Record keys by the key each belongs to, void ones too; only in a complete tree.
        self.stored_records: dict[bytes, StoredRecord] = {}
        self.root = Directory(ROOT_INODE, clock())
        self.root.lookups = 1
        self.root.kernel_may_cache = True
        # Never reused in a mount's life: the kernel marks an inode bad when its number comes
        # back with another type (fs/fuse/inode.c, fuse_iget).
        self.numbers = count(ROOT_INODE + 1)
        # INVARIANT: holds exactly the nodes whose lookup count is not 0
        self._known: dict[Inode, Node] = {ROOT_INODE: self.root}
        # All that have a name. Few mounts are asked for inodes that the kernel does not hold, so
        # it is made when one is, and kept true from then on.
        self._numbered: dict[Inode, Node] | None = None
        self.held = Held()  # those of them that no name leads to, and that may get one again
        # Missing names as told to the kernel, until when; all for as long, so the first end first.
        self._negatives: OrderedDict[Dentry, int] = OrderedDict()
        self.being_changed: set[Cached] = set()
        # While a batch is planned in parts, nodes and names that change; None: of directories.
        self.disturbed: set[Node | Dentry | None] | None = None
        self.own_records = Counter[tuple[bytes, bytes | None]]()  # being written: key, value
        self.withheld = set[Dentry]()  # gone (b"": all that is), but not to be cached yet (inotify)
        # Whether something went wrong with the tree, so that it must be made anew (`take_over`).
        self.doubtful = False
        # Directories of which the kernel may have older names for as long as somebody holds their
        # lock; None: all of them. What it asks of one meanwhile, it must not keep.
        self.stuck: set[Inode | None] = set()
        self.unseen = UnseenOpens()
        self.revisions = RevisionTimes()
        self.times = Times()  # only in a tree that is not complete

    # --- finding ----------------------------------------------------------------------------

    def node(self, inode: int) -> Node:
        """Return the node of an inode number that the kernel holds.

        Raises:
            StaleError: There is none (any more).
        """
        node = self._known.get(Inode(inode))
        if node is None:
            raise StaleError(f"inode {inode} is not known")
        return node

    def numbered(self, inode: int) -> Node:
        """Return the node of an inode number, whether the kernel holds it or not.

        Raises:
            StaleError: There is none (any more).
        """
        node = self._known.get(Inode(inode))
        if node is None:
            if self._numbered is None:
                self._numbered = {child.inode: child for child in self._attached()}
            node = self._numbered.get(Inode(inode))
        if node is None:
            raise StaleError(f"inode {inode} does not exist")
        return node

    def directory(self, inode: int) -> Directory:
        """Return a directory by inode number.

        Raises:
            NotADirectoryFileError: It is a file.
            StaleError: There is none.
        """
        node = self.node(inode)
        if isinstance(node, File):
            raise NotADirectoryFileError(f"inode {inode} is a file")
        return node

    def is_attached(self, node: Node) -> bool:
        """Return whether a path from the root leads to this very node."""
        while node is not self.root:
            parent = node.directory
            if parent is None or parent.children.get(node.name) is not node:
                return False
            node = parent
        return True

    def current(self, node: Node) -> Node:
        """Return who answers for an inode: its node, or the version that superseded it.

        A symbolic link, say, cannot answer for what was a file: the kernel would not take it.
        """
        if not isinstance(node, File) or node.directory is not None or node.removed:
            return node
        return node if self.unseen.keeps(node) else self.successor(node) or node

    def successor(self, file: File) -> File | None:
        """Return the version that has superseded a file without a name, if it can be that, too."""
        found = None if file.lost_key is None else self.find(file.lost_key)
        if (
            found is None
            or not isinstance(found[0], File)
            or type_of(found[0].stored_record) != type_of(file.stored_record)
        ):
            return None
        return found[0]

    def may_follow(self, file: File) -> bool:
        """Return whether a file may become the version that another client has written.

        Not what somebody has open: a reader would see the old size with new bytes. Nor a link whose
        target the kernel has: a READLINK under way would bring it back, and no open ask again.
        """
        is_kept_link = file.pages is not None and type_of(file.stored_record) == "symlink"
        is_open = file.handles or file.inode in self.unseen.opened
        return not (is_open or file.removed or file.key_state is None or is_kept_link)

    def returning(self, directory: Directory, name: bytes) -> Node | None:
        """Return the node that the kernel holds of a name which comes back, if it can be that."""
        node = self.held.find(Dentry(directory.inode, name)) if self.held else None
        if isinstance(node, File):
            return node if self.may_follow(node) else None
        return node

    def find(self, key: bytes) -> tuple[Node, KeyState] | None:
        """Return who stands for a key, a file or the marker's directory, and what is known."""
        names, is_marker = self.keyspace.locate(key)
        node: Node | None = self.root
        for name in names:
            if not isinstance(node, Directory):
                return None
            node = node.children.get(name)
        if isinstance(node, Directory):
            if is_marker:
                return None if node.marker is None else (node, node.marker)
            node = node.children.get(VALUE_NAME)
        if is_marker or not isinstance(node, File) or node.key_state is None:
            return None
        return node, node.key_state

    def names(self, node: Node, *more: bytes) -> tuple[bytes, ...]:
        """Return the path of an attached node as names, and `more` below it."""
        names = list(reversed(more))
        while node.directory is not None:
            names.append(node.name)
            node = node.directory
        names.reverse()
        return tuple(names)

    def key_of(self, file: File) -> bytes | None:
        """Return the key a file stands for, None if it is gone."""
        if file.directory is None:
            return None if file.gone else file.lost_key
        return self.keyspace.file_key(self.names(file))

    def prefix_of(self, directory: Directory) -> bytes:
        """Return the key prefix of everything in a directory (also its marker key).

        Raises:
            NameReservedError: It is part of an escaped long name and has none.
        """
        return self.keyspace.directory_prefix(self.names(directory))

    def own_key(self, node: Node) -> bytes | None:
        """Return a file's key or a directory's marker key; None for what has none (any more)."""
        try:
            return self.prefix_of(node) if isinstance(node, Directory) else self.key_of(node)
        except CallerError:  # part of an escaped long name
            return None

    # --- what the kernel knows --------------------------------------------------------------

    def remember(self, node: Node) -> None:
        """Count one lookup: an answer that hands the inode to the kernel."""
        node.lookups += 1
        self._known[node.inode] = node
        self.disturb(node)

    def disturb(self, node: Node, directory: Directory | None = None, name: bytes = b"") -> None:
        """Note that what a plan was made of has changed: a node, or what is under a name."""
        if self.disturbed is not None:
            self.disturbed.add(node)
            if directory is not None:
                where = Dentry(directory.inode, name) if isinstance(node, File) else None
                self.disturbed.add(where)

    def forget(self, inode: int, count: int) -> bool:
        """Give back lookups; say whether the kernel does not know the inode any more (at 0)."""
        if (node := self._known.get(Inode(inode))) is None or node is self.root:
            return False
        node.lookups = max(0, node.lookups - count)
        self.disturb(node)
        if node.lookups == 0:
            node.kernel_may_cache = False
            if isinstance(node, File):
                node.pages_pushed = False
                node.pages = None
                self.unseen.drop(node)
            del self._known[node.inode]
            self.held.drop(node)
            if not self.complete:
                self.prune(node)
        return not node.lookups

    def prune(self, node: Node) -> None:
        """Drop a node nobody refers to from a tree that is not complete."""
        while not self.complete and node.lookups == 0 and node.directory is not None:
            if is_local(node) or (node.children if isinstance(node, Directory) else node.handles):
                return
            parent = node.directory
            self.times.keep(self.names(node), node)
            self.detach(parent, node.name, gone=False, as_version=True)
            node = parent

    def may_cache(self, what: Cached) -> bool:
        """Return whether an answer about `what` may be cached by the kernel."""
        is_sure = self.complete and not self.doubtful
        return is_sure and what not in self.being_changed and not self._is_stuck(what)

    def _is_stuck(self, what: Cached) -> bool:
        if isinstance(what, CachedAttributes) and what.inode in self.stuck:
            return True
        entry = what if isinstance(what, Dentry) else what.within
        return bool(self.stuck) and (
            None in self.stuck or (entry is not None and entry.directory in self.stuck)
        )

    def tell_negative(self, directory: Directory, name: bytes, lifetime_ns: int) -> bool:
        """Note that the kernel is told a name is missing; False: it must not cache that."""
        entry = Dentry(directory.inode, name)
        if not self.may_cache(entry) or self.withheld & {entry, (entry.directory, b"")}:
            return False
        now = self._monotonic()
        negatives = self._negatives
        # Only those at the front are looked at: looking through all, once there are so many,
        # took milliseconds at every missing name.
        while len(negatives) >= MAX_NEGATIVES:
            if next(iter(negatives.values())) > now:
                return False
            negatives.popitem(last=False)
        negatives[entry] = now + lifetime_ns + TOLD_LATER_NS
        negatives.move_to_end(entry)
        return True

    def may_be_cached(self, directory: Directory, name: bytes) -> bool:
        """Return whether the kernel may hold a cached answer about this name."""
        if directory.lookups == 0:
            return False
        child = directory.children.get(name)
        # What is there is no missing name.
        return (
            Dentry(directory.inode, name) in self._negatives
            if child is None
            else child.kernel_may_cache
        )

    def listing_of(self, node: Node) -> CachedAttributes:
        """Return how to tell the kernel of a node's changed attributes."""
        parent = node.directory
        within = None if parent is None else Dentry(parent.inode, node.name)
        return CachedAttributes(node.inode, within)

    def cached_by_kernel(self) -> list[Cached]:
        """Return all that the kernel may have cached: of open files and directories, too."""
        cached: list[Cached] = list(self._negatives)
        for node in self._known.values():
            if node.directory is not None:
                cached.append(Dentry(node.directory.inode, node.name))
            if isinstance(node, Directory):
                cached.append(self.listing_of(node)._replace(pages=True))
            elif node.handles or self.unseen.is_so:
                cached.append(CachedAttributes(node.inode, None))
        return cached

    # --- changing ---------------------------------------------------------------------------

    def new_file(self, key_state: KeyState | None, now_ns: int | None = None) -> File:
        """Make a file with a new inode number, attached nowhere yet."""
        now_ns = self.clock() if now_ns is None else now_ns
        if key_state is not None:
            now_ns = self.revisions.learn(key_state.mod_revision, now_ns)
        return File(Inode(next(self.numbers)), key_state, now_ns)

    def new_version(self, old: File | None, key_state: KeyState) -> File:
        """Make the file for a version that another client wrote over `old`.

        Its mtime is later than the old one's even if the clock went back; its attributes stay
        as long as it is the same incarnation of the key.
        """
        file = self.new_file(key_state)
        if old is not None:
            if file.mtime_ns <= old.mtime_ns:
                file.mtime_ns = file.ctime_ns = old.mtime_ns + 1
            same = (
                old.key_state is not None
                and old.key_state.create_revision == key_state.create_revision
            )
            file.stored_record = old.stored_record if same else None
        return file

    def renew(self, file: File, key_state: KeyState) -> None:
        """Make of a file that nobody has open the version that another client wrote.

        What was cached of it must have been invalidated, or be invalidated when it is opened.
        """
        if file.key_state is None or file.key_state.create_revision != key_state.create_revision:
            file.stored_record = None
        self.renew_all(((file, key_state),))

    def renew_all(self, files: Iterable[tuple[File, KeyState]]) -> None:
        """Do that, in one step, with very many files that have no attributes of their own."""
        now_ns = time_ns = self.clock()
        revision = 0
        for file, key_state in files:
            if key_state.mod_revision != revision:
                revision = key_state.mod_revision
                time_ns = self.revisions.learn(revision, now_ns)
            file.key_state = key_state
            file.mtime_ns = file.ctime_ns = max(time_ns, file.mtime_ns + 1)
            file.pages_pushed = False
            file.value = None
            if file.pages_invalidated:
                file.pages = None

    def new_directory(self) -> Directory:
        """Make a directory with a new inode number, attached nowhere yet."""
        return Directory(Inode(next(self.numbers)), self.clock())

    def directory_at(self, above: Directory, name: bytes) -> Directory:
        """Return a directory to be attached: the one that was there, if it is held, or a new."""
        node = self.returning(above, name)
        return node if isinstance(node, Directory) else self.new_directory()

    def attach(
        self, directory: Directory, name: bytes, node: Node, *, as_version: bool = False
    ) -> None:
        """Put a node under a name; what stood there must have been detached.

        With `as_version`, here and in `detach`, one version of a file takes the place of
        another: the directory's own times stay, as when a file is written to.
        """
        self.held.drop(node)
        node.directory = directory
        node.name = name
        node.removed = False
        directory.children[name] = node
        self.disturb(node, directory, name)
        if self._numbered is not None:
            self._numbered[node.inode] = node
        if isinstance(node, Directory):
            if node.was_in is not None:  # it is there again, and its attributes are not
                node.was_in = node.stored_record = None
            directory.subdirectories += 1
        else:
            node.lost_key = None
            node.gone = False
            self.unseen.drop(node)
        self._negatives.pop(Dentry(directory.inode, name), None)
        if not as_version:
            self._touch(directory)

    def detach(
        self,
        directory: Directory,
        name: bytes,
        *,
        gone: bool,
        key: bytes | None = None,
        is_moved: bool = False,
        as_version: bool = False,
    ) -> Node | None:
        """Take a name away.

        Args:
            directory: Where it is.
            name: The name.
            gone: Whether its key is deleted, not merely replaced.
            key: The key of a file, if it is known.
            is_moved: Whether a directory will be attached elsewhere with all that is below it.
            as_version: Whether only a new version of the file takes its place.
        """
        node = directory.children.get(name)
        if node is None:
            return None
        if isinstance(node, File):
            # Making keys of paths takes long when very many are deleted at once.
            node.lost_key = (key or self.key_of(node)) if node.lookups or not gone else None
            node.gone = gone
            node.ctime_ns = max(self.clock(), node.ctime_ns + 1)
            self.unseen.add(node)
        else:
            directory.subdirectories -= 1
            if not is_moved and node.children:
                # What is deepest first: a file's key is made from its whole path.
                for below in reversed(list(self.directories(node))):
                    for child in list(below.children):
                        self.detach(below, child, gone=True)
        del directory.children[name]
        node.directory = None
        self.disturb(node, directory, name)
        if self._numbered is not None and not is_moved:
            self._numbered.pop(node.inode, None)
        if node.lookups and not (node.removed or is_moved):
            self.held.add(Dentry(directory.inode, name), node)
            if isinstance(node, Directory):
                node.was_in = directory
        if not as_version:
            self._touch(directory)
        return node

    def detach_all(self, directory: Directory, files: Iterable[tuple[bytes, File, bytes]]) -> None:
        """Do what `detach` does with very many deleted files, but for `held`, which takes long."""
        children, numbered, now_ns = directory.children, self._numbered or {}, self.clock()
        for name, file, key in files:
            del children[name]
            file.directory = None
            file.gone = True
            if file.lookups:
                file.lost_key = key
                file.ctime_ns = max(now_ns, file.ctime_ns + 1)
                self.unseen.add(file)
            numbered.pop(file.inode, None)
        self._touch(directory)

    def clear(self) -> None:
        """Drop everything, while the kernel knows nothing of it."""
        assert len(self._known) == 1, "the kernel knows inodes of this tree"
        self.root.children.clear()
        self.root.subdirectories = 0
        self.root.marker = None
        self.held.clear()
        self._numbered = None
        self.stored_records.clear()

    def take_over(self, fresh: "Tree") -> None:
        """Become what another tree is, at once, once the kernel was told to forget everything."""
        self.stand_in(self.root, fresh.root)
        self.stored_records = fresh.stored_records
        self._numbered = None
        self._negatives.clear()
        self.being_changed.clear()
        self.doubtful = False

    def stand_in(self, node: Node, there: Node) -> None:
        """Put a node in the place of one of its kind, with what that one has."""
        node.stored_record = there.stored_record
        if isinstance(node, Directory) and isinstance(there, Directory):
            node.children, node.subdirectories = there.children, there.subdirectories
            self._touch(node)  # or the kernel would take a listing that it kept for this one
            node.marker = there.marker
            for child in node.children.values():
                child.directory = node
        if there.directory is not None:
            node.directory = there.directory
            node.name = there.name
            node.directory.children[node.name] = node

    def key_state(self, top: Directory | None = None) -> Iterator[tuple[bytes, KeyState]]:
        """Iterate over all keys of the tree, markers included, and what is known of each.

        Or only over those in and below the directory `top`.
        """
        for directory in self.directories(top):
            names = self.names(directory)
            if directory.marker is not None and directory.marker is not NOT_IN_ETCD:
                yield self.keyspace.directory_prefix(names), directory.marker
            for name, child in directory.children.items():
                if name == MARKER_NAME or isinstance(child, Directory):
                    continue
                if child.key_state is not None:
                    yield self.keyspace.file_key((*names, name)), child.key_state

    def _attached(self) -> Iterator[Node]:
        for directory in self.directories():
            yield directory
            yield from directory.children.values()

    def directories(self, top: Directory | None = None) -> Iterator[Directory]:
        """Iterate over all attached directories, the root (or `top`) first."""
        pending = [top or self.root]
        while pending:
            directory = pending.pop()
            yield directory
            pending.extend(c for c in directory.children.values() if isinstance(c, Directory))

    def statistics(self) -> TreeStatistics:
        """Return the sizes of the tables."""
        old = sum(node.directory is None for node in self._known.values()) - 1  # the root
        return TreeStatistics(
            inodes_known=len(self._known), old_versions=old, negatives=len(self._negatives)
        )

    def check_invariants(self) -> None:
        """Assert what must hold between any two calls."""
        for inode, node in self._known.items():
            assert node.inode == inode
            assert node.lookups > 0
        for directory in self.directories():
            subdirectories = 0
            for name, child in directory.children.items():
                assert (child.directory, child.name) == (directory, name)
                assert (child.inode in self._known) == (child.lookups > 0)
                assert Dentry(directory.inode, name) not in self._negatives
                subdirectories += isinstance(child, Directory)
            assert subdirectories == directory.subdirectories
            if self.complete and directory is not self.root:
                assert directory.marker or directory.children, "an empty directory has a marker"

    def _touch(self, directory: Directory) -> None:
        directory.mtime_ns = directory.ctime_ns = max(self.clock(), directory.mtime_ns + 1)
        directory.changes += 1
