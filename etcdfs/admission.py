"""How many requests may wait: for etcd, for a revision, for one another.

Knows: how many wait already, and whose they are. Does not know: what for.

A request that waits holds memory and one of the tasks that serve the kernel. Whoever can make
requests can make as many as he has threads, and an outage makes all of them wait. So a request
that is about to wait asks for a place, and is refused (EAGAIN) when there is none, before anything
has been done for it. What is answered from memory needs none.

A user may have as many places as are free. So one alone gets half of them; two that take all they
can get a third each, and n get one part each of n + 1: there is always something left for whoever
comes next, with no limit that would have to be set for each.

Concurrency: trio thread; synchronous. Which request is meant is known by the task (`ContextVar`);
what no request asked for, as the watch and audits, is never refused.
"""

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, final

from etcdfs.errors import BusyError

PLACES: Final = 4096
"""Requests that may wait. Each takes about 10 KiB of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionStatistics:
    """Requests that wait.

    Attributes:
        waiting: How many do.
        refused: How many were refused, ever.
    """

    waiting: int
    refused: int


@final
class Admission:
    """The places of one mount."""

    def __init__(self, places: int = PLACES) -> None:
        # --- constants
        self._places = places
        # --- mutable state
        # INVARIANT: one for each request that has a place, by user.
        self._waiting: Counter[int] = Counter()
        self._free = places
        self._refused = 0

    def take(self, user: int) -> None:
        """Take a place for a request of a user.

        Raises:
            BusyError: There is none for that user.
        """
        if self._waiting[user] >= self._free:
            self._refused += 1
            msg = f"{self._places - self._free} requests wait, {self._waiting[user]} of user {user}"
            raise BusyError(msg)
        self._waiting[user] += 1
        self._free -= 1

    def give_back(self, user: int) -> None:
        """Give a place back."""
        self._free += 1
        self._waiting[user] -= 1
        if not self._waiting[user]:
            del self._waiting[user]

    def statistics(self) -> AdmissionStatistics:
        """Count what waits, and what was refused."""
        return AdmissionStatistics(waiting=self._places - self._free, refused=self._refused)


@final
class Request:
    """One request of the kernel's, from its arrival to its answer."""

    __slots__ = ("_admission", "_find_user", "_is_over", "_place_of")

    def __init__(self, admission: Admission, find_user: Callable[[], int]) -> None:
        """Begin one; whose it is, is asked for if it must wait."""
        self._admission = admission
        self._find_user = find_user
        self._place_of: int | None = None
        self._is_over = False

    def wait(self) -> None:
        """Have a place, if it has none yet; see `about_to_wait`."""
        if self._place_of is None and not self._is_over:  # tasks that it has started may outlive it
            user = self._find_user()
            self._admission.take(user)
            self._place_of = user

    def end(self) -> None:
        """Note that it is answered."""
        self._is_over = True
        if self._place_of is not None:
            self._admission.give_back(self._place_of)


current: Final[ContextVar[Request | None]] = ContextVar("current", default=None)
"""The request that this task is about."""


def about_to_wait() -> None:
    """Say that the request in hand cannot be answered from memory.

    The first time that is said of a request it may be refused; so say it before anything is done.

    Raises:
        BusyError: Too many wait.
    """
    request = current.get()
    if request is not None:
        request.wait()
