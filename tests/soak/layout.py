"""The keys of a run, and what is done with each.

Concurrency: constants.
"""

from typing import Final

PREFIX: Final = "/soak/"

TOGETHER: Final = tuple(f"t/{n}" for n in range(5))  # always put in one transaction
SINGLE: Final = tuple(f"s/{n}" for n in range(10))  # put one at a time, of any size
LASTING: Final = tuple(f"q/{n}" for n in range(20))  # put now and then: each version stays
COUNTERS: Final = tuple(f"c/{n}" for n in range(4))  # read, bumped, and put if unchanged
CHURNED: Final = tuple(f"d/e/{n}" for n in range(6))  # put and deleted, the directory with them
MOUNTED: Final = tuple(f"m/{n}" for n in range(6))  # written through a second mount
LOG: Final = "a/log"  # appended to from everywhere

NAMES: Final = (*TOGETHER, *SINGLE, *LASTING, *COUNTERS, *CHURNED, *MOUNTED, LOG)
INDEX: Final = {name: index for index, name in enumerate(NAMES)}
COUNTING: Final = tuple(INDEX[name] for name in (*COUNTERS, LOG))

SIZES: Final = (40, 200, 4000, 4096, 5000, 12_000, 40_000)


def key(name: str) -> bytes:
    """Return the key of a name."""
    return (PREFIX + name).encode()
