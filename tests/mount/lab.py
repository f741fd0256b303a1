"""One etcd, one mount and one directory of keys, as a test has them in hand.

Knows: how tests share etcds and mounts (both take a second to start), and that a mount which hangs
must not hang the whole run.

Concurrency: plain blocking calls. A watchdog thread kills daemons when a test takes too long.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, final

from etcdfs.process.processes import find_daemon
from tests.mount.client import Client, Found
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

PATIENCE_S: Final = 50.0
"""Less than pytest-timeout's 60 s: a call that hangs in a mount cannot be interrupted, so the
daemon is killed, and the call fails with ENOTCONN."""

LONG_S: Final = 280.0
"""The same for a test of many calls, each of which asks etcd; less than its 300 s."""

MODES: Final = ("--cache", "--no-cache")


@final
@dataclass(frozen=True)
class Lab:
    """What a test of a mount works with.

    Attributes:
        etcd: The etcd behind the mount.
        client: Another client of it.
        mounted: The mount.
        path: A fresh directory in the mount, this test's own.
        prefix: What the keys below it begin with.
    """

    etcd: EtcdProcess
    client: Client
    mounted: Mounted
    path: Path
    prefix: bytes

    def key(self, name: str | bytes) -> bytes:
        """Return the key of a path below `path`."""
        return self.prefix + os.fsencode(name)

    def found(self, name: str | bytes) -> Found | None:
        """Return what etcd has under that key."""
        return self.client.get(self.key(name))

    def value(self, name: str | bytes) -> bytes | None:
        """Return its value in etcd, None if there is none."""
        found = self.found(name)
        return None if found is None else found.value

    def version(self, name: str | bytes) -> int:
        """Return how often the key was put since it was made; 0 if it is not there."""
        found = self.found(name)
        return 0 if found is None else found.version

    def own_keys(self) -> list[bytes]:
        """Return the keys below `path`, without the prefix, its own marker left out."""
        found = self.client.below(self.prefix)
        return [f.key[len(self.prefix) :] for f in found if f.key != self.prefix]

    def put(self, name: str | bytes, value: bytes) -> int:
        """Put a key as another client; return once the mount shows it."""
        return self.shown(self.client.put(self.key(name), value))

    def delete(self, name: str | bytes) -> int:
        """Delete a key as another client, likewise."""
        return self.shown(self.client.delete(self.key(name)))

    def shown(self, revision: int) -> int:
        """Return the revision once the mount shows it."""
        self.mounted.wait(revision)
        return revision


@final
class Pool:
    """The etcds and mounts that tests share, each started when it is first wanted."""

    def __init__(self) -> None:
        self._etcds: dict[Path, EtcdProcess] = {}
        self._mounts: dict[tuple[Path, tuple[str, ...]], Mounted] = {}
        self._private: list[Mounted] = []
        self._number = itertools.count(1)

    def etcd(self, binary: Path) -> EtcdProcess:
        """Return the shared etcd of a release."""
        if binary not in self._etcds:
            self._etcds[binary] = EtcdProcess(binary)
        return self._etcds[binary]

    def mounted(self, binary: Path, *options: str) -> Mounted:
        """Return the shared mount of the shared etcd with these options."""
        name = (binary, options)
        if name not in self._mounts:
            self._mounts[name] = Mounted(self.etcd(binary), *options)
        return self._mounts[name]

    @contextlib.contextmanager
    def private(
        self,
        etcd: EtcdProcess,
        *options: str,
        via: str | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[Mounted]:
        """Yield a mount of the test's own, guarded by the watchdog."""
        with Mounted(etcd, *options, via=via, **environment) as mounted:
            self._private.append(mounted)
            try:
                yield mounted
            finally:
                self._private.remove(mounted)

    def name(self) -> str:
        """Return a name nobody had before."""
        return f"t{next(self._number)}"

    @contextlib.contextmanager
    def lab(self, etcd: EtcdProcess, mounted: Mounted) -> Iterator[Lab]:
        """Yield a fresh directory in a mount."""
        name = self.name()
        path = mounted.path / name
        path.mkdir()
        with contextlib.closing(Client(etcd.endpoint)) as client:
            yield Lab(etcd, client, mounted, path, b"/%s/" % name.encode())

    @contextlib.contextmanager
    def watched(self, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Kill every daemon if the body takes too long; check the shared mounts' logs after it."""
        watchdog = threading.Timer(patience_s, self._kill)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
        for mounted in self._mounts.values():
            try:
                mounted.check_log()
            finally:
                os.truncate(mounted.log_file, 0)  # the next test answers for itself only

    def close(self) -> None:
        """Take everything down."""
        with contextlib.ExitStack() as stack:
            for etcd in self._etcds.values():
                stack.callback(etcd.close)
            for mounted in self._mounts.values():
                stack.callback(mounted.close)

    def _kill(self) -> None:
        for mounted in (*self._mounts.values(), *self._private):
            daemon = find_daemon(str(mounted.path))
            if daemon is not None:
                os.kill(daemon, signal.SIGKILL)


@contextlib.contextmanager
def memory_directory() -> Iterator[Path]:
    """Yield a fresh directory on tmpfs."""
    home = Path(tempfile.mkdtemp(prefix="etcdfs-test-", dir="/dev/shm"))
    try:
        yield home
    finally:
        shutil.rmtree(home)


def sh(directory: Path, script: str, *, patience_s: float = PATIENCE_S) -> str:
    """Run a shell script in a directory; return what it prints. It must succeed."""
    done = subprocess.run(
        ["/bin/sh", "-euc", script],
        cwd=directory,
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
        text=True,
        errors="surrogateescape",
        timeout=patience_s,
    )
    assert done.returncode == 0, f"{script!r}: {done.returncode} {done.stdout} {done.stderr}"
    return done.stdout
