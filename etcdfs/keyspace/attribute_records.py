"""Attribute records: where the attributes of a key are kept in etcd, as what text, and who may.

Knows: the mapping between keys and their record keys, the format of a record, when a record is
void, and whether etcd's roles let records be read and written. Does not know: what attributes mean
to a file system, and when they change.

A key has attributes of its own only where they differ from the mount's defaults; they are then the
JSON object in its *record key*, which is `/.etcdfs/attrs/` and the key itself: `/.etcdfs/attrs//app/x`
for `/app/x`, `/.etcdfs/attrs//app/` for the marker of the directory `/app`. Its fields, none of
which need be there:

===================  ==========================================================================
`mode`               permission bits in octal, as text: `"0640"`
`uid`, `gid`         numbers
`type`               `"symlink"` (the key's value is the target), `"fifo"` or `"socket"`
`mtime_ns`           nanoseconds since the epoch; hold only while the key's `mod_revision` is
`mtime_revision`     this one. Without it: the revision that wrote the record
`atime_ns`           nanoseconds since the epoch
`xattrs`             an object: name to value, in base64
===================  ==========================================================================

A record is *void* if it was written before the key was made: somebody who knows of no records
deleted the key and made it anew.

Whoever may write to etcd may write anything here, and so may a later version of etcdfs. What
cannot be read never voids the rest: fields of other names, and values that are none, are kept as
they are until they are set. When it is one of those that say who may have the file, the record is
*doubtful*, and access is narrowed (`etcdfs.vfs.attributes`). So it is for a value that is no record
at all. Every mount must come to the same verdict, so that none is left to limits of the process:
not the depth of brackets (Python's stack), nor the length of numbers.

Nobody may be shown a file by default that a record would have kept from him. So while records
cannot be read (`Rights`), what is known of them stays, and everything is shown without the rights
of group and others: when in doubt, closed. Whether they can be written is for whoever wants to know
why a mode was refused; it is tried each time. That a password is wrong says nothing of either
(`StorePermissionError.is_of_role`).

Concurrency: pure functions and frozen values; `Rights` belongs to the trio thread.
"""

import json
import logging
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import Final, Literal, TypeVar, final, get_args

from etcdfs.errors import StorePermissionError
from etcdfs.keyspace.store import (
    END_OF_KEYS,
    KeyValue,
    range_end,
)

ATTRIBUTES: Final = b"/.etcdfs/attrs/"
"""What all record keys begin with."""

ATTRIBUTES_END: Final = range_end(ATTRIBUTES)

Type = Literal["symlink", "fifo", "socket"]
"""What a key is, if not a file or a directory."""

T = TypeVar("T")

ID_MAX: Final = 2**32 - 2  # -1 is "do not change" (chown(2))

TIME_MAX: Final = 2**62 * 10**9
"""Nanoseconds. The kernel takes and gives seconds of 64 bits; a bit less leaves room to add to."""

REVISION_MAX: Final = 2**63 - 1

DEPTH_MAX: Final = 16
"""Brackets within brackets; a record of ours has two."""

DIGITS_MAX: Final = 600
"""Digits of a number; Python's own limit can be set, down to 640."""

XATTR_NAME_MAX: Final = 255  # include/uapi/linux/limits.h, like the next two
XATTR_SIZE_MAX: Final = 64 * 1024
XATTR_LIST_MAX: Final = 64 * 1024
XATTR_USER: Final = b"user."
XATTR_RESERVED: Final = (b"user.etcd.", b"user.etcdfs.")
"""What names of the user's own begin with, and must not begin with."""


# --- keys -----------------------------------------------------------------------------------


def record_key(key: bytes) -> bytes:
    """Return the record key of a key."""
    return ATTRIBUTES + key


def is_record_key(key: bytes) -> bool:
    """Tell whether a key is a record key."""
    return key.startswith(ATTRIBUTES)


def owner_of(stored_record: bytes) -> bytes:
    """Return the key that a record key belongs to."""
    assert is_record_key(stored_record)
    return stored_record[len(ATTRIBUTES) :]


def record_range(prefix: bytes) -> tuple[bytes, bytes]:
    """Return start and end of the record keys of all keys that begin with `prefix`; none is empty."""
    return record_key(prefix or b"\0"), range_end(record_key(prefix))


def shown_ranges(start: bytes, end: bytes) -> list[tuple[bytes, bytes]]:
    """Return the parts of a range of keys in which there are no record keys."""
    if start >= ATTRIBUTES_END or (end <= ATTRIBUTES and end != END_OF_KEYS):
        return [(start, end)]
    parts = [(start, ATTRIBUTES), (ATTRIBUTES_END, end)]
    return [(first, last) for first, last in parts if first < last or last == END_OF_KEYS]


# --- records --------------------------------------------------------------------------------


class RecordError(ValueError):
    """A record key's value is no record."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Attributes of one key; None where the default holds.

    Attributes:
        mode: Permission bits.
        uid: Owner.
        gid: Group.
        type: What the key is, if not a file or a directory.
        mtime_ns: When the content changed, as somebody set it.
        mtime_revision: The key's mod_revision that `mtime_ns` holds for; 0: the one that the
            record is written with.
        atime_ns: When it was read, as somebody set it.
        xattrs: The extended attributes, `user.` included in their names.
        unknown: JSON of fields that cannot be read, by name: those of which this version does
            not know, and those whose value is none.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    type: Type | None = None
    mtime_ns: int | None = None
    mtime_revision: int = 0
    atime_ns: int | None = None
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it says anything; what does not is not kept."""
        return self != _NOTHING

    @property
    def is_doubtful(self) -> bool:
        """Whether it cannot be told from it who may have the file."""
        return not _DECISIVE.isdisjoint(self.unknown)

    def settled(self, *names: str) -> "Record":
        """Return the record without what could not be read under these names; they are set."""
        unknown = {name: text for name, text in self.unknown.items() if name not in names}
        return self if unknown == self.unknown else replace(self, unknown=unknown)

    def without_mtime(self) -> "Record":
        """Return the record without a time that no longer holds."""
        return replace(self, mtime_ns=None, mtime_revision=0)

    def mtime_at(self, mod_revision: int) -> int | None:
        """Return the mtime that was set for this version of the key, if one was."""
        return self.mtime_ns if self.mtime_revision == mod_revision else None


_NOTHING: Final = Record()
_KNOWN: Final = frozenset(f.name for f in fields(Record)) - {"unknown"}
_DECISIVE: Final = frozenset(("mode", "uid", "gid", "type"))
UNREADABLE: Final = Record(unknown={"mode": '"unreadable"'})
"""What a value that is no record says."""


def encode(record: Record) -> bytes:
    """Return a record as text."""
    found: dict[str, object] = {name: json.loads(text) for name, text in record.unknown.items()}
    if record.mode is not None:
        found["mode"] = f"{record.mode:04o}"
    for name in ("uid", "gid", "type", "mtime_ns", "atime_ns"):
        value: object = getattr(record, name)
        if value is not None:
            found[name] = value
    if record.mtime_ns is not None and record.mtime_revision:
        found["mtime_revision"] = record.mtime_revision
    if record.xattrs:
        unread = found.get("xattrs")
        found["xattrs"] = (unread if isinstance(unread, dict) else {}) | {
            name.decode("utf-8", "surrogateescape"): b64encode(value).decode()
            for name, value in record.xattrs.items()
        }
    return json.dumps(found, sort_keys=True, separators=(",", ":")).encode()


def decode(value: bytes, revision: int) -> Record:
    """Return the record in a record key, field by field.

    Args:
        value: The record key's value.
        revision: The record key's mod_revision.

    Raises:
        RecordError: It is none.
    """
    try:
        text = value.decode()
        if _depth(text) > DEPTH_MAX:
            raise RecordError(f"more than {DEPTH_MAX} brackets within brackets")
        found: object = json.loads(text, parse_int=_integer)
    except ValueError as exc:
        raise RecordError(f"{value[:80]!r} is no record of attributes: {exc}") from exc
    if not isinstance(found, dict):
        raise RecordError(f"{value[:80]!r} is no record of attributes: it is no object")
    return _Fields(found).record(revision)


def read(stored_record: KeyValue) -> Record:
    """Return the record in a record key, `UNREADABLE` if it is none."""
    try:
        return decode(stored_record.value, stored_record.mod_revision)
    except RecordError:
        return UNREADABLE


def clamped(time_ns: int) -> int:
    """Return the time nearest to this one that can be kept, as file systems do."""
    return max(-TIME_MAX, min(time_ns, TIME_MAX))


def is_xattr_name(name: bytes) -> bool:
    """Tell whether an extended attribute of the user's own can have this name."""
    return (
        name.startswith(XATTR_USER)
        and not name.startswith(XATTR_RESERVED)
        and len(name) <= XATTR_NAME_MAX
        and b"\0" not in name
    )


def xattr_list_size(name: bytes) -> int:
    """Return the bytes that a name takes in what listxattr(2) returns."""
    return len(name) + 1


_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS: Final = re.compile(r"[\[{\]}]")


def _depth(text: str) -> int:
    """Return how deep the brackets of a JSON text go; of any other, at least as far as is read."""
    if text.count("[") + text.count("{") <= DEPTH_MAX:
        return 0  # as in every record of ours
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_MAX:
        raise RecordError(f"a number of {len(digits)} digits")
    return int(digits)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


class _Fields:
    """The fields of one JSON object, each read for itself; what is none stays as it is."""

    def __init__(self, found: dict[str, object]) -> None:
        self._found = found
        self._unknown = {name: _text(v) for name, v in found.items() if name not in _KNOWN}

    def record(self, revision: int) -> Record:
        mtime_ns = self._read("mtime_ns", _time)
        mtime_revision = self._read("mtime_revision", _revision) or revision
        if "mtime_revision" in self._unknown:
            mtime_ns = None  # nobody knows what it holds for
        return Record(
            mode=self._read("mode", _mode),
            uid=self._read("uid", _id),
            gid=self._read("gid", _id),
            type=self._read("type", _type),
            mtime_ns=mtime_ns,
            mtime_revision=0 if mtime_ns is None else mtime_revision,
            atime_ns=self._read("atime_ns", _time),
            xattrs=self._xattrs(),
            unknown=self._unknown,
        )

    def _read(self, name: str, read_as: Callable[[object], T | None]) -> T | None:
        if name not in self._found:
            return None
        value = self._found[name]  # null is a value, and none of ours
        found = read_as(value)
        if found is None:
            self._unknown[name] = _text(value)
        return found

    def _xattrs(self) -> dict[bytes, bytes]:
        found = self._found.get("xattrs", {})
        if not isinstance(found, dict):
            self._unknown["xattrs"] = _text(found)
            return {}
        xattrs: dict[bytes, bytes] = {}
        unread: dict[str, object] = {}
        size = 0
        for name, text in sorted(found.items(), key=itemgetter(0)):
            own = _xattr(name, text)
            size += 0 if own is None else xattr_list_size(own[0])
            if own is None or size > XATTR_LIST_MAX:
                unread[name] = text
            else:
                xattrs.update((own,))
        if unread:
            self._unknown["xattrs"] = _text(unread)
        return xattrs


def _number(value: object, least: int, most: int) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        return None
    return value


def _id(value: object) -> int | None:
    return _number(value, 0, ID_MAX)


def _time(value: object) -> int | None:
    return _number(value, -TIME_MAX, TIME_MAX)


def _revision(value: object) -> int | None:
    return _number(value, 1, REVISION_MAX)


def _mode(text: object) -> int | None:
    if not isinstance(text, str) or not _OCTAL.fullmatch(text):
        return None
    return int(text, 8)


_OCTAL: Final = re.compile("[0-7]{1,4}", re.ASCII)


def _type(name: object) -> Type | None:
    for known in get_args(Type):
        if name == known:
            found: Type = known
            return found
    return None


def _xattr(name: str, text: object) -> tuple[bytes, bytes] | None:
    if not isinstance(text, str):
        return None
    try:
        own, value = name.encode("utf-8", "surrogateescape"), b64decode(text, validate=True)
    except ValueError:
        return None
    return (own, value) if is_xattr_name(own) and len(value) <= XATTR_SIZE_MAX else None


def is_void(stored_record: KeyValue, create_revision: int) -> bool:
    """Tell whether a record is older than the key it belongs to, and says nothing of it."""
    return stored_record.mod_revision < create_revision


def moved(stored_record: KeyValue, owner: KeyValue) -> bytes | None:
    """Return what the record key of the new name is to hold when a key is renamed.

    The new key is to be put by the same transaction.

    Args:
        stored_record: The record key that the old name has.
        owner: The key of the old name (its value is not looked at).

    Returns:
        None if there is nothing to take along.
    """
    if is_void(stored_record, owner.create_revision):
        return None
    try:
        record = decode(stored_record.value, stored_record.mod_revision)
    except RecordError:
        return stored_record.value  # whatever it is, it is not ours to drop
    holds = record.mtime_at(owner.mod_revision) is not None
    kept = replace(record, mtime_revision=0) if holds else record.without_mtime()
    return encode(kept) if kept else None


log = logging.getLogger(__name__)

RECHECK_S: Final = 5.0
"""How soon what was refused is tried again at the latest, where no backoff is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RightsStatistics:
    """What roles let the mount do with records.

    Attributes:
        readable: Whether records could be read when last tried; if not, all is closed.
        writable: Whether they could be written when last tried.
        closings: Times that they could not be read any more.
        refusals: Writes of records that were refused.
    """

    readable: bool
    writable: bool
    closings: int
    refusals: int


@final
class Rights:
    """The rights of one mount, as far as they have been tried."""

    def __init__(self) -> None:
        # --- mutable state
        self.readable = True
        self.on_turn: Callable[[], None] = _do_nothing  # whenever `readable` has changed
        self._writable = True
        self._closings = self._refusals = 0

    def refuse_reading(self, refusal: StorePermissionError) -> None:
        """Note that records cannot be read.

        Raises:
            StorePermissionError: The refusal, if it says nothing of that.
        """
        if not refusal.is_of_role:
            raise refusal
        if self.readable:
            self._closings += 1
            self.readable = False
            self.on_turn()
            log.warning(
                "attributes cannot be read: all is its owner's alone (%s); --no-attrs opens it",
                refusal,
            )

    def allow_reading(self) -> None:
        """Note that records can be read, and that what can be shown is known."""
        if not self.readable:
            self.readable = True
            self.on_turn()
            log.info("attributes can be read again")

    def refuse_writing(self, refusal: StorePermissionError) -> None:
        """Note that a record could not be written.

        Raises:
            StorePermissionError: The refusal, if it says nothing of that.
        """
        if not refusal.is_of_role:
            raise refusal
        self._refusals += 1
        # A role may reach some records and not others: the first refusal is news.
        log.log(
            logging.WARNING if self._refusals == 1 else logging.DEBUG,
            "attributes cannot be written: %s",
            refusal,
        )
        self._writable = False

    def allow_writing(self) -> None:
        """Note that a record has been written."""
        self._writable = True

    def statistics(self) -> RightsStatistics:
        """Say what has been tried."""
        return RightsStatistics(
            readable=self.readable,
            writable=self._writable,
            closings=self._closings,
            refusals=self._refusals,
        )


def _do_nothing() -> None:
    pass
