"""Nodes that no name leads to any more, and that the kernel holds all the same.

What this room knows: where each was, and is to be found when it comes back. What it must not
know: who holds them: a bind mount, a working directory, an O_PATH descriptor, the lower layer of
an overlay, or merely the kernel's memory.

Concurrency: owned by the tree, on the trio thread.
"""

from collections import OrderedDict
from typing import Final, final

from etcdfs.cached import Entry
from etcdfs.nodes import Directory, Node

MAX_VANISHED: Final = 1024
"""Directories without a key left whose names the kernel is not told to throw out; past it, that
of the first one is, and what is mounted there with it."""


@final
class Held:
    """Those nodes, by the name each had; the last one of each name."""

    def __init__(self) -> None:
        # INVARIANT: each has lookups, and is in no directory
        self._nodes: dict[Entry, Node] = {}
        self._where: dict[Node, Entry] = {}
        self._vanished: OrderedDict[Directory, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._where)

    def add(self, where: Entry, node: Node) -> None:
        """Take in a node that was under a name, and is to be there again when that is."""
        before = self._nodes.get(where)
        if before is not None:
            self.drop(before)
        self._nodes[where] = node
        self._where[node] = where
        if isinstance(node, Directory):
            self._vanished[node] = where

    def drop(self, node: Node) -> None:
        """Forget a node: it has a name again, or the kernel has let go of it."""
        where = self._where.pop(node, None)
        if where is not None:
            del self._nodes[where]
        if isinstance(node, Directory):
            self._vanished.pop(node, None)

    def find(self, where: Entry) -> Node | None:
        """Return the node that was last under a name."""
        return self._nodes.get(where)

    def excess(self) -> set[Entry]:
        """Return, once, names of vanished directories that are too many to be kept."""
        many = len(self._vanished) - MAX_VANISHED
        return {self._vanished.popitem(last=False)[1] for _ in range(many)}

    def clear(self) -> None:
        """Forget all."""
        self._nodes.clear()
        self._where.clear()
        self._vanished.clear()
