"""A tree made anew from a complete listing, after something went wrong with it.

What this room knows: which nodes of a tree can stay when nothing else of it is believed. What it
must not know: what went wrong, where the listing comes from, how the kernel is told.

A change that fails half-way leaves a tree of which nobody knows what is true. What the kernel
holds, and what is not in etcd yet, is the only thing worth keeping of it: a directory that is in
the listing, too, keeps its inode, and so does a file that is still the same version of its key.

Concurrency: synchronous; used on the trio thread only.
"""

from etcdfs.loader import directory_at
from etcdfs.sides import type_of
from etcdfs.tree import Directory, File, Node, Tree

Names = tuple[bytes, ...]


def rebuild(tree: Tree, fresh: Tree) -> None:
    """Make a tree what a new one is, whatever state it is in; the new one is of no use after."""
    kept = _kept(tree)
    for names, node in kept.items():
        if _is_draft(node) and _at(fresh, names) is None:
            directory_at(fresh, names[:-1])  # it is what the draft's directory is there for
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
            if child.lookups or _is_draft(child):
                found[path] = child
            if isinstance(child, Directory) and child not in seen:
                seen.add(child)
                pending.append((path, child))
    return found


def _is_draft(node: Node) -> bool:
    return isinstance(node, File) and node.facts is None


def _may_stay(node: Node, there: Node | None) -> bool:
    if isinstance(node, Directory):
        return isinstance(there, Directory)
    if node.facts is None:
        return there is None
    return (
        isinstance(there, File)
        and there.facts == node.facts
        and type_of(there.side) == type_of(node.side)
    )


def _at(tree: Tree, names: Names) -> Node | None:
    node: Node | None = tree.root
    for name in names:
        if not isinstance(node, Directory):
            return None
        node = node.children.get(name)
    return node
