"""Side keys: the mapping, the record's text, and when a record is void."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.sidekeys import (
    ATTRIBUTES,
    ATTRIBUTES_END,
    ID_MAX,
    Record,
    RecordError,
    decode,
    encode,
    is_side_key,
    is_void,
    moved,
    owner_of,
    side_key,
    side_range,
)
from etcdfs.store import KeyValue, Revision

REVISION = 40


def entry(key: bytes, value: bytes, created: int, modified: int) -> KeyValue:
    return KeyValue(key, value, Revision(created), Revision(modified), 1)


times = st.none() | st.integers(-(2**63) + 1, 2**63 - 1)
records = st.builds(
    Record,
    mode=st.none() | st.integers(0, 0o7777),
    uid=st.none() | st.integers(0, ID_MAX),
    gid=st.none() | st.integers(0, ID_MAX),
    type=st.sampled_from((None, "symlink", "fifo", "socket")),
    mtime_ns=times,
    atime_ns=times,
    xattrs=st.dictionaries(st.binary(min_size=1, max_size=20).map(b"user.".__add__), st.binary()),
)


class TestKeys:
    @given(st.binary(min_size=1))
    def test_each_key_has_its_own(self, key: bytes) -> None:
        assert owner_of(side_key(key)) == key
        assert is_side_key(side_key(key))
        assert ATTRIBUTES < side_key(key) < ATTRIBUTES_END

    def test_a_name_that_only_begins_alike_is_none(self) -> None:
        assert not is_side_key(b"/.etcdfs/attrs")
        assert not is_side_key(b"/.etcdfs/attributes/x")

    @given(st.binary(max_size=4), st.binary(min_size=1, max_size=8))
    def test_the_range_of_a_prefix_holds_what_is_below_it(self, prefix: bytes, key: bytes) -> None:
        start, end = side_range(prefix)
        assert (start <= side_key(key) < end) == key.startswith(prefix)


class TestRecords:
    @given(records)
    def test_what_is_written_is_read(self, record: Record) -> None:
        found = decode(encode(record), REVISION)
        expected = REVISION if record.mtime_ns is not None else 0
        assert found == Record(
            mode=record.mode,
            uid=record.uid,
            gid=record.gid,
            type=record.type,
            mtime_ns=record.mtime_ns,
            mtime_revision=expected,
            atime_ns=record.atime_ns,
            xattrs=record.xattrs,
        )
        assert decode(encode(found), REVISION + 1) == found

    def test_people_can_read_it(self) -> None:
        record = Record(mode=0o640, uid=3, mtime_ns=5, mtime_revision=7, xattrs={b"user.a": b"b"})
        assert json.loads(encode(record)) == {
            "mode": "0640",
            "uid": 3,
            "mtime_ns": 5,
            "mtime_revision": 7,
            "xattrs": {"user.a": "Yg=="},
        }

    def test_one_that_says_nothing_is_false(self) -> None:
        assert not Record()
        assert Record(mode=0)
        assert not decode(b"{}", REVISION)

    def test_unknown_fields_are_kept(self) -> None:
        text = b'{"flags":{"a":[1,null]},"mode":"0600"}'
        assert json.loads(encode(decode(text, REVISION))) == json.loads(text)

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\xff",
            b"[]",
            b"1",
            b"[" * 100_000,
            b'{"mode": 384}',
            b'{"mode": "0o600"}',
            b'{"mode": "99"}',
            b'{"mode": "10000"}',
            b'{"uid": -1}',
            b'{"uid": 4294967295}',
            b'{"gid": true}',
            b'{"gid": "1"}',
            b'{"type": "device"}',
            b'{"type": []}',
            b'{"mtime_ns": 1.5}',
            b'{"mtime_ns": 9223372036854775808}',
            b'{"mtime_ns": 1, "mtime_revision": 0}',
            b'{"xattrs": []}',
            b'{"xattrs": {"user.a": 1}}',
            b'{"xattrs": {"user.a": "?"}}',
            b'{"xattrs": {"\\ud800": ""}}',
        ],
    )
    def test_anything_else_is_refused(self, text: bytes) -> None:
        with pytest.raises(RecordError):
            decode(text, REVISION)

    def test_an_mtime_holds_for_one_version(self) -> None:
        own = decode(b'{"mtime_ns":5}', REVISION)
        assert own.mtime_at(REVISION) == 5
        assert own.mtime_at(REVISION + 1) is None
        other = decode(b'{"mtime_ns":5,"mtime_revision":3}', REVISION)
        assert other.mtime_at(3) == 5
        assert other.mtime_at(REVISION) is None
        assert not other.without_mtime()

    def test_one_older_than_its_key_is_void(self) -> None:
        side = entry(side_key(b"a"), b"{}", 1, 5)
        assert is_void(side, 6)
        assert not is_void(side, 5)
        assert not is_void(side, 4)


class TestMoved:
    def test_what_was_set_for_this_version_is_set_for_the_new_key(self) -> None:
        side = entry(side_key(b"a"), b'{"mode":"0600","mtime_ns":5,"mtime_revision":8}', 9, 9)
        assert moved(side, entry(b"a", b"", 3, 8)) == b'{"mode":"0600","mtime_ns":5}'

    def test_the_mtime_of_an_older_version_stays_behind(self) -> None:
        side = entry(side_key(b"a"), b'{"mode":"0600","mtime_ns":5}', 7, 7)
        assert moved(side, entry(b"a", b"", 3, 8)) == b'{"mode":"0600"}'
        nothing = entry(side_key(b"a"), b'{"mtime_ns":5}', 7, 7)
        assert moved(nothing, entry(b"a", b"", 3, 8)) is None

    def test_a_void_record_stays_behind(self) -> None:
        side = entry(side_key(b"a"), b'{"mode":"0600"}', 2, 2)
        assert moved(side, entry(b"a", b"", 3, 3)) is None

    def test_what_cannot_be_read_is_taken_along_as_it_is(self) -> None:
        side = entry(side_key(b"a"), b"?", 4, 4)
        assert moved(side, entry(b"a", b"", 3, 3)) == b"?"
