"""What makes requests cheaper than pyfuse3 makes them by itself.

Knows: which features a library in C gives a mount, between pyfuse3 and libfuse (`_fastpath.c`), and
whether it could be had; and how pyfuse3's tasks take turns. Does not know: what follows from each.

It is loaded before pyfuse3, which the dynamic linker binds to what is there already; hence the
package itself imports this module. Without a compiler, etcdfs is installed without the library;
then nothing here is in use.

A request is cheap to answer, and each turn of trio's loop costs as much again. By itself, pyfuse3
takes two for each: a task that has read a request hands the lock for reading to the next task,
which has to run to wait for the kernel. But mostly the request is answered at once, and the first
could have gone on. So here the lock is handed to nobody before whoever had it waits for something
else (`few_turns`).

Concurrency: of a request, ask as the first thing that its handler does: from its first `await` on
another one may be the last that the library has seen.
"""

import ctypes
import ctypes.util
import importlib
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, IntFlag
from types import SimpleNamespace, TracebackType
from typing import Any, Final, final

import trio

from etcdfs.consistency.staleness import UNLIMITED
from etcdfs.errors import FuseRefusedError
from etcdfs.options import MountOptions

log = logging.getLogger(__name__)

_LIBRARY: Final = "etcdfs.fuse._fastpath"


class Feature(IntFlag):
    """What the library can do; the values and their meaning are those of `_fastpath.c`."""

    NONE = 0
    EXACT = 1
    NOFLUSH = 2
    LISTINGS = 4
    SYMLINKS = 8
    NO_OPEN = 16


class Use(IntEnum):
    """How a file is used by others than who asks; the values are those of `_fastpath.c`."""

    SHARED = 0
    ALONE = 1
    WRITTEN = 2


def _load() -> tuple[Any, str]:
    """Return the library, or None and why there is none."""
    if "pyfuse3" in sys.modules:
        return None, "pyfuse3 was loaded first"
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        return importlib.import_module(_LIBRARY), ""
    except ImportError as exc:
        return None, str(exc)
    finally:
        sys.setdlopenflags(flags)


_library, why_not = _load()


def libfuse_release() -> str | None:
    """Return which libfuse there is; None if it is not found."""
    name = ctypes.util.find_library("fuse3")
    if name is None:
        return None
    release = ctypes.CDLL(name).fuse_pkgversion
    release.restype = ctypes.c_char_p
    return str(release().decode())


def look_at(fd: int) -> Use:
    """Say whether anybody else has the file of a descriptor open; without a library, somebody has."""
    return Use.SHARED if _library is None else Use(_library.look_at(fd))


@final
class FastPath:
    """The features of one mount."""

    def __init__(self, wanted: Feature = Feature.NONE, *, required: bool = False) -> None:
        """Want some features; `required` ones keep the mount from doing without."""
        self._wanted = wanted
        self._required = required

    def prepare(self) -> None:
        """Have the features in the session that pyfuse3 is about to make."""
        if _library is not None:
            _library.wrap_next_session(int(self._wanted))

    def check(self) -> None:
        """Look, once there is a session, whether it has them.

        Raises:
            FuseRefusedError: It has not, and they are required.
        """
        if not self._wanted or self._has(Feature.EXACT):
            return
        why = why_not or "libfuse was not reached by way of it"
        if self._required:
            raise FuseRefusedError(f"--fast-path on: {why}")
        log.info("no fast path: %s", why)

    @property
    def features(self) -> Feature:
        """What is in use; complete once the kernel has made its first request."""
        return Feature(_library.features()) if _library is not None else Feature.NONE

    @property
    def keeps_listings(self) -> bool:
        """Whether directories are not opened; what is said to be the handle is the inode then."""
        return self._has(Feature.LISTINGS)

    @property
    def opens_unseen(self) -> bool:
        """Whether files are not opened; what is said to be the handle of a READ is the inode then."""
        return self._has(Feature.NO_OPEN)

    def forgo(self, feature: Feature) -> None:
        """Do without a feature; before the kernel has made its first request."""
        self._wanted &= ~feature
        if _library is not None:
            _library.forgo(int(feature))

    @property
    def reader(self) -> int | None:
        """The user who made a READ that comes with no handle, which would tell."""
        return int(_library.reader()) if self._has(Feature.NO_OPEN) else None

    @property
    def flags(self) -> int | None:
        """The flags of a SETATTR or SETXATTR, None if they are not known."""
        return int(_library.flags()) if self._has(Feature.EXACT) else None

    def _has(self, feature: Feature) -> bool:
        return _library is not None and bool(self._wanted) and _library.features() & feature != 0


NO_FAST_PATH: Final = FastPath()


def fast_path_of(options: MountOptions, *, may_look: bool) -> FastPath:
    """Return what the kernel is to be told beyond what pyfuse3 can tell it.

    Files that nobody writes need no open, if it can be found out otherwise who has one open
    (`may_look`). With `--max-stale` each open asks whether there is anything to be shown.
    """
    if options.fast_path == "off":
        return NO_FAST_PATH
    wanted = Feature.EXACT | Feature.NOFLUSH
    if options.kernel_lifetime_s:  # else each answer must be asked for
        wanted |= Feature.LISTINGS | Feature.SYMLINKS
        if options.read_only and may_look and options.max_stale_s == UNLIMITED:
            wanted |= Feature.NO_OPEN
    return FastPath(wanted, required=options.fast_path == "on")


# --- turns of the loop ------------------------------------------------------------------------

TASKS_MIN: Final = 16
"""Tasks that are kept while they have nothing to do; pyfuse3's default, one, makes a new one for
each request that waits for etcd."""


@final
class _ReadLock(trio.abc.Instrument):
    """Says which task reads from the kernel. Free when that one handles what it has read."""

    def __init__(self) -> None:
        self._is_free = True
        self._waiting: deque[trio.lowlevel.Task] = deque()

    async def __aenter__(self) -> None:
        if self._is_free:
            self._is_free = False
            return
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)  # it has the lock then

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._is_free = True

    def after_task_step(self, _task: trio.lowlevel.Task) -> None:
        """Hand the lock on if who had it waits, or has ended, and did not come back for it."""
        if self._is_free and self._waiting:
            self._is_free = False
            trio.lowlevel.reschedule(self._waiting.popleft())


_lock: Final = _ReadLock()


@contextmanager
def few_turns() -> Iterator[None]:
    """Have pyfuse3's loop take few turns of trio's for as long as the context lasts.

    pyfuse3 lets whoever comes replace the module `trio` that it uses; its own `pyfuse3.asyncio`
    does.
    """
    ours = SimpleNamespace(**{**vars(trio), "Lock": lambda: _lock})
    setattr(sys.modules["pyfuse3"], "trio", ours)  # noqa: B010 -- its types do not have it
    trio.lowlevel.add_instrument(_lock)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(_lock)
