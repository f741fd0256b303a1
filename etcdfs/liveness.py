"""Whether etcd is there, asked before something is begun that it must carry out in the end.

What this room knows: when it must be asked, and that one question does for all. What it must not
know: what is to be begun.

Shells, and most programs that end without closing what they wrote, never look at what close(2)
says. They do look at open(2): so an open for writing fails when a close would.

It costs no request: a write is entrusted only to a member that has just answered, so that either
the open or the close asks after a silence, and the other need not. What the watch says does not
count, for it comes on another connection, and from a member that may have lost its majority.

Concurrency: trio thread; any number of tasks.
"""

from dataclasses import dataclass, field
from typing import final

import trio

from etcdfs.errors import StoreError
from etcdfs.store import Store


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
