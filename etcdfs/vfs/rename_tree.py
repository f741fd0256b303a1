"""Moving whole directories, and letting two names change places.

Knows: how all keys of a directory get other names in one transaction, or none does. Does not know:
FUSE, which rename is allowed, how a transaction is laid out.

All keys are read first, at one revision; that none of them has changed since, that none was added,
and what the target was found to be, are the conditions of the transaction. If one does not hold,
all is read again, `MAX_RETRIES` times.

What is held back meanwhile: write buffers below, which go to etcd under their new keys afterwards, and
changes of names below.

What does not fit into one transaction is EXDEV, and nothing has moved: that is what `mv` and its
like answer by copying. Any other errno would only make them give up.

Concurrency: trio thread. What was read before an `await` is a condition of the transaction.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Final, Literal, TypeGuard, final

from etcdfs.errors import (
    AnswerTooLargeError,
    CompactedError,
    CrossDirectoryError,
    NameReservedError,
    NameTooLongError,
    StaleError,
    StoreValueTooLargeError,
    TooManyOperationsError,
    TransactionAbortedError,
)
from etcdfs.files.handles import Handles
from etcdfs.files.put_attributes import with_attributes
from etcdfs.keyspace.attribute_records import (
    ATTRIBUTES,
    is_record_key,
    moved,
    owner_of,
    record_key,
    record_range,
)
from etcdfs.keyspace.keys import MARKER_NAME, MAX_DEPTH, is_part
from etcdfs.keyspace.paging import Pages, Paging
from etcdfs.keyspace.store import (
    Compare,
    Get,
    KeyValue,
    Put,
    Store,
    Transaction,
    absent,
    range_end,
)
from etcdfs.keyspace.transaction_results import events_of
from etcdfs.keyspace.transactions import MAX_KEYS, Rewriting, parent_prefix, stay_without, unmoved
from etcdfs.tree.changes import Relocation
from etcdfs.tree.inodes import Dentry, Directory, File, Node
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View
from etcdfs.vfs.namei import (
    Evidence,
    Namei,
    Parent,
    is_a_file,
    missing,
    not_empty,
    parent_of,
    taken,
)

MAX_RETRIES: Final = 16
"""Lost races before a rename gives up; each loss means that somebody changed what it moves."""

PAGE: Final = 256
"""Keys read at a time, at most."""


@dataclass(frozen=True, slots=True)
class End:
    """One of the two names of a rename.

    Attributes:
        directory: Where the name is.
        name: The name.
        names: Its path.
        own: The key of a file there, which is also that of a directory's `%value`; None if
            there can be none.
        prefix: What the keys of a directory there begin with; None if there can be none.
    """

    directory: Directory
    name: bytes
    names: tuple[bytes, ...]
    own: bytes | None
    prefix: bytes | None

    @property
    def node(self) -> Node | None:
        """What is under the name, as far as the tree knows."""
        return self.directory.children.get(self.name)

    def key(self, key: bytes, old: "End") -> bytes:
        """Return what a key of another end is called at this one.

        Raises:
            NameReservedError: It can have no such name here.
        """
        if key == old.own:
            new = self.own
        else:
            assert old.prefix is not None, "all other keys are below it"
            new = None if self.prefix is None else self.prefix + key[len(old.prefix) :]
        if new is None:
            msg = f"{key!r} cannot be called {self.name!r}"
            raise NameReservedError(msg)
        return new


@dataclass(slots=True)
class Held:
    """What etcd holds at one end, or as much of it as was asked for, all at one revision."""

    end: End
    own: KeyValue | None = None
    below: list[KeyValue] = field(default_factory=list)
    stored_records: list[KeyValue] = field(default_factory=list)

    @property
    def keys(self) -> list[KeyValue]:
        """All of it but the record keys."""
        return [*self.below] if self.own is None else [self.own, *self.below]

    @property
    def is_directory(self) -> bool:
        """Whether it is one, in etcd."""
        return bool(self.below)

    @property
    def is_empty_directory(self) -> bool:
        """Whether there is nothing but a marker that has no value."""
        found = [(entry.key, entry.value) for entry in self.keys]
        return found == [(self.end.prefix, b"")]

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        return sum(
            len(entry.key) + len(entry.value) for entry in (*self.keys, *self.stored_records)
        )


About = Literal["own", "below", "sides"]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What to commit, and what the tree is then to become."""

    rewriting: Rewriting
    relocation: Relocation
    guards: tuple[Compare, ...]
    stay: tuple[Transaction, ...] = ()

    def transaction(self) -> Transaction:
        return self.rewriting.transaction(self.guards, self.stay)


@final
class RenameTree:
    """Changes of place of more than one key, on one mounted keyspace."""

    def __init__(self, store: Store, view: View, files: Handles, places: Namei) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._files = files
        self._namei = places

    @property
    def _tree(self) -> Tree:
        return self._view.update.tree

    def end(self, directory: Directory, name: bytes) -> End:
        """Return a name as one end of a rename."""
        names = self._tree.names(directory, name)
        keyspace = self._tree.keyspace
        own = prefix = None
        with suppress(NameReservedError):
            own = keyspace.file_key(names)
        with suppress(NameReservedError, NameTooLongError):
            prefix = keyspace.directory_prefix(names)
        return End(directory, name, names, own, prefix)

    # --- directories ------------------------------------------------------------------------

    async def move(self, source: End, target: End, *, replace: bool) -> None:
        """Move a directory, over an empty one if there is one.

        Raises:
            CallerError: It cannot be; see `Rename.rename`.
        """
        if isinstance(target.node, File):
            raise is_a_file(target.name) if replace else taken(target.name)
        if isinstance(target.node, Directory):
            if not replace:
                raise taken(target.name)
            await self._view.revalidate_name(target.node, MARKER_NAME)
            if self._namei.has_entries(target.node):
                raise not_empty(target.name)
        _check_ours(source)
        _check_ours(target)
        node = source.node
        assert isinstance(node, Directory)
        above = Evidence(self._store, parent_of(self._tree, target.directory))

        async def attempt(stored_records: bool) -> _Attempt:
            parent = await above.parent()
            return await self._try_to_move(
                node, source, target, parent, replace=replace, stored_records=stored_records
            )

        await self._carry_out(attempt, source, target)
        if target.node is not node:
            self._view.invalidate(_entries(source, target))
        node.ctime_ns = max(self._tree.clock(), node.ctime_ns + 1)

    async def _try_to_move(
        self,
        node: Directory,
        source: End,
        target: End,
        above: Parent | None,
        *,
        replace: bool,
        stored_records: bool,
    ) -> _Attempt:
        revision, (old, new) = await self._read(
            (source, 0), (target, 2), stored_records=stored_records
        )
        if not old.is_directory:
            raise missing(source.name)
        if new.keys:
            if not replace:
                raise taken(target.name)
            if not new.is_directory:
                raise is_a_file(target.name)
            if not new.is_empty_directory:
                raise not_empty(target.name)
        assert source.prefix is not None
        assert target.prefix is not None
        self._check_depth(old, target)
        puts = _puts(old, target)
        ranges = [(source.prefix, range_end(source.prefix))]
        ranges += [record_range(source.prefix)] if stored_records else []
        parent = parent_prefix(source.prefix, self._tree.keyspace.prefix)
        if parent is not None and target.prefix.startswith(parent):
            parent = None
        return _Attempt(
            Rewriting(before=_before(old, new), after=puts, ranges=tuple(ranges)),
            _relocation(
                puts,
                (old, new),
                origins=_origins(old, target),
                places=((node, target.directory, target.name),),
                leaves=((source.directory, source.name),),
            ),
            (
                *_unchanged(old, revision, stored_records=stored_records),
                absent(target.prefix + b"\0", range_end(target.prefix)),
                *(absent(key) for key in (target.prefix, target.own) if _is_missing(key, new)),
                *(() if above is None else (above.condition,)),
            ),
            stay_without(parent, source.prefix),
        )

    # --- two names --------------------------------------------------------------------------

    async def exchange(self, source: End, target: End) -> None:
        """Let two names change places, whatever they are.

        Raises:
            CallerError: It cannot be; see `Rename.rename`.
        """
        for end in (source, target):
            _check_ours(end)
            if isinstance(end.node, File):
                await self._files.write_back(end.node)
        # checkpoint: either may have gone
        first, second = source.node, target.node
        if first is None or second is None:
            raise missing(source.name if first is None else target.name)
        places = (
            (first, target.directory, target.name),
            (second, source.directory, source.name),
        )

        async def attempt(stored_records: bool) -> _Attempt:
            revision, (old, new) = await self._read(
                (source, 0), (target, 0), stored_records=stored_records
            )
            for held, node in ((old, first), (new, second)):
                _check_still(held, node)
            self._check_depth(old, target)
            self._check_depth(new, source)
            puts = {**_puts(old, target), **_puts(new, source)}
            return _Attempt(
                Rewriting(before=_before(old, new), after=puts),
                _relocation(
                    puts,
                    (old, new),
                    origins={**_origins(old, target), **_origins(new, source)},
                    places=places,
                ),
                tuple(
                    c
                    for held in (old, new)
                    for c in _unchanged(held, revision, stored_records=stored_records)
                ),
            )

        await self._carry_out(attempt, source, target)
        if (source.node, target.node) != (second, first):
            self._view.invalidate(_entries(source, target))
        for node in (first, second):
            node.ctime_ns = max(self._tree.clock(), node.ctime_ns + 1)

    def _check_depth(self, held: Held, new: End) -> None:
        """Refuse to move a directory of which something is too deep for a name of its own."""
        is_deep = self._tree.keyspace.is_deep
        if any(is_deep(e.key) or is_deep(new.key(e.key, held.end)) for e in held.below):
            msg = f"{held.end.names!r} holds keys of more than {MAX_DEPTH} levels, or would"
            raise CrossDirectoryError(msg)

    # --- in etcd ----------------------------------------------------------------------------

    async def _carry_out(
        self, attempt: Callable[[bool], Awaitable[_Attempt]], source: End, target: End
    ) -> None:
        """Commit what `attempt` makes, with records or without, until no race is lost.

        Without, if roles forbid it and none is known that would be lost: content still works.
        """
        nodes = [node for node in (source.node, target.node) if node is not None]
        # The kernel holds the locks of what is moved and replaced as well.
        held = (*_entries(source, target), *(Dentry(node.inode, b"") for node in nodes))
        async with AsyncExitStack() as stack:
            stack.enter_context(self._view.holding(held))
            ends = (source, target)
            keys, prefixes = [end.own for end in ends], [end.prefix for end in ends]
            await stack.enter_async_context(self._files.locks.still(keys, prefixes, nodes))
            made: _Attempt | None = None

            async def done(stored_records: bool) -> bool:
                nonlocal made
                made = await attempt(stored_records and self._tree.attributes)
                return await self._commit(made, source, _entries(source, target))

            def may_drop() -> bool:
                return self._tree.attributes and not _has_records(made, nodes)

            for _ in range(MAX_RETRIES):
                made = None
                with suppress(CompactedError, TransactionAbortedError):
                    if await with_attributes(self._tree.rights, done, may_drop=may_drop):
                        self._files.give_up(keys, prefixes)
                        return
            msg = f"what is below {source.prefix!r} changed {MAX_RETRIES} times meanwhile"
            raise StaleError(msg)

    async def _commit(self, attempt: _Attempt, source: End, locked: Sequence[Dentry]) -> bool:
        """Commit and settle; False if a race was lost."""
        if not attempt.rewriting.is_possible():
            msg = f"{source.names!r} has more than {MAX_KEYS} keys"
            raise CrossDirectoryError(msg)
        with self._view.update.moving(attempt.relocation):
            try:
                committed = await self._store.commit(attempt.transaction())
            except (StoreValueTooLargeError, TooManyOperationsError) as exc:
                msg = f"{source.names!r} does not fit into one transaction: {exc}"
                raise CrossDirectoryError(msg) from exc
            if committed.succeeded:
                events = attempt.rewriting.events(committed.revision)
                for stay in attempt.stay:
                    events += events_of(committed[stay])
                await self._view.wait_until_visible(committed.revision, events, locked)
        return committed.succeeded

    # --- reading ----------------------------------------------------------------------------

    async def _read(self, *wanted: tuple[End, int], stored_records: bool) -> tuple[int, list[Held]]:
        """Read what is at some ends, at one revision; of each so many keys below, or all (0).

        Raises:
            CrossDirectoryError: It is more than one request can carry.
            CompactedError: It took so long that the revision is gone.
        """
        ends = [(Held(end), limit) for end, limit in wanted]
        questions = [
            (held, limit, about, get)
            for held, limit in ends
            for about, get in _questions(held.end, limit or PAGE, stored_records=stored_records)
        ]
        try:
            answers = await self._store.commit(Transaction((), tuple(get for *_, get in questions)))
        except AnswerTooLargeError as exc:
            msg = "there is more than one request can carry"
            raise CrossDirectoryError(msg) from exc
        for held, limit, about, get in questions:
            page = answers[get]
            if about == "own":
                held.own = page.entries[0] if page.entries else None
                continue
            entries = held.below if about == "below" else held.stored_records
            entries.extend(page.entries)
            if page.more and not limit:
                await self._read_on(held, entries, get, answers.revision)
        return answers.revision, [held for held, _ in ends]

    async def _read_on(self, held: Held, entries: list[KeyValue], get: Get, revision: int) -> None:
        assert get.end is not None, "only a range goes on"
        after = entries[-1].key + b"\0"
        pages = Pages(self._store, after, get.end, Paging(PAGE), revision=revision)
        while (page := await pages.next()) is not None:
            entries.extend(page.entries)
            if held.size > self._files.max_file_size:
                msg = f"{held.end.names!r} holds more than one request can carry"
                raise CrossDirectoryError(msg)


# --- what becomes of keys -------------------------------------------------------------------


def _questions(end: End, limit: int, *, stored_records: bool) -> Iterator[tuple[About, Get]]:
    if end.own is not None:
        yield "own", Get(end.own)
        if stored_records:
            yield "sides", Get(record_key(end.own))
    if end.prefix is not None:
        yield "below", Get(end.prefix, range_end(end.prefix), limit=limit)
        if stored_records:
            start, stop = record_range(end.prefix)
            yield "sides", Get(start, stop, limit=PAGE)


def _before(*ends: Held) -> dict[bytes, KeyValue]:
    return {found.key: found for held in ends for found in (*held.keys, *held.stored_records)}


def _puts(held: Held, new: End) -> dict[bytes, Put]:
    """Return what is put for all that moves to another end, its attributes included."""
    owners = {found.key: found for found in held.keys}
    puts = {
        key: Put(key, found.value, found.lease)
        for found in owners.values()
        for key in (new.key(found.key, held.end),)
    }
    for stored_record in held.stored_records:
        owner = owners.get(owner_of(stored_record.key))
        value = None if owner is None else moved(stored_record, owner)
        if owner is not None and value is not None:
            key = record_key(new.key(owner.key, held.end))
            puts[key] = Put(key, value)
    return puts


def _origins(held: Held, new: End) -> dict[bytes, int]:
    return {new.key(found.key, held.end): found.mod_revision for found in held.keys}


def _relocation(
    puts: Mapping[bytes, Put],
    ends: tuple[Held, Held],
    *,
    origins: Mapping[bytes, int],
    places: tuple[tuple[Node, Directory, bytes], ...],
    leaves: tuple[tuple[Directory, bytes], ...] = (),
) -> Relocation:
    return Relocation(
        places=places,
        leaves=leaves,
        origins=origins,
        values={key: puts[key].value for key in origins},
        gone=frozenset(e.key for held in ends for e in held.keys if e.key not in puts),
    )


def _unchanged(held: Held, revision: int, *, stored_records: bool) -> Iterator[Compare]:
    """Yield the conditions that nothing was added at an end, keys that were read aside."""
    end = held.end
    if _is_missing(end.own, held):
        yield absent(end.own)
    if end.prefix is None:
        return
    if not held.is_directory:
        yield absent(end.prefix, range_end(end.prefix))
        return
    yield unmoved(end.prefix, revision)
    if stored_records:
        start, stop = record_range(end.prefix)
        yield Compare(start, "mod_revision", "<", revision + 1, stop)


def _is_missing(key: bytes | None, held: Held) -> TypeGuard[bytes]:
    return key is not None and all(found.key != key for found in held.keys)


def _has_records(attempt: _Attempt | None, nodes: list[Node]) -> bool:
    """Say whether something has attributes of its own that would be left behind."""
    if attempt is not None and any(is_record_key(key) for key in attempt.rewriting.before):
        return True
    pending = [*nodes]
    while pending:
        node = pending.pop()
        if node.stored_record is not None and node.stored_record.key_state.mod_revision:
            return True
        if isinstance(node, Directory):
            pending.extend(node.children.values())
    return False


def _check_still(held: Held, node: Node) -> None:
    """Refuse to move what is no longer what the kernel takes it for."""
    if not held.keys:
        raise missing(held.end.name)
    if held.is_directory != isinstance(node, Directory):
        msg = f"{held.end.name!r} has just become something else"
        raise StaleError(msg)


def _check_ours(end: End) -> None:
    """Refuse to move what etcdfs keeps for itself."""
    if isinstance(end.node, File):
        return
    if is_part(end.name):
        msg = f"{end.name!r} is part of a long name, and what is in it has no prefix of its own"
        raise CrossDirectoryError(msg)
    if end.prefix is None:
        msg = f"no directory can be called {end.name!r}"
        raise NameReservedError(msg)
    if ATTRIBUTES.startswith(end.prefix) or end.prefix.startswith(ATTRIBUTES):
        msg = f"{end.prefix!r} holds the attributes of other keys"
        raise NameReservedError(msg)


def _entries(source: End, target: End) -> tuple[Dentry, Dentry]:
    first, second = (Dentry(end.directory.inode, end.name) for end in (source, target))
    return first, second
