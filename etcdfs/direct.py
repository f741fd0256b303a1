"""The view without a mirror: every question goes to etcd (`--no-cache`).

What this room knows: which ranges answer "what is under this name" and "what is in this
directory", without reading what lies deeper. What it must not know: system calls, the kernel.

The tree holds only what the kernel refers to; each call first makes the part it needs true.
This is the slow, strict reference that the mirror is compared with.

Concurrency: trio thread. An answer is applied in one step; of two answers about one key the one
with the higher mod_revision stays.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Final, final

from etcdfs.contents import Contents
from etcdfs.errors import CallerError, CompactedError
from etcdfs.keys import MARKER_NAME, VALUE_NAME, Keyspace, is_part
from etcdfs.store import Event, Get, KeyValue, Page, Store, Transaction, range_end
from etcdfs.switch import Switch
from etcdfs.tree import Cached, Directory, Entry, File, Node, Tree, facts_of
from etcdfs.values import value_of

FIRST_LIMIT: Final = 64
MAX_LIMIT: Final = 4096
VALUES_LIMIT: Final = 256
"""Values fetched at a time: a page of the largest values etcd takes stays below 400 MiB."""
MAX_LISTINGS: Final = 3
"""Listings begun anew because their revision was compacted away, before giving up."""


@final
class Direct:
    """Answers from etcd, one linearizable read per question."""

    def __init__(self, store: Store, contents: Contents, tree: Tree) -> None:
        # --- dependencies
        self._store = store
        self._contents = contents
        self.switch = Switch(tree)

    def check(self) -> None:
        """See `View.check`: what is held is what an open file was when it was opened."""

    async def entry(self, directory: Directory, name: bytes) -> None:
        """See `View.entry`: one request."""
        tree = self.switch.tree
        if not tree.is_attached(directory):
            return
        if is_part(name):
            await self.listing(directory)  # part of a long name: only a scan can tell
            return
        names = tree.names(directory, name)
        gets = _gets(tree.keyspace, names)
        if not gets:
            return
        committed = await self._store.commit(Transaction((), tuple(gets)))
        value: KeyValue | None = None
        below = False
        for get, result in zip(gets, committed.results, strict=True):
            assert isinstance(result, Page), "the store answers a Get with a Page"
            if get.keys_only:
                below = bool(result.entries)
            elif result.entries:
                value = result.entries[0]
        if name == MARKER_NAME and value is not None and not value.value:
            value = None
        # checkpoint: the directory may have gone
        if tree.is_attached(directory):
            self._observe(directory, name, value, is_directory=below)

    async def listing(self, directory: Directory) -> None:
        """See `View.listing`: as many requests as the level has entries, whatever is below."""
        tree = self.switch.tree
        if not tree.is_attached(directory):
            return
        scan = await self._read_level(directory, MAX_LISTINGS)
        # checkpoint: the directory may have gone
        if not tree.is_attached(directory):
            return
        for name in [n for n in directory.children if n not in scan.found]:
            self._observe(directory, name, None, is_directory=False)
        for name, value in scan.found.items():
            if value is None or name not in scan.kept:
                self._observe(directory, name, value, is_directory=value is None)

    async def refresh(self, node: Node) -> None:
        """See `View.refresh`."""
        if node.directory is not None:
            await self.entry(node.directory, node.name)

    async def value(self, file: File) -> bytes:
        """See `View.value`."""
        return await value_of(self._store, self._contents, self.switch.tree, file)

    async def settle(
        self, revision: int, events: Sequence[Event], locked: Sequence[Entry] = ()
    ) -> None:
        """See `View.settle`: nothing to wait for."""
        self.switch.apply_ahead(events, remember=False)

    def holding(self, locked: Sequence[Entry]) -> AbstractContextManager[None]:
        """See `View.holding`: nobody waits for the kernel."""
        return nullcontext()

    async def reached(self, revision: int) -> None:
        """See `View.reached`: each call asks etcd anyway."""

    async def let_go_first(self, stale: Collection[Cached]) -> None:
        """See `View.let_go_first`: the kernel was told to cache nothing."""

    def let_go(self, stale: Collection[Cached]) -> None:
        """See `View.let_go`: the kernel was told to cache nothing."""

    # --- reading one level ------------------------------------------------------------------

    async def _read_level(self, directory: Directory, attempts: int) -> "_Scan":
        try:
            scan = await self._scan(self.switch.tree.names(directory))
            await self._fetch(scan, directory)
        except CompactedError:
            if attempts == 1:
                raise
            return await self._read_level(directory, attempts - 1)
        return scan

    async def _scan(self, names: tuple[bytes, ...]) -> "_Scan":
        """List a level by keys only, jumping over every subdirectory after its first key."""
        keyspace = self.switch.tree.keyspace
        scan = _Scan(keyspace, names)
        prefix = keyspace.scan_prefix(names)
        start, end = prefix or keyspace.start, range_end(prefix)
        limit = FIRST_LIMIT
        more = True
        while more:
            page = await self._store.range(
                start, end, limit=limit, revision=scan.revision, keys_only=True
            )
            scan.revision = page.revision
            used = scan.take(page)
            more = page.more and (scan.next_start < end or end == b"\0")
            start = scan.next_start
            # Pages grow while all of them is of use and shrink when most of one was jumped over.
            limit = min(limit * 4, MAX_LIMIT) if 2 * used > limit else max(limit // 4, 4)
        return scan

    async def _fetch(self, scan: "_Scan", directory: Directory) -> None:
        """Get the values, for their sizes, of files whose version is not known yet."""
        own = _own_value(self.switch.tree.keyspace, scan.names)
        if own is not None:
            page = await self._store.range(own, revision=scan.revision)
            if page.entries:
                scan.found[VALUE_NAME] = page.entries[0]
        for run in scan.runs:
            if all(self._is_known(directory, name, entry) for name, entry in run):
                scan.kept.update(name for name, _ in run)
                continue
            start, last = run[0][1].key, run[-1][1].key
            more = True
            while more:
                page = await self._store.range(
                    start, last + b"\0", limit=VALUES_LIMIT, revision=scan.revision
                )
                for entry in page.entries:
                    scan.keep(entry)
                    self._contents.put(entry.key, entry.mod_revision, entry.value)
                more = page.more
                start = page.entries[-1].key + b"\0" if page.entries else last
        if scan.marker is not None:
            page = await self._store.range(scan.marker, revision=scan.revision)
            if page.entries and page.entries[0].value:
                scan.found[MARKER_NAME] = page.entries[0]

    def _is_known(self, directory: Directory, name: bytes, entry: KeyValue) -> bool:
        child = directory.children.get(name)
        return (
            isinstance(child, File)
            and child.facts is not None
            and child.facts.mod_revision == entry.mod_revision
        )

    # --- applying ---------------------------------------------------------------------------

    def _observe(
        self, directory: Directory, name: bytes, value: KeyValue | None, *, is_directory: bool
    ) -> None:
        """Make the tree say what etcd said of one name."""
        child = directory.children.get(name)
        if is_directory:
            if not isinstance(child, Directory):
                self._replace(directory, name, self.switch.tree.new_directory())
        elif value is None:
            if child is not None and not _is_unpublished(child):
                self._replace(directory, name, None)
        else:
            self._contents.put(value.key, value.mod_revision, value.value)
            self._observe_file(directory, name, value)

    def _observe_file(self, directory: Directory, name: bytes, value: KeyValue) -> None:
        child = directory.children.get(name)
        old = child if isinstance(child, File) else None
        facts = facts_of(value)
        if old is not None:
            known = old.facts.mod_revision if old.facts is not None else 0
            intent = self.switch.intents.get(value.key)
            if intent is not None and intent.file is old and intent.value == value.value:
                old.facts = facts
                return
            if known >= value.mod_revision:
                return
        self._replace(directory, name, self.switch.tree.new_version(old, facts), over=value)

    def _replace(
        self, directory: Directory, name: bytes, node: Node | None, over: KeyValue | None = None
    ) -> None:
        old = directory.children.get(name)
        if old is not None:
            known = old.facts if isinstance(old, File) else None
            # Nothing there, or the key made anew: the old file is deleted. Else: superseded.
            # Below a key that became a directory, it goes on as the directory's `%value`.
            gone = (over is None and not isinstance(node, Directory)) or (
                over is not None
                and known is not None
                and known.create_revision != over.create_revision
            )
            if isinstance(old, Directory):
                self._empty(old)
            self.switch.tree.detach(directory, name, gone=gone)
        if node is not None:
            self.switch.tree.attach(directory, name, node)

    def _empty(self, directory: Directory) -> None:
        """Detach all below a directory that etcd has no more: its files' keys are gone.

        While it is still attached: a file's key is made from the path it has.
        """
        for name, child in list(directory.children.items()):
            if isinstance(child, Directory):
                self._empty(child)
            self.switch.tree.detach(directory, name, gone=not _is_unpublished(child))


def _is_unpublished(node: Node) -> bool:
    """Say whether a node is, or has below it, a file made here that is not yet in etcd."""
    if isinstance(node, File):
        return node.facts is None
    return any(_is_unpublished(child) for child in node.children.values())


@dataclass(slots=True)
class _Scan:
    """One level, as it is found page by page."""

    keyspace: Keyspace
    names: tuple[bytes, ...]
    revision: int = 0
    next_start: bytes = b""
    marker: bytes | None = None
    found: dict[bytes, KeyValue | None] = field(default_factory=dict)
    kept: set[bytes] = field(default_factory=set)
    runs: list[list[tuple[bytes, KeyValue]]] = field(default_factory=list)

    def take(self, page: Page) -> int:
        """Sort a page's keys into entries; return how many were not jumped over."""
        used = 0
        unbroken = bool(self.runs)
        for entry in page.entries:
            if entry.key < self.next_start:
                continue
            used += 1
            self.next_start = entry.key + b"\0"
            unbroken = self._sort(entry, unbroken=unbroken)
        return used

    def keep(self, entry: KeyValue) -> None:
        """Take over a file's value."""
        names, _ = self.keyspace.locate(entry.key)
        if self.found.get(names[-1]) is not None:
            self.found[names[-1]] = entry

    def _sort(self, entry: KeyValue, *, unbroken: bool) -> bool:
        names, is_marker = self.keyspace.locate(entry.key)
        depth = len(self.names)
        if names[:depth] != self.names:
            return False  # a neighbour of a long name that begins alike
        if is_marker and len(names) == depth:
            self.marker = entry.key
            return False
        name = names[depth]
        if is_marker or len(names) > depth + 1:
            self.found[name] = None
            if not is_part(name):
                below = self.keyspace.directory_prefix((*self.names, name))
                self.next_start = range_end(below)
            return False
        if name in self.found:
            return False
        self.found[name] = entry
        if not unbroken:
            self.runs.append([])
        self.runs[-1].append((name, entry))
        return True


def _gets(keyspace: Keyspace, names: tuple[bytes, ...]) -> list[Get]:
    """Return what to read to know what is at a path; empty if nothing can be there."""
    gets: list[Get] = []
    with suppress(CallerError):
        gets.append(Get(keyspace.file_key(names)))
    try:
        prefix = keyspace.directory_prefix(names)
    except CallerError:
        return gets
    gets.append(Get(prefix, range_end(prefix), limit=1, keys_only=True))
    return gets


def _own_value(keyspace: Keyspace, names: tuple[bytes, ...]) -> bytes | None:
    if not names:
        return None
    try:
        return keyspace.file_key((*names, VALUE_NAME))
    except CallerError:
        return None
