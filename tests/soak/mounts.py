"""The mounts of a run, each a daemon of the command `etcdfs mount`.

Knows: how a mount is made, killed, made again, and asked; and which member its daemon talks to.
Does not know: what is read and written.

Concurrency: blocking calls, each bounded.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final, final

from etcdfs.process.processes import find_daemon
from tests.soak.control import until
from tests.soak.etcds import run

_COMMAND: Final = (sys.executable, "-P", "-c", "from etcdfs.cli.main import main; main()")
_TIMEOUT_S: Final = 60.0
ROOT: Final = Path(__file__).parent.parent.parent
DEFECTS: Final = Path(__file__).parent / "defects"


@final
class Mount:
    """One mount. Owned by the arena that made it."""

    def __init__(self, home: Path, name: str, url: str, *options: str, defect: str = "") -> None:
        self.name = name
        self.path = home / name
        self.path.mkdir(exist_ok=True)
        self.log_file = home / f"{name}.log"
        self._url = url
        self._options = options
        self._defect = defect
        self.daemon = 0
        self.mount()

    def mount(self, *, wrapper: tuple[str, ...] = ()) -> None:
        """Mount; over what a killed daemon has left, too.

        Raises:
            RuntimeError: It could not be mounted.
        """
        done = self.command(
            "mount",
            str(self.path),
            *("--endpoints", self._url, "--log-file", str(self.log_file)),
            *self._options,
            wrapper=wrapper,
        )
        if done.returncode:
            raise RuntimeError(f"etcdfs mount: {done.returncode} {done.stderr}")
        daemon = find_daemon(str(self.path))
        assert daemon is not None
        self.daemon = daemon

    def command(
        self, *arguments: str, wrapper: tuple[str, ...] = ()
    ) -> "subprocess.CompletedProcess[str]":
        """Run `etcdfs`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ETCDCTL_", "ETCDFS_"))}
        paths = [str(ROOT)]
        if self._defect:
            paths.insert(0, str(DEFECTS))
            clean["SOAK_DEFECT"] = self._defect
        clean["PYTHONPATH"] = os.pathsep.join(paths)
        return subprocess.run(
            [*wrapper, *_COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=clean,
        )

    def close(self) -> None:
        """Take it away, whatever state it is in."""
        if os.path.ismount(self.path):
            self.command("umount", str(self.path))
        self._unmount()

    def kill(self) -> None:
        """SIGKILL the daemon and wait until it has ended."""
        os.kill(self.daemon, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{self.daemon}"), "the daemon ends", _TIMEOUT_S)

    def end(self) -> None:
        """SIGTERM the daemon and wait until it serves nothing any more."""
        os.kill(self.daemon, signal.SIGTERM)
        until(lambda: find_daemon(str(self.path)) is None, "the daemon ends", _TIMEOUT_S)

    def wait(self, revision: int) -> None:
        """Return once readers see a revision; OSError if that is not in the mount's time."""
        os.getxattr(self.path, f"user.etcdfs.wait.{revision}")

    def statistics(self) -> Any:
        return json.loads(os.getxattr(self.path, "user.etcdfs.statistics"))

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def received(self) -> dict[str, int]:
        """Return how much its daemon has received from each address it is connected to."""
        listed = run("ss", "-H", "-O", "-t", "-n", "-p", "-i", "state", "established")
        found: Counter[str] = Counter()
        for line in listed.splitlines():
            fields = line.split()
            received = re.search(r"\bbytes_received:(\d+)", line)
            if f"pid={self.daemon}," in line and received is not None:
                host, _, port = fields[3].rpartition(":")
                found[f"{host.strip('[]').removeprefix('::ffff:')}:{port}"] += int(received[1])
        return found

    def _unmount(self) -> None:
        subprocess.run(
            ["fusermount3", "-uz", str(self.path)],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
