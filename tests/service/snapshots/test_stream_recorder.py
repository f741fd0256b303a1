"""What is written of a stream is at each moment what the watch had brought at some revision."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from etcdfs.consistency.snapshot import Identity, Manifest, Position, Stream
from etcdfs.keyspace.store import Event, KeyValue, Revision, Tombstone
from etcdfs.snapshots import stream_recorder
from etcdfs.snapshots.snapshot_file import SnapshotFile
from etcdfs.snapshots.stream_recorder import StreamRecorder

HEAD = Manifest(
    identity=Identity(cluster=1, prefix=b"/", user="", attributes=True, endpoints=()), heard_ns=1
)
KEYS = [b"/%d" % number for number in range(5)]


class Recording(RuleBasedStateMachine):
    """A stream with its recorder and its file; writing may fail, or come late."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory(prefix="etcdfs-test-", dir="/dev/shm")
        self.file = SnapshotFile.open(Path(self.home.name) / "state")
        self.recorder = StreamRecorder()
        self.state: dict[bytes, KeyValue] = {}
        self.revision = 1
        # By revision, what there was; as etcd has it, even if another history had it otherwise.
        self.states = {1: dict(self.state)}
        self.is_listing = False
        self.follows = False  # something was listed, so that changes come

    def teardown(self) -> None:
        self.file.close()
        self.home.cleanup()

    # --- what the watch brings --------------------------------------------------------------

    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True),
        puts=st.booleans(),
    )
    def change(self, keys: list[bytes], puts: bool) -> None:
        self.revision += 1
        revision = Revision(self.revision)
        events: list[Event] = []
        for key in keys:
            if puts:
                self.state[key] = KeyValue(key, b"%d" % revision, revision, revision, 1)
                events.append(self.state[key])
            else:
                self.state.pop(key, None)
                events.append(Tombstone(key, revision))
        self.states[self.revision] = dict(self.state)
        if self.follows and not self.is_listing:
            self.recorder.applied(events, Position(revision, tuple(events[-1:])))

    @rule(cut=st.integers(0, 5))
    def list_anew(self, cut: int) -> None:
        entries = [self.state[key] for key in sorted(self.state)]
        self.is_listing = True
        self.hear(entries[:cut], first=True)
        self.rest: Sequence[KeyValue] = entries[cut:]
        self.listed_at = Revision(self.revision)

    @precondition(lambda self: self.is_listing)
    @rule()
    def list_on(self) -> None:
        self.hear(self.rest, first=False)
        self.is_listing = False
        self.follows = True
        self.recorder.restored(Position(self.listed_at, ()))
        self.state = dict(self.states[self.listed_at])
        for revision in range(self.listed_at + 1, self.revision + 1):
            before, after = self.states[revision - 1], self.states[revision]
            events: list[Event] = [
                entry for key, entry in after.items() if before.get(key) != entry
            ]
            events += [Tombstone(key, Revision(revision)) for key in before if key not in after]
            self.recorder.applied(events, Position(Revision(revision), ()))
            self.state = dict(after)

    @rule()
    def stall(self) -> None:
        self.recorder.fall_behind()

    def hear(self, entries: Sequence[KeyValue], *, first: bool) -> None:
        trio.run(lambda: self.recorder.listed(tuple(entries), first=first))

    # --- writing ----------------------------------------------------------------------------

    @rule()
    def write_page(self) -> None:
        if self.recorder.pages:
            page = self.recorder.pages[0]
            self.file.stage(Stream.KEYS, page[1], first=page[0])
            self.recorder.wrote(page)

    @rule()
    def write(self) -> None:
        while self.recorder.pages:
            self.write_page()
        changes = self.recorder.take()
        if changes is not None:
            self.file.commit(HEAD, {Stream.KEYS: changes})
        if self.recorder.position is not None:
            assert self.found()[0] == self.recorder.position.revision, "all of it is written"

    @rule(data=st.data())
    def fail_to_write(self, data: st.DataObject) -> None:
        changes = self.recorder.take()
        if changes is not None:
            if data.draw(st.booleans(), "a change comes meanwhile") and not self.is_listing:
                self.change([KEYS[0]], puts=data.draw(st.booleans()))
            self.recorder.give_back(changes)

    # --- what is on disk --------------------------------------------------------------------

    def found(self) -> tuple[int, dict[bytes, KeyValue]]:
        assert self.file.manifest is not None
        revision = self.file.manifest.streams[Stream.KEYS].position.revision
        with closing(self.file.pages(Stream.KEYS)) as pages:
            return revision, {entry.key: entry for page in pages for entry in page}

    @invariant()
    def is_of_some_revision(self) -> None:
        if self.file.manifest is not None:
            revision, state = self.found()
            assert state == self.states[revision]

    @invariant()
    def knows_what_waits(self) -> None:
        waiting = [*self.recorder._changes.values(), *self._entries()]
        assert self.recorder._size == sum(map(stream_recorder._size, waiting))

    def _entries(self) -> Iterator[KeyValue]:
        return (entry for _, entries in self.recorder.pages for entry in entries)


test_recording = Recording.TestCase
test_recording.settings = settings(stateful_step_count=25)
