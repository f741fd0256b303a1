"""Reading from etcd: the value of one version of a key, and several answers of one moment.

What this room knows: how to get a value again that memory has let go of, and how to ask a full
etcd. What it must not know: who reads it.

Concurrency: trio thread.
"""

from collections.abc import Sequence

from etcdfs.contents import Contents
from etcdfs.errors import CompactedError, StaleError, StoreError, StoreFullError
from etcdfs.store import Committed, Get, Page, Revision, Store, Transaction
from etcdfs.tree import File, Tree


async def value_of(store: Store, contents: Contents, tree: Tree, file: File) -> bytes:
    """Return the value of the version that `file` is, from memory or at its own revision.

    Raises:
        StaleError: The version is not the newest, and no longer in etcd's history, or etcd cannot
            be asked: the kernel looks the path up again, and finds a newer one.
        StoreError: etcd cannot be asked for the newest.
    """
    if file.value is not None:
        return file.value
    # Of what is deleted, history has the value for a while.
    key, facts = tree.key_of(file) or file.lost_key, file.facts
    if facts is None:
        return b""
    if key is None or not facts.mod_revision:
        msg = f"inode {file.inode} was deleted and its value not kept"
        raise StaleError(msg)
    kept = contents.get(key, facts.mod_revision)
    if kept is not None:
        return kept
    try:
        page = await _version(store, key, facts.mod_revision)
    except StoreError as exc:
        if file.directory is not None:
            raise
        msg = f"revision {facts.mod_revision} of {key!r} is old, and etcd does not tell it: {exc}"
        raise StaleError(msg) from exc
    if not page.entries or page.entries[0].mod_revision != facts.mod_revision:
        msg = f"revision {facts.mod_revision} of {key!r} has been compacted away"
        raise StaleError(msg)
    contents.put(key, facts.mod_revision, page.entries[0].value)
    return page.entries[0].value


async def _version(store: Store, key: bytes, revision: Revision) -> Page:
    try:
        return await store.range(key, revision=revision)
    except CompactedError:
        # A compaction takes old versions, never the newest one of a key that is there.
        return await store.range(key)


async def read_together(store: Store, gets: Sequence[Get]) -> Committed:
    """Return what several reads find at one revision, as one transaction does.

    When its quota is used up, etcd 3.4 refuses every transaction, even one that only reads
    (server/storage/quota.go, Available; 3.5 lets it through), but never a range.
    """
    try:
        return await store.commit(Transaction((), tuple(gets)))
    except StoreFullError:
        pages: list[Page] = []
        for get in gets:
            revision = pages[0].revision if pages else 0
            pages.append(
                await store.range(
                    get.key,
                    get.end,
                    limit=get.limit,
                    revision=revision,
                    keys_only=get.keys_only,
                )
            )
        return Committed(True, pages[0].revision, tuple(pages))
