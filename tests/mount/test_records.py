"""Records of attributes that are odd, far away in time, or not wanted: who gets to see what."""

import os
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from etcdfs.keyspace.attribute_records import TIME_MAX, record_key
from tests.mount.lab import Lab, Pool, sh
from tests.support.odd_records import ODD

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

TOUCHES = 60


def records(lab: Lab) -> list[bytes]:
    start = record_key(lab.prefix)
    return [found.key.removeprefix(start) for found in lab.client.below(start)]


@contextmanager
def other_file_system_stamped() -> Iterator[None]:
    """Have fine times handed out all the while: a later coarse one is never older (Linux 6.13)."""
    over = threading.Event()

    def stamp(directory: str) -> None:
        path = Path(directory, "f")
        while not over.wait(0.0005):
            with path.open("a") as file:
                file.write("x")
            path.stat()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        thread = threading.Thread(target=stamp, args=(directory,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def busy_cores() -> Iterator[None]:
    spinning = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def test_b54_touch_of_a_new_file_is_one_key(lab: Lab) -> None:
    names = [f"f{number}" for number in range(TOUCHES)]
    with other_file_system_stamped(), busy_cores():
        sh(lab.path, f"for name in {' '.join(names)}; do touch $name; done")
    assert sorted(os.listdir(lab.path)) == sorted(names)
    assert records(lab) == []


def test_b52_times_of_any_year(pool: Pool, lab: Lab) -> None:
    """The date of a backup, or of a broken clock, takes nothing else away."""
    times: dict[str, int] = {}
    for year in ("0001-01-01", "1676-01-01", "2300-02-03", "9999-12-31"):
        file = lab.path / year
        file.write_text("secret")
        file.chmod(0o600)
        os.setxattr(file, "user.a", b"1")
        date = f"{year}T00:00:00.000000001Z"
        sh(
            lab.path,
            f"touch -d {date} {year}; ln -s {year} link{year}; touch -h -d {date} link{year}",
        )
        seconds = subprocess.check_output(["date", "-d", date, "+%s"])
        times[year] = int(seconds) * 10**9 + 1
    with pool.private(lab.etcd, "--no-cache", "--prefix", lab.prefix.decode()) as mounted:
        for place in (lab.path, mounted.path):
            for year, time_ns in times.items():
                found = (place / year).stat()
                assert (found.st_mtime_ns, stat.S_IMODE(found.st_mode)) == (time_ns, 0o600)
                assert os.getxattr(place / year, "user.a") == b"1"
                assert os.readlink(place / f"link{year}") == year
    for year, time_ns in times.items():
        (lab.path / year).chmod(0o640)
        found = (lab.path / year).stat()
        assert (found.st_mtime_ns, stat.S_IMODE(found.st_mode)) == (time_ns, 0o640)


def test_b52_a_time_beyond_what_is_kept_is_the_last_one_that_is(lab: Lab) -> None:
    (lab.path / "file").touch()
    for sign, time_s in ((1, 2**63 - 1), (-1, -(2**63))):
        # Python's own utime() has fewer years.
        sh(lab.path, f"touch -d @{time_s} file")
        assert os.stat(lab.path / "file").st_mtime_ns == sign * TIME_MAX
        (lab.path / "file").write_text(f"{sign}")


def test_b59_a_record_that_cannot_be_read_closes(lab: Lab) -> None:
    for number, odd in enumerate(ODD):
        lab.client.put(lab.key(f"{number}"), b"value")
        lab.client.put(record_key(lab.key(f"{number}")), odd.value)
    lab.shown(lab.client.revision())
    default = os.stat(lab.path)
    for number, odd in enumerate(ODD):
        found = os.lstat(lab.path / f"{number}")
        owner = default.st_uid if odd.uid == 7 else odd.uid
        assert (found.st_mode, found.st_uid) == (odd.mode, owner), odd.name
        if not stat.S_ISLNK(found.st_mode):
            assert sorted(os.listxattr(lab.path / f"{number}")) == sorted(
                map(os.fsdecode, odd.xattrs)
            )


@pytest.mark.parametrize("text", [b"garbage", b'{"mode":7,"uid":"x"}'])
def test_b59_what_is_set_beside_it_opens_nothing_but_a_mode_does(lab: Lab, text: bytes) -> None:
    lab.client.put(lab.key("file"), b"value")
    lab.shown(lab.client.put(record_key(lab.key("file")), text))
    file = lab.path / "file"
    os.utime(file, (1, 1))
    os.setxattr(file, "user.a", b"1")
    sh(lab.path, "mv file moved; echo more >> moved")
    moved = lab.path / "moved"
    assert stat.S_IMODE(moved.stat().st_mode) == 0o600
    assert os.listxattr(moved) == ["user.a"]
    moved.chmod(0o644)
    assert stat.S_IMODE(moved.stat().st_mode) == 0o644
