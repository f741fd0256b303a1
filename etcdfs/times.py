"""When things changed that the kernel has let go of, and the tree with it.

What this room knows: names, and the times that they had. What it must not know: nodes, keys.

etcd keeps no times, so without a mirror a time is that of the moment when this mount saw a version
first. It is to stay the same when the kernel, short of memory, forgets the inode and asks again.

Concurrency: synchronous; used on the trio thread only.
"""

from typing import Final, NamedTuple, Protocol, final

from cachetools import LRUCache

NAMES_MAX: Final = 65_536
"""Names whose times are kept; about 20 MiB at most. Of others the times begin anew."""


class Timed(Protocol):
    """What has times, in nanoseconds since the epoch, and a version: 0 for a directory."""

    mtime_ns: int
    ctime_ns: int

    @property
    def version(self) -> int:
        """The key's mod_revision, 0 for a directory."""
        ...


class _Kept(NamedTuple):
    version: int
    mtime_ns: int
    ctime_ns: int


@final
class Times:
    """The times of dropped names."""

    def __init__(self) -> None:
        self._kept: LRUCache[tuple[bytes, ...], _Kept] = LRUCache(NAMES_MAX)

    def keep(self, names: tuple[bytes, ...], node: Timed) -> None:
        """Keep the times of what is dropped."""
        self._kept[names] = _Kept(node.version, node.mtime_ns, node.ctime_ns)

    def restore(self, names: tuple[bytes, ...], node: Timed) -> bool:
        """Give what is found again the times it had; say whether it is no new name.

        Another version is later than the one that was dropped, even if the clock went back.
        """
        kept = self._kept.pop(names, None)
        if kept is None or bool(kept.version) != bool(node.version):
            return False
        if kept.version == node.version:
            node.mtime_ns, node.ctime_ns = kept.mtime_ns, kept.ctime_ns
        else:
            node.mtime_ns = max(node.mtime_ns, kept.mtime_ns + 1)
            node.ctime_ns = max(node.ctime_ns, kept.ctime_ns + 1)
        return True

    def drop(self, names: tuple[bytes, ...]) -> None:
        """Note that there is nothing under a name any more."""
        self._kept.pop(names, None)
