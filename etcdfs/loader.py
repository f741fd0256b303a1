"""Filling a new tree with a complete listing.

What this room knows: that a listing comes in key order, so that neighbours share their directory.
What it must not know: where it comes from.

Concurrency: synchronous; the tree's owner calls it before anybody sees the tree.
"""

from collections.abc import Iterable
from functools import partial

from etcdfs.keys import MARKER_NAME, VALUE_NAME, is_plain
from etcdfs.sidekeys import is_side_key, owner_of
from etcdfs.sides import side_of
from etcdfs.store import KeyValue
from etcdfs.tree import Directory, Facts, File, Inode, Tree, facts_of

_make_facts = partial(tuple.__new__, Facts)  # what `Facts._make` does, less a call


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
    time_of = tree.revisions.time_of
    made: dict[Directory, int] = {}  # at which revision, as far as is known
    for directory in reversed(directories):  # what is below comes first
        marker = directory.marker
        entries: list[int] = [] if marker is None else [marker.create_revision]
        for child in directory.children.values():
            if isinstance(child, Directory):
                entries.append(made.pop(child))
            elif child.facts is not None:
                entries.append(child.facts.create_revision)
                child.mtime_ns = child.ctime_ns = time_of(child.facts.mod_revision)
        made[directory] = min(entries, default=0) if marker is None else marker.create_revision
        changed = max(*entries, 0 if marker is None else marker.mod_revision, 0)
        if changed:
            directory.mtime_ns = directory.ctime_ns = time_of(changed)


def _newest(directory: Directory) -> int:
    """Return the newest revision of what is in a directory, 0 if there is nothing."""
    facts = [child.facts for child in directory.children.values() if isinstance(child, File)]
    known = [found.mod_revision for found in (*facts, directory.marker) if found is not None]
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
        now, numbers = self._now, self._tree.numbers
        for entry in entries:
            key, value, created, modified, version, lease = entry
            cut = key.rfind(b"/") + 1
            name = key[cut:]
            children = self._directory.children
            if key[:cut] == self._stem and is_plain(name) and name not in children:
                facts = _make_facts((created, modified, version, lease, len(value)))
                file = File(Inode(next(numbers)), facts, now)
                file.directory = self._directory
                file.name = name
                children[name] = file
            else:
                self._find_directory(entry, key[:cut], name)

    def _find_directory(self, entry: KeyValue, stem: bytes, name: bytes) -> None:
        """Place the first key of a directory, or one whose name is not plain."""
        self._stem = None
        if is_side_key(entry.key):
            self._put_aside(entry)
            return
        names, is_marker = self._tree.keyspace.locate(entry.key)
        if is_marker:
            self._mark(self.walk(names), entry)
            return
        self._directory = self.walk(names[:-1])
        self._place(self._directory, names[-1], facts_of(entry))
        if is_plain(name) and name == names[-1]:
            self._stem = stem

    def _put_aside(self, entry: KeyValue) -> None:
        owner = owner_of(entry.key)
        if self._tree.attributes and owner in self._tree.keyspace:
            self._tree.sides[owner] = side_of(entry)

    def _mark(self, directory: Directory, entry: KeyValue) -> None:
        directory.marker = facts_of(entry)
        if entry.value:
            self._place(directory, MARKER_NAME, directory.marker)

    def _place(self, directory: Directory, name: bytes, facts: Facts) -> None:
        child = directory.children.get(name)
        if isinstance(child, Directory):
            directory, name = child, VALUE_NAME
        file = File(Inode(next(self._tree.numbers)), facts, self._now)
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
