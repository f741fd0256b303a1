"""The names that readers of directories are shown.

Knows: that a listing is of one moment, however long it is read, and how the memory for that does
not grow with those who read. Does not know: the kernel, what names stand for.

A listing is kept in pieces that all listings share: names of about `PIECE` each, cut where a name's
hash says so, and not at a count, so that one more name changes one piece. Eight hundred handles of
a directory take the room of one, and when it changes in between, little more.

Concurrency: one owner, the trio thread.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, NewType, final
from weakref import WeakValueDictionary

import trio

from etcdfs.tree.inodes import Directory, Inode

DirectoryHandle = NewType("DirectoryHandle", int)

PIECE: Final = 256
"""Names of a piece on average; a power of two."""


@final
class _Piece:
    """Some names in a row; a tuple itself cannot be referred to weakly."""

    __slots__ = ("__weakref__", "names")

    def __init__(self, names: tuple[bytes, ...]) -> None:
        self.names = names


@final
class OpenDirectories:
    """The open directories of a mount."""

    def __init__(self) -> None:
        # --- mutable state
        self._open: dict[DirectoryHandle, tuple[Directory, tuple[_Piece, ...]]] = {}
        self._next = 1
        # INVARIANT: holds the pieces of all that are open, and no other.
        self._pieces: WeakValueDictionary[tuple[bytes, ...], _Piece] = WeakValueDictionary()

    def __len__(self) -> int:
        """Count the pieces that are held."""
        return len(self._pieces)

    def open(self, directory: Directory) -> DirectoryHandle:
        """Open a directory, of which nothing is listed yet."""
        handle = DirectoryHandle(self._next)
        self._next += 1
        self._open[handle] = (directory, ())
        return handle

    def directory(self, handle: int) -> Directory:
        """Return the directory that a handle is for."""
        return self._open[DirectoryHandle(handle)][0]

    def take(self, handle: int) -> None:
        """Take the names that are there now."""
        directory = self.directory(handle)
        pieces = tuple(map(self._piece, _cut(list(directory.children))))
        self._open[DirectoryHandle(handle)] = (directory, pieces)

    def names(self, handle: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Iterate over the names that were taken, from a position on, with the one after each."""
        _, pieces = self._open[DirectoryHandle(handle)]
        position = 0
        for piece in pieces:
            skipped = min(max(start - position, 0), len(piece.names))
            position += skipped
            for name in piece.names[skipped:]:
                position += 1
                yield position, name

    def close(self, handle: int) -> None:
        """Close a directory."""
        del self._open[DirectoryHandle(handle)]

    def _piece(self, names: tuple[bytes, ...]) -> _Piece:
        piece = self._pieces.get(names)
        if piece is None:
            piece = self._pieces[names] = _Piece(names)
        return piece


def _cut(names: list[bytes]) -> Iterator[tuple[bytes, ...]]:
    cuts = [at for at, name in enumerate(names) if not hash(name) % PIECE]
    for start, end in zip([0, *cuts], [*cuts, len(names)], strict=True):
        if start < end:
            yield tuple(names[start:end])


COOKIE_BITS: Final = 62
"""Of a name's hash; an off_t has 63, and the caller puts a few entries before the names."""

BUCKET: Final = 256
"""Names that are sorted together, on average."""

SLICE: Final = 16 * 1024
"""Names that are distributed before others get their turn: a few milliseconds."""

KEPT_NAMES: Final = 1 << 20
"""Names that are kept in order, of all directories but the last one."""


@final
class _Ordered:
    """A directory's names at one moment, by their hashes, in buckets that are sorted when read."""

    __slots__ = ("buckets", "changes", "count", "shift")

    def __init__(self, count: int, changes: int) -> None:
        bits = max(0, (count // BUCKET).bit_length())
        self.buckets: list[list[bytes]] = [[] for _ in range(1 << bits)]
        self.shift = COOKIE_BITS - bits
        self.count = count
        self.changes = changes


@final
class ListingsByHash:
    """Listings that are read without a handle: the kernel keeps them, and opens no directory.

    Where a reader goes on is all that it says, however long it waited; so the position is not a
    number in some list, but the hash of the name before, as on ext4: a name that stays is listed
    once, whatever comes and goes meanwhile. (Two of a million names have the same hash of 62 bits
    in one of ten million directories; then one may be left out, where an answer ends between them.)
    """

    def __init__(self) -> None:
        # --- mutable state
        self._kept: OrderedDict[Inode, _Ordered] = OrderedDict()
        self._count = 0  # INVARIANT: of names in them

    def __len__(self) -> int:
        """Count the names that are kept in order."""
        return self._count

    async def take(self, directory: Directory, *, anew: bool) -> None:
        """Put the names in order; `anew`: those that are there now, for who begins to read."""
        kept = self._kept.get(directory.inode)
        if kept is not None and not (anew and kept.changes != directory.changes):
            self._kept.move_to_end(directory.inode)
            return
        names = list(directory.children)
        ordered = _Ordered(len(names), directory.changes)
        buckets, shift = ordered.buckets, ordered.shift
        for start in range(0, len(names), SLICE):
            if start:
                await trio.lowlevel.checkpoint()
            for name in names[start : start + SLICE]:
                buckets[_cookie(name) >> shift].append(name)
        self._keep(directory.inode, ordered)

    def names(self, directory: Directory, position: int) -> Iterator[tuple[int, bytes]]:
        """Iterate over the names from a position on, with the one after each; after `take`."""
        ordered = self._kept[directory.inode]
        for number in range(position >> ordered.shift, len(ordered.buckets)):
            bucket = ordered.buckets[number]
            bucket.sort(key=_cookie)
            for name in bucket:
                cookie = _cookie(name)
                if cookie >= position:
                    yield cookie + 1, name

    def drop(self, inode: int) -> None:
        """Let go of the names of an inode that the kernel has forgotten, if they are kept."""
        dropped = self._kept.pop(Inode(inode), None)
        self._count -= 0 if dropped is None else dropped.count

    def _keep(self, inode: Inode, ordered: _Ordered) -> None:
        self.drop(inode)
        self._count += ordered.count
        self._kept[inode] = ordered
        while self._count > KEPT_NAMES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._count -= dropped.count


def _cookie(name: bytes) -> int:
    return hash(name) & ((1 << COOKIE_BITS) - 1)
