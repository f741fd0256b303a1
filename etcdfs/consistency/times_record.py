"""The record of when revisions were made, in etcd: times that outlast the mount.

Knows: where the record is, when it is read and when it is written. Does not know: what it says
(`revision_times`), nodes.

It is one key, `/.etcdfs/attrs/`: the place of attributes of no key. It is read once. Only mounts
with a mirror write it, as only they learn of each revision when it is made: when they are mounted
and know of revisions that it does not, every `INTERVAL_S` if there have been further ones, and when
they are unmounted. So what is lost with a daemon that dies is when the last changes were made, not
their order. Several mounts merge what they know.

A role that does not reach there goes without: times begin anew with each mount then, in order.

Concurrency: trio thread; `save` may be called while another one is under way.
"""

import logging
from typing import Final, final

import trio

from etcdfs.errors import StoreError, StorePermissionError
from etcdfs.keyspace.attribute_records import ATTRIBUTES
from etcdfs.keyspace.revision_times import RevisionTimes
from etcdfs.keyspace.store import Clock, Get, Page, Put, Store, Transaction, unchanged

log = logging.getLogger(__name__)

TIMES_KEY: Final = ATTRIBUTES
"""The key of the record."""

INTERVAL_S: Final = 3600.0
"""Between two writes of a mount that goes on."""

MAX_RETRIES: Final = 16
"""Lost races before a save gives up; each loss means that another mount has saved."""

PATIENCE_S: Final = 1.0
"""How long a mount that begins or ends waits for its record to be written."""


@final
class TimesRecord:
    """Reads and writes the record for one mount."""

    def __init__(self, store: Store, times: RevisionTimes, clock: Clock, *, writes: bool) -> None:
        # --- dependencies
        self._store = store
        self._times = times
        self._clock = clock
        # --- mutable state
        self._writes = writes
        self._known = 0  # mod_revision of the record, as it was last seen
        self._saved = 0  # the newest revision that is in it

    async def load(self) -> None:
        """Take over what the record says; nothing if it cannot be read."""
        try:
            self._take(await self._store.range(TIMES_KEY))
        except StoreError as exc:
            self._writes = False
            log.info("times of changes are not kept: %s", exc)

    async def save(self) -> None:
        """Write what the record does not say yet; it waits until the next time if that fails."""
        with trio.move_on_after(PATIENCE_S):
            try:
                await self._save()
            except StorePermissionError as exc:
                self._writes = False
                log.info("times of changes are not kept: %s", exc)
            except StoreError as exc:
                log.debug("times of changes are not kept for now: %s", exc)

    async def run(self) -> None:
        """Save from time to time, for ever."""
        while True:
            await trio.sleep(INTERVAL_S)
            await self.save()

    async def _save(self) -> None:
        for _ in range(MAX_RETRIES):
            newest = self._times.newest
            if not self._writes or newest <= self._saved:
                return
            known, put, get = (
                unchanged(TIMES_KEY, self._known),
                Put(TIMES_KEY, self._times.encode()),
                Get(TIMES_KEY),
            )
            committed = await self._store.commit(Transaction((known,), (put,), (get,)))
            if committed.succeeded:
                self._known, self._saved = committed.revision, newest
                return
            self._take(committed[get])

    def _take(self, page: Page) -> None:
        self._known = 0
        for entry in page.entries:
            self._known = entry.mod_revision
            saved = self._times.merge(entry.value, self._clock())
            if saved is None:
                self._writes = False
                log.warning(
                    "%r does not say when revisions were made, and is left alone", TIMES_KEY
                )
            else:
                self._saved = saved
