"""Waiting until the mirror shows what etcd holds now (`--consistency linearizable`).

What this room knows: how to learn etcd's revision for many callers at once, and what shows that
the mirror is no older. What it must not know: who asks, the kernel.

etcd counts one revision for all its keys, and the watch brings those of one prefix: the mirror
may have all there is and never reach the revision etcd names. A progress notice cannot decide it
(see `etcdfs.watching`). So when the mirror is behind, what was asked for is looked at in etcd as
well, keys only; the mirror is new enough when it shows the same, or something newer.

Concurrency: trio thread; any number of callers. Callers that come while one asks share the next
answer: it was asked for after all of them came.
"""

from contextlib import suppress
from typing import Final, Protocol, final

import trio

from etcdfs.answers import page_of
from etcdfs.audit import Audited
from etcdfs.errors import CallerError, StoreTimeoutError
from etcdfs.keys import VALUE_NAME
from etcdfs.store import Get, Store, Transaction, range_end
from etcdfs.tree import Directory, File, Node, Tree

PAGE: Final = 1000
SLICE: Final = 200
"""Keys looked up at a time; below a millisecond."""


class Following(Audited, Protocol):
    """The mirror, as the barrier needs it."""

    async def advanced(self) -> None:
        """Return when readers see a newer revision."""
        ...


@final
class Barrier:
    """Holds readers back until the mirror is no older than etcd was when they came."""

    def __init__(self, store: Store, tree: Tree, mirror: Following, *, timeout_s: float) -> None:
        # --- dependencies
        self._store = store
        self._tree = tree
        self._mirror = mirror
        # --- constants
        self._timeout_s = timeout_s
        # --- mutable state
        self._asking = trio.Lock()
        self._asked = 0  # questions so far
        self._answered = 0  # the last one that was answered
        self._revision = 0  # with this
        self.waits = 0

    async def entry(self, directory: Directory, name: bytes) -> None:
        """Return when the mirror shows under a name what etcd held when this was called.

        Raises:
            StoreTimeoutError: That took longer than `--timeout`.
            StoreError: etcd cannot be asked.
        """
        await self._pass(directory, name)

    async def file(self, file: File) -> None:
        """Return when the mirror shows at a file's path what etcd held when this was called.

        Raises:
            StoreTimeoutError: That took longer than `--timeout`.
            StoreError: etcd cannot be asked.
        """
        if file.directory is not None:
            await self._pass(file.directory, file.name)

    async def listing(self, directory: Directory) -> None:
        """Return when the mirror shows in a directory what etcd held when this was called.

        Raises:
            StoreTimeoutError: That took longer than `--timeout`.
            StoreError: etcd cannot be asked.
        """
        await self._pass(directory, None)

    async def _pass(self, directory: Directory, name: bytes | None) -> None:
        with trio.move_on_after(self._timeout_s):
            revision = await self._current_revision()
            if self._mirror.revision >= revision:
                return
            self.waits += 1
            # checkpoint: the watch may have brought it; what etcd says now is newer still
            wanted = await self._ask(directory, name)
            while self._mirror.revision < revision:
                wanted = await self._unseen(wanted)
                if not wanted:
                    return
                await self._mirror.advanced()
            return
        raise StoreTimeoutError(f"etcd's revision was not reached within {self._timeout_s:g} s")

    async def _current_revision(self) -> int:
        """Return a revision that etcd was at after this was called."""
        before = self._asked
        async with self._asking:
            if self._answered <= before:
                self._asked += 1
                question = self._asked
                key = self._tree.keyspace.start
                page = await self._store.range(key, limit=1, keys_only=True)
                self._answered, self._revision = question, page.revision
            return self._revision

    # --- what was asked for -----------------------------------------------------------------

    async def _ask(self, directory: Directory, name: bytes | None) -> dict[bytes, int]:
        """Return the keys that decide what was asked, and their newest mod_revision; 0: absent."""
        tree = self._tree
        if not tree.is_attached(directory):
            return {}
        if name is not None:
            return await self._ask_name(tree.names(directory, name), directory.children.get(name))
        names = tree.names(directory)
        prefix = tree.keyspace.scan_prefix(names)
        found = await self._ask_name((*names, VALUE_NAME), None) if names else {}
        start, end = prefix or tree.keyspace.start, range_end(prefix)
        revision, more = 0, True
        while more:
            page = await self._store.range(
                start, end, limit=PAGE, revision=revision, keys_only=True
            )
            found.update((entry.key, entry.mod_revision) for entry in page.entries)
            revision = page.revision
            more = page.more
            start = page.entries[-1].key + b"\0" if page.entries else start
        return dict.fromkeys(self._known_below(directory, prefix), 0) | found

    async def _ask_name(self, names: tuple[bytes, ...], child: Node | None) -> dict[bytes, int]:
        keyspace = self._tree.keyspace
        gets: list[Get] = []
        with suppress(CallerError):
            gets.append(Get(keyspace.file_key(names), keys_only=True))
        with suppress(CallerError):
            below = keyspace.directory_prefix(names)
            gets.append(Get(below, range_end(below), limit=1, keys_only=True))
        if not gets:
            return {}
        committed = await self._store.commit(Transaction((), tuple(gets)))
        wanted: dict[bytes, int] = {}
        for get, result in zip(gets, committed.results, strict=True):
            entries = page_of(result).entries
            wanted.update((entry.key, entry.mod_revision) for entry in entries)
            if not entries and get.end is None:
                wanted[get.key] = 0
            elif not entries and isinstance(child, Directory):
                wanted.update(dict.fromkeys(self._known_below(child, get.key), 0))
        return wanted

    def _known_below(self, directory: Directory, prefix: bytes) -> list[bytes]:
        # A directory's `%value` has a key that is not below it.
        return [key for key, _ in self._tree.facts(directory) if key.startswith(prefix)]

    async def _unseen(self, wanted: dict[bytes, int]) -> dict[bytes, int]:
        """Return those keys of which the mirror still shows an older state."""
        unseen: dict[bytes, int] = {}
        for index, (key, revision) in enumerate(wanted.items(), 1):
            found = self._tree.find(key)
            shown = 0 if found is None else found[1].mod_revision
            if shown < revision or (shown and not revision):
                unseen[key] = revision
            if index % SLICE == 0:
                await trio.lowlevel.checkpoint()
        return unseen
