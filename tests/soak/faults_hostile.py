"""What a local user does who wants to stop all others, under load.

Each has a mount of its own, that everybody may use, beside those under test: they must not notice.

Concurrency: the conductor's thread; the attacker is a process of another user.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.soak import layout
from tests.soak.arena import Arena
from tests.soak.control import until
from tests.soak.faults_single import check
from tests.soak.mounts import Mount
from tests.soak.table import fault
from tests.support.stuck_reader import StuckReader

HELD: Final = "held/f"
GONE: Final = "held/gone"
FREE: Final = "free/f"
SHOWN_S: Final = 10.0


@contextlib.contextmanager
def shared(arena: Arena) -> Iterator[Mount]:
    """Yield a mount for everybody; anybody's processes may come as far as to it."""
    mode = arena.home.stat().st_mode & 0o777
    arena.home.chmod(0o711)
    mount = arena.mount("shared", arena.etcds.url, "--allow-other")
    try:
        yield mount
    finally:
        mount.close()
        arena.home.chmod(mode)


@fault("+", "a stuck reader", "single", 15)
def stuck_reader(arena: Arena) -> None:
    """Whatever is elsewhere goes on; how old things may be is said; then all is as before."""
    raw = arena.etcds.raw()

    def put(name: str, value: bytes) -> Any:
        return raw.put((layout.key(name), value))

    for name in (GONE, HELD, FREE):
        put(name, b"1")
    with shared(arena) as mount:
        held, free = (mount.path / "soak" / name for name in (HELD, FREE))

        def shows(path: Any, value: bytes) -> Callable[[], bool]:
            return lambda: bool(path.read_bytes() == value)

        until(shows(held, b"1"), "the file is there", SHOWN_S)
        gone = mount.path / "soak" / GONE
        gone.read_bytes()
        with StuckReader(held.parent) as reader:
            raw.delete(layout.key(GONE))
            for value in (b"2", b"3", b"4"):
                put(HELD, value)
                put(FREE, value)
                until(shows(free, value), "what is elsewhere is shown", SHOWN_S)
            statistics = mount.statistics()
            check(statistics["kernel"]["stuck"] == 1, "it is not counted")
            check(statistics["staleness"]["stale_s"] >= 1, "it is not said that it may be stale")
            reader.invalidate()
        until(shows(held, b"4"), "what was held is shown", SHOWN_S)
        check(not gone.exists(), "what is gone is there")
        until(lambda: mount.statistics()["staleness"]["stale_s"] == 0, "nothing is stale", SHOWN_S)
    raw.delete(layout.key("held/"), layout.key("held0"))
    raw.delete(layout.key("free/"), layout.key("free0"))


@fault("+", "the daemon is ended with a stuck reader in it", "single", 15)
def ended_with_a_stuck_reader(arena: Arena) -> None:
    """The mountpoint is free, and a new mount serves it."""
    raw = arena.etcds.raw()
    for name in (GONE, HELD):
        raw.put((layout.key(name), b"1"))
    with shared(arena) as mount:
        held = mount.path / "soak" / HELD
        until(lambda: held.read_bytes() == b"1", "the file is there", SHOWN_S)
        (held.parent / "gone").read_bytes()
        with StuckReader(held.parent):
            raw.delete(layout.key(GONE))
            raw.put((layout.key(HELD), b"2"))
            until(lambda: mount.statistics()["kernel"]["stuck"] == 1, "it is stuck", SHOWN_S)
            mount.end()
            mount.mount()
            until(lambda: held.read_bytes() == b"2", "the new mount shows it", SHOWN_S)
    raw.delete(layout.key("held/"), layout.key("held0"))
