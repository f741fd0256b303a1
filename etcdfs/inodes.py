"""Which node a call on an inode is about.

What this room knows: that a file which was superseded while somebody had it open gives way to the
newer version once nobody has, and how whoever comes by a path is told from a holder. What it must
not know: what the call does.

Concurrency: trio thread.
"""

from typing import Final, final

import trio
from cachetools import LRUCache

from etcdfs.errors import StaleError
from etcdfs.tree import File, Inode, Node, Tree
from etcdfs.view import View

LOOK_AGAIN_S: Final = 1.0
"""How long the kernel may take to look a path up again, once it was told ESTALE."""

SENT_BACK_MAX: Final = 1024
"""Threads that may be looking again; of more, one that holds an inode may get ESTALE."""


async def node_of(view: View, inode: int, *, anew: bool = False) -> Node:
    """Return the node that answers for an inode, true as of now.

    With `anew`, for somebody who is about to open it: that is what its key holds now, whoever has
    an older version open.

    Raises:
        StaleError: The inode is unknown.
        StoreError: It cannot be known.
    """
    tree = view.switch.tree
    node = tree.node(inode)
    await view.refresh(node)
    # checkpoint: it may have been superseded
    if isinstance(node, File) and not anew:
        if node.handles:
            return node
        if node.reopened is not None:
            return node.reopened
    return tree.current(node)


@final
class Newcomers:
    """Those who open an inode that a newer version has superseded.

    Whoever came by a path has just missed the new inode that it leads to. It is told ESTALE: the
    kernel looks the path up again then, once (fs/namei.c, do_filp_open), and finds that. Whoever
    holds the inode comes to the same one again, and reads the newest version through it.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._sent_back: LRUCache[int, tuple[int, float]] = LRUCache(SENT_BACK_MAX)

    def admit(self, inode: int, answering: File, thread: int) -> File:
        """Return what a thread opens of an inode for which a file answers.

        Raises:
            StaleError: It is to look again.
        """
        inode_before, since = self._sent_back.pop(thread, (0, 0.0))
        if answering.inode == inode:
            return answering
        now = trio.current_time()
        if not inode_before or now - since > LOOK_AGAIN_S:
            self._sent_back[thread] = (inode, now)
            msg = f"inode {inode} is an old version"
            raise StaleError(msg)
        if inode_before == inode:
            return answering
        # What it has found meanwhile is superseded as well, of a key that is always written. The
        # kernel would not look once more; and this version was the newest when the call began.
        node = self._tree.node(Inode(inode))
        return node if isinstance(node, File) else answering
