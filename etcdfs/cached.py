"""What the kernel may hold cached, and must be told to let go of.

What this room knows: inode numbers and names. What it must not know: nodes, keys.

Concurrency: none; frozen values.
"""

from dataclasses import dataclass
from typing import NewType

Inode = NewType("Inode", int)


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory, as the kernel may have it cached."""

    directory: Inode
    name: bytes


@dataclass(frozen=True, slots=True)
class Expiry:
    """A name that is to be asked for again, but not thrown out of the kernel's memory.

    Linux unmounts whatever is mounted on, or below, a name that is thrown out.
    """

    within: Entry


@dataclass(frozen=True, slots=True)
class Listing:
    """The attributes of an inode; `within` is its entry, None for the root.

    With `pages`, the content of a file as well.
    """

    inode: Inode
    within: Entry | None
    pages: bool = False


Cached = Entry | Expiry | Listing
"""What the kernel must be told to let go of."""
