"""Judging a run: what readers saw, against the order in which etcd says things happened.

Knows: what a reader of a mount may see, given every event of etcd in the order of revisions, what
the writers were told, and what the readers read and when. Does not know: mounts, etcd, processes.

etcd hands out the order of all changes, so nothing has to be searched for: each read names the
write it saw, that write has a revision, and the value was the key's until the revision of the
next event of that key. Sorting is all it takes; a million reads are judged in seconds.

A read is wrong when, in this order of severity, it is

* torn: not the whole of any value that was written (nor may etcd ever hold such a value);
* phantom: a value that etcd never had, or a missing name that always had one;
* future: a value that was not sent to etcd yet when the read had ended already;
* stale: replaced by a revision that the mount had shown to be applied before the read began,
  by `user.etcdfs.wait.REVISION` or by letting any reader see it or anything newer;
* backwards: older than what the same reader saw of the same key;
* inverted: replaced before another key's state that the same reader has seen (B25).

A write is wrong when it was acknowledged and is not among the events (lost), is among them more
than once (doubled), was refused and is there all the same (resurrected), or counted on from
something else than the value it replaced (a lost update).

Concurrency: pure functions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Final, NamedTuple

FOREVER: Final = 1 << 62
EXAMPLES_MAX: Final = 5


class Kind(IntEnum):
    """What a read found."""

    SEEN = 0
    MISSING = 1
    PRESENT = 2  # the name, in a listing
    TORN = 3
    ERROR = 4
    SIZED = 5  # the size, by stat(2); it is in `counter`


class Outcome(IntEnum):
    """What a writer was told."""

    ACKNOWLEDGED = 0
    UNKNOWN = 1
    REFUSED = 2


class Event(NamedTuple):
    """One change of one key; `writer` is -1 for a deletion. `total` counts on, where it counts."""

    revision: int
    key: int
    writer: int
    counter: int
    total: int = 0
    size: int = 0


class Write(NamedTuple):
    """One attempt to write one key, named by its writer and counter; times of one clock."""

    key: int
    writer: int
    counter: int
    sent: int
    ended: int
    outcome: Outcome = Outcome.ACKNOWLEDGED


class Read(NamedTuple):
    """One look at one key. `floor`: a revision known to be applied before it began."""

    reader: int
    key: int
    kind: Kind
    writer: int
    counter: int
    began: int
    ended: int
    floor: int


DELETED: Final = -1
BROKEN: Final = -2
"""The writer of an event whose value nobody wrote as it is."""

READ_FAULTS: Final = ("torn", "phantom", "future", "stale", "backwards", "inverted")
EVENT_FAULTS: Final = ("unheard", "twice")  # see tests/soak/listening.py
WRITE_FAULTS: Final = ("lost", "doubled", "resurrected", "lost update")


@dataclass(slots=True)
class Verdict:
    """How a run is judged.

    Attributes:
        counts: How many reads and writes were wrong, by what is wrong.
        examples: Some of them, in words.
        reads: Reads judged.
        errors: Reads that failed; those are judged by whoever knows which faults there were.
        writes: Writes acknowledged.
        unknown: Writes that failed with an unknown outcome.
        failures: Reads that failed, by the reason.
        heard: Events that were heard through inotify.
        stayed: Versions that stayed long enough to be heard of.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    reads: int = 0
    errors: int = 0
    writes: int = 0
    unknown: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    heard: int = 0
    stayed: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not self.counts

    def blame(self, fault: str, example: object) -> None:
        """Count something wrong, and keep the first few."""
        self.counts[fault] += 1
        if self.counts[fault] <= EXAMPLES_MAX:
            self.examples.append(f"{fault}: {example}")

    def add(self, other: "Verdict") -> None:
        """Add another part of the same run."""
        self.counts += other.counts
        self.examples += other.examples
        self.reads += other.reads
        self.errors += other.errors
        self.writes += other.writes
        self.unknown += other.unknown
        self.heard += other.heard
        self.stayed += other.stayed
        self.failures += other.failures


class _Span(NamedTuple):
    """A state of a key: from this revision until before that one."""

    start: int
    end: int


_Id = tuple[int, int, int]


class _Timeline:
    """Every state that every key ever had."""

    def __init__(self, events: Iterable[Event], first: int) -> None:
        by_key: dict[int, list[Event]] = defaultdict(list)
        for event in sorted(set(events)):
            by_key[event.key].append(event)
        self.by_key = by_key
        self.broken = [e for changes in by_key.values() for e in changes if e.writer == BROKEN]
        self.values: dict[_Id, list[_Span]] = defaultdict(list)
        self.absences: dict[int, list[_Span]] = defaultdict(list)
        self.presences: dict[int, list[_Span]] = defaultdict(list)
        self.sizes: dict[tuple[int, int], list[_Span]] = defaultdict(list)
        for key, changes in by_key.items():
            if changes[0].revision > first:
                self.absences[key].append(_Span(0, changes[0].revision))
            ends = [change.revision for change in changes[1:]]
            for event, end in zip(changes, (*ends, FOREVER), strict=True):
                span = _Span(event.revision, end)
                if event.writer == DELETED:
                    self.absences[key].append(span)
                else:
                    self.values[key, event.writer, event.counter].append(span)
                    self.presences[key].append(span)
                    self.sizes[key, event.size].append(span)

    def spans(self, read: Read) -> Sequence[_Span]:
        """Return when what was read was so, earliest first."""
        match read.kind:
            case Kind.SEEN:
                return self.values.get((read.key, read.writer, read.counter), ())
            case Kind.MISSING if read.key not in self.by_key:
                return (_Span(0, FOREVER),)  # nobody ever put it
            case Kind.MISSING:
                return self.absences.get(read.key, ())
            case Kind.SIZED:
                return self.sizes.get((read.key, read.counter), ())
            case _:
                return self.presences.get(read.key, ())


def judge(
    events: Iterable[Event],
    writes: Sequence[Write],
    reads: Sequence[Read],
    *,
    counters: Iterable[int] = (),
    first: int = 0,
) -> Verdict:
    """Judge a run.

    Args:
        events: Every event of the keys, in any order; repeated ones do no harm.
        writes: Every attempt to write.
        reads: Every read, in any order.
        counters: Keys whose every value counts on from the one before.
        first: What was put up to this revision was there before the run: no key was missing.
    """
    verdict = Verdict()
    timeline = _Timeline(events, first)
    for event in timeline.broken:
        verdict.blame("torn", event)
    _judge_writes(timeline, writes, verdict)
    _judge_counters(timeline, counters, verdict)
    _judge_reads(timeline, writes, reads, verdict)
    return verdict


# --- writes ---------------------------------------------------------------------------------


def _judge_writes(timeline: _Timeline, writes: Sequence[Write], verdict: Verdict) -> None:
    for write in writes:
        found = len(timeline.values.get((write.key, write.writer, write.counter), ()))
        verdict.writes += write.outcome is Outcome.ACKNOWLEDGED
        verdict.unknown += write.outcome is Outcome.UNKNOWN
        if write.outcome is Outcome.ACKNOWLEDGED and not found:
            verdict.blame("lost", write)
        if write.outcome is Outcome.REFUSED and found:
            verdict.blame("resurrected", write)
        if found > 1:
            verdict.blame("doubled", write)


def _judge_counters(timeline: _Timeline, counters: Iterable[int], verdict: Verdict) -> None:
    for key in counters:
        for before, after in pairwise(timeline.by_key.get(key, ())):
            if after.total != before.total + 1:
                verdict.blame("lost update", (before, after))


# --- reads ----------------------------------------------------------------------------------


class _Witnesses:
    """The newest state that anybody had seen by some time; asked in the order of time."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []  # when it had been seen, and since which revision
        self._next = 0
        self._newest = 0

    def add(self, ended: int, revision: int) -> None:
        self._seen.append((ended, revision))

    def seal(self) -> None:
        self._seen.sort()

    def by(self, moment: int) -> int:
        while self._next < len(self._seen) and self._seen[self._next][0] < moment:
            self._newest = max(self._newest, self._seen[self._next][1])
            self._next += 1
        return self._newest


def _judge_reads(
    timeline: _Timeline, writes: Sequence[Write], reads: Sequence[Read], verdict: Verdict
) -> None:
    sent = {(write.key, write.writer, write.counter): write.sent for write in writes}
    reads = sorted(reads, key=lambda read: read.began)
    witnesses = _Witnesses()
    for read in reads:
        if read.kind is Kind.SEEN and (spans := timeline.spans(read)):
            witnesses.add(read.ended, spans[0].start)
    witnesses.seal()
    floors: Counter[int] = Counter()  # for each reader: the newest state it has seen
    seen: dict[tuple[int, int], int] = {}  # for each reader and key: the start of it
    for read in reads:
        if read.kind is Kind.ERROR:
            verdict.errors += 1
            continue
        verdict.reads += 1
        fault = _fault_of(read, timeline, sent)
        if fault is not None:
            verdict.blame(fault, read)
            continue
        span = _latest_fault_free(read, timeline, floors, seen, witnesses, verdict)
        if span is not None:
            floors[read.reader] = max(floors[read.reader], span.start)
            seen[read.reader, read.key] = span.start


def _fault_of(read: Read, timeline: _Timeline, sent: dict[_Id, int]) -> str | None:
    """Return what is wrong with a read whatever else was read."""
    if read.kind is Kind.TORN:
        return "torn"
    if not timeline.spans(read):
        return "phantom"
    if read.kind is Kind.SEEN:
        identity = (read.key, read.writer, read.counter)
        if read.ended < sent.get(identity, 0):
            return "future"
    return None


def _latest_fault_free(
    read: Read,
    timeline: _Timeline,
    floors: Counter[int],
    seen: dict[tuple[int, int], int],
    witnesses: _Witnesses,
    verdict: Verdict,
) -> _Span | None:
    """Return the earliest span the read may have seen; blame it when there is none."""
    shown = max(read.floor, witnesses.by(read.began))
    own = floors[read.reader]
    spans = timeline.spans(read)
    last = spans[-1].end
    if last <= shown:
        verdict.blame("stale", f"{read} was over at {last}, and {shown} was shown")
        return None
    if last <= own:
        fault = "backwards" if seen.get((read.reader, read.key), 0) >= last else "inverted"
        verdict.blame(fault, f"{read} was over at {last}, and its reader had seen {own}")
        return None
    # Of several states that look alike (a missing name), the earliest that it can have been.
    return next(span for span in spans if span.end > max(shown, own))
