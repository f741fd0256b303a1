"""A machine of a test's own, as far as files and processes go: what is installed there is nowhere else.

Knows: namespaces, and how to run commands in them. /usr and /etc can be written to, as copies that
go with the machine; /mnt is empty; all processes end with it. The rest is the host's, the network
included, unless a network of its own is asked for. Only root can.

Concurrency: plain blocking calls, each bounded.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, final

import pytest

_TIMEOUT_S: Final = 60.0

_SETUP: Final = """
mount -t proc proc /proc
for name in usr etc; do
    mkdir "$0/$name" "$0/$name.work"
    mount -t overlay overlay -o "lowerdir=/$name,upperdir=$0/$name,workdir=$0/$name.work" "/$name"
done
[ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
mount -t tmpfs tmpfs /mnt
[ ! -e /sys/class/net/lo ] || ip link set lo up 2>/dev/null || true
"""

_STAY: Final = """
echo ready
exec cat
"""

_BOOT: Final = """
for name in var root; do
    mkdir "$0/$name" "$0/$name.work"
    mount -t overlay overlay -o "lowerdir=/$name,upperdir=$0/$name,workdir=$0/$name.work" "/$name"
done
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
printf '[Unit]\nDefaultDependencies=no\n' >/etc/systemd/system/private-root.target
echo ready
exec env -i container=private-root NOTIFY_SOCKET="$0/notify" \
    /lib/systemd/systemd --unit=private-root.target --show-status=no
"""
"""Nothing is started by itself: what is done at the boot of a machine is not for a copy of one."""


@final
class PrivateRoot:
    """Namespaces for mounts and processes. A context manager; owned by the test that made it.

    Attributes:
        home: A directory that goes with the machine, for what cannot be on an overlay.
    """

    def __init__(self, *, network: bool = False, boots: bool = False) -> None:
        """Make them.

        Args:
            network: Whether it gets a network of its own, with nothing but a loopback device.
            boots: Whether systemd runs there, with no unit at first.
        """
        # An overlay's upper directory cannot be on an overlay, which /tmp of a container is.
        self.home = Path(tempfile.mkdtemp(prefix="etcdfs-test-root-", dir="/dev/shm"))
        command = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        command += ["--net"] if network else []
        command += ["--cgroup", "--ipc", "--uts"] if boots else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(self.home / "notify"))
            notify.settimeout(_TIMEOUT_S)
            self._holder = subprocess.Popen(
                [*command, "sh", "-euc", _SETUP + (_BOOT if boots else _STAY), str(self.home)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert self._holder.stdout is not None
            if self._holder.stdout.readline() != "ready\n":
                self._holder.kill()
                _, said = self._holder.communicate(timeout=_TIMEOUT_S)
                shutil.rmtree(self.home, ignore_errors=True)
                pytest.skip(f"no namespaces here: {said.strip()}")
            try:
                while boots and b"READY=1" not in notify.recv(4096).split(b"\n"):
                    pass
            except TimeoutError:
                self.close()
                pytest.skip("systemd does not start in namespaces here")
        own = Path("/proc", str(self._holder.pid), "task", str(self._holder.pid), "children")
        self._first = own.read_text().split()[0]

    def __enter__(self) -> "PrivateRoot":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs another one there."""
        return ["nsenter", "--all", "--target", self._first, "--wd=/", *arguments]

    def run(self, script: str, *arguments: str, **environment: str) -> str:
        """Run a shell script there, which must succeed; return what it prints."""
        done = self.attempt(script, *arguments, **environment)
        assert done.returncode == 0, f"{script}: {done.returncode} {done.stderr}"
        return done.stdout

    def attempt(
        self, script: str, *arguments: str, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a shell script there, and return what became of it."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ETCDCTL_", "ETCDFS_"))}
        clean |= {"PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C"}
        return subprocess.run(
            self.command("sh", "-euc", script, "sh", *arguments),
            capture_output=True,
            check=False,
            env=clean | environment,
            text=True,
            timeout=_TIMEOUT_S,
        )

    def close(self) -> None:
        """End all that runs there, and forget all that was written."""
        self._holder.kill()
        self._holder.communicate()
        shutil.rmtree(self.home, ignore_errors=True)
