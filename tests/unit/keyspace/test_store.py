"""The port's own arithmetic."""

from hypothesis import example, given
from hypothesis import strategies as st

from etcdfs.keyspace.store import END_OF_KEYS, absent, exists, range_end, unchanged

# Few different bytes, so that prefixes and 0xff are common.
KEYS = st.lists(st.sampled_from(b"\x00a/\xfe\xff"), max_size=6).map(bytes)


def is_in_range(key: bytes, start: bytes, end: bytes) -> bool:
    return key >= start and (end == END_OF_KEYS or key < end)


@given(KEYS, KEYS)
@example(b"", b"")
@example(b"\xff\xff", b"\xff\xff\x00")
@example(b"a\xff", b"b")
@example(b"a/", b"a0")
def test_the_range_of_a_prefix_is_the_keys_that_begin_with_it(prefix: bytes, key: bytes) -> None:
    in_range = is_in_range(key, prefix, range_end(prefix))
    # A prefix of 0xff bytes has no successor; its range goes on to the end of the keyspace,
    # where no key can be that does not begin with it.
    assert in_range == key.startswith(prefix)


@given(KEYS)
def test_the_end_of_a_range_is_never_inside_it(prefix: bytes) -> None:
    end = range_end(prefix)
    assert end == END_OF_KEYS or (end > prefix and not end.startswith(prefix))


def test_conditions_by_name() -> None:
    assert (absent(b"a").field, absent(b"a").operator, absent(b"a").number) == (
        "create_revision",
        "==",
        0,
    )
    assert absent(b"a", b"b").end == b"b"
    assert (exists(b"a").operator, exists(b"a").number) == (">", 0)
    assert (unchanged(b"a", 7).field, unchanged(b"a", 7).number) == ("mod_revision", 7)
