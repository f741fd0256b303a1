"""Turning a batch of etcd's events into one step of the tree.

Knows: how events change names, and which of the kernel's cached answers that makes untrue. Does not
know: how the kernel is told, where events come from.

`plan` works out, without touching the tree, what every name becomes once the batch is applied.
The plan is exact: a name whose node stays the same is not in it, so the kernel is told of nothing
that did not change. `apply` carries a plan out. Between the two the caller tells the kernel
(see `etcdfs.mirror.applier`); since anything may happen to the tree meanwhile, it plans again
right before it publishes, with no `await` in between.

Changes that this mount made itself are recognised by their *intent*: a key, the value put there
and the file that carries it. An event that says the same keeps the file's inode. Nodes that
change their place are recognised by their *relocation*, whatever is below them.

Concurrency: synchronous; used on the trio thread only.
"""

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, final

from etcdfs.keyspace.keys import VALUE_NAME
from etcdfs.keyspace.store import Event, KeyValue, Operation
from etcdfs.keyspace.transactions import records_written
from etcdfs.tree.changes import Intent, Part, Plan, Planner, Relocation
from etcdfs.tree.inodes import (
    Cached,
    CachedAttributes,
    Content,
    Dentry,
    Directory,
    Expiry,
    File,
    Node,
    StoredRecord,
    is_local,
)
from etcdfs.tree.node_attributes import NOTHING, bind, is_mtime_true, record_of
from etcdfs.tree.tree import Tree


@final
class Update:
    """Plans and publishes batches on one tree, and keeps the intents of this mount."""

    def __init__(self, tree: Tree) -> None:
        # --- dependencies
        self.tree = tree
        # --- mutable state
        self.intents: dict[bytes, Intent] = {}
        self.relocations: list[Relocation] = []
        # Names whose directory the kernel holds locked for a call of this mount: it puts them
        # right by itself when the call returns, and waits for nobody until then.
        self.locked: dict[Dentry, int] = {}
        # Changes of this mount that were applied before the watch brought them, by key.
        self._ahead: dict[bytes, int] = {}

    def plan(self, events: Iterable[Event], *, force: bool = False) -> Plan:
        """Work out what `events` (oldest first) make of the tree; changes nothing.

        An event older than what the tree has is ignored, unless by `force`: a new listing is
        right even if it shows older revisions (another history).
        """
        planner = Planner(self.tree, self.intents, force=force)
        events = tuple(events)
        planner.note(events)
        for relocation in self.relocations:
            events = self._relocate(planner, relocation, events, force=force)
        self._add(planner, events, force=force)
        return planner.finish()

    def plan_part(
        self, events: Iterable[Event], apart: Container[bytes], *, force: bool
    ) -> tuple[Part, list[Event]]:
        """Plan some events of a large batch by themselves; see `Planner.part`.

        It holds until something changes that it depends on, or that this mount intends.
        """
        planner = Planner(self.tree, self.intents, force=force)
        return planner.part((e for e in events if self._is_wanted(e, force=force)), apart)

    def holds(self, part: Part) -> bool:
        """Tell whether what was planned of part of a batch is still right."""
        changed = self.tree.disturbed
        assert changed is not None, "nobody has noted what changes"
        return changed.isdisjoint(part.depends) and part.events.keys().isdisjoint(self.intents)

    def plan_rest(self, events: Iterable[Event], parts: Sequence[Part], *, force: bool) -> Plan:
        """Plan what is left of a large batch, with its parts as if they were published."""
        planner = Planner(self.tree, self.intents, force=force, under=parts)
        events = tuple(events)
        planner.note(events)
        self._add(planner, events, force=force)
        for part in parts:
            for directory in part.doubtful:
                planner.doubt(directory)
        return planner.finish()

    def _relocate(
        self,
        planner: Planner,
        relocation: Relocation,
        events: tuple[Event, ...],
        *,
        force: bool,
    ) -> tuple[Event, ...]:
        """Plan a move of this mount if it is among the events; return those that are left."""
        revision = relocation.revision_in(events)
        if not revision or revision <= self._ahead.get(next(iter(relocation.values)), 0):
            return events
        earlier = tuple(event for event in events if event.mod_revision < revision)
        own = [event for event in events if event.mod_revision == revision]
        self._add(planner, earlier, force=force)
        if planner.relocate(relocation):
            for event in own:
                if event.key in relocation.values and isinstance(event, KeyValue):
                    planner.arrive(event, relocation.origins[event.key])
            done = relocation.gone | relocation.values.keys()
            own = [event for event in own if event.key not in done]
        return (*own, *(event for event in events if event.mod_revision > revision))

    def _add(self, planner: Planner, events: tuple[Event, ...], *, force: bool) -> None:
        last = {event.key: event for event in events}
        for event in last.values():
            if self._is_wanted(event, force=force):
                planner.add(event)

    def _is_wanted(self, event: Event, *, force: bool) -> bool:
        return force or event.mod_revision > self._ahead.get(event.key, 0)

    def is_moving(self, node: Node) -> bool:
        """Tell whether this mount is moving a node, or a directory that it is in."""
        moving = {node for relocation in self.relocations for node, _, _ in relocation.places}
        at: Node | None = node
        while at is not None and at not in moving:
            at = at.directory
        return at is not None

    def uncacheable(self, plan: Plan) -> set[Cached]:
        """Return what must not be answered with a lifetime while the update is under way."""
        touched: set[Cached] = set()
        directories: set[Directory] = set()  # one may have 200 000 changes in it
        for directory, name, before, after in plan.changes():
            touched.add(Dentry(directory.inode, name))
            touched.add(_of_name(directory, name, before, after))
            if not plan.is_version(before, after):
                directories.add(directory)
            touched |= _orphaned(plan, before)
            if isinstance(before, Directory):
                directories.add(before)
        touched.update(map(self.tree.listing_of, directories))
        for file in plan.renewed:
            touched |= self._of_version(file)
        for node in plan.with_record:
            listing = self.tree.listing_of(node)
            touched.add(listing)
            if listing.within is not None:
                touched.add(listing.within)
        return touched

    def invalidations(self, plan: Plan) -> set[Cached]:
        """Return which of the kernel's cached answers the plan makes untrue."""
        stale: set[Cached] = set()
        directories: set[Directory] = set()
        for directory, name, before, after in plan.changes():
            stale |= _orphaned(plan, before)
            if self.locked and Dentry(directory.inode, name) in self.locked:
                continue
            if self.tree.may_be_cached(directory, name):
                stale.add(_of_name(directory, name, before, after))
            if directory.kernel_may_cache and not plan.is_version(before, after):
                directories.add(directory)
        stale.update(map(self.tree.listing_of, directories))
        for file in plan.renewed:
            stale |= self._of_version(file) - {self.tree.listing_of(file).within}
        for node in plan.with_record:
            if node.kernel_may_cache:
                # A directory's mtime may be set to what it was when the kernel kept its listing.
                is_listed = isinstance(node, Directory)
                stale.add(self.tree.listing_of(node)._replace(pages=is_listed))
        return stale

    def _of_version(self, file: File) -> set[Cached]:
        """Return what the kernel has of the version that a file was, if it has anything."""
        if not file.lookups:
            return set()
        listing = self.tree.listing_of(file)
        has: Cached = listing._replace(pages=file.pages is not None)
        if self.tree.unseen.keeps(file):
            has = Content(*listing[:2])
        return {has} if listing.within is None else {has, listing.within}

    def note_invalidated(self, plan: Plan, stale: Collection[Cached]) -> None:
        """Note that the kernel is told to let go of what a plan makes untrue."""
        for file in plan.renewed:
            file.pages_invalidated |= not self._of_version(file).isdisjoint(stale)

    def note_not_invalidated(self, plan: Plan) -> None:
        """Note that it may have pages of old versions still when the plan is made true."""
        for file in plan.renewed:
            file.pages_invalidated = False

    def apply(self, plan: Plan) -> None:
        """Make the plan true. No `await` may lie between `plan` and this."""
        tree = self.tree
        changes = list(plan.changes())
        self._take_away(plan, changes)
        for directory, name, before, after in changes:
            if after is not None:
                tree.attach(directory, name, after, as_version=plan.is_version(before, after))
        for directory, marker in plan.markers.items():
            directory.marker = marker
        for file, key_state in plan.key_state.items():
            tree.disturb(file)
            if file in plan.renewed:
                tree.renew(file, key_state)
                bind(file, file.stored_record)
                continue
            # What the kernel has cached of it is what this mount made of it.
            file.pages = key_state.mod_revision if file.pages == file.version else file.pages
            file.key_state = key_state
        self._bind(plan)

    def publish_parts(self, parts: Iterable[Part], rest: Plan) -> None:
        """Make a large batch true; no `await` may lie between its last plan and this."""
        tree = self.tree
        for part in parts:
            tree.renew_all(part.plan.key_state.items())
            for directory, files in part.gone.items():
                tree.detach_all(directory, files)
            for directory, name, node in part.made:
                tree.attach(directory, name, node)
        self.apply(rest)

    def _take_away(
        self, plan: Plan, changes: list[tuple[Directory, bytes, Node | None, Node | None]]
    ) -> None:
        for node in plan.removed:
            node.removed = True
        # Files leave before directories: a file's key is made from the path it still has.
        for kind in (File, Directory):
            for directory, name, before, after in changes:
                if isinstance(before, kind):
                    self.tree.detach(
                        directory,
                        name,
                        gone=before in plan.deleted,
                        key=plan.keys.get(before) if isinstance(before, File) else None,
                        is_moved=before in plan.moved,
                        as_version=plan.is_version(before, after),
                    )

    def _bind(self, plan: Plan) -> None:
        if self.tree.complete:
            for key, stored_record in plan.stored_records.items():
                if stored_record is None:
                    self.tree.stored_records.pop(key, None)
                else:
                    self.tree.stored_records[key] = stored_record
        for node, stored_record in plan.with_record.items():
            self.tree.disturb(node)
            bind(node, stored_record)
            node.ctime_ns = max(self.tree.clock(), node.ctime_ns + 1)

    def apply_ahead(self, events: Iterable[Event], *, remember: bool) -> set[Cached]:
        """Apply this mount's own change before the watch has brought it.

        With `remember`, older events of these keys that still come are then ignored, until
        `reached` says that the watch has passed them.

        Returns:
            What must be invalidated.
        """
        own = list(events)
        plan = self.plan(own)
        stale = self.invalidations(plan)
        self.apply(plan)
        if remember:
            for event in own:
                self._ahead[event.key] = max(event.mod_revision, self._ahead.get(event.key, 0))
        return stale

    def withdraw(self, directory: Directory, name: bytes, *, gone: bool) -> set[Cached]:
        """Take away a file that never reached etcd, and the directory if only that kept it.

        Returns:
            What must be invalidated, the file's own entry not included.
        """
        self.tree.detach(directory, name, gone=gone)
        planner = Planner(self.tree, self.intents, force=False)
        planner.doubt(directory)
        plan = planner.finish()
        stale = self.invalidations(plan)
        self.apply(plan)
        return stale

    # --- what this mount does itself --------------------------------------------------------

    @contextmanager
    def own(self, key: bytes, intent: Intent) -> Iterator[Intent]:
        """Have an intent known for as long as the context lasts.

        Should another call's about the same key replace it meanwhile, that one stays.
        """
        self.intents[key] = intent
        try:
            yield intent
        finally:
            if self.intents.get(key) is intent:
                del self.intents[key]

    @contextmanager
    def writing_records(self, operations: Iterable[Operation]) -> Iterator[None]:
        """Have the attributes that operations may write known as our own, as with `own`."""
        own = list(records_written(operations))
        self.tree.own_records.update(own)
        try:
            yield
        finally:
            self.tree.own_records.subtract(own)
            self.tree.own_records = +self.tree.own_records

    @contextmanager
    def moving(self, relocation: Relocation) -> Iterator[None]:
        """Have a relocation known for as long as the context lasts."""
        self.relocations.append(relocation)
        try:
            yield
        finally:
            self.relocations.remove(relocation)

    def add_local(self, directory: Directory, name: bytes, node: Node) -> None:
        """Put under a free name what no key says is there: only this mount knows of it."""
        self.tree.attach(directory, name, node)

    def remove(self, directory: Directory, name: bytes) -> None:
        """Take away what this mount has removed, and of which no event tells."""
        self.tree.detach(directory, name, gone=True)

    def restore_version(self, file: File) -> None:
        """Show the version that etcd has of an attached file under a fresh inode."""
        directory, name, key_state = file.directory, file.name, file.key_state
        assert directory is not None, "it is attached"
        assert key_state is not None, "etcd has a version"
        self.tree.detach(directory, name, gone=False)
        self.tree.attach(directory, name, self.tree.new_version(file, key_state))

    # --- what etcd was asked ----------------------------------------------------------------

    def replace(
        self, directory: Directory, name: bytes, node: Node | None, over: KeyValue | None = None
    ) -> None:
        """Put a node under a name, in place of what is there; None: nothing is there.

        Args:
            directory: Where the name is.
            name: The name.
            node: What is there from now on.
            over: The key that a new version of a file stands for.
        """
        tree = self.tree
        old = directory.children.get(name)
        times = directory.mtime_ns, directory.ctime_ns
        has_times = _has_times_of(directory, old, node)
        if old is not None:
            known = old.key_state if isinstance(old, File) else None
            # Nothing there, or the key made anew: the old file is deleted. Else: superseded.
            # Below a key that became a directory, it goes on as the directory's `%value`.
            gone = (over is None and not isinstance(node, Directory)) or (
                over is not None
                and known is not None
                and known.create_revision != over.create_revision
            )
            if isinstance(old, Directory):
                self._empty(old)
            tree.detach(directory, name, gone=gone)
        names = tree.names(directory, name)
        if node is None:
            tree.times.drop(names)
        else:
            is_known = tree.times.restore(names, node)
            tree.attach(directory, name, node, as_version=is_known)
        if has_times:
            directory.mtime_ns, directory.ctime_ns = times
        if isinstance(node, Directory) and isinstance(old, File) and is_local(old):
            tree.attach(node, VALUE_NAME, old)

    def collapse(self, directory: Directory) -> None:
        """Put the `%value` of what is no directory any more where the directory was."""
        parent, value = directory.directory, directory.children[VALUE_NAME]
        assert parent is not None
        self.tree.detach(directory, VALUE_NAME, gone=False)
        self.replace(parent, directory.name, value)

    def _empty(self, directory: Directory) -> None:
        """Detach all below a directory that etcd has no more: its files' keys are gone.

        While it is still attached: a file's key is made from the path it has.
        """
        for below in reversed(list(self.tree.directories(directory))):
            for name, child in list(below.children.items()):
                is_new = isinstance(child, File) and child.key_state is None
                self.tree.detach(below, name, gone=not is_new)

    def relisted(self) -> None:
        """Forget what was applied ahead: in another history it means nothing."""
        self._ahead.clear()

    def reached(self, revision: int) -> None:
        """Forget what was applied ahead of the watch and is behind it now."""
        if self._ahead:
            self._ahead = {k: r for k, r in self._ahead.items() if r > revision}


def _of_name(directory: Directory, name: bytes, before: Node | None, after: Node | None) -> Cached:
    """Return how to tell the kernel that a name is something else, or nothing, from now on.

    A directory that is gone may be there again soon, and something may be mounted on it.
    """
    entry = Dentry(directory.inode, name)
    return Expiry(entry) if isinstance(before, Directory) and after is None else entry


def _orphaned(plan: Plan, node: Node | None) -> set[Cached]:
    """Return the attributes of what leaves the tree and may be held: it has no links then.

    Without its name: nobody's lock is needed, not even of a call that is taking it away as well.
    """
    if node is None or node in plan.moved:
        return set()
    is_in_use = isinstance(node, Directory) or node.kernel_may_cache or node.handles
    return {CachedAttributes(node.inode, None)} if is_in_use else set()


def _has_times_of(directory: Directory, old: Node | None, new: Node | None) -> bool:
    """Tell whether a directory's times stay when `new` is found in it where `old` was.

    They do when it is only another version of a file. And whoever set them set them for what was
    there then, although this mount hears of some of it only now: of what is gone it cannot tell
    when that was, unless it was there at a listing after the times were set.
    """
    if isinstance(old, File) and isinstance(new, File):
        is_made_anew = (
            old.key_state
            and new.key_state
            and old.key_state.create_revision != new.key_state.create_revision
        )
        return not is_made_anew
    if directory.stored_record is None or not is_mtime_true(directory):
        return False
    made = directory.listed
    if isinstance(new, File) and new.key_state is not None:
        made = new.key_state.create_revision
    return made < directory.stored_record.key_state.mod_revision


# --- what other clients change ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NameChange:
    """What becomes of a name.

    Attributes:
        directory: Where it is; of the root itself, the root.
        name: The name; of the root itself, a dot.
        before: What stood there.
        after: What stands there then; the same node as before if that got other content.
        is_of_attributes: Whether it got nothing but other attributes.
    """

    directory: Directory
    name: bytes
    before: Node | None
    after: Node | None
    is_of_attributes: bool = False


def changes_of_others(plan: Plan, locked: Container[Dentry]) -> Iterator[NameChange]:
    """Yield what other clients change by a plan: Linux itself tells of what this mount does.

    Calls of this mount that are under way change the names that are `locked`.
    """
    for directory, name, before, after in plan.changes():
        is_directory = isinstance(before, Directory) or isinstance(after, Directory)
        is_own = is_directory and Dentry(directory.inode, name) in locked
        if not (is_own or _is_own(plan, before, after)):
            yield NameChange(directory=directory, name=name, before=before, after=after)
    yield from _renewals(plan)
    if plan.with_record:
        yield from _attribute_changes(plan)


def _attribute_changes(plan: Plan) -> Iterator[NameChange]:
    arrived = {after for _, _, _, after in plan.changes()}
    for node, stored_record in plan.with_record.items():
        is_others = node not in plan.own_records and node not in arrived
        if is_others and _has_others(node, stored_record):
            yield NameChange(
                directory=node.directory or cast("Directory", node),
                name=b"." if node.directory is None else node.name,
                before=node,
                after=node,
                is_of_attributes=True,
            )


def _has_others(node: Node, stored_record: StoredRecord | None) -> bool:
    """Tell whether attributes that a node is to have are others; one put ends a time that was set."""
    before = record_of(node)
    after = NOTHING if stored_record is None else stored_record.record
    return after != (before if after.mtime_ns is not None else before.without_mtime())


def changes_of_part(part: Part) -> Iterator[NameChange]:
    """Yield what part of a large batch changes: nothing of it comes from this mount.

    It may be called when the part is visible, too: going through very many names takes long.
    """
    for directory, name, node in part.made:
        yield NameChange(directory=directory, name=name, before=None, after=node)
    for directory, files in part.gone.items():
        for name, file, _ in files:
            yield NameChange(directory=directory, name=name, before=file, after=None)
    made = {node for _, _, node in part.made}
    yield from (change for change in _renewals(part.plan) if change.after not in made)


def _renewals(plan: Plan) -> Iterator[NameChange]:
    for file in plan.renewed:
        # One that comes back is among the names.
        if file.directory is not None and file.directory.children.get(file.name) is file:
            yield NameChange(directory=file.directory, name=file.name, before=file, after=file)


def _is_own(plan: Plan, before: Node | None, after: Node | None) -> bool:
    if after is not None:
        return after in plan.moved or _is_own_put(plan, after)
    if before in plan.moved or before in plan.removed:
        return True
    return before not in plan.deleted and _is_own_put(plan, before)  # it stands elsewhere then


def _is_own_put(plan: Plan, node: Node | None) -> bool:
    return isinstance(node, File) and node in plan.key_state and node not in plan.renewed
