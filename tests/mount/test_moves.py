"""Renames of directories and exchanges on real mounts, and many who race for one name."""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.mount.client import Client
from tests.mount.lab import Lab, Pool, sh
from tests.mount.posix.calls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.mount.racer import race

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

RENAME_WHITEOUT = 4
RACERS = 50
FEWER = 9


def tree_of(directory: Path) -> dict[str, bytes | None]:
    """Return every path below a directory, with its content; None for directories."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


def errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as exc:
        return exc.errno or -1
    return 0


# --- functions of a path --------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b23_a_directory_moves_with_all_that_is_in_it(place: Path) -> None:
    sh(place, "mkdir -p d/e/empty t; echo 1 > d/one; echo 2 > d/e/two; chmod 600 d/one")
    inodes = {name: (place / "d" / name).stat().st_ino for name in (".", "one", "e", "e/two")}
    renameat2(place / "d", place / "t" / "n", 0)
    assert tree_of(place) == {
        "t": None,
        "t/n": None,
        "t/n/one": b"1\n",
        "t/n/e": None,
        "t/n/e/empty": None,
        "t/n/e/two": b"2\n",
    }
    new = place / "t" / "n"
    assert inodes == {name: (new / name).stat().st_ino for name in inodes}
    assert (new / "one").stat().st_mode & 0o777 == 0o600
    assert os.listdir(place) == ["t"]


def test_b23_what_is_open_in_it_goes_along(place: Path) -> None:
    sh(place, "mkdir -p d/e; echo old > d/e/f")
    with (place / "d" / "e" / "f").open("r+b", buffering=0) as opened:
        opened.write(b"new")
        here = os.open(place / "d" / "e", os.O_RDONLY | os.O_DIRECTORY)
        try:
            (place / "d").rename(place / "n")
            made = os.open("made", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=here)
            os.write(made, b"made")
            os.close(made)
            assert sorted(os.listdir(here)) == ["f", "made"]
            assert os.stat("..", dir_fd=here).st_ino == (place / "n").stat().st_ino
        finally:
            os.close(here)
    assert tree_of(place / "n") == {"e": None, "e/f": b"new\n", "e/made": b"made"}
    assert os.listdir(place) == ["n"]


def test_b23_a_working_directory_goes_along(place: Path) -> None:
    sh(place, "mkdir -p d/e; cd d/e; mv ../../d ../../n; echo 1 > f; cat f; ls .. | grep e")
    assert tree_of(place / "n") == {"e": None, "e/f": b"1\n"}


def test_b23_over_an_empty_directory_only(place: Path) -> None:
    sh(place, "mkdir d full empty; echo 1 > d/f; echo 2 > full/f; echo 3 > file")
    assert errno_of(lambda: os.rename(place / "d", place / "full")) == errno.ENOTEMPTY
    assert errno_of(lambda: os.rename(place / "d", place / "file")) == errno.ENOTDIR
    assert errno_of(lambda: os.rename(place / "file", place / "empty")) == errno.EISDIR
    assert errno_of(lambda: os.rename(place / "d", place / "d" / "x")) == errno.EINVAL
    assert errno_of(lambda: os.rename(place / "d" / "f", place / "d")) == errno.ENOTEMPTY
    assert errno_of(lambda: os.rename(place / "d", place / "no" / "x")) == errno.ENOENT
    assert errno_of(lambda: os.rename(place / "no", place / "x")) == errno.ENOENT
    assert errno_of(lambda: os.rename(place / "d", place / ("n" * 256))) == errno.ENAMETOOLONG
    renameat2(place / "d", place / "d", 0)
    (place / "d").rename(place / "empty")
    assert tree_of(place) == {
        "full": None,
        "full/f": b"2\n",
        "file": b"3\n",
        "empty": None,
        "empty/f": b"1\n",
    }


def test_b23_noreplace(place: Path) -> None:
    sh(place, "mkdir d e; echo 1 > d/f; echo 2 > file")
    for name in ("e", "file", "d"):
        call = partial(renameat2, place / "d", place / name, RENAME_NOREPLACE)
        assert errno_of(call) == errno.EEXIST
    renameat2(place / "d", place / "n", RENAME_NOREPLACE)
    assert tree_of(place) == {"n": None, "n/f": b"1\n", "e": None, "file": b"2\n"}


@pytest.mark.oldest_and_newest_etcd
def test_b24_exchange(place: Path) -> None:
    sh(place, "mkdir -p d/x e; echo 1 > d/f; echo 2 > e/f; echo 3 > e/g; echo 4 > file")

    def inodes(*names: str) -> list[int]:
        return [(place / name).stat().st_ino for name in names]

    before = inodes("d", "d/f", "e", "e/f", "e/g", "file")
    renameat2(place / "d", place / "e", RENAME_EXCHANGE)
    assert tree_of(place / "d") == {"f": b"2\n", "g": b"3\n"}
    assert tree_of(place / "e") == {"x": None, "f": b"1\n"}
    assert inodes("e", "e/f", "d", "d/f", "d/g", "file") == before
    renameat2(place / "file", place / "e", RENAME_EXCHANGE)
    assert tree_of(place) == {
        "d": None,
        "d/f": b"2\n",
        "d/g": b"3\n",
        "e": b"4\n",
        "file": None,
        "file/x": None,
        "file/f": b"1\n",
    }
    renameat2(place / "e", place / "d" / "g", RENAME_EXCHANGE)
    assert ((place / "e").read_bytes(), (place / "d" / "g").read_bytes()) == (b"3\n", b"4\n")
    for other, number in (("no", errno.ENOENT), ("d/x", errno.ENOENT)):
        call = partial(renameat2, place / "d", place / other, RENAME_EXCHANGE)
        assert errno_of(call) in (number, errno.EINVAL)
    (place / "d" / "y").mkdir()
    below = partial(renameat2, place / "d", place / "d" / "y", RENAME_EXCHANGE)
    assert errno_of(below) == errno.EINVAL


def test_b24_exchange_of_what_is_being_written(place: Path) -> None:
    (place / "b").write_bytes(b"b")
    with (place / "a").open("wb", buffering=0) as opened:
        opened.write(b"new")
        renameat2(place / "a", place / "b", RENAME_EXCHANGE)
        opened.write(b"er")
    assert tree_of(place) == {"a": b"b", "b": b"newer"}


# --- what etcd has --------------------------------------------------------------------------


def test_b23_one_revision_of_any_keys(lab: Lab) -> None:
    names = [
        b"",
        b"/x",
        b"//y",
        b"/./z",
        b"/\0",
        b"/" + b"n" * 300 + b"/w",
        b"/\xff",
        b"/%value",
        b"/d/",
    ]
    names += [b"/%d" % n for n in range(300)]
    lab.shown(lab.client.put_all((lab.key(b"d" + name), name) for name in names[:100]))
    for start in range(100, len(names), 100):
        part = names[start : start + 100]
        lab.shown(lab.client.put_all((lab.key(b"d" + name), name) for name in part))
    before = lab.client.revision()
    (lab.path / "d").rename(lab.path / "e")
    assert lab.client.revision() == before + 1
    found = {f.key.removeprefix(lab.prefix): f for f in lab.client.below(lab.prefix)}
    del found[b""]
    assert {key: f.value for key, f in found.items()} == {b"e" + name: name for name in names}
    assert {f.mod_revision for f in found.values()} == {before + 1}
    lab.shown(before + 1)
    assert (lab.path / "e" / "%value").read_bytes() == b""
    assert (lab.path / "e" / "x").read_bytes() == b"/x"


def test_b23_a_part_of_a_long_name_stays(lab: Lab) -> None:
    lab.put(b"d/" + b"n" * 300, b"1")
    (part,) = os.listdir(lab.path / "d")
    assert errno_of(lambda: os.rename(lab.path / "d" / part, lab.path / "x")) == errno.EXDEV
    assert lab.own_keys() == [b"d/" + b"n" * 300]


def test_b23_the_old_directorys_directory_stays(lab: Lab) -> None:
    lab.put("p/d/f", b"1")
    (lab.path / "p" / "d").rename(lab.path / "d")
    assert lab.own_keys() == [b"d/f", b"p/"]
    assert os.listdir(lab.path / "p") == []


def test_b25_what_does_not_fit_is_left_to_mv(lab: Lab) -> None:
    for n in range(4):
        lab.put(f"d/{n}", b"%d" % n * 500_000)
    before = lab.own_keys(), lab.client.revision()
    lab.mounted.expect_log("fit into one transaction")
    assert errno_of(lambda: os.rename(lab.path / "d", lab.path / "e")) == errno.EXDEV
    assert (lab.own_keys(), lab.client.revision()) == before
    sh(lab.path, "mv d e")
    assert [key for key in lab.own_keys() if not key.endswith(b"/")] == [
        b"e/%d" % n for n in range(4)
    ]
    assert lab.value("e/3") == b"3" * 500_000


def test_b23_nothing_a_foreign_writer_does_meanwhile_is_lost(lab: Lab) -> None:
    """Every put is found under the old name, if it came later, or went along."""
    for n in range(20):
        lab.client.put(lab.key(f"d/{n}"), b"0")
    lab.shown(lab.client.put(lab.key("d/count"), b"0"))
    done = threading.Event()
    puts: dict[bytes, int] = {}

    def write() -> None:
        with closing(Client(lab.etcd.endpoint)) as client:
            for n in range(1500):
                key = lab.key(f"d/{n % 20}")
                puts[key] = client.put(key, b"%d" % n)
                if done.is_set():
                    return

    with ThreadPoolExecutor(1) as executor:
        task = executor.submit(write)
        moved = 0
        for n in range(5):
            number = errno_of(partial(os.rename, lab.path / "d", lab.path / f"e{n}"))
            assert number in (0, errno.ESTALE, errno.ENOENT, errno.ENOTEMPTY)
            moved += not number
        done.set()
        task.result()
    assert moved
    revision = lab.client.revision()
    lab.shown(revision)
    newest: dict[bytes, int] = {}
    for found in lab.client.below(lab.prefix):
        name = found.key.rpartition(b"/")[2]
        if name.isdigit():
            newest[name] = max(newest.get(name, 0), int(found.value))
    last = {key.rpartition(b"/")[2]: n for key, n in puts.items()}
    assert set(newest) == {b"%d" % n for n in range(20)}
    assert all(newest[name] % 20 == int(name) for name in last)
    total = max(newest.values())
    assert all(value > total - 20 for value in newest.values()), "a put was lost"


def test_b23_another_mount_sees_it_move_in_one_step(cached: Lab, other: Lab) -> None:
    for n in range(50):
        cached.client.put(cached.key(f"a/{n}"), b"%d" % n)
    other.shown(cached.shown(cached.client.revision()))
    stop = threading.Event()

    def look() -> Iterator[None]:
        while not stop.is_set():
            assert sorted(os.listdir(other.path)) in (["a"], ["b"])
            yield

    with ThreadPoolExecutor(1) as executor:
        looks = executor.submit(lambda: sum(1 for _ in look()))
        for _ in range(5):
            (cached.path / "a").rename(cached.path / "b")
            (cached.path / "b").rename(cached.path / "a")
        stop.set()
        assert looks.result()
    other.shown(cached.client.revision())
    assert len(os.listdir(other.path / "a")) == 50
    assert (other.path / "a" / "7").read_bytes() == b"7"


# --- races ----------------------------------------------------------------------------------


@pytest.fixture
def paths(pool: Pool, etcd_binary: Path, cached: Lab, other: Lab) -> list[Path]:
    """Return the test's directory on three mounts, one of them without a mirror."""
    direct = pool.mounted(etcd_binary, "--no-cache")
    return [cached.path, other.path, direct.path / cached.path.name]


def test_b26_of_fifty_processes_one_wins(cached: Lab, other: Lab, paths: list[Path]) -> None:
    def results(*calls: tuple[str, ...], racers: int = FEWER) -> dict[int, int]:
        for lab in (cached, other):
            lab.shown(cached.client.revision())
        made: list[tuple[str, ...]] = []
        for n in range(racers):
            name, *parts = calls[n % len(calls)]
            path = paths[n % len(paths)]
            made.append((name, *(str(path / part.format(n)) for part in parts)))
        return Counter(race(made))

    lost = FEWER - 1
    most = RACERS - 1
    assert results(("create", "f"), racers=RACERS) == {0: 1, errno.EEXIST: most}
    assert results(("rename", "f", "g{}")) == {0: 1, errno.ENOENT: lost}
    assert results(("mkdir", "d"), racers=RACERS) == {0: 1, errno.EEXIST: most}
    cached.client.put(cached.key("d/x"), b"1")
    assert results(("rename", "d", "e{}"), racers=RACERS) == {0: 1, errno.ENOENT: most}
    assert results(("mkdir", "n"), ("create", "n")) == {0: 1, errno.EEXIST: lost}
    sh(cached.path, "rm -rf n; mkdir n; touch u")
    assert results(("rmdir", "n")) == {0: 1, errno.ENOENT: lost}
    assert results(("unlink", "u")) == {0: 1, errno.ENOENT: lost}
    for n in range(FEWER):
        cached.client.put(cached.key(f"s{n}/x"), b"%d" % n)
    (cached.path / "t").mkdir()
    assert results(("rename", "s{}", "t")) == {0: 1, errno.ENOTEMPTY: lost}
    cached.client.put(cached.key("v/x"), b"")
    (cached.path / "w").mkdir()
    found = results(("rmdir", "w"), ("rename", "v", "w"))
    assert found[0] >= 1
    assert set(found) <= {0, errno.ENOENT, errno.ENOTEMPTY}


def test_b26_what_may_not_be_changes_nothing(lab: Lab) -> None:
    sh(lab.path, "mkdir -p d/e; echo 1 > f")
    before = lab.own_keys(), lab.client.revision()
    deep = Path(str(lab.path / "d") + "/x" * 2100)
    long = lab.path / ("n" * 256)
    for call, number in (
        (lambda: os.mkdir(long), errno.ENAMETOOLONG),
        (lambda: os.mkdir(deep), errno.ENAMETOOLONG),
        (lambda: os.rename(lab.path / "d", long), errno.ENAMETOOLONG),
        (lambda: os.rmdir(lab.path / "d"), errno.ENOTEMPTY),
        (lambda: os.rmdir(lab.path / "f"), errno.ENOTDIR),
        (lambda: os.unlink(lab.path / "d"), errno.EISDIR),
        (lambda: renameat2(lab.path / "f", lab.path / "g", RENAME_WHITEOUT), errno.EINVAL),
        (lambda: renameat2(lab.path / "f", lab.path / "g", 3), errno.EINVAL),
    ):
        assert errno_of(call) == number
    assert (lab.own_keys(), lab.client.revision()) == before


def test_b100_a_read_only_mount_moves_nothing(cached: Lab, pool: Pool) -> None:
    lab = cached
    sh(lab.path, "mkdir d e; echo 1 > d/f")
    before = lab.client.below(lab.prefix)
    with pool.private(lab.etcd, "--cache", "--read-only") as mounted:
        here = mounted.path / lab.path.name
        assert errno_of(lambda: os.rename(here / "d", here / "n")) == errno.EROFS
        assert errno_of(lambda: renameat2(here / "d", here / "e", RENAME_EXCHANGE)) == errno.EROFS
    assert lab.client.below(lab.prefix) == before


# --- leases ---------------------------------------------------------------------------------


def lease_of(path: Path) -> bytes | None:
    with suppress(OSError):
        return os.getxattr(path, "user.etcd.lease")
    return None


def test_b63_a_lease_goes_with_its_file(lab: Lab) -> None:
    def leased() -> set[str]:
        return {path.name for path in lab.path.iterdir() if lease_of(path)}

    for name in ("a", "b", "c"):
        (lab.path / name).write_text("text\n")
    for name in ("a", "b"):
        os.setxattr(lab.path / name, "user.etcd.ttl", b"1000")
    sh(lab.path, "echo more >> a; cp c b")
    assert leased() == {"a", "b"}, "what is written in place keeps it"
    sh(lab.path, "sed -i s/text/other/ a; mv c b")
    assert leased() == set(), "what replaces a file lasts"
    os.setxattr(lab.path / "a", "user.etcd.ttl", b"1000")
    sh(lab.path, "mv a c")
    assert leased() == {"c"}
    sh(lab.path, "mv c b")
    assert leased() == {"b"}
