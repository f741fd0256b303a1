"""Whatever happens to etcd, the watch and the reads: the state machine's state is etcd's, or mends.

The model is an etcd with its history, which can be compacted, wiped, and restored from a
snapshot. The rules are everything that may happen between two steps of the state machine. After each
the applied state must be exactly the model's at the state machine's revision (*ordered, unique,
atomic, reliable, resumable, bookmarkable*), unless the model has just lied in a way that no
client can see yet; and once the model is honest, the state machine must find the way back by itself.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import count
from typing import assert_never

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
    CloseWatch,
    Doubted,
    Message,
    OpenWatch,
    PageArrived,
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
KEYS = (b"/a/a", b"/a/b", b"/a/b\0", b"/a/c", b"/a/d")
PAGE_SIZE = 2

Entries = dict[bytes, KeyValue]


class Etcd:
    """One history: what every revision changed, and what the keys were after it."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.changes: dict[int, tuple[Event, ...]] = {}
        self.states: list[Entries] = [{}, {}]

    def commit(self, puts: Sequence[bytes], deletes: Sequence[bytes], value: bytes) -> None:
        """Carry out a transaction; of neither: one outside of the range."""
        self.revision += 1
        state = dict(self.states[-1])
        now = Revision(self.revision)
        events: list[Event] = []
        for key in puts:
            old = state.get(key)
            created, version = (old.create_revision, old.version) if old else (now, 0)
            state[key] = KeyValue(key, value, created, now, version + 1)
            events.append(state[key])
        for key in deletes:
            del state[key]
            events.append(Tombstone(key, now))
        self.states.append(state)
        if events:
            self.changes[self.revision] = tuple(events)

    def go_back(self, revision: int) -> "Etcd":
        """Return the history that a snapshot of `revision` begins."""
        other = Etcd()
        other.revision = revision
        other.compacted = min(self.compacted, revision)
        other.states = self.states[: revision + 1]
        other.changes = {r: events for r, events in self.changes.items() if r <= revision}
        return other

    def read(self, read: Read) -> Message:
        revision = read.revision or self.revision
        if revision > self.revision:
            return RevisionAhead()
        if revision < self.compacted:
            return RevisionCompacted(self.compacted)
        end = read.start + b"\0" if read.end is None else read.end
        state = self.states[revision]
        found = [state[key] for key in sorted(state) if read.start <= key < end]
        more = len(found) > read.limit
        return PageArrived(Page(tuple(found[: read.limit]), Revision(self.revision), more))

    def revisions(self, after: int) -> list[int]:
        known = sorted(self.changes)
        return known[bisect_right(known, after) :]


class StateMachineMachine(RuleBasedStateMachine):
    """The replica, a driver like the mirror, and an etcd to which things happen."""

    def __init__(self) -> None:
        super().__init__()
        self.values = count()
        self.etcd = Etcd()
        self.buried: set[tuple[bytes, int]] = set()
        self.state_machine = StateMachine(START, END, page_size=PAGE_SIZE)
        self.steps = list(self.state_machine.start())
        # The driver's side.
        self.staged: list[KeyValue] = []
        self.applied: Entries = {}
        self.revision = 0
        # The history that `applied` is of: that of the model when it was confirmed.
        self.origin = self.etcd
        # The histories that were read last, and from which the staged listing began.
        self.read_from = self.staged_from = self.etcd
        # The revision up to which the standing watch has delivered; None: there is no watch.
        self.delivered: int | None = None
        # How far the member that is asked for a watch is behind, and the revision it said it has.
        self.lag = 0
        self.reached = 0
        # What no client can see: a lie of the watch, and a history that only an audit tells.
        self.lied_to = False
        self.audit_due = False

    @initialize(puts=st.lists(st.sampled_from(KEYS), max_size=5, unique=True))
    def begin(self, puts: list[bytes]) -> None:
        for key in puts:
            self.commit([key], [])

    # --- the driver: carries out steps ------------------------------------------------------

    def tell(self, message: Message) -> None:
        before, known = self.state_machine.state, self.state_machine.revision
        steps = self.state_machine.receive(message)
        self.state_machine.check_invariants()
        assert self.state_machine.revision >= known or isinstance(steps[0], Restore), "bookmarkable"
        if before is State.CONFIRMING and self.state_machine.state is State.WATCHING:
            # Confirmed: from here on this is the history, and it must be ours so far.
            self.origin = self.etcd
        if steps:
            self.steps = list(steps)

    def carry_out(self, step: Step) -> None:
        match step:
            case Read():
                self.read_from = self.etcd
                self.tell(self.etcd.read(step))
            case OpenWatch(from_revision):
                self.open_watch(from_revision)
            case CloseWatch():
                self.delivered = None
            case Stage(entries, first):
                self.staged_from = self.read_from if first else self.staged_from
                self.staged = [*([] if first else self.staged), *entries]
            case Restore(revision):
                self.restore(revision)
            case Apply(events, revision):
                self.apply(events, revision)
            case BackOff():
                pass
            case _:
                assert_never(step)

    def open_watch(self, from_revision: int) -> None:
        assert self.delivered is None
        if from_revision < self.etcd.compacted:
            self.tell(RevisionCompacted(self.etcd.compacted))
        else:
            self.delivered = from_revision - 1
            self.reached = max(1, self.etcd.revision - self.lag)
            self.tell(WatchOpened(Revision(self.reached)))

    def restore(self, revision: Revision) -> None:
        keys = [entry.key for entry in self.staged]
        assert keys == sorted(set(keys)), "a listing is in order, and has each key once"
        self.applied = {entry.key: entry for entry in self.staged}
        self.revision = revision
        self.lied_to = False
        if self.staged_from is self.origin:  # all of it is of one history
            self.audit_due = False

    def apply(self, events: tuple[Event, ...], revision: Revision) -> None:
        previous = self.revision
        for event in events:
            assert event.mod_revision >= previous, "ordered"
            previous = event.mod_revision
            held = self.applied.get(event.key)
            assert held is None or held.mod_revision < event.mod_revision, "unique"
            if isinstance(event, Tombstone):
                assert held is not None or self.audit_due or self.lied_to, "reliable"
                self.applied.pop(event.key, None)
            else:
                self.applied[event.key] = event
        assert events[0].mod_revision > self.revision, "resumable"
        assert previous == revision, "bookmarkable"
        self.revision = revision

    # --- invariants -------------------------------------------------------------------------

    @invariant()
    def the_state_is_that_of_its_revision(self) -> None:
        pending = any(isinstance(step, Restore | Apply) for step in self.steps)
        if pending or self.lied_to or self.audit_due or not self.state_machine.revision:
            return
        revision = self.state_machine.revision
        assert revision >= self.revision
        assert self.applied == self.origin.states[revision], "reliable, atomic, bookmarkable"

    # --- what the driver does ---------------------------------------------------------------

    @precondition(lambda self: self.steps)
    @rule(steps=st.integers(1, 9))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            if self.steps:
                self.carry_out(self.steps.pop(0))

    @precondition(lambda self: self.steps and isinstance(self.steps[0], Read | OpenWatch))
    @rule()
    def a_step_fails(self) -> None:
        failed = self.steps.pop(0)
        self.tell(ReadFailed("late") if isinstance(failed, Read) else WatchLost("refused"))

    def drain(self) -> None:
        """Carry out what the state machine counts as applied, before it is given another message."""
        while self.apply_pending():
            self.carry_out(self.steps.pop(0))

    def apply_pending(self) -> bool:
        return any(isinstance(step, Restore | Apply) for step in self.steps)

    def audit(self) -> None:
        self.tell(Doubted("audit"))

    # --- what etcd's users do ---------------------------------------------------------------

    @rule(
        puts=st.lists(st.sampled_from(KEYS), max_size=4, unique=True),
        deletes=st.lists(st.sampled_from(KEYS), max_size=2, unique=True),
    )
    def commit(self, puts: list[bytes], deletes: list[bytes]) -> None:
        gone = [key for key in deletes if key in self.etcd.states[-1] and key not in puts]
        # Two histories that delete one key at one revision are told apart by chance only.
        while any((key, self.etcd.revision + 1) in self.buried for key in gone):
            self.etcd.commit((), (), b"")
        self.buried |= {(key, self.etcd.revision + 1) for key in gone}
        self.etcd.commit(puts, gone, b"%d" % next(self.values))

    @precondition(lambda self: self.etcd.states[-1])
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.commit([], [data.draw(st.sampled_from(sorted(self.etcd.states[-1])))])

    @rule(revisions=st.integers(1, 5))
    def others_commit(self, revisions: int) -> None:
        for _ in range(revisions):
            self.etcd.commit((), (), b"")

    # --- what happens to etcd ---------------------------------------------------------------

    # One rule for all of them: Hypothesis takes each rule equally often, and most of the time
    # nothing terrible happens.
    @rule(data=st.data())
    def something_terrible(self, data: st.DataObject) -> None:
        draw = data.draw
        what = draw(st.sampled_from(("compact", "wipe", "snapshot", "be behind", "doubt")))
        match what:
            case "compact":
                kept = draw(st.integers(0, 4))
                self.etcd.compacted = max(self.etcd.compacted, self.etcd.revision - kept)
            case "wipe":
                self.change_history(Etcd())
                # Refilled to about where the state machine believes it is.
                ours = max(self.state_machine.revision, self.state_machine._pinned)
                target = ours + draw(st.integers(-1, 3))
                for key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
                    self.commit([key], [])
                self.others_commit(max(0, target - self.etcd.revision))
            case "snapshot":
                self.restore_a_snapshot(max(1, self.etcd.revision - draw(st.integers(1, 6))))
            case "be behind":
                self.lag = draw(st.integers(0, 9))
            case _:  # doubt
                self.drain()
                self.audit()

    def restore_a_snapshot(self, revision: int) -> None:
        if self.state_machine.state is State.LISTING or revision >= self.witnessed():
            # Between the last change and a later bookmark no witness differs: see the state machine.
            self.audit_due = True
        self.change_history(self.etcd.go_back(revision))

    def witnessed(self) -> int:
        return min((w.mod_revision for w in self.state_machine._last_changes), default=0)

    def change_history(self, etcd: Etcd) -> None:
        self.etcd = etcd
        if self.delivered is not None:
            self.drain()
            self.lose_the_watch()

    # --- what the watch does ----------------------------------------------------------------

    def watching(self) -> bool:
        return (
            self.state_machine.state is State.WATCHING
            and not self.steps
            and self.delivered is not None
        )

    @precondition(lambda self: self.delivered is not None and not self.apply_pending())
    @rule()
    def lose_the_watch(self) -> None:
        self.delivered = None
        if self.state_machine.state in {State.CONFIRMING, State.WATCHING}:
            self.tell(WatchLost("stream ended"))

    @precondition(watching)
    @rule(revisions=st.integers(1, 4))
    def deliver(self, revisions: int) -> None:
        assert self.delivered is not None
        if self.delivered + 1 < self.etcd.compacted:
            self.delivered = None
            self.tell(RevisionCompacted(self.etcd.compacted))
            return
        due = self.etcd.revisions(self.delivered)[:revisions]
        if due:
            self.delivered = due[-1]
            self.send(due)
            self.drain()

    def send(self, revisions: Sequence[int]) -> None:
        self.reached = max(self.reached, revisions[-1])
        events = [event for revision in revisions for event in self.etcd.changes[revision]]
        self.tell(WatchEvents(tuple(events), Revision(self.etcd.revision)))

    @precondition(watching)
    @rule()
    def bookmark(self) -> None:
        assert self.delivered is not None
        if not self.etcd.revisions(self.delivered):
            self.delivered = self.reached = self.etcd.revision
            self.tell(WatchProgress(Revision(self.etcd.revision)))

    @precondition(watching)
    @rule(back=st.integers(1, 20), ahead=st.integers(0, 2))
    def repeat(self, back: int, ahead: int) -> None:
        # Bug of etcd 3.4.23 and 3.5.1: events once more (and, if older than the watch, at all).
        assert self.delivered is not None
        due = self.etcd.revisions(self.delivered - back)
        old = [revision for revision in due if revision <= self.delivered]
        new = due[len(old) :][:ahead]
        if old:
            self.delivered = max(self.delivered, *old, *new)
            self.send(old + new)
            self.drain()

    @rule(lag=st.integers(0, 9))
    def be_behind(self, lag: int) -> None:
        self.lag = lag

    @precondition(lambda self: self.watching() and self.reached < self.state_machine.revision)
    @rule()
    def bookmark_behind(self) -> None:
        self.reached += 1
        self.tell(WatchProgress(Revision(self.reached)))
        assert self.state_machine.state is State.WATCHING, "a member that is behind does no wrong"

    @precondition(watching)
    @rule(lie=st.sampled_from(("early", "past", "split")))
    def lie(self, lie: str) -> None:
        # The first one is a bug of etcd 3.4.23 and 3.5.1.
        if lie == "early":
            self.bookmark_what_was_not_delivered()
        elif lie == "past":
            self.bookmark_from_the_past()
        else:
            self.split_a_revision()

    def bookmark_what_was_not_delivered(self) -> None:
        assert self.delivered is not None
        if self.etcd.revisions(self.delivered):
            self.lied_to = True
            self.reached = self.etcd.revision
            self.tell(WatchProgress(Revision(self.etcd.revision)))

    def bookmark_from_the_past(self) -> None:
        self.tell(WatchProgress(Revision(self.reached - 1)))
        assert self.state_machine.state is State.LISTING, "bookmarkable"

    def split_a_revision(self) -> None:
        assert self.delivered is not None
        due = self.etcd.revisions(self.delivered)[:1]
        if not due or len(self.etcd.changes[due[0]]) == 1:
            return
        first, *rest = self.etcd.changes[due[0]]
        self.delivered = due[0]
        self.lied_to = True
        self.reached = max(self.reached, due[0])
        self.tell(WatchEvents((first,), Revision(due[0])))
        self.drain()
        if self.watching():
            self.tell(WatchEvents(tuple(rest), Revision(due[0])))
        assert self.state_machine.state is State.LISTING, "atomic"

    # --- the end of trouble -----------------------------------------------------------------

    @rule()
    def wait_until_visible(self) -> None:
        """Let the driver go on while nothing happens: the state must become the model's."""
        self.run_dry()
        if self.audit_due or self.lied_to:
            self.audit()
            self.run_dry()
        assert self.state_machine.state is State.WATCHING
        assert self.applied == self.etcd.states[-1]
        assert (
            max(self.etcd.changes, default=0) <= self.state_machine.revision <= self.etcd.revision
        )
        assert not self.etcd.revisions(self.state_machine.revision)

    def run_dry(self) -> None:
        for _ in range(1000):
            if self.steps:
                self.carry_out(self.steps.pop(0))
            elif self.delivered is not None and self.etcd.revisions(self.delivered):
                self.deliver(3)
            else:
                return
        raise AssertionError("the state machine does not come to rest")

    def teardown(self) -> None:
        self.wait_until_visible()


TestStateMachineMachine = StateMachineMachine.TestCase


def test_an_audit_that_has_only_begun_mends_nothing() -> None:
    """A history that no client can tell from ours is confirmed; what is shown waits for the audit."""
    machine = StateMachineMachine()
    machine.begin(puts=list(KEYS))
    machine.go_on(steps=5)
    machine.commit(puts=[], deletes=[b"/a/a"])
    machine.drain()
    machine.audit()
    machine.commit(puts=[], deletes=[b"/a/b", b"/a/b\0"])
    machine.go_on(steps=3)
    machine.restore_a_snapshot(machine.etcd.revision - 1)
    machine.others_commit(revisions=1)
    machine.go_on(steps=4)
    machine.lose_the_watch()
    machine.drain()
    machine.audit()
    machine.the_state_is_that_of_its_revision()
    machine.teardown()
