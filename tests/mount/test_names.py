"""How keys that other clients put appear as paths, and which keys paths become."""

import contextlib
import errno
import os

import pytest

from etcdfs.keyspace.keys import MAX_DEPTH, Keyspace
from tests.mount.client import Client
from tests.mount.lab import MODES, Lab, Pool, sh
from tests.support.etcd_process import EtcdProcess
from tests.support.mounted import Mounted

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


def read(lab: Lab, *names: bytes) -> bytes:
    with open(b"/".join((os.fsencode(lab.path), *names)), "rb") as opened:
        return opened.read()


def listing(lab: Lab, *names: bytes) -> list[bytes]:
    return sorted(os.listdir(b"/".join((os.fsencode(lab.path), *names))))


def walk(directory: bytes, above: tuple[bytes, ...] = ()) -> dict[tuple[bytes, ...], bytes]:
    """Return every file below a directory and its content."""
    found: dict[tuple[bytes, ...], bytes] = {}
    for entry in os.scandir(b"/".join((directory, *above))):
        if entry.is_dir():
            found |= walk(directory, (*above, entry.name))
        else:
            with open(entry.path, "rb") as opened:
                found[*above, entry.name] = opened.read()
    return found


@pytest.mark.oldest_and_newest_etcd
def test_b1_a_file_is_a_key_and_its_content_the_value(lab: Lab) -> None:
    (lab.path / "a").mkdir()
    (lab.path / "a" / "b").write_bytes(b"\0 any bytes \xff")
    assert lab.value("a/b") == b"\0 any bytes \xff"
    lab.put("a/c", b"\xff by another client \0")
    assert (lab.path / "a" / "c").read_bytes() == b"\xff by another client \0"


@pytest.mark.oldest_and_newest_etcd
def test_b1_etcdctl_prints_what_the_shell_wrote(lab: Lab) -> None:
    sh(lab.path, "echo colour=green > app.conf")
    assert lab.etcd.etcdctl("get", lab.key("app.conf"), "--print-value-only") == b"colour=green\n\n"
    lab.mounted.put(lab.key("app.conf"), "colour=blue")
    assert sh(lab.path, "cat app.conf") == "colour=blue"
    lab.mounted.delete(lab.key("app.conf"))
    assert sh(lab.path, "ls -A") == ""


@pytest.mark.oldest_and_newest_etcd
def test_b2_keys_of_other_clients_make_directories_and_take_them(lab: Lab) -> None:
    lab.put("a/b/c", b"deep")
    lab.put("a/d", b"shallow")
    assert listing(lab) == [b"a"]
    assert listing(lab, b"a") == [b"b", b"d"]
    assert read(lab, b"a", b"b", b"c") == b"deep"
    lab.delete("a/b/c")
    assert listing(lab, b"a") == [b"d"]
    lab.delete("a/d")
    assert listing(lab) == []
    with pytest.raises(FileNotFoundError):
        (lab.path / "a").stat()


def test_b3_mkdir_puts_a_marker_and_rmdir_deletes_it(lab: Lab) -> None:
    (lab.path / "d").mkdir()
    assert lab.own_keys() == [b"d/"]
    assert lab.value("d/") == b""
    (lab.path / "d").rmdir()
    assert lab.own_keys() == []


def test_b3_a_directory_emptied_through_the_mount_stays(lab: Lab) -> None:
    lab.put("d/e/f", b"value")
    (lab.path / "d" / "e" / "f").unlink()
    assert lab.own_keys() == [b"d/e/"]
    assert listing(lab, b"d") == [b"e"]
    (lab.path / "d" / "e").rmdir()
    assert lab.own_keys() == [b"d/"]


def test_b3_a_file_moved_out_leaves_its_directory(lab: Lab) -> None:
    lab.put("d/f", b"value")
    before = lab.client.revision()
    (lab.path / "d" / "f").rename(lab.path / "f")
    assert lab.own_keys() == [b"d/", b"f"]
    assert lab.client.revision() == before + 1


def test_b3_a_marker_keeps_a_directory_when_others_empty_it(lab: Lab) -> None:
    (lab.path / "d").mkdir()
    lab.put("d/f", b"value")
    lab.delete("d/f")
    assert listing(lab, b"d") == []
    lab.delete("d/")
    assert listing(lab) == []


@pytest.mark.oldest_and_newest_etcd
def test_b4_every_key_has_a_path_of_its_own(lab: Lab) -> None:
    long = b"L" * 300
    keys = [
        b"",
        b"a//b",
        b"/",
        b"//",
        b".",
        b"..",
        b"../..",
        b"x/./y",
        b"x/../y",
        b"nul\0here",
        b"\0",
        b"\xff",
        b"\xff\xff/\xfe",
        long,
        long + b"M",
        long + b"/below",
        b"both",
        b"both/below",
        b"%value",
        b"m/",
        b"m/%value",
        b"%=.",
        b"%=%25=.",
        b"n/%marker",
        b"new\nline",
        b".etcdfs",
    ]
    # The empty one is the marker of the test's own directory, which is there already.
    revision = lab.client.put_all([(lab.prefix + key, b"=" + key) for key in keys])
    lab.shown(revision)
    found = walk(os.fsencode(lab.path))
    assert sorted(found.values()) == sorted(b"=" + key for key in keys)
    for name in ((b"\xff",), (b"both", b"%value"), (b"both", b"below"), (b"new\nline",)):
        assert name in found
    assert found[b"%=.",] == b"=."
    assert found[b"%=..", b"%value"] == b"=.."
    assert found[b"%marker",] == b"="
    assert found[b"a", b"%=", b"b"] == b"=a//b"
    assert found[b"x", b"%=.", b"y"] == b"=x/./y"
    assert found[b"%=nul%00here",] == b"=nul\0here"


def test_b4_escaped_names_are_written_removed_and_moved_like_others(lab: Lab) -> None:
    shown = lab.client.put_all([(lab.key(b".."), b"dots"), (lab.key(b"a//b"), b"empty")])
    lab.shown(shown)
    sh(lab.path, "printf more >> %=..; mv a/%=/b a/c; printf nul > '%=a%00'")
    assert lab.value(b"..") == b"dotsmore"
    assert lab.value(b"a/c") == b"empty"
    assert lab.value(b"a\0") == b"nul"
    sh(lab.path, "rm %=.. %=a%00")
    assert lab.own_keys() == [b"a//", b"a/c"]


def test_b4_a_reserved_name_cannot_be_made(lab: Lab) -> None:
    for name in ("%=", "%=..b", "%+" + "x" * 253):
        path = lab.path / name
        if name == "%=..b":
            path.write_bytes(b"")  # escapes nothing: an ordinary name
            path.unlink()
            continue
        with pytest.raises(PermissionError):
            path.write_bytes(b"")
    assert lab.own_keys() == []


def descend(lab: Lab, names: tuple[bytes, ...]) -> int:
    """Open a directory that may be too deep for one path."""
    directory = os.open(lab.path, os.O_RDONLY | os.O_DIRECTORY)
    for name in names:
        above, directory = directory, os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        os.close(above)
    return directory


@pytest.mark.parametrize("deep", [b"d/" * 1500 + b"x", b"/" * 1500], ids=["levels", "slashes"])
def test_b5_however_deep_a_key_is_it_comes_and_goes(lab: Lab, deep: bytes) -> None:
    key = b"a/" + deep
    lab.shown(lab.client.put_all([(lab.key(key), b"deep"), (lab.key(b"a/b"), b"beside")]))
    *above, name = Keyspace(b"/").locate(lab.key(key)).names[1:]
    directory = descend(lab, tuple(above))
    for content in (b"deep", b"changed"):
        file = os.open(name, os.O_RDWR, dir_fd=directory)
        assert os.read(file, 100) == content
        os.pwrite(file, b"changed", 0)
        os.close(file)
    os.close(directory)
    assert lab.value(key) == b"changed"
    lab.shown(lab.client.delete_below(lab.key(b"a/")))
    assert listing(lab) == []
    lab.put("after", b"1")
    assert listing(lab) == [b"after"]


def test_b5_below_the_deepest_directory_are_files_only(lab: Lab) -> None:
    above = (b"d",) * (MAX_DEPTH - 2)  # and the test's own directory
    stem = b"d/" * len(above)
    lab.put(stem + b"a", b"1")
    lab.put(stem + b"a/b", b"2")
    directory = descend(lab, above)
    assert sorted(os.listdir(directory)) == ["%=a%2Fb", "a"]
    with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
        os.mkdir("n", dir_fd=directory)
    os.rename("%=a%2Fb", "c", src_dir_fd=directory, dst_dir_fd=directory)
    assert lab.value(stem + b"c") == b"2"
    lab.put(stem + b"a/b", b"3")
    os.unlink("a", dir_fd=directory)
    os.unlink("c", dir_fd=directory)
    os.unlink("%=a%2Fb", dir_fd=directory)
    assert lab.own_keys() == [stem], "its marker keeps the directory"
    os.close(directory)


def test_b5_a_directory_is_not_moved_to_where_it_is_too_deep(lab: Lab) -> None:
    lab.put("from/x/y", b"1")
    depth = MAX_DEPTH - 3
    lab.put(b"d/" * depth + b"x", b"")
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        os.rename(lab.path / "from", os.fsencode(lab.path) + b"/d" * depth + b"/to")
    assert lab.value("from/x/y") == b"1"


def test_b6_only_a_slash_bounds_a_directory(lab: Lab) -> None:
    keys = [b"foo-bar", b"foo.conf", b"foo/x", b"foo0", b"foo2", b"foo\xff", b"fo"]
    lab.shown(lab.client.put_all([(lab.key(key), key) for key in keys]))
    assert listing(lab) == sorted([b"foo", *(k for k in keys if b"/" not in k)])
    assert listing(lab, b"foo") == [b"x"]
    assert all(read(lab, key) == key for key in keys)
    sh(lab.path, "rm -r foo")
    assert sorted(lab.own_keys()) == sorted(set(keys) - {b"foo/x"})


@pytest.mark.oldest_and_newest_etcd
def test_b7_a_key_that_is_also_a_directory(lab: Lab) -> None:
    lab.put("a", b"value of a")
    with (lab.path / "a").open("rb") as opened:
        lab.put("a/b", b"below")
        assert opened.read() == b"value of a"
    assert listing(lab, b"a") == [b"%value", b"b"]
    assert read(lab, b"a", b"%value") == b"value of a"
    sh(lab.path, "echo changed > a/%value")
    assert lab.value("a") == b"changed\n"
    with pytest.raises(OSError, match="not empty"):
        (lab.path / "a").rmdir()
    lab.delete("a/b")
    assert read(lab, b"a") == b"changed\n"
    lab.put("a/b", b"again")
    (lab.path / "a" / "%value").unlink()
    assert lab.own_keys() == [b"a/b"]
    assert listing(lab, b"a") == [b"b"]


def test_b7_a_value_in_the_marker_is_a_file(lab: Lab) -> None:
    lab.put("d/", b"of the marker")
    assert listing(lab, b"d") == [b"%marker"]
    assert read(lab, b"d", b"%marker") == b"of the marker"
    sh(lab.path, "echo changed > d/%marker")
    assert lab.value("d/") == b"changed\n"
    with pytest.raises(OSError, match="not empty"):
        (lab.path / "d").rmdir()
    (lab.path / "d" / "%marker").unlink()
    assert lab.value("d/") == b""
    (lab.path / "d").rmdir()
    assert lab.own_keys() == []


def test_a_path_below_a_key_is_refused_through_the_mount(lab: Lab) -> None:
    lab.put("file", b"value")
    with pytest.raises(NotADirectoryError):
        (lab.path / "file" / "below").write_bytes(b"")
    with pytest.raises(FileExistsError):
        (lab.path / "file").mkdir()
    assert lab.own_keys() == [b"file"]


def test_b10_a_directory_of_ten_thousand_entries(lab: Lab) -> None:
    keys = [b"%s-%05d" % (b"n" * (n % 90), n) for n in range(10_000)]
    revision = 0
    for start in range(0, len(keys), 100):
        revision = lab.client.put_all([(lab.key(k), k) for k in keys[start : start + 100]])
    lab.shown(revision)
    found = os.listdir(os.fsencode(lab.path))
    assert len(found) == 10_000
    assert sorted(found) == sorted(keys)
    lab.client.delete_below(lab.prefix)


# --- prefixes -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_b6_a_prefix_shows_its_keys_and_no_neighbours(pool: Pool, cached: Lab, mode: str) -> None:
    prefix = os.fsdecode(cached.key("app"))
    for key in (b"app/a", b"app/b/c", b"application/x", b"app-x", b"app", b"app0"):
        cached.put(key, key)
    with pool.private(cached.etcd, mode, "--prefix", prefix) as mounted:
        root = mounted.path
        assert sorted(os.listdir(root)) == ["a", "b"]
        assert (root / "a").read_bytes() == b"app/a"
        (root / "new").write_bytes(b"value")
        assert cached.value("app/new") == b"value"
        for name in ("a", "new"):
            (root / name).unlink()
        sh(root, "rm -r b")
        assert os.listdir(root) == []
        assert sorted(cached.own_keys()) == [b"app", b"app-x", b"app0", b"application/x"]


@pytest.mark.parametrize("mode", MODES)
def test_b4_the_whole_keyspace_raw(pool: Pool, cached: Lab, mode: str) -> None:
    name = cached.path.name.encode()
    cached.client.put_all([(name + b"-no-slash", b"1"), (name, b"2"), (b"//" + name, b"3")])
    cached.put("x", b"4")
    with pool.private(cached.etcd, mode, "--prefix", "") as mounted:
        root = os.fsencode(mounted.path)

        def content(path: bytes) -> bytes:
            with open(root + b"/" + path, "rb") as opened:
                return opened.read()

        assert content(name + b"-no-slash") == b"1"
        assert content(name) == b"2"
        assert content(b"%=/%=/" + name) == b"3"
        assert content(b"%=/" + name + b"/x") == b"4"
        assert {name + b"-no-slash", name, b"%="} <= set(os.listdir(root))
        _make_at_the_root(mounted, cached)
    cached.client.delete_below(b"//")


def _make_at_the_root(mounted: Mounted, lab: Lab) -> None:
    name = f"{lab.path.name}-made"
    (mounted.path / name).write_bytes(b"raw")
    found = lab.client.get(name.encode())
    assert found is not None
    assert found.value == b"raw"


@pytest.mark.parametrize("mode", MODES)
def test_b6_keys_that_the_default_prefix_leaves_out_are_told_of(
    pool: Pool, own_etcd: EtcdProcess, mode: str
) -> None:
    with contextlib.closing(Client(own_etcd.endpoint)) as client:
        client.put(b"/key", b"")
        with pool.private(own_etcd, mode) as mounted:
            assert mounted.statistics()["key_outside"] is None
            assert "begin with a slash" not in mounted.log
        client.put(b"no\xff/slash", b"")
        with pool.private(own_etcd, mode) as mounted:
            assert mounted.statistics()["key_outside"] == r"no\xff/slash"
            assert mounted.log.count("begin with a slash") == 1
        with pool.private(own_etcd, mode, "--prefix", "") as mounted:
            assert mounted.statistics()["key_outside"] is None
