"""A new listing beside the tree it is to replace, without the values that both have.

What this room knows: which of what is listed differs from what a tree holds. What it must not
know: how a tree is changed.

Most of what is listed again is as it was: of that only the facts are kept, and of what differs the
values, up to a bound. What differs beyond it had better be a tree of its own, which needs no values.

Concurrency: trio thread. `differences` lets others have their turn, and the tree may change
meanwhile; what it then has is newer than the listing, or of no account.
"""

from collections.abc import Iterable
from struct import Struct
from typing import Final, final

import trio

from etcdfs.audited import HeldKeys, is_as
from etcdfs.contents import Contents, entry_size
from etcdfs.sides import find_facts, is_foreign
from etcdfs.store import Event, KeyValue, Revision, Tombstone
from etcdfs.tree import Tree, facts_of

SLICE: Final = 500
"""Keys looked at at a time; a few milliseconds."""


_packed: Final = Struct("5q").pack
"""Puts the numbers of `Facts` together; etcd's have 64 bits."""


class TooDifferentError(Exception):
    """More differs than is to be held in memory, or changed while it was looked at."""


@final
class Staging:
    """What has been listed so far."""

    def __init__(self, tree: Tree, contents: Contents, *, most_bytes: int) -> None:
        """Compare with a tree, and keep values of at most so many bytes."""
        # --- dependencies
        self._tree = tree
        self._contents = contents
        # --- mutable state
        self._room = most_bytes
        # Facts as bytes: a million tuples, and Python's collector would walk them for a second.
        self._same: dict[bytes, bytes] = {}
        self._different: dict[bytes, KeyValue] = {}

    def add(self, entries: Iterable[KeyValue]) -> None:
        """Take in part of a listing.

        Raises:
            TooDifferentError: Its values do not fit.
        """
        for entry in entries:
            if is_foreign(self._tree, entry.key):
                continue
            if is_as(self._tree, self._contents, entry):
                self._same[entry.key] = _packed(*facts_of(entry))
                continue
            self._different[entry.key] = entry
            self._room -= entry_size(entry.value)
        if self._room < 0:
            raise TooDifferentError("more differs than is to be held in memory")

    async def differences(self, revision: Revision) -> list[Event]:
        """Return the events that make the tree what was listed at a revision.

        Raises:
            TooDifferentError: What was alike has changed since it was listed.
        """
        events: list[Event] = []
        held = HeldKeys(self._tree)
        for some in held.slices():
            for holder, _ in some:
                key = held.key_of(holder)
                if key is not None and key not in self._same and key not in self._different:
                    events.append(Tombstone(key, revision))
            await trio.lowlevel.checkpoint()
        while self._same:
            for _ in range(min(SLICE, len(self._same))):
                key, facts = self._same.popitem()  # letting go of all at once takes long, too
                found = find_facts(self._tree, key)
                if found is None or _packed(*found[1]) != facts:
                    raise TooDifferentError(f"{key!r} has changed since it was listed")
            await trio.lowlevel.checkpoint()
        return [*events, *self._different.values()]
