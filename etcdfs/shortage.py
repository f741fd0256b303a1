"""When memory runs out, and what is said then.

What this room knows: how Python says that there is none, and where the limits are. What it must
not know: who wanted it.

Only a limit of the process itself is heard of like this (`ulimit -v`, RLIMIT_AS). What exceeds
that of a container is killed by the kernel, without a word; whoever waits for the process, and
the next mount, can tell that it was killed, and the kernel's log says why.

Concurrency: none.
"""

import errno
import resource
from pathlib import Path
from typing import Final

_STATM: Final = Path("/proc/self/statm")
_MIB: Final = 1024 * 1024


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error comes from memory that could not be had."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_shortage, error.exceptions))
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # A thread needs memory for its stack; Python has no class for that.
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)


def describe_shortage() -> str:
    """Return what a person needs to know about it."""
    used = int(_STATM.read_text().split()[0]) * resource.getpagesize() // _MIB
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return f"no memory is left; this process has {used} MiB of address space"
    return (
        f"no memory is left; this process has {used} MiB of address space, "
        f"and may have {limit // _MIB} (ulimit -v)"
    )
