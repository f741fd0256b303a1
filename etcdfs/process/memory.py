"""Giving memory back to the system.

Knows: what glibc's allocator does with memory that is free again. Does not know: what the memory
was for.

By default glibc takes larger and larger blocks from its heap, as it sees such blocks freed, and a
heap gives back only what is free at its end: one page of large values in the middle of a start and
the process has its size for ever. And each of gRPC's threads may have a heap of its own.

Concurrency: once, before there are threads.
"""

import ctypes
import logging
from typing import Final

log = logging.getLogger(__name__)

MAPPED_FROM: Final = 128 * 1024
"""Bytes from which on a block is mapped by itself, and unmapped when it is free. It is glibc's
default, but setting it keeps it there (mallopt(3))."""

HEAPS: Final = 2

_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_M_ARENA_MAX: Final = -8


def keep_heap_small() -> None:
    """Have large blocks given back as soon as they are free. Elsewhere than on glibc, do nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError) as exc:
        log.debug("this C library's memory cannot be tuned: %s", exc)
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    mallopt(_M_ARENA_MAX, HEAPS)
