"""The tree: loading, lookup counts, names and keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import etcdfs.tree.tree
from etcdfs.errors import NotADirectoryFileError, StaleError
from etcdfs.keyspace.attribute_records import Record
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import KeyValue, Revision
from etcdfs.tree.bulk_load import date, load
from etcdfs.tree.inodes import (
    MAX_VANISHED,
    NOT_IN_ETCD,
    CachedAttributes,
    Dentry,
    Directory,
    File,
    KeyState,
    Node,
    StoredRecord,
    key_state_of,
)
from etcdfs.tree.tree import MAX_NEGATIVES, TOLD_LATER_NS, Tree

ROOT = Keyspace(b"/")
_components = st.sampled_from([b"a", b"a-b", b"a.b", b"a0", b"", b".", b"%value", b"\xff", b"\0"])
_keys = st.lists(_components, min_size=1, max_size=4).map(lambda c: b"/" + b"/".join(c))


HOUR_NS = 3600 * 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


def entry(key: bytes, value: bytes = b"v", revision: int = 2) -> KeyValue:
    return KeyValue(key, value, Revision(2), Revision(revision), 1)


def tree_of(*keys: bytes, complete: bool = True) -> Tree:
    tree = Tree(ROOT, Clock(), complete=complete)
    load(tree, (entry(key, b"" if key.endswith(b"/") else b"v") for key in sorted(keys)))
    return tree


def at(tree: Tree, *names: bytes) -> Node:
    node: Node = tree.root
    for name in names:
        assert isinstance(node, Directory)
        node = node.children[name]
    return node


# --- loading --------------------------------------------------------------------------------


@given(keys=st.sets(_keys, max_size=12), cut=st.integers(0, 12), marked=st.booleans())
def test_every_key_is_loaded_at_its_path(keys: set[bytes], cut: int, marked: bool) -> None:
    """However a listing is cut into pages."""
    value = b"v" if marked else b""
    entries = [entry(k, value if k.endswith(b"/") else b"v", i) for i, k in enumerate(sorted(keys))]
    tree = Tree(ROOT, Clock(), complete=True)
    load(tree, entries[:cut])
    load(tree, entries[cut:])
    tree.check_invariants()
    assert dict(tree.key_state()) == {e.key: key_state_of(e) for e in entries}
    for directory in tree.directories():
        assert tree.is_attached(directory)
        for child in directory.children.values():
            assert tree.is_attached(child)
    for key in keys:
        names, is_marker = ROOT.locate(key)
        node = at(tree, *names)
        if is_marker:
            assert isinstance(node, Directory)
            assert node.marker is not None
            assert (b"%marker" in node.children) == marked
            assert tree.prefix_of(node) == key
        else:
            file = node.children[b"%value"] if isinstance(node, Directory) else node
            assert isinstance(file, File)
            assert tree.key_of(file) == key


def test_equal_numbers_of_a_listing_are_one_object() -> None:
    """A million keys have as many of each, of 32 bytes."""
    tree = Tree(ROOT, lambda: 1000, complete=True)
    # As they come from a message: each number by itself.
    entries = [
        KeyValue(b"/%d" % n, b"", Revision(int("1000")), Revision(int("1000")), 1)
        for n in range(100)
    ]
    load(tree, entries)
    date(tree)
    files = [child for child in tree.root.children.values() if isinstance(child, File)]
    states = [file.key_state for file in files if file.key_state is not None]
    numbers = [n for state in states for n in (state.create_revision, state.mod_revision)]
    assert len({id(number) for number in numbers}) <= 3, "the first key is placed by itself"
    assert len({id(file.mtime_ns) for file in files}) == 1


def test_clear_empties_what_the_kernel_does_not_know() -> None:
    tree = tree_of(b"/", b"/a/b")
    tree.clear()
    assert not tree.root.children
    assert tree.root.marker is None
    tree.check_invariants()


# --- finding --------------------------------------------------------------------------------


def test_inodes_that_the_kernel_does_not_hold_are_stale() -> None:
    tree = tree_of(b"/f")
    file = at(tree, b"f")
    with pytest.raises(StaleError):
        tree.node(file.inode)
    tree.remember(file)
    assert tree.node(file.inode) is file
    with pytest.raises(NotADirectoryFileError):
        tree.directory(file.inode)
    assert tree.directory(1) is tree.root


def test_key_of_a_file_that_lost_its_name() -> None:
    tree = tree_of(b"/d/f", b"/d/g")
    superseded, gone = at(tree, b"d", b"f"), at(tree, b"d", b"g")
    directory = at(tree, b"d")
    assert isinstance(directory, Directory)
    assert isinstance(superseded, File)
    assert isinstance(gone, File)
    tree.detach(directory, b"f", gone=False)
    tree.detach(directory, b"g", gone=True)
    assert tree.key_of(superseded) == b"/d/f"
    assert tree.key_of(gone) is None
    assert not tree.is_attached(superseded)
    assert tree.detach(directory, b"g", gone=True) is None


def test_below_a_detached_directory_nothing_is_attached() -> None:
    tree = tree_of(b"/a/b/c")
    node = at(tree, b"a", b"b", b"c")
    tree.detach(tree.root, b"a", gone=True)
    assert not tree.is_attached(node)
    assert isinstance(node, File)
    assert node.gone


def test_a_number_leads_to_what_is_attached_only() -> None:
    """Whether the kernel holds it or not: it may come back with a handle from a file."""
    tree = tree_of(b"/a/b", b"/c")
    below, other = at(tree, b"a", b"b"), at(tree, b"c")
    assert tree.numbered(below.inode) is below
    tree.detach(tree.root, b"a", gone=True)
    with pytest.raises(StaleError):
        tree.numbered(below.inode)
    assert tree.numbered(other.inode) is other


# --- what the kernel knows ------------------------------------------------------------------


def test_lookups_are_counted() -> None:
    tree = tree_of(b"/f")
    file = at(tree, b"f")
    for _ in range(3):
        tree.remember(file)
    file.kernel_may_cache = True
    tree.forget(file.inode, 2)
    assert tree.statistics().inodes_known == 2
    tree.forget(file.inode, 1)
    assert tree.statistics().inodes_known == 1
    assert not file.kernel_may_cache
    tree.forget(file.inode, 1)
    tree.forget(1, 1)
    assert tree.statistics().inodes_known == 1
    tree.check_invariants()


def test_tree_that_is_not_complete_keeps_what_the_kernel_refers_to() -> None:
    tree = tree_of(b"/a/b/c", b"/a/x", complete=False)
    file = at(tree, b"a", b"b", b"c")
    assert isinstance(file, File)
    tree.remember(file)
    file.handles = 1
    tree.forget(file.inode, 1)
    assert at(tree, b"a", b"b", b"c") is file
    file.handles = 0
    tree.prune(file)
    directory = at(tree, b"a")
    assert isinstance(directory, Directory)
    assert list(directory.children) == [b"x"]
    tree.prune(at(tree, b"a", b"x"))
    assert not tree.root.children


def test_complete_tree_prunes_nothing() -> None:
    tree = tree_of(b"/f")
    tree.prune(at(tree, b"f"))
    assert list(tree.root.children) == [b"f"]


def test_only_a_complete_tree_lets_the_kernel_cache() -> None:
    name = Dentry(tree_of().root.inode, b"f")
    tree = tree_of()
    assert tree.may_cache(name)
    tree.being_changed.add(name)
    assert not tree.may_cache(name)
    assert not tree.tell_negative(tree.root, b"f", 1000)
    assert not tree_of(complete=False).may_cache(name)


def test_missing_names_that_were_told() -> None:
    tree = tree_of()
    assert not tree.may_be_cached(tree.root, b"f")
    assert tree.tell_negative(tree.root, b"f", 1000)
    assert tree.may_be_cached(tree.root, b"f")
    assert tree.statistics().negatives == 1
    tree.attach(tree.root, b"f", tree.new_file(None))
    assert tree.statistics().negatives == 0
    assert not tree.may_be_cached(tree.root, b"f")


def test_missing_names_are_bounded() -> None:
    clock = Clock()
    tree = Tree(ROOT, clock, complete=True)
    for i in range(MAX_NEGATIVES):
        assert tree.tell_negative(tree.root, b"%d" % i, 1000)
    assert not tree.tell_negative(tree.root, b"one more", 1000)
    clock.now += TOLD_LATER_NS + 2000
    assert tree.tell_negative(tree.root, b"one more", 1000)
    assert tree.statistics().negatives == MAX_NEGATIVES


def test_missing_names_make_room_in_the_order_in_which_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(etcdfs.tree.tree, "MAX_NEGATIVES", 3)
    clock = Clock()
    tree = Tree(ROOT, clock, complete=True)
    for name in (b"a", b"b", b"c", b"a"):
        clock.now += 100
        tree.tell_negative(tree.root, name, 1000)
        if name == b"c":
            tree.attach(tree.root, b"c", tree.new_file(None))
    assert tree.tell_negative(tree.root, b"d", 1000)
    clock.now += (
        TOLD_LATER_NS + 850
    )  # now the time of b is up, but not that of a, which was told again
    assert tree.tell_negative(tree.root, b"e", 1000)
    assert not tree.may_be_cached(tree.root, b"b")
    assert tree.may_be_cached(tree.root, b"a")
    assert not tree.tell_negative(tree.root, b"f", 1000)


def test_a_clock_that_jumps_ahead_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdfs.tree.tree, "MAX_NEGATIVES", 1)
    wall, passed = Clock(), Clock()
    tree = Tree(ROOT, wall, monotonic=passed, complete=True)
    assert tree.tell_negative(tree.root, b"a", 1000)
    wall.now += HOUR_NS
    assert not tree.tell_negative(tree.root, b"b", 1000)
    assert tree.may_be_cached(tree.root, b"a"), "the kernel has it still"
    passed.now += TOLD_LATER_NS + 1000
    assert tree.tell_negative(tree.root, b"b", 1000)


def test_names_in_a_forgotten_directory_are_not_told() -> None:
    tree = tree_of(b"/d/f")
    directory, file = at(tree, b"d"), at(tree, b"d", b"f")
    assert isinstance(directory, Directory)
    file.kernel_may_cache = True
    assert not tree.may_be_cached(directory, b"f")
    tree.remember(directory)
    assert tree.may_be_cached(directory, b"f")


def test_listing_of() -> None:
    tree = tree_of(b"/d/f")
    directory = at(tree, b"d")
    assert isinstance(directory, Directory)
    assert tree.listing_of(tree.root) == CachedAttributes(tree.root.inode, None)
    within = Dentry(tree.root.inode, b"d")
    assert tree.listing_of(directory) == CachedAttributes(directory.inode, within)


# --- versions -------------------------------------------------------------------------------


def held_file(tree: Tree) -> File:
    """Return the file `f`, which the kernel holds."""
    file = tree.new_file(KeyState(Revision(2), Revision(2), 1, 0, 1))
    tree.attach(tree.root, b"f", file)
    tree.remember(file)
    return file


def test_a_newer_version_answers_for_one_that_was_open() -> None:
    tree = Tree(ROOT, Clock(), complete=True)
    old = held_file(tree)
    old.handles = 1
    assert not tree.may_follow(old)
    new = tree.new_version(old, KeyState(Revision(2), Revision(3), 2, 0, 1))
    tree.detach(tree.root, b"f", gone=False)
    tree.attach(tree.root, b"f", new)
    assert tree.current(old) is tree.current(new) is new
    tree.detach(tree.root, b"f", gone=True)
    assert tree.current(old) is old


@pytest.mark.parametrize("how", ["removed", "another type"])
def test_nothing_else_answers_for_what_is_no_version_of_it(how: str) -> None:
    tree = Tree(ROOT, Clock(), complete=True)
    old = held_file(tree)
    old.removed = how == "removed"
    tree.detach(tree.root, b"f", gone=True)
    assert tree.returning(tree.root, b"f") is (None if how == "removed" else old)
    new = tree.new_file(KeyState(Revision(3), Revision(3), 1, 0, 1))
    new.stored_record = StoredRecord(
        Record(type=None if how == "removed" else "symlink"), NOT_IN_ETCD
    )
    tree.attach(tree.root, b"f", new)
    assert tree.current(old) is old


def test_what_was_let_go_of_since_it_was_open_has_no_pages() -> None:
    tree = Tree(ROOT, Clock(), complete=True)
    file = held_file(tree)
    file.pages, file.value, file.pages_pushed = 2, b"v", True
    tree.renew(file, KeyState(Revision(2), Revision(3), 2, 0, 1))
    assert kept_of(file) == (2, None, False, 3)
    file.pages_invalidated = True
    before = file.mtime_ns
    tree.renew(file, KeyState(Revision(2), Revision(4), 3, 0, 1))
    assert kept_of(file) == (None, None, False, 4)
    assert file.mtime_ns > before


def kept_of(file: File) -> tuple[object, ...]:
    return file.pages, file.value, file.pages_pushed, file.version


def test_what_is_held_comes_back_until_the_kernel_forgets_it() -> None:
    tree = Tree(ROOT, Clock(), complete=True)
    file = held_file(tree)
    directory = tree.new_directory()
    tree.attach(tree.root, b"d", directory)
    tree.remember(directory)
    for name in (b"d", b"f"):
        tree.detach(tree.root, name, gone=True)
    assert tree.directory_at(tree.root, b"d") is directory
    assert tree.returning(tree.root, b"f") is file
    tree.attach(tree.root, b"d", directory)
    assert tree.directory_at(tree.root, b"d") is not directory
    tree.forget(file.inode, 1)
    assert tree.returning(tree.root, b"f") is None
    assert not tree.held


def test_directories_that_are_gone_are_kept_up_to_a_limit() -> None:
    tree = Tree(ROOT, Clock(), complete=True)
    names = [b"%d" % number for number in range(MAX_VANISHED + 2)]
    for name in names:
        directory = tree.new_directory()
        tree.attach(tree.root, name, directory)
        tree.remember(directory)
        tree.detach(tree.root, name, gone=True)
    root = tree.root.inode
    assert tree.held.excess() == {Dentry(root, names[0]), Dentry(root, names[1])}
    assert tree.held.excess() == set()


def test_numbers_lead_to_what_has_a_name() -> None:
    tree = tree_of(b"/d/f")
    directory = at(tree, b"d")
    assert isinstance(directory, Directory)
    file = at(tree, b"d", b"f")
    assert tree.numbered(file.inode) is file
    new = tree.new_file(KeyState(Revision(2), Revision(2), 1, 0, 1))
    tree.attach(directory, b"g", new)
    assert tree.numbered(new.inode) is new
    assert tree.numbered(directory.inode) is directory
    tree.detach(directory, b"f", gone=True)
    with pytest.raises(StaleError):
        tree.numbered(file.inode)


def test_new_version_has_a_later_mtime_even_if_the_clock_went_back() -> None:
    clock = Clock()
    tree = Tree(ROOT, clock, complete=True)
    old = tree.new_file(KeyState(Revision(2), Revision(2), 1, 0, 1))
    clock.now -= 500
    new = tree.new_version(old, KeyState(Revision(2), Revision(3), 2, 0, 1))
    assert new.mtime_ns == new.ctime_ns > old.mtime_ns
    assert new.inode != old.inode
    clock.now += 5000
    assert tree.new_version(new, KeyState(Revision(2), Revision(4), 3, 0, 1)).mtime_ns == clock.now


@pytest.mark.parametrize(("created", "kept"), [(2, True), (5, False)])
def test_attributes_stay_with_the_incarnation(created: int, kept: bool) -> None:
    tree = tree_of(b"/f")
    old = at(tree, b"f")
    assert isinstance(old, File)
    old.stored_record = stored_record = object()  # type: ignore[assignment]
    new = tree.new_version(old, KeyState(Revision(created), Revision(5), 1, 0, 1))
    assert (new.stored_record is stored_record) == kept


def test_directory_times_never_go_back() -> None:
    tree = tree_of()
    seen = [tree.root.mtime_ns]
    tree.attach(tree.root, b"f", tree.new_file(None))
    seen.append(tree.root.mtime_ns)
    tree.detach(tree.root, b"f", gone=True)
    seen.append(tree.root.mtime_ns)
    assert seen == [1000, 1001, 1002]
