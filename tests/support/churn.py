"""Work that leaves nothing behind, and the census that shows whether it did.

Knows: how to use every call of a mount, together with another client, in rounds that end as they
began; and how to count what lives in a daemon. `churn` is a function of a mount, for a test of
seconds and for a soak of hours.

Concurrency: plain blocking calls; one owner.
"""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, final

from tests.mount.client import Client
from tests.support.mounted import Mounted

CENSUS_DIRECTORY: Final = str(Path(__file__).parent / "census")
CENSUS_VARIABLE: Final = "TEST_CENSUS"

_PATIENCE_S: Final = 30.0


def churn(mounted: Mounted, client: Client, rounds: int, *, first: int = 0) -> None:
    """Make, change and delete files through a mount and behind its back.

    Args:
        mounted: The mount, of the whole keyspace below `/`.
        client: Another client of its etcd.
        rounds: How often; about sixty calls each.
        first: The number of the first round; no round should come twice in a mount's life, so
            that nothing is put to use again.
    """
    (mounted.path / "churn").mkdir(exist_ok=True)
    for number in range(first, first + rounds):
        directory = mounted.path / "churn" / str(number)
        below = b"/churn/%d/" % number
        _work(directory)
        if number % 2:  # what another client deletes, it deletes without its attributes
            (directory / "c").chmod(0o600)
            os.utime(directory / "c")
        _work_behind(mounted, client, directory, below)
        _look(directory)
        if number % 2:
            shutil.rmtree(directory)
        else:
            mounted.wait(client.delete_below(below))
        # Without a cache the kernel holds a name until it is asked for.
        assert not directory.exists()


def _work(directory: Path) -> None:
    directory.mkdir()
    for name in "abcde":
        file = directory / name
        file.write_bytes(b"value" * 300)
        with file.open("ab") as appended:
            appended.write(b"more")
        os.truncate(file, 7)
        _fails(lambda: os.close(os.open(file, os.O_CREAT | os.O_EXCL)))  # noqa: B023 - called now
        _fails((directory / f"no-{name}").stat)
    (directory / "a").rename(directory / "b")
    with (directory / "unlinked").open("w+b") as unlinked:
        unlinked.write(b"value" * 1000)
        (directory / "unlinked").unlink()
        unlinked.seek(0)
        unlinked.read()
    (directory / "sub").mkdir()
    (directory / "sub").rmdir()
    _fails(directory.rmdir)
    _fails(directory.mkdir)
    _fails((directory / "no").unlink)
    _fails(lambda: (directory / "no").rename(directory / "b"))
    _fails(lambda: os.link(directory / "b", directory / "link"))


def _work_behind(mounted: Mounted, client: Client, directory: Path, below: bytes) -> None:
    written = os.open(directory / "b", os.O_RDWR)
    with (directory / "c").open("rb") as read:
        for name in (b"b", b"c", b"new/deep/file"):
            client.put(below + name, b"another's")
        mounted.wait(client.delete(below + b"d"))
        read.read()
    os.pwrite(written, b"x", 3)
    _fails(lambda: os.close(written))  # it lost the race
    (directory / "new" / "deep" / "file").read_bytes()


def _look(directory: Path) -> None:
    os.listdir(directory)
    for entry in os.scandir(directory):
        entry.stat()
    os.statvfs(directory)


def _fails(call: Callable[[], object]) -> None:
    try:
        call()
    except OSError:
        return
    raise AssertionError("it did not fail")


@final
class Census:
    """Counts what lives in a daemon that was started with `CENSUS_DIRECTORY` in its path."""

    def __init__(self, mounted: Mounted, place: Path) -> None:
        """`place` is the file that `CENSUS_VARIABLE` named when it was started."""
        self._mounted = mounted
        self._place = place

    def take(self) -> dict[str, Any]:
        """Return objects by type, the sizes of tables, descriptors, and the mount's statistics."""
        self._place.unlink(missing_ok=True)
        os.kill(self._mounted.daemon, signal.SIGUSR2)
        counted = json.loads(until(self._read))
        for name in ("types", "tables"):
            counted[name] = Counter(counted[name])
        return {**counted, **self._mounted.statistics()}

    def settled(self, inodes: int) -> dict[str, Any]:
        """Return the census once the kernel has forgotten all but so many inodes."""

        def is_settled() -> bool:
            found = self._mounted.statistics()
            waiting = found.get("inotify", {}).get("waiting", 0)
            return bool(found["tree"]["inodes_known"] <= inodes and not waiting)

        until(is_settled)
        return self.take()

    def _read(self) -> str:
        return self._place.read_text() if self._place.exists() else ""


def until(found: Callable[[], Any]) -> Any:
    """Ask until the answer is true; what the kernel forgets, it tells in its own time."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        answer = found()
        if answer:
            return answer
        os.sched_yield()
    raise AssertionError(f"it did not happen within {_PATIENCE_S} s")
