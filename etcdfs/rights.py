"""What etcd's roles let a mount do with records of attributes.

What this room knows: whether records could be read and written when that was last tried, and
since when. What it must not know: when it is tried again, what a record says.

Nobody may be shown a file by default that a record would have kept from him. So while records
cannot be read, what is known of them stays, and everything is shown without the rights of group
and others (`attributes`): when in doubt, closed. Whether they can be written is for whoever wants
to know why a mode was refused; it is tried each time.

That a password is wrong says nothing of either (`StorePermissionError.is_of_role`).

Concurrency: trio thread.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from etcdfs.errors import StorePermissionError
from etcdfs.sidekeys import is_side_key
from etcdfs.store import Committed, Delete, Put, Store, Transaction

log = logging.getLogger(__name__)

RECHECK_S: Final = 5.0
"""How soon what was refused is tried again at the latest, where no backoff is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RightsStatistics:
    """What roles let the mount do with records.

    Attributes:
        readable: Whether records could be read when last tried; if not, all is closed.
        writable: Whether they could be written when last tried.
        closings: Times that they could not be read any more.
        refusals: Writes of records that were refused.
    """

    readable: bool
    writable: bool
    closings: int
    refusals: int


@final
class Rights:
    """The rights of one mount, as far as they have been tried."""

    def __init__(self) -> None:
        # --- mutable state
        self.readable = True
        self.on_turn: Callable[[], None] = _do_nothing  # whenever `readable` has changed
        self._writable = True
        self._closings = self._refusals = 0

    def refuse_reading(self, refusal: StorePermissionError) -> None:
        """Note that records cannot be read.

        Raises:
            StorePermissionError: The refusal, if it says nothing of that.
        """
        if not refusal.is_of_role:
            raise refusal
        if self.readable:
            self._closings += 1
            self.readable = False
            self.on_turn()
            log.warning(
                "attributes cannot be read: all is its owner's alone (%s); --no-attrs opens it",
                refusal,
            )

    def allow_reading(self) -> None:
        """Note that records can be read, and that what can be shown is known."""
        if not self.readable:
            self.readable = True
            self.on_turn()
            log.info("attributes can be read again")

    def refuse_writing(self, refusal: StorePermissionError) -> None:
        """Note that a record could not be written.

        Raises:
            StorePermissionError: The refusal, if it says nothing of that.
        """
        if not refusal.is_of_role:
            raise refusal
        self._refusals += 1
        # A role may reach some records and not others: the first refusal is news.
        log.log(
            logging.WARNING if self._refusals == 1 else logging.DEBUG,
            "attributes cannot be written: %s",
            refusal,
        )
        self._writable = False

    def allow_writing(self) -> None:
        """Note that a record has been written."""
        self._writable = True

    def statistics(self) -> RightsStatistics:
        """Say what has been tried."""
        return RightsStatistics(
            readable=self.readable,
            writable=self._writable,
            closings=self._closings,
            refusals=self._refusals,
        )


def _do_nothing() -> None:
    pass


async def commit_with(
    store: Store, rights: Rights, dressed: Transaction, bare: Transaction
) -> tuple[Transaction, Committed]:
    """Commit with records; without, if that is what roles forbid: content still works.

    Returns:
        Which of the two was sent, and what became of it.

    Raises:
        StoreError: The other one was refused as well, or etcd could not be asked.
    """
    try:
        committed = await store.commit(dressed)
    except StorePermissionError as exc:
        if dressed == bare or not exc.is_of_role:
            raise
        committed = await store.commit(bare)
        rights.refuse_writing(exc)
        return bare, committed
    if any(isinstance(each, (Put, Delete)) and is_side_key(each.key) for each in dressed.then):
        rights.allow_writing()
    return dressed, committed
