"""A tree that is made anew keeps what the kernel holds where it is still the same, and no more."""

from hypothesis import given
from hypothesis import strategies as st

from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import KeyValue, Revision
from etcdfs.tree.bulk_load import load, rebuild
from etcdfs.tree.inodes import Directory, File, Node
from etcdfs.tree.tree import Tree

ROOT = Keyspace(b"/")
keys = st.lists(st.sampled_from((b"a", b"b", b"c")), min_size=1, max_size=4).map(
    lambda names: b"/" + b"/".join(names)
)
markers = keys.map(lambda key: key + b"/")
flags = st.booleans()
listings = st.dictionaries(keys | markers, st.integers(1, 3), max_size=8)


def make(listing: dict[bytes, int], like: Tree | None = None) -> Tree:
    tree = Tree(ROOT, lambda: 1, complete=True)
    if like is not None:
        tree.numbers = like.numbers
    entries = (
        KeyValue(key, b"v", Revision(1), Revision(revision), 1)
        for key, revision in sorted(listing.items())
    )
    load(tree, entries)
    return tree


def at(tree: Tree, names: tuple[bytes, ...]) -> Node | None:
    found: Node | None = tree.root
    for name in names:
        found = found.children.get(name) if isinstance(found, Directory) else None
    return found


def is_alike(there: Node | None, node: Node) -> bool:
    if isinstance(there, File) and isinstance(node, File):
        return there.key_state == node.key_state
    return isinstance(there, Directory) and isinstance(node, Directory)


@given(listings, listings, st.data())
def test_what_is_made_anew_is_the_listing(
    before: dict[bytes, int], after: dict[bytes, int], data: st.DataObject
) -> None:
    tree = make(before)
    nodes = [n for d in tree.directories() for n in d.children.values()]
    for node in nodes:
        if data.draw(flags):
            tree.remember(node)
    goes_wrong = data.draw(flags)
    if nodes and goes_wrong:
        broken = data.draw(st.sampled_from(nodes))
        assert broken.directory is not None
        match data.draw(st.integers(0, 2)):
            case 0:
                del broken.directory.children[broken.name]
            case 1:
                broken.name = b"other"
            case 2 if isinstance(broken, Directory):
                broken.children.clear()
    expected = make(after)
    paths = {tree.names(n): n for n in nodes if n.lookups and tree.is_attached(n)}
    rebuild(tree, make(after, tree))
    tree.check_invariants()
    assert dict(tree.key_state()) == dict(expected.key_state())
    shown = {tree.names(d) for d in tree.directories()}
    assert shown == {expected.names(d) for d in expected.directories()}
    for names, node in paths.items():
        assert tree.is_attached(node) == is_alike(at(expected, names), node)
    numbers = [n.inode for d in tree.directories() for n in d.children.values()]
    assert len(set(numbers)) == len(numbers)


def test_what_was_held_and_does_not_stay_is_told_apart() -> None:
    """A file whose key is gone is deleted; one that has a newer version is only superseded."""
    tree = make({b"/gone": 1, b"/newer": 1, b"/d/f": 1})
    nodes = {tree.names(n): n for d in tree.directories() for n in d.children.values()}
    for node in nodes.values():
        tree.remember(node)
    rebuild(tree, make({b"/newer": 2}, tree))
    files = {names[-1]: node for names, node in nodes.items() if isinstance(node, File)}
    assert {name: (node.directory, node.gone) for name, node in files.items()} == {
        b"gone": (None, True),
        b"newer": (None, False),
        b"f": (None, True),
    }
    assert files[b"newer"].lost_key == b"/newer"
    directory = nodes[b"d",]
    assert isinstance(directory, Directory)
    assert (directory.directory, directory.was_in) == (None, tree.root)
    tree.check_invariants()
