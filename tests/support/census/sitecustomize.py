"""Lets a process tell which objects live in it, and how many of each type.

Python imports a module of this name at its start. A process with this directory in its
PYTHONPATH writes its census as JSON into the file that ETCDFS_TEST_CENSUS names when it gets
SIGUSR2, and renames it into place so that nobody reads half of it. Only objects that the garbage
collector knows are counted, which is all that can hold others.
"""

import gc
import json
import os
import signal
import tracemalloc
from collections import Counter
from types import FrameType


def _take(number: int, frame: FrameType | None) -> None:
    gc.collect()
    census = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
    counted: dict[str, object] = {"types": census, "fds": len(os.listdir("/proc/self/fd"))}
    if tracemalloc.is_tracing():
        counted["traced"] = tracemalloc.get_traced_memory()[0]
        snapshot = tracemalloc.take_snapshot().statistics("lineno")[:15]
        counted["lines"] = [f"{s.traceback} {s.size} {s.count}" for s in snapshot]
    place = os.environ["ETCDFS_TEST_CENSUS"]
    with open(f"{place}.new", "w") as file:
        json.dump(counted, file)
    os.rename(f"{place}.new", place)


if "ETCDFS_TEST_CENSUS" in os.environ:
    signal.signal(signal.SIGUSR2, _take)
