"""The yardstick in C: `memfs.c`, compiled against libfuse and mounted.

Concurrency: plain blocking calls, each bounded.
"""

import select
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final, final

SOURCE: Final = Path(__file__).with_name("memfs.c")

_TIMEOUT_S: Final = 60


class CannotCompileError(Exception):
    """There is no C compiler here, or no libfuse to compile against; the message says which."""


def compile_memfs(binary: Path) -> None:
    """Compile it.

    Raises:
        CannotCompileError: With the reason to skip what needs it.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CannotCompileError("there is no C compiler for memfs")
    if shutil.which("pkg-config") is None:
        raise CannotCompileError("there is no pkg-config to find libfuse for memfs")
    flags = _run(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
    _run([compiler, "-std=gnu11", "-O2", "-o", str(binary), str(SOURCE), *flags])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise CannotCompileError(f"memfs: {' '.join(command[:2])} failed: {done.stderr.strip()}")
    return done.stdout


@final
class Memfs:
    """One mount of it. Owned by whoever made it, who closes it.

    Attributes:
        path: The mountpoint.
    """

    def __init__(self) -> None:
        """Compile and mount it.

        Raises:
            CannotCompileError: With the reason to skip what needs it.
        """
        self._home = Path(tempfile.mkdtemp(prefix="etcdfs-bench-memfs-"))
        self.path = self._home / "mnt"
        self._process: subprocess.Popen[str] | None = None
        try:
            self.path.mkdir()
            compile_memfs(self._home / "memfs")
            self._names = self._mount()
        except BaseException:
            self.close()
            raise

    def _mount(self) -> list[str]:
        """Mount it; return the names of what it counts."""
        self._process = subprocess.Popen(
            [self._home / "memfs", self.path, self._home / "counts"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT_S)
        names = self._process.stdout.readline().split() if ready else []
        assert names, "memfs could not be mounted"
        return names

    def requests(self) -> Counter[str]:
        """Return how many requests of each kind there were so far."""
        counts = struct.unpack(f"={len(self._names)}Q", (self._home / "counts").read_bytes())
        return Counter(dict(zip(self._names, counts, strict=True)))

    def close(self) -> None:
        """Unmount it and end it."""
        subprocess.run(
            ["fusermount3", "-uzq", self.path], capture_output=True, timeout=_TIMEOUT_S, check=False
        )
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=_TIMEOUT_S)
        shutil.rmtree(self._home, ignore_errors=True)
