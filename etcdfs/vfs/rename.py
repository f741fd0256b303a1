"""Renaming: which rename is allowed, and the rename of a file.

Knows: what renameat2(2) means for names, and how the rename of a file survives a race. Does not
know: FUSE, how whole directories move (`rename_tree`).

Each is one etcd transaction. A file's value is known, so that its rename is one request: on
condition that the key is the version that is known, else again with the version that was found.

Concurrency: trio thread. What was read before an `await` is a condition of the transaction.
"""

from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Final, final

from etcdfs.errors import (
    CrossDirectoryError,
    InvalidRequestError,
    NameReservedError,
    StaleError,
)
from etcdfs.files.handles import Handles
from etcdfs.files.put_attributes import commit_with
from etcdfs.keyspace.attribute_records import encode, moved, record_key
from etcdfs.keyspace.keys import MARKER_NAME, VALUE_NAME, has_keys_below
from etcdfs.keyspace.store import (
    Committed,
    Delete,
    Get,
    KeyValue,
    Operation,
    Put,
    Store,
    Transaction,
    unchanged,
)
from etcdfs.keyspace.transaction_results import events_of
from etcdfs.keyspace.transactions import move_file, parent_prefix, put_and_read
from etcdfs.tree.changes import Intent
from etcdfs.tree.inodes import Dentry, Directory, File, Node
from etcdfs.tree.tree import Tree
from etcdfs.tree.view import View
from etcdfs.vfs.leases import Leases, lease_of
from etcdfs.vfs.namei import (
    Namei,
    Parent,
    is_a_directory,
    missing,
    not_empty,
    parent_of,
    taken,
    within,
)
from etcdfs.vfs.rename_tree import MAX_RETRIES, End, RenameTree

RENAME_NOREPLACE: Final = 1  # include/uapi/linux/fs.h
RENAME_EXCHANGE: Final = 2


@dataclass(frozen=True, slots=True)
class _FileMove:
    """A file on its way: what it is at this moment, and the attributes it has."""

    source: End
    target: End
    old: bytes
    new: bytes
    replace: bool
    value: KeyValue
    stored_record: KeyValue | None
    replaced_record: bool
    parent: Parent | None


@final
class Rename:
    """Renames on one mounted keyspace."""

    def __init__(
        self, store: Store, view: View, files: Handles, places: Namei, leases: Leases
    ) -> None:
        # --- dependencies
        self._store = store
        self._view = view
        self._files = files
        self._namei = places
        self._leases = leases
        self._rename_tree = RenameTree(store, view, files, places)

    @property
    def _tree(self) -> Tree:
        return self._view.update.tree

    async def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        """Move what is under a name to another, replacing what is there; or let them swap.

        Raises:
            NotFoundError: The old name, or with RENAME_EXCHANGE the new one, is not there.
            ExistsError: RENAME_NOREPLACE, and the new name is taken.
            IsADirectoryFileError: A file would replace a directory.
            NotADirectoryFileError: A directory would replace a file.
            NotEmptyError: A directory would replace one that has entries.
            InvalidRequestError: A directory would come to be below itself; or unknown flags.
            NameReservedError: What is moved cannot have the new name.
            CrossDirectoryError: It does not fit into one transaction; `mv` copies instead.
            StaleError: It changed all the time.
        """
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            msg = f"rename flags {flags:#x} are not supported"
            raise InvalidRequestError(msg)
        source_directory = await self._namei.parent(old_parent, old_name)
        target_directory = await self._namei.parent(new_parent, new_name)
        places = ((source_directory, old_name), (target_directory, new_name))
        await self._namei.at_rest(*places)
        # checkpoint: the old name's directory may have gone meanwhile
        if not self._tree.is_attached(source_directory):
            raise missing(old_name)
        source = self._rename_tree.end(source_directory, old_name)
        target = self._rename_tree.end(target_directory, new_name)
        exchange = flags == RENAME_EXCHANGE
        if source.node is None or (exchange and target.node is None):
            raise missing(old_name if source.node is None else new_name)
        if source.names == target.names:
            if flags == RENAME_NOREPLACE:
                raise taken(new_name)
            return
        _check_names(source, target, exchange=exchange)
        async with self._namei.changing(*places) as locked:
            with self._view.holding(locked):
                node = source.node
                if node is None:  # a batch that would have waited for us is applied by now
                    raise missing(old_name)
                if exchange:
                    await self._rename_tree.exchange(source, target)
                elif isinstance(node, Directory):
                    await self._rename_tree.move(source, target, replace=not flags)
                else:
                    await self._move_file(node, source, target, replace=not flags)

    # --- files ------------------------------------------------------------------------------

    async def _move_file(self, file: File, source: End, target: End, *, replace: bool) -> None:
        old, new = source.own, target.own
        if old is None or new is None:
            msg = f"no file can be called {target.name!r}"
            raise NameReservedError(msg)
        if old == new:
            return  # `a/%value`, which is `a` once nothing else is below it
        await self._files.write_back(file)
        async with self._files.locks.still((old, new)):
            if file.key_state is None:
                raise missing(source.name)
            if isinstance(target.node, File):
                self._files.keep(target.node)
            # checkpoint: the file may become another client's version meanwhile
            key_state = file.key_state
            value = await self._view.value(file)
            move = _FileMove(
                source=source,
                target=target,
                old=old,
                new=new,
                replace=replace,
                value=KeyValue(old, value, *key_state[:4]),
                stored_record=self._stored_record(old, file),
                replaced_record=self._stored_record(new, target.node) is not None,
                parent=parent_of(self._tree, target.directory),
            )
            replaced = lease_of(target.node)
            await self._move(file, move)
            self._files.give_up((old, new))
        await self._leases.release(replaced)

    async def _move(self, file: File, move: _FileMove) -> None:
        locked = [Dentry(end.directory.inode, end.name) for end in (move.source, move.target)]
        update = self._view.update
        mover: File | None = file
        for _ in range(MAX_RETRIES):
            with (
                update.own(move.old, Intent(file=mover)),
                update.own(move.new, Intent(file=mover, value=move.value.value, replaces=True)),
            ):
                committed = await self._commit(move)
                if committed.succeeded:
                    await self._view.wait_until_visible(
                        committed.revision, events_of(committed), locked
                    )
                    break
            move = _look_again(move, committed)
            if file.version != move.value.mod_revision:
                mover = None  # what moves is a version that this inode is not
        else:
            msg = f"{move.old!r} changed {MAX_RETRIES} times while it was renamed"
            raise StaleError(msg)
        # The kernel moves the inode it had under the old name, which another client's change
        # may have made an old version meanwhile. If it is right, forgetting it would only make
        # /proc/self/fd say "(deleted)" of what is open.
        if move.target.node is not file:
            self._view.invalidate(locked[1:])
        if mover is None and file.directory is None:
            # Until then the new name leads to it, and its inode may be held for longer.
            file.lost_key, file.gone, file.removed = move.new, False, False
        file.ctime_ns = max(self._tree.clock(), file.ctime_ns + 1)

    async def _commit(self, move: _FileMove) -> Committed:
        """Commit with the attributes; without, if roles say so and nothing is known to be lost.

        Raises:
            StorePermissionError: The file would lose its attributes, and be open to all perhaps.
        """
        wanted = self._transaction(move)
        with_record = _with_records(wanted, move) if self._tree.attributes else wanted
        bare = wanted if move.stored_record is None else with_record
        return await commit_with(self._store, self._tree.rights, with_record, bare)

    def _transaction(self, move: _FileMove) -> Transaction:
        source, target = move.source, move.target
        # A directory's %value is an entry of it whose key is not below it.
        same = source.directory is target.directory and target.name != VALUE_NAME
        same = same or source.name == VALUE_NAME
        moving = move_file(
            move.old,
            move.value.mod_revision,
            move.new,
            Put(move.new, move.value.value, move.value.lease),
            parent=None if same else parent_prefix(move.old, self._tree.keyspace.prefix),
            replace=move.replace,
            is_value=has_keys_below(target.names),
        )
        return within(move.parent, moving)

    def _stored_record(self, key: bytes, node: Node | None) -> KeyValue | None:
        """Return the record key of a key as it is known."""
        if not self._tree.attributes:
            return None
        known = None if node is None else node.stored_record
        stored_record = self._tree.stored_records.get(key) if self._tree.complete else known
        if stored_record is None or not stored_record.key_state.mod_revision:
            return None
        return KeyValue(record_key(key), encode(stored_record.record), *stored_record.key_state[:4])


def _check_names(source: End, target: End, *, exchange: bool) -> None:
    if source.name == MARKER_NAME or (exchange and target.name == MARKER_NAME):
        msg = f"{MARKER_NAME!r} is the directory's own key and stays; its value can be taken"
        raise CrossDirectoryError(msg)
    if target.names[: len(source.names)] == source.names:
        msg = f"{target.names!r} is below {source.names!r}"
        raise InvalidRequestError(msg)
    if source.names[: len(target.names)] != target.names:
        return
    if exchange:
        msg = f"{source.names!r} is below {target.names!r}"
        raise InvalidRequestError(msg)
    raise not_empty(target.name)


def _with_records(wanted: Transaction, move: _FileMove) -> Transaction:
    """Have a file's attributes go with it, and those of the file it replaces go."""
    old, new = record_key(move.old), record_key(move.new)
    value = None if move.stored_record is None else moved(move.stored_record, move.value)
    operations: list[Operation] = []
    if move.stored_record is not None:
        operations.append(Delete(old))
    if move.target.name == MARKER_NAME:
        pass  # the attributes of a marker are its directory's
    elif value is not None:
        operations += put_and_read(Put(new, value))
    elif move.replaced_record:
        operations.append(Delete(new))
    known = 0 if move.stored_record is None else move.stored_record.mod_revision
    return changed(
        wanted,
        when=(*wanted.when, unchanged(old, known)),
        then=(*wanted.then, *operations),
        otherwise=(*wanted.otherwise, Get(old)),
    )


def _look_again(move: _FileMove, committed: Committed) -> _FileMove:
    """Return the move of what is there by now.

    Raises:
        CallerError: It is not to be moved.
    """
    parent = None if move.parent is None else move.parent.after(committed)
    found = {entry.key: entry for entry in committed.entries}
    if move.old not in found:
        raise missing(move.source.name)
    if move.new in found and not move.replace:
        raise taken(move.target.name)
    is_below = any(key.startswith(move.new + b"/") for key in found)
    if is_below and not has_keys_below(move.target.names):
        raise is_a_directory(move.target.name)
    return changed(
        move, value=found[move.old], stored_record=found.get(record_key(move.old)), parent=parent
    )
