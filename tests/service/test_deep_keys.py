"""Keys with so many names that a function which calls itself for each would not come back.

A path has at most `MAX_DEPTH` directories, but the name of a long key part goes on in as many as
it takes.
"""

from trio.testing import MockClock

from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import Delete, Put, Transaction, range_end
from tests.service.mirrors import content, quiet
from tests.support.fake_kernel import open_mount
from tests.support.fake_store import FakeStore

LONG = b"/a/" + b"L" * 300_000
"""More names than Python has frames for by default."""


async def test_a_long_key_and_one_beside_it_are_deleted_in_one_revision(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    path = Keyspace(b"/").locate(LONG).names
    assert len(path) > 1000
    store.commit_now(Transaction((), (Put(LONG, b"long"), Put(b"/a/b", b"beside"))))
    async with open_mount(store) as mount:
        assert await content(mount, path) == b"long"
        store.commit_now(Transaction((), (Delete(b"/a/", range_end(b"/a/")),)))
        store.put_now(b"/after", b"1")
        await quiet(mount)
        assert await mount.kernel.listdir(()) == [b"after"]
        assert list(mount.tree.directories()) == [mount.tree.root]
        assert mount.mirror.state_machine is not None
        assert mount.mirror.state_machine.statistics().doubts == 0


async def test_what_was_looked_up_of_a_long_key_goes_with_it(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.put_now(b"/after", b"1")
    async with open_mount(store, cache=False) as mount:
        tree, directory = mount.tree, mount.tree.root
        for name in Keyspace(b"/").locate(LONG).names:  # as if it had been there
            made = tree.new_directory()
            tree.attach(directory, name, made)
            directory = made
        assert await mount.kernel.listdir(()) == [b"after"]
        assert list(tree.directories()) == [tree.root]


async def test_a_tree_taken_away_as_a_whole_is_taken_from_its_leaves_up(
    autojump_clock: MockClock, store: FakeStore
) -> None:
    store.commit_now(Transaction((), (Put(LONG, b"long"), Put(b"/a/b", b"beside"))))
    async with open_mount(store) as mount:
        file, _ = mount.tree.find(LONG) or (None, None)
        mount.tree.detach(mount.tree.root, b"a", gone=False)
        assert file is not None
        assert file.directory is None
