"""What waits, for a revision or for etcd, leaves alone what is answered from memory."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdfs.files.handles import STORE_MAX
from tests.mount.client import Client
from tests.mount.lab import Pool
from tests.support.churn import until
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

PATIENCE_S = 40
MANY = 2500
"""More than one user may have wait at once, and more than pyfuse3 once had tasks."""

_STACK = 64 * 1024
_WAITERS = """
import collections, os, sys, threading
path, count, revision, uid = sys.argv[1], *map(int, sys.argv[2:])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
became = collections.Counter()
def wait():
    try:
        os.getxattr(path, f"user.etcdfs.wait.{revision}")
        became[0] += 1
    except OSError as exc:
        became[exc.errno] += 1
threading.stack_size(64 * 1024)
threads = [threading.Thread(target=wait) for _ in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*(f"{number}:{times}" for number, times in became.items()))
"""


_MAPPER = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
pages = []
for path in sys.argv[1:]:  # Python's own maps keep a descriptor, whose close would publish
    fd = os.open(path, os.O_RDWR)
    pages.append(libc.mmap(None, mmap.PAGESIZE, mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0))
    os.close(fd)
print("mapped", flush=True)
sys.stdin.readline()
for page in pages:
    ctypes.memmove(page, b"new", 3)
    libc.munmap(ctypes.c_void_p(page), mmap.PAGESIZE)
"""


class Waiters:
    """A process of another user, if there is one, that waits for a revision many times."""

    def __init__(self, path: Path, revision: int) -> None:
        arguments = [str(path), str(MANY), str(revision), "65534"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _WAITERS, *arguments], stdout=subprocess.PIPE, text=True
        )

    def became(self) -> Counter[int]:
        """Return how often which errno came, once all waiters have ended; 0 is success."""
        said, _ = self._process.communicate(timeout=PATIENCE_S)
        return Counter({int(n): int(times) for n, times in (w.split(":") for w in said.split())})


@contextlib.contextmanager
def files_of_mine(count: int) -> Iterator[None]:
    """Have room for so many open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], count), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def admission(mounted: Mounted) -> Counter[str]:
    return Counter(mounted.statistics()["admission"])


def test_b109_who_waits_stops_nobody(own_etcd: EtcdProcess, pool: Pool) -> None:
    shared = ("--allow-other",) if os.geteuid() == 0 else ()
    with pool.private(own_etcd, "--cache", "--timeout", str(PATIENCE_S), *shared) as mounted:
        mounted.expect_log("has not let go of a lock")  # but the machine is busy
        mounted.path.parent.chmod(0o711)
        revision = mounted.put("/f", b"1")
        waiters = Waiters(mounted.path, revision + 2)
        until(lambda: admission(mounted).total() == MANY)
        waiting = admission(mounted)["waiting"]
        assert waiting < MANY, "not all may wait"
        assert (mounted.path / "f").read_bytes() == b"1"
        assert os.listdir(mounted.path) == ["f"]
        assert not (mounted.path / "new").exists()
        assert mounted.put("/f", b"2") == revision + 1, "others may still wait"
        assert (mounted.path / "f").read_bytes() == b"2"
        assert admission(mounted)["waiting"] == waiting
        mounted.put("/f", b"3")
        assert waiters.became() == {0: waiting, errno.EAGAIN: MANY - waiting}
        until(lambda: admission(mounted)["waiting"] == 0)


def test_b109_an_outage_stops_nobody_who_is_answered_from_memory(
    own_etcd: EtcdProcess, pool: Pool
) -> None:
    count = 1100
    became: Counter[int] = Counter()

    def close(fd: int) -> None:
        try:
            os.close(fd)
        except OSError as exc:
            became[exc.errno or 0] += 1

    with files_of_mine(count + 500), pool.private(own_etcd, "--cache") as mounted:
        mounted.expect_log("flush:", "release:", "watch")
        mounted.put("/f", b"1")
        fds = [os.open(mounted.path / f"w{n}", os.O_CREAT | os.O_WRONLY) for n in range(count)]
        for fd in fds:
            os.write(fd, b"x")
        own_etcd.pause()
        before = threading.stack_size(_STACK)
        try:
            threads = [threading.Thread(target=close, args=(fd,)) for fd in fds]
            for thread in threads:
                thread.start()
            until(lambda: admission(mounted)["waiting"] == count)
            assert (mounted.path / "f").read_bytes() == b"1"
            assert not (mounted.path / "new").exists()
            assert not became, "all of them wait still"
        finally:
            threading.stack_size(before)
            own_etcd.resume()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert became.keys() <= {errno.EIO, errno.ETIMEDOUT}
        until(lambda: admission(mounted)["waiting"] == 0)


def test_b109_what_is_published_at_its_release_stops_no_read(
    own_etcd: EtcdProcess, pool: Pool
) -> None:
    """Linux lets 12 requests that nobody waits for be under way, READs and RELEASEs together."""
    names = [f"m{n}" for n in range(20)]
    with pool.private(own_etcd, "--cache", "--timeout", str(PATIENCE_S)) as mounted:
        for name in names:
            mounted.put(f"/{name}", b"old")
        (mounted.path / "large").write_bytes(bytes(STORE_MAX * 4))
        with open(mounted.path / "large", "rb") as large:
            paths = [str(mounted.path / name) for name in names]
            process = subprocess.Popen(  # which dies (SIGBUS) if a page cannot be had
                [sys.executable, "-I", "-c", _MAPPER, *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            assert process.stdout.readline() == "mapped\n"
            own_etcd.pause()
            try:
                process.communicate("go on\n", PATIENCE_S / 2)
                assert process.returncode == 0
                os.posix_fadvise(large.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                with mounted.counting() as counted:
                    assert large.read() == bytes(STORE_MAX * 4)
                assert counted["read"]
                assert "release:" not in mounted.log, "nothing has been given up yet"
            finally:
                own_etcd.resume()
        mounted.close()  # the last chance to publish them
        with contextlib.closing(Client(own_etcd.endpoint)) as client:
            found = [client.get(b"/" + name.encode()) for name in names]
        assert [f and f.value for f in found] == [b"new"] * len(names)
