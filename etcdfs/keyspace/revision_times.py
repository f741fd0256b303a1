"""When revisions were made: etcd keeps no times, but revisions in order.

Knows: the times of some revisions, what they say of all others, and the text that they are kept as.
Does not know: keys, nodes, etcd requests.

Whoever learns of a revision knows that it and all before it were made by then. So

* a revision that is newer than all that are known is dated with the moment at which it is learnt;
* one that nobody has told of is dated just before the next one that somebody has.

Either way a later revision has a later time. An entry for each would soon be more than a value of
etcd's holds: those that are nearest to the next one are let go, and dated just before it then.

Concurrency: synchronous; used on the trio thread only.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, final

STEP_NS: Final = 1_000
"""Between two revisions of which nothing is known but their order."""

RUNS_MAX: Final = 1_000
"""Runs that are kept, in 40 KiB at most."""

NEAR_NS: Final = 1_000_000
"""How near to the next one a run is let go first, if there are too many."""

AHEAD_MAX_NS: Final = 3_600 * 1_000_000_000
"""How far a record may be ahead of our clock: one of the two is wrong, and ours is what we have."""


_NO_LATER: Final = 2**63


class Run(NamedTuple):
    """Revisions `first` to `last`; the first was made at `time_ns`, a step before the next."""

    first: int
    last: int
    time_ns: int

    def time_of(self, revision: int) -> int:
        """Return the time of a revision of the run, or of one that follows it."""
        return self.time_ns + (revision - self.first) * STEP_NS


@final
class RevisionTimes:
    """The times of revisions, in nanoseconds since the epoch; a later revision's is later."""

    def __init__(self) -> None:
        # INVARIANT: neither revisions nor times overlap; both ascend
        self._runs: list[Run] = []

    @property
    def newest(self) -> int:
        """The newest revision that is known; 0 if none is."""
        return self._runs[-1].last if self._runs else 0

    def learn(self, revision: int, now_ns: int) -> int:
        """Return the time of a revision; it is `now_ns`, or just after the last, if it is new."""
        if revision <= self.newest:
            return self.time_of(revision)
        last = self._runs[-1] if self._runs else None
        if last is not None and now_ns <= last.time_of(revision):  # the clock stood, or went back
            self._runs[-1] = last._replace(last=revision)
        else:
            self._runs.append(Run(revision, revision, now_ns))
            if len(self._runs) > 2 * RUNS_MAX:
                self._runs = _thinned(self._runs)
        return self._runs[-1].time_of(revision)

    def time_of(self, revision: int) -> int:
        """Return the time of a revision; one must have been learnt."""
        after = bisect_right(self._runs, (revision, _NO_LATER))  # by `first`; no key, for its speed
        if after and (revision <= self._runs[after - 1].last or after == len(self._runs)):
            return self._runs[after - 1].time_of(revision)
        return self._before(self._runs[after], self._runs[after - 1] if after else None, revision)

    def _before(self, run: Run, earlier: Run | None, revision: int) -> int:
        step_ns = STEP_NS
        if earlier is not None:
            room_ns = run.time_ns - earlier.time_of(earlier.last)
            step_ns = max(1, min(STEP_NS, room_ns // (run.first - earlier.last)))
        return run.time_ns - (run.first - revision) * step_ns

    def forget_after(self, revision: int) -> None:
        """Forget revisions that etcd no longer knows of: it has been taken back to this one."""
        if revision < self.newest:
            runs = (run._replace(last=min(run.last, revision)) for run in self._runs)
            self._runs = [run for run in runs if run.first <= run.last]

    def merge(self, text: bytes, now_ns: int) -> int | None:
        """Take over what others have learnt.

        Of a revision the earliest time is true: whoever is late has learnt of it late.

        Returns:
            The newest revision in their record; None if it is none, or far ahead of the clock.
        """
        runs = _decode(text)
        if runs is None or (runs and runs[-1].time_ns > now_ns + AHEAD_MAX_NS):
            return None
        self._runs = _merged([*runs, *self._runs])
        return runs[-1].last if runs else 0

    def encode(self) -> bytes:
        """Return a record of them."""
        runs = [list(run) for run in _thinned(self._runs)]
        return json.dumps({"revisions": runs}, separators=(",", ":")).encode()


def _merged(runs: Iterable[Run]) -> list[Run]:
    """Leave out what says less than others do: no newer revision, and no earlier time."""
    kept: list[Run] = []
    # Of the newest revision the earliest time; else the order in which they come would matter.
    for run in sorted(runs, key=lambda run: (-run.last, run.time_of(run.last), run.first)):
        if not kept:
            kept.append(run)
            continue
        known = run._replace(last=min(run.last, kept[-1].first - 1))
        # Each revision in between is to have a time of its own.
        latest_ns = kept[-1].time_ns - (kept[-1].first - known.last)
        if known.first <= known.last and known.time_of(known.last) <= latest_ns:
            kept.append(known)
    return kept[::-1]


def _thinned(runs: list[Run]) -> list[Run]:
    """Keep as many as are allowed: what is let go is dated just before the next one."""
    apart_ns = NEAR_NS
    while len(runs) > RUNS_MAX:
        kept = [runs[-1]]
        for run in reversed(runs[:-1]):
            if kept[-1].time_ns - run.time_ns >= apart_ns:
                kept.append(run)
        runs = kept[::-1]
        apart_ns *= 2
    return runs


def _decode(text: bytes) -> Sequence[Run] | None:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    entries = found.get("revisions") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        return None
    runs: list[Run] = []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != len(Run._fields):
            return None
        if not all(isinstance(number, int) and 0 <= number < 2**63 for number in entry):
            return None
        runs.append(Run(*entry))
    if any(run.first > run.last for run in runs):
        return None
    return _merged(runs)
