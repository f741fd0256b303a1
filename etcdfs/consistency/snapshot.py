"""What a snapshot of the mirror holds, and when one that is read back is believed.

Knows: the streams of a snapshot, its manifest and their checksums, and whose a snapshot is. Does
not know: files, SQL, time, who shows what is in it.

A snapshot has one *stream* for each watch: the keys, and the attribute records where these have a
watch of their own. A stream is every entry there was at one revision, and the last changes up to
it, by which the history is known again when etcd answers. The *manifest* says which streams are
whole, and whose they are: a snapshot is of one cluster, prefix and user.

Nothing is believed that does not add up. An entry has a checksum of its own; a stream the number
of its entries and the sum of their checksums, so that one which got lost is missed as well; the
manifest a checksum of its text.

Concurrency: none; pure functions and frozen values.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from struct import Struct
from typing import Final, NotRequired, Protocol, TypedDict, final
from zlib import crc32

from etcdfs.errors import SnapshotDamagedError
from etcdfs.keyspace.store import Event, KeyValue, Revision, Tombstone

FORMAT: Final = 1
"""Of everything that is written; another one is never read."""

DIGEST_BITS: Final = 63
"""Of the sum of checksums: what SQL calls an integer, and no sign."""

_numbers: Final = Struct("<5q").pack


class Stream(StrEnum):
    """What is followed by one watch."""

    KEYS = "keys"
    ATTRIBUTES = "attributes"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a copy of a range is in etcd's history.

    Attributes:
        revision: Everything up to it is in the copy.
        witnesses: Changes up to it, each the last of its key, which show whether a history is the
            same one; none: there was nothing in the range.
    """

    revision: Revision
    witnesses: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose a snapshot is.

    Attributes:
        cluster: etcd's number of itself.
        prefix: The prefix whose keys are in it.
        user: Who etcd let read them: its user, or else a client's certificate.
        attributes: Whether it has their attributes.
        endpoints: Where etcd was reached.
    """

    cluster: int
    prefix: bytes
    user: str
    attributes: bool
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """A stream that is whole.

    Attributes:
        table: Number of the table that has its entries.
        rows: How many there are.
        digest: The sum of their checksums (`add_up`).
        position: Where it is in history.
    """

    table: int
    rows: int
    digest: int
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What there is, and whose it is.

    Attributes:
        identity: Whose it is.
        heard_ns: When etcd was last heard: then, what is in it was what etcd had.
        times: The record of when revisions were made, as `revision_times` has it.
        streams: Those that are whole.
    """

    identity: Identity
    heard_ns: int
    times: bytes = b""
    streams: Mapping[Stream, StreamState] = field(default_factory=dict)


class Recorder(Protocol):
    """Is told what one watch brings, so that a snapshot can follow."""

    async def listed(self, entries: Sequence[KeyValue], *, first: bool) -> None:
        """Take part of a listing; waits, within bounds, while too much is not written yet."""
        ...

    def restored(self, position: Position) -> None:
        """Take what was listed for the state."""
        ...

    def applied(self, events: Sequence[Event], position: Position) -> None:
        """Take changes of whole revisions."""
        ...

    def read_ahead(self, entries: Sequence[KeyValue]) -> None:
        """Take entries that the watch may not have brought yet."""
        ...


class Snapshot(Protocol):
    """A snapshot, as the mirror knows it."""

    @property
    def keys(self) -> Recorder:
        """Who is told of the keys."""
        ...

    @property
    def attributes(self) -> Recorder:
        """Who is told of attribute records, where these have a watch of their own."""
        ...

    async def recall(self, key: bytes, revision: Revision) -> bytes | None:
        """Return the value that a key was given at a revision, if the snapshot has it."""
        ...


class _Unrecorded:
    async def listed(self, entries: Sequence[KeyValue], *, first: bool) -> None:
        pass

    def restored(self, position: Position) -> None:
        pass

    def applied(self, events: Sequence[Event], position: Position) -> None:
        pass

    def read_ahead(self, entries: Sequence[KeyValue]) -> None:
        pass


@final
class NoSnapshot:
    """For a mirror of which there is none."""

    keys = attributes = _Unrecorded()

    async def recall(self, key: bytes, revision: Revision) -> bytes | None:
        """There is nothing."""
        del key, revision
        return None


NO_SNAPSHOT: Final = NoSnapshot()


# --- checksums ------------------------------------------------------------------------------


def checksum(entry: KeyValue) -> int:
    """Return the checksum of an entry, 32 bits."""
    key, value, created, modified, version, lease = entry
    # With the length of the key, or it would not be known where it ends.
    return crc32(_numbers(len(key), created, modified, version, lease) + key + value)


def add_up(digest: int, *, added: int = 0, removed: int = 0) -> int:
    """Return the digest of a stream after checksums were added and taken away."""
    return (digest + added - removed) % (1 << DIGEST_BITS)


# --- the manifest as text -------------------------------------------------------------------


class _EventText(TypedDict):
    """An event; a deletion has nothing but its key and its revision."""

    key: str
    mod_revision: Revision
    value: NotRequired[str]
    create_revision: NotRequired[Revision]
    version: NotRequired[int]
    lease: NotRequired[int]


class _StreamText(TypedDict):
    table: int
    rows: int
    digest: int
    revision: Revision
    witnesses: list[_EventText]


class _ManifestText(TypedDict):
    cluster: int
    prefix: str
    user: str
    attributes: bool
    endpoints: list[str]
    heard_ns: int
    times: str
    streams: dict[str, _StreamText]


def encode(manifest: Manifest) -> bytes:
    """Return a manifest as it is written: its checksum, and JSON."""
    identity = manifest.identity
    fields: _ManifestText = {
        "cluster": identity.cluster,
        "prefix": _encode(identity.prefix),
        "user": identity.user,
        "attributes": identity.attributes,
        "endpoints": list(identity.endpoints),
        "heard_ns": manifest.heard_ns,
        "times": _encode(manifest.times),
        "streams": {
            stream.value: {
                "table": state.table,
                "rows": state.rows,
                "digest": state.digest,
                "revision": state.position.revision,
                "witnesses": [_encode_event(event) for event in state.position.witnesses],
            }
            for stream, state in manifest.streams.items()
        },
    }
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x" % crc32(text) + text


def decode(encoded: bytes) -> Manifest:
    """Return the manifest that `encode` was given.

    Raises:
        SnapshotDamagedError: It is not what was written.
    """
    text = encoded[8:]
    if encoded[:8] != b"%08x" % crc32(text):
        raise SnapshotDamagedError("its manifest does not add up")
    try:
        found: _ManifestText = json.loads(text)
        return Manifest(
            identity=Identity(
                cluster=found["cluster"],
                prefix=b64decode(found["prefix"]),
                user=found["user"],
                attributes=found["attributes"],
                endpoints=tuple(found["endpoints"]),
            ),
            heard_ns=found["heard_ns"],
            times=b64decode(found["times"]),
            streams={
                Stream(name): StreamState(
                    table=state["table"],
                    rows=state["rows"],
                    digest=state["digest"],
                    position=Position(
                        state["revision"],
                        tuple(_decode_event(event) for event in state["witnesses"]),
                    ),
                )
                for name, state in found["streams"].items()
            },
        )
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise SnapshotDamagedError(f"its manifest cannot be read: {exc!r}") from exc


def _encode(data: bytes) -> str:
    return b64encode(data).decode()


def _encode_event(event: Event) -> _EventText:
    if isinstance(event, Tombstone):
        return {"key": _encode(event.key), "mod_revision": event.mod_revision}
    return {
        "key": _encode(event.key),
        "mod_revision": event.mod_revision,
        "value": _encode(event.value),
        "create_revision": event.create_revision,
        "version": event.version,
        "lease": event.lease,
    }


def _decode_event(text: _EventText) -> Event:
    key, revision = b64decode(text["key"]), text["mod_revision"]
    if "value" not in text:
        return Tombstone(key, revision)
    return KeyValue(
        key,
        b64decode(text["value"]),
        text["create_revision"],
        revision,
        text["version"],
        text["lease"],
    )


# --- whose it is ----------------------------------------------------------------------------


def fault_in(manifest: Manifest, wanted: Identity) -> str | None:
    """Return why a snapshot is not the one that is wanted; None if it is.

    Args:
        manifest: What is there.
        wanted: Whose it is to be; a `cluster` of 0: etcd has not been heard. Then it must at least
            have been one of the same endpoints, as nothing else says which etcd is meant.
    """
    found = manifest.identity
    if found.prefix != wanted.prefix:
        return f"it is of the prefix {found.prefix!r}"
    if found.user != wanted.user:
        return f"it is what {found.user or 'nobody in particular'} may read"
    if found.attributes != wanted.attributes:
        return "it was made " + ("with" if found.attributes else "without") + " attributes"
    if wanted.cluster and found.cluster != wanted.cluster:
        return f"it is of another cluster ({found.cluster:x}, and this one is {wanted.cluster:x})"
    if not wanted.cluster and set(found.endpoints).isdisjoint(wanted.endpoints):
        return f"it is of the etcd at {', '.join(found.endpoints)}"
    if Stream.KEYS not in manifest.streams:
        return "it was not finished"
    return None
