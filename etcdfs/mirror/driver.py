"""The loop that keeps a copy in step with etcd: what the state machine wants done is done.

Knows: how each step is carried out, that a first state may fail to come and that what goes wrong
later is tried again for ever, when a copy is connected. Does not know: what the copy is, and how it
becomes visible.

Concurrency: trio thread; one task lists, watches and hands batches on, in order.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final, assert_never

import outcome
import trio

from etcdfs.consistency.audit import Auditor
from etcdfs.consistency.audit_index import TooDifferentError
from etcdfs.consistency.snapshot import Position, Recorder
from etcdfs.consistency.staleness import Staleness
from etcdfs.errors import StoreError, StorePermissionError, StoreProtocolError, WatchLostError
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import Event, Revision, Store
from etcdfs.mirror.messages import (
    Apply,
    BackOff,
    CloseWatch,
    Doubted,
    Message,
    OpenWatch,
    Read,
    ReadFailed,
    Restore,
    Stage,
    Step,
    WatchLost,
)
from etcdfs.mirror.state_machine import State, StateMachine
from etcdfs.mirror.watch_session import WatchSession, back_off, read_page

log = logging.getLogger(__name__)

FIRST_LISTINGS: Final = 5
"""How often the first listing is begun anew, as its revision was compacted away, say."""


class Driver(ABC):
    """Follows one range of keys. A subclass is the copy, and says how its state is made."""

    auditor: Auditor
    about = ""
    """What the log says before all else, where the copy is only part of what is mirrored."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        staleness: Staleness,
        recorder: Recorder,
        *,
        watch_timeout_s: float,
        answer_timeout_s: float,
    ) -> None:
        # --- dependencies
        self._store = store
        self._keyspace = keyspace
        self.staleness = staleness
        self._recorder = recorder
        self._session = WatchSession(
            store,
            keyspace,
            staleness,
            watch_timeout_s=watch_timeout_s,
            answer_timeout_s=answer_timeout_s,
        )
        # --- mutable state
        self.state_machine = StateMachine(keyspace.start, keyspace.end)
        self.loaded_at: Position | None = None  # the copy is that of a snapshot, not confirmed
        self.loaded_pages: list[bytes] = []  # the first key of each page of that snapshot

    @property
    def bounds(self) -> Sequence[bytes]:
        """See `Resumed`."""
        return (self._keyspace.start, *self.loaded_pages[1:], self._keyspace.end)

    # --- what is followed -------------------------------------------------------------------

    @abstractmethod
    def _is_started(self) -> bool:
        """Say whether there is a state to show, or none is needed: from now on nothing is raised."""

    @abstractmethod
    async def _stage(self, stage: Stage) -> None:
        """Put a page of a listing aside."""

    @abstractmethod
    async def _restore(self, revision: Revision) -> str | None:
        """Make what was staged the state; return why it is not to be believed, if so."""

    @abstractmethod
    async def _apply(self, events: Sequence[Event], revision: Revision) -> None:
        """Apply whole revisions."""

    @abstractmethod
    def _adopt(self, revision: Revision) -> None:
        """Take what was loaded before the start for the first state."""

    @abstractmethod
    def _deny(self, error: StorePermissionError) -> None:
        """Note that etcd does not let it be read."""

    def _is_doubtful(self) -> bool:
        """Say whether the state is known to be wrong, however well the watch stands."""
        return False

    def _refuse_loaded(self) -> None:
        """Forget what was loaded before the start: etcd does not confirm it."""
        self.loaded_at = None

    async def _read(self, read: Read) -> Message:
        return await read_page(self._store, read)

    # --- following --------------------------------------------------------------------------

    async def follow(
        self,
        *,
        offline: bool = False,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """List, watch, and follow until cancelled. Started once the copy is.

        Args:
            offline: Begin with what was loaded, whether etcd confirms it or not.
            task_status: trio's.

        Raises:
            StoreError: There is no first state. Later failures are retried for ever.
        """
        machine = self.state_machine = StateMachine(self._keyspace.start, self._keyspace.end)
        at = self.loaded_at
        steps = machine.start() if at is None else machine.resume(at)
        if offline:
            self._adopt(machine.revision)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
        async with aclosing(self._session):
            while True:
                try:
                    message = await self._carry_out_all(steps)
                    if machine.state is State.WATCHING and not self._is_started():
                        self._adopt(machine.revision)
                    if self._is_started():
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                    steps = machine.receive(message or await self._session.receive())
                except TooDifferentError as exc:
                    steps = machine.restart(str(exc))
                except Exception as exc:
                    if not self._is_started():
                        raise
                    # The border of this task, as the handlers have theirs: the mount goes on.
                    log.exception(
                        "%sfollowing etcd went wrong; this is a bug of etcdfs", self.about
                    )
                    steps = machine.restart(f"what came could not be taken in: {exc!r}")
                self._note()

    def doubt(self, reason: str) -> None:
        """Have everything listed again: what is here is not what etcd has."""
        if self.about:
            log.warning("%s%s; listing them again", self.about, reason)
        self._session.tell(Doubted(reason))

    def _note(self) -> None:
        """Tell the others whether the watch is confirmed, and can be believed."""
        is_watching = self.state_machine.state is State.WATCHING
        connected = is_watching and not self._is_doubtful()
        lasted_s = self.staleness.turn(connected=connected)
        if lasted_s is not None and not self.about:
            known = {"revision": self.state_machine.revision, "seconds": lasted_s}
            log.info(
                "regained etcd after %.1f s, at revision %d",
                lasted_s,
                self.state_machine.revision,
                extra={"event": "regained", "fields": known},
            )
        self.auditor.note(connected=connected, dropped=self.state_machine.dropped)

    # --- steps ------------------------------------------------------------------------------

    async def _carry_out_all(self, steps: tuple[Step, ...]) -> Message | None:
        match steps:
            case (Stage() as stage, Read() as read):
                return await self._stage_and_read_on(stage, read)
            case _:
                message: Message | None = None
                for step in steps:
                    message = await self._carry_out(step)
                return message

    async def _carry_out(self, step: Step) -> Message | None:
        match step:
            case Read():
                return await self._try_to_read(step)
            case Stage():
                await self._take_page(step)
            case Restore() | Apply():
                return await self._try_to_apply(step)
            case OpenWatch(from_revision):
                return await self._open(from_revision)
            case CloseWatch():
                await self._session.aclose()
            case BackOff():
                await self._back_off(step)
            case _ as never:
                assert_never(never)
        return None

    async def _try_to_read(self, read: Read) -> Message:
        try:
            return await self._read(read)
        except StoreError as exc:
            if isinstance(exc, StorePermissionError):
                self._deny(exc)
            if not self._is_started():
                raise
            return ReadFailed(str(exc))

    async def _take_page(self, stage: Stage) -> None:
        await self._stage(stage)
        await self._recorder.listed(stage.entries, first=stage.first)

    async def _stage_and_read_on(self, stage: Stage, read: Read) -> Message:
        """Work on one page while etcd prepares the next."""
        answers: list[outcome.Outcome[Message]] = []

        async def read_on() -> None:
            answers.append(await outcome.acapture(self._try_to_read, read))

        async with trio.open_nursery() as nursery:  # it would wrap what is raised inside
            nursery.start_soon(read_on)
            staged = await outcome.acapture(self._take_page, stage)
        staged.unwrap()
        return answers[0].unwrap()

    async def _try_to_apply(self, step: Restore | Apply) -> Message | None:
        try:
            if isinstance(step, Apply):
                self.auditor.saw(step.events)
                await self._apply(step.events, step.revision)
                self._recorder.applied(step.events, self.state_machine.position)
                return None
            self._recorder.restored(self.state_machine.position)
            doubt = await self._restore(step.revision)
        except StoreError as exc:
            return Doubted(f"the attributes of new keys could not be read: {exc}")
        return None if doubt is None else Doubted(doubt)

    async def _open(self, from_revision: int) -> Message:
        watch = self._store.watch(self._keyspace.start, self._keyspace.end, from_revision)
        message = await self._session.open(watch)
        if isinstance(message, WatchLost) and not self._is_started():
            raise self._session.error or WatchLostError(message.reason)
        return message

    async def _back_off(self, step: BackOff) -> None:
        if step.relist and not self._is_started():
            if self.loaded_at is not None:
                log.warning("the snapshot is refused: %s; listing everything", step.reason)
                self._refuse_loaded()
                return
            if step.attempt >= FIRST_LISTINGS:
                raise StoreProtocolError(step.reason)
        await back_off(step, self.about)
