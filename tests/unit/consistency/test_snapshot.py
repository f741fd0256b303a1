"""What a snapshot says of itself, and whether that is believed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.consistency.snapshot import (
    Identity,
    Manifest,
    Position,
    Stream,
    StreamState,
    add_up,
    checksum,
    decode,
    encode,
    fault_in,
)
from etcdfs.errors import SnapshotDamagedError
from etcdfs.keyspace.store import KeyValue, Revision, Tombstone

revisions = st.integers(1, 2**62).map(Revision)
keys = st.binary(max_size=20)
entries = st.builds(KeyValue, keys, keys, revisions, revisions, revisions, st.integers(0, 2**62))
positions = st.builds(
    Position,
    revisions,
    st.lists(st.one_of(entries, st.builds(Tombstone, keys, revisions)), max_size=2).map(tuple),
)
identities = st.builds(
    Identity,
    cluster=st.integers(0, 2**64 - 1),
    prefix=keys,
    user=st.text(),
    attributes=st.booleans(),
    endpoints=st.lists(st.text(), max_size=2).map(tuple),
)
states = st.builds(
    StreamState,
    table=revisions,
    rows=revisions,
    digest=revisions,
    position=positions,
)
manifests = st.builds(
    Manifest,
    identity=identities,
    heard_ns=revisions,
    times=keys,
    streams=st.dictionaries(st.sampled_from(Stream), states),
)

OURS = Identity(cluster=7, prefix=b"/a/", user="me", attributes=True, endpoints=("h:1", "h:2"))
WHOLE = Manifest(
    identity=OURS,
    heard_ns=5,
    streams={
        Stream.KEYS: StreamState(table=1, rows=0, digest=0, position=Position(Revision(3), ()))
    },
)


@given(manifests)
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest) -> None:
    assert decode(encode(manifest)) == manifest


@given(manifests, st.data())
def test_b86_a_changed_manifest_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    written = bytearray(encode(manifest))
    at = data.draw(st.integers(0, len(written) - 1))
    written[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SnapshotDamagedError):
        decode(bytes(written))


@given(manifests, st.data())
def test_b86_a_manifest_that_was_cut_is_refused(manifest: Manifest, data: st.DataObject) -> None:
    written = encode(manifest)
    with pytest.raises(SnapshotDamagedError):
        decode(written[: data.draw(st.integers(0, len(written) - 1))])


@given(entries, entries)
def test_two_entries_have_one_checksum_only_if_they_are_the_same(
    one: KeyValue, other: KeyValue
) -> None:
    assert (checksum(one) == checksum(other)) == (one == other)
    moved = one._replace(key=one.key + one.value[:1], value=one.value[1:])
    assert (checksum(one) == checksum(moved)) == (one == moved), "the bytes are the same"


@given(st.lists(st.integers(0, 2**32 - 1)), st.data())
def test_a_digest_does_not_depend_on_what_came_and_went(
    sums: list[int], data: st.DataObject
) -> None:
    gone = data.draw(st.lists(st.integers(0, 2**32 - 1)))
    digest = add_up(0, added=sum(gone))
    for number in sums:
        digest = add_up(digest, added=number)
    assert add_up(digest, removed=sum(gone)) == add_up(0, added=sum(sums))


def test_b86_a_snapshot_of_ones_own_is_taken() -> None:
    assert fault_in(WHOLE, OURS) is None
    assert fault_in(WHOLE, replace(OURS, endpoints=("elsewhere:1",))) is None, "etcd says who it is"
    assert fault_in(WHOLE, replace(OURS, cluster=0, endpoints=("h:2", "h:3"))) is None


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (replace(OURS, cluster=8), "of another cluster (7, and this one is 8)"),
        (replace(OURS, prefix=b"/b/"), "of the prefix b'/a/'"),
        (replace(OURS, user="you"), "what me may read"),
        (replace(OURS, attributes=False), "with attributes"),
        (replace(OURS, cluster=0, endpoints=("h:3",)), "of the etcd at h:1, h:2"),
    ],
)
def test_b86_a_snapshot_of_something_else_is_refused(wanted: Identity, why: str) -> None:
    assert why in (fault_in(WHOLE, wanted) or "")


def test_b86_a_snapshot_that_was_not_finished_is_refused() -> None:
    assert fault_in(replace(WHOLE, streams={}), OURS) == "it was not finished"
