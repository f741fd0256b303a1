"""What a mirror shows while etcd is silent, gone, late, or no longer lets us read."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from etcdfs.keyspace.attribute_records import record_key
from tests.mount.client import Client
from tests.mount.lab import MODES, Lab, Pool
from tests.mount.test_faults import daemon
from tests.support.black_hole import BlackHole
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import COMMAND, Mounted, run_etcdfs
from tests.support.profile import NIGHTLY

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

_PATIENCE_S = 30.0
_ROUNDS = 1000 if NIGHTLY else 150


def eventually(is_so: Callable[[], bool]) -> None:
    """Return once it is so; a daemon tells nobody when."""
    never = threading.Event()
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        never.wait(0.01)


def shows(path: Path, value: bytes) -> Callable[[], bool]:
    def is_so() -> bool:
        with contextlib.suppress(OSError):
            return path.read_bytes() == value
        return False

    return is_so


def writes(path: Path, value: bytes) -> Callable[[], bool]:
    def is_done() -> bool:
        with contextlib.suppress(OSError):
            return path.write_bytes(value) == len(value)
        return False

    return is_done


def fails(attempt: Callable[[], object], number: int) -> Callable[[], bool]:
    def is_so() -> bool:
        try:
            attempt()
        except OSError as exc:
            if exc.errno != number:
                raise
            return True
        return False

    return is_so


# --- silence --------------------------------------------------------------------------------


@contextlib.contextmanager
def paused(etcd: EtcdProcess, _hole: BlackHole) -> Iterator[None]:
    etcd.pause()
    yield
    etcd.resume()


@contextlib.contextmanager
def swallowed(_etcd: EtcdProcess, hole: BlackHole) -> Iterator[None]:
    hole.swallow()
    yield
    hole.carry()


@pytest.mark.parametrize("fault", [paused, swallowed])
def test_b78_a_silent_etcd_is_told_from_a_quiet_one(
    pool: Pool,
    own_etcd: EtcdProcess,
    fault: Callable[[EtcdProcess, BlackHole], contextlib.AbstractContextManager[None]],
) -> None:
    with (
        BlackHole(own_etcd.endpoint) as hole,
        pool.private(
            own_etcd, "--cache", "--watch-timeout", "0.3", "--timeout", "0.5", via=hole.url
        ) as mounted,
        contextlib.closing(Client(own_etcd.endpoint)) as client,
    ):
        mounted.put("/file", "one")
        assert (mounted.path / "file").read_bytes() == b"one"
        quiet_until = time.monotonic() + 1
        eventually(lambda: time.monotonic() > quiet_until)

        def is_well() -> bool:
            link = mounted.statistics()["staleness"]
            assert link["losses"] == 0
            return bool(link["connected"] and not link["stale_s"])

        eventually(is_well)  # at once, unless the machine is busy while etcd is asked
        link = mounted.statistics()["staleness"]
        assert link["silent_s"] < 1, "etcd was asked, and answered"
        mounted.expect_log("")
        with fault(own_etcd, hole):
            eventually(lambda: mounted.statistics()["state_machine"]["breaks"] > 0)
            link = mounted.statistics()["staleness"]
            assert not link["connected"]
            assert link["losses"] == 1
            assert link["stale_s"] > 0.3
            assert (mounted.path / "file").read_bytes() == b"one"
        client.put(b"/file", b"two")
        eventually(shows(mounted.path / "file", b"two"))
        eventually(lambda: bool(mounted.statistics()["staleness"]["connected"]))
        assert mounted.statistics()["state_machine"]["lists"] == 1, "resumed, not listed again"


# --- too old --------------------------------------------------------------------------------


def test_b80_what_is_too_old_is_an_error_and_comes_back(pool: Pool, own_etcd: EtcdProcess) -> None:
    options = ("--cache", "--max-stale", "1", "--timeout", "0.5")
    with pool.private(own_etcd, *options) as mounted:
        file, missing = mounted.path / "d" / "file", mounted.path / "d" / "missing"
        mounted.put("/d/file", "one")
        inode = file.stat().st_ino
        fd = os.open(file, os.O_RDONLY)
        inside = os.open(mounted.path / "d", os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert os.pread(fd, 10, 0) == b"one"
            assert not missing.exists()
            mounted.expect_log("")
            own_etcd.kill()
            assert file.read_bytes() == b"one"
            eventually(fails(file.stat, errno.EIO))
            for attempt in (
                file.read_bytes,
                file.stat,
                missing.stat,
                (mounted.path / "d").stat,
                lambda: os.listdir(mounted.path),
                lambda: os.listdir(inside),
                lambda: os.stat("file", dir_fd=inside),
                lambda: os.fstat(fd),
                lambda: missing.write_bytes(b"new"),
                (mounted.path / "made").mkdir,
            ):
                with pytest.raises(OSError, match="Input/output") as caught:
                    attempt()
                assert caught.value.errno == errno.EIO
            # These answer: df, mountpoint and umount need no more.
            assert mounted.path.stat().st_ino == 1
            assert os.statvfs(mounted.path).f_namemax == 255
            assert _command("df", mounted.path).returncode == 0
            listing = _command("ls", mounted.path)
            assert listing.returncode == 2
            assert "Input/output error" in listing.stderr
            link = mounted.statistics()["staleness"]
            assert "has not been heard for 1 s" in link["refused"]
            own_etcd.start()
            eventually(shows(file, b"one"))
            assert file.stat().st_ino == inode
            assert os.fstat(fd).st_ino == inode
            assert os.listdir(inside) == ["file"]
            assert not missing.exists()
            assert mounted.statistics()["staleness"]["refused"] == ""
        finally:
            os.close(fd)
            os.close(inside)
        own_etcd.kill()
        eventually(fails(file.stat, errno.EIO))
        done = run_etcdfs("umount", str(mounted.path))
        assert done.returncode == 0, done.stderr


def _command(*command: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )


# --- not permitted --------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b82_what_may_no_longer_be_read_is_not_shown(pool: Pool, own_etcd: EtcdProcess) -> None:
    """The watch of a mount that lost its rights goes on delivering: only a read tells."""
    with pool.private(own_etcd, "--cache", "--audit-interval", "0.3") as mounted:
        file = mounted.path / "d" / "file"
        mounted.put("/d/file", "one")
        assert file.read_bytes() == b"one"
        assert not (mounted.path / "d" / "missing").exists()
        mounted.expect_log("")
        own_etcd.etcdctl("user", "add", "root:secret")
        own_etcd.etcdctl("user", "grant-role", "root", "root")
        own_etcd.etcdctl("auth", "enable")
        try:
            eventually(fails(file.stat, errno.EACCES))
            for attempt in (
                file.read_bytes,
                (mounted.path / "d" / "missing").stat,
                lambda: os.listdir(mounted.path),
                lambda: file.write_bytes(b"x"),
            ):
                with pytest.raises(PermissionError):
                    attempt()
            assert os.statvfs(mounted.path).f_namemax == 255
        finally:
            own_etcd.etcdctl("--user=root:secret", "auth", "disable")
        eventually(shows(file, b"one"))
        mounted.put("/d/file", "two")
        assert file.read_bytes() == b"two"


# --- audits ---------------------------------------------------------------------------------

_LOSE_EVENTS = """
from etcdfs.daemon.main import main
from etcdfs.mirror.state_machine import StateMachine
whole = StateMachine._on_events
def lossy(self, events):
    return whole(self, tuple(event for event in events if b"lost" not in event.key))
StateMachine._on_events = lossy
"""


def test_b76_what_the_watch_lost_is_found_and_mended(cached: Lab) -> None:
    cached.client.put(cached.key("lost/deleted"), b"old")
    cached.client.put(cached.key("lost/changed"), b"old")
    cached.client.put(cached.key("unchanged"), b"same")
    with daemon(cached.etcd, cache=True, program=_LOSE_EVENTS, audit_interval_s=0.3) as running:
        path = running.path / cached.path.name
        assert (path / "lost" / "changed").read_bytes() == b"old"
        assert not (path / "lost" / "made").exists()
        unchanged = (path / "unchanged").stat()
        cached.client.change_all(
            [(cached.key("lost/changed"), b"new"), (cached.key("lost/made"), b"new")],
            [cached.key("lost/deleted")],
        )
        eventually(shows(path / "lost" / "changed", b"new"))
        assert (path / "lost" / "made").read_bytes() == b"new"
        assert not (path / "lost" / "deleted").exists()
        after = (path / "unchanged").stat()
        assert (after.st_ino, after.st_mtime_ns) == (unchanged.st_ino, unchanged.st_mtime_ns)
        log = running.log_file.read_text()
        assert log.count(" found 3 difference(s) from etcd, the first at ") == 1


def test_b76_what_the_watch_of_the_attributes_lost_is_found_and_mended(cached: Lab) -> None:
    """Where record keys have a watch of their own; it loses the same."""
    for name in ("in/lost/deleted", "in/lost/changed", "in/lost/made", "in/same"):
        cached.client.put(cached.key(name), b"")
        if name != "in/lost/made":
            cached.client.put(record_key(cached.key(name)), b'{"mode":"0600"}')
    prefix = cached.key("in/")
    with daemon(
        cached.etcd, cache=True, program=_LOSE_EVENTS, audit_interval_s=0.3, prefix=prefix
    ) as running:
        lost, same = running.path / "lost", (running.path / "same").stat()
        assert _mode(lost / "deleted") == 0o600
        cached.client.put(record_key(cached.key("in/lost/changed")), b'{"mode":"0400"}')
        cached.client.put(record_key(cached.key("in/lost/made")), b'{"mode":"0640"}')
        cached.client.delete(record_key(cached.key("in/lost/deleted")))
        modes = [("changed", 0o400), ("made", 0o640), ("deleted", 0o644)]
        eventually(lambda: all(_mode(lost / name) == mode for name, mode in modes))
        assert (running.path / "same").stat() == same
        audit = json.loads(os.getxattr(running.path, "user.etcdfs.statistics"))["attribute_audit"]
        assert audit["differences"] == 3
        assert " difference(s) from etcd, the first at " in running.log_file.read_text()


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


# --- linearizable ---------------------------------------------------------------------------


def test_b79_an_open_after_a_put_sees_it_without_waiting(pool: Pool, cached: Lab) -> None:
    with pool.private(cached.etcd, "--cache", "--consistency", "linearizable") as mounted:
        path = mounted.path / cached.path.name
        name = cached.key("file")
        for n in range(_ROUNDS):
            cached.client.put(name, b"%d" % n)
            assert (path / "file").read_bytes() == b"%d" % n
        for n in range(_ROUNDS // 10):
            cached.client.put(cached.key(f"new{n}"), b"")
            assert len(os.listdir(path)) == n + 2
            cached.client.delete(name)
            assert not (path / "file").exists()
            cached.client.put(name, b"%d" % n)
            assert (path / "file").stat().st_size == len(b"%d" % n)


def test_b79_other_peoples_keys_hold_nobody(pool: Pool, cached: Lab) -> None:
    """Revisions that the watch of this prefix never brings."""
    options = ("--cache", "--consistency", "linearizable", "--prefix", f"/{cached.path.name}/in/")
    cached.client.put(cached.key("in/file"), b"")
    with pool.private(cached.etcd, *options) as mounted:
        for n in range(_ROUNDS // 10):
            cached.client.put(cached.key("in/file"), b"%d" % n)
            cached.client.put(cached.key("outside"), b"%d" % n)
            assert (mounted.path / "file").read_bytes() == b"%d" % n
            assert os.listdir(mounted.path) == ["file"]
        cached.client.put(cached.key("outside"), b"")
        assert not (mounted.path / "missing").exists()


_LATE_WATCHES = """
import trio
from etcdfs.mirror.mirror import Mirror
from etcdfs.daemon.main import main
from etcdfs.mirror.attribute_mirror import AttributeMirror
for owner in (Mirror, AttributeMirror):
    async def late(*arguments, on_time=owner._apply):
        await trio.sleep(0.1)
        await on_time(*arguments)
    owner._apply = late
"""


@pytest.mark.parametrize("prefix", ["", "in/"], ids=["one watch", "two watches"])
def test_b79_attributes_that_another_client_set_are_seen(cached: Lab, prefix: str) -> None:
    """Where record keys come by the watch of the keys, and where they have one of their own."""
    key = cached.key("in/file")
    cached.client.put(key, b"")
    shown = cached.key(prefix) if prefix else b"/"
    with daemon(
        cached.etcd, cache=True, program=_LATE_WATCHES, consistency="linearizable", prefix=shown
    ) as running:
        path = Path(os.fsdecode(os.fsencode(running.path) + b"/" + key.removeprefix(shown)))
        for mode in range(0o600, 0o610):
            cached.client.put(record_key(key), b'{"mode":"%04o"}' % mode)
            cached.client.put((cached.key("in/other"), b"elsewhere")[mode % 2], b"")
            assert _mode(path) == mode


def test_b79_an_etcd_that_does_not_answer_is_an_error(pool: Pool, own_etcd: EtcdProcess) -> None:
    options = ("--cache", "--consistency", "linearizable", "--timeout", "0.5")
    with pool.private(own_etcd, *options) as mounted:
        mounted.put("/file", "one")
        mounted.expect_log("")
        own_etcd.pause()
        try:
            for attempt in (
                (mounted.path / "file").read_bytes,
                lambda: os.listdir(mounted.path),
                (mounted.path / "missing").stat,
            ):
                with pytest.raises(OSError, match=r"timed out|Input/output"):
                    attempt()
            assert mounted.path.stat().st_ino == 1
        finally:
            own_etcd.resume()
        eventually(shows(mounted.path / "file", b"one"))


# --- starting without etcd ------------------------------------------------------------------


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    subprocess.run(["fusermount3", "-uz", path], capture_output=True, check=False)


@pytest.mark.parametrize("mode", ["--cache", "--no-cache"])
def test_b81_the_mount_may_start_before_etcd(own_etcd: EtcdProcess, mnt: Path, mode: str) -> None:
    with contextlib.closing(Client(own_etcd.endpoint)) as client:
        client.put(b"/file", b"value")
    own_etcd.stop()
    command = [*COMMAND, "mount", str(mnt), "--endpoints", own_etcd.client_url, mode]
    command += ["--wait-for-etcd", "60", "--timeout", "0.5", "--log-file", str(mnt.parent / "log")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "waiting for etcd (" in process.stderr.readline()
        assert not os.path.ismount(mnt)
        own_etcd.start()
        assert process.wait(_PATIENCE_S) == 0
        assert (mnt / "file").read_bytes() == b"value"
    finally:
        process.kill()
        process.communicate()


def test_b81_an_etcd_that_does_not_come_ends_the_wait(own_etcd: EtcdProcess, mnt: Path) -> None:
    own_etcd.stop()
    began = time.monotonic()
    done = run_etcdfs(
        *("mount", str(mnt), "--endpoints", own_etcd.client_url, "--cache"),
        *("--wait-for-etcd", "1.5", "--timeout", "0.2"),
    )
    assert time.monotonic() - began >= 1.5
    assert done.returncode == 20
    assert done.stderr.count("waiting for etcd") >= 2
    assert done.stderr.splitlines()[-1].startswith("etcdfs: 127.0.0.1:")
    assert os.listdir(mnt) == []


_LOSE_A_PAGE = """
from etcdfs.daemon import first_state
from etcdfs.errors import StoreUnavailableError
from etcdfs.etcd.client import EtcdStore
from etcdfs.daemon.main import main
from etcdfs.mirror.state_machine import StateMachine
StateMachine.__init__.__kwdefaults__["page_size"] = 3
whole, calls = EtcdStore.range, 0
async def lossy(self, *args, **kwargs):
    global calls
    calls += 1
    if calls in (2, 4):
        raise StoreUnavailableError("planted")
    return await whole(self, *args, **kwargs)
EtcdStore.range = lossy
first_state.RETRY_S = 0.01
"""


def test_b81_an_etcd_that_is_lost_while_it_is_listed_is_waited_for(cached: Lab) -> None:
    for n in range(10):
        cached.client.put(cached.key(f"{n}"), b"%d" % n)
    with daemon(cached.etcd, cache=True, program=_LOSE_A_PAGE, wait_for_etcd_s=60.0) as running:
        path = running.path / cached.path.name
        assert sorted(os.listdir(path)) == [f"{n}" for n in range(10)]
        assert (path / "9").read_bytes() == b"9"
        assert running.log_file.read_text().count("waiting for etcd") == 2


# --- other histories ------------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b83_whatever_becomes_of_etcd_the_mount_becomes_it(
    pool: Pool, own_etcd: EtcdProcess, tmp_path: Path
) -> None:
    """One mount through everything; what it shows is compared with etcd after each."""
    with pool.private(own_etcd, "--cache", "--timeout", "5") as mounted:
        mounted.expect_log("")
        etcd = _Etcd(own_etcd, mounted, tmp_path / "snapshot")
        etcd.fill("old")
        etcd.check()
        with _holding(mounted.path / "d" / "0") as check_held:
            for happening in (
                etcd.is_stopped_and_started,
                etcd.is_compacted_up_to_a_deletion,
                etcd.loses_a_whole_prefix,
                etcd.goes_back_to_a_snapshot_and_on,
                etcd.is_wiped_and_refilled,
            ):
                unchanged = (mounted.path / "d" / "9").stat()
                happening()
                etcd.check()
                check_held()
                after = (mounted.path / "d" / "9").stat()
                same = (after.st_ino, after.st_mtime_ns) == (
                    unchanged.st_ino,
                    unchanged.st_mtime_ns,
                )
                assert same == (happening != etcd.is_wiped_and_refilled), happening
            assert mounted.statistics()["tree"]["old_versions"] >= 1
        eventually(lambda: mounted.statistics()["tree"]["old_versions"] == 0)
        state_machine = mounted.statistics()["state_machine"]
        assert state_machine["violations"] == 0
        assert state_machine["lists"] == 4, "all but the first and the third"


_HOLD = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
value = os.pread(fd, 1 << 20, 0)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
print("held", flush=True)
for _ in sys.stdin:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    same = os.pread(fd, 1 << 20, 0) == value == mapped[:]
    print("same" if same else "other", flush=True)
"""


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[Callable[[], None]]:
    """Hold a file open and mapped; yield a check that both are as they were.

    In another process: this one starts etcds while the daemon stands still, and the child would
    wait for the daemon when it closes what it inherited.
    """
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        stdin, stdout = holder.stdin, holder.stdout
        assert stdin is not None
        assert stdout is not None

        def check() -> None:
            stdin.write("\n")
            stdin.flush()
            assert stdout.readline() == "same\n"

        try:
            assert stdout.readline() == "held\n"
            yield check
        finally:
            holder.kill()


class _Etcd:
    """An etcd to which things happen while the daemon stands still."""

    def __init__(self, etcd: EtcdProcess, mounted: Mounted, snapshot: Path) -> None:
        self._etcd = etcd
        self._mounted = mounted
        self._snapshot = snapshot

    def fill(self, text: str) -> None:
        with self._client() as client:
            for n in range(10):
                client.put(b"/d/%d" % n, b"%s %d" % (text.encode() * 3000, n))
                client.put(b"/gone/%d" % n, b"")

    def check(self) -> None:
        """Check that the mount comes to show every key of etcd, and no other."""
        with self._client() as client:
            etcd = {found.key.decode(): found.value for found in client.below(b"/")}
        eventually(lambda: _tree(self._mounted.path) == etcd)

    def is_stopped_and_started(self) -> None:
        with self._unseen():
            self._etcd.stop()
            self._etcd.start()
            with self._client() as client:
                client.put(b"/d/0", b"changed")
                client.delete(b"/d/8")

    def is_compacted_up_to_a_deletion(self) -> None:
        """Etcd issues 18089 and 19179: such a deletion may be lost to a watch."""
        with self._unseen():
            self._etcd.restart()
            with self._client() as client:
                client.put(b"/d/1", b"changed")
                client.compact(client.delete(b"/d/2"))

    def loses_a_whole_prefix(self) -> None:
        with self._unseen():
            self._etcd.restart()
            with self._client() as client:
                client.delete_below(b"/gone/")

    def goes_back_to_a_snapshot_and_on(self) -> None:
        self._etcd.etcdctl("snapshot", "save", str(self._snapshot))
        with self._client() as client:
            client.put(b"/d/3", b"lost")
            self._mounted.wait(client.put(b"/d/4", b"lost"))
        assert (self._mounted.path / "d" / "3").read_bytes() == b"lost"
        with self._unseen():
            self._etcd.kill()
            self._etcd.restore(self._snapshot)
            self._etcd.start()
            with self._client() as client:
                for n in range(5):
                    client.put(b"/d/4", b"%d" % n)

    def is_wiped_and_refilled(self) -> None:
        with self._client() as client:
            before = client.revision()
        with self._unseen():
            self._etcd.kill()
            shutil.rmtree(self._etcd.data_dir)
            self._etcd.start()
            self.fill("new")
            with self._client() as client:
                while client.revision() < before + 3:
                    client.put(b"/d/5", b"%d" % client.revision())

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[None]:
        pid = self._mounted.daemon
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def _client(self) -> "contextlib.closing[Client]":
        return contextlib.closing(Client(self._etcd.endpoint))


def _tree(top: Path) -> dict[str, bytes]:
    """Return what is below a directory, by key; empty if it changes meanwhile."""
    found: dict[str, bytes] = {}
    with contextlib.suppress(OSError):
        for directory, _, files in os.walk(top):
            for name in files:
                path = Path(directory, name)
                found["/" + str(path.relative_to(top))] = path.read_bytes()
    return found


# --- where programs listen ------------------------------------------------------------------

_NEVER_CLOSE = (
    (("bash", "-c", 'echo x > "$0"'), "old"),
    (("sh", "-c", 'echo x >> "$0"'), "new"),
    ((sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write('x')"), "old"),
)
"""Programs that write to a file, by its name, and do not look at what close(2) says."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_b74_an_open_for_writing_tells_of_an_outage(
    pool: Pool, own_etcd: EtcdProcess, mode: str, how: str
) -> None:
    timeout_s = 1.0
    with pool.private(own_etcd, mode, "--timeout", str(timeout_s)) as mounted:
        mounted.put("/old", "old")
        # With the default mode: what comes late, or not, is one key.
        fd = os.open(mounted.path / "held", os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(fd, b"x")
        mounted.expect_log("")
        getattr(own_etcd, how)()
        with pytest.raises(OSError, match="Errno"):  # what was opened before is told at close
            os.close(fd)
        for command, name in _NEVER_CLOSE:
            start = time.monotonic()
            done = subprocess.run(
                [*command, str(mounted.path / name)], capture_output=True, check=False
            )
            assert done.returncode, command
            assert time.monotonic() - start < _PATIENCE_S
        if mode == "--cache":
            assert (mounted.path / "old").read_bytes() == b"old"
        own_etcd.resume() if how == "pause" else own_etcd.restart()
        with contextlib.closing(Client(own_etcd.endpoint)) as client:
            left = {found.key: found.value for found in client.below(b"/")}
        assert left.pop(b"/held", b"x") == b"x"
        assert left == {b"/old": b"old"}
        eventually(writes(mounted.path / "old", b"new"))
