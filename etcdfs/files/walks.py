"""Handing the kernel contents that it has not asked for yet, where somebody walks a directory.

A program that reads many small files asks for each of them (`grep -r`, a configuration directory
at a start). After a few in one directory the others that the kernel knows of are handed over, in
growing portions for as long as it goes on asking; so there are some requests for a directory, and
not one for each file. Only what is in memory anyway is handed over, once of each version.

Knows: which files of a directory come next. Does not know: how the kernel is given anything, who
reads.

Concurrency: synchronous, on the trio thread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, final

from cachetools import LRUCache

from etcdfs.files.handles import STORE_MAX
from etcdfs.keyspace.store import Revision
from etcdfs.tree.inodes import Directory, File, Inode, Node, type_of
from etcdfs.tree.tree import Tree
from etcdfs.tree.value_cache import ValueCache

READS: Final = 4
"""Files of one directory that are asked for before others are handed over."""

PORTION: Final = 16
PORTION_MAX: Final = 256
"""Files that are handed over at once, at first and at most; one takes some 5 us."""

PORTION_BYTES: Final = 4 << 20

NAMES_MAX: Final = 65_536
"""Names of a directory that are looked at in one walk."""

WALKS_MAX: Final = 64
"""Directories in which somebody may be walking."""

HandOver = Callable[[Sequence[tuple[Inode, bytes]]], None]
"""Gives the kernel the contents of files."""


@dataclass(slots=True)
class _Walk:
    """What was asked for in a directory, and what has not been looked at yet; None: all."""

    asked: set[Inode] = field(default_factory=set)
    left: Iterator[Node] | None = None
    portion: int = PORTION


@final
class Walks:
    """All walks in one mount."""

    def __init__(self, tree: Tree, value_cache: ValueCache, hand_over: HandOver) -> None:
        # --- dependencies
        self._tree = tree
        self._value_cache = value_cache
        self._hand_over = hand_over
        # --- mutable state
        self._walks: LRUCache[Inode, _Walk] = LRUCache(WALKS_MAX)

    def note(self, file: File) -> None:
        """Note that the kernel asks for the content of a version, for the first time."""
        file.pages_pushed = True
        directory = file.directory
        if directory is None:
            return
        walk = self._walks.setdefault(directory.inode, _Walk())
        walk.asked.add(file.inode)
        if len(walk.asked) < READS:
            return
        if walk.left is None:
            walk.left = iter(list(islice(directory.children.values(), NAMES_MAX)))
        contents = list(self._portion(directory, walk, walk.left))
        walk.portion = min(2 * walk.portion, PORTION_MAX)
        if contents:
            self._hand_over(contents)

    def _portion(
        self, directory: Directory, walk: _Walk, left: Iterator[Node]
    ) -> Iterator[tuple[Inode, bytes]]:
        """Yield what comes next; with the last name the walk is over."""
        size = found = 0
        for _ in range(2 * walk.portion):
            node = next(left, None)
            if node is None:
                self._walks.pop(directory.inode, None)
                return
            value = self._value_of(node) if node.directory is directory else None
            if isinstance(node, File) and value:
                node.pages_pushed = True
                yield node.inode, value
                size, found = size + len(value), found + 1
            if found == walk.portion or size >= PORTION_BYTES:
                return

    def _value_of(self, node: Node) -> bytes | None:
        """Return the value of a version that the kernel knows of and has not asked for."""
        if not isinstance(node, File) or not node.lookups or node.pages_pushed:
            return None
        known = node.key_state
        if known is None or not 0 < known.size <= STORE_MAX:
            return None
        if type_of(node.stored_record) is not None or node.inode in self._tree.unseen.deciding:
            return None
        key = self._tree.key_of(node)
        return None if key is None else self._value_cache.peek(key, Revision(node.version))
