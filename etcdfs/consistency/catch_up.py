"""Waiting until a copy that was resumed from a snapshot has all that etcd has.

Knows: what shows that a copy which follows a watch has come to a revision that etcd named. Does not
know: where the copy comes from, how it follows, who waits.

A watch that goes on at an old revision brings what has happened since, and does not say when that
was all. The revision that etcd names may never come, as it counts what happens outside of the range
too; and a progress notice is no proof (see `etcdfs.mirror.watch_session`). But a copy at revision p
is the range at a later revision R if, and only if,

- none of the keys there are at R was changed after p, and
- at p there were as many keys as there are at R.

By the first, every key there is at R was there at p, just so; by the second, there was no other.
Both are asked of etcd, one by its newest key, one by its count of an old revision.

etcd loads a whole range to find the newest key in it. So it is asked for parts, as large as those
that the snapshot was read in.

Concurrency: trio thread; the copy goes on meanwhile, and is caught up as soon as it is at R itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import trio

from etcdfs.errors import CompactedError, StoreTimeoutError
from etcdfs.keyspace.store import Page, Revision, Store


class Resumed(Protocol):
    """A copy of a range that follows a watch."""

    @property
    def revision(self) -> int:
        """The revision that readers see."""
        ...

    @property
    def bounds(self) -> Sequence[bytes]:
        """Where its range begins, where it ends, and keys between which there are not too many."""
        ...

    async def advanced(self) -> None:
        """Return when readers see a newer revision."""
        ...

    def doubt(self, reason: str) -> None:
        """Have everything listed again."""
        ...


@dataclass(frozen=True, slots=True)
class _Held:
    """What etcd has in a range at a revision: so many keys, and when the last one was changed."""

    revision: Revision
    count: int
    newest: int


async def catch_up(store: Store, copy: Resumed, *, timeout_s: float) -> None:
    """Return once readers see all that etcd had in the range of a copy when this was called.

    Raises:
        StoreTimeoutError: The copy did not get any further for so long.
        StoreError: etcd could not be asked.
    """
    held = await _look(store, copy)
    while copy.revision < held.revision:
        at = copy.revision
        if at >= held.newest and await _is_all(store, copy, at, held.count):
            return
        if copy.revision != at:  # it went on while etcd was asked
            continue
        with trio.move_on_after(timeout_s) as waiting:
            await copy.advanced()
        if waiting.cancelled_caught:
            raise StoreTimeoutError(
                f"the watch does not go on: it is at revision {at}, and etcd at {held.revision}"
            )


async def _look(store: Store, copy: Resumed) -> _Held:
    revision, count, newest = Revision(0), 0, 0
    for start, end in pairwise(copy.bounds):
        page = await store.range(start, end, revision=revision, keys_only=True, newest=True)
        revision = revision or page.revision
        if copy.revision >= revision:
            break  # what it has is newer
        count += _count(page)
        newest = max([newest, *(entry.mod_revision for entry in page.entries)])
    return _Held(revision, count, newest)


async def _is_all(store: Store, copy: Resumed, at: int, count: int) -> bool:
    start, end = copy.bounds[0], copy.bounds[-1]
    try:
        page = await store.range(start, end, limit=1, revision=at, keys_only=True)
    except CompactedError:
        copy.doubt("what it was resumed from is compacted")
        return False
    return _count(page) == count


def _count(page: Page) -> int:
    return len(page.entries) + (page.remaining or 0)
