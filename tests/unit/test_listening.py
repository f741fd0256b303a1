"""The soak's judge of inotify events blames what is wrong, and nothing else."""

from tests.soak import layout
from tests.soak.history import Event, Kind, Read, Verdict
from tests.soak.listening import DEAF, judge_heard

KEY = layout.INDEX["q/0"]
S = 1_000_000_000
EVENTS = [Event(revision, KEY, 1, revision) for revision in (1, 2, 3)]


def read(at_s: float, counter: int, *, reader: int = 1) -> Read:
    at = int(at_s * S)
    return Read(reader, KEY, Kind.SEEN, 1, counter, at, at, 0)


# The second version is seen from 10 s to 12 s, the third from 13 s to 15 s.
READS = [read(1, 1), read(9, 1), read(10, 2), read(12, 2), read(13, 3), read(15, 3)]


def blamed(*heard: Read) -> dict[str, int]:
    verdict = Verdict()
    judge_heard(EVENTS, READS, heard, verdict)
    return dict(verdict.counts)


def test_an_event_for_each_version_is_right() -> None:
    assert blamed(read(10.1, 2), read(13.1, 3)) == {}


def test_a_version_without_an_event() -> None:
    assert blamed(read(13.1, 3)) == {"unheard": 1}
    assert blamed(read(10.1, 2), read(15.1, 3)) == {"unheard": 1}, "it came too late"


def test_an_event_before_its_content() -> None:
    assert blamed(read(9.9, 1), read(13.1, 3))["unheard"] == 1


def test_an_event_that_comes_twice() -> None:
    assert blamed(read(10.1, 2), read(13.1, 3), read(13.2, 3)) == {"twice": 1}


def test_nothing_is_asked_of_who_could_not_hear() -> None:
    deaf = Read(1, DEAF, Kind.ERROR, 0, 0, 11 * S, 12 * S, 0)
    assert blamed(deaf, read(13.1, 3)) == {}


def test_a_version_that_was_seen_for_a_moment_may_be_heard_of_with_the_next() -> None:
    verdict = Verdict()
    judge_heard(EVENTS, [read(10, 2), read(10.9, 2), *READS[4:]], [read(13.1, 3)], verdict)
    assert verdict.clean
    assert verdict.stayed == 1
