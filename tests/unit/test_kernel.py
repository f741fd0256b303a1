"""The kernel door's queue, with the kernel replaced by one that waits."""

import threading

import pytest
import trio

import etcdfs.kernel
from etcdfs.kernel import KernelCache
from etcdfs.tree import Cached, Entry, Inode

PATIENCE_S = 20


async def test_what_waits_is_not_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Cached] = []
    first, go_on = threading.Event(), threading.Event()

    def invalidate(cached: Cached) -> None:
        told.append(cached)
        first.set()
        go_on.wait(PATIENCE_S)

    monkeypatch.setattr(etcdfs.kernel, "_invalidate", invalidate)
    kernel = KernelCache()
    names = [Entry(Inode(1), b"%d" % number) for number in range(3)]
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        kernel.start(nursery)
        kernel.submit(names)
        assert first.wait(PATIENCE_S)
        for _ in range(1000):
            kernel.submit(names)
        # The first one is being told just now, which may be too early: it is told again.
        assert kernel.statistics().waiting == len(names)
        kernel.submit(names, done.set)
        go_on.set()
        with trio.fail_after(PATIENCE_S):
            await done.wait()
        nursery.cancel_scope.cancel()
    kernel.stop()
    assert told == [*names, names[0]]
    assert kernel.statistics().waiting == 0
