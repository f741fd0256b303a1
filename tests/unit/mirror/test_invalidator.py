"""Who holds the locks that the kernel needs."""

from collections.abc import Callable, Collection

from etcdfs.mirror.invalidator import Invalidator
from etcdfs.tree.inodes import Cached, Dentry, Inode


class DeafKernel:
    """Never lets go of anything."""

    def __init__(self) -> None:
        self.unopened: set[Inode] = set()

    def submit(self, cached: Collection[Cached], done: Callable[[], None] | None = None) -> None:
        pass

    def at_once(self, cached: Collection[Cached]) -> bool:
        return False

    def listen(self, listener: Callable[[Inode | None, float | None], None]) -> None:
        raise NotImplementedError


def test_a_directory_is_held_as_long_as_a_call_holds_it() -> None:
    invalidator = Invalidator(DeafKernel(), lambda: None)
    entry, other = Dentry(Inode(2), b"f"), Dentry(Inode(3), b"f")
    with invalidator.holding((entry,)), invalidator.holding((entry,)):
        assert [invalidator.holds(d) for d in (Inode(2), Inode(3), None)] == [True, False, False]
        assert not invalidator.is_held(), "the kernel does not want it"
        invalidator.submit([other])
        assert not invalidator.is_held()
        invalidator.submit([entry])
        assert invalidator.is_held()
    assert not invalidator.holds(Inode(2))
    assert not invalidator.is_held()
