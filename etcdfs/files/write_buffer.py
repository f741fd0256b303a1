"""A file being written: its bytes before they are put in etcd, and what kind of change they are.

Knows: how writes and truncations change a value, which of the three kinds of change they add up to,
and how much may be held so, for each user and in all (`--write-buffer`). Does not know: etcd, time,
how it is written back.

The kind decides what happens when another client wrote the key meanwhile:

* `WHOLE`: every old byte was replaced: the file was emptied, or overwritten by somebody who
  cannot read it; the last writer wins;
* `APPEND`: bytes were added at the old end only; they are added to whatever is newest;
* `PARTIAL`: anything else; the write is refused if the key changed.

A buffer is the whole file, however little of it was changed, and it stays until it is written back;
that of a file without a name stays until the last close. Whoever wrote first to a file answers for
its buffer.

Concurrency: synchronous; one owner.
"""

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Final, final

from etcdfs.errors import BufferFullError, BufferShareError
from etcdfs.tree.inodes import File


class Kind(Enum):
    """What the writes so far amount to."""

    NONE = "none"
    APPEND = "append"
    WHOLE = "whole"
    PARTIAL = "partial"


@final
class WriteBuffer:
    """The unpublished bytes of one file, shared by all its writers in this mount.

    Attributes:
        base: The published value the write buffer starts from.
        kind: What the changes since `base` amount to.
        changed_ns: When it was made or last changed.
        mtime_ns: The same, or what utimens(2) set since.
        times: What utimens(2) set mtime and atime to (None: not atime); they hold for the
            version that is yet to be written back, unless it was changed after that.
        tries: What was sent to etcd without an answer, to be recognised later, each with all
            that the write buffer was then (others' bytes may come before ours in what was sent).
        is_bare: Whether the file was only made, neither emptied nor written to: it must not
            replace what another client has made meanwhile.
        is_added: Whether the file was made and not emptied, and only O_APPEND wrote to it: its
            bytes are added to what another client has made meanwhile.
        is_refused: Whether the last attempt to publish what is here failed, and whoever flushed
            was told: a release, which can tell nobody, does not try again.
        unreported: Handles that have written what is not written back, and were not told so.
        is_torn: Whether a write did not fit: what is here is half of what was meant, and must
            not be written back. A truncation says that the writer has taken note.
    """

    __slots__ = (
        "_buffer",
        "_overwritten",
        "base",
        "changed_ns",
        "is_added",
        "is_bare",
        "is_refused",
        "is_torn",
        "kind",
        "mtime_ns",
        "times",
        "tries",
        "unreported",
    )

    def __init__(self, base: bytes, *, whole: bool = False) -> None:
        """Start from `base`; `whole` when nothing of it is to stay (a new or emptied file)."""
        self.base = base
        self.kind = Kind.WHOLE if whole else Kind.NONE
        self.changed_ns = self.mtime_ns = 0
        self.times: tuple[int, int | None] | None = None
        self.tries: list[tuple[bytes, bytes]] = []
        self.is_added = False
        self.is_bare = False
        self.is_refused = False
        self.is_torn = False
        self.unreported: set[int] = set()
        self._buffer = bytearray() if whole else bytearray(base)
        # INVARIANT: all old bytes before this offset have been replaced, blindly
        self._overwritten = 0

    def __len__(self) -> int:
        return len(self._buffer)

    @property
    def is_dirty(self) -> bool:
        """Whether there is anything to publish."""
        return self.kind is not Kind.NONE

    @property
    def adds(self) -> bool:
        """Whether it only adds bytes to whatever there is."""
        return self.kind is Kind.APPEND or self.is_added

    @property
    def is_tellable(self) -> bool:
        """Whether what a key holds tells that this is in it: added bytes may be another's."""
        return self.is_bare or not self.adds

    @property
    def value(self) -> bytes:
        """All of it."""
        return bytes(self._buffer)

    @property
    def tail(self) -> bytes:
        """What was added past the old end."""
        return bytes(self._buffer[len(self.base) :])

    @property
    def times_set(self) -> tuple[int, int | None] | None:
        """The times that were set, if nothing was written since."""
        return self.times if self.times is not None and self.times[0] == self.mtime_ns else None

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on."""
        return bytes(self._buffer[offset : offset + size])

    def end_of_write(self, offset: int, size: int, *, append: bool) -> int:
        """Return the length the value would have after `write`."""
        start = len(self._buffer) if append else offset
        return max(len(self._buffer), start + size)

    def write(
        self, offset: int, data: bytes, *, append: bool, now_ns: int, blind: bool = True
    ) -> None:
        """Put `data` at `offset` (at the end with `append`); a gap is filled with NUL.

        `blind` says that the writer cannot read the file: what replaces all of it was not made
        from what it replaces.
        """
        if not data:
            return
        self.is_bare = self.is_refused = False
        self.is_added = self.is_added and append
        if append:
            offset = len(self._buffer)
        self._classify(offset, len(data), blind=blind)
        if offset > len(self._buffer):
            self._buffer.extend(bytes(offset - len(self._buffer)))
        self._buffer[offset : offset + len(data)] = data
        self.changed_ns = self.mtime_ns = now_ns

    def truncate(self, size: int, now_ns: int) -> None:
        """Cut to `size`, or extend to it with NUL."""
        self.is_added = self.is_bare = self.is_refused = self.is_torn = False
        if size == 0:
            self.kind = Kind.WHOLE
        elif size != len(self._buffer) and self.kind is not Kind.WHOLE:
            self.kind = Kind.PARTIAL
        if size < len(self._buffer):
            del self._buffer[size:]
        else:
            self._buffer.extend(bytes(size - len(self._buffer)))
        self.changed_ns = self.mtime_ns = now_ns

    def written_back(self, value: bytes) -> None:
        """Note that `value`, the write buffer as it was when it was sent, has been written back."""
        if len(value) == len(self._buffer) and value == self._buffer:
            self.kind = Kind.NONE
            self.unreported.clear()
        elif self.is_added:
            self.kind = Kind.APPEND  # to what is there by now
        self.base = value
        self.tries.clear()
        self.is_added = self.is_refused = False
        self._overwritten = 0

    def check_invariants(self) -> None:
        """Assert what must hold between any two calls."""
        assert self._overwritten >= 0
        if self.kind is Kind.NONE:
            assert bytes(self._buffer) == self.base
        if self.kind is Kind.APPEND:
            assert self._buffer.startswith(self.base)

    def _classify(self, offset: int, size: int, *, blind: bool) -> None:
        if self.kind is Kind.WHOLE:
            return
        if offset == len(self._buffer) and offset >= len(self.base):
            if self.kind is Kind.NONE:
                self.kind = Kind.APPEND
            return
        self.kind = Kind.PARTIAL
        if blind and offset <= self._overwritten:
            self._overwritten = max(self._overwritten, offset + size)
        if self._overwritten >= len(self.base):
            self.kind = Kind.WHOLE


SHARES: Final = 4
"""Users who can fill the buffer only together: one alone must not stop the others' writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaStatistics:
    """What is written and not yet written back.

    Attributes:
        files: Files with such bytes.
        size: All these bytes.
        refused: Writes that found no room.
    """

    files: int
    size: int
    refused: int


@final
class WriteBufferQuota:
    """The write buffers of all files, by size and by user."""

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
        """Let a file's write buffer have so many bytes.

        Args:
            file: The file.
            uid: Who writes; whoever wrote to it first answers for it all.
            size: Bytes of the write buffer; fewer than before are never refused.

        Raises:
            BufferShareError: The user has too many bytes unpublished.
            BufferFullError: All users together have.
        """
        owner, held = self._held.get(file, (uid, 0))
        more = size - held
        if more > 0 and self._of_user[owner] + more > self._share:
            self._refused += 1
            msg = f"user {owner} has {self._of_user[owner]} bytes that are not written back yet"
            raise BufferShareError(msg)
        if more > 0 and self._size + more > self._limit:
            self._refused += 1
            msg = f"{self._size} bytes are not written back yet"
            raise BufferFullError(msg)
        self._held[file] = (owner, size)
        self._of_user[owner] += more
        self._size += more

    def give_back(self, file: File) -> None:
        """Note that a file has no write buffer any more."""
        owner, held = self._held.pop(file, (0, 0))
        self._of_user[owner] -= held
        if not self._of_user[owner]:
            del self._of_user[owner]
        self._size -= held

    def statistics(self) -> QuotaStatistics:
        """Say how much there is."""
        return QuotaStatistics(files=len(self._held), size=self._size, refused=self._refused)
