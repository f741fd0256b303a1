"""The view without a mirror: every question goes to etcd (`--no-cache`).

Knows: which ranges answer "what is under this name" and "what is in this directory", without
reading what lies deeper. Does not know: system calls, the kernel.

The tree holds only what the kernel refers to; each call first makes the part it needs true.
This is the slow, strict reference that the mirror is compared with.

Concurrency: trio thread. An answer is applied in one step; of two answers about one key the one
with the higher mod_revision stays.
"""

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import trio

from etcdfs.errors import CallerError, CompactedError, StoreError, StorePermissionError
from etcdfs.keyspace.attribute_records import RECHECK_S, record_key, record_range
from etcdfs.keyspace.keys import MARKER_NAME, VALUE_NAME, Keyspace, is_part
from etcdfs.keyspace.paging import Pages, Paging, check_nearer
from etcdfs.keyspace.store import Event, KeyValue, Store, range_end
from etcdfs.tree.inodes import (
    Cached,
    Dentry,
    Directory,
    File,
    Node,
    is_local,
    key_state_of,
    type_of,
)
from etcdfs.tree.node_attributes import (
    bind,
    holds,
    key_state_of_node,
    stored_record_of,
)
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import Update
from etcdfs.tree.value_cache import ValueCache, read_together, value_of
from etcdfs.uncached.directory_scan import Level
from etcdfs.uncached.path_query import Found, Question, answers_to, is_below, questions_about

FIRST_LIMIT: Final = 64
MAX_LIMIT: Final = 4096
VALUES_LIMIT: Final = 256
"""Values fetched at a time, at most."""
MAX_LISTINGS: Final = 3
"""Listings begun anew because their revision was compacted away, before giving up."""
ROOT_PATIENCE_S: Final = 0.1
"""How long etcd is waited for with the root's attributes when it has not said them last time."""


@final
class Uncached:
    """Answers from etcd, one linearizable read per question."""

    def __init__(self, store: Store, value_cache: ValueCache, tree: Tree) -> None:
        # --- dependencies
        self._store = store
        self._value_cache = value_cache
        self.update = Update(tree)
        # --- mutable state
        self._records_refused_until = 0.0
        self._root_patience_s = math.inf

    def check(self) -> None:
        """See `View.check`: what is held is what an open file was when it was opened."""

    async def revalidate_name(self, directory: Directory, name: bytes) -> None:
        """See `View.revalidate_name`: one request."""
        tree = self.update.tree
        if not tree.is_attached(directory):
            await self._look_for(directory)
        if not tree.is_attached(directory):
            return
        if is_part(name):
            # Part of a long name: only a scan can tell. It is about nothing else: other names may
            # be made meanwhile, as for this one the kernel may ask without the directory's lock.
            await self._list(directory, only=name)
            return
        names = tree.names(directory, name)
        known = directory.children.get(name)
        found = await self._ask(names, known.evidence_key if isinstance(known, Directory) else None)
        # checkpoint: the directory may have gone, or have been moved by this mount
        if found is None or not tree.is_attached(directory):
            return
        if tree.names(directory, name) != names:
            await self.revalidate_name(directory, name)
            return
        value = found.value
        if name == MARKER_NAME and value is not None and not value.value:
            value = None
        self._observe(directory, name, value, found.revision, is_directory=found.below)
        self._note_evidence(directory, name, found.evidence_key)
        if name != MARKER_NAME:  # the marker's attributes are its directory's
            stored_record = found.directory_record if found.below else found.file_record
            answer = _Answer(
                stored_record, found.marker, found.revision, has_record=found.has_records
            )
            self._bind(directory, name, answer)

    async def _ask(
        self, names: tuple[bytes, ...], evidence_key: bytes | None = None
    ) -> Found | None:
        """Ask what is at a path; None if nothing can be. First ask for the key that was there, if any."""
        tree = self.update.tree
        if evidence_key is not None and is_below(evidence_key, tree.keyspace, names):
            found = await self._ask_for(names, evidence_key)
            if found is None or found.below:
                return found
        return await self._ask_for(names, None)

    async def _ask_for(self, names: tuple[bytes, ...], evidence_key: bytes | None) -> Found | None:
        tree = self.update.tree
        ask = partial(questions_about, tree.keyspace, names, evidence_key=evidence_key)
        stored_records = self._may_ask_for_records()
        if not ask(stored_records=stored_records):
            return None
        try:
            found = await self._answers(
                ask(stored_records=stored_records), stored_records=stored_records
            )
        except StorePermissionError as exc:
            if not stored_records:
                raise
            found = await self._answers(ask(stored_records=False), stored_records=False)
            self._refuse_records(exc)
            return found
        if stored_records:
            self._allow_records()
        elif tree.attributes and tree.rights.readable:
            return await self._ask_for(
                names, evidence_key
            )  # else it would be shown without a doubt
        return found

    async def _answers(self, questions: list[Question], *, stored_records: bool) -> Found:
        gets = [get for _, get in questions]
        return answers_to(
            questions, await read_together(self._store, gets), stored_records=stored_records
        )

    def _may_ask_for_records(self) -> bool:
        """Say whether to ask for record keys: always, but not again just after a refusal."""
        return self.update.tree.attributes and trio.current_time() >= self._records_refused_until

    def _allow_records(self) -> None:
        """Note that record keys could be read; unless others, asked for meanwhile, were refused.

        Until these are asked for again, nothing is known of what they keep from whom.
        """
        if self._may_ask_for_records():
            self.update.tree.rights.allow_reading()

    def _refuse_records(self, refusal: StorePermissionError) -> None:
        self.update.tree.rights.refuse_reading(refusal)
        self._records_refused_until = trio.current_time() + RECHECK_S

    async def revalidate_directory(self, directory: Directory) -> None:
        """See `View.revalidate_directory`: as many requests as the level has entries, whatever is below."""
        await self._list(directory)

    async def _list(self, directory: Directory, only: bytes | None = None) -> None:
        tree = self.update.tree
        if not tree.is_attached(directory):
            await self._look_for(directory)
        if not tree.is_attached(directory):
            return
        scan = await self._read_level(directory, MAX_LISTINGS)
        # checkpoint: the directory may have gone, or have been moved by this mount
        if not tree.is_attached(directory):
            return
        if tree.names(directory) != scan.names:
            await self._list(directory, only)
            return
        gone = [name for name in directory.children if name not in scan.found]
        for name in [*gone, *scan.found] if only is None else [only]:
            self._take(scan, directory, name)
        if only is None:
            directory.listed = scan.revision

    def _take(self, scan: Level, directory: Directory, name: bytes) -> None:
        """Make the tree say what a scan says of one name."""
        if name not in scan.found:
            self._observe(directory, name, None, scan.revision, is_directory=False)
            return
        value = scan.found[name]
        if value is None or name not in scan.kept:
            self._observe(directory, name, value, scan.revision, is_directory=value is None)
        self._note_evidence(directory, name, scan.evidence_keys.get(name))
        if name != MARKER_NAME:
            stored_record = scan.stored_records.get((name, value is None))
            marker = scan.markers.get(name)
            answer = _Answer(stored_record, marker, scan.revision, has_record=scan.has_records)
            self._bind(directory, name, answer)

    async def revalidate_node(self, node: Node) -> None:
        """See `View.revalidate_node`."""
        if node.directory is not None:
            await self.revalidate_name(node.directory, node.name)
        elif node is self.update.tree.root:
            await self._refresh_root(self.update.tree.root)
        else:
            await self._look_for(node)

    async def _look_for(self, node: Node) -> None:
        """Look whether what no name leads to is there again, or what has superseded it."""
        tree = self.update.tree
        if isinstance(node, File):
            if node.removed or node.lost_key is None:
                return
            names = tree.keyspace.locate(node.lost_key).names
            directory = tree.root
        else:
            missing: list[bytes] = []
            above: Directory | None = node
            while above is not None and not tree.is_attached(above):
                missing.append(above.name)
                above = above.was_in
            if above is None:
                return
            names, directory = tuple(reversed(missing)), above
        for name in (*names, VALUE_NAME) if isinstance(node, File) else names:
            await self.revalidate_name(directory, name)
            child = directory.children.get(name)
            if not isinstance(child, Directory):
                return
            directory = child

    async def _refresh_root(self, root: Directory) -> None:
        """Ask for the root's attributes; they stay as they were while etcd does not say.

        The kernel asks for them on the way to any path, so also to what does not need etcd: df(1)
        and the control directory. All the rest asks etcd itself, and fails.
        """
        if not self.update.tree.attributes or not self.update.tree.keyspace.prefix:
            return
        found = None
        with suppress(StoreError), trio.move_on_after(self._root_patience_s):
            found = await self._ask(())
        self._root_patience_s = ROOT_PATIENCE_S if found is None else math.inf
        if found is not None:
            stored_record, marker = found.directory_record, found.marker
            answer = _Answer(stored_record, marker, found.revision, has_record=found.has_records)
            self._dress_node(root, answer)

    async def value(self, file: File) -> bytes:
        """See `View.value`."""
        return await value_of(self._store, self._value_cache, self.update.tree, file)

    async def wait_until_visible(
        self, revision: int, events: Sequence[Event], locked: Sequence[Dentry] = ()
    ) -> None:
        """See `View.wait_until_visible`: nothing to wait for."""
        self.update.tree.revisions.learn(revision, self.update.tree.clock())
        self.update.apply_ahead(events, remember=False)

    def holding(self, locked: Sequence[Dentry]) -> AbstractContextManager[None]:
        """See `View.holding`: nobody waits for the kernel."""
        return nullcontext()

    async def reached(self, revision: int) -> None:
        """See `View.reached`: each call asks etcd anyway."""

    async def invalidate_first(self, stale: Collection[Cached]) -> None:
        """See `View.invalidate_first`: the kernel was told to cache nothing."""

    def invalidate(self, stale: Collection[Cached]) -> None:
        """See `View.invalidate`: the kernel was told to cache nothing."""

    # --- reading one level ------------------------------------------------------------------

    async def _read_level(self, directory: Directory, attempts: int) -> Level:
        try:
            scan = await self._scan(self.update.tree.names(directory))
            await self._fetch(scan, directory)
            await self._fetch_records(scan)
        except CompactedError:
            if attempts == 1:
                raise
            return await self._read_level(directory, attempts - 1)
        return scan

    async def _scan(self, names: tuple[bytes, ...]) -> Level:
        """List a level by keys only, jumping over every subdirectory after its first key."""
        keyspace = self.update.tree.keyspace
        prefix = keyspace.scan_prefix(names)
        scan = Level(keyspace, names, prefix or keyspace.start, range_end(prefix))
        limit = FIRST_LIMIT
        is_all = False
        left: tuple[bytes, int] | None = None  # keys that were left up to where
        while not is_all:
            stop = scan.stop
            page = await self._store.range(
                scan.next_start, stop, limit=limit, revision=scan.revision, keys_only=True
            )
            if left is not None and left[0] == stop:
                check_nearer(left[1], page)
            left = None if page.remaining is None else (stop, page.remaining)
            scan.revision = page.revision
            used = scan.take(page)
            is_all = scan.passed(page, stop, used)
            # Pages grow while all of them is of use and shrink when most of one was jumped over.
            if page.entries:
                limit = min(limit * 4, MAX_LIMIT) if 2 * used > limit else max(limit // 4, 4)
        return scan

    async def _fetch(self, scan: Level, directory: Directory) -> None:
        """Get the values, for their sizes, of files whose version is not known yet."""
        own = _own_value(self.update.tree.keyspace, scan.names)
        if own is not None:
            found = await self._store.range(own, revision=scan.revision)
            if found.entries:
                scan.found[VALUE_NAME] = found.entries[0]
        for run in scan.runs:
            if all(self._is_known(directory, name, entry) for name, entry in run):
                scan.kept.update(name for name, _ in run)
                continue
            pages = self._pages(run[0][1].key, run[-1][1].key + b"\0", scan.revision)
            while (page := await pages.next()) is not None:
                for entry in page.entries:
                    scan.keep(entry)
                    self._value_cache.put(entry.key, entry.mod_revision, entry.value)
        if scan.marker is not None:
            found = await self._store.range(scan.marker, revision=scan.revision)
            if found.entries and found.entries[0].value:
                scan.found[MARKER_NAME] = found.entries[0]

    async def _fetch_records(self, scan: Level) -> None:
        """Get the attributes of what was found: mostly one request, and nothing."""
        tree = self.update.tree
        if not scan.found or not self._may_ask_for_records():
            return
        start, end = record_range(tree.keyspace.scan_prefix(scan.names))
        pages = self._pages(start, end, scan.revision)
        try:
            while (page := await pages.next()) is not None:
                for entry in page.entries:
                    start = scan.take_record(entry) if entry.key >= start else start
                pages.skip_to(start)
            own = _own_value(tree.keyspace, scan.names)
            if own is not None and VALUE_NAME in scan.found:
                page = await self._store.range(record_key(own), revision=scan.revision)
                if page.entries:
                    scan.stored_records[VALUE_NAME, False] = page.entries[0]
        except StorePermissionError as exc:
            self._refuse_records(exc)
        else:
            scan.has_records = True
            self._allow_records()

    def _pages(self, start: bytes, end: bytes, revision: int) -> Pages:
        return Pages(self._store, start, end, Paging(VALUES_LIMIT), revision=revision)

    def _is_known(self, directory: Directory, name: bytes, entry: KeyValue) -> bool:
        child = directory.children.get(name)
        return (
            isinstance(child, File)
            and child.key_state is not None
            and child.key_state.mod_revision == entry.mod_revision
        )

    # --- applying ---------------------------------------------------------------------------

    def _observe(
        self,
        directory: Directory,
        name: bytes,
        value: KeyValue | None,
        revision: int,
        *,
        is_directory: bool,
    ) -> None:
        """Make the tree say what etcd said of one name at a revision."""
        child = directory.children.get(name)
        if child is not None and self.update.is_moving(child):
            return  # this mount is moving it just now, and will say where it is
        if is_directory:
            if not isinstance(child, Directory):
                made = self.update.tree.directory_at(directory, name)
                self.update.replace(directory, name, made)
        elif value is None:
            if isinstance(child, File) and child.handles and child.version > revision:
                return  # it was made after that: who writes to it must not take it for deleted
            if child is not None:
                self._observe_missing(directory, name, child)
            else:
                self.update.tree.times.drop(self.update.tree.names(directory, name))
        else:
            self._value_cache.put(value.key, value.mod_revision, value.value)
            self._observe_file(directory, name, value)

    def _note_evidence(self, directory: Directory, name: bytes, evidence_key: bytes | None) -> None:
        """Remember a key that shows that a directory is there, to be asked for next time."""
        child = directory.children.get(name)
        if isinstance(child, Directory):
            child.evidence_key = evidence_key

    def _observe_missing(self, directory: Directory, name: bytes, child: Node) -> None:
        if not is_local(child):
            self.update.replace(directory, name, None)
        elif isinstance(child, Directory):
            waiting = {n: below for n, below in child.children.items() if is_local(below)}
            if set(waiting) == {VALUE_NAME}:  # no directory any more: it is the file again
                self.update.collapse(child)

    def _observe_file(self, directory: Directory, name: bytes, value: KeyValue) -> None:
        tree = self.update.tree
        child = directory.children.get(name)
        old = child if isinstance(child, File) else None
        key_state = key_state_of(value)
        if old is not None:
            known = old.key_state.mod_revision if old.key_state is not None else 0
            intent = self.update.intents.get(value.key)
            if intent is not None and intent.file is old and intent.value == value.value:
                old.key_state = key_state
                return
            if known >= value.mod_revision:
                return
            if tree.may_follow(old):
                tree.renew(old, key_state)
                return
        made = tree.returning(directory, name) if child is None else None
        if isinstance(made, File):
            tree.renew(made, key_state)
        else:
            made = tree.new_version(old, key_state)
        self.update.replace(directory, name, made, over=value)

    def _bind(self, directory: Directory, name: bytes, answer: "_Answer") -> None:
        """Give what is under a name its attributes."""
        node = directory.children.get(name)
        if isinstance(node, File):
            if node.key_state is None or not answer.has_record:
                return  # made here: nobody else knows its attributes; or they are not known
            found = None if answer.stored_record is None else stored_record_of(answer.stored_record)
            if not holds(found, node.key_state):
                found = None
            if type_of(found) != type_of(node.stored_record) and node.lookups:
                node = self.update.tree.new_version(node, node.key_state)
                self.update.replace(directory, name, node)
        if node is not None:
            self._dress_node(node, answer)

    def _dress_node(self, node: Node, answer: "_Answer") -> None:
        if (
            node.stored_record is not None
            and node.stored_record.key_state.mod_revision > answer.revision
        ):
            return  # a newer answer was here first
        if isinstance(node, Directory):
            node.marker = None if answer.marker is None else key_state_of(answer.marker)
        if not answer.has_record and holds(node.stored_record, key_state_of_node(node)):
            return  # what is known stays known
        found = None if answer.stored_record is None else stored_record_of(answer.stored_record)
        if not holds(found, key_state_of_node(node)):
            found = None
        bind(node, found)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What etcd said of one name's attributes; `has_record` says whether it was asked."""

    stored_record: KeyValue | None
    marker: KeyValue | None
    revision: int
    has_record: bool


def _own_value(keyspace: Keyspace, names: tuple[bytes, ...]) -> bytes | None:
    if not names:
        return None
    try:
        return keyspace.file_key((*names, VALUE_NAME))
    except CallerError:
        return None
