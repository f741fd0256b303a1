"""Times of revisions: in order, the same for whoever reads the record, and never too many."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from etcdfs.keyspace.revision_times import NEAR_NS, RUNS_MAX, STEP_NS, RevisionTimes

NOW = 1_700_000_000_000_000_000

# What a mount learns, and how much later each time by its clock, which may go back.
lessons = st.lists(st.tuples(st.integers(1, 200), st.integers(-1_000_000, 2_000_000)), max_size=30)


def taught(found: list[tuple[int, int]], now_ns: int = NOW) -> RevisionTimes:
    times = RevisionTimes()
    for revision, later_ns in found:
        now_ns += later_ns
        times.learn(revision, now_ns)
    return times


def all_of(times: RevisionTimes, newest: int = 200) -> list[int]:
    return [times.time_of(revision) for revision in range(1, newest + 1)]


def is_ascending(times: list[int]) -> bool:
    return all(a < b for a, b in pairwise(times))


@given(lessons)
def test_a_later_revision_has_a_later_time(found: list[tuple[int, int]]) -> None:
    times, now_ns = RevisionTimes(), NOW
    told: dict[int, int] = {}
    for revision, later_ns in found:
        now_ns += later_ns
        told.setdefault(revision, times.learn(revision, now_ns))
        assert times.learn(revision, now_ns) == told[revision]
    if found:
        assert is_ascending(all_of(times))
        assert {revision: times.time_of(revision) for revision in told} == told


def test_what_is_learnt_is_dated_now_and_what_was_missed_just_before() -> None:
    times = RevisionTimes()
    assert times.learn(10, NOW) == NOW
    assert times.learn(11, NOW - 10**9) == NOW + STEP_NS, "the clock went back"
    assert times.learn(20, NOW + 10**9) == NOW + 10**9
    assert times.time_of(19) == NOW + 10**9 - STEP_NS
    assert times.time_of(9) == NOW - STEP_NS
    assert times.newest == 20


@given(lessons)
def test_whoever_reads_the_record_has_the_same_times(found: list[tuple[int, int]]) -> None:
    times, reader = taught(found), RevisionTimes()
    assert reader.merge(times.encode(), NOW + 10**9) == times.newest
    if found:
        assert all_of(reader) == all_of(times)


@given(lessons, lessons, st.integers(-(10**9), 10**9))
@example([(2, 0)], [(1, 0), (2, 0)], 0)
@example([(1, 245)], [(141, -1868)], 2242)
def test_merging_is_in_order_and_loses_no_revision(
    found: list[tuple[int, int]], others: list[tuple[int, int]], skew_ns: int
) -> None:
    first, second = taught(found), taught(others, NOW + skew_ns)
    newest = max(first.newest, second.newest)
    one, other = first.encode(), second.encode()
    assert first.merge(other, NOW + 10**10) is not None
    assert second.merge(one, NOW + 10**10) is not None
    assert first.encode() == second.encode()
    assert first.newest == newest
    if newest:
        assert is_ascending(all_of(first))


def test_who_learns_late_does_not_make_it_late() -> None:
    early, late = taught([(10, 0), (20, 10**9)]), taught([(10, 10**10), (20, 0), (30, 10**9)])
    late.merge(early.encode(), NOW + 10**12)
    assert [late.time_of(revision) for revision in (10, 20)] == [NOW, NOW + 10**9]
    assert late.time_of(30) == NOW + 10**10 + 10**9


def test_the_number_of_runs_is_bounded_and_the_farthest_apart_stay() -> None:
    times = taught([(1, 0), (2, 10**12), *((3 + n, NEAR_NS) for n in range(5 * RUNS_MAX))])
    runs = json.loads(times.encode())["revisions"]
    assert len(runs) <= RUNS_MAX
    assert runs[0] == [1, 1, NOW]
    assert is_ascending(all_of(times, 5 * RUNS_MAX + 2))


def test_a_history_that_was_taken_back_is_forgotten() -> None:
    times = taught([(10, 0), (20, 10**9)])
    times.forget_after(15)
    assert times.newest == 10
    assert times.learn(12, NOW + 2 * 10**9) == NOW + 2 * 10**9
    times.forget_after(99)
    assert times.newest == 12


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff", b"[]", b"{}", b'{"revisions":7}', b'{"revisions":[7]}',
        b'{"revisions":[[1,2]]}', b'{"revisions":[[2,1,3]]}', b'{"revisions":[["1",2,3]]}',
        b'{"revisions":[[1,2,-3]]}', b'{"revisions":[[1,2,%d]]}' % 2**63, b"[" * 100_000,
        b'{"revisions":[[1,2,%d]]}' % (NOW + 3_601 * 10**9),
    ],
)  # fmt: skip
def test_what_is_no_record_or_of_the_future_says_nothing(text: bytes) -> None:
    times = RevisionTimes()
    assert times.merge(text, NOW) is None
    assert times.newest == 0
