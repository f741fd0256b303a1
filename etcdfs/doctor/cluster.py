"""What is wrong with etcd, or with what a mount may do there.

Knows: the questions to each member, and to the prefix. Does not know: gRPC, and how it is shown.

Concurrency: trio; every question is bounded by `--timeout`, the walk over the keys by
`SCAN_TIMEOUT_S`.
"""

import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from etcdfs.doctor.machine import Finding, Level
from etcdfs.errors import StoreError, StorePermissionError
from etcdfs.etcd.client import open_store
from etcdfs.keyspace.attribute_records import is_record_key, is_void, owner_of, record_range
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import (
    Compare,
    Delete,
    KeyValue,
    Put,
    Store,
    Transaction,
    absent,
    unchanged,
)
from etcdfs.keyspace.transactions import WIDTH
from etcdfs.options import Endpoint, MountOptions
from etcdfs.process.printable import printable

SCAN_TIMEOUT_S: Final = 60.0
"""How long all keys may take to be read; what is found by then is said."""

PAGE: Final = 1000
SLOW_S: Final = 0.1
"""What a read of one key takes at most where etcd is well and near."""

FULL: Final = 0.8
ASSUMED_QUOTA: Final = 2 * 1024**3  # etcd's default --quota-backend-bytes

_MAY_LOSE_DATA: Final = ("3.5.0", "3.5.1", "3.5.2")  # https://github.com/etcd-io/etcd/issues/13766
_OLDEST: Final = (3, 4)
_SLASH: Final = ord("/")


async def check_cluster(options: MountOptions, *, fix: bool) -> AsyncIterator[Finding]:
    """Check each member, that they are one cluster, and the prefix.

    With `fix`, records of attributes that belong to no key are deleted.
    """
    if not options.endpoints:
        yield Finding(Level.NOTE, "etcd", "none to ask: --embedded starts one with the mount")
    clusters: dict[int, Endpoint] = {}
    usable: list[Endpoint] = []
    for endpoint in options.endpoints:
        try:
            async with _asking(options, (endpoint,)) as store:
                async for finding, cluster in _check_member(store, endpoint):
                    clusters.setdefault(cluster, endpoint)
                    yield finding
            usable.append(endpoint)
        except StoreError as exc:
            yield Finding(Level.PROBLEM, "etcd", str(exc))
    if len(clusters) > 1:
        listed = " and ".join(map(str, clusters.values()))
        yield Finding(Level.PROBLEM, "etcd", f"{listed} are of different clusters")
    if usable:
        async with _asking(options, tuple(usable)) as store:
            async for finding in _check_prefix(store, options, fix=fix):
                yield finding


@asynccontextmanager
async def _asking(options: MountOptions, endpoints: tuple[Endpoint, ...]) -> AsyncIterator[Store]:
    opening = open_store(endpoints, timeout_s=options.timeout_s, security=options.security)
    async with opening as store:
        yield store


# --- members --------------------------------------------------------------------------------


async def _check_member(store: Store, endpoint: Endpoint) -> AsyncIterator[tuple[Finding, int]]:
    """Yield what is found of a member that has just answered a linearizable read."""
    status = await store.status()

    def found(level: Level, message: str) -> tuple[Finding, int]:
        return Finding(level, "etcd", f"{endpoint}: {message}"), status.cluster

    yield found(Level.OK, f"etcd {status.version} answers, with a leader and a majority")
    if status.version in _MAY_LOSE_DATA:
        yield found(Level.PROBLEM, f"etcd {status.version} may lose data (etcd issue 13766)")
    elif _release(status.version) < _OLDEST:
        yield found(Level.PROBLEM, f"etcd {status.version} is too old; 3.4 is the oldest")
    for problem in status.problems:
        yield found(Level.PROBLEM, f"it says: {problem}")
    if status.database_size > FULL * ASSUMED_QUOTA:
        size = status.database_size / 1024**3
        yield found(
            Level.NOTE,
            f"its database has {size:.1f} GiB; etcd's quota is 2 GiB unless it was raised",
        )
    before = trio.current_time()
    with suppress(StorePermissionError):  # it was answered all the same
        await store.range(b"\0", limit=1, keys_only=True)
    took_s = trio.current_time() - before
    yield found(Level.NOTE if took_s > SLOW_S else Level.OK, f"a read takes {took_s * 1000:.1f} ms")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# --- the prefix -----------------------------------------------------------------------------


async def _check_prefix(
    store: Store, options: MountOptions, *, fix: bool
) -> AsyncIterator[Finding]:
    keyspace = Keyspace(options.prefix)
    shown = printable(options.prefix.decode(errors="backslashreplace")) or "(all keys)"
    try:
        keys = await _read(store, keyspace.start, keyspace.end)
    except StoreError as exc:
        yield Finding(Level.PROBLEM, "prefix", f"{shown} cannot be read: {exc}")
        return
    if not options.read_only:
        yield await _check_writing(store, keyspace, shown)
    own = {key: entry for key, entry in keys.items() if not is_record_key(key)}
    yield Finding(Level.OK, "keys", f"{len(own)} keys below {shown}")
    async for finding in _check_records(store, keyspace, own, options, fix=fix):
        yield finding
    for count, example, what in _odd(keyspace, own):
        if count:
            yield Finding(Level.NOTE, "keys", f"{count} {what}, such as {example!r}")


async def _read(store: Store, start: bytes, end: bytes) -> dict[bytes, KeyValue]:
    """Return all keys of a range, without their values."""
    found: dict[bytes, KeyValue] = {}
    with trio.fail_after(SCAN_TIMEOUT_S):
        while True:
            page = await store.range(start, end, limit=PAGE, keys_only=True)
            found.update((entry.key, entry) for entry in page.entries)
            if not page.more:
                return found
            start = page.entries[-1].key + b"\0"


async def _check_writing(store: Store, keyspace: Keyspace, shown: str) -> Finding:
    """See whether roles let a key be put, by a transaction whose condition never holds."""
    probe = keyspace.start + b".etcdfs-doctor"
    never = Compare(probe, "version", "<", 0)
    try:
        await store.commit(Transaction((never,), (Put(probe, b""),)))
    except StorePermissionError as exc:
        return Finding(
            Level.PROBLEM,
            "prefix",
            f"{shown} cannot be written, and the mount is not --read-only: {exc}",
        )
    except StoreError as exc:
        return Finding(Level.PROBLEM, "prefix", f"{shown} cannot be written: {exc}")
    return Finding(Level.OK, "prefix", f"{shown} can be read and written")


def _odd(keyspace: Keyspace, keys: Mapping[bytes, KeyValue]) -> Iterator[tuple[int, bytes, str]]:
    """Yield how many keys have no plain path, an example, and why."""
    above = {key[:at] for key in keys for at, byte in enumerate(key) if byte == _SLASH}
    both = [key for key in keys if key in above]
    escaped = [key for key in keys if _is_escaped(keyspace, key)]
    yield len(both), min(both, default=b""), "keys are a file and a directory (`%value`)"
    yield len(escaped), min(escaped, default=b""), "keys have an escaped name (`%=...`)"


def _is_escaped(keyspace: Keyspace, key: bytes) -> bool:
    names = keyspace.locate(key).names
    plain = key[len(keyspace.prefix) :].removesuffix(b"/")
    return b"/".join(names) != plain


async def _check_records(
    store: Store,
    keyspace: Keyspace,
    keys: Mapping[bytes, KeyValue],
    options: MountOptions,
    *,
    fix: bool,
) -> AsyncIterator[Finding]:
    if options.no_attrs:
        return
    try:
        records = await _read(store, *record_range(keyspace.prefix))
    except StorePermissionError as exc:
        yield Finding(
            Level.PROBLEM,
            "attributes",
            f"they cannot be read, so that all is its owner's alone; --no-attrs opens it: {exc}",
        )
        return
    void = [
        record
        for record in records.values()
        if (owner := keys.get(owner_of(record.key))) is None
        or is_void(record, owner.create_revision)
    ]
    yield Finding(Level.OK, "attributes", f"{len(records)} records")
    if void and fix:
        await _delete(store, void, keys)
        yield Finding(Level.OK, "attributes", f"{len(void)} records of no key deleted")
    elif void:
        yield Finding(
            Level.PROBLEM, "attributes", f"{len(void)} records belong to no key; --fix deletes them"
        )


async def _delete(store: Store, void: Sequence[KeyValue], keys: Mapping[bytes, KeyValue]) -> None:
    """Delete records, each on condition that it is the one that was seen, and void still."""
    for first in range(0, len(void), WIDTH):
        parts = tuple(_deletion(record, keys) for record in void[first : first + WIDTH])
        await store.commit(Transaction((), parts))


def _deletion(record: KeyValue, keys: Mapping[bytes, KeyValue]) -> Transaction:
    owner = owner_of(record.key)
    younger = Compare(owner, "create_revision", ">", record.mod_revision)
    conditions = (
        unchanged(record.key, record.mod_revision),
        younger if owner in keys else absent(owner),
    )
    return Transaction(conditions, (Delete(record.key),))
