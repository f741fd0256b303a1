"""What calls cost: requests that the kernel sends, requests that etcd gets, time at the start.

The speed of a read is the number of requests that reach the daemon. So requests are counted here
and nothing is timed, but for one comparison of two times of the same run.
"""

import errno
import os
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from benchmarks.harness.bare import ETCD_ARGUMENTS, fill
from benchmarks.harness.scale import (
    compiled_modules,
    key_names,
    time_mount,
    turns,
    undisturbed,
)
from etcdfs.files.handles import STORE_MAX
from tests.mount.lab import Lab
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.etcd, pytest.mark.fuse, pytest.mark.counts_requests]

TIMES = 10_000
CHUNK = 100  # puts in a transaction; etcd takes 128
TURNS = 5


def put_all(lab: Lab, pairs: list[tuple[str, bytes]]) -> None:
    """Put keys below the lab's path as another client; return once the mount shows them."""
    revision = 0
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        revision = lab.client.put_all((lab.key(name), value) for name, value in chunk)
    lab.shown(revision)


@contextmanager
def cleared(lab: Lab) -> Iterator[None]:
    """Take the many keys away again: the etcd and the mounts are shared."""
    try:
        yield
    finally:
        lab.shown(lab.client.delete_below(lab.prefix))


def requests_of(lab: Lab, calls: Callable[[], object]) -> "Counter[str]":
    """Return the requests that some calls cost."""
    with lab.mounted.counting() as counted:
        calls()
    del counted["forget"]  # the kernel sends it when it wants memory back, whoever calls
    return counted


@dataclass(frozen=True)
class Traffic:
    """What etcd was asked, and how many bytes it answered with."""

    requests: int
    sent: int


def traffic_of(lab: Lab, calls: Callable[[], object]) -> Traffic:
    """Return what some calls cost etcd."""
    before = _traffic(lab)
    calls()
    after = _traffic(lab)
    return Traffic(after.requests - before.requests, after.sent - before.sent)


def _traffic(lab: Lab) -> Traffic:
    store = lab.mounted.statistics()["store"]
    return Traffic(store["ranges"] + store["transactions"], _sent_bytes(lab.etcd))


def _sent_bytes(etcd: EtcdProcess) -> int:
    """Return how many bytes etcd has sent to gRPC clients, as its metrics say."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{etcd.client_url}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name == "etcd_network_client_grpc_sent_bytes_total":
                return int(float(value))
    raise AssertionError("etcd does not count what it sends")


def read_once(path: Path) -> bytes:
    """Open, read and close, with no other call in between."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


# --- zero requests --------------------------------------------------------------------------


def test_stats_of_an_existing_name_cost_nothing(cached: Lab) -> None:
    cached.put("file", b"value")
    path = cached.path / "file"

    def stat_it() -> None:
        for _ in range(TIMES):
            os.stat(path)

    os.stat(path)
    assert not requests_of(cached, stat_it)


def test_stats_of_a_missing_name_cost_nothing(cached: Lab) -> None:
    path = cached.path / "missing"

    def stat_it() -> None:
        for _ in range(TIMES):
            assert not os.path.exists(path)

    assert not os.path.exists(path)
    assert not requests_of(cached, stat_it)
    cached.put("missing", b"here now")
    assert os.path.exists(path)


def test_preads_of_an_open_file_cost_nothing(cached: Lab) -> None:
    cached.put("file", b"value" * 2000)
    fd = os.open(cached.path / "file", os.O_RDONLY)

    def read_it() -> None:
        for number in range(TIMES):
            assert os.pread(fd, 5, number // 5 * 5) == b"value"

    try:
        assert os.pread(fd, 1 << 20, 0) == b"value" * 2000
        assert not requests_of(cached, read_it)
    finally:
        os.close(fd)


def test_a_cached_file_is_opened_but_not_read_again(cached: Lab) -> None:
    cached.put("file", b"value")
    path = cached.path / "file"

    def read_it() -> None:
        for _ in range(100):
            assert read_once(path) == b"value"

    assert read_once(path) == b"value"
    found = requests_of(cached, read_it)
    del found["release"]  # comes later, for all but the last
    has_noflush = "NOFLUSH" in cached.mounted.statistics()["fast_path"]
    assert found == (Counter(open=100) if has_noflush else Counter(open=100, flush=100))


@pytest.mark.parametrize("size", [1, 4096, 4097, STORE_MAX])
def test_a_new_value_comes_with_the_open(cached: Lab, size: int) -> None:
    path = cached.path / "file"
    for byte in b"abc":
        value = bytes((byte,)) * size
        cached.put("file", value)
        found = requests_of(cached, lambda: [read_once(path) for _ in range(10)])
        assert not found["read"]
        assert read_once(path) == value


def test_a_large_value_is_read_from_the_daemon_once(cached: Lab) -> None:
    path = cached.path / "file"
    for byte in b"abc":
        value = bytes((byte,)) * (STORE_MAX + 1)
        cached.put("file", value)
        assert read_once(path) == value
        assert not requests_of(cached, lambda: read_once(path))["read"]


# --- listings -------------------------------------------------------------------------------


def test_ten_thousand_names_are_listed_once_each(lab: Lab) -> None:
    names = [f"entry-{number:05d}" for number in range(10_000)]
    with cleared(lab):
        put_all(lab, [(name, b"") for name in names])
        assert sorted(os.listdir(lab.path)) == names
        assert sorted(os.listdir(lab.path)) == names


def test_listing_a_level_never_depends_on_what_is_below(lab: Lab) -> None:
    value = b"v" * 1000
    below = {
        "few": [f"sub/{number}" for number in range(5)],
        "some": [f"sub/{number}" for number in range(200)],
        "many": [f"sub/{number % 7}/very/deep/{number:04d}" for number in range(2000)],
    }
    beside = ["file-0", "file-1", "file-2"]
    with cleared(lab):
        names = [f"{top}/{name}" for top, names in below.items() for name in names + beside]
        put_all(lab, [(name, value) for name in names])

        def list_level(top: str) -> None:
            assert sorted(os.listdir(lab.path / top)) == [*beside, "sub"]

        found: dict[str, Traffic] = {}
        for top in below:
            list_level(top)
            found[top] = traffic_of(lab, lambda top=top: list_level(top))  # type: ignore[misc]
        assert found["many"].requests == found["some"].requests
        # What is below fits into the page that found its first key, or is jumped over: then the
        # range is narrow and widened until there is something, which takes a few requests.
        assert found["some"].requests <= found["few"].requests + 4
        for traffic in found.values():
            assert traffic.sent < 50_000, "there are 2 MB of values below"


def test_listing_from_the_mirror_asks_etcd_nothing(cached: Lab) -> None:
    put_all(cached, [(f"file-{number}", b"value") for number in range(100)])
    assert traffic_of(cached, lambda: os.listdir(cached.path)).requests == 0


# --- writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_local_write_is_not_fetched_back(cached: Lab, size: int) -> None:
    path = cached.path / "file"
    for number in range(3):
        value = bytes([number]) * size + b"%d" % number
        ranges = cached.mounted.statistics()["store"]["ranges"]
        path.write_bytes(value)
        assert path.stat().st_size == len(value)
        assert read_once(path) == value
        assert os.listdir(cached.path) == ["file"]
        assert cached.mounted.statistics()["store"]["ranges"] == ranges
        assert cached.value("file") == value


def test_a_local_removal_asks_nothing_afterwards(cached: Lab) -> None:
    path = cached.path / "file"
    path.write_bytes(b"value")
    path.unlink()
    ranges = cached.mounted.statistics()["store"]["ranges"]
    with pytest.raises(FileNotFoundError) as caught:
        os.stat(path)
    assert caught.value.errno == errno.ENOENT
    assert os.listdir(cached.path) == []
    assert cached.mounted.statistics()["store"]["ranges"] == ranges


# --- the start ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_mounting_takes_at_most_three_times_a_bare_range(etcd_binary: Path) -> None:
    count, prefix = 100_000, b"/startup/"
    with EtcdProcess(etcd_binary, *ETCD_ARGUMENTS) as etcd, compiled_modules():
        fill(etcd.endpoint, ((key, b"v" * 200) for key in key_names(prefix, count)))
        time_mount(etcd, prefix, count)  # compiles the modules
        found = undisturbed(turns(etcd, prefix, count), TURNS)
    if len(found) < TURNS:
        pytest.skip("others kept the processors busy all the time: no time measured means anything")
    assert median(turn.ratio for turn in found) <= 3, found
