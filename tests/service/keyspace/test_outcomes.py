"""Writes whose answer was lost: what can be told afterwards, and what cannot."""

import pytest
from trio.testing import MockClock

from etcdfs.errors import OutcomeUnknownError, StoreUnavailableError
from etcdfs.keyspace.outcomes import ResolvingStore
from etcdfs.keyspace.store import END_OF_KEYS, Put, Transaction, exists, unchanged
from etcdfs.keyspace.transactions import (
    Rewriting,
    clear_marker,
    make_directory,
    make_file,
    move_file,
    remove_directory,
    remove_file,
)
from tests.support.fake_kernel import open_mount
from tests.support.fake_store import FakeStore

LOST = OutcomeUnknownError("no answer")


async def made() -> FakeStore:
    """Return a store with a directory and two files in it, one alone in its own."""
    store = FakeStore()
    keys = (b"/d/", b"/d/a", b"/e/alone", b"/m/")
    await store.commit(Transaction((), tuple(Put(key, b"1") for key in keys)))
    return store


def moving(store: FakeStore, mod_revision: int) -> Transaction:
    put = Put(b"/d/b", b"1")
    return move_file(
        b"/d/a", mod_revision, b"/d/b", put, parent=b"/d/", replace=True, is_value=False
    )


async def revision_of(store: FakeStore, key: bytes) -> int:
    (entry,) = (await store.range(key)).entries
    return entry.mod_revision


async def contents(store: FakeStore) -> dict[bytes, bytes]:
    return {e.key: e.value for e in (await store.range(b"", END_OF_KEYS)).entries}


TELLABLE = {
    "unlink": remove_file(b"/d/a", b"/d/", is_value=False),
    "unlink the last": remove_file(b"/e/alone", b"/e/", is_value=False),
    "rmdir": remove_directory(b"/m/", None),
    "clear": clear_marker(b"/m/"),
}


@pytest.mark.parametrize("name", TELLABLE)
async def test_what_has_left_its_traces_is_done(name: str) -> None:
    transaction = TELLABLE[name]
    expected = await (await made()).commit(transaction)
    store = await made()
    store.fail_next("commit", LOST, applied=True)
    done = await ResolvingStore(store).commit(transaction)
    assert done.succeeded
    assert done.revision == expected.revision
    assert len(done.results) == len(expected.results)
    assert done.results == expected.results


async def test_a_rename_is_known_by_both_its_ends() -> None:
    store = await made()
    transaction = moving(store, await revision_of(store, b"/d/a"))
    store.fail_next("commit", LOST, applied=True)
    done = await ResolvingStore(store).commit(transaction)
    assert done.succeeded
    assert done.revision == await revision_of(store, b"/d/b")
    assert await contents(store) == {b"/d/": b"1", b"/d/b": b"1", b"/e/alone": b"1", b"/m/": b"1"}


@pytest.mark.parametrize("name", TELLABLE)
async def test_what_has_left_no_trace_may_still_come(name: str) -> None:
    store = await made()
    before = await contents(store)
    store.fail_next("commit", LOST)
    with pytest.raises(OutcomeUnknownError):
        await ResolvingStore(store).commit(TELLABLE[name])
    assert await contents(store) == before


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize(
    "transaction", [make_directory(b"/new/"), make_file(b"/new", is_value=False)]
)
async def test_a_claim_is_never_taken_for_ones_own(transaction: Transaction, applied: bool) -> None:
    """Another client may have made just the same: then both would hold it."""
    store = await made()
    store.fail_next("commit", LOST, applied=applied)
    with pytest.raises(OutcomeUnknownError):
        await ResolvingStore(store).commit(transaction)


async def test_another_value_is_another_clients() -> None:
    store = await made()
    store.fail_next("commit", LOST)
    with pytest.raises(OutcomeUnknownError):
        await ResolvingStore(store).commit(Transaction((exists(b"/m/"),), (Put(b"/m/", b"2"),)))


async def test_a_lease_is_not_attached_because_the_value_is_the_same() -> None:
    """The value is put as it is, so that only its revision and its lease tell."""
    store = await made()
    known = await revision_of(store, b"/d/a")
    for lease in (0, await store.lease_grant(100)):
        again = Transaction((unchanged(b"/d/a", known),), (Put(b"/d/a", b"1", lease),))
        store.fail_next("commit", LOST)
        with pytest.raises(OutcomeUnknownError):
            await ResolvingStore(store).commit(again)


async def test_a_lease_is_known_by_its_number() -> None:
    store = await made()
    lease = await store.lease_grant(100)
    known = await revision_of(store, b"/d/a")
    store.fail_next("commit", LOST, applied=True)
    again = Transaction((unchanged(b"/d/a", known),), (Put(b"/d/a", b"1", lease),))
    assert (await ResolvingStore(store).commit(again)).succeeded


async def test_an_attribute_that_is_claimed_may_be_anothers() -> None:
    store = await made()
    store.fail_next("commit", LOST, applied=True)
    claim = Transaction((exists(b"/m/"),), (Put(b"/m/", b"2"),), claims=True)
    with pytest.raises(OutcomeUnknownError):
        await ResolvingStore(store).commit(claim)


@pytest.mark.parametrize("applied", [False, True])
async def test_a_directory_has_moved_if_it_is_there(applied: bool) -> None:
    """That it is no longer at its old name says little: another client may have deleted it."""
    store = await made()
    page = await store.range(b"/d/", b"/d0")
    before = {entry.key: entry for entry in page.entries}
    after = {b"/t" + key[2:]: Put(b"/t" + key[2:], e.value) for key, e in before.items()}
    moving = Rewriting(before=before, after=after, ranges=((b"/d/", b"/d0"),))
    store.fail_next("commit", LOST, applied=applied)
    if applied:
        assert (await ResolvingStore(store).commit(moving.transaction(()))).succeeded
        return
    store.delete_now(b"/d/", b"/d0")
    with pytest.raises(OutcomeUnknownError):
        await ResolvingStore(store).commit(moving.transaction(()))


async def test_when_it_cannot_be_read_back_it_stays_unknown() -> None:
    store = await made()
    store.fail_next("commit", LOST, applied=True)
    store.fail_next("commit", StoreUnavailableError("gone"))
    with pytest.raises(OutcomeUnknownError):
        await ResolvingStore(store).commit(TELLABLE["unlink"])


async def test_an_answer_that_comes_is_passed_on() -> None:
    store = await made()
    assert not (
        await ResolvingStore(store).commit(remove_file(b"/x", None, is_value=False))
    ).succeeded


@pytest.mark.parametrize(("is_there", "claims"), [(False, True), (True, False), (None, False)])
async def test_b127_only_what_must_not_be_there_is_claimed(
    autojump_clock: MockClock, is_there: bool | None, claims: bool
) -> None:
    store = FakeStore()
    store.put_now(b"/f", b"value")
    async with open_mount(store) as mount:
        inode = (await mount.kernel.walk((b"f",))).number
        name = b"user.there" if is_there else b"user.new"
        await mount.filesystem.xattrs.setxattr(inode, b"user.there", b"1")
        await mount.filesystem.xattrs.setxattr(inode, name, b"2", is_there)
        assert store.commit_calls[-1].claims is claims
