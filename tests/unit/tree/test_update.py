"""Batches of events: what they make of the tree, and what the kernel must be told."""

from collections.abc import Iterable

from hypothesis import example, given
from hypothesis import strategies as st

from etcdfs.keyspace.attribute_records import record_key
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import Delete, Event, KeyValue, Put, Revision, Tombstone, Transaction
from etcdfs.tree.bulk_load import load
from etcdfs.tree.changes import Intent, Relocation
from etcdfs.tree.inodes import (
    NOT_IN_ETCD,
    CachedAttributes,
    Dentry,
    Directory,
    Expiry,
    File,
    KeyState,
    Node,
    key_state_of,
)
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import Update
from tests.support.fake_store import FakeStore

ROOT = Keyspace(b"/")
_components = st.sampled_from([b"a", b"a", b"a", b"b", b"a-b", b""])
_keys = st.lists(_components, min_size=1, max_size=3).map(lambda c: b"/" + b"/".join(c))
_changes = st.lists(
    st.lists(st.tuples(_keys, st.one_of(st.none(), st.binary(max_size=2))), min_size=1, max_size=3),
    max_size=6,
)


def tree_of(store: FakeStore) -> Tree:
    tree = Tree(ROOT, lambda: 1000, complete=True)
    load(tree, store.range_now(b"/", b"0").entries)
    return tree


def made(*keys: bytes) -> tuple[FakeStore, Tree, Update]:
    store = FakeStore()
    for key in keys:
        store.put_now(key, b"" if key.endswith(b"/") else b"v")
    tree = tree_of(store)
    return store, tree, Update(tree)


def at(tree: Tree, *names: bytes) -> Node:
    node: Node = tree.root
    for name in names:
        assert isinstance(node, Directory)
        node = node.children[name]
    return node


def file_at(tree: Tree, *names: bytes) -> File:
    node = at(tree, *names)
    assert isinstance(node, File)
    return node


def since(store: FakeStore, revision: int) -> list[Event]:
    return [e for r in range(revision + 1, store.revision + 1) for e in store.events_of(r)]


def shape(tree: Tree) -> dict[tuple[bytes, ...], object]:
    found: dict[tuple[bytes, ...], object] = {}
    for directory in tree.directories():
        names = tree.names(directory)
        found[names] = directory.marker
        for name, child in directory.children.items():
            if isinstance(child, File):
                found[*names, name] = child.key_state
    return found


def apply(update: Update, events: Iterable[Event]) -> None:
    update.apply(update.plan(events))


def commit(store: FakeStore, changes: list[tuple[bytes, bytes | None]]) -> None:
    then = {k: Delete(k) if value is None else Put(k, value) for k, value in changes}
    store.commit_now(Transaction(then=tuple(then.values())))


# --- what becomes of the tree ---------------------------------------------------------------


@given(before=_changes, batch=_changes)
def test_a_batch_makes_the_tree_what_a_listing_would(
    before: list[list[tuple[bytes, bytes | None]]], batch: list[list[tuple[bytes, bytes | None]]]
) -> None:
    store = FakeStore()
    for changes in before:
        commit(store, changes)
    tree = tree_of(store)
    revision = store.revision
    for changes in batch:
        commit(store, changes)
    events = since(store, revision)
    update = Update(tree)
    untouched = shape(tree)
    plan = update.plan(events)
    assert shape(tree) == untouched, "planning changes nothing"
    update.apply(plan)
    tree.check_invariants()
    assert shape(tree) == shape(tree_of(store))
    again = update.plan(events)
    assert not list(again.changes()), "the same batch once more changes nothing"


@given(before=_changes, batch=_changes, size=st.integers(1, 3))
def test_a_batch_in_parts_makes_the_tree_what_a_listing_would(
    before: list[list[tuple[bytes, bytes | None]]],
    batch: list[list[tuple[bytes, bytes | None]]],
    size: int,
) -> None:
    store = FakeStore()
    for changes in before:
        commit(store, changes)
    tree, whole = tree_of(store), tree_of(store)
    revision = store.revision
    for changes in batch:
        commit(store, changes)
    last = list({event.key: event for event in since(store, revision)}.values())
    update, one_step = Update(tree), Update(whole)
    tree.disturbed = set()
    found = [
        update.plan_part(last[first : first + size], (), force=False)
        for first in range(0, len(last), size)
    ]
    parts = [part for part, _ in found]
    assert all(map(update.holds, parts))
    rest = update.plan_rest([e for _, others in found for e in others], parts, force=False)
    update.publish_parts(parts, rest)
    tree.check_invariants()
    one_step.apply(one_step.plan(last))
    assert shape(tree) == shape(tree_of(store)) == shape(whole)
    for directory in tree.directories():
        other = at(whole, *tree.names(directory))
        assert isinstance(other, Directory)
        assert directory.subdirectories == other.subdirectories


@given(before=_changes, batch=_changes)
@example(before=[[(b"/a", b"v"), (b"/a/b", b"v")]], batch=[[(b"/a/b", None)]])
def test_the_kernel_is_told_exactly_of_what_changed(
    before: list[list[tuple[bytes, bytes | None]]], batch: list[list[tuple[bytes, bytes | None]]]
) -> None:
    store = FakeStore()
    for changes in before:
        commit(store, changes)
    tree = tree_of(store)
    for directory in list(tree.directories()):
        for child in (directory, *directory.children.values()):
            tree.remember(child)
            child.kernel_may_cache = True
    held = {
        Dentry(d.inode, name): child.inode
        for d in tree.directories()
        for name, child in d.children.items()
    }
    revision = store.revision
    for changes in batch:
        commit(store, changes)
    update = Update(tree)
    plan = update.plan(since(store, revision))
    written = {name for file in plan.renewed if (name := tree.listing_of(file).within)}
    stale = update.invalidations(plan)
    uncacheable = update.uncacheable(plan)
    assert stale <= uncacheable
    update.apply(plan)
    now = {
        Dentry(d.inode, name): child.inode
        for d in tree.directories()
        for name, child in d.children.items()
    }
    assert {
        c.within if isinstance(c, Expiry) else c
        for c in stale
        if not isinstance(c, CachedAttributes)
    } == {name for name, inode in held.items() if now.get(name) != inode}
    assert {c.inode for c in stale if isinstance(c, CachedAttributes) and c.within in written} >= {
        now[name] for name in written if now.get(name) == held.get(name)
    }, "the attributes of what follows its key"


def test_key_that_becomes_a_directory_and_a_file_again() -> None:
    store, tree, update = made(b"/a")
    file = at(tree, b"a")
    revision = store.revision
    store.put_now(b"/a/b", b"v")
    apply(update, since(store, revision))
    assert at(tree, b"a", b"%value") is file
    revision = store.revision
    store.delete_now(b"/a/b")
    apply(update, since(store, revision))
    assert at(tree, b"a") is file
    tree.check_invariants()


def test_deep_directory_goes_with_its_last_key() -> None:
    store, tree, update = made(b"/a/b/c", b"/a/")
    directory = at(tree, b"a")
    revision = store.revision
    store.delete_now(b"/a/b/c")
    apply(update, since(store, revision))
    assert at(tree, b"a") is directory
    assert isinstance(directory, Directory)
    assert not directory.children


def test_what_no_key_is_of_keeps_no_directory() -> None:
    """Part of a long name that was made here; what has a marker in etcd stays."""
    for is_part in (True, False):
        store, tree, update = made(b"/a/f")
        above = at(tree, b"a")
        assert isinstance(above, Directory)
        below = tree.new_directory()
        below.marker = NOT_IN_ETCD if is_part else KeyState(Revision(1), Revision(1), 1, 0, 0)
        update.add_local(above, b"part", below)
        revision = store.revision
        store.delete_now(b"/a/f")
        apply(update, since(store, revision))
        assert set(tree.root.children) == (set() if is_part else {b"a"})


def test_older_events_are_ignored_unless_by_force() -> None:
    _, tree, update = made(b"/f", b"/d/")
    file, directory = file_at(tree, b"f"), at(tree, b"d")
    old: list[Event] = [
        KeyValue(b"/f", b"older", Revision(1), Revision(1), 1),
        Tombstone(b"/d/", Revision(1)),
    ]
    apply(update, old)
    assert at(tree, b"f") is file
    assert at(tree, b"d") is directory
    update.apply(update.plan(old, force=True))
    assert file_at(tree, b"f").version == 1
    assert b"d" not in tree.root.children


def test_deletion_of_what_is_not_there() -> None:
    _, tree, update = made(b"/d/f")
    before = shape(tree)
    gone: list[Event] = [
        Tombstone(key, Revision(9)) for key in (b"/x", b"/x/y", b"/d", b"/d/f/g", b"/x/")
    ]
    apply(update, gone)
    assert shape(tree) == before


# --- this mount's own changes ---------------------------------------------------------------


def test_own_put_keeps_the_inode() -> None:
    store, tree, update = made(b"/f")
    file = file_at(tree, b"f")
    update.intents[b"/f"] = Intent(file=file, value=b"mine")
    revision = store.revision
    store.put_now(b"/f", b"mine")
    plan = update.plan(since(store, revision))
    assert not update.invalidations(plan)
    update.apply(plan)
    assert at(tree, b"f") is file
    assert file.key_state is not None
    assert file.key_state.mod_revision == store.revision


def test_foreign_put_of_another_value_is_not_ours() -> None:
    store, tree, update = made(b"/f")
    file = file_at(tree, b"f")
    file.handles = 1
    update.intents[b"/f"] = Intent(file=file, value=b"mine")
    revision = store.revision
    store.put_now(b"/f", b"theirs")
    apply(update, since(store, revision))
    assert at(tree, b"f") is not file
    assert tree.key_of(file) == b"/f", "superseded, not deleted"


def test_own_rename_moves_the_file() -> None:
    store, tree, update = made(b"/f", b"/g")
    file, replaced = file_at(tree, b"f"), file_at(tree, b"g")
    update.intents[b"/f"] = Intent(file=file)
    update.intents[b"/g"] = Intent(file=file, value=b"v", replaces=True)
    revision = store.revision
    commit(store, [(b"/f", None), (b"/g", b"v")])
    apply(update, since(store, revision))
    assert at(tree, b"g") is file
    assert b"f" not in tree.root.children
    assert tree.key_of(replaced) is None
    tree.check_invariants()


def test_a_directory_goes_with_the_last_that_is_moved_out_of_it() -> None:
    """Unless it has a marker, as it has where this mount knew that nothing else is in it."""
    store, tree, update = made(b"/a/b/d/f", b"/c/d/f", b"/c/")
    for above in ((b"a", b"b"), (b"c",)):
        key, old, new = b"/" + b"/".join((*above, b"d/f")), at(tree, *above), b"new-" + above[0]
        node, source = at(tree, *above, b"d"), store.current(key)
        assert isinstance(old, Directory)
        assert source is not None
        update.relocations = [
            Relocation(
                places=((node, tree.root, new),),
                leaves=((old, b"d"),),
                origins={b"/" + new + b"/f": source.mod_revision},
                values={b"/" + new + b"/f": b"v"},
                gone=frozenset((key,)),
            )
        ]
        revision = store.revision
        commit(store, [(key, None), (b"/" + new + b"/f", b"v")])
        apply(update, since(store, revision))
        assert at(tree, new) is node
        tree.check_invariants()
    assert tree.root.children.keys() == {b"c", b"new-a", b"new-c"}


def test_put_and_deletion_of_a_new_file_in_one_batch() -> None:
    """The put is ours, so what another client deleted right after it was ours."""
    store, tree, update = made()
    file = tree.new_file(None)
    tree.attach(tree.root, b"f", file)
    update.intents[b"/f"] = Intent(file=file, value=b"mine")
    store.put_now(b"/f", b"mine")
    store.delete_now(b"/f")
    apply(update, since(store, 1))
    assert not tree.root.children


def test_deletion_of_an_older_version_spares_a_new_file() -> None:
    store, tree, update = made()
    file = tree.new_file(None)
    tree.attach(tree.root, b"f", file)
    store.put_now(b"/f", b"theirs")
    store.delete_now(b"/f")
    apply(update, since(store, 1))
    assert at(tree, b"f") is file


def test_emptied_marker_of_ours_is_not_shown() -> None:
    store, tree, update = made(b"/d/")
    directory = at(tree, b"d")
    assert isinstance(directory, Directory)
    file = tree.new_file(None)
    tree.attach(directory, b"%marker", file)
    update.intents[b"/d/"] = Intent(file=file, value=b"")
    revision = store.revision
    store.put_now(b"/d/", b"")
    apply(update, since(store, revision))
    assert not directory.children


def test_locked_names_are_not_invalidated() -> None:
    """The kernel puts them right by itself when the call returns."""
    store, tree, update = made(b"/f", b"/g")
    for name in (b"f", b"g"):
        tree.remember(at(tree, name))
        at(tree, name).kernel_may_cache = True
    update.locked[Dentry(tree.root.inode, b"f")] = 1
    revision = store.revision
    commit(store, [(b"/f", None), (b"/g", None)])
    inodes = [tree.root.inode, at(tree, b"f").inode, at(tree, b"g").inode]
    stale = update.invalidations(update.plan(since(store, revision)))
    attributes = {CachedAttributes(inode, None) for inode in inodes}
    assert stale == {Dentry(tree.root.inode, b"g"), *attributes}, "whoever holds them may ask"


# --- ahead of the watch ---------------------------------------------------------------------


def test_ahead_of_the_watch() -> None:
    store, tree, update = made(b"/f")
    file = file_at(tree, b"f")
    tree.remember(file)
    file.kernel_may_cache = True
    revision = store.revision
    store.put_now(b"/f", b"theirs")
    store.delete_now(b"/f")
    events = since(store, revision)
    stale = update.apply_ahead(events[1:], remember=True)
    assert Dentry(tree.root.inode, b"f") in stale
    assert not tree.root.children
    apply(update, events[:1])
    assert not tree.root.children, "an older event does not undo it"
    update.reached(store.revision)
    store.put_now(b"/f", b"new")
    apply(update, since(store, revision + 2))
    assert file_at(tree, b"f").key_state is not None


def test_another_history_knows_nothing_of_what_was_ahead() -> None:
    _, tree, update = made()
    update.apply_ahead([Tombstone(b"/f", Revision(100))], remember=True)
    update.relisted()
    apply(update, [KeyValue(b"/f", b"v", Revision(3), Revision(3), 1)])
    assert list(tree.root.children) == [b"f"]


def test_withdrawn_file_takes_the_directory_that_only_it_kept() -> None:
    store, tree, update = made(b"/d/f")
    directory = at(tree, b"d")
    assert isinstance(directory, Directory)
    tree.remember(directory)
    directory.kernel_may_cache = True
    tree.attach(directory, b"new", tree.new_file(None))
    revision = store.revision
    store.delete_now(b"/d/f")
    apply(update, since(store, revision))
    assert list(directory.children) == [b"new"]
    stale = update.withdraw(directory, b"new", gone=True)
    assert Expiry(Dentry(tree.root.inode, b"d")) in stale
    assert not tree.root.children
    tree.check_invariants()


def test_a_file_that_becomes_a_link_is_another_inode() -> None:
    """The kernel never lets an inode change its type."""
    store, tree, update = made(b"/f", b"/g")
    link, other = file_at(tree, b"f"), file_at(tree, b"g")
    tree.remember(link)
    tree.remember(other)
    revision = store.revision
    store.put_now(record_key(b"/f"), b'{"type":"symlink"}')
    store.put_now(record_key(b"/g"), b'{"mode":"0600"}')
    apply(update, since(store, revision))
    assert file_at(tree, b"f") is not link
    assert file_at(tree, b"g") is other
    tree.check_invariants()


def test_a_value_of_a_marker_goes_with_the_marker() -> None:
    store, tree, update = made(b"/d/", b"/d/x")
    for value, names in ((b"v", {b"x", b"%marker"}), (None, {b"x"})):
        revision = store.revision
        commit(store, [(b"/d/", value)])
        apply(update, since(store, revision))
        directory = at(tree, b"d")
        assert isinstance(directory, Directory)
        assert directory.children.keys() == names


def test_what_is_put_in_a_files_place_tells_whether_its_key_is_gone() -> None:
    for created, gone in ((1, False), (9, True)):
        store, tree, update = made(b"/f")
        old, source = file_at(tree, b"f"), store.current(b"/f")
        assert source is not None
        tree.remember(old)
        over = KeyValue(b"/f", b"w", Revision(created * source.create_revision), Revision(20), 2)
        new = tree.new_version(old, key_state_of(over))
        update.replace(tree.root, b"f", new, over=over)
        assert (at(tree, b"f"), old.gone) == (new, gone)
