"""What becomes of a write buffer: one put, on the right base, or an error and nothing."""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from etcdfs.errors import (
    OutcomeUnknownError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from etcdfs.keyspace.store import Put
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

KEY = b"/f"
PATH = (b"f",)
APPEND = os.O_WRONLY | os.O_APPEND
WHOLE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def held(store: FakeStore, key: bytes = KEY) -> bytes | None:
    found = store.current(key)
    return None if found is None else found.value


async def errno_of(call: Awaitable[Any]) -> int:
    try:
        await call
    except OSError as exc:
        return exc.errno or -1
    return 0


async def shown(mount: FakeMount, path: tuple[bytes, ...] = PATH) -> bytes:
    """Return what a program finds at a path, once the kernel has heard of what went before."""
    await trio.testing.wait_all_tasks_blocked()
    with trio.fail_after(30):
        handle = await mount.kernel.open(path, os.O_RDONLY)
        try:
            return await mount.kernel.read(handle)
        finally:
            await mount.kernel.close(handle)


async def write_whole(mount: FakeMount, value: bytes) -> None:
    handle = await mount.kernel.open(PATH, WHOLE)
    await mount.kernel.write(handle, 0, value)
    await mount.kernel.close(handle)


async def during_commit(store: FakeStore, call: Callable[[], Awaitable[Any]], then: Any) -> int:
    """Make a call, and do something between its check and its commit; return its errno."""
    result: list[int] = []

    async def run() -> None:
        result.append(await errno_of(call()))

    async with trio.open_nursery() as nursery:
        store.hold("commit")
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        then()
        store.release("commit")
    return result[0]


# --- kinds of change ------------------------------------------------------------------------


async def test_new_file_is_one_put(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        assert held(store) is None
        await mount.kernel.write(handle, 0, b"one ")
        await mount.kernel.write(handle, 4, b"two")
        before = store.revision
        await mount.kernel.close(handle)
        assert held(store) == b"one two"
        assert store.revision == before + 1
        assert await shown(mount) == b"one two"


async def test_replacement_is_one_put(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"new")
        await mount.kernel.close(handle)
        assert (held(store), store.revision) == (b"new", before + 1)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY, APPEND])
async def test_nothing_changed_puts_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        await mount.kernel.close(await mount.kernel.open(PATH, flags))
        assert store.revision == before


async def test_same_content_puts_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"same")
    async with open_mount(store, cache=cache) as mount:
        before = store.revision
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"same")
        await mount.kernel.close(handle)
        assert store.revision == before
        assert mount.writeback.statistics().unchanged == 1


async def test_same_content_still_overwrites_a_foreign_change(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"same")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"same")
        store.put_now(KEY, b"foreign")
        await mount.kernel.close(handle)
        assert held(store) == b"same"
        assert await shown(mount) == b"same"


async def test_last_writer_of_the_whole_wins(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"mine")
        number = await during_commit(
            store,
            lambda: mount.kernel.close(handle),
            lambda: store.put_now(KEY, b"foreign"),
        )
        assert number == 0
        assert held(store) == b"mine"
        assert await shown(mount) == b"mine"


async def test_append_is_applied_to_the_newest_value(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old\n")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"mine\n")
        number = await during_commit(
            store,
            lambda: mount.kernel.close(handle),
            lambda: store.put_now(KEY, b"old\nforeign\n"),
        )
        assert number == 0
        assert held(store) == b"old\nforeign\nmine\n"
        assert await shown(mount) == b"old\nforeign\nmine\n"
        assert mount.writeback.statistics().rebased_appends == 1


async def test_append_goes_on_after_it_was_merged(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old\n")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"1\n")
        store.put_now(KEY, b"old\nforeign\n")
        await mount.kernel.flush(handle)
        await mount.kernel.write(handle, 0, b"2\n")
        await mount.kernel.close(handle)
        assert held(store) == b"old\nforeign\n1\n2\n"


@pytest.mark.parametrize("first", [b"one ", b""], ids=["appended", "nothing"])
async def test_append_to_a_file_that_another_client_made_meanwhile_replaces_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool, first: bytes
) -> None:
    """The second writer's bytes, too, are added: what the first one found stays."""
    async with open_mount(store, cache=cache) as mount:
        one = await mount.kernel.open(PATH, APPEND | os.O_CREAT)
        two = await mount.kernel.open(PATH, os.O_RDWR | os.O_APPEND)
        await mount.kernel.write(one, 0, first)
        store.put_now(KEY, b"theirs ")
        await mount.kernel.close(one)
        assert held(store) == b"theirs " + first
        await mount.kernel.write(two, len(first), b"two ")
        assert await mount.kernel.read(two) == first + b"two "
        await mount.kernel.flush(two)
        assert held(store) == b"theirs " + first + b"two "
        await mount.kernel.write(two, len(first) + 4, b"three ")
        await mount.kernel.close(two)
        assert held(store) == b"theirs " + first + b"two three "
        assert await shown(mount) == b"theirs " + first + b"two three "


@pytest.mark.parametrize("flags", [APPEND, os.O_RDWR | os.O_APPEND], ids=["WRONLY", "RDWR"])
async def test_append_through_an_inode_that_was_superseded_overwrites_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int
) -> None:
    """The kernel knows the old size: what it asks to be written there is not of a map's page."""
    store.put_now(KEY, b"")
    async with open_mount(store, cache=cache) as mount:
        old = await mount.kernel.open(PATH, os.O_RDWR)
        store.put_now(KEY, b"theirs\n")
        await trio.testing.wait_all_tasks_blocked()
        new = await mount.kernel.reopen(old.inode, flags)
        assert await mount.files.write(new.handle, 0, b"mine..\n") == 7
        await mount.kernel.close(new)
        assert held(store) == b"theirs\nmine..\n"
        await mount.kernel.close(old)
        assert held(store) == b"theirs\nmine..\n"


async def test_append_where_the_kernel_takes_the_file_to_end_overwrites_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """Another client appended between the kernel's look at the size and the open."""
    store.put_now(KEY, b"theirs\n")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        assert await mount.files.write(handle.handle, 0, b"mine..\n") == 7
        await mount.kernel.close(handle)
        assert held(store) == b"theirs\nmine..\n"


async def test_size_of_a_merged_append_is_that_of_its_own_content(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """What fstat says bounds what the kernel reads."""
    store.put_now(KEY, b"old\n")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR | os.O_APPEND)
        await mount.kernel.write(handle, 0, b"mine\n")
        store.put_now(KEY, b"foreign\n")
        await mount.kernel.flush(handle)
        assert await mount.kernel.read(handle) == b"old\nmine\n"
        await mount.kernel.close(handle)
        assert held(store) == b"foreign\nmine\n"


async def test_size_of_a_deleted_file_is_that_of_its_content(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.write(handle, 0, b"longer than before")
        store.delete_now(KEY)
        assert await errno_of(mount.kernel.flush(handle)) == 0
        assert held(store) is None, "a deleted key is not resurrected"
        assert await mount.kernel.read(handle) == b"longer than before"
        await mount.kernel.close(handle)
        assert held(store) is None


async def test_partial_overwrite_that_lost_the_race_is_estale(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"0123456789")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.write(handle, 3, b"xx")
        number = await during_commit(
            store,
            lambda: mount.kernel.flush(handle),
            lambda: store.put_now(KEY, b"winner"),
        )
        assert number == errno.ESTALE
        assert held(store) == b"winner"
        assert await shown(mount) == b"winner"
        assert await mount.kernel.read(handle) == b"012xx56789"
        await mount.kernel.release(handle)
        assert held(store) == b"winner"


@pytest.mark.parametrize(
    ("flags", "wins"), [(os.O_RDWR, False), (os.O_WRONLY, True)], ids=["readable", "blind"]
)
async def test_whole_overwritten_in_pieces_wins_only_if_it_cannot_be_made_from_what_was_read(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int, *, wins: bool
) -> None:
    store.put_now(KEY, b"0123456789")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, flags)
        await mount.kernel.write(handle, 0, b"abcde")
        await mount.kernel.write(handle, 5, b"fghij")
        store.put_now(KEY, b"another's")
        number = await errno_of(mount.kernel.flush(handle))
        assert number == (0 if wins else errno.ESTALE)
        assert held(store) == (b"abcdefghij" if wins else b"another's")
        await mount.kernel.release(handle)


async def test_key_made_anew_is_another_file(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"mine")
        store.delete_now(KEY)
        store.put_now(KEY, b"new incarnation")
        await mount.kernel.close(handle)
        assert held(store) == b"new incarnation"
        assert mount.writeback.statistics().dropped >= 1


async def test_create_without_writing_puts_an_empty_value(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """A reader that creates (`os.open(path, O_CREAT)`) must not leave a ghost."""
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDONLY | os.O_CREAT)
        await mount.kernel.close(handle)
        assert held(store) == b""
        assert await shown(mount) == b""


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDONLY, os.O_RDWR])
async def test_creation_without_writing_replaces_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int
) -> None:
    """`touch`, and lock files: what O_CREAT finds stays, even if it finds it late."""
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, flags | os.O_CREAT)
        number = await during_commit(
            store, lambda: mount.kernel.close(handle), lambda: store.put_now(KEY, b"theirs")
        )
        assert number == 0
        assert held(store) == b"theirs"
        assert await shown(mount) == b"theirs"


async def test_creation_that_empties_replaces(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        store.put_now(KEY, b"theirs")
        await mount.kernel.close(handle)
        assert held(store) == b""
        assert await shown(mount) == b""


async def test_reader_publishes_nobody_elses_writes(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        writer = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(writer, 0, b"half")
        assert await shown(mount) == b"half"
        assert held(store) == b"old"
        await mount.kernel.write(writer, 4, b" and half")
        await mount.kernel.close(writer)
        assert held(store) == b"half and half"


async def test_late_writes_are_published_when_the_last_writer_goes(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """What a memory map wrote after the flush, with a reader that stays."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        reader = await mount.kernel.open(PATH, os.O_RDONLY)
        writer = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.flush(writer)
        await mount.kernel.write(writer, 0, b"map")
        await mount.kernel.release(writer)
        assert held(store) == b"map"
        await mount.kernel.close(reader)


async def test_emptied_while_it_is_published(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """`: > f` while another writer's flush is on its way is not lost."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        first = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.write(first, 0, b"first")
        async with trio.open_nursery() as nursery:
            store.hold("commit")
            nursery.start_soon(mount.kernel.flush, first)
            await trio.testing.wait_all_tasks_blocked()

            async def empty() -> None:
                await mount.kernel.close(await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC))

            nursery.start_soon(empty)
            await trio.testing.wait_all_tasks_blocked()
            store.release("commit")
        await mount.kernel.close(first)
        assert held(store) == b""


async def test_b20_a_truncation_by_path_does_not_wait_for_who_has_nothing_to_publish(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """A writer that has closed is there until its release; no call tells how that ends."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.write(handle, 0, b"OLD")
        await mount.kernel.truncate(handle.inode, 2, by_path=True)
        assert held(store) == b"old", "what the writer has begun is for its close"
        await mount.kernel.flush(handle)
        assert held(store) == b"OL"
        await mount.kernel.truncate(handle.inode, 1, by_path=True)
        assert held(store) == b"O"
        await mount.kernel.truncate(handle.inode, 0)
        assert held(store) == b"O", "ftruncate(2) is for the close of the same"
        await mount.kernel.close(handle)
        assert held(store) == b""


# --- too large ------------------------------------------------------------------------------


async def test_too_large_is_refused_at_the_write(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache, max_file_size=1024) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"x" * 400)
        assert await errno_of(mount.kernel.write(handle, 400, b"y" * 400)) == errno.EFBIG
        assert await errno_of(mount.kernel.close(handle)) == errno.EFBIG
        assert held(store) == b"old", "half a value is none"
        assert await shown(mount) == b"old"


async def test_truncated_after_a_refused_write_is_whole_again(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache, max_file_size=1024) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT)
        assert await errno_of(mount.kernel.write(handle, 0, b"x" * 800)) == errno.EFBIG
        await mount.kernel.truncate(handle.inode, 0)
        await mount.kernel.write(handle, 0, b"small")
        await mount.kernel.close(handle)
        assert held(store) == b"small"


async def test_truncate_beyond_the_limit(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache, max_file_size=1024) as mount:
        inode = await mount.kernel.walk(PATH)
        assert await errno_of(mount.kernel.truncate(inode, 2000)) == errno.EFBIG
        assert held(store) == b"old"


async def test_append_that_only_others_made_too_large(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"x" * 300)
    async with open_mount(store, cache=cache, max_file_size=1024) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"mine")
        store.put_now(KEY, b"x" * 506)
        assert await errno_of(mount.kernel.close(handle)) == errno.EFBIG
        assert held(store) == b"x" * 506
        assert await shown(mount) == b"x" * 506


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (StoreFullError("full"), errno.ENOSPC),
        (StorePermissionError("no"), errno.EACCES),
        (StoreUnavailableError("away"), errno.EIO),
    ],
)
async def test_failed_publication_is_reported_and_can_be_repeated(
    autojump_clock: MockClock, store: FakeStore, cache: bool, error: StoreError, number: int
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", error, times=2)
        assert await errno_of(mount.kernel.flush(handle)) == number, "fsync says so"
        assert await errno_of(mount.kernel.flush(handle)) == number, "and close, too"
        assert held(store) == b"old"
        assert await shown(mount) == b"old", "the path shows what is published"
        assert await mount.kernel.read(handle) == b"mine", "the handle keeps what it wrote"
        assert await errno_of(mount.kernel.flush(handle)) == 0, "a later one can succeed"
        assert held(store) == b"mine"
        assert await shown(mount) == b"mine"
        await mount.kernel.close(handle)


async def test_failed_publication_of_a_new_file_leaves_no_name(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", StoreFullError("full"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ENOSPC
        await trio.testing.wait_all_tasks_blocked()
        assert await errno_of(mount.kernel.stat(PATH)) == errno.ENOENT
        assert await errno_of(mount.kernel.close(handle)) == 0
        assert held(store) == b"mine"
        assert await shown(mount) == b"mine"


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_TRUNC, os.O_WRONLY, APPEND])
async def test_b126_what_close_could_not_publish_is_not_published_behind_its_back(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int
) -> None:
    """Who was told that close(2) failed may have done something else about it by then."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, flags)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", StoreFullError("full"))
        assert await errno_of(mount.kernel.close(handle)) == errno.ENOSPC
        assert held(store) == b"old"
        assert await shown(mount) == b"old"


@pytest.mark.parametrize("old", [b"old", None], ids=["replaced", "made"])
@pytest.mark.parametrize("later", ["here", "elsewhere"])
async def test_b126_a_failed_close_is_not_made_up_for_over_a_later_write(
    autojump_clock: MockClock, store: FakeStore, cache: bool, old: bytes | None, later: str
) -> None:
    """A second close of what failed (dup, fork) knows nothing of what was written since."""
    if old is not None:
        store.put_now(KEY, old)
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, WHOLE)
        await mount.kernel.write(handle, 0, b"3")
        store.fail_next("commit", StorePermissionError("no"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.EACCES
        if later == "elsewhere":
            store.put_now(KEY, b"4")
        else:
            await write_whole(mount, b"4")
        assert await errno_of(mount.kernel.close(handle)) == errno.ESTALE
        assert held(store) == b"4"
        assert await shown(mount) == b"4"


@pytest.mark.parametrize("old", [b"old", None], ids=["replaced", "made"])
async def test_b126_a_late_arrival_does_not_undo_a_later_write(
    autojump_clock: MockClock, store: FakeStore, cache: bool, old: bytes | None
) -> None:
    """A request whose answer nobody waits for any more may still be carried out."""
    if old is not None:
        store.put_now(KEY, old)
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, WHOLE)
        await mount.kernel.write(handle, 0, b"3")
        store.fail_next("commit", OutcomeUnknownError("no answer"))
        assert await errno_of(mount.kernel.close(handle)) == errno.ETIMEDOUT
        (late,) = (t for t in store.commit_calls if any(isinstance(o, Put) for o in t.then))
        await write_whole(mount, b"4")
        assert held(store) == b"4"
        store.commit_now(late)
        assert held(store) == b"4"
        assert await shown(mount) == b"4"


async def test_b126_the_end_of_the_mount_does_not_publish_what_failed(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, WHOLE)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", StoreFullError("full"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ENOSPC
        assert await mount.files.flush_all() == []
        assert held(store) == b"old"
        await mount.kernel.release(handle)


async def test_what_a_map_wrote_after_a_failed_flush_is_published(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", StoreFullError("full"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ENOSPC
        await mount.kernel.write(handle, 4, b" more")
        await mount.kernel.release(handle)
        assert held(store) == b"mine more"


@pytest.mark.parametrize("remove", ["unlink", "rename"])
async def test_a_file_that_could_not_be_made_does_not_take_a_name_that_was_removed(
    autojump_clock: MockClock, store: FakeStore, cache: bool, remove: str
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", StoreFullError("full"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ENOSPC
        second = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(second, 0, b"theirs")
        await mount.kernel.close(second)
        if remove == "unlink":
            await mount.kernel.unlink(PATH)
        else:
            await mount.kernel.rename(PATH, (b"elsewhere",))
        assert await errno_of(mount.kernel.close(handle)) == 0, "as if it had been unlinked"
        assert held(store) is None


async def test_failed_truncation_by_path_is_over(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        inode = await mount.kernel.walk(PATH)
        store.fail_next("commit", StoreFullError("full"))
        if not cache:  # its first commit is the question what is there
            store.fail_next("commit", StoreFullError("full"))
        assert await errno_of(mount.kernel.truncate(inode, 1)) == errno.ENOSPC
        assert held(store) == b"old"
        store._failures.clear()
        assert await shown(mount) == b"old"


# --- outcome unknown ------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_TRUNC, os.O_WRONLY])
async def test_lost_answer_is_recognised(
    autojump_clock: MockClock, store: FakeStore, cache: bool, flags: int
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, flags)
        await mount.kernel.write(handle, 0, b"mine")
        before = store.revision
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=True)
        await mount.kernel.close(handle)
        assert store.revision == before + 1
        assert held(store) == b"mine"
        assert mount.writeback.statistics().resolved == 1
        assert await shown(mount) == b"mine"


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("arrived", [True, False])
async def test_b127_a_lost_append_is_not_taken_for_anothers(
    autojump_clock: MockClock, store: FakeStore, cache: bool, is_new: bool, arrived: bool
) -> None:
    """Two append the same bytes; whether both are there is not known from one of them."""
    base = b"" if is_new else b"old"
    if not is_new:
        store.put_now(KEY, base)
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"tick")
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=arrived)
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        if not arrived:
            store.put_now(KEY, base + b"tick")
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT, "still not known"
        assert held(store) == base + b"tick"
        await mount.kernel.write(handle, 0, b"tock")
        assert await errno_of(mount.kernel.close(handle)) == 0, "what came later is there"
        assert held(store) == base + b"ticktock"


@pytest.mark.parametrize("others", [None, b"", b"theirs"])
async def test_b127_an_empty_file_that_is_there_was_made(
    autojump_clock: MockClock, store: FakeStore, cache: bool, others: bytes | None
) -> None:
    """O_CREAT asks that there is a file, not that this mount has made it."""
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT)
        before = store.revision
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=others is None)
        if others is None:
            assert await errno_of(mount.kernel.flush(handle)) == 0
        else:
            assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
            store.put_now(KEY, others)
            assert await errno_of(mount.kernel.flush(handle)) == 0
        await mount.kernel.close(handle)
        assert store.revision == before + 1
        assert await shown(mount) == (others or b"")


async def test_lost_request_is_an_error_and_not_sent_again(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"mine")
        commits = len(store.commit_calls)
        store.fail_next("commit", OutcomeUnknownError("lost"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        assert len(store.commit_calls) == commits + 1
        assert held(store) == b"old"
        assert await errno_of(mount.kernel.close(handle)) == 0
        assert held(store) == b"oldmine"


async def test_append_that_arrives_late_is_not_applied_twice(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """The lost request arrives after it was looked for, and before the next one."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", OutcomeUnknownError("lost"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        late = store.commit_calls[-1]
        number = await during_commit(
            store, lambda: mount.kernel.flush(handle), lambda: store.commit_now(late)
        )
        assert number == errno.ETIMEDOUT
        assert held(store) == b"oldmine"
        assert await errno_of(mount.kernel.close(handle)) == errno.ETIMEDOUT
        assert held(store) == b"oldmine"


async def test_whole_value_that_arrives_late_is_recognised(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_TRUNC)
        await mount.kernel.write(handle, 0, b"mine")
        store.fail_next("commit", OutcomeUnknownError("lost"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        late, before = store.commit_calls[-1], store.revision
        number = await during_commit(
            store, lambda: mount.kernel.flush(handle), lambda: store.commit_now(late)
        )
        assert number == 0
        assert held(store) == b"mine"
        assert store.revision == before + 1
        assert mount.writeback.statistics().resolved == 1
        await mount.kernel.close(handle)


async def test_what_was_written_after_a_lost_answer_is_published(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """Recognising an earlier try must not pass for having published what came later."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"1")
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=True)
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        await mount.kernel.write(handle, 0, b"2")
        assert await errno_of(mount.kernel.close(handle)) == 0
        assert held(store) == b"old12"
        assert await shown(mount) == b"old12"


async def test_whole_value_after_a_lost_answer_is_published(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_WRONLY | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"1")
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=True)
        store.fail_next("range", StoreUnavailableError("away"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        await mount.kernel.write(handle, 1, b"2")
        assert await errno_of(mount.kernel.close(handle)) == 0
        assert held(store) == b"12"
        assert await shown(mount) == b"12"


async def test_append_to_a_new_file_after_a_lost_answer_replaces_nothing(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """What had arrived was appended to; so what came later is an append, too."""
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND | os.O_CREAT)
        await mount.kernel.write(handle, 0, b"1")
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=True)
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        await mount.kernel.write(handle, 1, b"2")
        store.put_now(KEY, b"1 theirs ")
        store.fail_next("commit", StoreUnavailableError("away"))
        assert await errno_of(mount.kernel.flush(handle)) == errno.EIO
        assert await errno_of(mount.kernel.close(handle)) == 0
        assert held(store) == b"1 theirs 2"
        assert await shown(mount) == b"1 theirs 2"


async def test_append_with_a_lost_answer_and_a_foreign_append_after_it(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    """Others may have appended after ours arrived: it is not added twice."""
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, APPEND)
        await mount.kernel.write(handle, 0, b"+1")
        store.fail_next("commit", OutcomeUnknownError("lost"), applied=True)
        assert await errno_of(mount.kernel.flush(handle)) == errno.ETIMEDOUT
        store.put_now(KEY, b"old+1+2")
        assert await errno_of(mount.kernel.close(handle)) == errno.ETIMEDOUT
        assert held(store) == b"old+1+2"


# --- gone while open ------------------------------------------------------------------------


async def test_unlinked_while_open_stays_unlinked(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.unlink(PATH)
        assert await mount.kernel.read(handle) == b"old"
        await mount.kernel.write(handle, 0, b"mine")
        assert await mount.kernel.read(handle) == b"mine"
        assert await errno_of(mount.kernel.close(handle)) == 0
        assert held(store) is None


async def test_renamed_while_open_is_published_under_its_new_name(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.rename(PATH, (b"g",))
        await mount.kernel.write(handle, 0, b"new")
        await mount.kernel.close(handle)
        assert (held(store), held(store, b"/g")) == (None, b"new")
        assert await shown(mount, (b"g",)) == b"new"


async def test_replaced_by_a_rename_while_open_is_gone(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    store.put_now(b"/tmp", b"new")
    async with open_mount(store, cache=cache) as mount:
        handle = await mount.kernel.open(PATH, os.O_RDWR)
        await mount.kernel.rename((b"tmp",), PATH)
        assert await mount.kernel.read(handle) == b"old"
        await mount.kernel.write(handle, 0, b"mine")
        await mount.kernel.close(handle)
        assert held(store) == b"new"
        assert await shown(mount) == b"new"


# --- room for what is not published ---------------------------------------------------------


async def test_b18_too_much_unpublished_is_edquot_and_nothing_is_cut_off(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    async with open_mount(store, cache=cache, write_buffer=400, max_file_size=10_000) as mount:
        names = [(b"%d" % n,) for n in range(5)]
        handles = [await mount.kernel.open(name, WHOLE) for name in names]
        for handle in handles[:4]:
            await mount.kernel.write(handle, 0, b"x" * 2500)
        last = handles[4]
        assert await errno_of(mount.kernel.write(last, 0, b"y")) == errno.EDQUOT
        assert await errno_of(mount.kernel.write(handles[3], 2500, b"y")) == errno.EDQUOT
        assert await errno_of(mount.kernel.close(handles[3])) == errno.EFBIG, "half is none"
        await mount.kernel.write(last, 0, b"y")
        assert await errno_of(mount.kernel.close(last)) == errno.EFBIG, "its beginning is missing"
        await mount.kernel.truncate(handles[2].inode, 0)
        for handle in handles[:3]:
            await mount.kernel.close(handle)
        assert {kv.key: len(kv.value) for kv in store.range_now(b"/", b"0").entries} == {
            b"/0": 2500,
            b"/1": 2500,
            b"/2": 0,
        }
        assert mount.files.buffers.statistics().files == 0


async def test_b18_what_was_unlinked_takes_room_until_nobody_holds_it(
    autojump_clock: MockClock, store: FakeStore, cache: bool
) -> None:
    store.put_now(KEY, b"old")
    async with open_mount(store, cache=cache, write_buffer=1, max_file_size=10_000) as mount:
        first = await mount.kernel.open(PATH, WHOLE)
        await mount.kernel.write(first, 0, b"x" * 9000)
        await mount.kernel.unlink(PATH)
        await mount.kernel.flush(first)
        second = await mount.kernel.open(PATH, WHOLE)
        assert await errno_of(mount.kernel.write(second, 0, b"y" * 9000)) == errno.EDQUOT
        await mount.kernel.close(first)
        assert await errno_of(mount.kernel.write(second, 0, b"y" * 9000)) == errno.EDQUOT, "O_PATH"
        mount.kernel.evict_all()
        await mount.kernel.truncate(second.inode, 0)
        await mount.kernel.write(second, 0, b"y" * 9000)
        await mount.kernel.close(second)
        assert held(store) == b"y" * 9000
