"""What tests of the mirror have in common."""

import os

import trio
import trio.testing

from tests.support.fake_kernel import FakeMount, Path

AGAIN = "%s; %s (attempt %d)"
REFUSED = "nothing is shown any more: %s"
BOUND_S = 30.0


async def quiet(mount: FakeMount) -> None:
    """Wait until nothing moves; no time passes."""
    await trio.testing.wait_all_tasks_blocked()
    mount.check_invariants()
    mount.kernel.check_coherence(mount.tree, mount.filesystem)


async def content(mount: FakeMount, path: Path) -> bytes | None:
    """Return what a program reads at a path, None if there is nothing."""
    with trio.fail_after(BOUND_S):
        try:
            handle = await mount.kernel.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return await mount.kernel.read(handle)
        finally:
            await mount.kernel.close(handle)
