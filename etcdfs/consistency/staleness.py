"""How old what is known of etcd may be, and whether etcd answers at all.

Knows: when etcd was last heard, whether it allows us to read, for how long what the mirror holds is
good enough while nothing is heard (`--max-stale`), since when the kernel may show what is older
than the mirror, and when etcd must be asked before a write is begun (`Liveness`). Does not know:
watches, the tree, what is to be written.

The mirror may be shown, or it is *refused*: as too old, or as no longer permitted. Refused is
judged at each question, by the time, so that no reader is ever given more than the limit; the
event is for those who must act when it happens.

Shells, and most programs that end without closing what they wrote, never look at what close(2)
says. They do look at open(2): so an open for writing fails when a close would. It costs no request:
a write is entrusted only to a member that has just answered, so that either the open or the close
asks after a silence, and the other need not. What the watch says does not count, for it comes on
another connection, and from a member that may have lost its majority.

Concurrency: trio thread; any number of tasks.
"""

from dataclasses import dataclass, field
from typing import Final, final

import trio

from etcdfs.errors import MirrorDeniedError, MirrorStaleError, StoreError, StorePermissionError
from etcdfs.keyspace.store import Store

UNLIMITED: Final = 0.0
"""As `--max-stale`: what the mirror holds may be of any age."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessStatistics:
    """The connection to etcd, as an operator wants it.

    Attributes:
        connected: Whether a confirmed watch stands, and etcd has answered when last asked.
        state_s: Seconds since `connected` last changed.
        silent_s: Seconds since etcd was last heard.
        stale_s: How old what is shown may be: 0 while connected, else `silent_s`; in any case as
            long as a directory has been stuck (`etcdfs.fuse.notify`).
        refused: Why nothing is shown, "" when it is.
        losses: Times that the connection was lost.
        refusals: Times that showing was stopped.
    """

    connected: bool
    state_s: float
    silent_s: float
    stale_s: float
    refused: str
    losses: int
    refusals: int


@final
class Staleness:
    """The state of the connection; one for each mirror."""

    def __init__(self, *, max_stale_s: float) -> None:
        # --- constants
        self.max_stale_s = max_stale_s
        # --- mutable state
        self._connected = False
        self._asked = False  # and not heard since
        self._denied: StorePermissionError | None = None
        self._heard: float | None = None  # trio's time; None: never
        self._turned: float | None = None
        self._stuck: dict[int | None, float] = {}  # directories, and since when
        self._stir = trio.Event()
        self._losses = self._refusals = 0

    # --- what happens -----------------------------------------------------------------------

    def heard(self) -> None:
        """Note that etcd has said something."""
        self._heard = trio.current_time()
        if self._asked:
            self._asked = False
            self._wake()

    def last_heard(self, age_s: float) -> None:
        """Note when etcd was last heard, before there was this mount: what is shown is of then."""
        self._heard = trio.current_time() - age_s
        self._wake()

    def asked(self) -> None:
        """Note that etcd was silent, and has been asked whether it is there."""
        self._asked = True
        self._wake()

    def turn(self, *, connected: bool) -> float | None:
        """Note whether a confirmed watch stands. One that does is word from etcd, too.

        Returns:
            After a loss, how many seconds that lasted, if it is over now.
        """
        if connected:
            self.heard()
        if connected == self._connected:
            return None
        if connected:  # confirmed, by reading
            self._denied = None
        now = trio.current_time()
        lasted_s = None if self._turned is None or not connected else now - self._turned
        self._connected = connected
        self._turned = now
        self._losses += not connected
        self._wake()
        return lasted_s

    def deny(self, error: StorePermissionError) -> None:
        """Note that etcd no longer lets us read what the mirror holds."""
        if self._denied is None:
            self._denied = error
            self._wake()

    def allow(self) -> None:
        """Note that etcd lets us read."""
        if self._denied is not None:
            self._denied = None
            self._wake()

    def stick(self, directory: int | None, *, since: float | None) -> None:
        """Note since when the kernel may show older names of a directory; None: no longer.

        One stuck directory is no reason to refuse all others: whoever has made it stuck could
        have that at will. So `--max-stale` does not count it.
        """
        if since is None:
            self._stuck.pop(directory, None)
        else:
            self._stuck[directory] = since

    # --- what follows -----------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a confirmed watch stands, and etcd has answered if it was asked."""
        return self._connected and not self._asked

    @property
    def denied(self) -> bool:
        """Whether etcd has said that we may not read."""
        return self._denied is not None

    def check(self) -> None:
        """Refuse to show what the mirror holds, if it must not be shown.

        Raises:
            MirrorDeniedError: etcd no longer permits it.
            MirrorStaleError: etcd has not been heard for longer than `--max-stale`.
        """
        refusal = self._refusal()
        if refusal is not None:
            raise refusal

    async def until_connected(self) -> None:
        """Return when a confirmed watch stands."""
        while not self.connected:
            await self._stir.wait()

    async def until_refused(self) -> None:
        """Return when nothing may be shown any more."""
        while self._refusal() is None:
            with trio.move_on_after(self._time_left()):
                await self._stir.wait()
        self._refusals += 1

    async def until_shown(self) -> None:
        """Return when what the mirror holds may be shown again."""
        while self._refusal() is not None:
            await self._stir.wait()

    def statistics(self) -> StalenessStatistics:
        """Say how the connection is."""
        now = trio.current_time()
        silent_s = 0.0 if self._heard is None else now - self._heard
        refusal = self._refusal()
        return StalenessStatistics(
            connected=self.connected,
            state_s=0.0 if self._turned is None else now - self._turned,
            silent_s=silent_s,
            stale_s=max(
                0.0 if self.connected else silent_s,
                now - min(self._stuck.values(), default=now),
            ),
            refused="" if refusal is None else str(refusal),
            losses=self._losses,
            refusals=self._refusals,
        )

    def _refusal(self) -> StoreError | None:
        if self._denied is not None:
            return MirrorDeniedError(f"etcd no longer lets this mount read: {self._denied}")
        if self._time_left() <= 0:
            return MirrorStaleError(f"etcd has not been heard for {self.max_stale_s:g} s")
        return None

    def _time_left(self) -> float:
        """Return the seconds for which the mirror may still be shown if nothing is heard."""
        if self.connected or self.max_stale_s == UNLIMITED or self._heard is None:
            return float("inf")
        return self._heard + self.max_stale_s - trio.current_time()

    def _wake(self) -> None:
        self._stir.set()
        self._stir = trio.Event()


@dataclass(slots=True)
class _Question:
    answered: trio.Event = field(default_factory=trio.Event)
    error: StoreError | None = None


@final
class Liveness:
    """Asks etcd whether it is there, unless it has just answered."""

    def __init__(self, store: Store) -> None:
        # --- dependencies
        self._store = store
        # --- mutable state
        self._question: _Question | None = None

    async def check(self) -> None:
        """Return if etcd is there, as far as can be told. Bounded by `--timeout`.

        Raises:
            StoreError: It is not, or lets us in no longer; what a write would fail with.
        """
        question = self._question
        if question is None:
            await self._ask()
            return
        await question.answered.wait()
        if question.error is not None:
            raise type(question.error)(str(question.error)) from question.error

    async def _ask(self) -> None:
        question = self._question = _Question()
        try:
            await self._store.ready()
        except StoreError as exc:
            question.error = exc
            raise
        finally:
            self._question = None
            question.answered.set()
