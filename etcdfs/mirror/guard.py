"""What happens beside the watch: audits, and the end of showing what may not be shown.

Knows: that the kernel has answers of its own, which must go when the mirror may no longer be shown.
Does not know: why it may not (`etcdfs.consistency.staleness`).

While nothing may be shown each question that reaches us is refused, so that nothing new gets
into the kernel's caches. Pages of files stay in its page cache: whoever has a file open has one
version of it, which never changes, and goes on reading what the kernel holds of that.

Concurrency: trio thread; started once the mirror has its first listing.
"""

import logging
from contextlib import suppress
from typing import Final

import trio

from etcdfs.mirror.mirror import Mirror

log = logging.getLogger(__name__)

FORGET_SIZE: Final = 1000
"""Names handed to the kernel at a time when it is to forget all of them."""


async def watch_over(mirror: Mirror) -> None:
    """Audit a mirror, and keep the kernel from showing what may not be shown; for ever."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror.auditor.run, mirror.doubt, mirror.staleness.deny)
        if mirror.stored_records is not None:
            nursery.start_soon(mirror.stored_records.audit)
            nursery.start_soon(_watch_rights, mirror)
        while True:
            await mirror.staleness.until_refused()
            log.warning(
                "nothing is shown any more: %s",
                mirror.staleness.statistics().refused,
                extra={"event": "hidden"},
            )
            await _forget_everything(mirror)
            await mirror.staleness.until_shown()
            log.info(
                "the mirror is shown again, at revision %d",
                mirror.revision,
                extra={"event": "shown", "fields": {"revision": mirror.revision}},
            )


async def _watch_rights(mirror: Mirror) -> None:
    """Have the kernel ask anew for all modes when they close, or open."""
    turned, turns = trio.open_memory_channel[None](1)

    def on_turn() -> None:
        with suppress(trio.WouldBlock):  # one that waits will do
            turned.send_nowait(None)

    mirror.update.tree.rights.on_turn = on_turn
    async for _ in turns:
        await _forget_everything(mirror)


async def _forget_everything(mirror: Mirror) -> None:
    cached = mirror.update.tree.cached_by_kernel()
    for start in range(0, len(cached), FORGET_SIZE):
        mirror.invalidate(cached[start : start + FORGET_SIZE])
        await trio.lowlevel.checkpoint()
