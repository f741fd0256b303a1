"""A real mount for tests: the command `etcdfs mount`, and what a test wants to know of it.

Knows: how to mount under a fresh temporary directory, count requests, wait for a revision, and take
the mount away whatever happened.

Concurrency: plain blocking calls, each bounded.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from etcdfs.process.processes import find_daemon
from tests.support.etcd_process import EtcdProcess

COMMAND = (sys.executable, "-P", "-m", "etcdfs")
"""`etcdfs` of this very environment."""

_TIMEOUT_S = 50.0
_PROBLEMS = (" WARNING ", " ERROR ", " CRITICAL ", "Traceback", "too_many_pings")


_BUSY = ("somebody has not let go of a lock for",)
"""What a daemon says, too, that gets no processor for a second."""


def run_etcdfs(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command and return what became of it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ETCDCTL_", "ETCDFS_"))}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=clean | environment,
    )


@final
class Mounted:
    """One mount of one etcd. A context manager; owned by the test that made it.

    The environment's MOUNT_OPTIONS are options of each, before a test's own.

    Attributes:
        path: The mountpoint.
        log_file: What the daemon logs.
    """

    def __init__(
        self, etcd: EtcdProcess, *options: str, via: str | None = None, **environment: str
    ) -> None:
        """Mount with `options` of the command line, `--cache` or `--no-cache` among them.

        Args:
            etcd: The etcd behind it.
            options: Of the command line.
            via: The address to give to etcdfs, if that is not etcd's own.
            environment: What the command's environment has besides.
        """
        self._etcd = etcd
        self._home = Path(tempfile.mkdtemp(prefix="etcdfs-test-mount-"))
        self.path = self._home / "mnt"
        self.path.mkdir()
        self.log_file = self._home / "log"
        self.expected: tuple[str, ...] = _BUSY
        self._last_log = ""
        try:
            done = run_etcdfs(
                "mount",
                str(self.path),
                "--endpoints",
                via or etcd.client_url,
                "--log-file",
                str(self.log_file),
                "--log-level",
                "info",
                *os.environ.get("MOUNT_OPTIONS", "").split(),
                *options,
                **environment,
            )
            assert done.returncode == 0, f"etcdfs mount: {done.returncode} {done.stderr}"
        except BaseException:
            self._clear()
            raise

    def __enter__(self) -> "Mounted":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        self.close()
        if kind is None:
            self.check_log()

    @property
    def log(self) -> str:
        """Return what the daemon has logged so far."""
        return self.log_file.read_text() if self.log_file.exists() else self._last_log

    @property
    def daemon(self) -> int:
        """Return the process id of the daemon."""
        pid = find_daemon(str(self.path))
        assert pid is not None, "the daemon is gone"
        return pid

    def expect_log(self, *parts: str) -> None:
        """Say that warnings containing one of `parts` belong to the test."""
        self.expected += parts

    def check_log(self) -> None:
        """Fail if the daemon logged a warning that nobody expected."""
        stray = [
            line
            for line in self.log.splitlines()
            if any(problem in line for problem in _PROBLEMS)
            and not any(part in line for part in self.expected)
        ]
        assert not stray, "the daemon logged:\n" + "\n".join(stray)

    def statistics(self) -> Any:
        """Return the daemon's counters, by part."""
        return json.loads(os.getxattr(self.path, "user.etcdfs.statistics"))

    def wait(self, revision: int) -> None:
        """Return once readers of this mount see `revision`."""
        os.getxattr(self.path, f"user.etcdfs.wait.{revision}")

    def put(self, key: str | bytes, value: str | bytes) -> int:
        """Put a key as another client; return once this mount shows it: its revision."""
        return self._foreign("put", "--", key, value)

    def delete(self, *arguments: str | bytes) -> int:
        """Delete keys as another client, likewise; arguments as of `etcdctl del`."""
        return self._foreign("del", *arguments)

    def _foreign(self, *arguments: str | bytes) -> int:
        answer = json.loads(self._etcd.etcdctl("--write-out=json", *arguments))
        revision = int(answer["header"]["revision"])
        self.wait(revision)
        return revision

    @contextlib.contextmanager
    def counting(self) -> Iterator["Counter[str]"]:
        """Yield a counter that holds, after the block, the requests the kernel sent in it."""
        counted: Counter[str] = Counter()
        before = Counter(self.statistics()["requests"])
        yield counted
        counted.update(Counter(self.statistics()["requests"]) - before)
        counted["getxattr"] -= 2  # the question itself: what is its size, then its value
        for name in [name for name, count in counted.items() if not count]:
            del counted[name]

    def close(self) -> None:
        """Unmount; nothing if that has happened."""
        try:
            if os.path.ismount(self.path):
                done = run_etcdfs("umount", str(self.path))
                assert done.returncode == 0, f"etcdfs umount: {done.returncode} {done.stderr}"
        finally:
            self._last_log = self.log
            self._clear()

    def _clear(self) -> None:
        subprocess.run(
            ["fusermount3", "-uz", str(self.path)],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        shutil.rmtree(self._home, ignore_errors=True)
