"""Faults of etcd itself: what a watch says is wrong. A proxy tells the lies, under load.

Concurrency: the conductor's thread.
"""

from tests.soak import layout
from tests.soak.arena import Arena
from tests.soak.control import until
from tests.soak.faults_single import check, state_machine
from tests.soak.table import fault
from tests.soak.tamper import (
    Lie,
    OldAgain,
    Tamper,
    high_notice,
    in_fragments,
    low_notice,
    refused,
    twice,
)

TOLD = 30
"""Lies told before the truth is told again."""


def proxy(arena: Arena) -> Tamper:
    assert arena.tamper is not None
    return arena.tamper


def tell(arena: Arena, lie: Lie) -> None:
    """Have the mount under test hear a lie some dozen times, while everybody writes."""
    proxy(arena).lie(lie)
    try:
        until(lambda: proxy(arena).told > TOLD, "the lie is told", 40)
    finally:
        proxy(arena).lie(None)


@fault("11", "events are told twice", "tamper", 15)
def doubled(arena: Arena) -> None:
    """They change nothing: not the inode, not the times."""
    before = state_machine(arena.reader)
    file = arena.reader.path / "soak" / "steady"
    arena.reader.wait(arena.etcds.raw().put((layout.key("steady"), b"x")))
    stat = file.stat()
    revisions = _Repeated(layout.key("steady"))
    proxy(arena).lie(revisions)
    try:
        arena.reader.wait(arena.etcds.raw().put((layout.key("steady"), b"y")))
        changed = file.stat()
        until(lambda: proxy(arena).told > TOLD, "the lie is told", 40)
    finally:
        proxy(arena).lie(None)
    check(changed.st_mtime_ns != stat.st_mtime_ns, "the change is not seen")
    after = file.stat()
    same = (changed.st_ino, changed.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    check(same, "an event that came again made a new version")
    tell(arena, twice)
    dropped = before["dropped_duplicates"]
    until(
        lambda: state_machine(arena.reader)["dropped_duplicates"] > dropped,
        "duplicates are dropped",
        10,
    )


class _Repeated:
    """Tells everything twice, and the last event of one key after everything."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._kept: object = None

    def __call__(self, response: object) -> list[object]:
        events = getattr(response, "events", ())
        if any(event.kv.key == self._key for event in events):
            self._kept = response
            return [response, response]
        return [response, *([self._kept] if events and self._kept is not None else [])]


@fault("12", "an event comes again after newer ones", "tamper", 20)
def time_travel(arena: Arena) -> None:
    """It is not applied; everything is listed again."""
    before = state_machine(arena.reader)
    tell(arena, OldAgain())
    noticed = ("violations", "dropped_duplicates")
    until(
        lambda: any(state_machine(arena.reader)[n] > before[n] for n in noticed),
        "an event of the past is noticed",
        10,
    )


@fault("13", "progress notices that are too low", "tamper", 20)
def low(arena: Arena) -> None:
    """Noticed as a broken promise; everything is listed again."""
    tell(arena, low_notice)


@fault("13", "progress notices that are too high", "tamper", 20)
def high(arena: Arena) -> None:
    """Nothing is shown as applied that was not: no reader sees anything stale."""
    tell(arena, high_notice)


@fault("17", "a transaction that comes in fragments", "tamper", 15)
def fragments(arena: Arena) -> None:
    """The pieces are joined before they are applied: nobody sees half of a revision."""
    tell(arena, in_fragments)


@fault("14", "the watch is refused while it runs", "tamper", 20)
def watch_refused(arena: Arena) -> None:
    """It is retried with a pause; reads go on meanwhile; nothing is taken for an empty keyspace."""
    proxy(arena).lie(refused)
    try:
        proxy(arena).break_watches()
        until(lambda: proxy(arena).told > 1, "the watch is refused", 40)
    finally:
        proxy(arena).lie(None)
