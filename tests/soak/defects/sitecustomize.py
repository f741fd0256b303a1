"""Plants one defect in the daemon: the negative controls of the soak (see `controls.py`).

Python imports a module of this name before anything else; the soak puts this directory first on
the daemon's PYTHONPATH and the defect's name into SOAK_DEFECT. When the module that a defect
belongs to has been imported, it is patched. etcdfs itself knows nothing of any of this.

Concurrency: patches run where what they replace would run.
"""

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from itertools import count
from types import ModuleType
from typing import Any

Patch = Callable[[Any], None]

DEFECTS: dict[str, tuple[str, Patch]] = {}


def defect(name: str, module: str) -> Callable[[Patch], Patch]:
    """Register what patches a module."""

    def register(patch: Patch) -> Patch:
        DEFECTS[name] = (module, patch)
        return patch

    return register


def replace(owner: Any, name: str, what: Any) -> None:
    """Put a defect in the place of something, which must be there."""
    if not hasattr(owner, name):
        raise RuntimeError(f"the defect has lost its place: {owner} has no {name}")
    setattr(owner, name, what)


def sometimes(every: int) -> Callable[[], bool]:
    """Return what says yes now and then."""
    numbers = count(1)
    return lambda: next(numbers) % every == 0


# --- the kernel's caches --------------------------------------------------------------------


@defect("drop-notification", "etcdfs.fuse.notify")
def drop_notification(module: Any) -> None:
    """Some invalidations are forgotten."""
    original, now = module.KernelCache.submit, sometimes(10)

    def submit(self: Any, cached: Any, done: Any = None) -> None:
        original(self, () if cached and now() else cached, done)

    replace(module.KernelCache, "submit", submit)
    replace(module.KernelCache, "at_once", lambda *_: False)


@defect("early-publish", "etcdfs.fuse.notify")
def early_publish(module: Any) -> None:
    """The new state is published before the kernel has let go of the old."""
    original = module.KernelCache.submit

    def submit(self: Any, cached: Any, done: Any = None) -> None:
        if done is not None:
            done()
        original(self, cached, None)

    replace(module.KernelCache, "submit", submit)
    replace(module.KernelCache, "at_once", lambda *_: False)


@defect("negative-entries", "etcdfs.tree.update")
def negative_entries(module: Any) -> None:
    """A name that was missing is not invalidated when it appears."""
    original = module.Update.invalidations

    def invalidations(self: Any, plan: Any) -> Any:
        appearing = {
            module.Dentry(directory.inode, name)
            for directory, name, before, _ in plan.changes()
            if before is None
        }
        return original(self, plan) - appearing

    replace(module.Update, "invalidations", invalidations)


@defect("keep-cache-always", "etcdfs.tree.update")
def keep_cache_always(module: Any) -> None:
    """A version that another client wrote keeps what the kernel has of the old, pages and all."""
    original = module.Tree.renew

    def renew(self: Any, file: Any, key_state: Any) -> None:
        stored = file.pages_pushed
        original(self, file, key_state)
        file.pages, file.pages_pushed = key_state.mod_revision, stored

    replace(module.Update, "_of_version", lambda _self, _file: set())
    replace(module.Tree, "renew", renew)


# --- the state machine ----------------------------------------------------------------------------


@defect("no-deduplication", "etcdfs.tree.changes")
def no_deduplication(module: Any) -> None:
    """Events that were applied before are applied again."""
    state_machine: Any = importlib.import_module("etcdfs.mirror.state_machine")
    original = state_machine.StateMachine._on_events

    def on_events(self: Any, events: Any) -> Any:
        steps = original(self, events)
        if steps or not events:
            return steps
        return (state_machine.Apply(events, events[-1].mod_revision),)

    replace(state_machine.StateMachine, "_on_events", on_events)
    replace(module.Planner, "_is_behind", lambda _self, _event, _known: False)


@defect("out-of-order", "etcdfs.mirror.state_machine")
def out_of_order(module: Any) -> None:
    """Some batches are applied after newer ones."""
    original, now = module.StateMachine.receive, sometimes(10)
    kept: list[Any] = []
    left = [0]

    def receive(self: Any, message: Any) -> Any:
        steps = original(self, message)
        if len(steps) != 1 or not isinstance(steps[0], module.Apply):
            return steps
        if kept:
            left[0] -= 1
            if left[0] == 0:
                late = tuple(kept)
                kept.clear()
                return (*steps, *late)
        elif now():
            kept.extend(steps)
            left[0] = 5
            return ()
        return steps

    replace(module.StateMachine, "receive", receive)


@defect("split-revision", "etcdfs.mirror.state_machine")
def split_revision(module: Any) -> None:
    """The keys of one transaction become visible one after the other."""
    original = module.StateMachine.receive

    def receive(self: Any, message: Any) -> Any:
        steps = original(self, message)
        if len(steps) == 1 and isinstance(steps[0], module.Apply):
            return tuple(module.Apply((event,), event.mod_revision) for event in steps[0].events)
        return steps

    replace(module.StateMachine, "receive", receive)


@defect("no-witness", "etcdfs.mirror.messages")
def no_witness(module: Any) -> None:
    """After a break, any history is believed to be the one that was known."""
    replace(module.HistoryCheck, "holds", lambda _self, _page: True)


@defect("resume-too-late", "etcdfs.mirror.state_machine")
def resume_too_late(module: Any) -> None:
    """A watch that is resumed leaves out what happened meanwhile."""
    original = module.StateMachine._open

    def open_(self: Any) -> Any:
        step = original(self)
        # From 0 on, etcd takes for: from now on.
        return module.OpenWatch(module.Revision(0)) if self._resuming else step

    replace(module.StateMachine, "_open", open_)


# --- the mirror -----------------------------------------------------------------------------


@defect("no-diff", "etcdfs.mirror.mirror")
def no_diff(module: Any) -> None:
    """What a new listing shows to be different is not applied."""

    async def differences(_self: Any, _revision: int) -> list[Any]:
        return []

    replace(module.Staging, "differences", differences)


@defect("lying-wait", "etcdfs.mirror.mirror")
def lying_wait(module: Any) -> None:
    """A revision is said to be shown when it is not."""

    async def reached(self: Any, revision: int) -> None:
        return None

    replace(module.Mirror, "reached", reached)


# --- the door to etcd -----------------------------------------------------------------------


@defect("retry-write", "etcdfs.etcd.client")
def retry_write(module: Any) -> None:
    """A write whose answer was lost is sent again."""
    original = module.EtcdStore.commit

    async def commit(self: Any, transaction: Any) -> Any:
        try:
            return await original(self, transaction)
        except module.OutcomeUnknownError:
            return await original(self, transaction)

    replace(module.EtcdStore, "commit", commit)


@defect("wrong-range-end", "etcdfs.etcd.client")
def wrong_range_end(module: Any) -> None:
    """The watch ends before the prefix does."""
    original = module.EtcdStore.watch

    def watch(self: Any, start: bytes, end: bytes, from_revision: int) -> Any:
        return original(self, start, b"/soak/s/5", from_revision)

    replace(module.EtcdStore, "watch", watch)


@defect("no-hasleader", "etcdfs.etcd.connection")
def no_hasleader(module: Any) -> None:
    """A member that has lost its leader is not asked to say so."""
    replace(module, "_HAS_LEADER", ("says-nothing", "true"))


# --- the publisher --------------------------------------------------------------------------


@defect("lost-acknowledgement", "etcdfs.files.writeback")
def lost_acknowledgement(module: Any) -> None:
    """Some writes are reported as done and never sent."""
    original, now = module.Writeback.write_back, sometimes(10)

    async def write_back(self: Any, file: Any) -> None:
        buffer = file.buffer
        if isinstance(buffer, module.WriteBuffer) and buffer.is_dirty and now():
            buffer.written_back(buffer.value)
            return
        await original(self, file)

    replace(module.Writeback, "write_back", write_back)


@defect("blind-overwrite", "etcdfs.files.writeback")
def blind_overwrite(module: Any) -> None:
    """An append or a partial overwrite does not look whether the key has changed."""
    original = module.unchanged

    def unchanged(key: bytes, mod_revision: int) -> Any:
        condition = original(key, mod_revision)
        return dataclasses.replace(condition, field="version", operator=">", number=-1)

    replace(module, "unchanged", unchanged)


# --- who watches through inotify ------------------------------------------------------------


@defect("event-before-content", "etcdfs.mirror.applier")
def event_before_content(module: Any) -> None:
    """Who watches hears of a version a moment before it can be read."""
    original = module.Applier.take

    async def take(self: Any, events: Any, stored_records: Any = ()) -> None:
        if self.observe is not None:
            changes = module.changes_of_others(self._update.plan(events), self._update.locked)
            note = self.observe(changes)
            if note is not None:
                note()
                await module.trio.sleep(0.01)
        await original(self, events, stored_records)

    replace(module.Applier, "take", take)
    replace(module.Applier, "_observed", lambda _self, _plan, _parts=(): None)


@defect("lost-event", "etcdfs.fuse.replay")
def lost_event(module: Any) -> None:
    """Some replays are not made."""
    original, now = module.Replayer.perform, sometimes(5)

    def perform(self: Any, replayed: Any) -> None:
        if not now():
            original(self, replayed)

    replace(module.Replayer, "perform", perform)


@defect("event-twice", "etcdfs.fuse.replay")
def event_twice(module: Any) -> None:
    """Each replay is made twice."""
    original = module.Replayer.perform

    def perform(self: Any, replayed: Any) -> None:
        original(self, replayed)
        with contextlib.suppress(OSError):
            original(self, replayed)

    replace(module.Replayer, "perform", perform)


@defect("replay-reaches-etcd", "etcdfs.fuse.replay")
def replay_reaches_etcd(module: Any) -> None:
    """Some replays are taken for writes of a program's, and put what is there once more."""
    store_module: Any = importlib.import_module("etcdfs.keyspace.store")
    trio: Any = importlib.import_module("trio")
    original, now = module.Replayer._open, sometimes(10)

    async def put(store: Any, key: bytes) -> None:
        for entry in (await store.range(key)).entries:
            again = store_module.Put(key, entry.value)
            await store.commit(store_module.Transaction((), (again,)))

    def open_(self: Any, replayed: Any, inode: int, flags: int) -> Any:
        key = self._tree.key_of(self._file(replayed, inode))
        if now() and key is not None:
            trio.lowlevel.spawn_system_task(put, self._filesystem._store, key)
        return original(self, replayed, inode, flags)

    replace(module.Replayer, "_open", open_)


# --- planting -------------------------------------------------------------------------------


class _Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module as everybody else does, and patches it once it has run."""

    def __init__(self, module: str, patch: Patch) -> None:
        self._module = module
        self._patch = patch
        self._loader: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)


_wanted = os.environ.get("SOAK_DEFECT")
if _wanted is not None:
    sys.meta_path.insert(0, _Planter(*DEFECTS[_wanted]))
