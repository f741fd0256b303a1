"""What etcd guarantees a watch, and what readers of a mount get of it, whatever happens to it.

A whole mount, with its kernel's caches, stands on an etcd to which everything may happen: it
commits, compacts, loses events, repeats and reorders them, cuts the watch, holds it back, goes
back to a snapshot. After each step everything is read through the kernel, and compared with what
etcd held at the revision that the mirror says it shows. Each assertion bears the name of the
guarantee (https://etcd.io/docs/v3.5/learning/api_guarantees/):

* *ordered*: the revision that is shown never goes back;
* *unique*: a version of a key is one inode, however often it is told;
* *atomic*: what is shown is one revision's state, whole;
* *reliable*: when etcd is quiet, what is shown is its newest state;
* *resumable*: after a break nothing is listed again while history reaches back;
* *bookmarkable*: what is shown is the state of the very revision that is named.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.store import Delete, Put, Transaction
from tests.service.mirrors import AGAIN, content
from tests.support.fake_kernel import FakeMount, open_mount
from tests.support.fake_store import FakeStore

PATHS = ((b"a",), (b"d", b"b"), (b"d", b"c"), (b"d", b"e", b"f"))
AUDIT_S = 60.0

State = dict[tuple[bytes, ...], bytes]

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
    values: int = 0
    shown: int = 0  # the revision
    lists: int = 1
    settled_lists: int = 1  # when it came to rest last
    inodes: dict[tuple[tuple[bytes, ...], int], int] = field(default_factory=dict)
    lied: bool = False  # the watch has done what no client can see yet
    must_list: bool = False

    def note(self) -> None:
        """Remember etcd's state at its revision."""
        page = self.store.range_now(b"/", b"0")
        self.histories[-1][self.store.revision] = {
            tuple(entry.key[1:].split(b"/")): entry.value for entry in page.entries
        }

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
        self.store.go_back_now(revision)
        self.must_list = True

    # --- what is seen -----------------------------------------------------------------------

    async def check(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        mirror, replica = self.mount.mirror, self.mount.mirror.replica
        assert replica is not None
        replica.check_invariants()
        self.mount.check_invariants()
        statistics = replica.statistics()
        if statistics.lists == self.lists:
            assert mirror.revision >= self.shown, "ordered"
        if statistics.lists != self.lists or len(self.histories) > 1:
            self.inodes.clear()
        self.shown, self.lists = mirror.revision, statistics.lists
        seen = await self.see()
        if not self.lied:
            wanted = [h.get(mirror.revision) for h in self.histories]
            assert seen in wanted, "atomic, bookmarkable"
        self.mount.kernel.check_coherence(self.mount.tree, self.mount.filesystem)

    async def see(self) -> State:
        """Return everything that can be read through the kernel."""
        seen: State = {}
        for path in PATHS:
            value = await content(self.mount, path)
            if value is not None:
                seen[path] = value
                inode = (await self.mount.kernel.stat(path)).inode
                found = self.mount.tree.find(key_of(path))
                assert found is not None
                version = (path, found[1].mod_revision)
                assert self.inodes.setdefault(version, inode) == inode, "unique"
        return seen

    async def settle(self) -> None:
        """Let it all come to rest: etcd is quiet, and honest."""
        self.store.release_watches()
        await trio.sleep(20)
        if self.lied:
            await trio.sleep(AUDIT_S * 4)
        elif not self.must_list:
            replica = self.mount.mirror.replica
            assert replica is not None
            assert replica.statistics().lists == self.settled_lists, "resumable"
        self.lied = self.must_list = False
        await self.check()
        self.settled_lists = self.lists
        assert await self.see() == self.histories[-1][self.store.revision], "reliable"
        self.histories = self.histories[-1:]
        self.inodes.clear()


async def _live(happenings: list[tuple[str, list[int], int]]) -> None:
    store = FakeStore()
    store.put_now(b"/a", b"first")
    async with open_mount(store, audit_interval_s=AUDIT_S) as mount:
        world = World(store, mount, [{}])
        world.note()
        for number, (what, which, how) in enumerate(happenings):
            await world.happen(what, which, how)
            await world.check()
            if number % 10 == 9:
                await world.settle()
        await world.settle()


@pytest.mark.expect_log(AGAIN)
@given(st.lists(steps, min_size=10, max_size=40))
def test_guarantees(happenings: list[tuple[str, list[int], int]]) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0.0)
    trio.run(partial(_live, happenings), clock=clock)
