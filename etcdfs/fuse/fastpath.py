"""The features that a library in C gives a mount, between pyfuse3 and libfuse (`_fastpath.c`).

Knows: which features there are, and whether the library could be had. Does not know: what follows
from each.

It is loaded before pyfuse3, which the dynamic linker binds to what is there already; hence the
package itself imports this module. Without a compiler, etcdfs is installed without the library;
then nothing here is in use.

Concurrency: of a request, ask as the first thing that its handler does: from its first `await` on
another one may be the last that the library has seen.
"""

import ctypes
import ctypes.util
import importlib
import logging
import os
import sys
from enum import IntFlag
from typing import Any, Final, final

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
    def flags(self) -> int | None:
        """The flags of a SETATTR or SETXATTR, None if they are not known."""
        return int(_library.flags()) if self._has(Feature.EXACT) else None

    def _has(self, feature: Feature) -> bool:
        return _library is not None and bool(self._wanted) and _library.features() & feature != 0


NO_FAST_PATH: Final = FastPath()


def fast_path_of(options: MountOptions) -> FastPath:
    """Return what the kernel is to be told beyond what pyfuse3 can tell it."""
    if options.fast_path == "off":
        return NO_FAST_PATH
    wanted = Feature.EXACT | Feature.NOFLUSH
    if options.kernel_lifetime_s:  # else each answer must be asked for
        wanted |= Feature.LISTINGS | Feature.SYMLINKS
    return FastPath(wanted, required=options.fast_path == "on")
