"""Listings are of one moment, and share what they have in common."""

from itertools import islice

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.files import open_directories
from etcdfs.files.open_directories import PIECE, ListingsByHash, OpenDirectories
from etcdfs.tree.inodes import Directory, File, Inode

ONE = File(Inode(2), None, 0)


def directory_of(names: list[bytes]) -> Directory:
    directory = Directory(Inode(1), 0)
    directory.children = dict.fromkeys(names, ONE)
    return directory


@given(st.lists(st.binary(max_size=3), unique=True, max_size=600), st.integers(0, 700))
def test_a_listing_goes_on_where_it_was(names: list[bytes], start: int) -> None:
    listings = OpenDirectories()
    handle = listings.open(directory_of(names))
    listings.take(handle)
    assert list(listings.names(handle, start)) == list(enumerate(names, 1))[start:]


def test_a_listing_is_of_one_moment() -> None:
    directory = directory_of([b"a", b"b"])
    listings = OpenDirectories()
    handle = listings.open(directory)
    assert list(listings.names(handle)) == []
    listings.take(handle)
    del directory.children[b"a"]
    assert [name for _, name in listings.names(handle)] == [b"a", b"b"]


def test_listings_of_a_directory_share_what_they_have_in_common() -> None:
    names = [b"%06d" % n for n in range(50 * PIECE)]
    directory = directory_of(names)
    listings = OpenDirectories()
    first = listings.open(directory)
    listings.take(first)
    alone = len(listings)
    assert alone > 10
    handles = [listings.open(directory) for _ in range(100)]
    for handle in handles[:50]:
        listings.take(handle)
    assert len(listings) == alone
    for handle in handles[50:]:  # each of another state: one name is made, one is taken away
        del directory.children[names[handle * 100]]
        directory.children[b"new%d" % handle] = ONE
        listings.take(handle)
    assert len(listings) <= alone + 50 * 4
    for handle in (first, *handles):
        listings.close(handle)
    assert len(listings) == 0


# --- without handles ------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=3), unique=True, max_size=600),
    st.sets(st.binary(max_size=3), max_size=50),
    st.integers(1, 100),
)
def test_what_stays_is_listed_once_wherever_readers_go_on(
    names: list[bytes], others: set[bytes], room: int
) -> None:
    """Other names come and go between any two answers, and all that was kept is lost."""
    directory = directory_of(names)
    staying = set(names) - others
    listed: list[bytes] = []

    async def read_all() -> None:
        position, more = 0, True
        while more:
            listings = ListingsByHash()
            await listings.take(directory, anew=position == 0)
            answer = list(islice(listings.names(directory, position), room))
            listed.extend(name for _, name in answer)
            position, more = (answer[-1][0], True) if answer else (position, False)
            for name in others:
                if directory.children.pop(name, None) is None:
                    directory.children[name] = ONE

    trio.run(read_all)
    assert sorted(name for name in listed if name in staying) == sorted(staying)


async def test_a_reader_who_begins_is_shown_what_is_there_now() -> None:
    directory = directory_of([b"a", b"b"])
    listings = ListingsByHash()
    await listings.take(directory, anew=True)
    directory.children[b"c"] = ONE
    directory.changes += 1
    await listings.take(directory, anew=False)
    assert {name for _, name in listings.names(directory, 0)} == {b"a", b"b"}
    await listings.take(directory, anew=True)
    assert {name for _, name in listings.names(directory, 0)} == {b"a", b"b", b"c"}


async def test_names_that_are_kept_in_order_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_directories, "KEPT_NAMES", 100)
    listings = ListingsByHash()
    for number in range(1, 50):
        directory = directory_of([b"%d" % name for name in range(30)])
        directory.inode = Inode(number)
        for _ in range(2):
            await listings.take(directory, anew=True)
        assert len(list(listings.names(directory, 0))) == 30
        assert len(listings) == min(number, 3) * 30
    large = directory_of([b"%d" % name for name in range(1000)])
    await listings.take(large, anew=True)
    assert len(list(listings.names(large, 0))) == len(listings) == 1000


async def test_names_of_a_forgotten_directory_are_not_kept() -> None:
    directory, listings = directory_of([b"a", b"b"]), ListingsByHash()
    await listings.take(directory, anew=True)
    listings.drop(directory.inode)
    listings.drop(directory.inode)
    assert len(listings) == 0
    await listings.take(directory, anew=False)
    assert len(list(listings.names(directory, 0))) == 2


async def test_others_get_their_turn_while_many_names_are_put_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_directories, "SLICE", 10)
    directory = directory_of([b"%d" % name for name in range(95)])
    listings = ListingsByHash()
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await listings.take(directory, anew=True)
        nursery.cancel_scope.cancel()
    assert turns >= 8
    assert sorted(name for _, name in listings.names(directory, 0)) == sorted(directory.children)
