"""Telling those who watch files through inotify what other clients have done.

Knows: which changes somebody may be watching, in which order and how often they are replayed
(`etcdfs.fuse.replay`). Does not know: how an event is raised, where changes come from.

A change is replayed once it is visible and the kernel has let go of what was before (`observe`):
whoever hears of it reads the new content, or something newer. Changes of one name that come
faster than every `PACE_S` become one: what watchers have seen last, and what is there now, say
which events are due. So a name waits once at most, however often it changes.

Nobody can watch what the kernel does not hold. Of the rest, only what somebody watches is
replayed, as far as that can be seen (`etcdfs.fuse.procfs`): looking takes milliseconds, so it
is done at most every `LOOK_S`, and changes wait for the next look if the last one did not find
them watched: a watch may have been set meanwhile.

A replay takes locks in the kernel as any call does, and may wait for them as long as somebody
holds them. It has a thread to itself; after `STUCK_S` it is left alone, other directories go on,
and what happens in that one waits for it. There are `STUCK_MAX` such threads at most.

Concurrency: trio thread. Nobody waits for a replay.
"""

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, final

import trio
from cachetools import TTLCache

from etcdfs.fuse.notify import REPLAY_THREAD
from etcdfs.fuse.replay import Replay, Step, kind
from etcdfs.tree.changes import Part
from etcdfs.tree.inodes import Dentry, Directory, File, Inode, Node
from etcdfs.tree.tree import Tree
from etcdfs.tree.update import NameChange, changes_of_part

log = logging.getLogger(__name__)

PACE_S: Final = 0.04
"""Time between two replays of one name. One takes about two milliseconds of a core, the kernel's
work included: of a name that always changes, so much is a twentieth of it."""

LOOK_S: Final = 0.25
"""Time between two looks at who watches, at least."""

LOOK_SHARE: Final = 20
"""The pause after a look is so much longer than the processor was busy with it, at least."""

LOOK_AGAIN_S: Final = 5.0
"""How long those are believed to watch who were seen to."""

STUCK_S: Final = 1.0
"""How long a replay may take before others are made beside it."""

STUCK_MAX: Final = 8
"""Replays that may be left waiting for a lock, each with a thread."""

WAITING_MAX: Final = 65_536
"""Names that may wait. inotify's own queue holds 16 384 events (max_queued_events)."""

AT_ONCE: Final = 250
"""Names that are looked at before others have their turn; half a millisecond."""

CLOSE_S: Final = 1.0
"""How long a replay may go on when the mount is taken down."""

WARN_EVERY_S: Final = 60.0

_OUTDATED: Final = frozenset(
    (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ESTALE, errno.ELOOP)
)
"""What a replay fails with if its name is something else by now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InotifyStatistics:
    """What became of other clients' changes of names that the kernel holds.

    Attributes:
        replayed: Replays that were made.
        coalesced: Changes that an earlier one of the same name, still waiting, took along.
        unwatched: Changes that nobody watched.
        outdated: Replays given up as something newer had happened.
        dropped: Replays that could not be made; the log says why.
        waiting: Names that wait, or are being replayed.
        stuck: Replays that wait for a lock that is not let go.
        looks: Times that was looked who watches.
    """

    replayed: int = 0
    coalesced: int = 0
    unwatched: int = 0
    outdated: int = 0
    dropped: int = 0
    waiting: int = 0
    stuck: int = 0
    looks: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    """What has become of a name since it was replayed last."""

    place: "_Place"
    was: Node | None
    now: Node | None
    old: dict[bytes, File] = field(default_factory=dict)
    has_content: bool = False  # that is new
    has_attributes: bool = False  # that are

    def inodes(self) -> Iterator[Inode]:
        """Yield what may be watched to hear of it."""
        yield self.place.directory.inode
        for node in (self.was, self.now, *self.old.values()):
            if node is not None:
                yield node.inode


_Way = tuple[dict[Dentry, Directory], tuple[bytes, ...]]
"""The directories from the root down to one, each by its place, and their names."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A name, and the way to it as it was before the change."""

    directory: Directory
    name: bytes
    above: dict[Dentry, Directory]
    path: tuple[bytes, ...]

    @property
    def entry(self) -> Dentry:
        return Dentry(self.directory.inode, self.name)


class Performs(Protocol):
    """See `Replayer`."""

    def perform(self, replayed: Replay) -> None:
        """Do all that is to be done, in a thread."""
        ...


class Finds(Protocol):
    """See `Watches`."""

    def find(self) -> tuple[frozenset[int], float]:
        """Return the inode numbers that somebody watches, and the processor time this took (s)."""
        ...


@final
class Inotify:
    """Decides what is replayed when."""

    def __init__(self, tree: Tree, replayer: Performs, watches: Finds | None) -> None:
        """Make one; without `watches`, whatever the kernel holds is taken to be watched."""
        # --- dependencies
        self._tree = tree
        self._replayer = replayer
        self._watches = watches
        # --- mutable state
        self._tasks: trio.Nursery | None = None
        self._is_closed = False
        # INVARIANT: each is in one of `_ready`, `_unsure` and `_parked`, unless it is closed.
        self._waiting: dict[Dentry, _Waiting] = {}
        self._inside: Counter[Inode] = Counter()  # how many of them are in a directory
        self._ready: dict[Dentry, float] = {}  # from when on it may be replayed
        self._unsure: list[Dentry] = []
        self._parked: dict[Inode, list[Dentry]] = {}  # by the directory whose replay is stuck
        self._watched: frozenset[int] = frozenset()
        self._looked_at = float("-inf")
        self._taking: deque[Iterator[None]] = deque()  # what is not among them yet
        self._held_back = Counter[Dentry]()  # of which directories nothing may be cached
        self._last: TTLCache[Dentry, float] = TTLCache(WAITING_MAX, PACE_S, trio.current_time)
        self._running = 0
        self._stir = trio.Event()
        self._doubt = trio.Event()
        self._quiet_until = float("-inf")
        self._replayed = self._coalesced = self._unwatched = self._outdated = self._dropped = 0
        self._looks = 0

    # --- hearing of changes -----------------------------------------------------------------

    def observe(
        self, changes: Iterable[NameChange], parts: Collection[Part] = ()
    ) -> Callable[[], None] | None:
        """Note what other clients change; call what is returned once it is visible.

        That is when the kernel has let go of all that was before. None: nobody can be watching.

        Args:
            changes: Names that change.
            parts: Of a large batch, many more: nothing can be done here for each of them.
        """
        if self._tasks is None or self._is_closed:
            return None
        ways: dict[Directory, _Way] = {}
        noted = []
        for change in changes:
            directory = change.directory
            if not directory.lookups:
                continue
            if directory not in ways:
                ways[directory] = _way_to(directory)
            place = _Place(directory, change.name, *ways[directory])
            if change.after is None:
                self._tree.withheld.add(place.entry)
            noted.append((place, change))
        known = {
            directory for part in parts for directory in part.directories() if directory.lookups
        }
        ways |= {directory: _way_to(directory) for directory in known}
        self._withhold(known, 1)
        return (
            partial(self._note, self._take_in(noted, tuple(parts), known, ways)) if ways else None
        )

    def _withhold(self, directories: Iterable[Directory], times: int) -> None:
        """Let nothing that is gone from some directories be cached, or once less often."""
        for directory in directories:
            entry = Dentry(directory.inode, b"")
            self._held_back[entry] += times
            if self._held_back[entry]:
                self._tree.withheld.add(entry)
            else:
                del self._held_back[entry]
                self._tree.withheld.discard(entry)

    def _note(self, taking: Iterator[None]) -> None:
        self._taking.append(taking)
        if len(self._taking) == 1:
            self._go_on()

    def _go_on(self) -> None:
        """Take in what was noted, in its order, until others should have their turn."""
        while self._taking and not self._is_closed:
            for _ in self._taking[0]:
                with suppress(trio.RunFinishedError):
                    trio.lowlevel.current_trio_token().run_sync_soon(self._go_on)
                return
            self._taking.popleft()

    def _take_in(
        self,
        noted: Iterable[tuple[_Place, NameChange]],
        parts: Iterable[Part],
        known: set[Directory],
        ways: Mapping[Directory, _Way],
    ) -> Iterator[None]:
        """Have all changes wait for their replay; yield after each part of a large batch."""
        for place, change in noted:
            self._add(place, change)
        for part in parts:
            for change in changes_of_part(part):
                if change.directory in known:
                    place = _Place(change.directory, change.name, *ways[change.directory])
                    if change.after is None:
                        self._tree.withheld.add(place.entry)
                    self._add(place, change)
            yield
        self._withhold(known, -1)

    def _add(self, place: _Place, change: NameChange) -> None:
        entry = place.entry
        waiting = self._waiting.get(entry)
        if waiting is None:
            if len(self._waiting) >= WAITING_MAX:
                self._tree.withheld.discard(entry)
                self._drop(f"{WAITING_MAX} names wait for theirs")
                return
            waiting = _Waiting(place, change.before, change.after)
        else:
            self._coalesced += 1
            waiting.now = change.after
        waiting.has_attributes |= change.is_of_attributes
        waiting.has_content |= not change.is_of_attributes
        before = change.before
        if isinstance(before, File) and change.after not in {None, before} and before.lookups:
            waiting.old[b"%d" % before.inode] = before
        if entry not in self._waiting:
            self._waiting[entry] = waiting
            self._inside[entry.directory] += 1
            self._sort(entry, waiting)

    def _sort(self, entry: Dentry, waiting: _Waiting) -> None:
        if self._watches is None or not self._watched.isdisjoint(waiting.inodes()):
            self._let(entry)
            if trio.current_time() - self._looked_at < LOOK_AGAIN_S:
                return
        else:
            self._unsure.append(entry)
        self._doubt.set()

    def _let(self, entry: Dentry) -> None:
        self._ready[entry] = self._last.get(entry, float("-inf")) + PACE_S
        self._stir.set()

    # --- running ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Replay what is noted, for ever; once the file system is mounted."""
        async with trio.open_nursery() as tasks:
            self._tasks = tasks
            if self._watches is not None:
                tasks.start_soon(self._look, self._watches)
            while True:
                replayed = await self._next()
                await self._replay(replayed)

    async def aclose(self) -> bool:
        """Begin no more replays; return whether none is under way, after `CLOSE_S` at most.

        Call it while requests are still answered, which a replay may wait for.
        """
        self._is_closed = True
        self._taking.clear()
        self._tree.withheld.clear()
        with trio.move_on_after(CLOSE_S):
            while self._running:
                self._stir = trio.Event()
                await self._stir.wait()
        return not self._running

    def statistics(self) -> InotifyStatistics:
        """Count what was replayed, and what was not."""
        return InotifyStatistics(
            replayed=self._replayed,
            coalesced=self._coalesced,
            unwatched=self._unwatched,
            outdated=self._outdated,
            dropped=self._dropped,
            waiting=len(self._waiting) + self._running,
            stuck=len(self._parked),
            looks=self._looks,
        )

    async def _next(self) -> Replay:
        """Return the next replay that is due, once there is one, and a thread for it."""
        while True:
            self._stir = trio.Event()
            entry, due_s = self._due()
            if entry is None:
                with trio.move_on_at(due_s):
                    await self._stir.wait()
                continue
            del self._ready[entry]
            if entry.directory in self._parked:
                self._parked[entry.directory].append(entry)
            elif (replayed := self._take(entry)) is not None:
                return replayed

    def _due(self) -> tuple[Dentry | None, float]:
        """Return what is due, or None, and when something will be."""
        earliest = float("inf")
        if self._is_closed or len(self._parked) >= STUCK_MAX:
            return None, earliest
        now = trio.current_time()
        for entry, at in self._ready.items():  # those that are not due are few, see `PACE_S`
            if at > now:
                earliest = min(earliest, at)
            elif not self._is_too_early(self._waiting[entry]):
                return entry, now
        return None, earliest

    def _is_too_early(self, waiting: _Waiting) -> bool:
        """Say whether a directory is to go in which something is still to be replayed."""
        was = waiting.was
        if was is waiting.now or not isinstance(was, Directory):
            return False
        return self._inside[was.inode] > 0 or was.inode in self._parked

    def _forget(self, entry: Dentry) -> _Waiting:
        self._inside[entry.directory] -= 1
        if not self._inside[entry.directory]:
            del self._inside[entry.directory]
            self._stir.set()
        return self._waiting.pop(entry)

    def _take(self, entry: Dentry) -> Replay | None:
        waiting = self._forget(entry)
        steps = _steps(waiting)
        if not steps:
            self._tree.withheld.discard(entry)
            return None
        self._last[entry] = trio.current_time()
        place = waiting.place
        return Replay(
            directory=place.directory,
            above=place.above,
            path=place.path,
            name=place.name,
            was=waiting.was,
            now=waiting.now,
            old=waiting.old,
            stand_in=Inode(next(self._tree.numbers)),
            steps=steps,
        )

    async def _replay(self, replayed: Replay) -> None:
        """Return when it is done, or stuck."""
        assert self._tasks is not None
        over = trio.Event()
        self._running += 1
        self._tasks.start_soon(self._perform, replayed, over)
        with trio.move_on_after(STUCK_S):
            await over.wait()
        if not over.is_set():
            self._parked[replayed.directory.inode] = []
            self._warn("somebody has not let go of a lock for %.1f s", STUCK_S)

    async def _perform(self, replayed: Replay, over: trio.Event) -> None:
        try:
            await trio.to_thread.run_sync(
                self._replayer.perform,
                replayed,
                abandon_on_cancel=True,
                limiter=trio.CapacityLimiter(1),
                thread_name=REPLAY_THREAD,
            )
            self._replayed += 1
        except OSError as exc:
            if exc.errno in _OUTDATED:
                self._outdated += 1
                self._put_back(replayed)
            else:
                path = b"/".join((*replayed.path, replayed.name))
                self._drop(f"{path!r}: {exc.strerror}")
        finally:
            self._running -= 1
            self._finish(replayed, over)

    def _put_back(self, replayed: Replay) -> None:
        """Leave to what happened since what could not be done any more."""
        waiting = self._waiting.get(Dentry(replayed.directory.inode, replayed.name))
        if waiting is None:
            return
        is_removed = Step.REMOVE in replayed.steps and replayed.step is Step.MAKE
        waiting.was = None if is_removed else replayed.was
        if replayed.step in {None, Step.ORPHAN, Step.SUPERSEDE}:
            waiting.old |= replayed.old
        waiting.has_content |= Step.CHANGE in replayed.steps and replayed.step is not Step.DRESS
        waiting.has_attributes |= Step.DRESS in replayed.steps

    def _finish(self, replayed: Replay, over: trio.Event) -> None:
        entry = Dentry(replayed.directory.inode, replayed.name)
        if entry not in self._waiting:
            self._tree.withheld.discard(entry)
        for parked in self._parked.pop(entry.directory, ()):
            self._let(parked)
        over.set()
        self._stir.set()

    def _drop(self, why: str) -> None:
        self._dropped += 1
        self._warn("who watches is not told of a change: %s", why)

    def _warn(self, message: str, *arguments: object) -> None:
        now = trio.current_time()
        level = logging.DEBUG if now < self._quiet_until else logging.WARNING
        if level == logging.WARNING:
            self._quiet_until = now + WARN_EVERY_S
        log.log(level, message, *arguments)

    # --- who watches ------------------------------------------------------------------------

    async def _look(self, watches: Finds) -> None:
        """Look who watches, whenever there is a doubt."""
        while True:
            await self._doubt.wait()
            self._doubt = trio.Event()
            unsure, self._unsure = self._unsure, []
            self._watched, cost_s = await trio.to_thread.run_sync(
                watches.find, abandon_on_cancel=True, thread_name=REPLAY_THREAD
            )
            self._looked_at = trio.current_time()
            self._looks += 1
            for number, entry in enumerate(unsure):
                if number % AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                if not self._watched.isdisjoint(self._waiting[entry].inodes()):
                    self._let(entry)
                else:
                    self._forget(entry)
                    self._tree.withheld.discard(entry)
                    self._unwatched += 1
            await trio.sleep(max(LOOK_S, LOOK_SHARE * cost_s))


def _way_to(directory: Directory) -> _Way:
    way: list[tuple[Dentry, Directory]] = []
    at = directory
    while at.directory is not None:
        way.append((Dentry(at.directory.inode, at.name), at))
        at = at.directory
    way.reverse()
    return dict(way), tuple(entry.name for entry, _ in way)


def _steps(waiting: _Waiting) -> tuple[Step, ...]:
    """Return what makes of what was seen last what is there now."""
    was, now = waiting.was, waiting.now
    superseded = (Step.SUPERSEDE,) if waiting.old else ()
    if was is None or now is None:
        removed = [] if was is None else [Step.REMOVE]
        if isinstance(was, Directory) and was.lookups:
            removed.insert(0, Step.ORPHAN)
        return (*removed, *superseded, *([] if now is None else [Step.MAKE]))
    dressed = (Step.DRESS,) if waiting.has_attributes else ()
    if kind(was) == kind(now) == "file":
        has_content = waiting.has_content or was is not now
        return (*superseded, *([Step.CHANGE] if has_content else []), *dressed)
    leads_elsewhere = kind(now) == "symlink" and waiting.has_content
    if was is now and not leads_elsewhere:  # a directory or a FIFO has no content that changes
        return dressed
    return (Step.REMOVE, Step.MAKE)
