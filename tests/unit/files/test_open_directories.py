"""Listings are of one moment, and share what they have in common."""

from hypothesis import given
from hypothesis import strategies as st

from etcdfs.files.open_directories import PIECE, OpenDirectories
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
