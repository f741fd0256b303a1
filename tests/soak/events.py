"""etcd's keys and values as the checker knows them.

Concurrency: pure functions.
"""

from typing import Any

from tests.soak import layout
from tests.soak.history import BROKEN, DELETED, Event
from tests.soak.values import Label, decode, decode_lines


def understand(name: str, value: bytes | None) -> Label | None:
    """Return who wrote a value (of a log: its last line); None if it is not whole."""
    if value is None:
        return None
    if name == layout.LOG:
        labels = decode_lines(value)
        return labels[-1] if labels else None
    return decode(name, value)


def event_of(kv: Any, *, deleted: bool = False) -> Event | None:
    """Return an event of etcd's, None if the checker does not know the key."""
    index = layout.INDEX.get(kv.key.decode().removeprefix(layout.PREFIX))
    if index is None:
        return None
    if deleted:
        return Event(kv.mod_revision, index, DELETED, 0)
    label = understand(layout.NAMES[index], kv.value) or Label(BROKEN, 0)
    return Event(kv.mod_revision, index, *label, len(kv.value))
