"""How much of what is written and not yet published memory holds, for each user and in all.

What this room knows: whose bytes they are, and that there is an end to them (`--write-buffer`).
What it must not know: what is written, and how it is published.

A file's draft is whole, however little of it was changed, and it stays until the file is
published; of a file that has no name any more it stays until the last close. Whoever wrote first
to a file answers for its draft.

Concurrency: synchronous; one owner.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Final, final

from etcdfs.errors import BufferFullError, BufferShareError
from etcdfs.nodes import File

SHARES: Final = 4
"""Users who can fill the buffer only together: one alone must not stop the others' writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStatistics:
    """What is written and not yet published.

    Attributes:
        files: Files with such bytes.
        size: All these bytes.
        refused: Writes that found no room.
    """

    files: int
    size: int
    refused: int


@final
class WriteBuffers:
    """The drafts of all files, by size and by user."""

    def __init__(self, limit: int, *, max_file_size: int) -> None:
        """Make room for so many bytes; a user has a part of it, and at least room for a file."""
        # --- constants
        self._limit = max(limit, max_file_size)
        self._share = max(limit // SHARES, max_file_size)
        # --- mutable state
        self._held: dict[File, tuple[int, int]] = {}  # whose, and how many bytes
        # INVARIANT: the sums of `_held`
        self._of_user: Counter[int] = Counter()
        self._size = 0
        self._refused = 0

    def take(self, file: File, uid: int, size: int) -> None:
        """Let a file's draft have so many bytes.

        Args:
            file: The file.
            uid: Who writes; whoever wrote to it first answers for it all.
            size: Bytes of the draft; fewer than before are never refused.

        Raises:
            BufferShareError: The user has too many bytes unpublished.
            BufferFullError: All users together have.
        """
        owner, held = self._held.get(file, (uid, 0))
        more = size - held
        if more > 0 and self._of_user[owner] + more > self._share:
            self._refused += 1
            msg = f"user {owner} has {self._of_user[owner]} bytes that are not published yet"
            raise BufferShareError(msg)
        if more > 0 and self._size + more > self._limit:
            self._refused += 1
            msg = f"{self._size} bytes are not published yet"
            raise BufferFullError(msg)
        self._held[file] = (owner, size)
        self._of_user[owner] += more
        self._size += more

    def give_back(self, file: File) -> None:
        """Note that a file has no draft any more."""
        owner, held = self._held.pop(file, (0, 0))
        self._of_user[owner] -= held
        if not self._of_user[owner]:
            del self._of_user[owner]
        self._size -= held

    def statistics(self) -> BufferStatistics:
        """Say how much there is."""
        return BufferStatistics(files=len(self._held), size=self._size, refused=self._refused)
