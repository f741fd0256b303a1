"""What etcd guarantees a watch, and what readers of a mount get of it, whatever happens to it.

A whole mount, with its kernel's caches, stands on an etcd to which everything may happen: it
commits, compacts, loses events, repeats and reorders them, cuts the watch, holds it back, goes
back to a snapshot. Whenever the mirror advances, the tree is compared with what etcd held at the
revision that the mirror says it shows; after each step everything is read through the kernel, and
compared as well. Each assertion bears the name of the guarantee
(https://etcd.io/docs/v3.5/learning/api_guarantees/):

* *ordered*: the revision that is shown never goes back;
* *unique*: a version of a key is one inode, however often it is told;
* *atomic*: what is shown is one revision's state, whole;
* *reliable*: when etcd is quiet, what is shown is its newest state;
* *resumable*: after a break nothing is listed again while history reaches back;
* *bookmarkable*: what is shown is the state of the very revision that is named.

A checker that cannot fail proves nothing: at the end each guarantee is seen broken by defects that
are planted for it, those of the soak among them.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from etcdfs.keyspace.store import Delete, Put, Transaction
from tests.service.mirrors import AGAIN, content
from tests.soak.controls import soaks_defects
from tests.support.fake_kernel import FakeKernel, FakeMount, open_mount
from tests.support.fake_store import FakeStore

PATHS = ((b"a",), (b"d", b"b"), (b"d", b"c"), (b"d", b"e", b"f"))
AUDIT_S = 60.0

State = dict[tuple[bytes, ...], bytes]
Versions = dict[tuple[bytes, ...], int]  # mod_revisions

WHATS = (
    *("commit",) * 6,
    *("break", "hold", "release", "lose", "repeat", "reorder", "shuffle"),
    *("compact", "snapshot", "wipe", "wait"),
)

steps = st.tuples(
    st.sampled_from(WHATS),
    st.lists(st.integers(0, len(PATHS) - 1), min_size=1, max_size=3, unique=True),
    st.integers(0, 7),
)


def key_of(path: tuple[bytes, ...]) -> bytes:
    return b"/" + b"/".join(path)


@dataclass
class World:
    """An etcd, a mount of it, and what is known of both."""

    store: FakeStore
    mount: FakeMount
    histories: list[dict[int, State]] = field(default_factory=list)
    versions: list[dict[int, Versions]] = field(default_factory=list)
    values: int = 0
    put_at: dict[bytes, int] = field(default_factory=dict)  # the revision of each value
    shown: int = 0  # the revision
    lists: int = 1
    settled_lists: int = 1  # when it came to rest last
    # Of each version: its inode, and when that changed, which it must not do once more.
    inodes: dict[tuple[tuple[bytes, ...], int], tuple[int, int]] = field(default_factory=dict)
    lied: bool = False  # the watch has done what no client can see yet
    must_list: bool = False

    def note(self) -> None:
        """Remember etcd's state at its revision."""
        entries = self.store.range_now(b"/", b"0").entries
        paths = [tuple(entry.key[1:].split(b"/")) for entry in entries]
        self.put_at.update((e.value, int(e.mod_revision)) for e in entries)
        values, revisions = [e.value for e in entries], [int(e.mod_revision) for e in entries]
        self.histories[-1][self.store.revision] = dict(zip(paths, values, strict=True))
        self.versions[-1][self.store.revision] = dict(zip(paths, revisions, strict=True))

    # --- what happens -----------------------------------------------------------------------

    def commit(self, which: list[int], how: int) -> int:
        """Put some keys and perhaps delete one, in one revision; return it."""
        self.values += 1
        puts = [Put(key_of(PATHS[n]), b"%d" % self.values) for n in which]
        gone = [n for n in range(len(PATHS)) if n not in which][: how % 2]
        deletes = [Delete(key_of(PATHS[n])) for n in gone]
        revision = self.store.commit_now(Transaction(then=(*puts, *deletes))).revision
        self.note()
        return revision

    async def happen(self, what: str, which: list[int], how: int) -> None:
        match what:
            case "commit":
                self.commit(which, how)
            case "reorder" | "shuffle":
                self.reorder(which, how, at_once=what == "shuffle")
            case "wait":
                await trio.sleep(how)
            case "snapshot" | "wipe" | "compact":
                self.lose_history(what, which, how)
            case _:
                self.mistreat_the_watch(what, which, how)

    def mistreat_the_watch(self, what: str, which: list[int], how: int) -> None:
        store = self.store
        match what:
            case "break":
                store.break_watches()
            case "hold":
                store.hold_watches()
            case "release":
                store.release_watches()
            case "lose":
                with store.losing_events():
                    self.commit(which, how)
                self.lied = True
            case "repeat":
                oldest = max(store.compacted, self.oldest + 1, store.revision - how)
                store.deliver_now(range(oldest, store.revision + 1))
                self.lied = True  # some may have been late
            case _:
                raise AssertionError(what)

    def lose_history(self, what: str, which: list[int], how: int) -> None:
        store = self.store
        match what:
            case "compact" if store.revision - how > store.compacted:
                store.compact_now(store.revision - how)
                self.must_list = True
            case "snapshot":
                self.change_history(max(self.oldest, store.revision - how))
            case "wipe":
                self.change_history(self.oldest)
                for _ in range(how):
                    self.commit(which, how)
            case _:
                return

    def reorder(self, which: list[int], how: int, *, at_once: bool) -> None:
        others = [n for n in range(len(PATHS)) if n not in which]
        with self.store.losing_events():
            first, second = self.commit(which, 0), self.commit(others if how % 2 else which, how)
        if at_once:  # seen at once, and not applied
            self.must_list = True
            self.lied |= not self.store.deliver_now([second, first])
        else:
            self.lied = True
            self.store.deliver_now([second], [first])

    @property
    def oldest(self) -> int:
        return min(self.histories[0])

    def change_history(self, revision: int) -> None:
        if revision <= self.store.compacted:
            return  # a snapshot of before the compaction would have no history at all
        self.histories.append({r: s for r, s in self.histories[-1].items() if r <= revision})
        self.versions.append({r: s for r, s in self.versions[-1].items() if r <= revision})
        self.store.go_back_now(revision)
        self.must_list = True

    # --- what is seen -----------------------------------------------------------------------

    async def observe(self) -> None:
        """Look at the tree whenever the mirror has advanced, for ever."""
        mirror, tree = self.mount.mirror, self.mount.tree
        while True:
            await mirror.advanced()
            if self.lied:
                continue
            found = {path: tree.find(key_of(path)) for path in PATHS}
            seen = {path: int(at[1].mod_revision) for path, at in found.items() if at is not None}
            known = [versions.get(mirror.revision) for versions in self.versions]
            assert seen in known, self._broken(
                seen in [state for versions in self.versions for state in versions.values()]
            )

    async def sweep(self) -> None:
        """Read everything through the kernel whenever the mirror has advanced, for ever.

        Meanwhile it advances again: so what is read belongs to several revisions, each at least
        as new as all that was read before.
        """
        while True:
            await self.mount.mirror.advanced()
            reached = 0
            for path in PATHS:
                value = await content(self.mount, path)
                if self.lied or len(self.histories) > 1:
                    break
                states = self.histories[0].items()
                since = [state.get(path) for revision, state in states if revision >= reached]
                assert value in since, "atomic"
                reached = max(reached, 0 if value is None else self.put_at[value])

    @staticmethod
    def _broken(is_whole: bool) -> str:
        """Say which guarantee is broken if what is seen is not what it should be."""
        return "bookmarkable" if is_whole else "atomic"

    async def check(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        mirror, state_machine = self.mount.mirror, self.mount.mirror.state_machine
        assert state_machine is not None
        state_machine.check_invariants()
        self.mount.check_invariants()
        statistics = state_machine.statistics()
        if statistics.lists == self.lists:
            assert mirror.revision >= self.shown, "ordered"
        if statistics.lists != self.lists or len(self.histories) > 1:
            self.inodes.clear()
        self.shown, self.lists = mirror.revision, statistics.lists
        seen = await self.see()
        if not self.lied:
            wanted = [h.get(mirror.revision) for h in self.histories]
            assert seen in wanted, self._broken(
                seen in [state for states in self.histories for state in states.values()]
            )
        self.mount.kernel.check_coherence(self.mount.tree, self.mount.filesystem)

    async def see(self) -> State:
        """Return everything that can be read through the kernel."""
        seen: State = {}
        for path in PATHS:
            value = await content(self.mount, path)
            if value is not None:
                seen[path] = value
                found_now = await self.mount.kernel.stat(path)
                inode = (found_now.inode, found_now.ctime_ns)
                found = self.mount.tree.find(key_of(path))
                assert found is not None
                version = (path, found[1].mod_revision)
                assert self.inodes.setdefault(version, inode) == inode, "unique"
        return seen

    async def wait_until_visible(self) -> None:
        """Let it all come to rest: etcd is quiet, and honest."""
        self.store.release_watches()
        await trio.sleep(20)
        if self.lied:
            await trio.sleep(AUDIT_S * 4)
        elif not self.must_list:
            state_machine = self.mount.mirror.state_machine
            assert state_machine is not None
            assert state_machine.statistics().lists == self.settled_lists, "resumable"
        self.lied = self.must_list = False
        await self.check()
        self.settled_lists = self.lists
        assert await self.see() == self.histories[-1][self.store.revision], "reliable"
        self.histories, self.versions = self.histories[-1:], self.versions[-1:]
        self.inodes.clear()


async def _live(happenings: list[tuple[str, list[int], int]]) -> None:
    store = FakeStore()
    store.put_now(b"/a", b"first")
    async with open_mount(store, audit_interval_s=AUDIT_S) as mount, trio.open_nursery() as nursery:
        world = World(store, mount, [{}], [{}])
        world.note()
        nursery.start_soon(world.observe)
        nursery.start_soon(world.sweep)
        for number, (what, which, how) in enumerate(happenings):
            await world.happen(what, which, how)
            await world.check()
            if number % 10 == 9:
                await world.wait_until_visible()
        await world.wait_until_visible()
        nursery.cancel_scope.cancel()


def live(happenings: list[tuple[str, list[int], int]]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0.0)
    trio.run(partial(_live, happenings), clock=clock)


# The profile `nightly` takes some forty thousand steps.
_IS_LONG = settings().max_examples >= 1000
lives = st.lists(steps, min_size=25 if _IS_LONG else 10, max_size=60 if _IS_LONG else 40)


@pytest.mark.expect_log(AGAIN)
@given(lives)
def test_guarantees(happenings: list[tuple[str, list[int], int]]) -> None:
    live(happenings)


# --- negative controls ----------------------------------------------------------------------


Replace = Callable[[Any, str, Any], None]


def relist_always(state_machine: Any, replace: Replace) -> None:
    """A watch that was lost is never resumed."""
    on_watch = state_machine.StateMachine._on_watch

    def _on_watch(self: Any, message: Any) -> Any:
        if isinstance(message, state_machine.WatchLost):
            return self._relist("lost")
        return on_watch(self, message)

    replace(state_machine.StateMachine, "_on_watch", _on_watch)


def boast(applier: Any, replace: Replace) -> None:
    """A revision is named before it is shown."""
    finish = applier.Applier._finish

    def _finish(self: Any, batch: Any) -> None:
        self.revision += 1
        finish(self, batch)

    replace(applier.Applier, "_finish", _finish)


def forget_the_rest(state_machine: Any, replace: Replace) -> None:
    """Of the keys of one revision the last is not applied."""
    receive = state_machine.StateMachine.receive

    def _receive(self: Any, message: Any) -> Any:
        return tuple(
            state_machine.Apply(step.events[:-1], step.revision)
            if isinstance(step, state_machine.Apply) and len(step.events) > 1
            else step
            for step in receive(self, message)
        )

    replace(state_machine.StateMachine, "receive", _receive)


def never_audit(audit: Any, replace: Replace) -> None:
    """What the watch lost is never found."""

    async def run(_self: Any, _doubt: Any, _deny: Any) -> None:
        return

    replace(audit.Auditor, "run", run)


OWN_DEFECTS: dict[str, tuple[str, Callable[[Any, Replace], None]]] = {
    "relist-always": ("etcdfs.mirror.state_machine", relist_always),
    "boast": ("etcdfs.mirror.applier", boast),
    "forget-the-rest": ("etcdfs.mirror.state_machine", forget_the_rest),
    "never-audit": ("etcdfs.consistency.audit", never_audit),
}


@dataclass(frozen=True)
class Control:
    """What a planted defect breaks, and in which lives that shows.

    Attributes:
        breaks: The guarantees, each of which may be the first that is seen broken.
        whats: What happens in those lives.
    """

    breaks: set[str]
    whats: tuple[str, ...] = ("commit",)


STALE = {"atomic", "bookmarkable", "reliable"}

CONTROLS = {
    "no-deduplication": Control({"ordered", "unique"}, ("commit", "repeat")),
    "out-of-order": Control({"ordered", "atomic", "bookmarkable"}),
    "keep-cache-always": Control(STALE),
    "split-revision": Control({"atomic"}),
    "forget-the-rest": Control(STALE),
    "early-publish": Control({"atomic", "what the kernel has is not what it is given"}),
    "drop-notification": Control(STALE),
    "negative-entries": Control(STALE),
    "no-diff": Control(STALE, ("commit", "hold", "compact", "break")),
    "no-witness": Control(STALE, ("commit", "snapshot", "wipe")),
    "resume-too-late": Control(STALE, ("commit", "hold", "break")),
    "relist-always": Control({"resumable"}, ("commit", "break")),
    "never-audit": Control({"reliable"}, ("commit", "lose")),
    "boast": Control({"bookmarkable"}),
}

LIVES = 200
"""Lives in which a defect must show; most do in the first few."""


def lives_of(control: Control) -> Iterator[list[tuple[str, list[int], int]]]:
    chance = random.Random(1)
    for _ in range(LIVES):
        yield [
            (
                chance.choice(control.whats),
                chance.sample(range(len(PATHS)), chance.randint(1, 3)),
                chance.randint(0, 7),
            )
            for _ in range(20)
        ]


def broken_by(happenings: list[tuple[str, list[int], int]]) -> str | None:
    """Return the guarantee that is broken in a life; None if none is."""
    try:
        live(happenings)
    except BaseExceptionGroup as group:
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        if not isinstance(failure, AssertionError):
            raise
        return str(failure).partition("\n")[0]
    return None


@pytest.mark.expect_log(AGAIN, "a batch could not be applied; this is a bug of etcdfs")
@pytest.mark.parametrize("name", CONTROLS)
def test_a_planted_defect_breaks_its_guarantee(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = soaks_defects()
    soak.replace = monkeypatch.setattr
    if name in OWN_DEFECTS:
        module, plant = OWN_DEFECTS[name]
        plant(import_module(module), monkeypatch.setattr)
    else:
        module, patch = soak.DEFECTS[name]
        # The kernel here is a fake one, and so is the door to it.
        is_door = module == "etcdfs.fuse.notify"
        patch(SimpleNamespace(KernelCache=FakeKernel) if is_door else import_module(module))
    control, seen = CONTROLS[name], Counter[str | None]()
    for life in lives_of(control):
        broken = broken_by(life)
        seen[broken] += 1
        if broken in control.breaks:
            break
    else:
        pytest.fail(f"it survived: {seen}")
    monkeypatch.undo()
    assert broken_by(life) is None, "and without the defect all is well"


def test_each_guarantee_is_seen_broken() -> None:
    guarantees = {"ordered", "unique", "atomic", "reliable", "resumable", "bookmarkable"}
    assert set[str]().union(*(control.breaks for control in CONTROLS.values())) >= guarantees
