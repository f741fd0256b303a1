"""Times that nobody set: in the order of changes, and the same wherever they are looked at."""

import os
from pathlib import Path

import pytest

from etcdfs.consistency.times_record import TIMES_KEY
from tests.mount.lab import MODES, Lab, Pool, sh
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


def times_below(path: Path) -> dict[str, tuple[int, int]]:
    return {
        str(found.relative_to(path)): (found.stat().st_mtime_ns, found.stat().st_ctime_ns)
        for found in path.rglob("*")
        if found.is_file()
    }


def by_time(path: Path) -> list[str]:
    found = times_below(path)
    return sorted(found, key=lambda name: found[name])


def fill(lab: Lab, mounted: Mounted) -> None:
    """Make changes, here and by another client, not in the order of their names."""
    path = mounted.path
    for name in ("zz.c", "aa.c", "mm.c"):
        (path / name).write_text(name)
        mounted.wait(lab.put(f"app/{name}.by-others", b"x"))
    (path / "sub").mkdir()
    (path / "sub" / "file").write_text("x")
    (path / "aa.c").write_text("changed")


@pytest.mark.parametrize("mode", MODES)
def test_b39_the_order_of_changes_survives_a_remount(pool: Pool, cached: Lab, mode: str) -> None:
    prefix = os.fsdecode(cached.key("app"))
    (cached.path / "app").mkdir()
    with pool.private(cached.etcd, mode, "--prefix", prefix) as mounted:
        fill(cached, mounted)
        mounted.wait(cached.client.revision())
        before = by_time(mounted.path)
        assert before[-2:] == ["sub/file", "aa.c"]
    for key in ("app/zz.c", "app/mm.c"):
        cached.put(key, b"while it was not mounted")
    with pool.private(cached.etcd, mode, "--prefix", prefix) as mounted:
        changed = ["zz.c", "mm.c"]
        assert by_time(mounted.path) == [n for n in before if n not in changed] + changed
        new = mounted.path / "new"
        new.touch()
        assert by_time(mounted.path)[-1] == "new"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.programs("make")
def test_b39_make_has_nothing_to_do_after_a_remount(pool: Pool, cached: Lab, mode: str) -> None:
    prefix = os.fsdecode(cached.key("app"))
    rules = "all: zz.o aa.o\n%.o: %.c\n\t@echo $<; cp $< $@\n"
    (cached.path / "app").mkdir()
    with pool.private(cached.etcd, mode, "--prefix", prefix) as mounted:
        (mounted.path / "Makefile").write_text(rules)
        for name in ("aa.c", "zz.c"):
            (mounted.path / name).write_text(name)
        assert sh(mounted.path, "make -s").split() == ["zz.c", "aa.c"]
    with pool.private(cached.etcd, mode, "--prefix", prefix) as mounted:
        assert sh(mounted.path, "make -s all") == ""
        (mounted.path / "aa.c").write_text("changed")
    with pool.private(cached.etcd, mode, "--prefix", prefix) as mounted:
        assert sh(mounted.path, "make -s").split() == ["aa.c"]


def test_b40_times_are_the_same_after_a_remount_and_on_other_mounts(
    pool: Pool, cached: Lab
) -> None:
    prefix = os.fsdecode(cached.key("app"))
    (cached.path / "app").mkdir()
    with pool.private(cached.etcd, "--cache", "--prefix", prefix) as mounted:
        fill(cached, mounted)
        mounted.wait(cached.client.revision())
        before = {name: mtime_ns for name, (mtime_ns, _) in times_below(mounted.path).items()}
    revision = cached.client.revision()

    def mtimes(mounted: Mounted) -> dict[str, int]:
        return {name: mtime_ns for name, (mtime_ns, _) in times_below(mounted.path).items()}

    with (
        pool.private(cached.etcd, "--cache", "--prefix", prefix) as mounted,
        pool.private(cached.etcd, "--no-cache", "--prefix", prefix) as uncached,
    ):
        assert mtimes(mounted) == before
        assert mtimes(uncached) == before
    assert cached.client.revision() == revision, "who only reads writes nothing"


@pytest.mark.parametrize("options", [("--read-only",), ("--no-attrs",)])
def test_b40_nothing_is_written_where_nothing_may_be(
    pool: Pool, cached: Lab, options: tuple[str, ...]
) -> None:
    prefix = os.fsdecode(cached.key("app"))
    cached.put("app/file", b"x")
    record = cached.client.get(TIMES_KEY)
    with pool.private(cached.etcd, "--cache", "--prefix", prefix, *options) as mounted:
        cached.put("app/other", b"x")
        mounted.wait(cached.client.revision())
        assert by_time(mounted.path) == ["file", "other"]
    assert cached.client.get(TIMES_KEY) == record


@pytest.mark.parametrize("change", ["made", "removed"])
def test_b66_a_directorys_time_outlasts_what_is_found_to_have_changed_before(
    pool: Pool, lab: Lab, etcd_binary: Path, change: str
) -> None:
    """Without a mirror, a mount hears of what others made or removed when it lists."""
    other = pool.mounted(etcd_binary, "--cache", "--log-level", "info")
    directory = lab.path / "dir"
    directory.mkdir()
    for name in ("file", "removed"):
        (directory / name).write_bytes(b"x")
    assert len(os.listdir(directory)) == 2
    changed = lab.delete("dir/removed") if change == "removed" else lab.put("dir/made", b"x")
    other.wait(changed)
    set_ns = 1_111_111_111_000_000_001
    os.utime(other.path / lab.path.name / "dir", ns=(set_ns, set_ns))
    lab.shown(lab.client.revision())
    assert directory.stat().st_mtime_ns == set_ns
    assert len(os.listdir(directory)) == (1 if change == "removed" else 3)
    assert directory.stat().st_mtime_ns == set_ns
    assert len(os.listdir(directory)) == (1 if change == "removed" else 3)
    other.wait(lab.put("dir/after", b"x"))
    assert (directory / "after").read_bytes() == b"x"
    assert directory.stat().st_mtime_ns > set_ns
    os.utime(other.path / lab.path.name / "dir", ns=(set_ns, set_ns))
    lab.shown(lab.client.revision())
    assert directory.stat().st_mtime_ns == set_ns
    assert "after" in os.listdir(directory)
    lab.delete("dir/after")
    assert len(os.listdir(directory)) == (1 if change == "removed" else 3)
    assert directory.stat().st_mtime_ns > set_ns


def test_b66_a_content_that_others_change_leaves_a_directory_its_time(lab: Lab) -> None:
    """Not even if the file is open, so that another inode takes its name."""
    set_ns = 1_111_111_111_000_000_001
    directory = lab.path / "dir"
    directory.mkdir()
    (directory / "file").write_bytes(b"x")
    os.utime(directory, ns=(set_ns, set_ns))
    with (directory / "file").open("rb") as opened:
        lab.put("dir/file", b"new")
        assert (directory / "file").read_bytes() == b"new"
        assert opened.read() == b"x"
    assert directory.stat().st_mtime_ns == set_ns
