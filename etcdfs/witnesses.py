"""What is read back after a break to see whether the history is still the one we know.

What this room knows: what must hold at a revision if a change was the last of its key. What it
must not know: when that is looked at, and what follows (the replica's).

Concurrency: none; pure functions and frozen values.
"""

from dataclasses import dataclass
from typing import assert_never

from etcdfs.steps import Read
from etcdfs.store import Event, KeyValue, Page, Revision, Tombstone


@dataclass(frozen=True, slots=True)
class Check:
    """What a read must give if the history is the one we know.

    Attributes:
        read: The read.
        present: Whether there must be an entry.
        entry: The very entry, if it is known.
    """

    read: Read
    present: bool
    entry: KeyValue | None = None

    def holds(self, page: Page) -> bool:
        """Tell whether the page is what was expected."""
        if page.revision < self.read.revision:
            return False
        if not self.present:
            return not page.entries
        return bool(page.entries) and self.entry in (None, page.entries[0])


def checks_on(witness: Event, revision: Revision) -> tuple[Check, ...]:
    """Return what must hold at `revision` if `witness` is the last change of its key."""
    now = Read(witness.key, None, revision, 1)
    match witness:
        case KeyValue():
            return (Check(now, present=True, entry=witness),)
        case Tombstone():
            # That a key is not there says little. That it was there until just then says a lot.
            before = Read(witness.key, None, Revision(witness.mod_revision - 1), 1)
            return (Check(before, present=True), Check(now, present=False))
        case _:
            assert_never(witness)
