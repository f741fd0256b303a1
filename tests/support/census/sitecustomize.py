"""Lets a process tell which objects live in it, and how many of each type.

Python imports a module of this name at its start. A process with this directory in its
PYTHONPATH writes its census as JSON into the file that TEST_CENSUS names when it gets
SIGUSR2, and renames it into place so that nobody reads half of it. Counted are the objects that
the garbage collector knows, which is all that can hold others, and what the containers of our own
objects hold, numbers and bytes included.
"""

import gc
import json
import os
import signal
import tracemalloc
from collections import Counter
from collections.abc import Sized
from types import FrameType
from typing import Any, TypeGuard


def _take(number: int, frame: FrameType | None) -> None:
    gc.unfreeze()
    gc.collect()
    types: Counter[str] = Counter()
    tables: Counter[str] = Counter()
    for something in gc.get_objects():
        kind = type(something)
        types[f"{kind.__module__}.{kind.__qualname__}"] += 1
        if str(kind.__module__).startswith("etcdfs."):  # not even that is always a str
            tables.update(_tables(something, kind))
    counted: dict[str, object] = {
        "types": types,
        "tables": tables,
        "fds": len(os.listdir("/proc/self/fd")),
    }
    if tracemalloc.is_tracing():
        counted["traced"] = tracemalloc.get_traced_memory()[0]
        snapshot = tracemalloc.take_snapshot().statistics("lineno")[:15]
        counted["lines"] = [f"{s.traceback} {s.size} {s.count}" for s in snapshot]
    place = os.environ["TEST_CENSUS"]
    with open(f"{place}.new", "w") as file:
        json.dump(counted, file)
    os.rename(f"{place}.new", place)


def _tables(owner: object, kind: type) -> dict[str, int]:
    """Return how much is in each of an object's own containers."""
    names = [*getattr(owner, "__dict__", ()), *getattr(kind, "__slots__", ())]
    held = ((name, getattr(owner, name, None)) for name in names)
    return {f"{kind.__qualname__}.{name}": len(table) for name, table in held if _is_sized(table)}


def _is_sized(table: Any) -> TypeGuard[Sized]:
    # Not `isinstance(table, Sized)`: that fills caches, which would be counted the next time.
    sized = any("__len__" in vars(base) for base in type(table).__mro__)
    return sized and not isinstance(table, str | bytes | tuple)


if "TEST_CENSUS" in os.environ:
    signal.signal(signal.SIGUSR2, _take)
