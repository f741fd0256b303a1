"""How much is asked for at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from etcdfs.errors import AnswerTooLargeError, StoreProtocolError
from etcdfs.keyspace.paging import (
    FIRST_KEYS,
    GROWTH,
    PAGE_BYTES,
    Pages,
    Paging,
    check_nearer,
)
from etcdfs.keyspace.store import KeyValue, Page, Revision
from etcdfs.mirror.state_machine import PAGE_SIZE
from tests.support.fake_store import FakeStore


def page(keys: int, size: int) -> Page:
    entries = (KeyValue(b"k", b"v" * (size - 1), Revision(1), Revision(1), 1) for _ in range(keys))
    return Page(tuple(entries), Revision(1), more=True)


def test_pages_grow_while_keys_are_small() -> None:
    paging = Paging(5000)
    limits = []
    for _ in range(4):
        limits.append(paging.limit)
        paging.took(page(paging.limit, 200))
    assert limits == [FIRST_KEYS, FIRST_KEYS * GROWTH, FIRST_KEYS * GROWTH**2, 5000]


def test_all_of_many_small_keys_comes_in_few_pages() -> None:
    """Each page costs etcd a walk over all that is left."""
    paging, left, pages = Paging(PAGE_SIZE), 1_000_000, 0
    while left > 0:
        taken = min(paging.limit, left)
        left, pages = left - taken, pages + 1
        paging.took(Page(page(1, 230).entries * taken, Revision(1), more=left > 0))
    assert pages <= 32
    assert paging.limit * 230 <= PAGE_BYTES


def test_large_values_come_few_at_a_time() -> None:
    paging = Paging(5000, most_bytes=4_000_000)
    paging.took(page(64, 1_000_000))
    assert paging.limit == 3
    paging.took(page(3, 100_000_000))
    assert paging.limit == 1, "one has to come, however large"


def test_what_is_too_large_is_asked_for_in_smaller_pages() -> None:
    paging = Paging(5000)
    assert paging.shrink()
    assert paging.limit == FIRST_KEYS // GROWTH
    assert paging.shrink()
    assert not paging.shrink()
    assert paging.limit == 1


async def test_pages_that_are_too_large_are_read_all_the_same() -> None:
    store = FakeStore()
    for n in range(100):
        store.put_now(b"%03d" % n, b"x" * (1000 if n < 70 else 1_000_000))
    bounded = store.range

    async def refusing(*args: object, limit: int = 0, **kwargs: object) -> Page:
        found = await bounded(*args, limit=limit, **kwargs)  # type: ignore[arg-type]
        if sum(len(entry.value) for entry in found.entries) > 4_000_000:
            raise AnswerTooLargeError("planted")
        return found

    door: Any = SimpleNamespace(range=refusing)
    pages, keys = Pages(door, b"\0", b"\xff", Paging(5000)), list[bytes]()
    while (found := await pages.next()) is not None:
        keys += [entry.key for entry in found.entries]
    assert keys == [b"%03d" % n for n in range(100)]


async def test_pages_without_end_are_not_read_for_ever() -> None:
    async def endless(start: bytes, *_args: object, **_kwargs: object) -> Page:
        await trio.lowlevel.checkpoint()
        entry = KeyValue(start + b"x", b"", Revision(1), Revision(1), 1)
        return Page((entry,), Revision(1), more=True, remaining=7)

    door: Any = SimpleNamespace(range=endless)
    pages = Pages(door, b"\0", b"\xff", Paging(10))
    await pages.next()
    with pytest.raises(StoreProtocolError):
        await pages.next()


def test_the_last_page_brings_all_that_was_left() -> None:
    """Not every etcd counts what is left after it."""
    check_nearer(2, page(2, 1))
    with pytest.raises(StoreProtocolError, match="2 keys were left of a range, and now 3"):
        check_nearer(2, page(3, 1))
