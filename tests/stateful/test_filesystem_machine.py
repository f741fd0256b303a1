"""Whatever this mount and other clients do: what is shown is what etcd holds, and no write is lost.

The machine drives a whole mount (tree, filesystem, publisher, mirror or direct view) between a
`FakeStore` and a `FakeKernel`. A foreign writer changes keys behind its back: between two calls,
between the check and the commit of a call, and while the watch is late or broken.

The models are naive and know nothing of the tree:

* `shown` says which paths a keyspace has, from a table of names written down by hand;
* a `Version` says what an open file holds: each byte with where it came from.

After each step in which nothing is held back, the tree must be what etcd's keys say, and nothing
that the kernel has cached may differ from what a fresh lookup would say. At the end all handles
are closed and everything is forgotten: then nothing is left.
"""

import errno
import os
import queue
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import outcome
import pytest
import trio
import trio.testing
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from etcdfs.errors import CompactedError, OutcomeUnknownError, StoreError, StoreFullError
from etcdfs.keyspace.store import (
    Committed,
    Delete,
    Get,
    KeyValue,
    Put,
    Revision,
    Transaction,
    range_end,
)
from etcdfs.mirror import applier
from etcdfs.mirror.applier import LARGE, PART_KEYS
from etcdfs.mirror.mirror import Mirror
from etcdfs.tree.inodes import Directory, File
from tests.support.fake_kernel import FakeMount, KernelHandle, KernelInode, Path, make_mount
from tests.support.fake_store import FakeStore

T = TypeVar("T")

PREFIX = b"/p/"
OUTSIDE = b"/other"
EXCHANGE = 2

# --- names, once more -----------------------------------------------------------------------

NAMES = {
    b"foo": b"foo",
    b"foo-bar": b"foo-bar",
    b"foo.conf": b"foo.conf",
    b"\xff\xfe": b"\xff\xfe",
    b"": b"%=",
    b".": b"%=.",
    b"%value": b"%=%25value",
    b"%marker": b"%=%25marker",
    b"%=": b"%=%25=",
}
"""Components of keys, and the names they are shown under."""
COMPONENTS = {name: component for component, name in NAMES.items()}

View = dict[Path, bytes | None]
"""What there is to see: the content of each file, None for a directory."""


def shown(entries: dict[bytes, bytes]) -> View:
    """Say what a keyspace is shown as."""
    view: View = {(): None}
    for key in sorted(entries):
        names = [NAMES[component] for component in key.removeprefix(PREFIX).split(b"/")]
        is_marker = key.endswith(b"/")
        directories = len(names) - 1
        for depth in range(directories):
            at = tuple(names[: depth + 1])
            value = view.get(at)
            if value is not None:  # the key is a file so far, and becomes a directory's value
                view[(*at, b"%value")] = value
            view[at] = None
        if not is_marker:
            view[tuple(names)] = entries[key]
        elif entries[key]:
            view[(*names[:-1], b"%marker")] = entries[key]
    return view


def key_at(path: Path) -> bytes:
    """Return the key that a file at a path has."""
    *above, name = path
    components = [COMPONENTS[n] for n in above]
    if name == b"%marker":
        components.append(b"")
    elif name != b"%value":
        components.append(COMPONENTS[name])
    return PREFIX + b"/".join(components)


def marker_of(path: Path) -> bytes:
    return PREFIX + b"".join(COMPONENTS[name] + b"/" for name in path)


def is_possible_file(path: Path) -> bool:
    """Say whether a key has this path as its file."""
    if path[-1] == b"%value":
        return len(path) > 1 and path[-2] != b"%="
    return path[-1] != b"%="


def is_possible_directory(path: Path) -> bool:
    """Say whether keys can be below a path."""
    return path[-1] not in (b"%value", b"%marker")


def own_key(path: Path) -> bytes:
    """Return the key of a file at a path, or of the value of a directory; one that is not, else."""
    return b"" if path[-1] == b"%=" else key_at(path)


def parent_marker(key: bytes) -> bytes | None:
    """Return the marker that must stay when a key is removed through the mount."""
    parent = key.removesuffix(b"/").rpartition(b"/")[0] + b"/"
    return parent if len(parent) > len(PREFIX) else None


# --- open files, once more ------------------------------------------------------------------


@dataclass(eq=False)
class Version:
    """What the writers and readers of one inode share."""

    key: bytes | None
    content: bytes
    base: bytes
    published: KeyValue | None
    """The version it is based on; None: not in etcd yet."""
    origin: list[int | None] = field(default_factory=list)
    is_dirty: bool = False
    is_emptied: bool = False
    only_appends: bool = True
    handles: int = 0
    failed: bool = False
    is_bare: bool = False
    is_added: bool = False
    is_blind: bool = True
    is_refused: bool = False
    lost: list[tuple[bytes, bytes]] = field(default_factory=list)
    """What was put without an answer, and what the content was then."""
    made_at: int = 0

    def __post_init__(self) -> None:
        self.origin = list(range(len(self.base)))

    def write(self, offset: int, data: bytes, *, appends: bool, blind: bool) -> None:
        if not data:
            return
        self.is_bare = self.is_refused = False
        self.is_added = self.is_added and appends
        self.is_blind = self.is_blind and blind
        if offset != len(self.content):
            self.only_appends = False
        gap = max(0, offset - len(self.content))
        self.content += bytes(gap)
        self.origin += [None] * gap
        end = offset + len(data)
        self.content = self.content[:offset] + data + self.content[end:]
        self.origin[offset:end] = [None] * len(data)
        self.is_dirty = True

    def truncate(self, size: int) -> None:
        if size == 0:
            self.is_emptied = True
        elif size == len(self.content):
            return
        self.is_bare = self.is_added = self.is_refused = False
        self.only_appends = False
        grown = max(0, size - len(self.content))
        self.content = self.content[:size] + bytes(grown)
        self.origin = self.origin[:size] + [None] * grown
        self.is_dirty = True

    def kinds(self) -> set[str]:
        if not self.is_dirty:
            return {"none"}
        if self.is_emptied or self.published is None:
            return {"whole"}
        if self.only_appends:
            return {"append"}
        kept = len(self.base)
        if self.origin[:kept] == list(range(kept)):
            # Nothing of an empty file is kept by who cannot have read it.
            return {"append", "partial"} | ({"whole"} if self.is_blind and not kept else set())
        kept_any = any(o is not None for o in self.origin) or not self.is_blind
        return {"partial"} if kept_any else {"whole", "partial"}

    @property
    def adds(self) -> bool:
        """Whether it has bytes that are added to others', and so cannot be told from others'."""
        return self.kinds() == {"append"} or self.is_added

    def arrived(self, current: KeyValue | None) -> bytes | None:
        """Return the content of which etcd shows that it came, although its answer was lost."""
        for sent, meant in reversed(self.lost if current is not None else []):
            assert current is not None
            if current.value == sent or (self.adds and current.value.startswith(sent)):
                return meant
        return None

    def outcomes(self, current: KeyValue | None) -> list[tuple[int, bytes | None]]:
        """Return the acceptable (errno, value put; None for nothing) of a flush."""
        if not self.is_dirty or self.key is None:
            return [(0, None)]
        arrived = self.arrived(current)
        if current is not None and arrived is not None:
            return [self.outcome_of_rest(current, arrived)]
        if self.is_refused and not self.adds and self.is_another(current):
            return [(errno.ESTALE, None)]
        if self.published is None:
            return [(0, self.put_as_new(current))]
        if current is None or current.create_revision != self.published.create_revision:
            return [(0, None)]
        return self.outcomes_of_version(self.published, current)

    def outcome_of_rest(self, current: KeyValue, arrived: bytes) -> tuple[int, bytes | None]:
        """Return what becomes of what was written since an answer was lost."""
        if arrived == self.content:
            return (errno.ETIMEDOUT if self.adds and not self.is_bare else 0, None)
        return (0, current.value + self.content[len(arrived) :] if self.adds else self.content)

    def put_as_new(self, current: KeyValue | None) -> bytes | None:
        """Return what is put of a file that was made here."""
        if current is None or current.key.endswith(b"/") or not (self.is_bare or self.is_added):
            return self.content
        return None if self.is_bare else current.value + self.content

    def outcomes_of_version(
        self, published: KeyValue, current: KeyValue
    ) -> list[tuple[int, bytes | None]]:
        found: list[tuple[int, bytes | None]] = []
        if current.key.endswith(b"/") and not current.value:
            found.append((0, None))  # a marker without a value is not shown: as good as deleted
        for kind in self.kinds():
            if current.mod_revision == published.mod_revision:
                same = kind == "whole" and self.content == self.base
                found.append((0, None if same else self.content))
            elif kind == "whole":
                found.append((0, self.content))
            elif kind == "append":
                found.append((0, current.value + self.content[len(self.base) :]))
            else:
                found.append((errno.ESTALE, None))
        return found

    def is_another(self, current: KeyValue | None) -> bool:
        """Say whether another client has put what a key holds."""
        if current is None or self.published is None:
            return current is not None
        return (
            current.create_revision == self.published.create_revision
            and current.mod_revision != self.published.mod_revision
        )

    def is_published(self, found: KeyValue | None) -> None:
        """Note that all of it reached etcd; `found` unless it was merged with others' bytes."""
        if found is not None:
            self.published = found
        self.base = self.content
        self.lost.clear()
        self.origin = list(range(len(self.base)))
        self.is_dirty = self.is_emptied = self.is_added = False
        self.only_appends = self.is_blind = True


@dataclass(eq=False)
class Open:
    """A handle of ours."""

    handle: KernelHandle
    version: Version
    is_creator: bool = False

    @property
    def is_writable(self) -> bool:
        return self.handle.flags & os.O_ACCMODE != os.O_RDONLY


# --- trio, step by step ---------------------------------------------------------------------


class Loop:
    """trio as a guest of the test: its time stands still, it runs only while a rule does."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self._ready: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._ended: outcome.Outcome[None] | None = None
        self._stop = trio.Event()
        self.nursery: trio.Nursery
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ready.put,
            done_callback=self._end,
            clock=self.clock,
            host_uses_signal_set_wakeup_fd=True,
        )
        self._started = False
        self._pump(lambda: self._started)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            self._started = True
            await self._stop.wait()
            self.nursery.cancel_scope.cancel()

    def _end(self, ended: outcome.Outcome[None]) -> None:
        self._ended = ended

    def _pump(self, until: Callable[[], bool]) -> None:
        while not until():
            if self._ended is not None:
                self._ended.unwrap()
                raise AssertionError("trio ended by itself")
            self._ready.get(timeout=20)()

    def run(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run an async function to its end."""
        result: list[outcome.Outcome[T]] = []

        async def job() -> None:
            result.append(await outcome.acapture(function))

        self._token.run_sync_soon(self.nursery.start_soon, job)
        self._pump(lambda: bool(result))
        return result[0].unwrap()

    def end(self) -> None:
        if self._ended is None:
            self._token.run_sync_soon(self._stop.set)
            self._pump(lambda: self._ended is not None)
        assert self._ended is not None
        self._ended.unwrap()


class Call:
    """A system call under way; its errno is 0 after success, None while it waits."""

    def __init__(self, loop: Loop, call: Callable[[], Awaitable[Any]]) -> None:
        self.errno: int | None = None
        self.value: Any = None
        self.locks = False
        self.done: Callable[[Any], None]
        self._call = call
        loop.nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            self.value = await self._call()
        except OSError as exc:
            self.errno = exc.errno
        else:
            self.errno = 0


# --- strategies -----------------------------------------------------------------------------

_components = st.sampled_from(
    [b"foo"] * 6 + [b"foo-bar", b"foo.conf", b"\xff\xfe"] * 2 + [b"", b".", b"%value", b"%="]
)
_keys = st.lists(_components, min_size=1, max_size=3).map(lambda c: PREFIX + b"/".join(c))
_names = st.sampled_from(
    [b"foo"] * 6
    + [b"foo-bar", b"foo.conf", b"\xff\xfe"] * 2
    + [b"%value", b"%marker", b"%=", b"%=%25value", b"%=."]
)
_paths = st.lists(_names, min_size=1, max_size=3).map(tuple)
_sizes = st.integers(0, 6)

Foreign = tuple[str, int | bytes]
_foreign = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.one_of(st.integers(0, 20), _keys)),
        st.tuples(st.just("delete"), st.integers(0, 20)),
        st.tuples(st.just("delete below"), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=3,
)
_races = st.one_of(st.none(), st.none(), st.none(), _foreign)

FAULTS: dict[str, tuple[StoreError, int]] = {
    "full": (StoreFullError("full"), errno.ENOSPC),
    "lost": (OutcomeUnknownError("lost"), errno.ETIMEDOUT),
    "applied": (OutcomeUnknownError("applied, and the answer lost"), errno.ETIMEDOUT),
}

WATCH_WARNINGS = (
    "the watch is over %.1f s late: revision %d is shown before it brings it",
    "%s; %s (attempt %d)",
)


class FilesystemMachine(RuleBasedStateMachine):
    """One mount, one foreign writer."""

    cache = True

    def __init__(self) -> None:
        super().__init__()
        self.values = count()
        self.store = FakeStore()
        self.loop = Loop()
        self.open: list[Open] = []
        self.versions: dict[KernelInode, Version] = {}
        self.pending: list[Call] = []
        self.is_held = False
        self.race: list[Foreign] | None = None
        self.has_raced = False
        self.raced: dict[bytes, KeyValue] = {}
        self.sent: Transaction | None = None
        self.mount: FakeMount

    @initialize(keys=st.lists(_keys, max_size=4), in_parts=st.booleans())
    def begin(self, keys: list[bytes], in_parts: bool) -> None:
        # As a revision of very many keys is.
        if in_parts:
            vars(applier).update(LARGE=0, PART_KEYS=1)
        self.store.put_now(OUTSIDE, b"x")
        for key in keys:
            self.store.put_now(key, b"" if key.endswith(b"/") else self.value())

        commit = self.store.commit

        async def intercept(transaction: Transaction) -> Committed:
            asks = all(isinstance(operation, Get) for operation in transaction.then)
            if not asks:
                self.sent = transaction
            if self.race is not None and not asks:
                race, self.race, self.has_raced = self.race, None, True
                self.interfere(race)
                self.raced = self.live()
                await trio.testing.wait_all_tasks_blocked()
            return await commit(transaction)

        vars(self.store)["commit"] = intercept

        async def start() -> None:
            self.mount = make_mount(self.store, cache=self.cache, prefix=PREFIX, cache_size=2048)
            await self.mount.start(self.loop.nursery)

        self.loop.run(start)

    def teardown(self) -> None:
        try:
            if hasattr(self, "mount") and sys.exc_info()[0] is None:
                self.finish()
        finally:
            self.loop.end()
            vars(applier).update(LARGE=LARGE, PART_KEYS=PART_KEYS)

    # --- the world --------------------------------------------------------------------------

    def value(self) -> bytes:
        number = next(self.values)
        return b"%d" % number + b"." * (number % 4)

    def live(self) -> dict[bytes, KeyValue]:
        page = self.store.range_now(PREFIX, range_end(PREFIX))
        return {entry.key: entry for entry in page.entries}

    def view(self) -> View:
        """Say what is to be seen, unpublished files included."""
        view = shown({key: entry.value for key, entry in self.live().items()})
        for version in self.versions.values():
            if version.published is None and version.key is not None and not version.failed:
                path = self.draft_path(version.key, view)
                view.setdefault(path, version.content)
                for depth in range(len(path)):
                    value = view.get(path[:depth])
                    view[path[:depth]] = None
                    if value is not None:  # what is below it in etcd went, and this stays
                        view[*path[:depth], b"%value"] = value
        return view

    def draft_path(self, key: bytes, view: View) -> Path:
        names = [NAMES[c] for c in key.removeprefix(PREFIX).split(b"/")]
        if key.endswith(b"/"):
            return (*names[:-1], b"%marker")
        path = tuple(names)
        below = [p for p in view if p[: len(path)] == path and p != path]
        return (*path, b"%value") if below or (path in view and view[path] is None) else path

    @property
    def is_quiet(self) -> bool:
        return not self.is_held and not self.pending

    def interfere(self, changes: list[Foreign]) -> None:
        """Let the foreign writer commit one transaction."""
        then: dict[bytes, Put | Delete] = {}
        existing = sorted(self.live())
        for kind, which in changes:
            if isinstance(which, bytes):
                key = which
            elif not existing:
                continue
            else:
                key = existing[which % len(existing)]
            if kind == "put":
                empty = key.endswith(b"/") and next(self.values) % 3
                operation: Put | Delete = Put(key, b"" if empty else self.value())
            elif kind == "delete":
                operation = Delete(key)
            else:
                key = key[: key.rfind(b"/", 0, -1) + 1]
                operation = Delete(key, range_end(key))
            if not any(_overlap(operation, other) for other in then.values()):
                then[key] = operation
        self.store.commit_now(Transaction(then=tuple(then.values())))

    def pick(self, choice: int, path: Path) -> Path:
        """Pick a path that is there, mostly; else the one that was drawn."""
        there = sorted(p for p in self.view() if p)
        return there[choice % len(there)] if there and choice % 4 else path

    # --- calls ------------------------------------------------------------------------------

    def call(
        self,
        function: Callable[[], Awaitable[Any]],
        *,
        race: list[Foreign] | None = None,
        early: bool = False,
        locks: bool = False,
        done: Callable[[Any], None] = lambda _: None,
    ) -> Call:
        """Make a system call; it may be left waiting when the watch is held back.

        Args:
            function: The call.
            race: What a foreign writer does between its check and its commit. Whether it came
                to that is in `has_raced`, the keys right before the commit are in `raced`, and
                what it committed is in `sent`.
            early: Whether the watch brings the change before the commit is answered.
            locks: Whether it holds a directory's lock as long as it waits.
            done: Told its result, if it has to wait and succeeds in the end.
        """

        async def run() -> Call:
            if early:
                self.store.hold("answer")
            call = Call(self.loop, function)
            await _standstill()
            if early:
                self.store.release("answer")
                await _standstill()
            return call

        self.raced = self.live()
        self.race, self.has_raced, self.sent = race, False, None
        call = self.loop.run(run)
        self.race = None
        if call.errno is None:
            assert self.is_held, "a call waits for nothing"
            call.locks, call.done = locks, done
            self.pending.append(call)
        return call

    @property
    def may_lock(self) -> bool:
        return not any(call.locks for call in self.pending)

    def wait_until_visible(self) -> None:
        """Let go of everything and wait until the mirror is there."""

        async def run() -> None:
            for gate in ("commit", "answer", "watch", "range"):
                self.store.release(gate)
            self.mount.kernel.release_notifications()
            for _ in range(40):
                await trio.testing.wait_all_tasks_blocked()
                if self.has_settled():
                    return
                self.loop.clock.jump(6.0)
            raise AssertionError("the mirror does not come back")

        self.is_held = False
        self.loop.run(run)
        self.collect()

    def collect(self) -> None:
        """Take note of the calls that have ended."""
        for call in [call for call in self.pending if call.errno is not None]:
            assert call.errno in (0, errno.ENOENT), call.errno
            if call.errno == 0:
                call.done(call.value)
            self.pending.remove(call)

    def has_settled(self) -> bool:
        view = self.mount.view
        if any(call.errno is None for call in self.pending):
            return False
        if not isinstance(view, Mirror):
            return True
        statistics = view.statistics()
        touched = max((kv.mod_revision for kv in self.live().values()), default=0)
        for revision in range(self.store.revision, touched, -1):
            if any(event.key.startswith(PREFIX) for event in self.store.events_of(revision)):
                touched = revision
                break
        return statistics.connected and view.revision >= touched and self.mount.kernel.is_idle

    # --- rules: the foreign writer and the world ----------------------------------------------

    @rule(changes=_foreign)
    def foreign(self, changes: list[Foreign]) -> None:
        self.interfere(changes)

    @rule()
    def foreign_outside(self) -> None:
        self.store.put_now(OUTSIDE, self.value())

    @precondition(lambda self: self.cache and not self.is_held)
    @rule(how=st.sampled_from(["watch", "watch", "notifications"]))
    def hold_back(self, how: str) -> None:
        self.is_held = True
        if how == "watch":
            self.store.hold_watches()
        else:
            self.mount.kernel.hold_notifications()

    @precondition(lambda self: self.is_held)
    @rule()
    def go_on(self) -> None:
        self.wait_until_visible()

    @precondition(lambda self: self.cache)
    @rule(compact=st.booleans())
    def break_watch(self, compact: bool) -> None:
        self.store.break_watches(CompactedError("gone", self.store.revision) if compact else None)
        if not self.is_held:
            self.wait_until_visible()

    @rule()
    def compact(self) -> None:
        if self.store.revision > self.store.compacted:
            self.store.compact_now(self.store.revision)

    @rule(seconds=st.sampled_from([0.001, 3.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        async def run() -> None:
            self.loop.clock.jump(seconds)
            await trio.testing.wait_all_tasks_blocked()

        self.loop.run(run)
        if not self.is_held:
            self.wait_until_visible()
        self.collect()

    @precondition(lambda self: self.may_lock)
    @rule(choice=st.integers(0, 20))
    def reclaim(self, choice: int) -> None:
        """Memory pressure."""
        kernel = self.mount.kernel

        async def run() -> None:
            for number in kernel.unreferenced():
                kernel.evict(number)
            known = sorted(kernel.inodes)
            kernel.evict(known[choice % len(known)])

        self.loop.run(run)

    # --- rules: looking ---------------------------------------------------------------------

    @precondition(lambda self: self.may_lock)
    @rule(choice=st.integers(0, 20), path=_paths)
    def stat(self, choice: int, path: Path) -> None:
        path = self.pick(choice, path)
        call = self.call(lambda: self.mount.kernel.stat(path), locks=True)
        if not self.is_quiet:
            return
        view = self.view()
        if path not in view:
            assert call.errno in (errno.ENOENT, errno.ENOTDIR)
            return
        content = view[path]
        assert (call.value.mode & 0o170000 == 0o040000) == (content is None)
        if content is not None:
            version = self.version_at(path)
            assert call.value.size == len(content if version is None else version.content)

    @precondition(lambda self: self.may_lock)
    @rule(choice=st.integers(0, 20), path=_paths)
    def listdir(self, choice: int, path: Path) -> None:
        path = self.pick(choice, path)
        if choice == 0:
            path = ()
        call = self.call(lambda: self.mount.kernel.listdir(path), locks=True)
        if not self.is_quiet:
            return
        view = self.view()
        if path not in view:
            assert call.errno in (errno.ENOENT, errno.ENOTDIR)
        elif view[path] is not None:
            assert call.errno == errno.ENOTDIR
        else:
            assert sorted(call.value) == sorted(p[-1] for p in view if p and p[:-1] == path)

    def version_at(self, path: Path) -> Version | None:
        """Return what is open of the very version that a path shows."""
        key = key_at(path) if path and is_possible_file(path) else None
        current = self.store.current(key) if key is not None else None
        for version in self.versions.values():
            if version.key != key or version.failed or key is None:
                continue
            if (version.published is None) == (current is None) and (
                current is None
                or version.published is None
                or version.published.mod_revision == current.mod_revision
            ):
                return version
        return None

    # --- rules: files -----------------------------------------------------------------------

    @precondition(lambda self: self.may_lock and len(self.open) < 5)
    @rule(
        choice=st.integers(0, 20),
        path=_paths,
        access=st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]),
        more=st.sampled_from(
            [0, 0, os.O_TRUNC, os.O_APPEND]
            + [os.O_CREAT | more for more in (0, os.O_TRUNC, os.O_APPEND, os.O_EXCL)]
        ),
        race=_races,
        early=st.booleans(),
    )
    def open_file(
        self,
        choice: int,
        path: Path,
        access: int,
        more: int,
        race: list[Foreign] | None,
        early: bool,
    ) -> None:
        path = self.pick(choice, path)
        if access == os.O_RDONLY:
            more &= ~(os.O_TRUNC | os.O_APPEND)
        if not more & os.O_EXCL:
            race = None
        before, quiet, revision = self.view(), self.is_quiet, self.store.revision
        expected = self.expected_open(path, more, before)
        call = self.call(
            lambda: self.mount.kernel.open(path, access | more),
            race=race,
            early=early and bool(more & os.O_EXCL),
            locks=True,
            done=lambda handle: self.add_open(handle, path),
        )
        if call.errno is None:
            return
        if self.has_raced or not quiet:
            if call.errno:
                return
        elif call.errno:
            assert call.errno == expected, f"{call.errno}, expected {expected}"
            assert self.store.revision == revision
            return
        else:
            assert expected == 0
        self.add_open(call.value, path)

    def expected_open(self, path: Path, flags: int, view: View) -> int:
        for depth in range(1, len(path)):
            if path[:depth] not in view:
                return errno.ENOENT
            if view[path[:depth]] is not None:
                return errno.ENOTDIR
        if path in view:
            if flags & os.O_CREAT and flags & os.O_EXCL:
                return errno.EEXIST
            return errno.EISDIR if view[path] is None else 0
        if not flags & os.O_CREAT:
            return errno.ENOENT
        return 0 if is_possible_file(path) else errno.EPERM

    def add_open(self, handle: KernelHandle, path: Path) -> None:
        version = self.versions.get(handle.inode)
        node = self.mount.tree.node(handle.inode.number)
        assert isinstance(node, File)
        is_creator = node.key_state is None and version is None
        if version is None:
            if node.key_state is None:
                # Claimed in etcd and deleted there at once, it has no key any more.
                version = Version(self.mount.tree.key_of(node), b"", b"", None)
                version.made_at = self.store.revision
                version.is_dirty = True
                version.is_bare = version.is_added = not handle.flags & os.O_TRUNC
            else:
                key = self.mount.tree.key_of(node) or key_at(path)
                found = self.store._at(key, node.key_state.mod_revision)
                assert found is not None
                version = Version(key, found.value, found.value, found)
            self.versions[handle.inode] = version
        elif handle.flags & os.O_EXCL:
            raise AssertionError("O_EXCL opened what was there")
        if handle.flags & os.O_TRUNC:
            version.truncate(0)
        version.handles += 1
        self.open.append(Open(handle, version, is_creator=is_creator))

    def pick_open(self, choice: int, *, writable: bool = False) -> Open | None:
        there = [o for o in self.open if o.is_writable or not writable]
        return there[choice % len(there)] if there else None

    @precondition(lambda self: self.open)
    @rule(choice=st.integers(0, 20), offset=st.sampled_from([0, 0, 1, 3]))
    def read(self, choice: int, offset: int) -> None:
        opened = self.pick_open(choice)
        assert opened is not None
        if opened.handle.flags & os.O_ACCMODE == os.O_WRONLY:
            return
        call = self.call(lambda: self.mount.kernel.read(opened.handle, offset))
        assert call.errno == 0
        assert call.value == opened.version.content[offset:]

    @precondition(lambda self: any(o.is_writable for o in self.open))
    @rule(choice=st.integers(0, 20), where=st.integers(0, 9), size=_sizes)
    def write(self, choice: int, where: int, size: int) -> None:
        opened = self.pick_open(choice, writable=True)
        assert opened is not None
        version = opened.version
        end = len(version.content)
        appends = opened.handle.flags & os.O_APPEND
        offset = end if appends or where > 5 else min(where, end + 2)
        data = (b"%d" % next(self.values) * 6)[:size]
        if self.is_locked(opened):
            return
        call = self.call(lambda: self.mount.kernel.write(opened.handle, offset, data))
        assert call.value == len(data)
        blind = opened.handle.flags & os.O_ACCMODE == os.O_WRONLY
        version.write(offset, data, appends=bool(appends), blind=blind)

    def is_locked(self, opened: Open) -> bool:
        """Say whether a publication of the file is waiting, so that writers wait, too."""
        node = self.mount.tree.node(opened.handle.inode.number)
        assert isinstance(node, File)
        return self.mount.writeback.locks.is_held(node)

    def is_held_back(self, opened: Open) -> bool:
        """Say whether publishing the file waits for another call, which waits for the watch."""
        node = self.mount.tree.node(opened.handle.inode.number)
        assert isinstance(node, File)
        return self.is_locked(opened) or self.mount.writeback.locks.is_changing(node)

    @precondition(lambda self: any(o.is_writable for o in self.open))
    @rule(choice=st.integers(0, 20), size=_sizes)
    def ftruncate(self, choice: int, size: int) -> None:
        opened = self.pick_open(choice, writable=True)
        assert opened is not None
        if self.is_locked(opened):
            return
        call = self.call(lambda: self.mount.kernel.truncate(opened.handle.inode, size))
        assert call.errno == 0
        opened.version.truncate(size)

    @precondition(lambda self: any(o.is_writable for o in self.open))
    @rule(
        choice=st.integers(0, 20),
        race=_races,
        early=st.booleans(),
        fault=st.sampled_from([None] * 6 + list(FAULTS)),
        close=st.booleans(),
    )
    def flush(
        self,
        choice: int,
        race: list[Foreign] | None,
        early: bool,
        fault: str | None,
        close: bool,
    ) -> None:
        opened = self.pick_open(choice, writable=True)
        assert opened is not None
        if self.is_held_back(opened):
            return
        if fault is not None:
            race = None
        self.flush_one(opened, race, early, fault)
        if close and not self.is_held_back(opened):
            self.release(opened)

    def flush_one(
        self,
        opened: Open,
        race: list[Foreign] | None = None,
        early: bool = False,
        fault: str | None = None,
    ) -> None:
        version = opened.version
        if fault is not None:
            self.store.fail_next("commit", FAULTS[fault][0], applied=fault == "applied")
        revision = self.store.revision
        call = self.call(lambda: self.mount.kernel.flush(opened.handle), race=race, early=early)
        if call.errno is None:  # it has failed, and waits for the kernel to let go of its pages
            self.pending.remove(call)
            self.wait_until_visible()
            assert call.errno is not None
        self.store._failures.clear()
        current = None if version.key is None else self.raced.get(version.key)
        now = None if version.key is None else self.store.current(version.key)
        put = now.value if now is not None and now != current else None
        outcomes = version.outcomes(current)
        if fault is not None:
            # It hits the commit, and there may be none: a clean or a dropped write buffer needs none.
            others = [o for o in outcomes if o[1] is None or fault == "applied"]
            if fault == "applied" and version.adds and not version.is_bare:
                others = [(errno.ETIMEDOUT if o[1] is not None else o[0], o[1]) for o in others]
            outcomes = [(FAULTS[fault][1], None), *others]
        got = (call.errno or 0, put)
        assert got in outcomes, f"flush of {version.key!r}: {got}, expected one of {outcomes}"
        if not self.has_raced:
            wanted = revision + (put is not None)
            assert self.store.revision == wanted, "one revision for one close"
        if call.errno == errno.ETIMEDOUT and self.sent is not None:
            version.lost.append((self.sent_value(version), version.content))
        self.note_flush(version, call.errno or 0, current, now)

    def sent_value(self, version: Version) -> bytes:
        """Return what was to become of a key; what it was, if only its attributes were put."""
        assert self.sent is not None
        puts = [o for o in self.sent.then if isinstance(o, Put) and o.key == version.key]
        return puts[0].value if puts else version.content

    def note_flush(
        self, version: Version, error: int, before: KeyValue | None, now: KeyValue | None
    ) -> None:
        """Take note of what a flush did."""
        version.failed = version.is_refused = bool(error)
        if error or version.key is None:
            return
        if version.key.endswith(b"/") and not version.content:
            version.key = None  # a marker's empty value is not shown
        if not version.is_dirty:
            return
        if before == now:
            # Somebody else has made it and nothing was written here, or it was deleted there
            # and lives on in its handles alone, or nothing had changed.
            version.failed = version.published is None
            version.is_published(None)
        else:
            merged = now is None or now.value != version.content
            version.is_published(None if merged else now)
        if version.published is None and now is not None:  # what comes is added to others' file
            version.published = now._replace(mod_revision=Revision(now.create_revision - 1))

    def release(self, opened: Open) -> None:
        """Close without a flush, as after one."""
        version = opened.version
        last = version.handles == 1
        self.open.remove(opened)
        version.handles -= 1
        key = version.key
        current = None if key is None else self.store.current(key)
        writers = any(o.version is version and (o.is_writable or o.is_creator) for o in self.open)
        call = self.call(lambda: self.mount.kernel.release(opened.handle))
        if call.errno is not None:
            assert call.errno == 0
        now = None if key is None else self.store.current(key)
        put = now.value if now is not None and now != current else None
        if (opened.is_writable or opened.is_creator) and not writers and not version.is_refused:
            acceptable = [value for _, value in version.outcomes(current)]
            assert put in acceptable, f"release put {put!r}, expected one of {acceptable}"
            if version.is_dirty:
                version.is_published(now if put == version.content else None)
        else:
            assert put is None
        if last:
            self.versions = {i: v for i, v in self.versions.items() if v is not version}

    @precondition(lambda self: self.open and self.is_quiet)
    @rule(choice=st.integers(0, 20))
    def close(self, choice: int) -> None:
        opened = self.pick_open(choice)
        assert opened is not None
        if opened.is_writable:
            self.flush_one(opened)
        self.release(opened)

    # --- rules: names -----------------------------------------------------------------------

    def changes_name(
        self,
        function: Callable[[], Awaitable[None]],
        expected: int,
        race: list[Foreign] | None,
        early: bool,
    ) -> bool:
        """Make a call that changes a name; say whether it did (or will, when the watch is back)."""
        quiet, revision = self.is_quiet, self.store.revision
        call = self.call(function, race=race, early=early, locks=True)
        if quiet and not self.has_raced:
            assert (call.errno or 0) == expected, f"{call.errno}, expected {expected}"
        if call.errno or (call.errno is None and self.raced == self.live()):
            if not self.has_raced and quiet:
                assert self.store.revision == revision, "it failed, and changed something"
            return False
        if not self.has_raced:
            assert self.store.revision <= revision + 1, "more than one revision"
        return True

    @precondition(lambda self: self.may_lock)
    @rule(choice=st.integers(0, 9), path=_paths, race=_races, early=st.booleans())
    def mkdir(self, choice: int, path: Path, race: list[Foreign] | None, early: bool) -> None:
        if choice % 3 == 0:
            path = self.pick(choice, path)
        view = self.view()
        expected = self.parent_error(path, view)
        if not expected and path in view:
            expected = errno.EEXIST
        if not expected and path[-1] in (b"%value", b"%marker"):
            expected = errno.EPERM
        if self.changes_name(lambda: self.mount.kernel.mkdir(path), expected, race, early):
            marker = self.store.current(marker_of(path))
            assert marker is not None
            assert marker.version == 1

    def parent_error(self, path: Path, view: View) -> int:
        for depth in range(1, len(path)):
            if path[:depth] not in view:
                return errno.ENOENT
            if view[path[:depth]] is not None:
                return errno.ENOTDIR
        return 0

    @precondition(lambda self: self.may_lock)
    @rule(choice=st.integers(0, 20), path=_paths, race=_races, early=st.booleans())
    def rmdir(self, choice: int, path: Path, race: list[Foreign] | None, early: bool) -> None:
        path = self.pick(choice, path)
        view = self.view()
        expected = self.parent_error(path, view)
        if not expected and path not in view:
            expected = errno.ENOENT
        if not expected and view[path] is not None:
            expected = errno.ENOTDIR
        if not expected and any(p[:-1] == path for p in view if p):
            expected = errno.ENOTEMPTY
        if self.changes_name(lambda: self.mount.kernel.rmdir(path), expected, race, early):
            marker = marker_of(path)
            assert not [k for k in self.live() if k.startswith(marker)]
            self.check_parent_stays(marker)

    @property
    def shown_revision(self) -> int:
        """What the mount shows is at least that new."""
        view = self.mount.view
        return view.revision if isinstance(view, Mirror) else self.store.revision

    @precondition(lambda self: self.may_lock)
    @rule(choice=st.integers(0, 20), path=_paths, race=_races, early=st.booleans())
    def unlink(self, choice: int, path: Path, race: list[Foreign] | None, early: bool) -> None:
        path = self.pick(choice, path)
        view = self.view()
        expected = self.parent_error(path, view)
        if not expected and path not in view:
            expected = errno.ENOENT
        if not expected and view[path] is None:
            expected = errno.EISDIR
        if not self.changes_name(lambda: self.mount.kernel.unlink(path), expected, race, early):
            return
        key = key_at(path)
        current = self.store.current(key)
        if path[-1] == b"%marker":
            assert current is None or not current.value
        elif current is None or current.mod_revision <= self.shown_revision:
            assert current is None
            self.check_parent_stays(key)
        # Else what went was made here, and never reached etcd; the key is not seen here yet.
        for version in self.versions.values():
            is_it = (version.published is not None) == (key in self.raced)
            if version.key == key and (is_it or self.has_lost_its_name(version)):
                version.key = None

    def has_lost_its_name(self, version: Version) -> bool:
        """Say whether it was never in etcd, and its name shows another file or none."""
        return version.published is None and version.failed

    def check_parent_stays(self, key: bytes) -> None:
        parent = parent_marker(key)
        if parent is not None and not self.versions:
            assert [k for k in self.live() if k.startswith(parent)], "the directory went too"

    @precondition(lambda self: self.may_lock)
    @rule(
        choices=st.tuples(st.integers(0, 20), st.integers(0, 9)),
        old=_paths,
        new=_paths,
        flags=st.sampled_from([0, 0, 1, EXCHANGE, EXCHANGE]),
        race=_races,
        early=st.booleans(),
    )
    def rename(
        self,
        choices: tuple[int, int],
        old: Path,
        new: Path,
        flags: int,
        race: list[Foreign] | None,
        early: bool,
    ) -> None:
        old = self.pick(choices[0], old)
        if choices[1] % 3 == 0:
            new = self.pick(choices[1], new)
        if b"%marker" in (old[-1], new[-1]):
            return
        view = self.view()
        if old == new or self.is_written_at(old, view) or self.is_written_at(new, view):
            return  # nothing happens, or it would be published first
        expected = self.rename_error(old, new, flags, view)

        async def call() -> None:
            await self.mount.kernel.rename(old, new, flags)

        if not self.changes_name(call, expected, race, early):
            return
        if flags == EXCHANGE or view.get(old, b"") is None:
            self.note_move(old, new, exchange=flags == EXCHANGE)
        elif key_at(old) != key_at(new):
            self.note_rename(key_at(old), key_at(new))

    def is_written_at(self, path: Path, view: View) -> bool:
        if view.get(path) is None:
            return False
        return any(
            (v.is_dirty or v.published is None) and v.key == key_at(path)
            for v in self.versions.values()
        )

    def note_move(self, old: Path, new: Path, *, exchange: bool) -> None:
        """Check and take note of a directory's move, or of two names that swapped."""

        def new_key(key: bytes, known: dict[bytes, KeyValue]) -> bytes:
            for source, target in ((old, new), (new, old)) if exchange else ((old, new),):
                if key == own_key(source):
                    return own_key(target)
                below = marker_of(source) if is_possible_directory(source) else None
                if below is not None and key.startswith(below):
                    return marker_of(target) + key[len(below) :]
            return key

        known = self.raced
        expected = {
            new_key(key, known): (entry.value, entry.lease)
            for key, entry in known.items()
            if exchange or key != marker_of(new)
        }
        found = {key: (entry.value, entry.lease) for key, entry in self.live().items()}
        parent = parent_marker(marker_of(old)) if not exchange else None
        if parent is not None and parent not in expected:
            assert [k for k in found if k.startswith(parent)], "the directory went too"
            found.pop(parent, None)
        assert found == expected
        for inode, version in self.versions.items():
            key = version.key
            if key is None or new_key(key, known) == key:
                continue
            now = self.store.current(new_key(key, known))
            if version.published is None:
                is_shown = self.mount.tree.is_attached(self.mount.tree.node(inode.number))
                version.key = new_key(key, known) if is_shown else None
            elif (
                key in known
                and now is not None
                and version.published.mod_revision == known[key].mod_revision
            ):
                version.key = new_key(key, known)
                version.published = now
            else:
                version.key = None

    def note_rename(self, source: bytes, target: bytes) -> None:
        """Check and take note of what a rename did."""
        moved = self.raced[source]
        assert self.store.current(source) is None
        now = self.store.current(target)
        assert now is not None
        assert now.value == moved.value
        self.check_parent_stays(source)
        for version in self.versions.values():
            if version.key == target:
                version.key = None
        for version in self.versions.values():
            if version.key == source and version.published is not None:
                if version.published.mod_revision == moved.mod_revision:
                    version.key = target
                    version.published = now
                else:
                    version.key = None
            elif version.key == source:
                version.key = None  # it was never in etcd, and its name was taken away

    def rename_error(self, old: Path, new: Path, flags: int, view: View) -> int:
        found = self.parent_error(old, view) or self.parent_error(new, view)
        if not found and old not in view:
            found = errno.ENOENT
        if not found and new[: len(old)] == old:
            found = errno.EINVAL
        if not found and old[: len(new)] == new:
            found = errno.EINVAL if flags == EXCHANGE else errno.ENOTEMPTY
        if found:
            return found
        if flags == EXCHANGE:
            return self.exchange_error(old, new, view)
        if new in view and flags:
            return errno.EEXIST
        return self.replacing_error(old, new, view)

    def replacing_error(self, old: Path, new: Path, view: View) -> int:
        if new in view and (view[old] is None) != (view[new] is None):
            return errno.EISDIR if view[new] is None else errno.ENOTDIR
        if view[old] is not None:
            return 0 if is_possible_file(new) else errno.EPERM
        if new in view and any(path[:-1] == new for path in view if path):
            return errno.ENOTEMPTY
        return self.directory_error(old, new)

    def exchange_error(self, old: Path, new: Path, view: View) -> int:
        if new not in view:
            return errno.ENOENT
        for source in (old, new):
            if view[source] is None and not self.keys_below(source):
                return errno.ENOENT  # another client has deleted all but what is not there yet
        for source, target in ((old, new), (new, old)):
            if view[source] is None:
                found = self.directory_error(source, target)
            else:
                found = 0 if is_possible_file(target) else errno.EPERM
            if found:
                return found
        return 0

    def directory_error(self, old: Path, new: Path) -> int:
        if not is_possible_directory(new):
            return errno.EPERM
        if not self.keys_below(old):
            return errno.ENOENT
        has_value = old[-1] != b"%=" and key_at(old) in self.live()
        return errno.EPERM if has_value and not is_possible_file(new) else 0

    def keys_below(self, path: Path) -> list[bytes]:
        return [key for key in self.live() if key.startswith(marker_of(path))]

    # --- what must hold ---------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "mount"):
            return
        if self.is_quiet:
            self.wait_until_visible()
            self.hide_superseded()
        self.mount.check_invariants()
        if self.is_quiet and self.cache:
            self.loop.run(self.check_mirror)

    def hide_superseded(self) -> None:
        """Stop expecting new files whose names other clients have used meanwhile.

        Whether such a name was seen before it was deleted again is a matter of batches.
        """
        for inode, version in self.versions.items():
            if version.published is None and version.key in self.store._versions:
                node = self.mount.tree.node(inode.number)
                changed = self.store._versions[version.key][-1].mod_revision > version.made_at
                version.failed |= changed and not self.mount.tree.is_attached(node)

    async def check_mirror(self) -> None:
        """The tree is what etcd holds, and so is what the kernel has cached."""
        tree = self.mount.tree
        live = self.live()
        view = self.view()
        seen: set[Path] = set()
        for directory in tree.directories():
            path = tree.names(directory)
            seen.add(path)
            assert view.get(path, b"") is None, f"{path} is shown, and is no directory"
            for name, child in directory.children.items():
                if isinstance(child, Directory):
                    continue
                at = (*path, name)
                seen.add(at)
                if child.key_state is None:
                    assert child.handles, f"{at} is neither in etcd nor open"
                    continue
                entry = live.get(key_at(at))
                assert entry is not None, f"{at} is shown, and there is no such key"
                assert child.key_state.mod_revision == entry.mod_revision, f"{at}: older version"
                assert child.key_state.create_revision == entry.create_revision
                assert child.key_state.size == len(entry.value)
                assert await self.mount.view.value(child) == entry.value, f"{at}: other value"
        assert seen == set(view)
        assert {k for k, _ in tree.key_state()} == set(live)
        self.mount.kernel.check_coherence(tree, self.mount.filesystem)

    def finish(self) -> None:
        """Close and forget everything: nothing may be left."""
        self.wait_until_visible()
        self.holds()
        for opened in list(self.open):
            if opened.is_writable:
                self.flush_one(opened)
            self.release(opened)
        self.wait_until_visible()
        self.holds()
        kernel = self.mount.kernel

        async def see_all() -> View:
            found: View = {}
            pending: list[Path] = [()]
            while pending:
                path = pending.pop()
                found[path] = None
                for name in await kernel.listdir(path):
                    inode = await kernel.walk((*path, name))
                    if inode.is_directory:
                        pending.append((*path, name))
                    else:
                        handle = await kernel.open((*path, name), os.O_RDONLY)
                        found[*path, name] = await kernel.read(handle)
                        await kernel.close(handle)
            return found

        before = self.store.revision
        assert self.loop.run(see_all) == self.view()
        assert self.store.revision == before, "reading put something"

        async def forget() -> None:
            kernel.evict_all()

        self.loop.run(forget)
        assert sorted(kernel.inodes) == [1]
        assert len(self.mount.files) == 0
        assert self.mount.tree.statistics().inodes_known == 1
        if not self.cache:
            assert not self.mount.tree.root.children, "a tree that is not complete keeps nothing"
        self.mount.check_invariants()


async def _standstill() -> None:
    """Wait until nothing moves, even if a call under way waits for the same, and then goes on."""
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()


def _overlap(one: Put | Delete, other: Put | Delete) -> bool:
    return any(
        a.key == b.key or (isinstance(b, Delete) and b.end is not None and b.key <= a.key < b.end)
        for a, b in ((one, other), (other, one))
    )


class DirectMachine(FilesystemMachine):
    """The same without a mirror."""

    cache = False


# --- what it has found ----------------------------------------------------------------------

Steps = Callable[[FilesystemMachine], None]


def opening(machine: FilesystemMachine, path: Path, flags: int) -> None:
    machine.open_file(
        choice=0, path=path, access=flags & os.O_ACCMODE, more=flags & ~3, race=None, early=False
    )


def flushing(machine: FilesystemMachine, fault: str | None = None) -> None:
    machine.flush(choice=0, race=None, early=False, fault=fault, close=False)


def claim_a_markers_value(machine: FilesystemMachine) -> None:
    machine.begin(keys=[b"/p/foo/"], in_parts=False)
    opening(machine, (b"foo", b"%marker"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def lose_the_answer_to_an_empty_file(machine: FilesystemMachine) -> None:
    machine.begin(keys=[], in_parts=False)
    opening(machine, (b"foo",), os.O_WRONLY | os.O_CREAT)
    flushing(machine, "applied")


def lose_the_answer_to_an_append(machine: FilesystemMachine) -> None:
    machine.begin(keys=[], in_parts=False)
    opening(machine, (b"foo",), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fault in ("applied", None, None):
        machine.write(choice=0, where=9, size=2)
        flushing(machine, fault)
        flushing(machine)


def append_to_what_another_client_made(machine: FilesystemMachine) -> None:
    machine.begin(keys=[], in_parts=False)
    opening(machine, (b"foo",), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    machine.foreign(changes=[("put", b"/p/foo")])
    for _ in range(2):
        machine.write(choice=0, where=9, size=2)
        flushing(machine)


def go_over_what_came_after_a_failure(machine: FilesystemMachine) -> None:
    machine.begin(keys=[b"/p/foo"], in_parts=False)
    opening(machine, (b"foo",), os.O_WRONLY | os.O_TRUNC)
    machine.write(choice=0, where=9, size=2)
    flushing(machine, "full")
    machine.foreign(changes=[("put", b"/p/foo")])
    flushing(machine)


def make_a_file_where_another_client_deletes(machine: FilesystemMachine) -> None:
    machine.begin(keys=[b"/p/foo", b"/p/foo/foo", b"/p/foo/foo/foo"], in_parts=False)
    if machine.cache:
        machine.hold_back(how="watch")
    machine.foreign(changes=[("delete", 2)])
    opening(machine, (b"foo", b"foo", b"foo-bar"), os.O_RDONLY | os.O_CREAT)
    machine.holds()


def lose_no_answer_where_nothing_is_sent(machine: FilesystemMachine) -> None:
    machine.begin(keys=[b"/p/foo"], in_parts=False)
    opening(machine, (b"foo",), os.O_RDWR)
    machine.unlink(choice=1, path=(), race=None, early=False)
    machine.write(choice=0, where=9, size=2)
    flushing(machine, "applied")


def lose_a_name_that_is_being_removed(machine: FilesystemMachine) -> None:
    machine.begin(keys=[b"/p/foo", b"/p/foo-bar"], in_parts=False)
    machine.listdir(choice=0, path=())
    machine.unlink(choice=1, path=(), race=[("delete", b"/p/foo-bar")], early=False)


@pytest.mark.parametrize("machine", [FilesystemMachine, DirectMachine])
@pytest.mark.parametrize(
    "steps",
    [
        claim_a_markers_value,
        lose_the_answer_to_an_empty_file,
        lose_the_answer_to_an_append,
        append_to_what_another_client_made,
        go_over_what_came_after_a_failure,
        make_a_file_where_another_client_deletes,
        lose_a_name_that_is_being_removed,
        lose_no_answer_where_nothing_is_sent,
    ],
)
def test_what_it_has_found(machine: type[FilesystemMachine], steps: Steps) -> None:
    run = machine()
    try:
        steps(run)
        run.holds()
    finally:
        run.teardown()


TestMirror = pytest.mark.expect_log(*WATCH_WARNINGS)(FilesystemMachine.TestCase)
TestDirect = DirectMachine.TestCase
