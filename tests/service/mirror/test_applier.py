"""How batches become visible when the kernel takes its time, and how a backlog collapses."""

import gc
from collections.abc import Callable, Collection

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import Event, KeyValue, Revision, Tombstone
from etcdfs.mirror import applier as applier_module
from etcdfs.mirror.applier import LARGE, PART_KEYS, WAITING_MAX, Applier
from etcdfs.mirror.messages import BATCH_KEYS
from etcdfs.tree.bulk_load import load
from etcdfs.tree.changes import Intent, Planner
from etcdfs.tree.inodes import Cached, Content, Dentry, Directory, File, Inode
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import Update
from etcdfs.tree.value_cache import ValueCache


class SlowKernel:
    """Lets go of something when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[set[Cached], Callable[[], None] | None]] = []
        self.is_slow = True
        self.unopened: set[Inode] = set()

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        if cached and self.is_slow:
            self.asked.append((set(cached), done))
        elif done is not None:
            done()

    def at_once(self, cached: Collection[Cached]) -> bool:
        return False

    def listen(self, listener: Callable[[Inode | None, float | None], None]) -> None:
        raise NotImplementedError

    def invalidate(self) -> None:
        asked, self.asked = self.asked, []
        for _, done in asked:
            if done is not None:
                done()


class Rig:
    """An applier on a tree with some files that the kernel knows."""

    def __init__(self, *names: bytes) -> None:
        self.tree = Tree(Keyspace(b"/"), lambda: 1, complete=True)
        load(self.tree, [put(name, 1) for name in names])
        for node in self.tree.root.children.values():
            self.tree.remember(node)
            node.kernel_may_cache = True
        self.kernel = SlowKernel()
        self.failures = 0
        self.update = Update(self.tree)
        self.value_cache = ValueCache(1 << 20)
        self.applier = Applier(self.update, self.value_cache, self.kernel, self._fail)

    def _fail(self) -> None:
        self.failures += 1

    def shown(self, name: bytes) -> int:
        file = self.tree.root.children[name]
        assert isinstance(file, File)
        assert file.key_state is not None
        return file.key_state.mod_revision


def put(name: bytes, revision: int) -> KeyValue:
    return KeyValue(b"/" + name, b"%d" % revision, Revision(1), Revision(revision), revision)


def gone(name: bytes, revision: int) -> Tombstone:
    return Tombstone(b"/" + name, Revision(revision))


async def test_values_that_nobody_can_ask_for_are_let_go(autojump_clock: MockClock) -> None:
    rig = Rig(b"hot", b"open", b"deleted")
    rig.kernel.is_slow = False
    await rig.applier.take([put(name, 2) for name in (b"hot", b"open", b"deleted")])
    held = rig.tree.root.children[b"open"]
    assert isinstance(held, File)
    held.handles = 1
    for revision in range(3, 20):
        await rig.applier.take([put(b"hot", revision)])
    await rig.applier.take([put(b"open", 20), gone(b"deleted", 20)])
    # The one before may be wanted by a call that has found it already.
    kept = [(b"hot", 19), (b"hot", 18), (b"open", 2), (b"open", 20), (b"deleted", 2)]
    for name in (b"hot", b"open", b"deleted"):
        for revision in range(1, 21):
            value = rig.value_cache.get(b"/" + name, Revision(revision))
            assert (value is not None) == ((name, revision) in kept)


async def test_a_batch_is_shown_when_the_kernel_has_let_go(autojump_clock: MockClock) -> None:
    rig = Rig(b"a", b"b")
    await rig.applier.take([put(b"a", 2), put(b"b", 2)])
    assert (rig.shown(b"a"), rig.shown(b"b"), rig.applier.revision) == (1, 1, 0)
    files = [rig.tree.root.children[name] for name in (b"a", b"b")]
    assert [cached for cached, _ in rig.kernel.asked] == [set(map(rig.tree.listing_of, files))]
    rig.kernel.invalidate()
    assert (rig.shown(b"a"), rig.shown(b"b"), rig.applier.revision) == (2, 2, 2)


async def test_what_comes_meanwhile_is_shown_in_one_step(autojump_clock: MockClock) -> None:
    rig = Rig(b"a", b"b")
    await rig.applier.take([put(b"a", 2)])
    for revision in range(3, 1000):
        await rig.applier.take([put(b"a", revision)])
    await rig.applier.take([gone(b"b", 1000)])
    rig.kernel.invalidate()
    assert rig.shown(b"a") == rig.applier.revision == 2
    await wait_all_tasks_blocked()
    rig.kernel.invalidate()
    assert rig.shown(b"a") == 999
    assert b"b" not in rig.tree.root.children
    assert rig.applier.revision == 1000
    assert (rig.applier.batches, rig.applier.events) == (2, 999)
    assert rig.applier.collapsed == 996


async def test_a_backlog_is_bounded(autojump_clock: MockClock) -> None:
    """What does not collapse stays with etcd."""
    rig = Rig(b"a")
    await rig.applier.take([put(b"a", 2)])
    names = (b"%d" % number for number in range(10**6))
    taken = 0
    with trio.move_on_after(60) as scope:
        for revision, name in enumerate(names, 3):
            await rig.applier.take([put(name, revision)])
            taken += 1
    assert scope.cancelled_caught
    assert taken == WAITING_MAX * BATCH_KEYS
    rig.kernel.is_slow = False
    rig.kernel.invalidate()
    with trio.fail_after(60):
        await rig.applier.idle()
    assert rig.applier.revision == taken + 2
    assert rig.applier.batches == 1 + WAITING_MAX


async def test_one_revision_is_never_cut(autojump_clock: MockClock) -> None:
    rig = Rig(b"a")
    await rig.applier.take([put(b"a", 2)])
    events: list[Event] = [put(b"%d" % number, 3) for number in range(2 * BATCH_KEYS)]
    await rig.applier.take(events)
    rig.kernel.is_slow = False
    rig.kernel.invalidate()
    with trio.fail_after(60):
        await rig.applier.idle()
    assert rig.applier.batches == 2


async def test_a_call_that_holds_the_lock_is_not_waited_for(autojump_clock: MockClock) -> None:
    rig = Rig(b"a")
    await rig.applier.take([put(b"a", 2)])
    with rig.applier.invalidator.holding([Dentry(rig.tree.root.inode, b"x")]):
        assert rig.shown(b"a") == 2
    assert rig.applier.early == 1
    rig.kernel.invalidate()  # late, and nobody cares
    assert rig.applier.batches == 1


async def test_after_a_failure_nothing_is_shown_before_a_new_listing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier_module.log, "exception", lambda *_: None)
    rig = Rig(b"a")
    plan = rig.update.plan
    monkeypatch.setattr(rig.update, "plan", lambda *_, **__: 1 / 0)
    await rig.applier.take([put(b"a", 2)])
    assert rig.failures == 1
    monkeypatch.setattr(rig.update, "plan", plan)
    await rig.applier.take([put(b"a", 3)])
    assert (rig.shown(b"a"), rig.applier.revision) == (1, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.applier.replace, [put(b"a", 3)], 3)
        await wait_all_tasks_blocked()
        rig.kernel.invalidate()
    assert (rig.shown(b"a"), rig.applier.revision) == (3, 3)


# --- large batches --------------------------------------------------------------------------

MANY = 3 * LARGE
PASSES = 8  # of the event loop, that a request takes


def many(revision: int, *, deleted: bool = False) -> list[Event]:
    names = (b"many/%06d" % number for number in range(MANY))
    return [gone(name, revision) if deleted else put(name, revision) for name in names]


def rig_of_many() -> Rig:
    rig = Rig(b"a")
    load(rig.tree, [put(b"many/%06d" % number, 1) for number in range(MANY)])
    directory = rig.tree.root.children[b"many"]
    assert isinstance(directory, Directory)
    for node in (directory, *directory.children.values()):
        rig.tree.remember(node)
        node.kernel_may_cache = True
    return rig


def versions_of_many(rig: Rig) -> set[int]:
    directory = rig.tree.root.children.get(b"many")
    if not isinstance(directory, Directory):
        return {0}
    return {child.version for child in directory.children.values()}


@pytest.mark.parametrize("deleted", [False, True])
async def test_b51_others_have_their_turn_while_a_large_revision_is_worked_on(
    deleted: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done key by key is done in small steps, and all of it is seen at once."""
    rig = rig_of_many()
    rig.kernel.is_slow = False
    planned = 0
    add = Planner.add

    def counted(planner: Planner, event: Event) -> None:
        nonlocal planned
        planned += 1
        add(planner, event)

    monkeypatch.setattr(Planner, "add", counted)
    steps: list[int] = []
    seen: list[set[int]] = []

    async def look() -> None:
        while True:
            before = planned
            await trio.lowlevel.checkpoint()
            steps.append(planned - before)
            seen.append(versions_of_many(rig))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await rig.applier.take(many(2, deleted=deleted))
        with trio.fail_after(60):
            await rig.applier.idle()
        nursery.cancel_scope.cancel()
    assert planned >= MANY
    assert max(steps) <= 2 * PART_KEYS
    of_requests = [sum(steps[first : first + PASSES]) for first in range(len(steps))]
    assert sum(of_requests) / len(of_requests) < PART_KEYS, (
        "a request waits for one part, not for many"
    )
    seen.append(versions_of_many(rig))
    assert all(versions in ({1}, {0 if deleted else 2}) for versions in seen)
    assert (rig.applier.revision, rig.applier.batches) == (2, 1)
    assert gc.isenabled()
    rig.tree.check_invariants()


async def test_what_changes_meanwhile_is_planned_again(autojump_clock: MockClock) -> None:
    """Whoever opens a file keeps its version; what this mount deletes is recognised as such."""
    rig = rig_of_many()
    await rig.applier.take(many(2))
    await wait_all_tasks_blocked()
    directory = rig.tree.root.children[b"many"]
    assert isinstance(directory, Directory)
    opened = directory.children[b"000007"]
    assert isinstance(opened, File)
    opened.handles = 1
    rig.tree.disturb(opened)
    rig.update.intents[b"/many/000009"] = Intent()
    with trio.fail_after(60):
        while rig.applier.revision < 2:
            rig.kernel.invalidate()
            await trio.lowlevel.checkpoint()
        rig.kernel.is_slow = False
        rig.kernel.invalidate()
        await rig.applier.idle()
    assert (opened.version, opened.directory, opened.lost_key) == (1, None, b"/many/000007")
    assert directory.children[b"000007"] is not opened
    assert versions_of_many(rig) == {2}
    rig.tree.check_invariants()


async def test_a_large_batch_gives_way_to_a_call_that_holds_the_lock(
    autojump_clock: MockClock,
) -> None:
    rig = rig_of_many()
    await rig.applier.take(many(2, deleted=True))
    await wait_all_tasks_blocked()
    assert versions_of_many(rig) == {1}
    directory = rig.tree.root.children[b"many"]
    with rig.applier.invalidator.holding([Dentry(directory.inode, b"x")]):
        assert versions_of_many(rig) == {0}
    assert rig.applier.early == 1
    rig.kernel.is_slow = False
    rig.kernel.invalidate()
    with trio.fail_after(60):
        await rig.applier.idle()
    assert directory.directory is None
    rig.tree.check_invariants()


async def test_a_large_batch_that_fails_is_not_shown(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier_module.log, "exception", lambda *_: None)
    rig = rig_of_many()
    monkeypatch.setattr(rig.update, "plan_part", lambda *_, **__: 1 / 0)
    await rig.applier.take(many(2))
    await wait_all_tasks_blocked()
    assert (rig.failures, versions_of_many(rig), rig.applier.revision) == (1, {1}, 0)
    assert gc.isenabled()
    assert rig.tree.disturbed is None


# --- files that the kernel opens without asking ---------------------------------------------


class UnseenRig(Rig):
    """One where it has to be found out which files are open."""

    def __init__(self, *names: bytes) -> None:
        super().__init__(*names)
        self.tree.unseen.is_so = True

    def answer(self, *unopened: bytes) -> None:
        """Have the kernel let go, and find that nobody has some files open."""
        self.kernel.unopened |= {self.tree.root.children[name].inode for name in unopened}
        self.kernel.invalidate()

    def inode(self, name: bytes) -> int:
        return self.tree.root.children[name].inode


async def test_what_nobody_has_open_follows_and_what_is_open_does_not(
    autojump_clock: MockClock,
) -> None:
    rig = UnseenRig(b"idle", b"open")
    idle, held = (rig.tree.root.children[name] for name in (b"idle", b"open"))
    rig.value_cache.put(b"/open", Revision(1), b"1")
    await rig.applier.take([put(b"idle", 2), put(b"open", 2)])
    assert {type(cached) for cached in rig.kernel.asked[0][0]} == {Content}
    rig.answer(b"idle")
    assert rig.shown(b"idle") == 1, "the name of the other is to be let go first"
    rig.kernel.invalidate()
    assert (rig.shown(b"idle"), rig.shown(b"open"), rig.applier.revision) == (2, 2, 2)
    assert rig.inode(b"idle") == idle.inode
    assert rig.inode(b"open") != held.inode
    assert isinstance(held, File)
    assert (held.version, held.value) == (1, b"1")
    assert rig.tree.unseen.superseded == {held}
    assert rig.tree.current(held) is held
    rig.tree.forget(held.inode, 1)
    assert not rig.tree.unseen.superseded
    assert held.value is None
    assert rig.tree.unseen.deciding | rig.tree.unseen.opened | rig.kernel.unopened == set()


async def test_what_is_read_while_it_is_decided_is_open(autojump_clock: MockClock) -> None:
    rig = UnseenRig(b"a")
    inode = rig.inode(b"a")
    await rig.applier.take([put(b"a", 2)])
    assert rig.tree.unseen.deciding == {inode}
    rig.tree.unseen.opened.add(Inode(inode))  # as `UnopenedFiles.read` does
    rig.answer(b"a")
    rig.kernel.invalidate()
    assert rig.shown(b"a") == 2
    assert rig.inode(b"a") != inode


async def test_attributes_are_told_when_it_is_decided(autojump_clock: MockClock) -> None:
    rig = UnseenRig(b"a")
    inode = rig.inode(b"a")
    told: list[int] = []

    async def ask() -> None:
        await rig.applier.decided(Inode(inode))
        told.append(rig.shown(b"a"))

    async with trio.open_nursery() as nursery:
        await rig.applier.take([put(b"a", 2)])
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert not told
        rig.answer(b"a")
    assert told == [2]


async def test_what_is_not_answered_in_time_is_open(autojump_clock: MockClock) -> None:
    rig = UnseenRig(b"a")
    inode = rig.inode(b"a")
    await rig.applier.take([put(b"a", 2)])
    with rig.applier.invalidator.holding((Dentry(rig.tree.root.inode, b"b"),)):
        assert rig.shown(b"a") == 2, "a call that holds the lock must not be waited for"
    assert rig.inode(b"a") != inode


@pytest.mark.parametrize("opened", [(), (7,), (3, 500, 1999)])
async def test_a_large_batch_finds_out_too(
    autojump_clock: MockClock, opened: tuple[int, ...]
) -> None:
    names = [b"%04d" % number for number in range(2000)]
    rig = UnseenRig(*names)
    inodes = {name: rig.inode(name) for name in names}
    unopened = [name for number, name in enumerate(names) if number not in opened]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.applier.take, [put(name, 2) for name in names])
        await wait_all_tasks_blocked()
        assert rig.tree.unseen.deciding == set(inodes.values())
        rig.answer(*unopened)
        await wait_all_tasks_blocked()
        rig.kernel.invalidate()
        with trio.fail_after(5):
            await rig.applier.idle()
    assert {rig.shown(name) for name in names} == {2}
    changed = {name for name in names if rig.inode(name) != inodes[name]}
    assert changed == set(names) - set(unopened)
    assert {f.inode for f in rig.tree.unseen.superseded} == {inodes[name] for name in changed}
    assert rig.tree.unseen.deciding | rig.tree.unseen.opened | rig.kernel.unopened == set()
