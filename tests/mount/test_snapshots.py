"""A mount that starts from its snapshot, with etcd and without."""

import contextlib
import errno
import os
import random
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdfs.keyspace.attribute_records import record_key
from etcdfs.options import Endpoint
from etcdfs.snapshots.snapshot_file import NAME
from tests.mount.client import Client
from tests.mount.lab import Pool
from tests.mount.test_outages import eventually, fails, shows, writes
from tests.support.bent_etcd import Bend, BentEtcd, Message
from tests.support.etcd_process import EtcdProcess, free_port
from tests.support.mounted import Mounted, run_etcdfs
from tests.support.profile import NIGHTLY
from tests.support.proxy import Proxy
from tests.support.secured import add_user, switch_users_on

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

ROUNDS = 4 if NIGHTLY else 2
SEEDS = range(50) if NIGHTLY else [7]  # 200 rounds, in tests that end in time
REFUSED = "is refused: "
PATIENCE_S = 30.0
OFFLINE = ("a snapshot is shown", "trying again", "fuse.operations: ")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@contextlib.contextmanager
def mounted_with(
    pool: Pool, etcd: EtcdProcess, state: Path, *options: str, via: str | None = None
) -> Iterator[Mounted]:
    timeout = ("--timeout=1",) if "--offline-start" in options else ()
    kept = ("--cache", f"--state-dir={state}", *timeout, *options)
    with pool.private(etcd, *kept, via=via) as mounted:
        yield mounted


def snapshot(mounted: Mounted) -> dict[str, object]:
    found: dict[str, object] = mounted.statistics()["snapshot"]
    return found


def as_bytes(state: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(state.iterdir()))


def start(etcd: EtcdProcess, client: Client) -> None:
    """Start an etcd that was killed; the connection to it is another one."""
    client.close()
    etcd.start()


@pytest.fixture
def client(own_etcd: EtcdProcess) -> Iterator[Client]:
    with contextlib.closing(Client(own_etcd.endpoint)) as client:
        yield client


def fill(mounted: Mounted, client: Client, prefix: bytes) -> None:
    for name in (b"kept", b"changed", b"gone", b"d/deep"):
        client.put(prefix + name, b"old " + name)
    mounted.wait(client.revision())
    (mounted.path / "kept").chmod(0o600)
    (mounted.path / "d").chmod(0o700)
    (mounted.path / "link").symlink_to("kept")


def change(client: Client, prefix: bytes) -> int:
    return client.change_all(
        [(prefix + b"changed", b"new"), (prefix + b"made", b"")], [prefix + b"gone"]
    )


def check_changed(path: Path, *, kept_mode: int = 0o600, is_deep_there: bool = True) -> None:
    assert sorted(os.listdir(path)) == ["changed", "d", "kept", "link", "made"]
    assert (path / "changed").read_bytes() == b"new"
    assert (path / "link").read_bytes() == b"old kept"
    assert stat.S_IMODE((path / "kept").stat().st_mode) == kept_mode
    assert stat.S_IMODE((path / "d").stat().st_mode) == 0o700
    assert os.listdir(path / "d") == ["deep"] * is_deep_there
    if is_deep_there:
        assert (path / "d" / "deep").read_bytes() == b"old d/deep"


# --- with etcd ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [b"/", b"/app/"])
def test_b84_a_mount_goes_on_from_its_snapshot(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path, prefix: bytes
) -> None:
    options = ("--prefix", prefix.decode())
    with mounted_with(pool, own_etcd, state, *options) as mounted:
        fill(mounted, client, prefix)
        time_ns = (mounted.path / "d" / "deep").stat().st_mtime_ns
    revision = change(client, prefix)
    with mounted_with(pool, own_etcd, state, *options) as mounted:
        mounted.wait(revision)
        check_changed(mounted.path)
        statistics = mounted.statistics()
        assert (statistics["state_machine"]["lists"], statistics["state_machine"]["resumes"]) == (
            0,
            1,
        )
        assert not snapshot(mounted)["offline"]
        assert snapshot(mounted)["refused"] == ""
        assert (mounted.path / "d" / "deep").stat().st_mtime_ns == time_ns
        assert "listing everything" not in mounted.log


@pytest.mark.parametrize(
    ("prefix", "last"),
    [(b"/", "put"), (b"/", "deleted"), (b"/app/", "elsewhere"), (b"/app/", "attributes")],
)
def test_b84_a_mount_is_ready_when_it_shows_what_changed_since(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path, prefix: bytes, last: str
) -> None:
    """The watch says nothing until the mount has asked how far etcd is."""
    options = ("--prefix", prefix.decode())
    with mounted_with(pool, own_etcd, state, *options) as mounted:
        fill(mounted, client, prefix)
    (kept,) = client.below(record_key(prefix + b"kept"))
    change(client, prefix)
    if last == "deleted":
        client.delete(prefix + b"d/deep")
    elif last == "elsewhere":
        client.put(b"\x01/outside", b"x")
    elif last == "attributes":
        client.put(kept.key, kept.value.replace(b"0600", b"0640"))
    is_asked = threading.Event()

    def on_asked(request: Message) -> None:
        if getattr(request, "sort_order", 0):
            is_asked.set()

    def hold_back(_request: Message, response: Message) -> list[Message]:
        if response.events:
            is_asked.wait(PATIENCE_S)
        return [response]

    with BentEtcd(own_etcd.endpoint) as bent:
        bent.bend, bent.on_asked = Bend("Watch", hold_back), on_asked
        with mounted_with(pool, own_etcd, state, *options, via=str(bent.endpoint)) as mounted:
            try:
                check_changed(
                    mounted.path,
                    kept_mode=0o640 if last == "attributes" else 0o600,
                    is_deep_there=last != "deleted",
                )
                assert mounted.statistics()["state_machine"]["lists"] == 0
            finally:
                is_asked.set()


def test_b84_a_watch_that_brings_nothing_is_as_an_etcd_that_does_not_answer(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    with mounted_with(pool, own_etcd, state):
        client.put(b"/file", b"old")
    client.put(b"/file", b"new")
    go_on = threading.Event()

    def hold_back(_request: Message, response: Message) -> list[Message]:
        if response.events:
            go_on.wait(PATIENCE_S)
        return [response]

    place = state.parent / "mnt"
    place.mkdir()
    with BentEtcd(own_etcd.endpoint) as bent:
        bent.bend = Bend("Watch", hold_back)
        try:
            done = run_etcdfs(
                *("mount", str(place), "--endpoints", str(bent.endpoint), "--cache"),
                *(f"--state-dir={state}", "--timeout=1"),
            )
            assert (done.returncode, done.stderr.count("\n")) == (20, 1), done.stderr
            assert "the watch does not go on: it is at revision " in done.stderr
            with mounted_with(
                pool, own_etcd, state, "--offline-start", via=str(bent.endpoint)
            ) as mounted:
                mounted.expect_log("a snapshot is shown")
                assert (mounted.path / "file").read_bytes() == b"old"
                assert snapshot(mounted)["offline"] is True
                go_on.set()
                eventually(shows(mounted.path / "file", b"new"))
                eventually(lambda: snapshot(mounted)["offline"] is False)
        finally:
            go_on.set()


def test_b84_what_was_compacted_meanwhile_is_listed(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    with mounted_with(pool, own_etcd, state) as mounted:
        fill(mounted, client, b"/")
    change(client, b"/")
    client.compact(client.revision())
    with mounted_with(pool, own_etcd, state) as mounted:
        mounted.expect_log("the snapshot is refused: compacted")
        check_changed(mounted.path)
        assert mounted.statistics()["state_machine"]["lists"] == 1
    with mounted_with(pool, own_etcd, state) as mounted:
        check_changed(mounted.path)
        assert mounted.statistics()["state_machine"]["lists"] == 0, "it was made anew"


def test_b86_an_etcd_that_was_wiped_is_another_one(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    with mounted_with(pool, own_etcd, state) as mounted:
        fill(mounted, client, b"/")
    own_etcd.kill()
    shutil.rmtree(own_etcd.data_dir)
    start(own_etcd, client)
    for number in range(40):  # it is further than the snapshot, and none of it is the same
        client.put(b"/other", b"%d" % number)
    with mounted_with(pool, own_etcd, state) as mounted:
        mounted.expect_log("the snapshot is refused: another history")
        assert os.listdir(mounted.path) == ["other"]
        assert (mounted.path / "other").read_bytes() == b"39"


def test_b86_what_is_not_ones_own_is_refused_in_one_line_and_made_anew(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    client.put(b"/app/file", b"a secret of another prefix")
    client.put(b"/b/file", b"b")
    with mounted_with(pool, own_etcd, state):
        pass
    with mounted_with(pool, own_etcd, state, "--prefix=/b") as mounted:
        mounted.expect_log(REFUSED)
        assert [REFUSED in line for line in mounted.log.splitlines()].count(True) == 1
        assert "it is of the prefix b'/'" in mounted.log
        assert os.listdir(mounted.path) == ["file"]
        busy = run_etcdfs(
            *("mount", str(mounted.path.parent), "--endpoints", own_etcd.client_url),
            *("--cache", f"--state-dir={state}"),
        )
        assert busy.returncode != 0
        other = mounted.path.parent / "other"
        other.mkdir()
        busy = run_etcdfs(
            *("mount", str(other), "--endpoints", own_etcd.client_url),
            *("--cache", f"--state-dir={state}"),
        )
        assert (busy.returncode, busy.stderr.count("\n")) == (63, 1)
        assert "used by another mount" in busy.stderr
        eventually(lambda: snapshot(mounted)["keys"] == 1)
        assert b"a secret of another prefix" not in as_bytes(state)
    with (state / NAME).open("r+b") as damaged:
        damaged.seek(100)
        damaged.write(b"\xff" * 4000)
    with mounted_with(pool, own_etcd, state, "--prefix=/b") as mounted:
        mounted.expect_log(REFUSED)
        assert [REFUSED in line for line in mounted.log.splitlines()].count(True) == 1
        assert os.listdir(mounted.path) == ["file"]
    with mounted_with(pool, own_etcd, state, "--prefix=/b") as mounted:
        assert mounted.statistics()["state_machine"]["lists"] == 0


def test_b85_what_changes_is_written_within_seconds(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    with mounted_with(pool, own_etcd, state) as mounted:
        eventually(lambda: snapshot(mounted)["writes"] == 1)
        for number in range(100):
            client.put(b"/file", b"%d" % number)
        revision = client.revision()
        mounted.wait(revision)
        eventually(lambda: snapshot(mounted)["revision"] == revision)
        assert int(str(snapshot(mounted)["writes"])) < 6, "not once for each of them"
        assert snapshot(mounted)["waiting"] == 0
        assert {stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()} == {0o600}


# --- without etcd ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [b"/", b"/app/"])
def test_b87_a_machine_boots_without_etcd_and_goes_live(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path, prefix: bytes
) -> None:
    options = ("--prefix", prefix.decode())
    with mounted_with(pool, own_etcd, state, *options) as mounted:
        fill(mounted, client, prefix)
        time_ns = (mounted.path / "d" / "deep").stat().st_mtime_ns
        place = mounted.path.parent
    own_etcd.kill()
    place.mkdir()
    try:
        done = run_etcdfs(
            *("mount", str(place), "--endpoints", own_etcd.client_url, "--cache", *options),
            *(f"--state-dir={state}", "--timeout=1"),
        )
        assert (done.returncode, done.stderr.count("\n")) == (20, 1), "it has to be asked for"
    finally:
        place.rmdir()
    # No memory for values: they come from the disk.
    offline = (*options, "--offline-start", "--cache-size=0")
    with mounted_with(pool, own_etcd, state, *offline) as mounted:
        mounted.expect_log(*OFFLINE)
        file = mounted.path / "changed"
        assert sorted(os.listdir(mounted.path)) == ["changed", "d", "gone", "kept", "link"]
        assert file.read_bytes() == b"old changed"
        assert (mounted.path / "link").read_bytes() == b"old kept"
        assert stat.S_IMODE((mounted.path / "kept").stat().st_mode) == 0o600
        assert (mounted.path / "d" / "deep").stat().st_mtime_ns == time_ns
        assert snapshot(mounted)["offline"] is True
        assert not mounted.statistics()["staleness"]["connected"]
        assert fails(lambda: file.write_bytes(b"x"), errno.EIO)()
        assert fails((mounted.path / "x").mkdir, errno.EIO)()
        start(own_etcd, client)
        change(client, prefix)
        eventually(shows(file, b"new"))
        check_changed(mounted.path)
        eventually(lambda: snapshot(mounted)["offline"] is False)
        assert mounted.statistics()["state_machine"]["lists"] == 0
        eventually(writes(file, b"written"))
        assert client.get(prefix + b"changed").value == b"written"  # type: ignore[union-attr]
        assert "etcd answers: the mount is live" in mounted.log


def test_b87_the_command_says_what_it_has_mounted(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    client.put(b"/file", b"x")
    with mounted_with(pool, own_etcd, state) as mounted:
        revision = client.revision()
        mounted.wait(revision)
        place = mounted.path.parent
    own_etcd.kill()
    place.mkdir()
    arguments = (
        *("mount", str(place), "--endpoints", own_etcd.client_url, "--cache", "--offline-start"),
        *("--timeout=0.5", "--log-file", f"{state}.log"),
    )
    try:
        none = run_etcdfs(*arguments, f"--state-dir={state}2")
        assert (none.returncode, none.stderr.count("\n")) == (20, 1)
        assert "the snapshot is of no use: there is none yet" in none.stderr
        other = run_etcdfs(*arguments, f"--state-dir={state}", "--prefix=/other")
        assert (other.returncode, other.stderr.count("\n")) == (20, 1)
        assert "the snapshot is of no use: it is of the prefix b'/'" in other.stderr
        done = run_etcdfs(*arguments, f"--state-dir={state}")
        try:
            assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
            assert f"a snapshot of revision {revision} is mounted" in done.stderr
            assert (place / "file").read_bytes() == b"x"
        finally:
            run_etcdfs("umount", str(place))
    finally:
        place.rmdir()


def test_b87_an_old_snapshot_is_not_shown_for_longer_than_allowed(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    client.put(b"/file", b"x")
    with mounted_with(pool, own_etcd, state) as mounted:
        assert (mounted.path / "file").read_bytes() == b"x"
    own_etcd.kill()
    with mounted_with(
        pool, own_etcd, state, "--offline-start", "--max-stale=0.001", "--timeout=0.5"
    ) as mounted:
        mounted.expect_log(*OFFLINE, "nothing is shown any more", "")
        assert fails((mounted.path / "file").read_bytes, errno.EIO)()
        assert fails(lambda: os.listdir(mounted.path), errno.EIO)()
        start(own_etcd, client)
        eventually(shows(mounted.path / "file", b"x"))


def test_b87_another_history_is_found_out_when_etcd_answers(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path
) -> None:
    with mounted_with(pool, own_etcd, state) as mounted:
        fill(mounted, client, b"/")
    own_etcd.kill()
    with mounted_with(pool, own_etcd, state, "--offline-start") as mounted:
        mounted.expect_log(*OFFLINE, "another history", "another cluster")
        assert (mounted.path / "changed").read_bytes() == b"old changed"
        fd = os.open(mounted.path / "kept", os.O_RDONLY)
        shutil.rmtree(own_etcd.data_dir)
        start(own_etcd, client)
        client.put(b"/other", b"x")
        eventually(shows(mounted.path / "other", b"x"))
        assert os.listdir(mounted.path) == ["other"]
        os.close(fd)


def test_b88_what_a_role_may_no_longer_read_is_not_shown_any_more(
    pool: Pool, etcd_binary: Path, watched: None, state: Path
) -> None:
    with EtcdProcess(etcd_binary, "--bcrypt-cost=4") as etcd, Proxy(etcd.endpoint) as proxy:
        add_user(etcd, "app", "word", ("read", b"/app/"), ("read", b"/.etcdfs/attrs//app/"))
        etcd.etcdctl("put", "/app/file", "a secret")
        switch_users_on(etcd)
        as_app, via = ("--prefix=/app", "--user=app:word"), str(proxy.endpoint)
        with mounted_with(pool, etcd, state, *as_app, via=via) as mounted:
            assert (mounted.path / "file").read_bytes() == b"a secret\n"[:8]
        assert b"a secret" in as_bytes(state)
        proxy.target = Endpoint("127.0.0.1", free_port())
        proxy.cut()
        with mounted_with(pool, etcd, state, *as_app, "--offline-start", via=via) as mounted:
            mounted.expect_log(*OFFLINE, "nothing is shown any more", "no longer lets", "")
            file = mounted.path / "file"
            assert file.read_bytes() == b"a secret"
            etcd.etcdctl("role", "revoke-permission", "--prefix=true", "app", "/app/")
            proxy.target = etcd.endpoint
            eventually(fails(file.read_bytes, errno.EACCES))
            eventually(fails(lambda: os.listdir(mounted.path), errno.EACCES))
            eventually(lambda: b"a secret" not in as_bytes(state))
        etcd.kill()
        etcd.start()
        done = run_etcdfs(
            *("mount", str(state.parent / "mnt"), "--endpoints", etcd.client_url, *as_app),
            *("--cache", f"--state-dir={state}", "--offline-start"),
        )
        assert done.returncode != 0


def test_b88_a_role_that_was_taken_away_before_the_start_has_no_snapshot(
    pool: Pool, etcd_binary: Path, watched: None, state: Path
) -> None:
    with EtcdProcess(etcd_binary, "--bcrypt-cost=4") as etcd:
        add_user(etcd, "app", "word", ("read", b"/app/"))
        etcd.etcdctl("put", "/app/file", "a secret")
        switch_users_on(etcd)
        as_app = ("--prefix=/app", "--user=app:word", "--no-attrs")
        with mounted_with(pool, etcd, state, *as_app) as mounted:
            assert (mounted.path / "file").read_bytes() == b"a secret"
        etcd.etcdctl("role", "revoke-permission", "--prefix=true", "app", "/app/")
        place = state.parent / "mnt"
        place.mkdir()
        done = run_etcdfs(
            *("mount", str(place), "--endpoints", etcd.client_url, *as_app),
            *("--cache", f"--state-dir={state}", "--offline-start"),
        )
        assert (done.returncode, done.stderr.count("\n")) == (21, 1), done.stderr
        assert b"a secret" not in as_bytes(state)


# --- killed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_b85_killed_at_any_moment_a_machine_mounts_its_last_configuration(
    pool: Pool, own_etcd: EtcdProcess, client: Client, state: Path, seed: int
) -> None:
    """Every round: written to from outside, killed somewhere, mounted without etcd, gone live."""
    rng = random.Random(seed)
    names = [b"/%d" % number for number in range(20)]
    value = 1

    def shown(mounted: Mounted) -> set[bytes]:
        return {(mounted.path / os.fsdecode(name[1:])).read_bytes() for name in names}

    client.put_all((name, b"1") for name in names)
    with mounted_with(pool, own_etcd, state) as mounted:
        assert shown(mounted) == {b"1"}
    for _ in range(ROUNDS):
        before = value
        with contextlib.ExitStack() as stack:
            mounted = stack.enter_context(mounted_with(pool, own_etcd, state))
            mounted.expect_log("")
            assert shown(mounted) == {b"%d" % value}
            for _ in range(rng.randrange(1, 20)):
                value += 1
                client.put_all((name, b"%d" % value) for name in names)
            never = threading.Event()
            never.wait(rng.uniform(0, 0.3) if rng.random() < 0.5 else rng.uniform(4.5, 5.5))
            os.kill(mounted.daemon, signal.SIGKILL)
        own_etcd.kill()
        with mounted_with(pool, own_etcd, state, "--offline-start") as mounted:
            mounted.expect_log(*OFFLINE)
            (number,) = map(int, shown(mounted))  # one revision, and all of it
            assert before <= number <= value
            start(own_etcd, client)
            eventually(shows(mounted.path / "0", b"%d" % value))
