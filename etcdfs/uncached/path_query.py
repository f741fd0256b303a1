"""What to ask etcd about one path, and what its answers say.

Knows: the file, the directory and the attributes that there can be at a path, and that record keys
are not among what is shown. Does not know: the tree, how it is asked.

Concurrency: none; pure functions.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from etcdfs.errors import CallerError
from etcdfs.keyspace.attribute_records import record_key, shown_ranges
from etcdfs.keyspace.keys import MARKER_NAME, Keyspace
from etcdfs.keyspace.store import Committed, Get, KeyValue, range_end


@dataclass(slots=True, kw_only=True)
class Found:
    """What there is at one path; `has_records` says whether record keys were asked for."""

    revision: int
    has_records: bool
    value: KeyValue | None = None
    file_record: KeyValue | None = None
    evidence_key: bytes | None = None
    marker: KeyValue | None = None
    directory_record: KeyValue | None = None

    @property
    def below(self) -> bool:
        """Whether there is a directory: a key below the path."""
        return self.evidence_key is not None


About = Literal["value", "file_side", "below", "marker", "directory_side"]
Question = tuple[About, Get]


def questions_about(
    keyspace: Keyspace,
    names: tuple[bytes, ...],
    *,
    stored_records: bool,
    evidence_key: bytes | None = None,
) -> list[Question]:
    """Return what to read to know what is at a path; empty if nothing can be there.

    With a `evidence_key`, a key that was below it, each question is about a single key: however
    little is asked for of a range, etcd walks all of it. If that key has gone, they say
    nothing about what is below.
    """
    found: list[Question] = []
    with suppress(CallerError):
        key = keyspace.file_key(names)
        found.append(("value", Get(key)))
        if stored_records and names[-1] != MARKER_NAME:
            found.append(("file_side", Get(record_key(key))))
    try:
        prefix = keyspace.directory_prefix(names)
    except CallerError:
        return found
    if evidence_key is not None:
        found.append(("marker", Get(prefix)))
        if evidence_key != prefix:
            found.append(("below", Get(evidence_key, keys_only=True)))
    else:
        for start, end in shown_ranges(prefix, range_end(prefix)):
            found.append(("below", Get(start, end, limit=1, keys_only=True)))
    if stored_records:
        found.append(("directory_side", Get(record_key(prefix))))
    return found


def answers_to(questions: list[Question], committed: Committed, *, stored_records: bool) -> Found:
    """Return the answers to `questions_about` by what they are about."""
    found = Found(revision=committed.revision, has_records=stored_records)
    for about, get in questions:
        for entry in committed[get].entries:
            match about:
                case "value":
                    found.value = entry
                case "file_side":
                    found.file_record = entry
                case "directory_side":
                    found.directory_record = entry
                case "marker":
                    found.marker, found.evidence_key = entry, entry.key
                case "below":
                    found.evidence_key = found.evidence_key or entry.key
                    if get.end is not None and entry.key == get.key:
                        found.marker = entry
    return found


def is_below(key: bytes, keyspace: Keyspace, names: tuple[bytes, ...]) -> bool:
    """Tell whether a key is below a path, which may have been another when it was remembered."""
    try:
        return key.startswith(keyspace.directory_prefix(names))
    except CallerError:
        return False
