"""How a mount comes to have something to show: from etcd, or from its snapshot.

Knows: how long etcd is waited for, when a snapshot is shown, and when a mirror that was loaded
from one has all that etcd has. Does not know: how a snapshot is stored, how a mirror follows.

Concurrency: trio thread; called one after the other by `daemon.main`.
"""

import gc
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeVar, final

import trio

from etcdfs.consistency.catch_up import catch_up
from etcdfs.errors import (
    EtcdRefusedError,
    EtcdUnreachableError,
    LoginError,
    StoreError,
    StoreLoginError,
    StorePermissionError,
    StoreTlsError,
    TlsError,
)
from etcdfs.keyspace.store import Store
from etcdfs.mirror.mirror import Mirror
from etcdfs.process.startup_protocol import Progress, Reporter, Waiting
from etcdfs.snapshots.snapshots import Snapshots

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S: Final = 1.0
"""Pause between two attempts to reach an etcd that is waited for."""


@final
class Patience:
    """Tries again what etcd does not answer, for `--wait-for-etcd` from now on."""

    def __init__(self, patience_s: float, reporter: Reporter) -> None:
        self._deadline = trio.current_time() + patience_s
        self._reporter = reporter

    async def until_done(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what the attempt returns; what etcd refuses is not tried again.

        Raises:
            EtcdUnreachableError: It did not answer in time.
            EtcdRefusedError: It refused.
        """
        while True:
            try:
                return await attempt()
            except EtcdUnreachableError as exc:
                left_s = self._deadline - trio.current_time()
                if left_s <= 0:
                    raise
                log.info("waiting for etcd, for another %.0f s: %s", left_s, exc)
                self._reporter.report(Waiting(reason=str(exc), left_s=left_s))
                await trio.sleep(min(RETRY_S, left_s))


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn what etcd says at the start into what a person is told."""
    try:
        yield
    except StoreLoginError as exc:
        raise LoginError(str(exc)) from exc
    except StoreTlsError as exc:
        raise TlsError(str(exc)) from exc
    except StorePermissionError as exc:
        raise EtcdRefusedError(str(exc)) from exc
    except StoreError as exc:
        raise EtcdUnreachableError(str(exc)) from exc


@final
class Filling:
    """How a mirror gets its first state: from etcd, a snapshot that it confirms, or a snapshot."""

    def __init__(
        self,
        tasks: trio.Nursery,
        store: Store,
        mirror: Mirror,
        snapshots: Snapshots | None,
        reporter: Reporter,
        *,
        timeout_s: float,
    ) -> None:
        """Fill a mirror, whose tasks are started in the nursery."""
        self._tasks = tasks
        self._store = store
        self._mirror = mirror
        self._snapshots = snapshots
        self._reporter = reporter
        self._timeout_s = timeout_s

    async def from_etcd(self) -> None:
        """Return once the mirror shows what etcd has.

        Raises:
            EtcdUnreachableError: It does not answer.
            EtcdRefusedError: It refuses.
        """
        with _without_collector(), store_errors():
            try:
                if not self._mirror.revision and self._snapshots is not None:
                    cluster = (await self._store.status()).cluster
                    await self._snapshots.load(self._mirror, cluster=cluster)
                await self._start(offline=False)
                await self._catch_up()
            except StorePermissionError as exc:
                if exc.is_of_role and self._snapshots is not None:
                    await self._snapshots.forget(str(exc))
                raise

    async def from_snapshot(self, unreachable: EtcdUnreachableError) -> None:
        """Have the mirror show the snapshot until etcd answers.

        Raises:
            EtcdUnreachableError: There is none.
        """
        with _without_collector():
            if not self._mirror.revision and self._snapshots is not None:
                fault = await self._snapshots.load(self._mirror, cluster=0)
                if fault:
                    raise EtcdUnreachableError(f"{unreachable}; the snapshot is of no use: {fault}")
            if self._snapshots is not None:
                self._snapshots.is_offline = True
            log.warning(
                "etcd does not answer, and a snapshot is shown: %s",
                unreachable,
                extra={"event": "offline", "fields": {"reason": str(unreachable)}},
            )
            await self._start(offline=True)

    async def until_live(self) -> None:
        """Return once the mirror that shows a snapshot is in step with etcd."""
        while True:
            await self._mirror.staleness.until_connected()
            try:
                cluster = (await self._store.status()).cluster
                if self._snapshots is not None:
                    await self._snapshots.recognize(self._mirror, cluster)
                await self._catch_up()
                break
            except StoreError as exc:
                log.debug("the mount is not live yet: %s", exc)
                await trio.sleep(RETRY_S)
        if self._snapshots is not None:
            self._snapshots.is_offline = False
        log.info(
            "etcd answers: the mount is live, at revision %d",
            self._mirror.revision,
            extra={"event": "live", "fields": {"revision": self._mirror.revision}},
        )

    async def _start(self, *, offline: bool) -> None:
        def progress(keys: int, size: int) -> None:
            self._reporter.report(Progress(keys=keys, bytes=size))

        if not self._mirror.revision:  # else only what comes after it failed
            await self._tasks.start(partial(self._mirror.run, progress, offline=offline))
        if self._mirror.stored_records is not None:
            await self._tasks.start(partial(self._mirror.stored_records.run, offline=offline))

    async def _catch_up(self) -> None:
        """Return once what was resumed from a snapshot has all that etcd had when this was called.

        Raises:
            StoreError: etcd could not be asked, or the watch does not bring it.
        """
        mirror, records = self._mirror, self._mirror.stored_records
        if mirror.loaded_at is not None:
            await catch_up(self._store, mirror, timeout_s=self._timeout_s)
        if records is not None and records.loaded_at is not None:
            try:
                await catch_up(self._store, records, timeout_s=self._timeout_s)
            except StorePermissionError as exc:
                mirror.refuse_records(exc)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's collector out while a tree is made.

    It would walk a hundred thousand new objects again and again, and find nothing: the tree has no
    garbage in it yet.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
