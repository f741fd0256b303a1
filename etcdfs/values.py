"""Fetching the value of one version of a key.

What this room knows: how to get a value again that memory has let go of. What it must not know:
who reads it.

Concurrency: trio thread.
"""

from etcdfs.contents import Contents
from etcdfs.errors import CompactedError, StaleError
from etcdfs.store import Store
from etcdfs.tree import File, Tree


async def value_of(store: Store, contents: Contents, tree: Tree, file: File) -> bytes:
    """Return the value of the version that `file` is, from memory or at its own revision.

    Raises:
        StaleError: The version is no longer in etcd's history, nor the newest.
        StoreError: etcd cannot be asked.
    """
    if file.value is not None:
        return file.value
    key, facts = tree.key_of(file), file.facts
    if facts is None:
        return b""
    if key is None:
        msg = f"inode {file.inode} was deleted and its value not kept"
        raise StaleError(msg)
    kept = contents.get(key, facts.mod_revision)
    if kept is not None:
        return kept
    try:
        page = await store.range(key, revision=facts.mod_revision)
    except CompactedError:
        # A compaction takes old versions, never the newest one of a key that is there.
        page = await store.range(key)
    if not page.entries or page.entries[0].mod_revision != facts.mod_revision:
        msg = f"revision {facts.mod_revision} of {key!r} has been compacted away"
        raise StaleError(msg)
    contents.put(key, facts.mod_revision, page.entries[0].value)
    return page.entries[0].value
