"""Making a tree from a complete listing, at first or after something went wrong with it.

Knows: that a listing comes in key order, so that neighbours share their directory, and which nodes
of an old tree can stay when nothing else of it is believed. Does not know: where the listing comes
from, what went wrong, how the kernel is told.

A change that fails half-way leaves a tree of which nobody knows what is true. What the kernel
holds, and what is not in etcd yet, is the only thing worth keeping of it: a directory that is in
the listing, too, keeps its inode, and so does a file that is still the same version of its key.

Concurrency: synchronous; used on the trio thread only.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from etcdfs.keyspace.attribute_records import is_record_key, owner_of
from etcdfs.keyspace.keys import MARKER_NAME, VALUE_NAME, is_plain
from etcdfs.keyspace.store import KeyValue, Revision
from etcdfs.tree.inodes import Directory, File, Inode, KeyState, Node, key_state_of, type_of
from etcdfs.tree.node_attributes import stored_record_of
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import NameChange

_make_key_state = partial(tuple.__new__, KeyState)  # what `KeyState._make` does, less a call


def load(tree: Tree, entries: Iterable[KeyValue]) -> None:
    """Add a page of a listing, in key order, to a new tree; nobody is told."""
    _Loader(tree).load(entries)


def directory_at(tree: Tree, names: tuple[bytes, ...]) -> Directory:
    """Return the directory at a path; it is made if it is not there, and nobody is told."""
    return _Loader(tree).walk(names)


def date(tree: Tree) -> None:
    """Give the nodes of a new tree the times of their revisions; nobody is told.

    A directory's is that of the newest entry which it has: nothing tells of those that have gone,
    but the marker that is put for the last one.
    """
    directories = list(tree.directories())
    newest = max(map(_newest, directories))
    if not newest:
        return
    tree.revisions.learn(newest, tree.clock())
    times = {0: 0}  # of the last revision: its time is one object, too

    def time_of(revision: int) -> int:
        if revision not in times:
            times.clear()
            times[revision] = tree.revisions.time_of(revision)
        return times[revision]

    made: dict[Directory, int] = {}  # at which revision, as far as is known
    for directory in reversed(directories):  # what is below comes first
        marker = directory.marker
        entries: list[int] = [] if marker is None else [marker.create_revision]
        for child in directory.children.values():
            if isinstance(child, Directory):
                entries.append(made.pop(child))
            elif child.key_state is not None:
                entries.append(child.key_state.create_revision)
                child.mtime_ns = child.ctime_ns = time_of(child.key_state.mod_revision)
        made[directory] = min(entries, default=0) if marker is None else marker.create_revision
        changed = max(*entries, 0 if marker is None else marker.mod_revision, 0)
        if changed:
            directory.mtime_ns = directory.ctime_ns = time_of(changed)


def _newest(directory: Directory) -> int:
    """Return the newest revision of what is in a directory, 0 if there is nothing."""
    key_state = [
        child.key_state for child in directory.children.values() if isinstance(child, File)
    ]
    known = [found.mod_revision for found in (*key_state, directory.marker) if found is not None]
    return max(known, default=0)


class _Loader:
    """Builds the tree from sorted keys; neighbours share their directory."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._stem: bytes | None = None
        self._directory = tree.root
        self._now = tree.clock()

    def load(self, entries: Iterable[KeyValue]) -> None:
        # The hot loop of a start: what it calls per key is written out here.
        now, numbers, last = self._now, self._tree.numbers, Revision(0)
        for entry in entries:
            key, value, created, modified, version, lease = entry
            # The same number is one object: most keys were made and never changed since, many of
            # them in one transaction.
            if modified == last:
                modified = last
            last = modified
            if created == modified:
                created = modified
            cut = key.rfind(b"/") + 1
            name = key[cut:]
            children = self._directory.children
            if key[:cut] == self._stem and is_plain(name) and name not in children:
                key_state = _make_key_state((created, modified, version, lease, len(value)))
                file = File(Inode(next(numbers)), key_state, now)
                file.directory = self._directory
                file.name = name
                children[name] = file
            else:
                self._find_directory(entry, key[:cut], name)

    def _find_directory(self, entry: KeyValue, stem: bytes, name: bytes) -> None:
        """Place the first key of a directory, or one whose name is not plain."""
        self._stem = None
        if is_record_key(entry.key):
            self._put_aside(entry)
            return
        names, is_marker = self._tree.keyspace.locate(entry.key)
        if is_marker:
            self._mark(self.walk(names), entry)
            return
        self._directory = self.walk(names[:-1])
        self._place(self._directory, names[-1], key_state_of(entry))
        if is_plain(name) and name == names[-1]:
            self._stem = stem

    def _put_aside(self, entry: KeyValue) -> None:
        owner = owner_of(entry.key)
        if self._tree.attributes and owner in self._tree.keyspace:
            self._tree.stored_records[owner] = stored_record_of(entry)

    def _mark(self, directory: Directory, entry: KeyValue) -> None:
        directory.marker = key_state_of(entry)
        if entry.value:
            self._place(directory, MARKER_NAME, directory.marker)

    def _place(self, directory: Directory, name: bytes, key_state: KeyState) -> None:
        child = directory.children.get(name)
        if isinstance(child, Directory):
            directory, name = child, VALUE_NAME
        file = File(Inode(next(self._tree.numbers)), key_state, self._now)
        file.directory = directory
        file.name = name
        directory.children[name] = file

    def walk(self, names: tuple[bytes, ...]) -> Directory:
        """Return the directory at a path, made if it is not there."""
        directory = self._tree.root
        for name in names:
            child = directory.children.get(name)
            if not isinstance(child, Directory):
                made = self._tree.new_directory()
                if child is not None:  # `a` came before `a/b`: its value moves inside
                    self._tree.detach(directory, name, gone=False)
                    self._tree.attach(made, VALUE_NAME, child)
                self._tree.attach(directory, name, made)
                child = made
            directory = child
        return directory


Names = tuple[bytes, ...]


def rebuild(tree: Tree, fresh: Tree) -> None:
    """Make a tree what a new one is, whatever state it is in; the new one is of no use after."""
    kept = _kept(tree)
    for names, node in kept.items():
        if _is_new_here(node) and _at(fresh, names) is None:
            directory_at(fresh, names[:-1])  # it is what the write buffer's directory is there for
    staying = {names: node for names, node in kept.items() if _may_stay(node, _at(fresh, names))}
    for names, node in reversed(kept.items()):  # a file's key is made from its whole path
        parent = node.directory
        if names not in staying and parent is not None:
            tree.detach(parent, node.name, gone=not isinstance(_at(fresh, names), File))
    tree.take_over(fresh)
    for names, node in staying.items():
        there = _at(tree, names)
        if there is not None:
            tree.stand_in(node, there)
        else:
            tree.attach(directory_at(tree, names[:-1]), names[-1], node)


def changes_by_rebuilding(tree: Tree, fresh: Tree) -> Iterator[NameChange]:
    """Yield what `rebuild` is about to change in directories that the kernel holds."""
    pending = [(tree.root, fresh.root)]
    while pending:
        old, new = pending.pop()
        for name in old.children.keys() | new.children.keys():
            before, after = old.children.get(name), new.children.get(name)
            if before is not None and before.directory is not old:
                before = None  # it is not believed to be here itself
            if isinstance(before, Directory) and isinstance(after, Directory):
                if before.lookups:
                    pending.append((before, after))
            elif before is None or not _may_stay(before, after):
                yield NameChange(directory=old, name=name, before=before, after=after)


def _kept(tree: Tree) -> dict[Names, Node]:
    """Return the nodes that somebody refers to, by path, what is above before what is below."""
    found: dict[Names, Node] = {}
    seen = {tree.root}
    pending: list[tuple[Names, Directory]] = [((), tree.root)]
    while pending:
        names, directory = pending.pop()
        for name, child in directory.children.items():
            if child.directory is not directory or child.name != name:
                continue  # it is not believed to be here itself
            path = (*names, name)
            if child.lookups or _is_new_here(child):
                found[path] = child
            if isinstance(child, Directory) and child not in seen:
                seen.add(child)
                pending.append((path, child))
    return found


def _is_new_here(node: Node) -> bool:
    return isinstance(node, File) and node.key_state is None


def _may_stay(node: Node, there: Node | None) -> bool:
    if isinstance(node, Directory):
        return isinstance(there, Directory)
    if node.key_state is None:
        return there is None
    return (
        isinstance(there, File)
        and there.key_state == node.key_state
        and type_of(there.stored_record) == type_of(node.stored_record)
    )


def _at(tree: Tree, names: Names) -> Node | None:
    node: Node | None = tree.root
    for name in names:
        if not isinstance(node, Directory):
            return None
        node = node.children.get(name)
    return node
