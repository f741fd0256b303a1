"""That a directory is still there when something is made in it.

What this room knows: which key shows that a directory is there (its *witness*), and how a
transaction is bound to it. What it must not know: what is made.

A directory is there while any key is below its prefix. A condition on the whole prefix would
have etcd read all of it, so it is on one key that is known to be there: the marker, or else any
file below. If that has gone, the same transaction asks for another one; if there is none, so has
the directory.

Concurrency: as the store's.
"""

from dataclasses import dataclass, replace
from typing import final

from etcdfs.answers import page_of
from etcdfs.errors import CallerError, NotFoundError, StoreProtocolError
from etcdfs.sidekeys import ATTRIBUTES
from etcdfs.store import Committed, Compare, Get, Store, Transaction, exists, range_end
from etcdfs.tree import Directory, Tree


@final
@dataclass(frozen=True, slots=True)
class Parent:
    """A directory that must be there.

    Attributes:
        prefix: What the keys below it begin with.
        witness: One of them, as far as is known.
    """

    prefix: bytes
    witness: bytes

    @property
    def condition(self) -> Compare:
        """That the witness is there."""
        return exists(self.witness)

    @property
    def question(self) -> Transaction:
        """Whether it is, and else what is: to be asked when the condition may have failed."""
        end = range_end(self.prefix)
        return Transaction((self.condition,), (), (Get(self.prefix, end, limit=1, keys_only=True),))

    def after(self, answer: object) -> "Parent":
        """Return the parent with the witness that the answer to `question` names, if another.

        Raises:
            NotFoundError: There is none.
        """
        if not isinstance(answer, Committed):
            msg = f"an inner transaction came back as {type(answer).__name__}"
            raise StoreProtocolError(msg)
        if answer.succeeded:
            return self
        found = page_of(answer.results[0]).entries
        if not found:
            msg = f"the directory {self.prefix!r} was deleted by another client"
            raise NotFoundError(msg)
        return replace(self, witness=found[0].key)


def parent_of(tree: Tree, directory: Directory) -> Parent | None:
    """Return a directory as the parent of what is to be made; None if it is always there."""
    if directory is tree.root:
        return None
    try:
        prefix = tree.prefix_of(directory)
    except CallerError:  # part of an escaped long name: no prefix bounds it
        return None
    if ATTRIBUTES.startswith(prefix):  # what is below it may be nothing that is shown
        return None
    if directory.marker is not None:
        return Parent(prefix, prefix)
    if directory.witness is not None and directory.witness.startswith(prefix):
        return Parent(prefix, directory.witness)
    known = (key for key, _ in tree.facts(directory) if key.startswith(prefix))
    return Parent(prefix, next(known, prefix))


@final
class Witnessed:
    """A directory that something is moved to, try after try."""

    def __init__(self, store: Store, parent: Parent | None) -> None:
        self._store = store
        self._parent = parent
        self._is_tried = False

    async def parent(self) -> Parent | None:
        """Return it; for each try but the first with a witness that is there.

        Raises:
            NotFoundError: It has been deleted.
        """
        if self._parent is not None and self._is_tried:
            answer = await self._store.commit(Transaction((), (self._parent.question,)))
            self._parent = self._parent.after(answer.results[0])
        self._is_tried = True
        return self._parent


def within(parent: Parent | None, making: Transaction) -> Transaction:
    """Return a transaction on condition that a directory is there; its question comes last."""
    if parent is None:
        return making
    return replace(
        making,
        when=(*making.when, parent.condition),
        otherwise=(*making.otherwise, parent.question),
    )
