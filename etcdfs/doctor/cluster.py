"""What is wrong with etcd, or with what a mount may do there.

Knows: the questions to each member, about certificates, and to the prefix. Does not know: gRPC, how
it is shown, what a member says by HTTP (`member_page`).

Concurrency: trio; every question is bounded by `--timeout`, the walk over the keys by
`SCAN_TIMEOUT_S`.
"""

import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from etcdfs.doctor.machine import Finding, Level
from etcdfs.doctor.member_page import check_page
from etcdfs.doctor.snapshot import check_snapshot
from etcdfs.errors import StoreError, StorePermissionError
from etcdfs.etcd.client import open_store
from etcdfs.etcd.tls import member_expiry, own_expiries
from etcdfs.keyspace.attribute_records import is_record_key, is_void, owner_of, record_range
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.paging import Pages, Paging
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
NEAR: Final = 0.8
"""Of --max-file-size: larger values are worth a word."""

EXPIRY_S: Final = 30 * 86_400.0
"""A certificate that ends sooner is to be renewed now."""

SLOW_S: Final = 0.1
"""What a read of one key takes at most where etcd is well and near."""

MAY_LOSE_DATA: Final = ("3.5.0", "3.5.1", "3.5.2")  # https://github.com/etcd-io/etcd/issues/13766
_OLDEST: Final = (3, 4)
_SLASH: Final = ord("/")


async def check_cluster(options: MountOptions, *, fix: bool) -> AsyncIterator[Finding]:
    """Check each member, that they are one cluster, and the prefix.

    With `fix`, records of attributes that belong to no key are deleted.
    """
    if not options.endpoints:
        yield Finding(Level.NOTE, "etcd", "none to ask: --embedded starts one with the mount")
    clusters: dict[Endpoint, int] = {}
    for endpoint in options.endpoints:
        try:
            async for finding, cluster in _check_endpoint(options, endpoint):
                clusters[endpoint] = cluster
                yield finding
        except StoreError as exc:
            yield Finding(Level.PROBLEM, "etcd", str(exc))
    async for finding in _check_own_certificates(options):
        yield finding
    if len(set(clusters.values())) > 1:
        listed = " and ".join(map(str, clusters))
        yield Finding(Level.PROBLEM, "etcd", f"{listed} are of different clusters")
    if clusters:
        async with _asking(options, tuple(clusters)) as store:
            async for finding in _check_prefix(store, options, fix=fix):
                yield finding
    async for finding in check_snapshot(options, cluster=min(clusters.values(), default=0)):
        yield finding


@asynccontextmanager
async def _asking(options: MountOptions, endpoints: tuple[Endpoint, ...]) -> AsyncIterator[Store]:
    opening = open_store(endpoints, timeout_s=options.timeout_s, security=options.security)
    async with opening as store:
        yield store


# --- members --------------------------------------------------------------------------------


async def _check_endpoint(
    options: MountOptions, endpoint: Endpoint
) -> AsyncIterator[tuple[Finding, int]]:
    """Yield what is found of a member, and which cluster it is of.

    Raises:
        StoreError: It does not answer, or refuses.
    """
    async with _asking(options, (endpoint,)) as store:
        async for finding, cluster in _check_member(store, endpoint):
            yield finding, cluster
    for finding in await check_page(endpoint, options.security, options.timeout_s):
        yield finding, cluster
    if endpoint.secure:
        ends = await member_expiry(options.security, endpoint, options.timeout_s)
        yield _check_expiry(f"the certificate of {endpoint}", ends), cluster


async def _check_member(store: Store, endpoint: Endpoint) -> AsyncIterator[tuple[Finding, int]]:
    """Yield what is found of a member that has just answered a linearizable read."""
    status = await store.status()

    def found(level: Level, message: str) -> tuple[Finding, int]:
        return Finding(level, "etcd", f"{endpoint}: {message}"), status.cluster

    yield found(Level.OK, f"etcd {status.version} answers, with a leader and a majority")
    if status.version in MAY_LOSE_DATA:
        yield found(Level.PROBLEM, f"etcd {status.version} may lose data (etcd issue 13766)")
    elif _release(status.version) < _OLDEST:
        yield found(Level.PROBLEM, f"etcd {status.version} is too old; 3.4 is the oldest")
    for problem in status.problems:
        yield found(Level.PROBLEM, f"it says: {problem}")
    before = trio.current_time()
    with suppress(StorePermissionError):  # it was answered all the same
        await store.range(b"\0", limit=1, keys_only=True)
    took_s = trio.current_time() - before
    yield found(Level.NOTE if took_s > SLOW_S else Level.OK, f"a read takes {took_s * 1000:.1f} ms")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


async def _check_own_certificates(options: MountOptions) -> AsyncIterator[Finding]:
    if not any(endpoint.secure for endpoint in options.endpoints):
        return
    try:
        for name, ends in (await own_expiries(options.security, options.timeout_s)).items():
            yield _check_expiry(name, ends)
    except StoreError as exc:
        yield Finding(Level.PROBLEM, "certificate", str(exc))


def _check_expiry(name: str, ends: float) -> Finding:
    """Say how long a certificate is still good for."""
    left_s = ends - time.time()
    level = Level.PROBLEM if left_s < EXPIRY_S else Level.OK
    day = time.strftime("%Y-%m-%d", time.gmtime(ends))
    return Finding(level, "certificate", f"{name} ends on {day}, in {left_s / 86_400:.0f} days")


# --- the prefix -----------------------------------------------------------------------------


async def _check_prefix(
    store: Store, options: MountOptions, *, fix: bool
) -> AsyncIterator[Finding]:
    keyspace = Keyspace(options.prefix)
    shown = printable(options.prefix.decode(errors="backslashreplace")) or "(all keys)"
    try:
        keys, sizes = await _read(store, keyspace.start, keyspace.end)
    except StoreError as exc:
        yield Finding(Level.PROBLEM, "prefix", f"{shown} cannot be read: {exc}")
        return
    if not options.read_only:
        yield await _check_writing(store, keyspace, shown)
    own = {key: entry for key, entry in keys.items() if not is_record_key(key)}
    size = sum(sizes[key] for key in own)
    yield Finding(Level.OK, "keys", f"{len(own)} keys below {shown}, {size} bytes")
    for finding in _check_sizes({key: sizes[key] for key in own}, options.max_file_size):
        yield finding
    async for finding in _check_records(store, keyspace, own, options, fix=fix):
        yield finding
    for count, example, what in _odd(keyspace, own):
        if count:
            yield Finding(Level.NOTE, "keys", f"{count} {what}, such as {example!r}")


async def _read(
    store: Store, start: bytes, end: bytes
) -> tuple[dict[bytes, KeyValue], dict[bytes, int]]:
    """Return all keys of a range, without their values, and how many bytes each value has."""
    found: dict[bytes, KeyValue] = {}
    sizes: dict[bytes, int] = {}
    pages = Pages(store, start, end, Paging(PAGE))
    with trio.fail_after(SCAN_TIMEOUT_S):
        while (page := await pages.next()) is not None:
            found.update((entry.key, entry._replace(value=b"")) for entry in page.entries)
            sizes.update((entry.key, len(entry.value)) for entry in page.entries)
    return found, sizes


def _check_sizes(sizes: Mapping[bytes, int], largest_file: int) -> Iterator[Finding]:
    """Say what cannot be written through a mount, and what will soon be so large."""
    for limit, level, what in (
        (largest_file, Level.PROBLEM, "values are larger than --max-file-size"),
        (NEAR * largest_file, Level.NOTE, "values are nearly as large as --max-file-size"),
    ):
        large = {key: size for key, size in sizes.items() if size > limit}
        if large:
            largest = max(large, key=large.__getitem__)
            yield Finding(
                level, "keys", f"{len(large)} {what}, such as {largest!r} ({large[largest]} bytes)"
            )
            return


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
        records, _ = await _read(store, *record_range(keyspace.prefix))
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
