"""What is free again is given back to the system."""

import subprocess
import sys

PROGRAM = """
import sys
from etcdfs.process.memory import keep_heap_small
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1:]:
    keep_heap_small()
for size in (200_000, 1_000_000, 5_000_000):  # so that glibc learns to keep such blocks
    held = [bytes(size) for _ in range(20)]
    held.clear()
before = resident()
held = [b"x" * 200_000 for _ in range(500)]
kept = held[499]
held.clear()
print(resident() - before)
"""


def test_large_values_are_given_back() -> None:
    def grown(*arguments: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, check=True, timeout=60
        )
        return int(done.stdout)

    assert grown("small") < 4_000_000
    assert grown() > 50_000_000, "the allocator does so by itself"
