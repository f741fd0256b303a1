"""Side keys: where the attributes of a key are kept in etcd, and as what text.

What this room knows: the mapping between keys and side keys, the record in a side key, and when a
record is void. What it must not know: what attributes mean to a file system, and when they change.

A key has attributes of its own only where they differ from the mount's defaults; they are then the
JSON object in its *side key*, which is `/.etcdfs/attrs/` and the key itself: `/.etcdfs/attrs//app/x`
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
deleted the key and made it anew. Fields of other names are kept as they are.

Concurrency: none; pure functions and frozen values.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, Literal, final, get_args

from etcdfs.store import KeyValue, range_end

ATTRIBUTES: Final = b"/.etcdfs/attrs/"
"""What all side keys begin with."""

ATTRIBUTES_END: Final = range_end(ATTRIBUTES)

Type = Literal["symlink", "fifo", "socket"]
"""What a key is, if not a file or a directory."""

MODE_MAX: Final = 0o7777
ID_MAX: Final = 2**32 - 2  # -1 is "do not change" (chown(2))
TIME_MAX: Final = 2**63 - 1


# --- keys -----------------------------------------------------------------------------------


def side_key(key: bytes) -> bytes:
    """Return the side key of a key."""
    return ATTRIBUTES + key


def is_side_key(key: bytes) -> bool:
    """Tell whether a key is a side key."""
    return key.startswith(ATTRIBUTES)


def owner_of(side: bytes) -> bytes:
    """Return the key that a side key belongs to."""
    assert is_side_key(side)
    return side[len(ATTRIBUTES) :]


def side_range(prefix: bytes) -> tuple[bytes, bytes]:
    """Return start and end of the side keys of all keys that begin with `prefix`."""
    start = side_key(prefix)
    return start, range_end(start)


# --- records --------------------------------------------------------------------------------


class RecordError(ValueError):
    """A side key's value is no record."""


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
        unknown: JSON of fields that this version does not know, by name.
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

    def without_mtime(self) -> "Record":
        """Return the record without a time that no longer holds."""
        return replace(self, mtime_ns=None, mtime_revision=0)

    def mtime_at(self, mod_revision: int) -> int | None:
        """Return the mtime that was set for this version of the key, if one was."""
        return self.mtime_ns if self.mtime_revision == mod_revision else None


_NOTHING: Final = Record()
_KNOWN: Final = frozenset(f.name for f in fields(Record)) - {"unknown"}


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
        found["xattrs"] = {
            name.decode("utf-8", "surrogateescape"): b64encode(value).decode()
            for name, value in record.xattrs.items()
        }
    return json.dumps(found, sort_keys=True, separators=(",", ":")).encode()


def decode(value: bytes, revision: int) -> Record:
    """Return the record in a side key.

    Args:
        value: The side key's value.
        revision: The side key's mod_revision.

    Raises:
        RecordError: It is none.
    """
    try:
        found: object = json.loads(value)
        if not isinstance(found, dict):
            raise RecordError("not an object")
        return _decode(found, revision)
    except _UNREADABLE as exc:
        raise RecordError(f"{value[:80]!r} is no record of attributes: {exc}") from exc


_UNREADABLE: Final = (ValueError, TypeError, RecursionError)


def _decode(found: dict[str, object], revision: int) -> Record:
    mtime_ns = _number(found, "mtime_ns", -TIME_MAX, TIME_MAX)
    mtime_revision = _number(found, "mtime_revision", 1, TIME_MAX) or revision
    return Record(
        mode=_mode(found.get("mode")),
        uid=_number(found, "uid", 0, ID_MAX),
        gid=_number(found, "gid", 0, ID_MAX),
        type=_type(found.get("type")),
        mtime_ns=mtime_ns,
        mtime_revision=0 if mtime_ns is None else mtime_revision,
        atime_ns=_number(found, "atime_ns", -TIME_MAX, TIME_MAX),
        xattrs=_xattrs(found.get("xattrs", {})),
        unknown={name: json.dumps(v) for name, v in found.items() if name not in _KNOWN},
    )


def _number(found: dict[str, object], name: str, least: int, most: int) -> int | None:
    number = found.get(name)
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise RecordError(f"{name} is {number!r}")
    return number


def _mode(text: object) -> int | None:
    if text is None:
        return None
    if not isinstance(text, str) or not text.isascii() or not text.isdigit():
        raise RecordError(f"mode is {text!r}")
    mode = int(text, 8)
    if mode > MODE_MAX:
        raise RecordError(f"mode is {text!r}")
    return mode


def _type(name: object) -> Type | None:
    if name is None:
        return None
    for known in get_args(Type):
        if name == known:
            found: Type = known
            return found
    raise RecordError(f"type is {name!r}")


def _xattrs(found: object) -> dict[bytes, bytes]:
    if not isinstance(found, dict):
        raise RecordError(f"xattrs is {found!r}")
    return {
        name.encode("utf-8", "surrogateescape"): b64decode(text, validate=True)
        for name, text in found.items()
    }


def is_void(side: KeyValue, create_revision: int) -> bool:
    """Tell whether a record is older than the key it belongs to, and says nothing of it."""
    return side.mod_revision < create_revision


def moved(side: KeyValue, owner: KeyValue) -> bytes | None:
    """Return what the side key of the new name is to hold when a key is renamed.

    The new key is to be put by the same transaction.

    Args:
        side: The side key that the old name has.
        owner: The key of the old name (its value is not looked at).

    Returns:
        None if there is nothing to take along.
    """
    if is_void(side, owner.create_revision):
        return None
    try:
        record = decode(side.value, side.mod_revision)
    except RecordError:
        return side.value  # whatever it is, it is not ours to drop
    holds = record.mtime_at(owner.mod_revision) is not None
    kept = replace(record, mtime_revision=0) if holds else record.without_mtime()
    return encode(kept) if kept else None
