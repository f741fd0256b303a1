"""`etcdfs doctor` finds each of the problems that are planted here, and none where all is well."""

import contextlib
import ctypes.util
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

import etcdfs.doctor.cluster
import etcdfs.doctor.machine
from etcdfs.doctor.machine import Finding, Level, check_machine
from etcdfs.doctor.main import examine
from etcdfs.doctor.member_page import check_page
from etcdfs.errors import FuseMissingError
from etcdfs.fuse import fastpath
from etcdfs.keyspace.attribute_records import record_key
from etcdfs.options import Endpoint, MountOptions, Security
from etcdfs.snapshots.snapshot_file import NAME
from tests.mount.client import Client
from tests.support.etcd_process import EtcdProcess, find_etcds, free_port
from tests.support.mounted import Mounted, run_etcdfs
from tests.support.nobody import needs_root
from tests.support.secured import EXPIRED, HOSTS, Authority, add_user, secure, switch_users_on

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

ROOT = Security(user="root", password="root")


@pytest.fixture(scope="module")
def etcd_binary() -> Path:
    """Return an etcd that has no problem by itself, where the oldest may."""
    known = etcdfs.doctor.cluster.MAY_LOSE_DATA
    return next(binary for version, binary in find_etcds().items() if version not in known)


@pytest.fixture
def etcd(etcd_binary: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(etcd_binary) as started:
        yield started


def options(*endpoints: Endpoint, **more: object) -> MountOptions:
    made = MountOptions(mountpoint="/mnt", endpoints=endpoints, timeout_s=5.0)
    return replace(made, **more)  # type: ignore[arg-type]


async def problems(asked: MountOptions, *, fix: bool = False) -> list[str]:
    """Return the problems found, but those of other tests' mounts."""
    found = await examine(asked, fix=fix)
    wrong = [f for f in found if f.level is Level.PROBLEM and f.check != "mounts"]
    return [finding.message for finding in wrong]


def of_machine(
    kernel: str = "6.1.0", fuse_conf: Path = Path("/nowhere"), **more: object
) -> set[str]:
    found = check_machine(options(**more), kernel=kernel, fuse_conf=fuse_conf)
    return {f.check for f in found if f.level is Level.PROBLEM and f.check != "mounts"}


# --- nothing is wrong -----------------------------------------------------------------------


async def test_a_healthy_etcd_has_no_problem(etcd: EtcdProcess) -> None:
    assert await problems(options(etcd.endpoint)) == []


def test_a_healthy_mount_has_no_problem_and_says_its_options(etcd: EtcdProcess) -> None:
    with Mounted(etcd, "--cache", "--prefix", "/app") as mounted:
        (mounted.path / "file").write_bytes(b"x")
        os.chmod(mounted.path / "file", 0o600)
        done = run_etcdfs("doctor", str(mounted.path))
        assert f"{etcd.endpoint}: etcd " in done.stdout, "of the mount, not of 127.0.0.1:2379"
        assert "1 keys below /app/" in done.stdout
        assert "1 records" in done.stdout
        wrong = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
        assert [line for line in wrong if " mounts " not in line] == [], "others' may be dead"
        assert done.returncode == (70 if wrong else 0)


def test_a_mount_with_an_etcd_of_its_own_is_asked_too(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    embedded = ("--embedded", "--data-dir", str(tmp_path / "data"))
    assert run_etcdfs("mount", str(mountpoint), *embedded).returncode == 0
    try:
        said = run_etcdfs("doctor", str(mountpoint)).stdout
    finally:
        assert run_etcdfs("umount", str(mountpoint)).returncode == 0
    assert re.search("ok +etcd +unix://.* answers, with a leader", said)


async def test_an_etcd_that_is_not_there_yet_is_no_problem() -> None:
    assert await problems(options(embedded=True)) == []


# --- the machine ----------------------------------------------------------------------------


def test_1_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_fuse() -> None:
        raise FuseMissingError("there is no /dev/fuse")

    assert of_machine() == set()
    monkeypatch.setattr(etcdfs.doctor.machine, "check_fuse", check_fuse)
    assert of_machine() == {"fuse"}


def test_2_an_old_kernel() -> None:
    assert of_machine("4.19.0-amd64") == {"kernel"}
    assert of_machine("5.4.0") == set()


def test_3_other_users_are_not_let_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    conf = tmp_path / "fuse.conf"
    conf.write_text("#user_allow_other\n")
    assert of_machine(fuse_conf=conf, allow_other=True) == {"allow_other"}
    assert of_machine(allow_other=True) == {"allow_other"}, "there is no such file"
    conf.write_text("mount_max = 1000\nuser_allow_other\n")
    assert of_machine(fuse_conf=conf, allow_other=True) == set()


@pytest.mark.expect_log("")
def test_4_a_mount_whose_daemon_is_gone(etcd: EtcdProcess) -> None:
    with Mounted(etcd, "--cache") as mounted:
        os.kill(mounted.daemon, signal.SIGKILL)
        done = run_etcdfs("doctor", str(mounted.path), "--endpoints", etcd.client_url)
        assert done.returncode == 70
        assert f"the daemon of {mounted.path} is gone" in done.stdout
        done = run_etcdfs("doctor", str(mounted.path))
        assert done.returncode == 16
        assert "does not say its options: its daemon is gone" in done.stderr
        assert run_etcdfs("umount", str(mounted.path)).returncode == 0


def test_17_no_libfuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda _name: None)
    assert of_machine() == {"libfuse"}


def test_18_a_fast_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_machine(fast_path="on") == set()
    monkeypatch.setattr(fastpath, "why_not", "there was no compiler")
    assert of_machine(fast_path="on") == {"fast path"}
    assert of_machine() == set(), "without, requests cost more, and that is all"


@needs_root
def test_19_events_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert of_machine(cache=True, inotify="on", read_only=True) == set()
    assert of_machine(inotify="on") == {"inotify"}, "without --cache"
    assert of_machine("5.11.0", cache=True, inotify="on", read_only=True) == {"inotify"}
    powerless = tmp_path / "status"
    powerless.write_text("CapPrm:\tffffffffffffffff\nCapEff:\t0000000000000000\n")
    monkeypatch.setattr(etcdfs.doctor.machine, "STATUS", powerless)
    assert of_machine(cache=True, inotify="on", read_only=True) == {"inotify"}
    assert of_machine(cache=True, read_only=True) == set()
    assert of_machine(cache=True, inotify="on") == set()


# --- etcd -----------------------------------------------------------------------------------


async def test_5_a_member_that_nobody_answers_for(etcd: EtcdProcess) -> None:
    dead = Endpoint("127.0.0.1", free_port())
    (found,) = await problems(options(etcd.endpoint, dead))
    assert f"{dead}: " in found


async def test_6_a_member_that_keeps_quiet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        quiet = Endpoint("127.0.0.1", silent.getsockname()[1])
        (found,) = await problems(options(quiet, timeout_s=0.5))
        assert str(quiet) in found


async def test_7_members_of_two_clusters(etcd: EtcdProcess, etcd_binary: Path) -> None:
    with EtcdProcess(etcd_binary) as other:
        found = await problems(options(etcd.endpoint, other.endpoint))
    assert f"{etcd.endpoint} and {other.endpoint} are of different clusters" in found


async def test_8_a_release_that_may_lose_data(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    (release,) = {
        match[1]
        for finding in await examine(options(etcd.endpoint), fix=False)
        if (match := re.search(r"etcd (\S+) answers", finding.message))
    }
    monkeypatch.setattr(etcdfs.doctor.cluster, "MAY_LOSE_DATA", (release,))
    (found,) = await problems(options(etcd.endpoint))
    assert "may lose data" in found


async def test_9_a_release_that_is_too_old(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcdfs.doctor.cluster, "_OLDEST", (9, 0))
    (found,) = await problems(options(etcd.endpoint))
    assert "is too old" in found


async def test_10_a_full_database(etcd_binary: Path) -> None:
    with EtcdProcess(etcd_binary, "--quota-backend-bytes", "1000000") as full:
        with contextlib.suppress(Exception), contextlib.closing(Client(full.endpoint)) as client:
            for number in range(100):
                client.put(b"/%d" % number, b"x" * 100_000)
        found = await problems(options(full.endpoint))
    assert any("NOSPACE" in each for each in found)


async def test_20_a_quota_that_is_nearly_used_up(etcd_binary: Path) -> None:
    with EtcdProcess(etcd_binary, "--quota-backend-bytes", "8000000") as etcd:
        with contextlib.closing(Client(etcd.endpoint)) as client:
            assert await problems(options(etcd.endpoint)) == []
            for number in range(70):
                client.put(b"/%d" % number, b"x" * 100_000)
        etcd.etcdctl("defrag")  # until it has written to its database, it does not count that
        (found,) = await problems(options(etcd.endpoint))
    assert re.search(r": \S+ of 7\.6 MiB of its quota are used; etcdctl defrag frees ", found)


async def test_21_clocks_that_differ(etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    for now, said in (
        (lambda: time.time() + 60, "s behind this machine's"),
        (lambda: time.time() - 60, "s ahead of this machine's"),
    ):
        check = partial(check_page, clock=now)
        monkeypatch.setattr(etcdfs.doctor.cluster, "check_page", check)
        (found,) = await problems(options(etcd.endpoint))
        assert said in found


async def test_what_a_member_does_not_say_is_no_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        member = Endpoint("127.0.0.1", silent.getsockname()[1])
        (found,) = await check_page(member, Security(), 0.2)
    assert (found.level, found.check) == (Level.NOTE, "clock")
    assert "is not known: timed out" in found.message


# --- trust ----------------------------------------------------------------------------------


async def test_11_a_certificate_that_is_not_trusted(etcd_binary: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    secured = authority.secured("127.0.0.1", "localhost")
    with EtcdProcess(etcd_binary, secured=secured) as etcd:
        trusted = Security(cacert=str(authority.cacert))
        assert await problems(options(secure(etcd.endpoint), security=trusted)) == []
        assert len(await problems(options(secure(etcd.endpoint)))) == 1


async def test_22_certificates_that_end_soon(etcd_binary: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    secured = authority.secured(ask_clients=True)
    cert, key = authority.issue("client", "client@example.com")
    soon = datetime.now(UTC) + timedelta(days=29)
    with EtcdProcess(etcd_binary, secured=secured) as etcd:
        asked = options(
            secure(etcd.endpoint),
            security=Security(cacert=str(authority.cacert), cert=str(cert), key=str(key)),
        )
        assert await problems(asked) == []
        found = await examine(asked, fix=False)
        assert {"clock", "quota"} <= {f.check for f in found if f.level is Level.OK}
        authority.issue("client", "client@example.com", not_after=soon)
        (ours,) = await problems(asked)
        assert re.fullmatch(f"the certificate {cert} ends on .*, in 29 days", ours)
        authority.issue("client", "client@example.com", not_after=EXPIRED)
        assert any("certificate has expired" in each for each in await problems(asked))
        authority.issue("client", "client@example.com")
        authority.issue("server", *HOSTS, not_after=soon)  # etcd reads it for each connection
        (members,) = await problems(asked)
        assert members.startswith(f"the certificate of {etcd.endpoint} ends on ")


@pytest.fixture
def with_users(etcd: EtcdProcess) -> EtcdProcess:
    add_user(etcd, "reader", "r", ("read", b"/app/"), ("readwrite", record_key(b"/app/")))
    add_user(etcd, "other", "o", ("readwrite", b"/other/"))
    add_user(etcd, "narrow", "n", ("readwrite", b"/app/"))
    switch_users_on(etcd)
    return etcd


async def as_user(etcd: EtcdProcess, user: str, password: str) -> list[str]:
    security = Security(user=user, password=password)
    return await problems(options(etcd.endpoint, prefix=b"/app/", security=security))


async def test_12_to_15_users_and_roles(with_users: EtcdProcess) -> None:
    (wrong_password,) = await as_user(with_users, "reader", "x")
    assert "password" in wrong_password
    (unread,) = await as_user(with_users, "other", "o")
    assert "/app/ cannot be read" in unread
    (unwritten,) = await as_user(with_users, "reader", "r")
    assert "/app/ cannot be written" in unwritten
    (unattributed,) = await as_user(with_users, "narrow", "n")
    assert "all is its owner's alone" in unattributed


# --- keys -----------------------------------------------------------------------------------


async def test_16_records_of_no_key_and_their_end(etcd: EtcdProcess) -> None:
    with contextlib.closing(Client(etcd.endpoint)) as client:
        client.put(b"/kept", b"")
        client.put(record_key(b"/kept"), b'{"mode":"0600"}')
        client.put(record_key(b"/gone"), b'{"mode":"0600"}')
        (found,) = await problems(options(etcd.endpoint))
        assert found == "1 records belong to no key; --fix deletes them"
        assert await problems(options(etcd.endpoint), fix=True) == []
        assert client.get(record_key(b"/gone")) is None
        assert client.get(record_key(b"/kept")) is not None
        assert await problems(options(etcd.endpoint)) == []


async def test_23_values_that_are_too_large_or_nearly(etcd: EtcdProcess) -> None:
    with contextlib.closing(Client(etcd.endpoint)) as client:
        client.put(b"/large", b"x" * 9_000)
        asked = options(etcd.endpoint, max_file_size=10_000)
        found = await examine(asked, fix=False)
        assert [f.message for f in found if f.level is Level.NOTE and f.check == "keys"] == [
            "1 values are nearly as large as --max-file-size, such as b'/large' (9000 bytes)"
        ]
        client.put(b"/larger", b"x" * 11_000)
        assert await problems(asked) == [
            "1 values are larger than --max-file-size, such as b'/larger' (11000 bytes)"
        ]


async def test_24_a_snapshot_that_would_be_refused(etcd: EtcdProcess, tmp_path: Path) -> None:
    state = tmp_path / "state"
    asked = options(etcd.endpoint, cache=True, state_dir=str(state))
    assert await problems(asked) == [], "there is none yet"
    assert not state.exists()
    with Mounted(etcd, "--cache", f"--state-dir={state}") as mounted:
        (mounted.path / "file").write_bytes(b"x" * 5000)
    with Mounted(etcd, "--cache", f"--state-dir={state}"):
        assert await problems(asked) == [], "a mount is at it"
    (said,) = [f for f in await examine(asked, fix=False) if f.check == "snapshot"]
    assert said.level is Level.OK
    assert re.match("2 keys of revision [0-9]+, [0-9]+ s old", said.message), (
        "a record of times too"
    )
    assert await problems(replace(asked, endpoints=(), embedded=True)) == [
        f"it would be refused: it is of the etcd at {etcd.endpoint}"
    ]
    assert await problems(replace(asked, prefix=b"/other/")) == [
        "it would be refused: it is of the prefix b'/'"
    ]
    (stale,) = [
        f for f in await examine(replace(asked, max_stale_s=0.0001), fix=False)
        if f.check == "snapshot"
    ]  # fmt: skip
    assert stale.level is Level.NOTE
    assert "--max-stale would not have it shown" in stale.message
    content = (state / NAME).read_bytes()
    (state / NAME).write_bytes(content.replace(b"xxxx", b"xyxx", 1))
    assert await problems(asked) == ["it would be refused: what it has of b'/file' does not add up"]


async def test_odd_keys_are_worth_a_note(etcd: EtcdProcess) -> None:
    with contextlib.closing(Client(etcd.endpoint)) as client:
        for key in (b"/a", b"/a/b", b"/c//d", b"/plain"):
            client.put(key, b"")
        found = await examine(options(etcd.endpoint), fix=False)
        assert (
            Finding(
                Level.NOTE, "keys", "1 keys are a file and a directory (`%value`), such as b'/a'"
            )
            in found
        )
        notes = [f.message for f in found if "escaped" in f.message]
        assert notes == ["1 keys have an escaped name (`%=...`), such as b'/c//d'"]
        assert client.get(b"/.etcdfs-doctor") is None, "it only asked whether it may"
