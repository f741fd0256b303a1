"""What a batch of etcd's events makes of the tree, worked out without touching it.

Knows: how events change names, and how changes that this mount made itself are recognised, so that
its nodes stay: by the *intent* of a key, the value put there and the file that carries it; by the
*relocation* of nodes that change their place with whatever is below them. Does not know: how a plan
is carried out, and who is told.

Concurrency: synchronous; used on the trio thread only.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from etcdfs.keyspace.attribute_records import is_record_key, owner_of
from etcdfs.keyspace.keys import MARKER_NAME, VALUE_NAME
from etcdfs.keyspace.store import Event, KeyValue, Tombstone
from etcdfs.tree.inodes import (
    NOT_IN_ETCD,
    Dentry,
    Directory,
    File,
    KeyState,
    Node,
    StoredRecord,
    key_state_of,
    type_of,
)
from etcdfs.tree.node_attributes import holds, is_news, stored_record_of
from etcdfs.tree.tree import Tree

_RESERVED: Final = frozenset((VALUE_NAME, MARKER_NAME))


@dataclass(slots=True, kw_only=True)
class Intent:
    """A change that this mount is making right now.

    Attributes:
        file: The file that is to stand for the key afterwards; None for a deletion or a marker.
        value: What is being put; None for a deletion.
        replaces: Whether what stood under the key is gone afterwards, as after a rename.
    """

    file: File | None = None
    value: bytes | None = None
    replaces: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relocation:
    """Nodes that this mount is moving right now, with all that is below them.

    Attributes:
        places: Each node, and where it will stand.
        leaves: Names that will be left with nothing.
        origins: For each key that is put, the mod_revision of the version that moves there.
        values: What is put.
        gone: Keys that are deleted.
    """

    places: tuple[tuple[Node, Directory, bytes], ...]
    leaves: tuple[tuple[Directory, bytes], ...]
    origins: Mapping[bytes, int]
    values: Mapping[bytes, bytes]
    gone: frozenset[bytes]

    def revision_in(self, events: Sequence[Event]) -> int:
        """Return the revision that did all of it, 0 if none of these events' did."""
        first, value = next(iter(self.values.items()))
        for found in events:
            if found.key != first or isinstance(found, Tombstone) or found.value != value:
                continue
            own = {e.key: e for e in events if e.mod_revision == found.mod_revision}
            if all(isinstance(own.get(key), Tombstone) for key in self.gone) and all(
                isinstance(put := own.get(key), KeyValue) and put.value == value
                for key, value in self.values.items()
            ):
                return found.mod_revision
        return 0


@dataclass(slots=True)
class Plan:
    """What a batch does to the tree.

    Attributes:
        entries: For each directory, what each changed name becomes (None: nothing).
        key state: Files that keep their inode, or come back, and get new key state.
        markers: Directories whose marker key changes.
        renewed: Those of them that become another client's version: nobody has them open.
        deleted: Files whose key is deleted, not only superseded.
        removed: Those of them that this mount deletes or replaces.
        stored_records: What becomes of the record keys, by the key that each belongs to.
        with_record: Nodes whose own attributes change, and to what.
        own_records: Those of them whose attributes this mount changes.
        moved: Directories that change their place, and keep what is below them.
        keys: Of files that go or are replaced, the key each has until then, if it is known.
    """

    entries: dict[Directory, dict[bytes, Node | None]] = field(default_factory=dict)
    key_state: dict[File, KeyState] = field(default_factory=dict)
    markers: dict[Directory, KeyState | None] = field(default_factory=dict)
    renewed: set[File] = field(default_factory=set)
    deleted: set[Node] = field(default_factory=set)
    removed: set[Node] = field(default_factory=set)
    stored_records: dict[bytes, StoredRecord | None] = field(default_factory=dict)
    with_record: dict[Node, StoredRecord | None] = field(default_factory=dict)
    own_records: set[Node] = field(default_factory=set)
    moved: set[Node] = field(default_factory=set)
    keys: dict[File, bytes] = field(default_factory=dict)

    def changes(self) -> Iterator[tuple[Directory, bytes, Node | None, Node | None]]:
        """Yield (directory, name, before, after) of each name that really changes."""
        for directory, names in self.entries.items():
            for name, after in names.items():
                before = directory.children.get(name)
                if before is not after:
                    yield directory, name, before, after

    def is_version(self, before: Node | None, after: Node | None) -> bool:
        """Tell whether only the content changes, which a directory's own times do not show."""
        return (
            isinstance(before, File)
            and isinstance(after, File)
            and before not in self.deleted
            and after not in self.moved
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A plan for some events of a large batch that have nothing to do with one another.

    Attributes:
        events: The events, by key.
        plan: What they do.
        depends: What of the tree the plan was made of (`Tree.disturbed`); None: of directories.
        doubtful: Directories that may be left with nothing.
        gone: Of each directory the files that it loses: name, file, key.
        made: Files that are new, and where.
    """

    events: dict[bytes, Event]
    plan: Plan
    depends: set[Node | Dentry | None]
    doubtful: set[Directory]
    gone: dict[Directory, list[tuple[bytes, File, bytes]]] = field(default_factory=dict)
    made: list[tuple[Directory, bytes, Node]] = field(default_factory=list)

    def directories(self) -> set[Directory]:
        """Return those of the files that come, go or change."""
        of_renewed = {file.directory for file in self.plan.renewed if file.directory is not None}
        return self.gone.keys() | {directory for directory, _, _ in self.made} | of_renewed


@final
class Planner:
    """The tree with a sheet of paper laid over it: reads fall through, writes stay on it."""

    def __init__(
        self,
        tree: Tree,
        intents: dict[bytes, Intent],
        *,
        force: bool,
        under: Sequence["Part"] = (),
    ) -> None:
        """Lay a sheet over a tree, or over parts of a plan that lie on it already."""
        self._tree = tree
        self._intents = intents
        self._force = force
        self._under: dict[Directory, dict[bytes, Node | None]] = {}
        for part in under:
            for directory, names in part.plan.entries.items():
                self._under.setdefault(directory, {}).update(names)
        self._plan = Plan()
        self._doubtful: set[Directory] = set()
        self._where: dict[Directory, tuple[Directory, bytes]] = {}
        self._deletions: set[tuple[bytes, int]] = set()
        self._own_puts: set[bytes] = set()
        self._own_records: set[bytes] = set()  # keys whose attributes this mount changes
        self._with_attributes: set[bytes] = set()  # keys that are made or go, and have attributes

    def note(self, events: Iterable[Event]) -> None:
        """Note which keys the whole batch deletes, and when, and which this mount put."""
        for event in events:
            if isinstance(event, Tombstone):
                self._deletions.add((event.key, event.mod_revision))
            elif event.key in self._intents and self._intents[event.key].value == event.value:
                self._own_puts.add(event.key)

    def add(self, event: Event) -> None:
        """Plan what an event does."""
        if is_record_key(event.key):
            self._stored_record(event)
            return
        location = self._tree.keyspace.locate(event.key)
        if location.is_marker:
            self._marker(event, location.names)
        elif isinstance(event, KeyValue):
            self._put(event, location.names)
        else:
            self._delete(event, location.names)

    def part(self, events: Iterable[Event], apart: Container[bytes]) -> tuple["Part", list[Event]]:
        """Plan those events that concern nothing but a file that there is, or a new one.

        Args:
            events: At most one of each key.
            apart: Keys whose attributes change in the same batch.

        Returns:
            What is planned of them, and the others.
        """
        done: dict[bytes, Event] = {}
        others: list[Event] = []
        for event in events:
            if event.key not in apart and self._is_single(event):
                self.add(event)
                done[event.key] = event
            else:
                others.append(event)
        part = Part(done, self._plan, {None, *self._plan.key_state}, self._doubtful)
        for directory, name, before, after in self._plan.changes():
            part.depends.add(Dentry(directory.inode, name))
            if after is not None:
                part.made.append((directory, name, after))
            elif isinstance(before, File):
                part.depends.add(before)
                gone = (name, before, self._plan.keys[before])
                part.gone.setdefault(directory, []).append(gone)
        return part, others

    def _is_single(self, event: Event) -> bool:
        key = event.key
        if is_record_key(key) or key in self._intents or key in self._tree.stored_records:
            return False
        names, is_marker = self._tree.keyspace.locate(key)
        directory = None if is_marker else self._find(names[:-1])
        if directory is None or names[-1] in _RESERVED:
            return False
        there = directory.children.get(names[-1])
        if there is None:
            return self._tree.returning(directory, names[-1]) is None
        return (
            isinstance(there, File) and there.stored_record is None and self._tree.may_follow(there)
        )

    def doubt(self, directory: Directory) -> None:
        """Have `finish` look whether a directory is still there."""
        self._doubtful.add(directory)

    def finish(self) -> Plan:
        """Decide which directories are left with nothing; each takes its parent into doubt."""
        if self._tree.complete:
            while self._doubtful:
                self._vanish_if_empty(self._doubtful.pop())
        for key in (*self._plan.stored_records, *self._with_attributes):
            self._bind(key)
        return self._plan

    # --- events -----------------------------------------------------------------------------

    def _put(self, event: KeyValue, names: tuple[bytes, ...]) -> None:
        directory = self._ensure(names[:-1])
        name = names[-1]
        child = self._child(directory, name)
        if isinstance(child, Directory):
            directory, name = child, VALUE_NAME
            child = self._child(directory, name)
        old = child if isinstance(child, File) else None
        if old is not None and self._is_behind(event, (old.key_state or NOT_IN_ETCD).mod_revision):
            return
        if old is not None:
            self._plan.keys[old] = event.key
        key_state = key_state_of(event)
        intent = self._own_intent(event, directory, name)
        if intent is not None and intent.file is not None:
            file = intent.file
            self._plan.key_state[file] = key_state
            if old is not None and intent.replaces:
                self._remove(old)
        else:
            file = self._version_of_others(directory, name, key_state)
        self._set(directory, name, file)
        self._undress(event.key, file)

    def _version_of_others(self, directory: Directory, name: bytes, key_state: KeyState) -> File:
        """Return the file for what another client wrote: the one that is there, if it may follow.

        Or the one that the kernel still holds of a key that comes back, or else a new one.
        """
        there = self._child(directory, name)
        file = self._tree.returning(directory, name) if there is None else there
        if not isinstance(file, File) or not self._tree.may_follow(file):
            return self._tree.new_version(there if isinstance(there, File) else None, key_state)
        self._plan.key_state[file] = key_state
        self._plan.renewed.add(file)
        return file

    def _remove(self, node: Node) -> None:
        self._plan.deleted.add(node)
        self._plan.removed.add(node)

    def relocate(self, relocation: Relocation) -> bool:
        """Put nodes elsewhere with all that is below them; False if they no longer stand here."""
        for node, _, _ in relocation.places:
            if node.directory is None or self._child(node.directory, node.name) is not node:
                return False
        for directory, name in relocation.leaves:
            self._set(directory, name, None)
            self._doubtful.add(directory)
        moved = {node for node, _, _ in relocation.places}
        for node, directory, name in relocation.places:
            replaced = self._child(directory, name)
            if replaced is not None and replaced not in moved:
                self._remove(replaced)
            self._set(directory, name, node)
            if isinstance(node, Directory):
                self._where[node] = (directory, name)
        self._plan.moved |= moved
        return True

    def arrive(self, event: KeyValue, origin: int) -> None:
        """Take in a key that a relocation has put; its node is there with those moved.

        Unless what moved is a version of it that the tree did not have yet.
        """
        names, is_marker = self._tree.keyspace.locate(event.key)
        if is_marker:
            self._arrive_marker(event, names, origin)
            return
        above = self._find(names[:-1])
        node = None if above is None else self._child(above, names[-1])
        if isinstance(node, Directory):
            node = self._child(node, VALUE_NAME)
        if isinstance(node, File) and self._is_version(node, origin):
            self._plan.key_state[node] = key_state_of(event)
            self._undress(event.key, node)
        elif self._tree.complete or node is not None:
            self._put(event, names)

    def _arrive_marker(self, event: KeyValue, names: tuple[bytes, ...], origin: int) -> None:
        directory = self._find(names)
        shown = None if directory is None else self._child(directory, MARKER_NAME)
        is_known = isinstance(shown, File) and self._is_version(shown, origin)
        if directory is None or (event.value and not is_known):
            self._marker(event, names)
            return
        self._plan.markers[directory] = key_state_of(event)
        self._undress(event.key, directory)
        if isinstance(shown, File) and is_known:
            self._plan.key_state[shown] = key_state_of(event)

    def _is_version(self, file: File, mod_revision: int) -> bool:
        key_state = self._key_state_of(file)
        return key_state is not None and key_state.mod_revision == mod_revision

    def _own_intent(self, event: KeyValue, directory: Directory, name: bytes) -> Intent | None:
        """Return the intent that a put fulfils, if this mount made it.

        Another client may put the very value that a rename of ours is about to put. A file that
        stands under another name is moved only by the revision that takes it away there, or it
        would stand under both.
        """
        intent = self._intents.get(event.key)
        if intent is None or intent.file is None or intent.value != event.value:
            return None
        file = intent.file
        if file.directory is None or (file.directory is directory and file.name == name):
            return intent
        leaves = (self._tree.key_of(file), event.mod_revision) in self._deletions
        return intent if leaves else None

    def _delete(self, event: Tombstone, names: tuple[bytes, ...]) -> None:
        directory = self._find(names[:-1])
        if directory is None:
            return
        name = names[-1]
        child = self._child(directory, name)
        if isinstance(child, Directory):
            directory, name = child, VALUE_NAME
            child = self._child(directory, name)
        if not isinstance(child, File):
            return
        if child.key_state is None and event.key not in self._own_puts:
            return  # made here and not yet published: not what was deleted
        if self._is_behind(event, (child.key_state or NOT_IN_ETCD).mod_revision):
            return
        intent = self._intents.get(event.key)
        if intent is None:
            self._plan.deleted.add(child)
        elif intent.file is not child:
            self._remove(child)
        self._plan.keys[child] = event.key
        self._set(directory, name, None)
        self._doubtful.add(directory)

    def _marker(self, event: Event, names: tuple[bytes, ...]) -> None:
        if isinstance(event, Tombstone):
            found = self._find(names)
            if found is None or self._is_behind(event, self._marker_revision(found)):
                return
            self._plan.markers[found] = None
            self._undress(event.key, found)
            self._drop_marker_file(found)
            self._doubtful.add(found)
            return
        directory = self._ensure(names)
        if self._is_behind(event, self._marker_revision(directory)):
            return
        key_state = self._plan.markers[directory] = key_state_of(event)
        self._undress(event.key, directory)
        intent = self._own_intent(event, directory, MARKER_NAME)
        if not event.value:
            self._drop_marker_file(directory, None if intent is None else intent.file)
            return
        if intent is not None and intent.file is not None:
            self._plan.key_state[intent.file] = key_state
            self._set(directory, MARKER_NAME, intent.file)
        else:
            made = self._version_of_others(directory, MARKER_NAME, key_state)
            self._set(directory, MARKER_NAME, made)

    def _drop_marker_file(self, directory: Directory, own: File | None = None) -> None:
        shown = self._child(directory, MARKER_NAME)
        if isinstance(shown, File) and (shown.key_state is not None or shown is own):
            self._plan.deleted.add(shown)
            self._set(directory, MARKER_NAME, None)

    # --- attributes -------------------------------------------------------------------------

    def _stored_record(self, event: Event) -> None:
        owner = owner_of(event.key)
        if not self._tree.attributes or owner not in self._tree.keyspace:
            return
        known = self._tree.stored_records.get(owner)
        if known is not None and self._is_behind(event, known.key_state.mod_revision):
            return
        value = event.value if isinstance(event, KeyValue) else None
        if (event.key, value) in self._tree.own_records:
            self._own_records.add(owner)
        else:
            self._own_records.discard(owner)
        self._plan.stored_records[owner] = (
            stored_record_of(event) if isinstance(event, KeyValue) else None
        )

    def _undress(self, key: bytes, node: Node) -> None:
        """Have `finish` look which attributes hold now; most keys have none."""
        if node.stored_record is not None or key in self._tree.stored_records:
            self._with_attributes.add(key)

    def _bind(self, key: bytes) -> None:
        node = self._node_of(key)
        if node is None:
            return
        key_state = self._key_state_of(node)
        stored_record = self._stored_record_of(key, node)
        if stored_record is not None and not holds(stored_record, key_state):
            stored_record = None
        if (
            isinstance(node, File)
            and key_state is not None
            and type_of(stored_record) != type_of(node.stored_record)
        ):
            node = self._of_another_type(node, key, key_state)
        if is_news(stored_record, node, key_state):
            self._plan.with_record[node] = stored_record
            if key in self._own_records:
                self._plan.own_records.add(node)

    def _stored_record_of(self, key: bytes, node: Node) -> StoredRecord | None:
        if key in self._plan.stored_records:
            return self._plan.stored_records[key]
        return self._tree.stored_records.get(key) if self._tree.complete else node.stored_record

    def _key_state_of(self, node: Node) -> KeyState | None:
        if isinstance(node, Directory):
            return self._plan.markers.get(node, node.marker)
        return self._plan.key_state.get(node, node.key_state)

    def _of_another_type(self, file: File, key: bytes, key_state: KeyState) -> File:
        """Give a file that becomes a symbolic link, say, a new inode if the kernel knows it."""
        if file.lookups == 0:
            return file
        names, _ = self._tree.keyspace.locate(key)
        directory = self._find(names[:-1])
        assert directory is not None, "the file was found there"
        name, child = names[-1], self._child(directory, names[-1])
        if isinstance(child, Directory):
            directory, name = child, VALUE_NAME
        self._plan.renewed.discard(file)
        self._plan.key_state.pop(file, None)
        made = self._tree.new_version(file, key_state)
        self._set(directory, name, made)
        return made

    def _node_of(self, key: bytes) -> Node | None:
        names, is_marker = self._tree.keyspace.locate(key)
        if not names:
            return self._tree.root
        directory = self._find(names[:-1])
        node = None if directory is None else self._child(directory, names[-1])
        if is_marker:
            return node if isinstance(node, Directory) else None
        return self._child(node, VALUE_NAME) if isinstance(node, Directory) else node

    # --- directories that come and go -------------------------------------------------------

    def _ensure(self, names: tuple[bytes, ...]) -> Directory:
        directory = self._tree.root
        for name in names:
            child = self._child(directory, name)
            if not isinstance(child, Directory):
                made = self._tree.directory_at(directory, name)
                self._where[made] = (directory, name)
                if child is not None:  # `a` is a key and `a/b` becomes one
                    self._set(made, VALUE_NAME, child)
                self._set(directory, name, made)
                child = made
            directory = child
        return directory

    def _find(self, names: tuple[bytes, ...]) -> Directory | None:
        directory = self._tree.root
        for name in names:
            child = self._child(directory, name)
            if not isinstance(child, Directory):
                return None
            directory = child
        return directory

    def _vanish_if_empty(self, directory: Directory) -> None:
        place = self._place(directory)
        if place is None or self._plan.markers.get(directory, directory.marker) is not None:
            return
        if not self._is_empty_but_for_value(directory):
            return
        parent, name = place
        value = self._child(directory, VALUE_NAME)
        if value is not None:  # only the value of `a` is left: `a` is a file again
            self._set(directory, VALUE_NAME, None)
        self._set(parent, name, value)
        self._doubtful.add(parent)

    def _place(self, directory: Directory) -> tuple[Directory, bytes] | None:
        if directory in self._where:
            parent, name = self._where[directory]
        elif directory.directory is not None:
            parent, name = directory.directory, directory.name
        else:
            return None
        return (parent, name) if self._child(parent, name) is directory else None

    def _is_empty_but_for_value(self, directory: Directory) -> bool:
        sheet = self._plan.entries.get(directory, {})
        if directory in self._under:
            sheet = self._under[directory] | sheet
            if not any(sheet.values()) and sheet.keys() >= directory.children.keys():
                return True
        if any(node is not None and name != VALUE_NAME for name, node in sheet.items()):
            return False
        return not any(
            name not in sheet and name != VALUE_NAME and not _is_bare(node)
            for name, node in directory.children.items()
        )

    # --- the sheet --------------------------------------------------------------------------

    def _child(self, directory: Directory, name: bytes) -> Node | None:
        sheet = self._plan.entries.get(directory)
        if sheet is not None and name in sheet:
            return sheet[name]
        if directory in self._under and name in self._under[directory]:
            return self._under[directory][name]
        return directory.children.get(name)

    def _set(self, directory: Directory, name: bytes, node: Node | None) -> None:
        self._plan.entries.setdefault(directory, {})[name] = node

    def _is_behind(self, event: Event, known: int) -> bool:
        return event.mod_revision <= known and not self._force

    def _marker_revision(self, directory: Directory) -> int:
        marker = self._plan.markers.get(directory, directory.marker)
        return 0 if marker is None else marker.mod_revision


def _is_bare(node: Node) -> bool:
    """Tell whether a node is nothing but a directory that no key is of, made here."""
    return isinstance(node, Directory) and node.marker is NOT_IN_ETCD and not node.children
