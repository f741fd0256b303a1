"""The handlers: nothing but a mapping between pyfuse3 and the filesystem, and one border."""

import errno
import inspect
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing
from pyfuse3 import EntryAttributes, FUSEError

import etcdfs.errors
from etcdfs.admission import Admission, about_to_wait
from etcdfs.errors import EtcdfsError, NotFoundError, StoreFullError
from etcdfs.files.handles import Handles
from etcdfs.fuse.control_directory import ControlDirectory
from etcdfs.fuse.operations import Operations, quieten
from etcdfs.keyspace.keys import CONTROL_NAME
from etcdfs.tree.inodes import Inode
from etcdfs.vfs.attributes import Attributes, Caller, Change
from etcdfs.vfs.filesystem import Filesystem, Listed, SpaceStatistics
from etcdfs.vfs.setattr import no_attribute
from etcdfs.vfs.xattr import Xattrs

RELEASE_BUG = "release failed; this is a bug of etcdfs"
UNTAKEN = "fuse_release(): fuse_reply_* failed with %s"
BUG = "%s failed; this is a bug of etcdfs"


def context() -> pyfuse3.RequestContext:
    return cast("pyfuse3.RequestContext", SimpleNamespace(uid=1, gid=2, pid=os.getpid(), umask=0))


CONTEXT = context()
CALLER = Caller(1, 2)
ATTRIBUTES = Attributes(Inode(5), 0o100640, 1, 3, 4, 1000, 11, 22, 33, 60.0)

OLD = 9
"""The handle of an inode that a newer version answers for."""

FIXED = {"link": errno.EPERM}
"""Handlers that ask nobody."""


class Raising:
    """A filesystem and open files of which every call fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "kernel_timeout_s":
            raise self._error

        def call(*args: Any, **kwargs: Any) -> Any:
            raise self._error

        return call


class Recording:
    """A filesystem and open files that note each call and return what they were told to."""

    kernel_timeout_s = 60.0
    value: bytes | None = None
    publishes = False

    def __init__(self, **results: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._results = results

    def forget(self, counts: Any) -> None:
        self.calls.append(("forget", counts))

    def how(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(keeps_pages=handle != OLD, is_direct=handle == OLD)

    def to_store(self, handle: int) -> bytes | None:
        return self.value

    def may_wait_to_release(self, handle: int) -> bool:
        return self.publishes

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **named: Any) -> Any:
            self.calls.append((name, *args, *named.values()))
            return self._results.get(name)

        return call


def operations(fake: Any, *, store: Callable[[int, bytes], None] | None = None) -> Operations:
    return Operations(
        cast("Filesystem", fake),
        cast("Handles", fake),
        cast("Xattrs", fake),
        store=store,
    )


def handlers() -> list[str]:
    """Return every request handler there is."""
    return [
        name
        for name, function in vars(Operations).items()
        if inspect.iscoroutinefunction(function) and not name.startswith("_")
    ]


def arguments(function: Callable[..., Any]) -> list[Any]:
    """Make up arguments for a handler."""
    made: dict[str, Any] = {
        "ctx": CONTEXT,
        "attr": EntryAttributes(),
        "fields": fields(size=True),
        "buf": b"x",
        "value": b"x",
        "target": b"x",
        "datasync": False,
        "token": None,
    }
    names = list(inspect.signature(function).parameters)[1:]
    return [made.get(n, b"n" if "name" in n else 1) for n in names]


def fields(**updates: bool) -> Any:
    names = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
    return SimpleNamespace(**{f"update_{name}": updates.get(name, False) for name in names})


async def errno_of(call: Awaitable[Any]) -> int:
    with pytest.raises(FUSEError) as caught:
        await call
    number: int = caught.value.errno
    return number


# --- the border -----------------------------------------------------------------------------


def test_every_handler_is_behind_the_border() -> None:
    for name in handlers():
        assert hasattr(getattr(Operations, name), "__wrapped__"), f"{name} lacks @handler"


@pytest.mark.expect_log(BUG)
@pytest.mark.parametrize("name", [n for n in handlers() if n not in FIXED])
async def test_planted_exception_is_eio_and_logged(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    function = getattr(operations(Raising(RuntimeError("planted"))), name)
    if name == "fsyncdir":
        await function(*arguments(getattr(Operations, name)))  # ask nobody, and succeed
        return
    number = await errno_of(function(*arguments(getattr(Operations, name))))
    assert number == errno.EIO
    (record,) = [r for r in caplog.records if r.msg == BUG]
    assert record.exc_info is not None
    assert "planted" in str(record.exc_info[1])


@pytest.mark.parametrize("name", [n for n in handlers() if n not in FIXED])
async def test_errors_on_purpose_have_their_errno(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "fsyncdir":
        return
    function = getattr(operations(Raising(NotFoundError("on purpose"))), name)
    number = await errno_of(function(*arguments(getattr(Operations, name))))
    assert number == errno.ENOENT
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.expect_log("%s: %s")
async def test_errors_of_etcd_are_logged_for_an_operator(caplog: pytest.LogCaptureFixture) -> None:
    fake = Raising(StoreFullError("full"))
    assert await errno_of(operations(fake).flush(cast("Any", 1))) == errno.ENOSPC
    assert "flush: full" in [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(("name", "number"), FIXED.items())
async def test_what_is_not_supported(name: str, number: int) -> None:
    function = getattr(operations(Recording()), name)
    assert await errno_of(function(*arguments(getattr(Operations, name)))) == number


@pytest.mark.expect_log("%s failed: %s")
async def test_b99_want_of_memory_is_enomem_and_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    call = operations(Raising(MemoryError())).getattr(pyfuse3.InodeT(5), CONTEXT)
    assert await errno_of(call) == errno.ENOMEM
    assert "getattr failed: no memory is left; this process has " in caplog.text


@pytest.mark.expect_log("forget failed; this is a bug of etcdfs")
def test_forget_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    operations(Raising(RuntimeError("planted"))).forget([(cast("Any", 5), 1)])
    assert caplog.records[-1].exc_info is not None


def test_every_error_has_an_errno() -> None:
    pending: list[type[EtcdfsError]] = [EtcdfsError]
    while pending:
        kind = pending.pop()
        assert kind.errno in errno.errorcode
        assert kind.__module__ == etcdfs.errors.__name__
        pending += kind.__subclasses__()


# --- the mapping ----------------------------------------------------------------------------


async def test_lookup() -> None:
    packed = await operations(Recording(lookup=ATTRIBUTES)).lookup(
        cast("Any", 1), cast("Any", b"f"), CONTEXT
    )
    assert (packed.st_ino, packed.st_mode, packed.st_nlink) == (5, 0o100640, 1)
    assert (packed.st_uid, packed.st_gid, packed.st_size, packed.st_blocks) == (3, 4, 1000, 2)
    assert (packed.st_atime_ns, packed.st_mtime_ns, packed.st_ctime_ns) == (11, 22, 33)
    assert packed.entry_timeout == packed.attr_timeout == 60.0
    assert packed.generation == 0


async def test_lookup_of_a_missing_name_may_be_remembered() -> None:
    packed = await operations(Recording(lookup=None)).lookup(
        cast("Any", 1), cast("Any", b"f"), CONTEXT
    )
    assert (packed.st_ino, packed.entry_timeout) == (0, 60.0)


@pytest.mark.parametrize("keep_cache", [True, False])
@pytest.mark.parametrize("value", [b"value", None])
async def test_open_and_create(keep_cache: bool, value: bytes | None) -> None:
    fake = Recording(open=7, create=(8, ATTRIBUTES))
    fake.value = value
    stored: list[tuple[int, bytes]] = []

    def keep(inode: int, content: bytes) -> None:
        stored.append((inode, content))

    served = operations(fake, store=keep if keep_cache else None)
    info = await served.open(cast("Any", 5), cast("Any", os.O_RDWR), CONTEXT)
    assert stored == ([(5, value)] if keep_cache and value else [])
    assert (info.fh, info.keep_cache) == (7, keep_cache)
    flags = os.O_WRONLY | os.O_CREAT
    info, packed = await served.create(
        cast("Any", 1), cast("Any", b"f"), cast("Any", 0o644), cast("Any", flags), CONTEXT
    )
    assert (info.fh, info.keep_cache, packed.st_ino) == (8, keep_cache, 5)
    assert fake.calls == [
        ("open", 5, os.O_RDWR, CALLER.uid, os.getpid()),
        ("create", 1, b"f", flags, 0o644, CALLER),
    ]


@pytest.mark.parametrize("keep_cache", [True, False])
async def test_an_inode_that_another_answers_for_is_opened_past_the_page_cache(
    keep_cache: bool,
) -> None:
    served = operations(Recording(open=OLD), store=(lambda _, __: None) if keep_cache else None)
    info = await served.open(cast("Any", 5), cast("Any", os.O_RDWR), CONTEXT)
    assert (info.keep_cache, info.direct_io) == (False, True)


@pytest.mark.parametrize(
    ("updates", "change"),
    [
        ({"size": True}, Change(size=1)),
        ({"mode": True}, Change(mode=0o600)),
        ({"uid": True}, Change(uid=3)),
        ({"gid": True}, Change(gid=4)),
        ({"atime": True}, Change(atime_ns=5)),
        ({"mtime": True}, Change(mtime_ns=6)),
        ({}, Change()),
    ],
)
async def test_setattr_passes_on_what_is_to_be_changed(
    updates: dict[str, bool], change: Change
) -> None:
    wanted = EntryAttributes()
    wanted.st_size, wanted.st_mode = 1, cast("Any", 0o600)
    wanted.st_uid, wanted.st_gid, wanted.st_atime_ns, wanted.st_mtime_ns = 3, 4, 5, 6
    fake = Recording(setattr=ATTRIBUTES)
    await operations(fake).setattr(cast("Any", 5), wanted, fields(**updates), None, CONTEXT)
    assert fake.calls == [("setattr", 5, change, CALLER.uid, True)]


async def test_statfs() -> None:
    space = SpaceStatistics(blocks=10, blocks_free=4, files=20, files_free=8)
    packed = await operations(Recording(statfs=space)).statfs(CONTEXT)
    assert (packed.f_blocks, packed.f_bfree, packed.f_bavail) == (10, 4, 4)
    assert (packed.f_files, packed.f_ffree, packed.f_favail) == (20, 8, 8)
    assert (packed.f_bsize, packed.f_frsize, packed.f_namemax) == (4096, 4096, 255)


async def test_extended_attributes() -> None:
    inode, name = cast("Any", 1), cast("Any", b"user.x")
    fake = Recording(getxattr=b"v", listxattr=(b"user.x", b"user.y"))
    served = operations(fake)
    assert await served.getxattr(inode, name, CONTEXT) == b"v"
    assert list(await served.listxattr(inode, CONTEXT)) == [b"user.x", b"user.y"]
    await served.setxattr(inode, name, b"w", context())
    await served.removexattr(inode, name, CONTEXT)
    assert fake.calls[2:] == [
        ("setxattr", 1, b"user.x", b"w", None, CALLER),
        ("removexattr", 1, b"user.x", CALLER),
    ]


async def test_xattr_create_and_replace_are_told_by_pyfuse3s_question() -> None:
    """It asks with the context of the same request, and keeps the flag to itself."""
    inode, name = cast("Any", 1), cast("Any", b"user.x")
    fake = Recording(getxattr=b"v")
    served = operations(fake)
    replacing = context()
    await served.getxattr(inode, name, replacing)
    await served.setxattr(inode, name, b"w", replacing)
    await served.getxattr(inode, name, context())
    await served.setxattr(inode, name, b"w", context())
    assert [call[4] for call in fake.calls if call[0] == "setxattr"] == [True, None]

    missing = operations(Raising(no_attribute(b"user.x")))
    creating = context()
    with pytest.raises(FUSEError):
        await missing.getxattr(inode, name, creating)
    await served.setxattr(inode, name, b"w", creating)
    with pytest.raises(FUSEError):
        await operations(Raising(NotFoundError("gone"))).getxattr(inode, name, creating)
    await served.setxattr(inode, name, b"w", creating)
    assert [call[4] for call in fake.calls if call[0] == "setxattr"][2:] == [False, None]


async def test_what_is_made_knows_its_maker() -> None:
    parent, name = cast("Any", 1), cast("Any", b"f")
    fake = Recording(mknod=ATTRIBUTES, mkdir=ATTRIBUTES, symlink=ATTRIBUTES)
    served = operations(fake)
    await served.mknod(parent, name, cast("Any", 0o010600), 0, CONTEXT)
    await served.mkdir(parent, name, cast("Any", 0o700), CONTEXT)
    await served.symlink(parent, name, cast("Any", b"to"), CONTEXT)
    assert fake.calls == [
        ("mknod", 1, b"f", 0o010600, CALLER),
        ("mkdir", 1, b"f", 0o700, CALLER),
        ("symlink", 1, b"f", b"to", CALLER),
    ]


async def test_requests_are_counted() -> None:
    served = operations(Recording(getattr=ATTRIBUTES))
    await served.getattr(cast("Any", 5), CONTEXT)
    await served.getattr(cast("Any", 5), CONTEXT)
    served.forget([])
    assert served.requests == {"getattr": 2, "forget": 1}


# --- listings -------------------------------------------------------------------------------


class Directory:
    """A filesystem with one directory of three files."""

    def __init__(self) -> None:
        self.remembered: list[bytes] = []
        self._entries = [Listed(b"%d" % i, cast("Any", i), i + 1) for i in range(3)]

    async def readdir(self, handle: int, position: int) -> Iterator[Listed]:
        return iter(self._entries[position:])

    def opened_directory(self, handle: int) -> int:
        return 1

    def dots(self, inode: int) -> tuple[tuple[bytes, Any], ...]:
        return ((b".", None), (b"..", None))

    def attributes(self, node: Any) -> Attributes:
        return ATTRIBUTES

    def remember_listed(self, listed: Listed, attributes: Attributes) -> None:
        self.remembered.append(listed.name)


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5, 6])
async def test_a_listing_counts_what_the_kernel_took(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """However small the kernel's buffer is: each name once, one lookup for each, none for dots."""
    taken: list[bytes] = []
    positions = [0]
    left = [0]

    def reply(token: Any, name: bytes, packed: EntryAttributes, next_id: int) -> bool:
        if not left[0]:
            return False
        left[0] -= 1
        taken.append(name)
        positions.append(next_id)
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    fake = Directory()
    served = operations(fake)
    for _ in range(7):
        left[0] = room
        await served.readdir(cast("Any", 1), positions[-1], cast("Any", None))
    assert taken == [b".", b"..", b"0", b"1", b"2"]
    assert fake.remembered == [b"0", b"1", b"2"]
    assert positions == sorted(set(positions)), "each position is another one"


@pytest.mark.parametrize(
    ("error", "template"),
    [(None, ""), (StoreFullError("full"), "release: %s"), (ValueError(), RELEASE_BUG)],
)
@pytest.mark.expect_log("release: %s")
@pytest.mark.expect_log(RELEASE_BUG)
async def test_a_release_that_publishes_is_answered_at_once(
    error: Exception | None, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    may_go_on, has_ended = trio.Event(), trio.Event()

    class Publishing(Recording):
        publishes = True

        async def release(self, handle: int) -> None:
            about_to_wait()
            await may_go_on.wait()
            has_ended.set()
            if error is not None:
                raise error

    calls = operations(Publishing())
    await calls.release(pyfuse3.FileHandleT(3))
    assert not has_ended.is_set()
    may_go_on.set()
    with trio.fail_after(10):
        await has_ended.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert [r.msg for r in caplog.records if r.name == "etcdfs.fuse.operations"] == (
        [template] if error else []
    )


# --- waiting --------------------------------------------------------------------------------


class Waiting(Recording):
    """A filesystem and open files that cannot answer from memory."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answer = super().__getattr__(name)

        async def call(*args: Any) -> Any:
            about_to_wait()
            return await answer(*args)

        return call


async def refused(answer: Awaitable[Any]) -> bool:
    try:
        await answer
    except FUSEError as exc:
        return exc.errno == errno.EAGAIN
    return False


async def test_who_waits_too_often_is_refused_before_anything_is_done() -> None:
    fake = Waiting(opendir=3, getattr=ATTRIBUTES)
    calls = operations(fake)
    calls.admission = admission = Admission(2)
    inode, handle = pyfuse3.InodeT(5), pyfuse3.FileHandleT(3)
    assert not await refused(calls.getattr(inode, CONTEXT))
    assert admission.statistics().waiting == 0, "it gave its place back"
    assert await calls.opendir(inode, CONTEXT) == handle
    done = len(fake.calls)
    admission.take(CONTEXT.uid)
    assert await refused(calls.getattr(inode, CONTEXT))
    assert not await refused(calls.fsyncdir(handle, False)), "it need not wait"
    assert len(fake.calls) == done
    assert await refused(calls.rmdir(inode, pyfuse3.FileNameT(b"d"), CONTEXT))
    assert admission.statistics().refused == 2
    other = SimpleNamespace(uid=77, gid=2, pid=os.getpid(), umask=0)
    assert not await refused(calls.getattr(inode, cast("pyfuse3.RequestContext", other)))


async def test_a_call_with_a_handle_waits_for_who_opened_it() -> None:
    calls = operations(Waiting(open=3, flush=None, release=None))
    calls.admission = admission = Admission(2)
    inode, handle = pyfuse3.InodeT(5), pyfuse3.FileHandleT(3)
    await calls.open(inode, pyfuse3.FlagT(os.O_RDWR), CONTEXT)
    admission.take(CONTEXT.uid)
    assert await refused(calls.flush(handle))
    assert not await refused(calls.release(handle)), "or nobody would ever release it"


@pytest.mark.expect_log(UNTAKEN)
@pytest.mark.parametrize(
    ("error", "level"), [(errno.ENOENT, logging.DEBUG), (errno.EINVAL, logging.ERROR)]
)
def test_an_answer_that_nobody_waits_for_is_no_error(
    error: int, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The mount went away. Any other answer that the kernel does not take is an error still."""
    theirs = logging.getLogger("pyfuse3")
    theirs.addFilter(quieten)
    try:
        for threshold in (logging.DEBUG, logging.INFO):
            theirs.setLevel(threshold)
            theirs.error(UNTAKEN, os.strerror(error))
    finally:
        theirs.removeFilter(quieten)
        theirs.setLevel(logging.NOTSET)
    logged = [record.levelno for record in caplog.records]
    assert logged == ([level] if level < logging.INFO else [level, level])


# --- the control directory ------------------------------------------------------------------


def with_control() -> Operations:
    """Return handlers whose filesystem fails at whatever it is asked."""
    fake = cast("Any", Raising(RuntimeError("the filesystem was asked")))
    control = ControlDirectory({b"status": lambda: b"content"}, owner=3, is_private=True)
    return Operations(fake, fake, fake, store=None, control=control)


async def control_inode(served: Operations, name: bytes | None = None) -> Any:
    """Return the inode of the control directory, or of a file in it."""
    packed = await served.lookup(pyfuse3.ROOT_INODE, pyfuse3.FileNameT(CONTROL_NAME), CONTEXT)
    if name is not None:
        packed = await served.lookup(packed.st_ino, pyfuse3.FileNameT(name), CONTEXT)
    return packed.st_ino


async def test_a_request_about_the_control_directory_never_reaches_the_filesystem() -> None:
    """Nor is it ENOSYS, which the kernel would take for an answer for all files."""
    served = with_control()
    answered = {}
    for inode in (await control_inode(served), await control_inode(served, b"status")):
        for name in handlers():
            if name in {"statfs", "read", "readdir", "release"}:  # of no inode, or of what is open
                continue
            made = arguments(getattr(Operations, name))
            at = 2 if name == "rename" else 0
            made[at] = inode
            try:
                await getattr(served, name)(*made)
            except FUSEError as exc:
                answered[name] = exc.errno
    refused = {name for name, number in answered.items() if number == errno.EPERM}
    assert refused == {
        *("create", "link", "mkdir", "mknod", "open", "readlink", "removexattr", "rename"),
        *("rmdir", "setattr", "setxattr", "symlink", "unlink", "write"),
    }
    others = {name: number for name, number in answered.items() if name not in refused}
    assert others == {"getxattr": errno.ENODATA, "lookup": errno.ENOENT}


@pytest.mark.parametrize(
    "name", ["mkdir", "create", "rmdir", "unlink", "rename", "symlink", "link"]
)
async def test_the_control_directory_itself_stays(name: str) -> None:
    made = arguments(getattr(Operations, name))
    at = 1 if name == "link" else 0
    made[at : at + 2] = [pyfuse3.ROOT_INODE, CONTROL_NAME]
    assert await errno_of(getattr(with_control(), name)(*made)) == errno.EPERM


async def test_a_control_file_is_made_at_its_lookup_and_stays_until_it_is_forgotten() -> None:
    contents = iter((b"first", b"another"))
    control = ControlDirectory({b"status": lambda: next(contents)}, owner=3, is_private=False)
    fake = cast("Any", Recording())
    served = Operations(fake, fake, fake, store=None, control=control)
    inodes = [await control_inode(served, b"status") for _ in range(2)]
    sizes = [(await served.getattr(inode, CONTEXT)).st_size for inode in inodes]
    assert sizes == [len(b"first"), len(b"another")]
    opened = [await served.open(i, pyfuse3.FlagT(os.O_RDONLY), CONTEXT) for i in inodes]
    assert [await served.read(info.fh, 0, 100) for info in opened] == [b"first", b"another"]
    assert await served.read(opened[0].fh, 2, 2) == b"rs"
    served.forget([(inodes[0], 1), (pyfuse3.InodeT(5), 2)])
    assert (await served.getattr(inodes[0], CONTEXT)).st_size == 0
    assert await served.read(opened[1].fh, 0, 100) == b"another"
    assert fake.calls == [("forget", [(5, 2)])]


async def test_the_control_directory_is_not_forgotten_in_the_tree() -> None:
    fake = cast("Any", Recording())
    control = ControlDirectory({}, owner=3, is_private=False)
    served = Operations(fake, fake, fake, store=None, control=control)
    inode = await control_inode(served)
    served.forget([(inode, 1), (pyfuse3.InodeT(5), 2)])
    assert fake.calls == [("forget", [(5, 2)])]
