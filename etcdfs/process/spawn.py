"""Starting the daemon's process, before anything else is loaded.

Knows: the command line of the daemon and the three descriptors between it and its parent. Does not
know: the options, which come later, and anything that takes time to import: `os` and `sys` are
there in every Python (so no `typing` either, nor `subprocess`).

A daemon takes most of its start to load its modules. So its process is started as early as
possible, loads them, and waits for its options (`startup_protocol`); a pipe that ends without any
means that it is not wanted, and it ends without a word.

The daemon is a re-executed Python, not a fork of this one: threads, and libraries that have
them (grpc), do not survive a fork.

Concurrency: none.
"""

import os
import sys

DAEMON_MODULE = "etcdfs.daemon.main"

_STANDARD = (0, 1, 2)
_SECRETS = ("ETCDCTL_PASSWORD", "ETCDCTL_USER", "ETCDFS_PASSWORD", "ETCDFS_USER")


class Spawned:
    """A daemon that waits for its options. Owned by whoever spawned it, who must end it.

    Attributes:
        mountpoint: Where it will mount.
        pid: Its process id.
        options: Where its options are written to; a descriptor.
        reports: Where its reports are read from; a descriptor.
        errors: What it writes to stdout and stderr; a descriptor of a file in memory.
        told: Whether it was told its options, or that it is not wanted.
        released: Whether it is to stay when this process ends.
        returncode: As of `subprocess.Popen`; None while it is not known to have ended.
    """

    __slots__ = (
        "errors",
        "mountpoint",
        "options",
        "pid",
        "released",
        "reports",
        "returncode",
        "told",
    )

    def __init__(self, mountpoint: str, pid: int, options: int, reports: int, errors: int) -> None:
        self.mountpoint = mountpoint
        self.pid = pid
        self.options = options
        self.reports = reports
        self.errors = errors
        self.told = False
        self.released = False
        self.returncode: int | None = None


def spawn(mountpoint: str) -> Spawned:
    """Start a daemon in a session of its own.

    Args:
        mountpoint: An absolute path; by it the daemon is found in the list of processes.

    Raises:
        OSError: No process can be started here.
    """
    _keep_descriptors()
    options_read, options_write = os.pipe()
    reports_read, reports_write = os.pipe()
    errors = os.memfd_create("etcdfs-errors")
    os.set_inheritable(options_read, True)
    os.set_inheritable(reports_write, True)
    try:
        pid = os.posix_spawn(
            sys.executable,
            daemon_command(mountpoint, options_read, reports_write),
            daemon_environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, errors, 1),
                (os.POSIX_SPAWN_DUP2, errors, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(options_read)
        os.close(reports_write)  # or the end of the daemon would not end the reports
    return Spawned(mountpoint, pid, options_write, reports_read, errors)


def daemon_command(mountpoint: str, options_fd: int, status_fd: int | None = None) -> list[str]:
    """Return the daemon's command line; without a parent that reads its reports in foreground."""
    # -P: the current directory must not get a say in what is imported.
    command = [sys.executable, "-P", "-m", DAEMON_MODULE, mountpoint]
    command += ["--options-fd", str(options_fd)]
    return command if status_fd is None else [*command, "--status-fd", str(status_fd)]


def daemon_environment() -> dict[str, str]:
    """Return the daemon's environment.

    gRPC's core writes to stderr, in its own form and for every broken connection; what matters
    of that reaches our log as an error of a call. It reads this when it is loaded. Its handlers
    of fork(2) have to be off: they start its threads anew in the child, which end it before it
    has become another program, as when libfuse forks to run fusermount3.

    There is no password in it: what the daemon is to know is handed over.
    """
    environment = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"} | os.environ
    for name in _SECRETS:
        environment.pop(name, None)
    return environment


def fill_standard_descriptors() -> None:
    """Connect to nothing each of stdin, stdout and stderr that this process was started without.

    Or the next file that it opens becomes one of them, and a child gets that for its stdin.
    """
    for fd in _STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def _keep_descriptors() -> None:
    """Have a child inherit nothing that this process was given, but for stdin to stderr."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in _STANDARD:
            try:
                os.set_inheritable(fd, False)
            except OSError:  # it was there to read this listing from
                continue
