"""Which process serves a mount, among all that there are.

Knows: /proc, and by what a daemon of ours is known there. Does not know: how mounts are made and
taken away.

A daemon is found by its command line, which needs no runtime files that could be stale. Anybody
can start a process that has the same. So whoever is to be waited for, or believed to live, must
also be of the user who mounted, run Python, and go by the name that a daemon takes once it has
mounted: the device number of its file system. By that the daemons of one mountpoint are told
apart, too, of which an earlier one may still serve a container that has a copy of its mount.

Concurrency: plain blocking calls.
"""

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from etcdfs.process.spawn import DAEMON_MODULE

_DAEMON_MODULES: Final = (DAEMON_MODULE, "etcdfs.mount")
"""By which a daemon is known, and by which one that was started before an upgrade still is."""

_MOUNT_NAMESPACE: Final = Path("/proc/self/ns/mnt")
_COMM: Final = Path("/proc/self/comm")
_COMM_MAX: Final = 15
"""Characters of the name of a process; Linux cuts off what is longer (proc(5))."""


def take_name(device: str) -> None:
    """Let this process, whose main thread calls, be known by the file system that it serves."""
    with contextlib.suppress(OSError):  # the worst is that nobody waits for our end
        _COMM.write_text(_name(device))


def _name(device: str) -> str:
    return f"etcdfs {device}"[:_COMM_MAX]


def find_daemon(mountpoint: str) -> int | None:
    """Return the process id of a daemon that was started for a mountpoint; None: there is none.

    Anybody can look like one.
    """
    return next((int(process.name) for process in _started_for(mountpoint)), None)


def find_server(mountpoint: str, device: str, owner: int | None) -> int | None:
    """Return the process id of the daemon that serves a mount; None if there is none.

    Args:
        mountpoint: Where it is mounted.
        device: `MAJOR:MINOR` of its file system.
        owner: The user who mounted it; None: not known.
    """
    for process in _started_for(mountpoint):
        if _is_named(process, device) and _is_of(process, owner) and _runs_python(process):
            return int(process.name)
    return None


def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for the end of a process (pidfd_open(2): it is readable then)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def mount_tables() -> Iterator[bytes]:
    """Yield the mount table of every container that we may look into, ours among them.

    That is of each mount namespace in which a process runs (/proc/PID/mountinfo in proc(5)).
    """
    seen = set()
    for process in _all():
        try:
            namespace = (process / "ns" / "mnt").readlink()
            if namespace not in seen:
                seen.add(namespace)
                yield (process / "mountinfo").read_bytes()
        except OSError:  # it ended meanwhile, or is another user's
            continue


def _all() -> Iterator[Path]:
    with os.scandir("/proc") as entries:
        yield from (Path(entry.path) for entry in entries if entry.name.isdigit())


def _started_for(mountpoint: str) -> Iterator[Path]:
    """Return all processes with a daemon's arguments, but for this one.

    Processes of other users are found too, unless /proc hides them (its option `hidepid`).
    """
    commands = [[b"-m", module.encode(), os.fsencode(mountpoint)] for module in _DAEMON_MODULES]
    return (
        process
        for process in _all()
        if process.name != str(os.getpid())
        and any(_has_arguments(process, wanted) for wanted in commands)
        and _shares_mounts(process)
    )


def _has_arguments(process: Path, wanted: list[bytes]) -> bool:
    """Tell whether a process was started with these arguments, in a row."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile, or is hidden
        return False
    return any(arguments[i : i + len(wanted)] == wanted for i in range(1, len(arguments)))


def _shares_mounts(process: Path) -> bool:
    """Tell whether a process sees the mounts that we see, not those of a container.

    Another user's process does not say (ptrace(2), access mode checking); most likely it does.
    """
    try:
        return (process / "ns" / "mnt").readlink() == _MOUNT_NAMESPACE.readlink()
    except OSError:
        return True


def _is_named(process: Path, device: str) -> bool:
    try:
        return (process / "comm").read_text(errors="replace") == f"{_name(device)}\n"
    except OSError:
        return False


def _is_of(process: Path, owner: int | None) -> bool:
    """Tell whether all user ids of a process are the owner's; a setuid program's are not."""
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except OSError:
        return False
    ids = next((line.split()[1:] for line in lines if line.startswith("Uid:")), [])
    return owner is None or set(ids) == {str(owner)}


def _runs_python(process: Path) -> bool:
    """Tell whether a process runs Python: anybody can give sudo(8) any arguments.

    As with `_shares_mounts`, another user's process does not say.
    """
    try:
        program = (process / "exe").readlink().name
    except OSError:
        return True
    return (
        program.startswith(("python", "pypy")) or program == Path("/proc/self/exe").readlink().name
    )
