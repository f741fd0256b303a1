"""What a mount shows can be copied out of it, removed, and copied back to the same keys."""

import os
import stat
from collections.abc import Iterator

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from etcdfs.keyspace.attribute_records import is_record_key
from tests.support.awkward_keys import components
from tests.support.fake_kernel import FakeKernel, Path, open_mount
from tests.support.fake_store import FakeStore

Tree = dict[bytes, "Tree | bytes"]
LONG = b"x" * 300

rels = st.lists(components, min_size=1, max_size=3).map(b"/".join)
keyspaces = st.dictionaries(rels, st.sampled_from((b"", b"1", b"2")), max_size=6)


async def copied_out(kernel: FakeKernel, path: Path) -> Tree:
    found: Tree = {}
    for name in await kernel.listdir(path):
        if stat.S_ISDIR((await kernel.stat((*path, name))).mode):
            found[name] = await copied_out(kernel, (*path, name))
        else:
            handle = await kernel.open((*path, name), os.O_RDONLY)
            found[name] = await kernel.read(handle)
            await kernel.close(handle)
    return found


async def remove(kernel: FakeKernel, path: Path, tree: Tree) -> None:
    for name, below in tree.items():
        if isinstance(below, bytes):
            await kernel.unlink((*path, name))
        else:
            await remove(kernel, (*path, name), below)
            await kernel.rmdir((*path, name))


async def copy_in(kernel: FakeKernel, path: Path, tree: Tree, *, by_rename: bool) -> None:
    """Copy as tar and cp do, or as rsync does, to a name like `.name.a1B2c3`."""
    for name, below in tree.items():
        if not isinstance(below, bytes):
            await kernel.mkdir((*path, name))
            await copy_in(kernel, (*path, name), below, by_rename=by_rename)
            continue
        made = b"." + name[:247] + b".a1B2c3" if by_rename else name
        handle = await kernel.open((*path, made), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        await kernel.write(handle, 0, below)
        await kernel.close(handle)
        if by_rename:
            await kernel.rename((*path, made), (*path, name))


def markers_of(key: bytes, prefix: bytes) -> Iterator[bytes]:
    return (key[: at + 1] for at in range(len(prefix), len(key)) if key[at : at + 1] == b"/")


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@settings(max_examples=settings().max_examples // 5)  # each is some hundred calls
@given(
    rels=keyspaces,
    prefix=st.sampled_from((b"/", b"", b"/app/")),
    by_rename=st.booleans(),
)
@example(rels={b"a//b": b"1", b"a/c": b"1"}, prefix=b"/", by_rename=True)
@example(rels={b"m/": b"init_dir", b"m//x": b"1", b"m/1": b"x"}, prefix=b"/", by_rename=True)
@example(rels={b"/key": b"1", b"/.etcdfs/x": b"1", b"//": b"1"}, prefix=b"", by_rename=False)
@example(rels={LONG + b"/z": b"1", LONG + b"\0y": b"1", LONG: b"2"}, prefix=b"/", by_rename=True)
@example(rels={b"v": b"1", b"v/": b"2", b"v/w": b"3", b"": b"4"}, prefix=b"/app/", by_rename=True)
def test_b8_every_keyspace_is_copied_back_to_the_same_keys(
    cache: bool, rels: dict[bytes, bytes], prefix: bytes, by_rename: bool
) -> None:
    check_copied_back(rels, prefix, cache=cache, by_rename=by_rename)


@pytest.mark.parametrize("by_rename", [True, False])
def test_b8_what_is_too_deep_for_directories_is_copied_back(by_rename: bool) -> None:
    # With the mirror, as without each step of each path asks etcd.
    above = b"a/" * 255
    rels = {above + b"b//c": b"1", above + LONG + b"/": b"2", above + b"plain": b"3"}
    check_copied_back(rels, b"/", cache=True, by_rename=by_rename)


def check_copied_back(
    rels: dict[bytes, bytes], prefix: bytes, *, cache: bool, by_rename: bool
) -> None:
    keys = {prefix + rel: value for rel, value in rels.items() if prefix + rel}
    keys = {key: value for key, value in keys.items() if not is_record_key(key)}
    store = FakeStore()
    # Of one more user's attributes, which are nobody's entries.
    stored_record = b"/.etcdfs/attrs//other/key"
    store.put_now(stored_record, b"{}")

    def found() -> dict[bytes, bytes]:
        entries = store.range_now(b"\0", b"\0").entries
        return {entry.key: entry.value for entry in entries if entry.key != stored_record}

    async def run() -> None:
        for key, value in keys.items():
            store.put_now(key, value)
        async with open_mount(store, cache=cache, prefix=prefix) as mount:
            tree = await copied_out(mount.kernel, ())
            await remove(mount.kernel, (), tree)
            assert found().keys() <= {prefix}
            assert not any(found().values())
            await copy_in(mount.kernel, (), tree, by_rename=by_rename)
            assert await copied_out(mount.kernel, ()) == tree
        # Directories have markers now.
        made = {marker for key in keys for marker in markers_of(key, prefix)} | {prefix}
        assert {k: v for k, v in found().items() if v or k not in made - keys.keys()} == keys

    trio.run(run, clock=MockClock(autojump_threshold=0))
