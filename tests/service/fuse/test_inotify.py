"""Which changes are replayed, when, and what becomes of those that cannot be.

The replays themselves are made of nothing here: a thread notes that it was told to make one, and
goes on when the test says so. What comes of real ones, tests/mount/test_inotify.py shows.
"""

import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from etcdfs.fuse import inotify as inotify_module
from etcdfs.fuse.inotify import Inotify
from etcdfs.fuse.replay import Replay, Step
from etcdfs.keyspace.attribute_records import record_key
from etcdfs.keyspace.store import Delete, Put, Transaction
from etcdfs.mirror import applier as applier_module
from etcdfs.tree.changes import Part
from etcdfs.tree.inodes import Directory
from etcdfs.tree.update import NameChange
from tests.service.mirrors import AGAIN
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

BOUND_S = 20.0
BROKEN = "a batch could not be applied; this is a bug of etcdfs"
LOST = "who watches is not told of a change: %s"
HELD = "somebody has not let go of a lock for %.1f s"


class Replays:
    """Stands in for `Replayer`: notes what it is to do, and waits at the gate of a directory."""

    def __init__(self) -> None:
        self.done: list[tuple[bytes, tuple[Step, ...]]] = []
        self.gates: dict[bytes, threading.Event] = {}
        self.failures: dict[bytes, int] = {}

    def perform(self, replayed: Replay) -> None:
        path = b"/".join((*replayed.path, replayed.name))
        gate = self.gates.get(replayed.path[0] if replayed.path else b"")
        if gate is not None:
            assert gate.wait(BOUND_S)
        failure = self.failures.pop(path, 0)
        if failure:
            replayed.step = replayed.steps[0]
            raise OSError(failure, os.strerror(failure))
        self.done.append((path, replayed.steps))

    def named(self, path: bytes) -> list[tuple[Step, ...]]:
        return [steps for name, steps in self.done if name == path]


class Watched:
    """Stands in for `Watches`."""

    def __init__(self) -> None:
        self.inodes: frozenset[int] = frozenset()

    def find(self) -> tuple[frozenset[int], float]:
        return self.inodes, 0.0


class Rig:
    """A mount whose kernel holds `/d`, and who tells those that watch it."""

    def __init__(self, mount: FakeMount, inotify: Inotify, replays: Replays) -> None:
        self.mount = mount
        self.inotify = inotify
        self.replays = replays

    async def until(self, is_so: Callable[[], object]) -> None:
        with trio.fail_after(BOUND_S):
            while not is_so():  # noqa: ASYNC110 -- threads say nothing when they have ended
                await trio.sleep(0.002)

    async def idle(self) -> None:
        await wait_all_tasks_blocked(0.005)
        await self.until(lambda: not self.inotify.statistics().waiting)
        await wait_all_tasks_blocked(0.005)


@asynccontextmanager
async def rigged(store: FakeStore, watched: Watched | None = None) -> AsyncIterator[Rig]:
    replays = Replays()
    async with open_mount(store) as mount, trio.open_nursery() as tasks:
        inotify = Inotify(mount.tree, replays, watched)
        mount.mirror.tell(inotify.observe)
        tasks.start_soon(inotify.run)
        await mount.kernel.stat((b"d",))
        yield Rig(mount, inotify, replays)
        for gate in replays.gates.values():
            gate.set()
        assert await inotify.aclose()
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def a_directory(store: FakeStore) -> None:
    store.put_now(b"/d/old", b"1")


async def test_each_kind_of_change(store: FakeStore) -> None:
    async with rigged(store) as rig:
        store.put_now(b"/d/old", b"2")
        store.put_now(b"/d/new", b"")
        store.put_now(b"/d/below/f", b"")
        await rig.idle()
        store.delete_now(b"/d/new")
        await rig.idle()
        assert rig.replays.done == [
            (b"d/old", (Step.CHANGE,)),
            (b"d/new", (Step.MAKE,)),
            (b"d/below", (Step.MAKE,)),  # what is in it nobody can watch yet
            (b"d/new", (Step.REMOVE,)),
        ]


async def test_what_this_mount_does_linux_tells(store: FakeStore) -> None:
    async with rigged(store) as rig:
        kernel = rig.mount.kernel
        handle = await kernel.open((b"d", b"mine"), os.O_CREAT | os.O_WRONLY)
        await kernel.write(handle, 0, b"1")
        await kernel.close(handle)
        await kernel.mknod((b"d", b"made"))
        await kernel.rename((b"d", b"made"), (b"d", b"mine"))
        await kernel.mkdir((b"d", b"e"))
        await kernel.rename((b"d", b"mine"), (b"d", b"e", b"mine"))
        await kernel.rename((b"d", b"e"), (b"d", b"f"))
        await kernel.unlink((b"d", b"f", b"mine"))
        await kernel.rmdir((b"d", b"f"))
        store.put_now(b"/d/end", b"")
        await rig.idle()
        assert rig.replays.done == [(b"d/end", (Step.MAKE,))]


async def test_a_name_waits_once(store: FakeStore) -> None:
    async with rigged(store) as rig:
        rig.replays.gates[b"d"] = threading.Event()
        store.put_now(b"/d/old", b"2")
        await wait_all_tasks_blocked()
        for number in range(20):
            store.put_now(b"/d/old", b"%d" % number)
            store.put_now(b"/d/brief", b"")
            await wait_all_tasks_blocked()
            store.delete_now(b"/d/brief")
            await wait_all_tasks_blocked()
        rig.replays.gates.pop(b"d").set()
        await rig.idle()
        assert rig.replays.done == [(b"d/old", (Step.CHANGE,))] * 2, "`brief` came and went"
        assert rig.inotify.statistics().coalesced >= 19


async def test_attributes_that_wait_with_content_come_after_it(store: FakeStore) -> None:
    record = record_key(b"/d/old")
    async with rigged(store) as rig:
        rig.replays.gates[b"d"] = threading.Event()
        store.put_now(record, b'{"mode":"0640"}')
        await wait_all_tasks_blocked()
        store.put_now(b"/d/old", b"2")
        await wait_all_tasks_blocked()
        store.put_now(record, b'{"mode":"0644"}')
        await wait_all_tasks_blocked()
        rig.replays.gates.pop(b"d").set()
        await rig.idle()
        assert rig.replays.done == [
            (b"d/old", (Step.DRESS,)),
            (b"d/old", (Step.CHANGE, Step.DRESS)),
        ]


async def test_attributes_out_of_date_take_nothing_along_that_was_told(store: FakeStore) -> None:
    record = record_key(b"/d/old")
    async with rigged(store) as rig:
        rig.replays.gates[b"d"] = threading.Event()
        rig.replays.failures[b"d/old"] = errno.ESTALE
        store.put_now(record, b'{"mode":"0600"}')
        await wait_all_tasks_blocked()
        store.put_now(record, b'{"mode":"0640"}')
        await wait_all_tasks_blocked()
        rig.replays.gates.pop(b"d").set()
        await rig.idle()
        assert rig.replays.done == [(b"d/old", (Step.DRESS,))]


async def test_names_keep_their_pace(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inotify_module, "PACE_S", 3600.0)
    async with rigged(store) as rig:
        store.put_now(b"/d/old", b"2")
        await rig.idle()
        store.put_now(b"/d/old", b"3")
        store.put_now(b"/d/other", b"")
        await rig.until(lambda: rig.replays.named(b"d/other"))
        assert len(rig.replays.named(b"d/old")) == 1
        await rig.until(lambda: rig.inotify.statistics().waiting == 1)


async def test_a_directory_goes_after_what_was_in_it(store: FakeStore) -> None:
    async with rigged(store) as rig:
        rig.replays.failures[b"d/old"] = errno.ENOENT
        store.put_now(b"/d/old", b"2")
        await rig.idle()
        await rig.mount.kernel.stat((b"d", b"old"))
        store.put_now(b"/d/old", b"3")  # keeps it waiting for its turn
        await wait_all_tasks_blocked()
        store.delete_now(b"/d/old")
        await rig.idle()
        assert [path for path, _ in rig.replays.done[-2:]] == [b"d/old", b"d"]
        assert rig.replays.done[-1][1] == (Step.ORPHAN, Step.REMOVE)


async def test_what_is_out_of_date_is_left_to_what_came_after(store: FakeStore) -> None:
    async with rigged(store) as rig:
        rig.replays.gates[b"d"] = threading.Event()
        rig.replays.failures[b"d/new"] = errno.ESTALE
        store.put_now(b"/d/new", b"1")
        await wait_all_tasks_blocked()
        store.put_now(b"/d/new", b"2")
        await wait_all_tasks_blocked()
        rig.replays.gates.pop(b"d").set()
        await rig.idle()
        assert rig.replays.done == [(b"d/new", (Step.MAKE,))], "nobody has heard of it before"
        assert rig.inotify.statistics().outdated == 1


@pytest.mark.expect_log(AGAIN, BROKEN)
@pytest.mark.parametrize("calls_before", [0, 1])
async def test_what_a_tree_made_anew_changes_is_heard_of(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    """A batch fails half-way, and what is listed then has more that is new."""
    for name in (b"a", b"b", b"same"):
        store.put_now(b"/d/" + name, b"1")
    async with rigged(store) as rig:
        tree, left = rig.mount.tree, iter(range(calls_before))
        detach = tree.detach

        def failing(*args: object, **kwargs: object) -> object:
            if next(left, None) is None:
                monkeypatch.undo()
                store.put_now(b"/d/old", b"2")
                raise RecursionError("planted")
            return detach(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(tree, "detach", failing)
        gone = [Delete(b"/d/a"), Delete(b"/d/b")]
        await store.commit(Transaction(then=(*gone, Put(b"/d/new", b""), Put(b"/e/f", b""))))
        with trio.fail_after(BOUND_S):
            await rig.mount.mirror.reached(store.revision)
        await rig.idle()
        assert dict(rig.replays.done) == {
            b"d/a": (Step.REMOVE,),
            b"d/b": (Step.REMOVE,),
            b"d/new": (Step.MAKE,),
            b"d/old": (Step.CHANGE,),
            b"e": (Step.MAKE,),
        }


@pytest.mark.expect_log(LOST)
async def test_what_cannot_be_replayed_is_counted_and_said_once(
    store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigged(store) as rig:
        for name in (b"a", b"b"):
            rig.replays.failures[b"d/" + name] = errno.EACCES
            store.put_now(b"/d/" + name, b"")
        await rig.idle()
        await rig.until(lambda: rig.inotify.statistics().dropped == 2)
        said = [r for r in caplog.records if r.msg == LOST and r.levelno == logging.WARNING]
        assert len(said) == 1
        assert "Permission denied" in said[0].getMessage()


@pytest.mark.expect_log(LOST)
async def test_no_more_names_wait_than_may(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify_module, "WAITING_MAX", 3)
    async with rigged(store) as rig:
        rig.replays.gates[b"d"] = threading.Event()
        store.put_now(b"/d/old", b"2")
        await wait_all_tasks_blocked()
        for number in range(5):
            store.put_now(b"/d/%d" % number, b"")
        await wait_all_tasks_blocked()
        assert rig.inotify.statistics().waiting == 3 + 1, "one of them is being replayed"
        assert rig.inotify.statistics().dropped == 2


@pytest.mark.expect_log(HELD)
async def test_a_replay_that_waits_stops_no_other_directory(store: FakeStore) -> None:
    store.put_now(b"/e/f", b"1")
    async with rigged(store) as rig:
        await rig.mount.kernel.stat((b"e",))
        rig.replays.gates[b"d"] = threading.Event()
        store.put_now(b"/d/old", b"2")
        await wait_all_tasks_blocked()
        store.put_now(b"/d/new", b"")
        store.put_now(b"/e/f", b"2")
        await rig.until(lambda: rig.replays.named(b"e/f"))
        assert rig.inotify.statistics().stuck == 1
        rig.replays.gates.pop(b"d").set()
        await rig.idle()
        assert rig.replays.named(b"d/old") == [(Step.CHANGE,)]
        assert rig.replays.named(b"d/new") == [(Step.MAKE,)]
        assert rig.inotify.statistics().stuck == 0


async def test_a_change_waits_for_a_look_at_who_watches(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify_module, "LOOK_S", 0.0)
    watched = Watched()
    async with rigged(store, watched) as rig:
        store.put_now(b"/d/old", b"2")
        await rig.idle()
        assert not rig.replays.done
        assert rig.inotify.statistics().unwatched == 1
        watched.inodes = frozenset((rig.mount.tree.root.children[b"d"].inode,))
        store.put_now(b"/d/old", b"3")
        await rig.idle()
        await rig.until(lambda: rig.replays.done)
        assert rig.replays.done == [(b"d/old", (Step.CHANGE,))]


async def test_a_missing_name_is_asked_for_again_until_its_end_was_told(store: FakeStore) -> None:
    async with rigged(store) as rig:
        rig.replays.gates[b"d"] = threading.Event()
        store.delete_now(b"/d/old")
        store.put_now(b"/d/keep", b"")
        await wait_all_tasks_blocked()
        directory = rig.mount.tree.root.children[b"d"]
        tell_negative = rig.mount.tree.tell_negative
        assert not tell_negative(directory, b"old", 10**9)  # type: ignore[arg-type]
        rig.replays.gates.pop(b"d").set()
        await rig.idle()
        await rig.until(lambda: rig.replays.named(b"d/old"))
        await rig.until(lambda: tell_negative(directory, b"old", 10**9))  # type: ignore[arg-type]


async def test_a_large_batch_is_replayed_name_by_name(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier_module, "LARGE", 2)
    for number in range(5):
        store.put_now(b"/d/%d" % number, b"1")
    async with rigged(store) as rig:
        gone = [Delete(b"/d/%d" % number) for number in range(3)]
        made = [Put(b"/d/new%d" % number, b"") for number in range(3)]
        await store.commit(Transaction(then=(*gone, *made, Put(b"/d/old", b"2"))))
        await rig.idle()
        assert {steps for path, steps in rig.replays.done if b"new" in path} == {(Step.MAKE,)}
        assert rig.replays.named(b"d/0") == [(Step.REMOVE,)]
        assert rig.replays.named(b"d/old") == [(Step.CHANGE,)]
        assert len(rig.replays.done) == 7


async def test_a_large_batch_is_taken_in_part_by_part(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have their turn in between; until then nothing that is gone may be cached."""
    monkeypatch.setattr(applier_module, "LARGE", 2)
    monkeypatch.setattr(applier_module, "PART_KEYS", 1)
    names = [b"%d" % number for number in range(5)]
    for name in names:
        store.put_now(b"/d/" + name, b"1")
    async with rigged(store) as rig:
        told: list[tuple[int, list[bool]]] = []
        directory = rig.mount.tree.root.children[b"d"]
        assert isinstance(directory, Directory)

        def observe(
            changes: Iterable[NameChange], parts: Collection[Part]
        ) -> Callable[[], None] | None:
            seen = rig.inotify.observe(changes, parts)
            assert seen is not None
            return lambda: note(seen)

        def note(seen: Callable[[], None]) -> None:
            seen()
            may_cache = [rig.mount.tree.tell_negative(directory, name, 10**9) for name in names]
            told.append((rig.inotify.statistics().waiting, may_cache))

        rig.mount.mirror.tell(observe)
        await store.commit(Transaction(then=tuple(Delete(b"/d/" + name) for name in names)))
        await rig.until(lambda: told)
        assert told == [(1, [False] * 5)]
        await rig.until(lambda: len(rig.replays.done) == 5)
        await rig.idle()
        assert all(rig.mount.tree.tell_negative(directory, name, 10**9) for name in names)
