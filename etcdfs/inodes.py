"""Which node a call on an inode is about.

What this room knows: that a file which was superseded while somebody had it open gives way to the
newer version once nobody has. What it must not know: what the call does.

Concurrency: trio thread.
"""

from etcdfs.tree import File, Node
from etcdfs.view import View


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
    if isinstance(node, File) and node.handles and not anew:
        return node
    return tree.current(node)
