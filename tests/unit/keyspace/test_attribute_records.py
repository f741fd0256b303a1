"""Record keys: the mapping, the record's text, and when a record is void."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.keyspace.attribute_records import (
    ATTRIBUTES,
    ATTRIBUTES_END,
    DEPTH_MAX,
    ID_MAX,
    Record,
    RecordError,
    clamped,
    decode,
    encode,
    is_record_key,
    is_void,
    is_xattr_name,
    moved,
    owner_of,
    read,
    record_key,
    record_range,
)
from etcdfs.keyspace.store import KeyValue, Revision
from etcdfs.tree.inodes import File, Inode, KeyState, StoredRecord
from etcdfs.vfs.attributes import Attributes, Change, Defaults
from tests.support.odd_records import ODD, Odd

VALUES = [odd.value for odd in ODD]

REVISION = 40


def entry(key: bytes, value: bytes, created: int, modified: int) -> KeyValue:
    return KeyValue(key, value, Revision(created), Revision(modified), 1)


times = st.none() | st.integers(-(2**63) * 10**9, 2**63 * 10**9).map(clamped)
records = st.builds(
    Record,
    mode=st.none() | st.integers(0, 0o7777),
    uid=st.none() | st.integers(0, ID_MAX),
    gid=st.none() | st.integers(0, ID_MAX),
    type=st.sampled_from((None, "symlink", "fifo", "socket")),
    mtime_ns=times,
    atime_ns=times,
    xattrs=st.dictionaries(
        st.binary(max_size=250).map(b"user.".__add__).filter(is_xattr_name), st.binary()
    ),
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(
    ("mode", "uid", "gid", "type", "mtime_ns", "mtime_revision", "atime_ns", "xattrs")
)
DEFAULTS = Defaults(uid=7, gid=8, file_mode=0o666, dir_mode=0o777, umask=0o022)


@st.composite
def spliced(draw: st.DrawFn) -> bytes:
    """Return odd records with parts of others in them."""
    value = draw(st.sampled_from(VALUES))
    for _ in range(draw(st.integers(0, 3))):
        part = draw(st.sampled_from(VALUES) | st.binary(max_size=4))
        start, end = sorted((draw(st.integers(0, len(part))), draw(st.integers(0, len(part)))))
        at = draw(st.integers(0, len(value)))
        value = value[:at] + part[start:end] + value[at + draw(st.integers(0, 4)) :]
    return value


def shown(record: Record) -> Attributes:
    file = File(Inode(2), KeyState(Revision(1), Revision(1), 1, 0, 0), 0)
    file.stored_record = StoredRecord(record, KeyState(Revision(1), Revision(1), 1, 0, 0))
    return DEFAULTS.of(file, 0.0)


def group_and_others(record: Record) -> int:
    # A link's mode is always 0777, and asked by nobody.
    return 0 if record.type == "symlink" else shown(record).mode & 0o077


class TestKeys:
    @given(st.binary(min_size=1))
    def test_each_key_has_its_own(self, key: bytes) -> None:
        assert owner_of(record_key(key)) == key
        assert is_record_key(record_key(key))
        assert ATTRIBUTES < record_key(key) < ATTRIBUTES_END

    def test_a_name_that_only_begins_alike_is_none(self) -> None:
        assert not is_record_key(b"/.etcdfs/attrs")
        assert not is_record_key(b"/.etcdfs/attributes/x")

    @given(st.binary(max_size=4), st.binary(min_size=1, max_size=8))
    def test_the_range_of_a_prefix_holds_what_is_below_it(self, prefix: bytes, key: bytes) -> None:
        start, end = record_range(prefix)
        assert (start <= record_key(key) < end) == key.startswith(prefix)


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

    @pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
    def test_an_odd_record_narrows_access(self, odd: Odd) -> None:
        record = read(entry(record_key(b"f"), odd.value, 1, REVISION))
        found = shown(record)
        assert (found.mode, found.uid, found.gid) == (odd.mode, odd.uid, odd.gid)
        assert sorted(record.xattrs) == sorted(odd.xattrs)
        assert read(entry(record_key(b"f"), encode(record), 1, REVISION)) == record

    @pytest.mark.parametrize("name", ["mode", "uid", "gid", "type"])
    def test_b59_nothing_said_of_who_may_have_it_is_no_default(self, name: str) -> None:
        text = b'{"%s":null}' % name.encode()
        record = decode(text, REVISION)
        assert record.is_doubtful
        assert encode(record) == text

    @given(st.binary(max_size=40) | spliced())
    def test_whatever_is_there_is_read_and_stays(self, value: bytes) -> None:
        """No error but one, and what this version writes back says the same."""
        try:
            record = decode(value, REVISION)
        except RecordError:
            assert group_and_others(read(entry(record_key(b"f"), value, 1, REVISION))) == 0
            return
        shown(record)
        assert decode(encode(record), REVISION) == record

    @given(records, st.dictionaries(fields, junk, min_size=1, max_size=3))
    def test_a_field_that_cannot_be_read_voids_no_other(
        self, record: Record, bad: dict[str, object]
    ) -> None:
        good = json.loads(encode(record))
        found = decode(json.dumps({**good, **bad}).encode(), REVISION)
        unread = set(bad) & set(found.unknown)
        for name in {"mode", "uid", "gid", "type", "atime_ns", "xattrs"} - set(bad):
            assert getattr(found, name) == getattr(record, name)
        if unread & {"mode", "uid", "gid", "type"}:
            assert group_and_others(found) == 0
            assert found.is_doubtful

    @pytest.mark.parametrize("depth", range(1, 40))
    def test_the_depth_of_the_stack_decides_nothing(self, depth: int) -> None:
        """Two mounts would show different modes, and audits would never agree."""
        value = b'{"mode":"0666","z":' + b"[" * depth + b"]" * depth + b"}"

        def deep(levels: int) -> Record:
            if levels:
                return deep(levels - 1)
            return read(entry(record_key(b"f"), value, 1, REVISION))

        assert deep(0) == deep(600)
        assert (group_and_others(deep(0)) == 0o066) == (depth < DEPTH_MAX)

    def test_brackets_in_text_are_not_deep(self) -> None:
        text = json.dumps({"mode": "0666", "note": '[{"' * 1000 + "\\"}).encode()
        assert decode(text, REVISION).mode == 0o666

    @given(records)
    def test_who_sets_a_mode_leaves_no_doubt(self, record: Record) -> None:
        record = replace(record, unknown={"mode": "1", "uid": "-1", "gid": '""', "other": "1"})
        file = File(Inode(2), KeyState(Revision(1), Revision(1), 1, 0, 0), 0)
        file.stored_record = StoredRecord(record, KeyState(Revision(1), Revision(1), 1, 0, 0))
        changed = DEFAULTS.changed(file, Change(mode=0o604), mtime_holds=True)
        assert not changed.is_doubtful
        assert changed.unknown == {"other": "1"}
        timed = DEFAULTS.changed(file, Change(mtime_ns=1), mtime_holds=True)
        assert timed.is_doubtful

    def test_an_mtime_holds_for_one_version(self) -> None:
        own = decode(b'{"mtime_ns":5}', REVISION)
        assert own.mtime_at(REVISION) == 5
        assert own.mtime_at(REVISION + 1) is None
        other = decode(b'{"mtime_ns":5,"mtime_revision":3}', REVISION)
        assert other.mtime_at(3) == 5
        assert other.mtime_at(REVISION) is None
        assert not other.without_mtime()

    def test_one_older_than_its_key_is_void(self) -> None:
        stored_record = entry(record_key(b"a"), b"{}", 1, 5)
        assert is_void(stored_record, 6)
        assert not is_void(stored_record, 5)
        assert not is_void(stored_record, 4)


class TestMoved:
    def test_what_was_set_for_this_version_is_set_for_the_new_key(self) -> None:
        stored_record = entry(
            record_key(b"a"), b'{"mode":"0600","mtime_ns":5,"mtime_revision":8}', 9, 9
        )
        assert moved(stored_record, entry(b"a", b"", 3, 8)) == b'{"mode":"0600","mtime_ns":5}'

    def test_the_mtime_of_an_older_version_stays_behind(self) -> None:
        stored_record = entry(record_key(b"a"), b'{"mode":"0600","mtime_ns":5}', 7, 7)
        assert moved(stored_record, entry(b"a", b"", 3, 8)) == b'{"mode":"0600"}'
        nothing = entry(record_key(b"a"), b'{"mtime_ns":5}', 7, 7)
        assert moved(nothing, entry(b"a", b"", 3, 8)) is None

    def test_a_void_record_stays_behind(self) -> None:
        stored_record = entry(record_key(b"a"), b'{"mode":"0600"}', 2, 2)
        assert moved(stored_record, entry(b"a", b"", 3, 3)) is None

    def test_what_cannot_be_read_is_taken_along_as_it_is(self) -> None:
        stored_record = entry(record_key(b"a"), b"?", 4, 4)
        assert moved(stored_record, entry(b"a", b"", 3, 3)) == b"?"


def test_as_many_names_are_read_as_listxattr_can_return() -> None:
    """The rest stays as it is, in the order of the names."""
    names = [f"user.{n:0250d}" for n in range(257)]  # of 255 bytes, and a NUL behind each
    full = json.dumps({"xattrs": dict.fromkeys(names[:256], "")}).encode()
    assert list(decode(full, REVISION).xattrs) == [name.encode() for name in names[:256]]
    assert decode(full, REVISION).unknown == {}
    more = decode(json.dumps({"xattrs": dict.fromkeys(names, "")}).encode(), REVISION)
    assert list(more.xattrs) == [name.encode() for name in names[:256]]
    assert json.loads(more.unknown["xattrs"]) == {names[256]: ""}
