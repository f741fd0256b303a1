"""The replica's transitions, one at a time; all of them together are in the stateful test."""

import pytest

from etcdfs.keyspace.store import (
    Event,
    KeyValue,
    Page,
    Revision,
    Tombstone,
    WatchEvents,
    WatchOpened,
    WatchProgress,
)
from etcdfs.mirror.messages import (
    Apply,
    BackOff,
    Close,
    CloseWatch,
    Doubted,
    Message,
    OpenWatch,
    PageArrived,
    PageTooLarge,
    Read,
    ReadFailed,
    Restore,
    RevisionAhead,
    RevisionCompacted,
    Stage,
    Step,
    WatchLost,
)
from etcdfs.mirror.state_machine import State, StateMachine

START, END = b"/a/", b"/a0"


def rev(number: int) -> Revision:
    return Revision(number)


def kv(key: bytes, mod: int, value: bytes = b"v") -> KeyValue:
    return KeyValue(key, value, rev(mod), rev(mod), 1)


def gone(key: bytes, mod: int) -> Tombstone:
    return Tombstone(key, rev(mod))


def page(*entries: KeyValue, at: int, more: bool = False) -> PageArrived:
    return PageArrived(Page(entries, rev(at), more))


def events(*changes: Event) -> WatchEvents:
    return WatchEvents(changes, changes[-1].mod_revision)


FIRST_PAGE = Read(START, END, rev(0), 2)
A5 = kv(b"/a/a", 5)
B9 = kv(b"/a/b", 7)


class Driven:
    """A replica that is checked after every message."""

    def __init__(self) -> None:
        self.state_machine = StateMachine(START, END, page_size=2)
        assert self.state_machine.start() == (FIRST_PAGE,)

    def tell(self, *messages: Message) -> tuple[Step, ...]:
        """Give messages one after another and return the steps of the last."""
        steps: tuple[Step, ...] = ()
        for message in messages:
            steps = self.state_machine.receive(message)
            self.state_machine.check_invariants()
        return steps


@pytest.fixture
def driven() -> Driven:
    return Driven()


@pytest.fixture
def watching() -> Driven:
    """A replica of two keys at revision 10, watching."""
    driven = Driven()
    driven.tell(page(A5, B9, at=10), WatchOpened(rev(10)))
    assert driven.tell(page(B9, at=10)) == (Restore(rev(10)),)
    assert driven.state_machine.state is State.WATCHING
    return driven


def relisting(steps: tuple[Step, ...]) -> BackOff:
    """Assert that the steps are those of a new listing under a standing watch."""
    close, back_off, read = steps
    assert (close, read) == (CloseWatch(), FIRST_PAGE)
    assert isinstance(back_off, BackOff)
    assert back_off.relist
    return back_off


# --- listing --------------------------------------------------------------------------------


def test_pages_are_pinned_to_the_revision_of_the_first(driven: Driven) -> None:
    second = Read(b"/a/b\0", END, rev(10), 2)
    assert driven.tell(page(A5, B9, at=10, more=True)) == (Stage((A5, B9), first=True), second)
    c9 = kv(b"/a/c", 9)
    assert driven.tell(page(c9, at=12)) == (Stage((c9,), first=False), OpenWatch(rev(11)))


def test_nothing_is_restored_before_the_history_is_confirmed(driven: Driven) -> None:
    c9 = kv(b"/a/c", 9)
    driven.tell(page(A5, B9, at=10, more=True), page(c9, at=10))
    # The newest of the first page, and the newest of the others.
    assert driven.tell(WatchOpened(rev(12))) == (Read(b"/a/b", None, rev(10), 1),)
    assert driven.state_machine.revision == 0
    assert driven.tell(page(B9, at=12)) == (Read(b"/a/c", None, rev(10), 1),)
    assert driven.tell(page(c9, at=12)) == (Restore(rev(10)),)
    assert driven.state_machine.revision == 10


def test_pages_of_two_histories_are_not_restored(driven: Driven) -> None:
    driven.tell(page(A5, B9, at=10, more=True), page(kv(b"/a/c", 9), at=10), WatchOpened(rev(12)))
    assert "another history" in relisting(driven.tell(page(at=12))).reason
    assert driven.state_machine.statistics().refuted == 1


def test_an_empty_range_is_its_own_witness(driven: Driven) -> None:
    assert driven.tell(page(at=10)) == (Stage((), first=True), OpenWatch(rev(11)))
    assert driven.tell(WatchOpened(rev(10))) == (Read(START, END, rev(10), 1),)
    assert driven.tell(page(at=10)) == (Restore(rev(10)),)


def test_a_page_that_fails_is_read_again(driven: Driven) -> None:
    (_, second) = driven.tell(page(A5, B9, at=10, more=True))
    assert driven.tell(ReadFailed("away")) == (BackOff(0, "away", relist=False), second)
    assert driven.tell(ReadFailed("away")) == (BackOff(1, "away", relist=False), second)


@pytest.mark.parametrize("message", [RevisionCompacted(11), RevisionAhead()])
def test_a_listing_whose_revision_is_gone_begins_again(driven: Driven, message: Message) -> None:
    driven.tell(page(A5, B9, at=10, more=True))
    back_off, read = driven.tell(message)
    assert isinstance(back_off, BackOff)
    assert read == FIRST_PAGE
    assert driven.tell(page(at=20)) == (Stage((), first=True), OpenWatch(rev(21)))


@pytest.mark.parametrize(
    "answer",
    [
        page(at=10, more=True),
        page(kv(b"/a/c", 9), at=9),
        page(kv(b"/a/a", 9), at=10),
        page(kv(b"/a/c", 11), at=12),
    ],
    ids=["no progress", "revision goes back", "key goes back", "newer than the listing"],
)
def test_a_listing_that_cannot_be_begins_again(driven: Driven, answer: PageArrived) -> None:
    driven.tell(page(A5, B9, at=10, more=True))
    back_off, read = driven.tell(answer)
    assert isinstance(back_off, BackOff)
    assert read == FIRST_PAGE
    assert driven.state_machine.statistics().violations == 1


# --- resuming -------------------------------------------------------------------------------


def test_a_lost_watch_resumes_after_the_last_revision(watching: Driven) -> None:
    watching.tell(events(kv(b"/a/c", 12, b"new")))
    lost = WatchLost("gone")
    steps = watching.tell(lost)
    assert steps == (CloseWatch(), BackOff(0, "gone", relist=False), OpenWatch(rev(13)))
    assert watching.tell(lost)[1] == BackOff(1, "gone", relist=False)
    assert watching.tell(WatchOpened(rev(3))) == (Read(b"/a/c", None, rev(12), 1),)
    assert watching.tell(page(kv(b"/a/c", 12, b"new"), at=14)) == ()
    statistics = watching.state_machine.statistics()
    assert (statistics.breaks, statistics.resumes, statistics.lists) == (2, 1, 1)
    watching.tell(events(kv(b"/a/c", 13)))
    assert watching.tell(lost)[1] == BackOff(0, "gone", relist=False)


@pytest.mark.parametrize(
    "answer",
    [
        page(at=14),
        page(kv(b"/a/c", 11, b"new"), at=14),
        page(kv(b"/a/c", 12, b"other"), at=14),
        page(kv(b"/a/c", 12, b"new"), at=11),
        RevisionAhead(),
    ],
    ids=["absent", "other revision", "other value", "revision behind", "revision ahead"],
)
def test_a_witness_that_differs_means_another_history(watching: Driven, answer: Message) -> None:
    watching.tell(events(kv(b"/a/c", 12, b"new")), WatchLost("gone"), WatchOpened(rev(14)))
    relisting(watching.tell(answer))
    assert watching.state_machine.statistics().refuted == 1


def test_a_deletion_is_witnessed_on_both_sides(watching: Driven) -> None:
    watching.tell(events(gone(b"/a/a", 12)), WatchProgress(rev(15)), WatchLost("gone"))
    assert watching.tell(WatchOpened(rev(15))) == (Read(b"/a/a", None, rev(11), 1),)
    assert watching.tell(page(A5, at=15)) == (Read(b"/a/a", None, rev(15), 1),)
    assert watching.tell(page(at=15)) == ()
    assert watching.state_machine.state is State.WATCHING


@pytest.mark.parametrize("answers", [[page(at=15)], [page(A5, at=15), page(A5, at=15)]])
def test_a_deletion_that_was_not(watching: Driven, answers: list[Message]) -> None:
    watching.tell(events(gone(b"/a/a", 12)), WatchLost("gone"), WatchOpened(rev(15)))
    relisting(watching.tell(*answers))


def test_a_witness_read_that_fails_is_done_again(watching: Driven) -> None:
    watching.tell(WatchLost("gone"), WatchOpened(rev(10)))
    read = Read(b"/a/b", None, rev(10), 1)
    assert watching.tell(ReadFailed("slow")) == (BackOff(1, "slow", relist=False), read)
    assert watching.tell(page(B9, at=10)) == ()


def test_compaction_means_listing_again(watching: Driven) -> None:
    relisting(watching.tell(RevisionCompacted(20)))
    watching.tell(page(A5, at=21), WatchOpened(rev(21)), RevisionCompacted(22))
    assert watching.state_machine.state is State.LISTING
    assert watching.state_machine.revision == 10
    assert watching.state_machine.statistics().compactions == 2


def test_doubt_means_listing_again(watching: Driven) -> None:
    assert relisting(watching.tell(Doubted("audit"))).reason == "audit"
    assert watching.tell(Doubted("audit")) == ()
    assert watching.state_machine.statistics().doubts == 2


def test_a_listing_behind_what_was_known_is_counted(watching: Driven) -> None:
    watching.tell(Doubted("audit"), page(A5, at=8), WatchOpened(rev(8)))
    assert watching.tell(page(A5, at=8)) == (Restore(rev(8)),)
    assert watching.state_machine.statistics().regressions == 1
    assert watching.state_machine.revision == 8


# --- watching -------------------------------------------------------------------------------


def test_events_are_applied_up_to_their_own_revision(watching: Driven) -> None:
    # The header of a watch that catches up names a revision whose events are yet to come.
    batch = (kv(b"/a/a", 11), kv(b"/a/b", 11), gone(b"/a/a", 12))
    assert watching.tell(WatchEvents(batch, rev(99))) == (Apply(batch, rev(12)),)
    assert watching.state_machine.revision == 12
    assert watching.tell(WatchEvents((), rev(99))) == ()


def test_repeated_events_are_dropped(watching: Driven) -> None:
    old = (kv(b"/a/a", 11), kv(b"/a/b", 12))
    new = kv(b"/a/c", 13)
    watching.tell(events(*old))
    assert watching.tell(events(*old)) == ()
    assert watching.tell(events(old[1], new)) == (Apply((new,), rev(13)),)
    assert watching.state_machine.statistics().dropped_duplicates == 3
    assert watching.state_machine.statistics().applied_events == 3


@pytest.mark.parametrize(
    ("guarantee", "changes"),
    [
        ("resumable", [kv(b"/a/c", 10)]),
        ("resumable", [kv(b"/a/c", 12), kv(b"/a/c", 3)]),
        ("ordered", [kv(b"/a/c", 13), kv(b"/a/d", 12)]),
        ("unique", [kv(b"/a/c", 13), kv(b"/a/c", 13)]),
    ],
)
def test_events_that_break_a_guarantee(
    watching: Driven, guarantee: str, changes: list[Event]
) -> None:
    assert relisting(watching.tell(events(*changes))).reason.startswith(guarantee)
    assert watching.state_machine.statistics().violations == 1
    assert watching.state_machine.statistics().applied_events == 0


def test_a_revision_in_two_parts_is_not_atomic(watching: Driven) -> None:
    watching.tell(events(kv(b"/a/c", 12)))
    steps = watching.tell(events(kv(b"/a/d", 12), kv(b"/a/d", 13)))
    assert relisting(steps).reason.startswith("atomic")


def test_an_event_after_its_bookmark_is_a_lie(watching: Driven) -> None:
    watching.tell(events(kv(b"/a/c", 12)))
    assert watching.tell(WatchProgress(rev(20))) == ()
    assert watching.state_machine.revision == 20
    assert relisting(watching.tell(events(kv(b"/a/d", 15)))).reason.startswith("bookmarkable")


def test_a_bookmark_moves_the_point_to_resume_from(watching: Driven) -> None:
    watching.tell(WatchProgress(rev(20)))
    assert watching.tell(WatchLost("gone"))[-1] == OpenWatch(rev(21))


def test_a_bookmark_goes_back_only_on_a_member_that_is_behind(watching: Driven) -> None:
    watching.tell(WatchProgress(rev(20)), WatchLost("gone"), WatchOpened(rev(15)))
    watching.tell(page(B9, at=20))
    assert watching.tell(WatchProgress(rev(17))) == ()
    assert watching.state_machine.revision == 20
    assert relisting(watching.tell(WatchProgress(rev(16)))).reason.startswith("bookmarkable")


# --- the end --------------------------------------------------------------------------------


def test_nothing_comes_after_close(watching: Driven) -> None:
    assert watching.tell(Close()) == (CloseWatch(),)
    assert watching.tell(events(kv(b"/a/c", 12))) == ()
    assert watching.state_machine.statistics().state == "closed"
    assert Driven().tell(Close()) == ()


@pytest.mark.parametrize("message", [WatchOpened(rev(1)), page(at=1), ReadFailed("late")])
def test_a_message_out_of_turn_is_a_mistake(watching: Driven, message: Message) -> None:
    with pytest.raises(RuntimeError, match="out of turn while watching"):
        watching.tell(message)


# --- pages that cannot be ------------------------------------------------------------------


def test_a_page_that_is_too_large_is_asked_for_with_fewer_keys(driven: Driven) -> None:
    (again,) = driven.tell(PageTooLarge())
    assert again == Read(START, END, rev(0), 1)
    back_off, same = driven.tell(PageTooLarge())
    assert isinstance(back_off, BackOff)
    assert same == again
    stage, following = driven.tell(page(A5, at=10, more=True))
    assert stage == Stage((A5,), first=True)
    assert following == Read(b"/a/a\0", END, rev(10), 2)


def test_pages_come_nearer_to_the_end_by_what_they_bring(driven: Driven) -> None:
    driven.tell(PageArrived(Page((A5,), rev(10), more=True, remaining=2)))
    endless = PageArrived(Page((B9,), rev(10), more=True, remaining=2))
    back_off, read = driven.tell(endless)
    assert isinstance(back_off, BackOff)
    assert back_off.relist
    assert read == FIRST_PAGE
    assert driven.state_machine.statistics().violations == 1
