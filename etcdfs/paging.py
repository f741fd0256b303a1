"""How much to ask for at a time, when all of a range is to be read.

What this room knows: that etcd bounds a page by keys only, and that memory is bounded in bytes.
What it must not know: who asks, and what for.

etcd makes a page in memory and sends it whole, whatever its size. So the next page has as many
keys as come to about `most_bytes` if they are like those of the one before, and to begin with, few.
Where large values follow small ones that is not enough: then the door refuses what is larger than
it can take (`AnswerTooLargeError`), and the page is asked for again with fewer keys.

Concurrency: one owner.
"""

from typing import Final, final

from etcdfs.store import Page

FIRST_KEYS: Final = 64
"""Keys of a first page, of which nothing is known."""

GROWTH: Final = 8
"""How many times as large the next page may be; also how many times as small, if it must."""

PAGE_BYTES: Final = 4 << 20
"""Bytes that a page is to have: about 20 ms, and little beside what a process takes anyway."""


@final
class Paging:
    """How many keys the next page of one range is to have.

    Attributes:
        limit: So many.
    """

    def __init__(
        self, most_keys: int, *, most_bytes: int = PAGE_BYTES, first_keys: int = FIRST_KEYS
    ) -> None:
        # --- constants
        self._most_keys = most_keys
        self._most_bytes = most_bytes
        # --- mutable state
        self.limit = min(first_keys, most_keys)

    def took(self, page: Page) -> None:
        """Learn from a page how large keys and values are."""
        if page.entries:
            size = sum(len(entry.key) + len(entry.value) for entry in page.entries)
            fitting = self._most_bytes * len(page.entries) // (size + 1)
            self.limit = max(1, min(fitting, self.limit * GROWTH, self._most_keys))

    def shrink(self) -> bool:
        """Ask for fewer, as that was too much; False if it cannot be less."""
        was, self.limit = self.limit, max(1, self.limit // GROWTH)
        return was > 1
