"""Open directories, and the names that each shows.

Knows: that a listing is of one moment, however long it is read, and how the memory for that does
not grow with those who read. Does not know: the kernel, what names stand for.

A listing is kept in pieces that all listings share: names of about `PIECE` each, cut where a name's
hash says so, and not at a count, so that one more name changes one piece. Eight hundred handles of
a directory take the room of one, and when it changes in between, little more.

Concurrency: one owner, the trio thread.
"""

from collections.abc import Iterator
from typing import Final, NewType, final
from weakref import WeakValueDictionary

from etcdfs.tree.inodes import Directory

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
