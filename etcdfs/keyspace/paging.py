"""Reading all of a range, page by page, at one revision.

Knows: how pages follow one another, that they must come to an end, and that etcd bounds a page by
keys only, while memory is bounded in bytes. Does not know: what the pages are for.

etcd makes a page in memory and sends it whole, whatever its size. So the next page has as many
keys as come to about `most_bytes` if they are like those of the one before, and to begin with, few.
Where large values follow small ones that is not enough: then the door refuses what is larger than
it can take (`AnswerTooLargeError`), and the page is asked for again with fewer keys.

Concurrency: one owner, on the trio thread.
"""

from typing import Final, final

from etcdfs.errors import AnswerTooLargeError, StoreProtocolError
from etcdfs.keyspace.store import Page, Store

FIRST_KEYS: Final = 64
"""Keys of a first page, of which nothing is known."""

GROWTH: Final = 8
"""How many times as large the next page may be; also how many times as small, if it must."""

PAGE_BYTES: Final = 8 << 20
"""Bytes that a page is to have: about 40 ms, and little beside what a process takes anyway."""


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


def check_nearer(remaining: int, page: Page) -> None:
    """Refuse a page after which no fewer keys are left of a range than before.

    Args:
        remaining: The keys that were left of the range before it, or of more than that.
        page: The page.

    Raises:
        StoreProtocolError: It is such a page; there may be no end of them.
    """
    left = len(page.entries) + (page.remaining or 0)
    if left > remaining:
        msg = f"{remaining} keys were left of a range, and now {left}"
        raise StoreProtocolError(msg)


@final
class Pages:
    """The pages of a range that are still to come.

    Attributes:
        revision: The revision at which it is read; 0 until the first page says which.
    """

    def __init__(
        self,
        store: Store,
        start: bytes,
        end: bytes,
        paging: Paging,
        *,
        revision: int = 0,
        keys_only: bool = False,
    ) -> None:
        # --- dependencies
        self._store = store
        self._paging = paging
        # --- constants
        self._end = end
        self._keys_only = keys_only
        # --- mutable state
        self.revision = revision
        self._start = start
        self._remaining: int | None = None
        self._is_over = False

    async def next(self) -> Page | None:
        """Return the next page; None after the last one.

        Raises:
            CompactedError: The revision is no longer in history.
            StoreError: etcd could not be asked, or its pages come to no end.
        """
        if self._is_over:
            return None
        page = await self._read()
        if self._remaining is not None:
            check_nearer(self._remaining, page)
        self._remaining = page.remaining
        self.revision = self.revision or page.revision
        self._paging.took(page)
        self._is_over = not page.more
        if page.entries:
            self._start = page.entries[-1].key + b"\0"
        return page

    def skip_to(self, key: bytes) -> None:
        """Leave out what comes before a key."""
        if key > self._start:
            self._start = key
            self._is_over = self._is_over or key >= self._end

    async def _read(self) -> Page:
        while True:
            try:
                return await self._store.range(
                    self._start,
                    self._end,
                    limit=self._paging.limit,
                    revision=self.revision,
                    keys_only=self._keys_only,
                )
            except AnswerTooLargeError:
                if not self._paging.shrink():
                    raise
