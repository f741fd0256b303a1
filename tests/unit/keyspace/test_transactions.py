"""The transactions, carried out by an etcd in memory, against rules spelled out on sets of keys."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from etcdfs.errors import TransactionAbortedError
from etcdfs.keyspace.store import (
    Committed,
    Delete,
    KeyValue,
    Page,
    Put,
    Revision,
    Transaction,
    range_end,
)
from etcdfs.keyspace.transactions import (
    MAX_KEYS,
    WIDTH,
    Rewriting,
    clear_marker,
    make_directory,
    make_file,
    move_file,
    parent_prefix,
    remove_directory,
    remove_file,
    stay_without,
)
from tests.support.fake_store import FakeStore
from tests.support.fake_transaction import MAX_OPERATIONS, _check_operations

ROOT = b"/"
KEYS = [b"/a", b"/a/", b"/a//", b"/a/b", b"/a/b/", b"/a/b/c", b"/a-b", b"/a0", b"/c", b"/c/d"]
_some = st.sets(st.sampled_from(KEYS))
_files = st.sampled_from([key for key in KEYS if not key.endswith(b"/")])
_directories = st.sampled_from([b"/a", b"/a/b", b"/c", b"/a/b/c", b"/a/"])


def store_of(keys: Iterable[bytes]) -> FakeStore:
    store = FakeStore()
    for key in sorted(keys):
        store.put_now(key, b"value of " + key)
    return store


def keys_of(store: FakeStore) -> set[bytes]:
    return {entry.key for entry in store.range_now(b"/", b"0").entries}


def below(keys: set[bytes], directory: bytes) -> set[bytes]:
    return {key for key in keys if key.startswith(directory + b"/")}


def staying(keys: set[bytes], parent: bytes | None) -> set[bytes]:
    """Return what is added so that a directory stays whose last entry has gone."""
    if parent is None or any(key.startswith(parent) for key in keys):
        return set()
    return {parent}


def test_parent_prefix() -> None:
    assert parent_prefix(b"/a", ROOT) is None
    assert parent_prefix(b"/a/", ROOT) is None
    assert parent_prefix(b"/a/b", ROOT) == b"/a/"
    assert parent_prefix(b"/a/b/", ROOT) == b"/a/"
    assert parent_prefix(b"/a//", ROOT) == b"/a/"
    assert parent_prefix(b"/a//b", ROOT) == b"/a//"
    assert parent_prefix(b"/p/a", b"/p/") is None
    assert parent_prefix(b"a", b"") is None
    assert parent_prefix(b"a/b", b"") == b"a/"


@given(keys=_some, key=_files, is_value=st.booleans())
def test_make_file(keys: set[bytes], key: bytes, is_value: bool) -> None:
    store = store_of(keys)
    done = store.commit_now(make_file(key, is_value=is_value))
    assert done.succeeded == (key not in keys and (is_value or not below(keys, key)))
    assert keys_of(store) == keys | ({key} if done.succeeded else set())


@given(keys=_some, key=_directories)
def test_make_directory(keys: set[bytes], key: bytes) -> None:
    store = store_of(keys)
    done = store.commit_now(make_directory(key + b"/"))
    is_file = key in keys and not key.endswith(b"/")  # else the name is empty, and that a marker
    assert done.succeeded == (not is_file and not below(keys, key))
    assert keys_of(store) == keys | ({key + b"/"} if done.succeeded else set())


@given(keys=_some, key=_files, is_value=st.booleans())
def test_remove_file(keys: set[bytes], key: bytes, is_value: bool) -> None:
    store = store_of(keys)
    parent = None if is_value else parent_prefix(key, ROOT)
    done = store.commit_now(remove_file(key, parent, is_value=is_value))
    assert done.succeeded == (key in keys and (is_value or not below(keys, key)))
    if done.succeeded:
        left = keys - {key}
        assert keys_of(store) == left | staying(left, parent)
    else:
        assert keys_of(store) == keys
        own, under = done.results
        assert isinstance(own, Page)
        assert isinstance(under, Page)
        assert bool(own.entries) == (key in keys)
        assert bool(under.entries) == bool(below(keys, key))


@given(keys=_some, key=_directories)
def test_remove_directory(keys: set[bytes], key: bytes) -> None:
    store = store_of(keys)
    marker = key + b"/"
    parent = parent_prefix(marker, ROOT)
    done = store.commit_now(remove_directory(marker, parent))
    entries = below(keys, key) - {marker}
    if not key.endswith(b"/"):  # the key of a directory's own name is an entry of it
        entries |= keys & {key}
    assert done.succeeded == (not entries)
    if done.succeeded:
        assert done.results[0] == len(keys & {marker})
        left = keys - {marker}
        assert keys_of(store) == left | staying(left, parent)
    else:
        assert keys_of(store) == keys


@given(keys=_some, source=_files, target=_files, replace=st.booleans(), is_value=st.booleans())
def test_move_file(
    keys: set[bytes], source: bytes, target: bytes, replace: bool, is_value: bool
) -> None:
    if (target + b"/").startswith(source + b"/"):  # onto itself, or into itself
        return
    store = store_of(keys)
    found = store.current(source)
    parent = parent_prefix(source, ROOT)
    if parent == parent_prefix(target, ROOT):
        parent = None
    done = store.commit_now(
        move_file(
            source,
            found.mod_revision if found else 99,
            target,
            Put(target, b"moved"),
            parent=parent,
            replace=replace,
            is_value=is_value,
        )
    )
    allowed = (
        source in keys and (is_value or not below(keys, target)) and (replace or target not in keys)
    )
    assert done.succeeded == allowed
    if allowed:
        left = (keys - {source}) | {target}
        assert keys_of(store) == left | staying(left, parent)
        assert store.revision == len(keys) + 2
    else:
        assert keys_of(store) == keys


def test_the_marker_that_makes_a_directory_stay_is_reported() -> None:
    store = store_of([b"/a/b"])
    done = store.commit_now(remove_file(b"/a/b", b"/a/", is_value=False))
    inner = done.results[-1]
    assert isinstance(inner, Committed)
    assert inner.succeeded
    assert store.current(b"/a/") is not None


def test_clear_marker() -> None:
    store = store_of([b"/a/"])
    assert store.commit_now(clear_marker(b"/a/")).succeeded
    found = store.current(b"/a/")
    assert found is not None
    assert found.value == b""
    assert not store.commit_now(clear_marker(b"/b/")).succeeded
    assert keys_of(store) == {b"/a/"}


@given(_some, _directories)
@example({b"/a//", b"/a/b/c"}, b"/a/b")
@example({b"/a/", b"/a//b"}, b"/a/")
def test_a_directory_stays_when_all_below_another_leaves_it(
    existing: set[bytes], directory: bytes
) -> None:
    store, prefix = store_of(existing), directory + b"/"
    parent = parent_prefix(prefix, ROOT)
    leaving = [Delete(prefix, range_end(prefix))]
    gone = below(existing, directory)
    if not directory.endswith(b"/"):  # that would be the parent's marker
        leaving.append(Delete(directory))
        gone |= {directory}
    store.commit_now(Transaction((), (*leaving, *stay_without(parent, prefix))))
    left = existing - gone
    assert keys_of(store) == left | staying(left, parent)
    for key in left:
        entry = store.current(key)
        assert entry is not None
        assert entry.value == b"value of " + key


def moving(count: int, *, found: int | None = None) -> Rewriting:
    """Return what moves keys from /s to /t, as many as were found there."""
    here = range(count if found is None else found)
    before = {key: KeyValue(key, b"", Revision(1), Revision(1), 1) for key in map(_source, here)}
    after = {key: Put(key, b"x") for key in map(_target, range(count))}
    return Rewriting(before=before, after=after, ranges=((b"/s/", b"/s0"),))


def _source(number: int) -> bytes:
    return b"/s/%05d" % number


def _target(number: int) -> bytes:
    return b"/t/%05d" % number


def test_a_rewriting_of_all_keys_it_may_have_is_within_etcds_limit() -> None:
    rewriting = moving(MAX_KEYS)
    assert rewriting.is_possible()
    transaction = rewriting.transaction(())
    _check_operations(transaction, MAX_OPERATIONS)
    # Each level has its width; what is left over is the outermost transaction's.
    (inner,) = (o for o in transaction.then if isinstance(o, Transaction))
    _check_operations(inner, 3 * WIDTH)
    assert not moving(MAX_KEYS + 1).is_possible()


@given(count=st.sampled_from([1, 2, WIDTH, WIDTH + 1, WIDTH * 2 + 3]), lost=st.integers(0, 200))
def test_a_rewriting_is_all_or_nothing(count: int, lost: int) -> None:
    store = store_of(_source(n) for n in range(count))
    entries = store.range_now(b"/s/", b"/s0").entries
    rewriting = Rewriting(
        before={entry.key: entry for entry in entries},
        after={_target(n): Put(_target(n), b"%d" % n) for n in range(count)},
        ranges=((b"/s/", b"/s0"),),
    )
    if lost < count:
        store.delete_now(_source(lost))
        before = store.range_now(b"/", b"0")
        with pytest.raises(TransactionAbortedError):
            store.commit_now(rewriting.transaction(()))
        assert store.range_now(b"/", b"0") == before
        return
    committed = store.commit_now(rewriting.transaction(()))
    assert committed.succeeded
    assert keys_of(store) == {_target(n) for n in range(count)}
    told = rewriting.events(committed.revision)
    assert sorted(told, key=lambda e: e.key) == sorted(
        store.events_of(committed.revision), key=lambda e: e.key
    )
