"""Who listens with inotify(7) during a run, and whether what was heard is what had happened.

Knows: which changes of files a watcher must have heard of, and of how many. Does not know: etcd,
how a load is started.

A version that readers of the mount saw for a second has had its event, and whoever heard that
read it, or something newer: else it is `unheard`. If the one before it had its event, too, there
is no other event than that: else it is heard of `twice`.

What the daemon was asked meanwhile says when it, or the machine, was too busy for that.

Concurrency: one thread of a worker listens; judging is pure.
"""

import os
import select
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, final

from tests.soak import layout
from tests.soak.events import understand
from tests.soak.history import Event, Kind, Read, Verdict
from tests.support.watcher import Watcher

DIRECTORIES: Final = ("t", "s", "q", "c", "m")
"""Those that never go: nothing is written there through the mount under test."""

HEARD: Final = frozenset(("CLOSE_WRITE", "MOVED_TO"))
DEAF: Final = -1
"""The key of a record that says when nothing could be heard."""

STAYS_NS: Final = 1_000_000_000
BUSY_NS: Final = 300_000_000
_ASKS_S: Final = 0.05


@final
class Listener:
    """Watches the directories of one mount, and reads whatever it hears of."""

    def __init__(self, top: str, number: int) -> None:
        self._top = Path(top)
        self._number = number
        self._stack = ExitStack()
        self._watchers: dict[Watcher, str] = {}
        self._asked = time.monotonic_ns()
        self._is_deaf = True

    def turn(self, floor: int) -> Iterator[Read]:
        """Wait a moment for events; yield what was read after each, and when nothing was heard."""
        if not self._watchers:
            self._open()
        select.select(list(self._watchers), [], [], _ASKS_S)
        for watcher, directory in list(self._watchers.items()):
            for event in watcher.now():
                kinds, _, name = event.partition(" ")
                if "IGNORED" in kinds:
                    self._is_deaf = True
                elif (
                    not HEARD.isdisjoint(kinds.split(",")) and f"{directory}/{name}" in layout.INDEX
                ):
                    yield self._read(f"{directory}/{name}", floor)
        yield from self._ask()

    def close(self) -> None:
        """Watch nothing any more."""
        self._watchers.clear()
        self._stack.close()

    def _open(self) -> None:
        with suppress(OSError):
            for directory in DIRECTORIES:
                watcher = self._stack.enter_context(Watcher(self._top / directory))
                self._watchers[watcher] = directory
            return
        self.close()

    def _ask(self) -> Iterator[Read]:
        """Ask the daemon something."""
        with suppress(OSError):
            os.getxattr(self._top.parent, "user.etcdfs.wait.1")
            self._is_deaf |= not self._watchers
            before, self._asked = self._asked, time.monotonic_ns()
            if self._is_deaf or self._asked - before > BUSY_NS:
                if self._is_deaf:
                    self.close()
                    self._open()
                self._is_deaf = not self._watchers
                self._asked = time.monotonic_ns()
                yield Read(self._number, DEAF, Kind.ERROR, 0, 0, before, self._asked, 0)
            return
        self._is_deaf = True

    def _read(self, name: str, floor: int) -> Read:
        began = time.monotonic_ns()
        kind, writer, counter = Kind.TORN, 0, 0
        try:
            if (found := understand(name, (self._top / name).read_bytes())) is not None:
                kind, writer, counter = Kind.SEEN, found.writer, found.counter
        except FileNotFoundError:
            kind = Kind.MISSING
        except OSError as exc:
            kind, counter = Kind.ERROR, exc.errno or 0
        key = layout.INDEX[name]
        return Read(self._number, key, kind, writer, counter, began, time.monotonic_ns(), floor)


# --- judging --------------------------------------------------------------------------------


class _Stay(NamedTuple):
    """A version, and when readers saw it, as far as is known."""

    since: int
    until: int
    revision: int


def judge_heard(
    events: Iterable[Event], reads: Iterable[Read], heard: Sequence[Read], verdict: Verdict
) -> None:
    """Judge what one listener heard.

    Args:
        events: Every event of the keys.
        reads: What readers of the same mount read.
        heard: The listener's records.
        verdict: What is blamed.
    """
    revisions = {(e.key, e.writer, e.counter): e.revision for e in events}
    deaf = [(r.began, r.ended) for r in heard if r.key == DEAF]
    by_key: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for read in heard:
        if read.key != DEAF:
            revision = revisions.get((read.key, read.writer, read.counter), 0)
            by_key[read.key].append((read.began, revision))
    verdict.heard += sum(map(len, by_key.values()))
    for key, stays in _stays(events, reads, revisions).items():
        known = by_key[key]
        times = [began for began, _ in known]
        for before, stay in pairwise((None, *stays)):
            assert stay is not None
            if stay.until - stay.since < STAYS_NS or _overlaps(deaf, before or stay, stay):
                continue
            verdict.stayed += 1
            upto = bisect_right(times, stay.until)
            if not any(revision >= stay.revision for _, revision in known[:upto]):
                verdict.blame("unheard", f"{layout.NAMES[key]}: {stay}")
            if before is not None and before.until - before.since >= STAYS_NS:
                count = upto - bisect_left(times, before.until)
                if count > 1:
                    verdict.blame("twice", f"{layout.NAMES[key]}: {count} events, {before}, {stay}")


def _stays(
    events: Iterable[Event], reads: Iterable[Read], revisions: dict[tuple[int, int, int], int]
) -> dict[int, list[_Stay]]:
    """Return for each key its versions in order; of one that nobody saw nothing is known."""
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    for read in reads:
        revision = revisions.get((read.key, read.writer, read.counter))
        if read.kind is Kind.SEEN and revision is not None:
            since, until = seen.get((read.key, revision), (read.ended, read.began))
            seen[read.key, revision] = min(since, read.ended), max(until, read.began)
    found: dict[int, list[_Stay]] = defaultdict(list)
    for revision, key in sorted({(e.revision, e.key) for e in events}):
        if layout.NAMES[key].startswith(tuple(f"{name}/" for name in DIRECTORIES)):
            since, until = seen.get((key, revision), (0, 0))
            found[key].append(_Stay(since, until, revision))
    # What was there before anybody listened has no event.
    return {key: stays[1:] for key, stays in found.items()}


def _overlaps(deaf: Iterable[tuple[int, int]], before: _Stay, stay: _Stay) -> bool:
    since = min(before.until or stay.since, stay.since) - STAYS_NS
    return any(began <= stay.until and ended >= since for began, ended in deaf)
