"""The one watch that stands, and how a silent etcd is told from one that has nothing to say.

Knows: how a watch of the store is opened, listened to and left, when its silence is too long
(`--watch-timeout`), how long to wait after a loss, and how a page is read for whoever lists before
it watches. Does not know: what messages mean for the copy (the state machine's), the tree.

After a silence etcd is asked for a progress notice. The notice is a sign of life and no more:
releases before 3.4.25 and 3.5.8 name revisions in it that they have not delivered (etcd issue
15220), so it goes no further than this module. Releases between those and 3.4.31 and 3.5.13 may
leave the question unanswered although all is well (etcd issue 17507); then a linearizable read
decides: if etcd is no further than the watch, the watch had nothing to say.

Concurrency: trio thread; one task opens, receives and closes; any may `tell`.
"""

import logging
import random
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, final

import trio

from etcdfs.consistency.staleness import UNLIMITED, Staleness
from etcdfs.errors import (
    AnswerTooLargeError,
    CompactedError,
    FutureRevisionError,
    StoreError,
    StorePermissionError,
    WatchLostError,
)
from etcdfs.keyspace.keys import Keyspace
from etcdfs.keyspace.store import (
    Page,
    Store,
    Watch,
    WatchEvents,
    WatchMessage,
    WatchOpened,
    WatchProgress,
)
from etcdfs.mirror.messages import (
    BackOff,
    Message,
    PageArrived,
    PageTooLarge,
    Read,
    RevisionAhead,
    RevisionCompacted,
    WatchLost,
)

log = logging.getLogger(__name__)

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_CAP_S: Final = 5.0
BACKOFF_DOUBLINGS: Final = 16  # more than enough for the cap; 2**1024 is no float


@final
class WatchSession:
    """The watch of one keyspace, if any. Owned by `Mirror.run`, whose stack it lives on."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        staleness: Staleness,
        *,
        watch_timeout_s: float,
        answer_timeout_s: float,
    ) -> None:
        # --- dependencies
        self._store = store
        self._keyspace = keyspace
        self._staleness = staleness
        # --- constants
        # Asked early enough that a quiet etcd is not taken for a lost one by `--max-stale`.
        half = staleness.max_stale_s / 2 if staleness.max_stale_s != UNLIMITED else watch_timeout_s
        self._silence_s = min(watch_timeout_s, half)
        self._answer_timeout_s = min(answer_timeout_s, self._silence_s / 2)
        # --- mutable state
        self._stack = AsyncExitStack()
        self._watch: Watch | None = None
        self._told: Message | None = None
        self.error: StoreError | None = None  # what the last watch ended with
        self._interruptible: trio.CancelScope | None = None
        self._reached = 0

    async def open(self, watch: AbstractAsyncContextManager[Watch]) -> Message:
        """Open a watch and return its first message."""
        try:
            self._watch = await self._stack.enter_async_context(watch)
        except CompactedError as exc:
            return RevisionCompacted(exc.compact_revision)
        except StoreError as exc:
            return self._lost(exc)
        return await self.receive()

    async def receive(self) -> Message:
        """Return the next message: of the watch, its end, or what `tell` was given."""
        while True:
            if self._told is not None:
                told, self._told = self._told, None
                return told
            if self._watch is None:
                return WatchLost("there is no watch")
            try:
                message = await self._hear(self._watch)
            except CompactedError as exc:
                return RevisionCompacted(exc.compact_revision)
            except StorePermissionError as exc:
                await self._ask_whether_denied()
                return self._lost(exc)
            except StoreError as exc:
                return self._lost(exc)
            match message:
                case WatchOpened() | WatchEvents():
                    self._reached = max(self._reached, message.revision)
                    return message
                case WatchProgress() | None:
                    continue

    def tell(self, message: Message) -> None:
        """Have `receive` return this message first, even if it is waiting already."""
        self._told = message
        if self._interruptible is not None:
            self._interruptible.cancel()

    def _lost(self, error: StoreError) -> WatchLost:
        self.error = error
        return WatchLost(str(error))

    async def aclose(self) -> None:
        """Leave the watch, if there is one."""
        self._watch = None
        self._reached = 0
        await self._stack.aclose()

    # --- silence ----------------------------------------------------------------------------

    async def _hear(self, watch: Watch) -> WatchMessage | None:
        """Return what the watch says; None if something else is to be looked at first.

        Raises:
            StoreError: The watch has ended, or etcd does not answer.
        """
        message = await self._listen(watch, self._silence_s)
        if message is not None or self._told is not None:
            return message
        self._staleness.asked()
        await watch.request_progress()
        message = await self._listen(watch, self._answer_timeout_s)
        if message is not None or self._told is not None:
            return message
        newest = await self._ask_directly()
        if newest <= self._reached:
            self._staleness.heard()
            return None
        # It may be on its way just now.
        message = await self._listen(watch, self._answer_timeout_s)
        if message is not None or self._told is not None:
            return message
        raise WatchLostError(
            f"the watch is silent at revision {self._reached}, and etcd is at {newest}"
        )

    async def _listen(self, watch: Watch, bound_s: float) -> WatchMessage | None:
        """Return what the watch says in time; None if it says nothing, or `tell` is faster."""
        with trio.move_on_after(bound_s) as self._interruptible:
            message = await watch.receive()
            self._staleness.heard()
            return message
        return None

    async def _ask_directly(self) -> int:
        """Return etcd's revision, from which follows whether the watch has anything to say.

        Raises:
            WatchLostError: etcd cannot be asked.
        """
        try:
            return (await self._first_key()).revision
        except StoreError as exc:
            raise WatchLostError(f"etcd does not answer: {exc}") from exc

    async def _ask_whether_denied(self) -> None:
        """See whether a refused watch means that we may not read either.

        A watch is refused for other reasons as well, an expired token among them (etcd issue
        12385); what stops the showing of what is here must be sure.
        """
        try:
            await self._first_key()
        except StorePermissionError as exc:
            self._staleness.deny(exc)
        except StoreError:
            return

    async def _first_key(self) -> Page:
        start, end = self._keyspace.start, self._keyspace.end
        return await self._store.range(start, end, limit=1, keys_only=True)


async def read_page(store: Store, read: Read) -> Message:
    """Carry out a read, and return what came of it.

    Raises:
        StoreError: etcd could not be asked, or refused.
    """
    try:
        return PageArrived(
            await store.range(read.start, read.end, limit=read.limit, revision=read.revision)
        )
    except CompactedError as exc:
        return RevisionCompacted(exc.compact_revision)
    except FutureRevisionError:
        return RevisionAhead()
    except AnswerTooLargeError:
        return PageTooLarge()


async def back_off(step: BackOff, about: str) -> None:
    """Say why there is another try, and wait before it, longer the more there were.

    If it is `about` part of the copy only, an operator need not act.
    """
    fields = {"reason": step.reason, "attempt": step.attempt + 1}
    # Not each one is a warning: an outage may last for days.
    news = logging.INFO if about else logging.WARNING
    log.log(
        news if step.attempt.bit_count() <= 1 else logging.DEBUG,
        "%s; %s (attempt %d)",
        about + step.reason,
        "listing everything again" if step.relist else "trying again",
        step.attempt + 1,
        extra=None if about else {"event": "lost", "fields": fields},
    )
    longest = min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2 ** min(step.attempt, BACKOFF_DOUBLINGS))
    # Jittered, so that the mounts of a cluster do not come back all at once.
    await trio.sleep(random.uniform(longest / 2, longest))  # noqa: S311 - no secret
