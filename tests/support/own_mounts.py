"""A table of mounts for one process of the tests alone.

Knows: Linux' mount namespaces. Does not know: tests.

A process that begins a namespace of its own, as a container does, takes a copy of every mount there
is, those of other tests among them: and `etcdfs umount` says so, and their daemons live on with it.
So tests that run beside one another must not see one another's mounts.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

from etcdfs.process.mountpoint import SUBTYPE, parse_mountinfo

_CLONE_NEWNS: Final = 0x20000  # linux/sched.h
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000  # linux/mount.h
_MNT_DETACH: Final = 2


def begin_own_mounts() -> None:
    """Leave the mount namespace of all others: what is mounted from here on is seen here only.

    The mounts of etcdfs that are there already are not taken along.

    Raises:
        PermissionError: That is root's to do.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    check(libc.unshare(_CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))
    for mounted in parse_mountinfo(Path("/proc/self/mountinfo").read_bytes()):
        if mounted.type == f"fuse.{SUBTYPE}":
            libc.umount2(os.fsencode(mounted.path), _MNT_DETACH)
