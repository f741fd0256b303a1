"""What etcd must hold for a tree that is known: each key, each record key, and nothing else.

Knows: the mapping of files to keys (B1, B3, B53 to B56), written down once more. Does not
know: how the tree came to be.

Concurrency: plain blocking calls.
"""

import base64
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from tests.mount.client import Client, Found
from tests.mount.machine.twins import OLD_NS, StoredRecord, walk, xattrs_at

RECORD_KEYS: Final = b"/.etcdfs/attrs/"
_TYPES: Final = {stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo"}
_DEFAULT_MODES: Final = {stat.S_IFREG: 0o644, stat.S_IFDIR: 0o755, stat.S_IFIFO: 0o644}


def problems(
    client: Client,
    prefix: bytes,
    twin: StoredRecord,
    *,
    untimed: Collection[int],
    marked: Collection[int],
    deleted: Mapping[bytes, int],
) -> Iterator[str]:
    """Say what etcd has that it should not have, or the other way round.

    Args:
        client: Who asks.
        prefix: What the keys of the tree begin with.
        twin: The tree.
        untimed: Inodes whose mtime says nothing.
        marked: Inodes of directories that were made by mkdir(2).
        deleted: The revisions at which other clients last deleted keys: they know of no side
            keys, and leave them.
    """
    keys = {found.key: found for found in client.below(prefix)}
    sides = {found.key[len(RECORD_KEYS) :]: found for found in client.below(RECORD_KEYS + prefix)}
    expected = {prefix}
    for path in walk(twin):
        at = twin.path(path)
        found = os.lstat(at)
        is_directory = stat.S_ISDIR(found.st_mode)
        key = prefix + path + (b"/" if is_directory else b"")
        expected.add(key)
        if key not in keys:
            if not is_directory or found.st_ino in marked or not os.listdir(at):
                yield f"{key!r} is missing"
        elif keys[key].value != value_at(at, found.st_mode):
            yield f"{key!r} is {keys[key].value[:80]!r}"
        yield from record_problems(
            keys.get(key), sides.get(key), at, has_time=found.st_ino not in untimed
        )
    yield from (f"{key!r} is too much" for key in keys.keys() - expected)
    for key in sides.keys() - keys.keys():
        if sides[key].mod_revision > deleted.get(key, 0):
            yield f"the record key of {key!r} is left: {sides[key].value!r}"


def value_at(path: bytes, mode: int) -> bytes:
    """Return the value that the key of a path has."""
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            return file.read()
    return os.readlink(path) if stat.S_ISLNK(mode) else b""


def record_problems(
    owner: Found | None, side: Found | None, at: bytes, *, has_time: bool
) -> Iterator[str]:
    """Compare a record key with what is at a path."""
    record: dict[str, Any] = {}
    if owner is not None and side is not None and side.mod_revision >= owner.create_revision:
        record = json.loads(side.value)
        if not record:
            yield f"the record key of {owner.key!r} says nothing"
        holds = record.pop("mtime_revision", side.mod_revision) == owner.mod_revision
        if not holds:
            record.pop("mtime_ns", None)
    record.pop("atime_ns", None)
    expected = record_at(at)
    # docs/semantics.md, Limits: a directory's time stays in etcd although something was removed since.
    is_directory = stat.S_ISDIR(os.lstat(at).st_mode)
    if not has_time or (is_directory and "mtime_ns" not in expected):
        record.pop("mtime_ns", None)
        expected.pop("mtime_ns", None)
    if record != expected:
        yield f"the attributes of {at!r} are {record} in etcd, and should be {expected}"


def record_at(at: bytes) -> dict[str, Any]:
    """Return the attributes of what is at a path as a record key has them."""
    found = os.lstat(at)
    kind = stat.S_IFMT(found.st_mode)
    mode = stat.S_IMODE(found.st_mode)
    record: dict[str, Any] = {
        "type": _TYPES.get(kind),
        "mode": None if mode == _DEFAULT_MODES.get(kind, mode) else f"{mode:04o}",
        "uid": found.st_uid if found.st_uid != os.geteuid() else None,
        "gid": found.st_gid if found.st_gid != os.getegid() else None,
        "mtime_ns": found.st_mtime_ns if found.st_mtime_ns < OLD_NS else None,
    }
    if kind in {stat.S_IFREG, stat.S_IFDIR}:
        xattrs = xattrs_at(at).items()
        record["xattrs"] = {name: base64.b64encode(value).decode() for name, value in xattrs}
    return {name: value for name, value in record.items() if value not in (None, {})}
