"""What a held inode shows, held to a model: an inode that is never looked up again.

Another client and this mount change one key in any order, while the inode that the path had at
first is held as by a bind mount, and opened, and closed again.
"""

import os
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.fake_kernel import FakeMount, KernelHandle, KernelInode, open_mount
from tests.support.fake_store import FakeStore

PATH = (b"f",)
KEY = b"/f"

steps = st.lists(
    st.sampled_from(
        [
            *("put", "put same", "delete", "directory", "no directory"),
            *("write", "replace", "unlink"),
            *("hold open", "path open", "close", "wait_until_visible"),
        ]
    ),
    max_size=12,
)


@dataclass
class Model:
    """What the held inode is to show.

    Attributes:
        last: The content that it showed last.
        past: All that its key has held.
        is_removed: Whether this mount took its name away: it follows its key no longer.
    """

    last: bytes
    past: set[bytes]
    is_removed: bool = False
    open: list[tuple[KernelHandle, bytes]] = field(default_factory=list)

    def may_show(self, current: bytes | None) -> set[bytes]:
        """Return what may be read: the key's value, or while there is none, one that it had."""
        if self.is_removed:
            return {self.last}
        if current is None:
            return self.past
        self.last = current
        self.past.add(current)
        return {current}


async def _live(happenings: list[str], *, cache: bool) -> None:
    store = FakeStore()
    store.put_now(KEY, b"first")
    async with open_mount(store, cache=cache) as mount:
        inode = await mount.kernel.walk(PATH)
        model = Model(b"first", {b"first"})
        for number, what in enumerate(happenings):
            await _happen(mount, store, model, inode, what, b"%d" % number * (number + 1))
            await trio.testing.wait_all_tasks_blocked()
            await _check(mount, store, model, inode)
        for handle, _ in model.open:
            await mount.kernel.close(handle)
        model.open.clear()
        await _check(mount, store, model, inode)
        mount.check_invariants()


async def _happen(
    mount: FakeMount, store: FakeStore, model: Model, inode: KernelInode, what: str, value: bytes
) -> None:
    match what:
        case "hold open":
            await _open(mount, store, model, inode)
        case "path open" if is_file(store):
            handle = await mount.kernel.open(PATH, os.O_RDONLY)
            model.open.append((handle, current(store) or b""))
        case "close" if model.open:
            await mount.kernel.close(model.open.pop(0)[0])
        case "write" | "replace" | "unlink" if is_file(store):
            await _change_here(mount, store, model, inode, what, value)
        case _:
            _change_there(store, what, value)


def _change_there(store: FakeStore, what: str, value: bytes) -> None:
    match what:
        case "put":
            store.put_now(KEY, value)
        case "put same" if store.current(KEY) is not None:
            store.put_now(KEY, current(store) or b"")
        case "delete" if store.current(KEY) is not None:
            store.delete_now(KEY)
        case "directory":
            store.put_now(KEY + b"/below", b"x")
        case "no directory" if store.current(KEY + b"/below") is not None:
            store.delete_now(KEY + b"/below")


async def _change_here(
    mount: FakeMount, store: FakeStore, model: Model, inode: KernelInode, what: str, value: bytes
) -> None:
    kernel = mount.kernel
    match what:
        case "write":
            handle = await kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
            is_shared = [h.inode is handle.inode for h, _ in model.open]
            await kernel.write(handle, 0, value)
            await kernel.close(handle)
            model.open = [
                (h, value if shared else before)
                for (h, before), shared in zip(model.open, is_shared, strict=True)
            ]
        case _:
            is_held = (await kernel.walk(PATH)).number == inode.number
            model.may_show(current(store))
            if what == "unlink":
                await kernel.unlink(PATH)
            else:
                other = await kernel.open((b"new",), os.O_CREAT | os.O_WRONLY)
                await kernel.write(other, 0, value)
                await kernel.close(other)
                await kernel.rename((b"new",), PATH)
            model.is_removed |= is_held


async def _open(mount: FakeMount, store: FakeStore, model: Model, inode: KernelInode) -> None:
    handle = await mount.kernel.reopen(inode, os.O_RDONLY)
    content = await mount.kernel.read(handle)
    assert content in model.may_show(current(store))
    model.open.append((handle, content))


async def _check(mount: FakeMount, store: FakeStore, model: Model, inode: KernelInode) -> None:
    for handle, content in model.open:
        if not handle.is_direct:  # what was written here since is seen
            assert await mount.kernel.read(handle) == content
    handle = await mount.kernel.reopen(inode, os.O_RDONLY)
    assert await mount.kernel.read(handle) in model.may_show(current(store))
    await mount.kernel.close(handle)


def current(store: FakeStore) -> bytes | None:
    entry = store.current(KEY)
    return None if entry is None else entry.value


def is_file(store: FakeStore) -> bool:
    return store.current(KEY) is not None and store.current(KEY + b"/below") is None


@pytest.mark.parametrize("cache", [True, False])
@given(happenings=steps)
# Who has opened the inode past its own version may have it mapped: its pages are not to be locked.
@example(happenings=["hold open", "put", "hold open", "unlink", "close", "put"])
def test_a_held_inode_shows_what_its_key_holds(happenings: list[str], *, cache: bool) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0.0)

    async def live() -> None:
        await _live(happenings, cache=cache)

    trio.run(live, clock=clock)
