"""The history checker finds every kind of violation that is planted, and no other.

A checker that cannot fail proves nothing: each plant below is one wrong read or write in a long
run that is right otherwise.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.soak.history import BROKEN, DELETED, Event, Kind, Outcome, Read, Verdict, Write, judge
from tests.soak.values import COUNTER_SIZE, Label, decode, decode_lines, encode, encode_counter
from tests.soak.values import encode_line as line

KEYS = 8
COUNTER_KEY = 7
READERS = 4


@dataclass
class Run:
    """A run that is right: revision r is put at time 1000 r, and seen from 1000 r + 500 on."""

    events: list[Event]
    writes: list[Write]
    reads: list[Read]

    def judge(self) -> Verdict:
        return judge(self.events, self.writes, self.reads, counters=(COUNTER_KEY,), first=KEYS)


def right_run(revisions: int, reads_each: int = 3, seed: int = 0) -> Run:
    chance = random.Random(seed)
    run = Run([], [], [])
    state: dict[int, Event] = {}
    total = 0
    for revision in range(1, revisions + 1):
        key = revision - 1 if revision <= KEYS else chance.randrange(KEYS)
        total += key == COUNTER_KEY
        event = Event(revision, key, revision % 3, revision, total if key == COUNTER_KEY else 0)
        run.events.append(event)
        sent = revision * 1000
        run.writes.append(Write(key, event.writer, event.counter, sent, sent + 400))
        state[key] = event
        if revision < KEYS:
            continue
        for n in range(reads_each):
            key = chance.randrange(KEYS)
            began = sent + 500 + n * 100
            run.reads.append(a_read(n % READERS, state[key], began, floor=revision))
    return run


def a_read(reader: int, event: Event, began: int, floor: int) -> Read:
    return Read(reader, event.key, Kind.SEEN, event.writer, event.counter, began, began + 50, floor)


def latest(events: Sequence[Event], key: int, nth: int = 1) -> Event:
    return [event for event in events if event.key == key][-nth]


def test_a_right_run_is_clean() -> None:
    verdict = right_run(500).judge()
    assert verdict.clean, verdict.examples
    assert verdict.writes == 500
    assert verdict.reads == 3 * (500 - KEYS + 1)


def test_one_stale_read_is_found_among_very_many() -> None:
    """Sorted, not searched: a million operations take about five seconds (here: a tenth)."""
    run = right_run(10_000, reads_each=9)
    stale = latest(run.events[:5_000], 3, nth=2)
    run.reads.append(a_read(1, stale, 5_000_900, floor=5_000))
    assert run.judge().counts == {"stale": 1}


# --- planted reads --------------------------------------------------------------------------

END = 501_000


def test_planted_stale_after_waiting() -> None:
    run = right_run(500)
    # By a reader of its own, before anybody else has seen the new state.
    newest, before = latest(run.events, 2), latest(run.events, 2, nth=2)
    run.reads = [read for read in run.reads if read.began < newest.revision * 1000]
    at = newest.revision * 1000 + 10
    run.reads.append(a_read(9, before, at, floor=newest.revision - 1))
    assert run.judge().clean
    run.reads[-1] = a_read(9, before, at, floor=newest.revision)
    assert run.judge().counts == {"stale": 1}


def test_planted_stale_after_another_reader_saw_newer() -> None:
    run = right_run(500)
    run.reads.append(a_read(9, latest(run.events, 2, nth=4), END, floor=0))
    assert run.judge().counts == {"stale": 1}


def test_planted_torn() -> None:
    run = right_run(500)
    run.reads.append(Read(0, 1, Kind.TORN, 0, 0, END, END + 1, 0))
    assert run.judge().counts == {"torn": 1}


def test_planted_torn_in_etcd() -> None:
    run = right_run(500)
    run.events.append(Event(501, 1, BROKEN, 0))
    assert run.judge().counts == {"torn": 1}


def test_planted_phantom() -> None:
    run = right_run(500)
    run.reads.append(Read(0, 1, Kind.SEEN, 77, 77, END, END + 1, 0))
    assert run.judge().counts == {"phantom": 1}


def test_planted_missing_of_what_was_always_there() -> None:
    run = right_run(500)
    run.reads.append(Read(0, 1, Kind.MISSING, 0, 0, END, END + 1, 0))
    assert run.judge().counts == {"phantom": 1}


def test_planted_from_the_future() -> None:
    run = right_run(500)
    run.reads.append(a_read(9, run.events[100], 1000, floor=0))
    assert run.judge().counts["future"] == 1


@pytest.mark.parametrize(("key", "fault"), [(1, "backwards"), (2, "inverted")])
def test_planted_going_back(key: int, fault: str) -> None:
    """A reader sees an older state than before: of the same key, or of another."""
    one, two = Event(10, 1, 0, 1), Event(11, 1, 0, 2)
    other_old, other_new = Event(9, 2, 0, 3), Event(11, 2, 0, 4)
    events = [one, two, other_old, other_new]
    # Its first read is not over when the second begins, so only its own order tells.
    first = Read(0, 1, Kind.SEEN, 0, 2, 1000, 3000, 0)
    old = one if key == 1 else other_old
    assert judge(events, [], [first]).clean
    assert judge(events, [], [first, a_read(1, old, 2000, floor=0)]).clean
    assert judge(events, [], [first, a_read(0, old, 2000, floor=0)]).counts == {fault: 1}


def test_missing_names_and_listings() -> None:
    put, gone, again = Event(5, 0, 0, 1), Event(7, 0, DELETED, 0), Event(9, 0, 0, 2)
    events = [put, gone, again]

    def look(kind: Kind, floor: int) -> Verdict:
        return judge(events, [], [Read(0, 0, kind, 0, 0, 1, 2, floor)], first=0)

    assert look(Kind.MISSING, 0).clean
    assert look(Kind.MISSING, 8).clean
    assert look(Kind.MISSING, 9).counts == {"stale": 1}
    assert look(Kind.PRESENT, 9).clean
    events = [put, gone]
    assert look(Kind.PRESENT, 6).clean
    assert look(Kind.PRESENT, 7).counts == {"stale": 1}


def test_a_name_that_nobody_ever_put_is_missing() -> None:
    """As in a run too short for every key to have its turn."""
    events = [Event(5, 0, 0, 1)]
    reads = [Read(0, 1, Kind.MISSING, 0, 0, 1, 2, floor) for floor in (0, 5)]
    assert judge(events, [], reads, first=5).clean


def test_sizes_told_by_stat() -> None:
    events = [Event(5, 0, 0, 1, size=10), Event(7, 0, 0, 2, size=20)]

    def look(size: int, floor: int) -> Verdict:
        return judge(events, [], [Read(0, 0, Kind.SIZED, 0, size, 1, 2, floor)], first=5)

    assert look(10, 6).clean
    assert look(20, 7).clean
    assert look(10, 7).counts == {"stale": 1}
    assert look(15, 6).counts == {"phantom": 1}


def test_a_missing_name_is_held_against_later_reads() -> None:
    events = [Event(5, 0, 0, 1), Event(7, 0, DELETED, 0), Event(5, 1, 0, 2), Event(7, 1, 0, 3)]
    gone = Read(0, 0, Kind.MISSING, 0, 0, 1, 2, 6)
    older = Read(0, 1, Kind.SEEN, 0, 2, 3, 4, 0)
    assert judge(events, [], [gone, older], first=5).counts == {"inverted": 1}


def test_failed_reads_are_counted_apart() -> None:
    run = right_run(100)
    run.reads.append(Read(0, 1, Kind.ERROR, 0, 5, END, END + 1, 0))
    verdict = run.judge()
    assert verdict.clean
    assert verdict.errors == 1


# --- planted writes -------------------------------------------------------------------------


def test_planted_lost() -> None:
    run = right_run(500)
    run.writes.append(Write(1, 1, 9999, END, END + 1))
    assert run.judge().counts == {"lost": 1}
    run.writes[-1] = run.writes[-1]._replace(outcome=Outcome.UNKNOWN)
    assert run.judge().clean
    run.writes[-1] = run.writes[-1]._replace(outcome=Outcome.REFUSED)
    assert run.judge().clean


@pytest.mark.parametrize("outcome", [Outcome.ACKNOWLEDGED, Outcome.UNKNOWN])
def test_planted_doubled(outcome: Outcome) -> None:
    run = right_run(500)
    twice = run.events[-1]
    run.events.append(twice._replace(revision=501))
    run.writes[-1] = run.writes[-1]._replace(outcome=outcome)
    assert run.judge().counts["doubled"] == 1


def test_planted_resurrected() -> None:
    run = right_run(500)
    run.writes[-1] = run.writes[-1]._replace(outcome=Outcome.REFUSED)
    assert run.judge().counts == {"resurrected": 1}


def test_planted_lost_update() -> None:
    run = right_run(500)
    bumped = latest(run.events, COUNTER_KEY)
    run.events.append(Event(501, COUNTER_KEY, 9, 1, bumped.total))
    assert run.judge().counts == {"lost update": 1}


def test_repeated_events_do_no_harm() -> None:
    run = right_run(200)
    run.events += run.events[::7]
    assert run.judge().clean


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 40_000])
def test_values_say_who_wrote_them(size: int) -> None:
    label = Label(3, 14, 15)
    value = encode("a/b", label, size)
    assert decode("a/b", value) == label
    assert decode("a/c", value) is None
    assert len(value) < size + 64


def test_any_mixture_of_two_values_is_torn() -> None:
    old, new = encode("k", Label(1, 5), 20_000), encode("k", Label(1, 6), 30_000)
    same_size = encode("k", Label(1, 7), 20_000)
    assert len(old) == len(same_size)
    for cut in (10, 4096, 8192, 16_384):
        assert decode("k", new[:cut] + old[cut:]) is None
        assert decode("k", same_size[:cut] + old[cut:]) is None
    assert decode("k", new[: len(old)]) is None  # old size with new bytes
    assert decode("k", old + bytes(10)) is None
    assert decode("k", b"") is None


def test_counters_keep_their_size() -> None:
    values = [encode_counter("c/0", Label(w, 10**w, 10**w)) for w in range(6)]
    assert {len(value) for value in values} == {COUNTER_SIZE}
    assert [decode("c/0", value) for value in values] == [Label(w, 10**w, 10**w) for w in range(6)]


def test_logs() -> None:
    value = line(Label(1, 1)) + line(Label(2, 1))
    assert decode_lines(value) == [Label(1, 1, 1), Label(2, 1, 2)]
    assert decode_lines(value[:-1]) is None
    assert decode_lines(value[3:]) is None
    assert decode_lines(b"") == []
