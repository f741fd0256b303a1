"""Two calls at the same moment leave what some order of them would leave on tmpfs.

Each request to etcd waits twice, before it is carried out and before it is answered, and so does
the watch. When nothing else happens any more, chance lets one of them go on: a schedule. Its
number makes it again.
"""

import errno
import os
import random
from collections.abc import Awaitable, Callable
from typing import Final, final

import pytest
import trio
import trio.testing

from etcdfs.mirror.mirror import Mirror
from etcdfs.vfs.attributes import Change
from tests.support.fake_kernel import (
    RENAME_EXCHANGE,
    FakeMount,
    KernelHandle,
    Path,
    errnos,
    make_mount,
)
from tests.support.fake_store import FakeStore
from tests.support.pairs import (
    BASE,
    FLAGS,
    MODE,
    TIME_NS,
    TRUNCATED,
    TTL,
    WRITTEN,
    Found,
    Kind,
    Outcome,
    pairs,
    possible,
)
from tests.support.profile import NIGHTLY

SCHEDULES: Final = 60 if NIGHTLY else 2
"""Schedules of each pair of calls, in each mode."""

PAIRS: Final = sorted(pairs())

_MAX_STEPS: Final = 200


@final
class Schedule:
    """Lets one waiting request go on at a time."""

    def __init__(self, store: FakeStore, number: int) -> None:
        self._store = store
        self._chance = random.Random(number)
        self._waiting: list[trio.Event] = []

    async def pace(self) -> None:
        """Wait for our turn."""
        turn = trio.Event()
        self._waiting.append(turn)
        await turn.wait()

    async def run(self, calls: list[Callable[[], Awaitable[object]]]) -> tuple[int, ...]:
        """Make calls at the same moment; return their errnos."""
        numbers: dict[int, int] = {}

        async def make(at: int) -> None:
            try:
                await calls[at]()
            except OSError as exc:
                numbers[at] = exc.errno or -1
            else:
                numbers[at] = 0

        self._store.hold_watches()
        self._store.pace = self.pace
        async with trio.open_nursery() as nursery:
            for at in range(len(calls)):
                nursery.start_soon(make, at)
            for _ in range(_MAX_STEPS):
                await trio.testing.wait_all_tasks_blocked()
                if len(numbers) == len(calls):
                    break
                self._go_on()
        self._store.pace = None
        self._store.release_watches()
        return tuple(numbers[at] for at in range(len(calls)))

    def _go_on(self) -> None:
        choices = len(self._waiting) + self._store.has_news
        assert choices, "the calls wait for each other"
        choice = self._chance.randrange(choices)
        if choice < len(self._waiting):
            self._waiting.pop(choice).set()
        else:
            self._store.release_watches()
            self._store.hold_watches()


@final
class FakeWorld:
    """The state of `tests.support.pairs.World`, in a mount between two fakes."""

    def __init__(self, mount: FakeMount) -> None:
        self._mount = mount
        self._handles: dict[str, KernelHandle] = {}

    async def prepare(self, kind: Kind) -> None:
        kernel = self._mount.kernel
        for name, value in BASE.items():
            if name != "f" or kind != "new":
                handle = await kernel.open(_path(name), os.O_CREAT | os.O_WRONLY)
                await kernel.write(handle, 0, value)
                await kernel.close(handle)
        for name, flags in (("f", FLAGS[kind]), ("g", FLAGS["whole"])):
            handle = self._handles[name] = await kernel.open(_path(name), flags)
            await kernel.write(handle, 0, WRITTEN[name])

    def call(self, call: str) -> Callable[[], Awaitable[object]]:
        return lambda: self._call(*call.split())

    async def _call(self, name: str, which: str, other: str = "") -> None:
        kernel, path, to = self._mount.kernel, _path(which), _path(other)
        match name:
            case "close":
                await kernel.close(self._handles.pop(which))
            case "fsync":
                if which not in self._handles:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                await kernel.flush(self._handles[which])
            case "rename":
                await kernel.rename(path, to)
            case "exchange":
                await kernel.rename(path, to, RENAME_EXCHANGE)
            case "unlink":
                await kernel.unlink(path)
            case "move":
                await kernel.rename((b"d",), (b"e",))
            case "truncate":
                await kernel.truncate(await kernel.walk(path), TRUNCATED, by_path=True)
            case _:
                await self._change(name, path)

    async def _change(self, name: str, path: Path) -> None:
        inode = (await self._mount.kernel.walk(path)).number
        filesystem = self._mount.filesystem
        with errnos():
            match name:
                case "chmod":
                    await filesystem.setattr(inode, Change(mode=MODE))
                case "utime":
                    await filesystem.setattr(inode, Change(mtime_ns=TIME_NS, atime_ns=TIME_NS))
                case "ttl":
                    await filesystem.xattrs.setxattr(inode, b"user.etcd.ttl", TTL)
                case _:
                    raise AssertionError(name)

    async def finish(self) -> tuple[int, ...]:
        """Close what is still open; return the errnos."""
        found = []
        for name in sorted(self._handles):
            try:
                await self._call("close", name)
            except OSError as exc:
                found.append(exc.errno or -1)
            else:
                found.append(0)
        return tuple(found)

    async def files(self) -> tuple[Found, ...]:
        """Return what the mount shows, having seen that etcd holds the same."""
        mount = self._mount
        await trio.testing.wait_all_tasks_blocked()
        if isinstance(mount.view, Mirror):
            assert mount.view.revision == mount.store.revision
        found = []
        for top in sorted(await mount.kernel.listdir(())):
            for name in sorted(await mount.kernel.listdir((top,))):
                status = await mount.kernel.stat((top, name))
                handle = await mount.kernel.open((top, name), os.O_RDONLY)
                content = await mount.kernel.read(handle)
                await mount.kernel.close(handle)
                entry = mount.store.current(b"/%s/%s" % (top, name))
                assert entry is not None
                assert entry.value == content
                found.append(
                    Found(
                        f"{top.decode()}/{name.decode()}",
                        content,
                        status.mode & 0o7777,
                        status.mtime_ns == TIME_NS,
                        bool(entry.lease),
                    )
                )
        keys = [key for key in mount.store.keys_between(b"/d", b"/f") if _is_file(mount, key)]
        assert len(keys) == len(found)
        return tuple(found)


def _is_file(mount: FakeMount, key: bytes) -> bool:
    return not key.endswith(b"/") and mount.store.current(key) is not None


def _path(name: str) -> Path:
    return (b"d", name.encode())


async def outcome_of(cache: bool, kind: Kind, calls: tuple[str, str], number: int) -> Outcome:
    """Make two calls by one schedule."""
    store = FakeStore()
    mount = make_mount(store, cache=cache)
    store.put_now(b"/d/", b"")
    async with trio.open_nursery() as nursery:
        await mount.start(nursery)
        world = FakeWorld(mount)
        await world.prepare(kind)
        numbers = await Schedule(store, number).run([world.call(call) for call in calls])
        await trio.testing.wait_all_tasks_blocked()
        found = Outcome((*numbers, *await world.finish()), await world.files())
        assert not mount.view.update.intents
        mount.check_invariants()
        nursery.cancel_scope.cancel()
    return found


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("part", range(8))
def test_b20_two_calls_at_once(cache: bool, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    for kind, *calls in PAIRS[part::8]:
        first, second = calls
        wanted = possible(kind, first, second)
        for number in range(SCHEDULES):
            trio._core._run._r.seed(number)
            found = trio.run(
                outcome_of, cache, kind, (first, second), number, clock=trio.testing.MockClock()
            )
            assert found in wanted, (kind, first, second, number)
