"""Waiting until the mirror shows what etcd holds now (`--consistency linearizable`).

Knows: how to learn etcd's revision for many callers at once, and what shows that the mirror is no
older. Does not know: who asks, the kernel.

etcd counts one revision for all its keys, and the watch brings those of one prefix: the mirror
may have all there is and never reach the revision etcd names. A progress notice cannot decide it
(see `etcdfs.mirror.watch_session`). So when the mirror is behind, what was asked for is looked at in etcd as
well, keys only; the mirror is new enough when it shows the same, or something newer. The same goes
for the attributes: where record keys come by a watch of their own, the revision of the mirror says
nothing of them, and they are looked at each time.

Concurrency: trio thread; any number of callers. Callers that come while one asks share the next
answer: it was asked for after all of them came.
"""

from contextlib import suppress
from typing import Final, Protocol, final

import trio

from etcdfs.consistency.audit import Following
from etcdfs.errors import CallerError, StorePermissionError, StoreTimeoutError
from etcdfs.keyspace.attribute_records import is_record_key, record_key, record_range
from etcdfs.keyspace.keys import VALUE_NAME
from etcdfs.keyspace.paging import Pages, Paging
from etcdfs.keyspace.store import Get, Store, Transaction, range_end
from etcdfs.tree.inodes import Directory, File, Node
from etcdfs.tree.node_attributes import find_key_state, is_foreign
from etcdfs.tree.tree import Tree

PAGE: Final = 1000
SLICE: Final = 200
"""Keys looked up at a time; below a millisecond."""


class Advancing(Following, Protocol):
    """The mirror, as the barrier needs it."""

    async def advanced(self) -> None:
        """Return when readers see a newer revision."""
        ...

    def refuse_records(self, refusal: StorePermissionError) -> None:
        """Go on without record keys, which etcd's roles do not let us read; else raise."""
        ...


@final
class ReadBarrier:
    """Holds readers back until the mirror is no older than etcd was when they came."""

    def __init__(self, store: Store, tree: Tree, mirror: Advancing, *, timeout_s: float) -> None:
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

    async def revalidate_name(self, directory: Directory, name: bytes) -> None:
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

    async def revalidate_directory(self, directory: Directory) -> None:
        """Return when the mirror shows in a directory what etcd held when this was called.

        Raises:
            StoreTimeoutError: That took longer than `--timeout`.
            StoreError: etcd cannot be asked.
        """
        await self._pass(directory, None)

    async def _pass(self, directory: Directory, name: bytes | None) -> None:
        with trio.move_on_after(self._timeout_s):
            revision = await self._current_revision()
            wanted = await self._wanted(directory, name, revision)
            while wanted := await self._unseen(wanted, revision):
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

    async def _wanted(
        self, directory: Directory, name: bytes | None, revision: int
    ) -> dict[bytes, int]:
        """Return what the mirror has to show before the caller may look."""
        is_behind = self._mirror.revision < revision
        self.waits += is_behind
        # checkpoint: the watch may have brought it; what etcd says now is newer still
        wanted = await self._ask(directory, name) if is_behind else {}
        has_records = self._tree.attributes and self._tree.rights.readable
        if has_records and (is_behind or not self._tree.keyspace.holds_records):
            try:
                wanted |= await self._ask_records(directory, name)
            except StorePermissionError as exc:
                self._mirror.refuse_records(exc)
        return wanted

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
        found |= await self._ask_range(prefix or tree.keyspace.start, range_end(prefix))
        return dict.fromkeys(self._known_below(directory, prefix), 0) | found

    async def _ask_range(self, start: bytes, end: bytes) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        paging = Paging(PAGE, first_keys=PAGE)
        pages = Pages(self._store, start, end, paging, keys_only=True)
        while (page := await pages.next()) is not None:
            found.update((entry.key, entry.mod_revision) for entry in page.entries)
        return found

    async def _ask_records(self, directory: Directory, name: bytes | None) -> dict[bytes, int]:
        """Return the record keys of what was asked for, likewise.

        Raises:
            StorePermissionError: etcd's roles do not let us have them.
        """
        tree = self._tree
        if not tree.is_attached(directory):
            return {}
        if name is None:
            return await self._ask_records_below(directory)
        names = tree.names(directory, name)
        keys: list[bytes] = []
        for key_of in (tree.keyspace.file_key, tree.keyspace.directory_prefix):
            with suppress(CallerError):
                keys.append(record_key(key_of(names)))
        if not keys:
            return {}
        gets = tuple(Get(key, keys_only=True) for key in keys)
        committed = await self._store.commit(Transaction((), gets))
        return dict.fromkeys(keys, 0) | {e.key: e.mod_revision for e in committed.entries}

    async def _ask_records_below(self, directory: Directory) -> dict[bytes, int]:
        tree = self._tree
        names = tree.names(directory)
        wanted = await self._ask_records(directory, VALUE_NAME) if names else {}
        wanted |= dict.fromkeys(map(record_key, await self._records_below(names)), 0)
        return wanted | await self._ask_range(*record_range(tree.keyspace.scan_prefix(names)))

    async def _records_below(self, names: tuple[bytes, ...]) -> list[bytes]:
        """Return the keys below a directory of which the mirror has record keys."""
        prefix = self._tree.keyspace.scan_prefix(names)
        found: list[bytes] = []
        keys = list(self._tree.stored_records)
        for first in range(0, len(keys), PAGE):
            found += [key for key in keys[first : first + PAGE] if key.startswith(prefix)]
            await trio.lowlevel.checkpoint()
        return found

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
        for get in gets:
            entries = committed[get].entries
            wanted.update((entry.key, entry.mod_revision) for entry in entries)
            if not entries and get.end is None:
                wanted[get.key] = 0
            elif not entries and isinstance(child, Directory):
                wanted.update(dict.fromkeys(self._known_below(child, get.key), 0))
        return wanted

    def _known_below(self, directory: Directory, prefix: bytes) -> list[bytes]:
        # A directory's `%value` has a key that is not below it.
        return [key for key, _ in self._tree.key_state(directory) if key.startswith(prefix)]

    async def _unseen(self, wanted: dict[bytes, int], reached: int) -> dict[bytes, int]:
        """Return those keys of which the mirror still shows an older state."""
        unseen: dict[bytes, int] = {}
        for index, (key, revision) in enumerate(wanted.items(), 1):
            if self._is_there(key, reached):
                continue
            found = find_key_state(self._tree, key)
            shown = 0 if found is None else found[1].mod_revision
            if shown < revision or (shown and not revision):
                unseen[key] = revision
            if index % SLICE == 0:
                await trio.lowlevel.checkpoint()
        return unseen

    def _is_there(self, key: bytes, revision: int) -> bool:
        """Say whether the mirror has all there was of a key at a revision, by its own revision."""
        if not is_record_key(key):
            return self._mirror.revision >= revision
        if is_foreign(self._tree, key):
            return True
        return self._tree.keyspace.holds_records and self._mirror.revision >= revision
