"""Who watches a mount through inotify hears what other clients do."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from etcdfs.fuse.procfs import sees_all_watches
from etcdfs.process.mountpoint import find_mounted
from tests.mount.client import Client
from tests.mount.lab import Lab, Pool, memory_directory
from tests.mount.posix.calls import RENAME_EXCHANGE, renameat2
from tests.mount.test_faults import daemon
from tests.support.churn import until
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted
from tests.support.nobody import needs_root
from tests.support.proxy import Proxy
from tests.support.stuck_reader import StuckReader
from tests.support.watcher import Watcher

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

END = "CLOSE_WRITE end"


def inotify(mounted: Mounted) -> Any:
    return mounted.statistics()["inotify"]


def watching(mounted: Mounted, *paths: Path) -> Watcher:
    """Return who watches some paths, and hears of no change that was made before."""
    until(lambda: not inotify(mounted)["waiting"])
    return Watcher(*paths)


def all_until_now(lab: Lab, watcher: Watcher) -> list[str]:
    """Return what was seen since the last call, whatever was still on its way included."""
    lab.client.put(lab.key("end"), b"%d" % lab.client.revision())
    return [event for event in watcher.until(END) if not event.endswith(" end")]


# --- which events ---------------------------------------------------------------------------


def test_b128_other_clients_changes_raise_the_events_of_a_local_file_system(cached: Lab) -> None:
    with memory_directory() as directory, Watcher(directory) as local:
        (directory / "f").write_bytes(b"1")
        expected_new = local.now()
        (directory / "f").write_bytes(b"2")
        expected_change = local.now()
        (directory / "f").unlink()
        (directory / "d").mkdir()
        (directory / "d").rmdir()
        expected_rest = local.now()
    cached.put("end", b"")
    with watching(cached.mounted, cached.path) as watcher:
        cached.client.put(cached.key("f"), b"1")
        assert watcher.until("CLOSE_WRITE f") == expected_new
        cached.client.put(cached.key("f"), b"2")
        # Who truncates and writes modifies it twice; a put is one modification.
        assert set(watcher.until("CLOSE_WRITE f")) == set(expected_change)
        cached.client.delete(cached.key("f"))
        seen = watcher.until("DELETE f")
        cached.client.put(cached.key("d/x"), b"")
        seen += watcher.until("CREATE,ISDIR d")
        cached.client.delete(cached.key("d/x"))
        seen += watcher.until("DELETE,ISDIR d")
        assert seen == expected_rest


def test_b128_a_watch_on_the_file_itself_hears_of_each_version(cached: Lab) -> None:
    cached.put("f", b"0")
    with watching(cached.mounted, cached.path / "f") as watcher:
        for value in (b"1", b"22", b"333"):
            cached.client.put(cached.key("f"), value)
            assert watcher.until("CLOSE_WRITE") == ["MODIFY", "CLOSE_WRITE"]
            assert (cached.path / "f").read_bytes() == value


def test_b128_links_fifos_and_sockets_come_and_go(cached: Lab, other: Lab) -> None:
    cached.put("end", b"")
    with watching(cached.mounted, cached.path) as watcher:
        os.symlink("nowhere", other.path / "link")
        watcher.until("CREATE link")
        os.mkfifo(other.path / "fifo")
        watcher.until("CREATE fifo")
        for name in ("link", "fifo"):
            os.unlink(other.path / name)
            assert watcher.until(f"DELETE {name}") == [f"DELETE {name}"]


def test_b128_what_another_mount_renames_goes_and_comes(cached: Lab, other: Lab) -> None:
    """The last is how Kubernetes replaces what is in a volume."""
    cached.put("f", b"1")
    cached.put("draft", b"2")
    cached.put("d/x", b"1")
    os.symlink("first", other.path / "..data")
    until(lambda: os.path.islink(cached.path / "..data"))
    with watching(cached.mounted, cached.path) as watcher:
        (other.path / "draft").rename(other.path / "f")
        assert sorted(watcher.until("DELETE draft", "CLOSE_WRITE f")) == [
            *("CLOSE_WRITE f", "DELETE draft", "MODIFY f"),
        ]
        assert (cached.path / "f").read_bytes() == b"2"
        (other.path / "d").rename(other.path / "e")
        heard = watcher.until("DELETE,ISDIR d", "CREATE,ISDIR e")
        assert len(heard) == 2
        os.symlink("second", other.path / "..tmp")
        watcher.until("CREATE ..tmp")
        assert os.readlink(cached.path / "..data") == "first"
        (other.path / "..tmp").rename(other.path / "..data")
        heard = watcher.until("DELETE ..tmp", "CREATE ..data")
        assert "DELETE ..data" in heard
        for _ in range(2):
            assert os.readlink(cached.path / "..data") == "second"
            assert os.lstat(cached.path / "..data").st_nlink == 1


def test_b128_other_attributes_are_heard_of_where_they_belong(cached: Lab, other: Lab) -> None:
    cached.put("d/f", b"1")
    other.mounted.wait(cached.put("end", b""))
    os.symlink("nowhere", other.path / "d/link")
    until(lambda: os.path.islink(cached.path / "d/link"))
    inside = cached.path / "d"
    with (
        watching(cached.mounted, cached.path) as above,
        watching(cached.mounted, inside) as within,
        watching(cached.mounted, inside / "f") as of_file,
    ):
        for change in (
            lambda path: path.chmod(0o604),
            lambda path: os.utime(path, (1e9, 1e9)),
            lambda path: os.setxattr(path, "user.note", b"1"),
            lambda path: os.removexattr(path, "user.note"),
        ):
            change(other.path / "d/f")
            assert of_file.until("ATTRIB") == ["ATTRIB"]
            assert within.until("ATTRIB f") == ["ATTRIB f"]
            change(other.path / "d")
            assert within.until("ATTRIB,ISDIR") == ["ATTRIB,ISDIR"]
            assert above.until("ATTRIB,ISDIR d") == ["ATTRIB,ISDIR d"]
        os.utime(other.path / "d/link", (1e9, 1e9), follow_symlinks=False)
        assert within.until("ATTRIB link") == ["ATTRIB link"]
        with (other.path / "d/f").open("wb") as file:  # ends the time that was set
            file.write(b"2")
        assert within.until("CLOSE_WRITE f") == ["MODIFY f", "CLOSE_WRITE f"]
        with (other.path / "d/f").open("wb") as file:
            file.write(b"3")
            file.flush()
            os.utime(file.fileno(), (1e9, 1e9))
        assert set(within.until("ATTRIB f")) == {"MODIFY f", "CLOSE_WRITE f", "ATTRIB f"}


def test_b128_other_attributes_of_the_root(own_etcd: EtcdProcess, pool: Pool) -> None:
    with (
        pool.private(own_etcd, "--cache", "--prefix", "/p/") as mounted,
        pool.private(own_etcd, "--cache", "--prefix", "/p/") as other,
    ):
        mounted.put("/p/f", b"1")
        with watching(mounted, mounted.path) as watcher:
            other.path.chmod(0o711)
            assert watcher.until("ATTRIB,ISDIR") == ["ATTRIB,ISDIR"]
            assert mounted.path.stat().st_mode & 0o777 == 0o711


def test_b129_a_directory_that_is_emptied_and_comes_back(cached: Lab) -> None:
    cached.put("d/f", b"1")
    cached.put("end", b"")
    with (
        watching(cached.mounted, cached.path) as above,
        watching(cached.mounted, cached.path / "d") as inside,
    ):
        for value in (b"2", b"3"):
            cached.client.delete(cached.key("d/f"))
            assert inside.until("IGNORED") == ["DELETE f", "DELETE_SELF", "IGNORED"]
            assert above.until("DELETE,ISDIR d") == ["DELETE,ISDIR d"]
            cached.client.put(cached.key("d/f"), value)
            assert above.until("CREATE,ISDIR d") == ["CREATE,ISDIR d"]
            assert (cached.path / "d/f").read_bytes() == value
            inside.add(cached.path / "d")


def test_b129_a_watch_on_a_version_that_is_open_ends_as_after_a_rename_over_it(
    cached: Lab,
) -> None:
    cached.put("f", b"1")
    with (cached.path / "f").open("rb") as opened:
        with (
            watching(cached.mounted, cached.path / "f") as watcher,
            watching(cached.mounted, cached.path) as above,
        ):
            cached.client.put(cached.key("f"), b"2")
            assert watcher.until("IGNORED") == ["ATTRIB", "DELETE_SELF", "IGNORED"]
            assert above.until("CLOSE_WRITE f") == ["MODIFY f", "CLOSE_WRITE f"]
            watcher.add(cached.path / "f")
            cached.client.put(cached.key("f"), b"3")
            watcher.until("CLOSE_WRITE")
            assert (cached.path / "f").read_bytes() == b"3"
        assert opened.read() == b"1"


def test_b129_a_watch_on_a_file_that_is_deleted_ends(cached: Lab) -> None:
    cached.put("f", b"1")
    with watching(cached.mounted, cached.path / "f") as watcher:
        cached.client.delete(cached.key("f"))
        assert watcher.until("IGNORED") == ["ATTRIB", "DELETE_SELF", "IGNORED"]


# --- never wrong ----------------------------------------------------------------------------


def test_b130_whoever_hears_of_a_version_reads_it(cached: Lab) -> None:
    """Each change is heard of, whoever reads, opens or looks for the name meanwhile."""
    cached.put("f", b"0")
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            for name in ("f", "gone"):
                try:
                    (cached.path / name).read_bytes()
                except OSError:  # it is not there, or came and went
                    os.path.lexists(cached.path / name)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        with watching(cached.mounted, cached.path) as watcher:
            for number in range(50):
                value = b"%d" % number * (number + 1)
                cached.client.put(cached.key("f"), value)
                watcher.until("CLOSE_WRITE f")
                assert (cached.path / "f").read_bytes() == value
                cached.client.put(cached.key("gone"), b"")
                watcher.until("CLOSE_WRITE gone")
                assert (cached.path / "gone").exists()
                cached.client.delete(cached.key("gone"))
                watcher.until("DELETE gone")
                assert not (cached.path / "gone").exists()
    finally:
        ended.set()
        disturber.join()


def test_b130_a_burst_is_heard_of_at_its_end(cached: Lab) -> None:
    cached.put("f", b"first")
    before = inotify(cached.mounted)
    with watching(cached.mounted, cached.path) as watcher:
        for number in range(300):
            cached.client.put(cached.key("f"), b"%d" % number)
        cached.client.put(cached.key("f"), b"last")
        while (cached.path / "f").read_bytes() != b"last":
            watcher.until("CLOSE_WRITE f")
        all_until_now(cached, watcher)
    until(lambda: not inotify(cached.mounted)["waiting"])
    after = inotify(cached.mounted)
    assert after["replayed"] - before["replayed"] <= 302
    assert after["dropped"] == before["dropped"]


def test_b130_whoever_reads_meanwhile_reads_whole_versions(cached: Lab) -> None:
    """Linux believes what it is told of a size: it must not be told of one that is past."""
    sizes = (10, 3000, 70_000, 1, 500)
    cached.put("f", b"0" * sizes[0])
    ended = threading.Event()
    torn: list[tuple[int, int]] = []

    def read() -> None:
        while not ended.is_set():
            with (cached.path / "f").open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                found = file.read()
            if found != b"%d" % sizes.index(size) * size:
                torn.append((size, len(found)))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        with watching(cached.mounted, cached.path) as watcher:
            for number in range(1, 1500):
                kind = number % len(sizes)
                cached.client.put(cached.key("f"), b"%d" % kind * sizes[kind])
            watcher.until("CLOSE_WRITE f")
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    assert not torn


def test_b130_a_name_that_is_a_file_and_a_directory_in_turn(cached: Lab, other: Lab) -> None:
    """What is replayed may be of another type by then, and Linux takes no such answer."""
    (other.path / "d").mkdir()
    (other.path / "f").write_bytes(b"1")
    until((cached.path / "f").exists)
    before = inotify(cached.mounted)
    with watching(cached.mounted, cached.path) as watcher:
        for _ in range(100):
            renameat2(other.path / "d", other.path / "f", RENAME_EXCHANGE)
            os.listdir(cached.path)
        all_until_now(cached, watcher)
    assert inotify(cached.mounted)["dropped"] == before["dropped"]


def test_b130_nothing_else_comes_of_an_event(cached: Lab) -> None:
    def look() -> list[tuple[int, ...]]:
        paths = (cached.path, cached.path / "f")
        stats = [os.stat(path) for path in paths]
        return [(s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]

    cached.put("end", b"")
    cached.put("f", b"1")
    with watching(cached.mounted, cached.path) as watcher:
        for change in (b"2", b"33"):
            revision = cached.put("f", change)  # it is visible; the event may be on its way
            before = look()
            watcher.until("CLOSE_WRITE f")
            assert look() == before
            assert cached.client.revision() == revision
        statistics = cached.mounted.statistics()
        assert statistics["open_files"] == 0
        assert statistics["write_buffer"]["files"] == 0
        assert os.getxattr(cached.path / "f", "user.etcd.version") == b"3"


def test_b130_what_this_mount_does_is_heard_of_once(cached: Lab) -> None:
    def work(directory: Path) -> None:
        (directory / "f").write_bytes(b"1")
        with (directory / "f").open("ab") as file:
            file.write(b"2")
        (directory / "f").rename(directory / "g")
        (directory / "d").mkdir()
        (directory / "g").rename(directory / "d/g")
        (directory / "d").rename(directory / "e")
        (directory / "e/g").unlink()
        (directory / "e").rmdir()
        os.symlink("x", directory / "link")
        (directory / "link").unlink()
        os.close(os.open(directory / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        (directory / "new").chmod(0o600)
        os.utime(directory / "new", (1e9, 1e9))
        with (directory / "new").open("r+b") as file:
            file.write(b"1")
            file.flush()
            os.utime(file.fileno(), (1e9, 1e9))
        with (directory / "new").open("r+b") as file:
            file.write(b"1")
            file.flush()
            os.utime(file.fileno(), (1e9 + 1, 1e9 + 1))
        os.setxattr(directory / "new", "user.note", b"1")
        (directory / "d").mkdir(0o700)
        (directory / "d").chmod(0o755)
        (directory / "d").rename(directory / "e")

    with memory_directory() as directory, Watcher(directory) as local:
        work(directory)
        expected = local.now()
    cached.put("end", b"")
    with watching(cached.mounted, cached.path) as watcher:
        work(cached.path)
        assert all_until_now(cached, watcher) == expected


@needs_root
def test_b130_nothing_is_unmounted_for_an_event(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--cache") as mounted:
        mounted.expect_log("something is mounted there")
        mounted.put("/d/e/f", b"1")
        on = mounted.path / "d/e"
        subprocess.run(["mount", "-t", "tmpfs", "none", on], check=True)
        try:
            with watching(mounted, mounted.path):
                mounted.delete("/d/e/f")
                until(lambda: inotify(mounted)["dropped"] >= 1)
                assert find_mounted(str(on)) is not None, "a look at it would unmount it, too"
                mounted.put("/d/e/f", b"2")
        finally:
            subprocess.run(["umount", on], check=True)


@pytest.mark.parametrize("compacted", [False, True], ids=["resumed", "listed again"])
def test_b130_what_changed_while_etcd_was_away_is_heard_of(
    own_etcd: EtcdProcess, pool: Pool, *, compacted: bool
) -> None:
    """The whole prefix vanished and came back, too, and another is gone."""
    with (
        Proxy(own_etcd.endpoint) as proxy,
        pool.private(own_etcd, "--cache", via=str(proxy.endpoint)) as mounted,
        closing(Client(own_etcd.endpoint)) as client,
    ):
        mounted.expect_log("etcdfs.mirror.watch_session", "etcdfs.etcd")
        for key in (b"/d/f", b"/d/gone", b"/e/f"):
            client.put(key, b"1")
        mounted.wait(client.revision())
        with watching(mounted, mounted.path / "d", mounted.path / "e", mounted.path) as watcher:
            proxy.swallow = True
            client.delete(b"/d/f")
            client.delete(b"/d/gone")
            client.delete(b"/e/f")
            client.put(b"/d/f", b"2")
            client.put(b"/d/new", b"2")
            if compacted:
                client.compact(client.revision())
            proxy.cut()
            proxy.swallow = False
            heard = watcher.until(
                "CLOSE_WRITE f", "DELETE gone", "CLOSE_WRITE new", "DELETE,ISDIR e", "DELETE_SELF"
            )
        assert (mounted.path / "d/f").read_bytes() == b"2"
        assert (mounted.statistics()["mirror"]["listed_keys"] > 0) == compacted
        assert "DELETE,ISDIR d" not in heard


# --- nobody waits ---------------------------------------------------------------------------


def test_b131_a_directory_that_is_held_delays_no_others_events(
    own_etcd: EtcdProcess, pool: Pool
) -> None:
    shared = ("--allow-other",) if os.geteuid() == 0 else ()
    with pool.private(own_etcd, "--cache", *shared) as mounted:
        mounted.path.parent.chmod(0o711)
        mounted.expect_log("the kernel may go on showing what is old", "has not let go of a lock")
        mounted.put("/held/f", b"1")
        mounted.put("/d/f", b"1")
        held, free = mounted.path / "held", mounted.path / "d"
        with watching(mounted, held) as held_watcher, watching(mounted, free) as free_watcher:
            with StuckReader(held) as reader:
                mounted.put("/held/new", b"1")
                for number in range(3):
                    mounted.put("/d/f", b"%d" % number)
                    free_watcher.until("CLOSE_WRITE f")
                until(lambda: inotify(mounted)["stuck"] == 1)
                mounted.put("/held/other", b"1")
                assert not held_watcher.now()
                reader.invalidate()
            held_watcher.until("CLOSE_WRITE new", "CLOSE_WRITE other")
            until(lambda: inotify(mounted)["stuck"] == 0)


@needs_root
def test_b131_a_mount_ends_although_a_replay_waits(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--cache", "--allow-other") as mounted:
        mounted.path.parent.chmod(0o711)
        mounted.expect_log(
            "the kernel may go on showing what is old", "has not let go", "waits in the kernel"
        )
        mounted.put("/held/f", b"1")
        with watching(mounted, mounted.path / "held"), StuckReader(mounted.path / "held"):
            mounted.put("/held/new", b"1")
            until(lambda: inotify(mounted)["stuck"] == 1)
            daemon = mounted.daemon
            os.kill(daemon, signal.SIGTERM)
            until(lambda: not os.path.ismount(mounted.path))
        until(lambda: not os.path.exists(f"/proc/{daemon}"))


def test_b131_a_frozen_etcd_stops_no_replay(own_etcd: EtcdProcess, pool: Pool) -> None:
    """A call of this mount holds a directory's lock while it waits for etcd."""
    with pool.private(own_etcd, "--cache", "--timeout", "2") as mounted:
        mounted.expect_log("has not let go of a lock", "the kernel may go on", "etcd")
        mounted.put("/d/f", b"1")
        with watching(mounted, mounted.path / "d") as watcher:
            own_etcd.pause()
            waiting = threading.Thread(target=_fails_to_make, args=(mounted.path / "d/mine",))
            waiting.start()
            waiting.join()
            own_etcd.resume()
            mounted.put("/d/new", b"1")
            watcher.until("CLOSE_WRITE new")


def _fails_to_make(path: Path) -> None:
    with pytest.raises(OSError, match=r"Errno"):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


# --- auto, on, off --------------------------------------------------------------------------


@pytest.mark.skipif(
    not sees_all_watches(allow_other=False), reason="in a container all are taken to watch"
)
def test_b132_only_what_somebody_watches_is_replayed(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--cache", "--inotify", "auto") as mounted:
        mounted.put("/d/f", b"0")
        (mounted.path / "d/f").read_bytes()
        for number in range(5):
            mounted.put("/d/f", b"%d" % number)
        until(lambda: inotify(mounted)["waiting"] == 0)
        assert inotify(mounted)["replayed"] == 0
        assert inotify(mounted)["unwatched"] > 0
        with watching(mounted, mounted.path / "d/f") as watcher:
            mounted.put("/d/f", b"watched")
            watcher.until("CLOSE_WRITE")
        assert inotify(mounted)["replayed"] == 1


def test_b132_on_replays_whatever_the_kernel_holds(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--cache", "--inotify", "on") as mounted:
        mounted.put("/d/f", b"0")
        (mounted.path / "d/f").read_bytes()
        before = inotify(mounted)["replayed"]
        mounted.put("/d/f", b"1")
        until(lambda: inotify(mounted)["replayed"] > before)
        with watching(mounted, mounted.path / "d") as watcher:
            mounted.put("/d/f", b"2")
            watcher.until("CLOSE_WRITE f")
        assert inotify(mounted)["looks"] == 0


def test_b132_off_raises_none(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--cache", "--inotify", "off") as mounted:
        mounted.put("/d/f", b"0")
        with Watcher(mounted.path / "d") as watcher:
            mounted.put("/d/f", b"1")
            (mounted.path / "d/mine").touch()
            assert "CLOSE_WRITE f" not in watcher.until("CLOSE_WRITE mine")


def test_b132_what_cannot_be_had_is_said(own_etcd: EtcdProcess, pool: Pool) -> None:
    with pool.private(own_etcd, "--no-cache") as mounted:
        assert mounted.log.count("--inotify does nothing here: without --cache") == 1


# --- read-only mounts, and users without rights -----------------------------------------------


@needs_root
def test_b133_a_read_only_mount_hears_all_of_it_and_stays_read_only(
    own_etcd: EtcdProcess, pool: Pool
) -> None:
    with pool.private(own_etcd, "--cache", "--read-only") as mounted:
        mounted.put("/d/f", b"0")
        mounted.put("/d/gone", b"0")
        path = mounted.path / "d"
        with watching(mounted, path) as watcher, watching(mounted, path / "f") as of_file:
            mounted.put("/d/f", b"1")
            assert watcher.until("CLOSE_WRITE f") == ["MODIFY f", "CLOSE_WRITE f"]
            assert of_file.until("CLOSE_WRITE") == ["MODIFY", "CLOSE_WRITE"]
            mounted.put("/d/new", b"1")
            assert watcher.until("CLOSE_WRITE new")[0] == "CREATE new"
            mounted.put("/d/e/f", b"1")
            assert watcher.until("CREATE,ISDIR e") == ["CREATE,ISDIR e"]
            mounted.delete("/d/gone")
            assert watcher.until("DELETE gone") == ["DELETE gone"]
        for attempt in (path.joinpath("mine").touch, path.joinpath("f").unlink):
            with pytest.raises(OSError, match="Read-only"):
                attempt()
        assert os.statvfs(path).f_flag & os.ST_RDONLY
        assert not os.access(path, os.W_OK)
        assert "does nothing" not in mounted.log


@needs_root
def test_b133_events_need_no_path_to_the_mount(own_etcd: EtcdProcess, pool: Pool) -> None:
    """Something else is mounted over it; and what is not in the way of umount(8) either."""
    with pool.private(own_etcd, "--cache") as mounted:
        mounted.put("/d/f", b"0")
        with watching(mounted, mounted.path / "d") as watcher:
            subprocess.run(["mount", "-t", "tmpfs", "none", mounted.path], check=True)
            try:
                with closing(Client(own_etcd.endpoint)) as client:
                    client.put(b"/d/f", b"1")
                watcher.until("CLOSE_WRITE f")
            finally:
                subprocess.run(["umount", mounted.path], check=True)
        daemon = mounted.daemon
        with busy_key(own_etcd, b"/d/f"), watching(mounted, mounted.path / "d") as watcher:
            watcher.until("CLOSE_WRITE f")
            subprocess.run(["umount", mounted.path], check=True)
            until(lambda: not os.path.exists(f"/proc/{daemon}"))


@contextmanager
def busy_key(etcd: EtcdProcess, key: bytes) -> Iterator[None]:
    """Have another client put a key all the time."""
    ended = threading.Event()

    def put() -> None:
        with closing(Client(etcd.endpoint)) as client:
            while not ended.is_set():
                client.put(key, b"%d" % client.revision())

    putter = threading.Thread(target=put)
    putter.start()
    try:
        yield
    finally:
        ended.set()
        putter.join()


_UNPRIVILEGED = """
import etcdfs.daemon.kernel_threads
from etcdfs.daemon.main import main
def refuse(_mountpoint, *, writable):
    raise PermissionError(1, "Operation not permitted")
etcdfs.daemon.kernel_threads.MountClone = refuse
"""
"""What Linux says to whoever has no CAP_SYS_ADMIN. (Where tests run, others may not mount.)"""


def test_b133_a_mount_without_rights_raises_events_unless_it_is_read_only(
    own_etcd: EtcdProcess,
) -> None:
    with closing(Client(own_etcd.endpoint)) as client:
        client.put(b"/d/f", b"0")
        with daemon(own_etcd, cache=True, program=_UNPRIVILEGED) as running:
            with Watcher(running.path / "d") as watcher:
                client.put(b"/d/f", b"1")
                watcher.until("CLOSE_WRITE f")
            assert "does nothing" not in running.log_file.read_text()
        with daemon(own_etcd, cache=True, program=_UNPRIVILEGED, read_only=True) as running:
            log = running.log_file.read_text()
            assert log.count("--inotify does nothing here: only root can raise events") == 1
