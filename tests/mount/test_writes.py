"""When and how what is written reaches etcd."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mount.lab import MODES, Lab, Pool, sh

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


@contextmanager
def revisions(lab: Lab, expected: int) -> Iterator[None]:
    """Check how many revisions the body costs."""
    before = lab.client.revision()
    yield
    assert lab.client.revision() - before == expected


def errno_of_close(fd: int) -> int:
    """Close a file; return the errno, 0 if there is none."""
    try:
        os.close(fd)
    except OSError as exc:
        return exc.errno or 0
    return 0


def write_for_ever(fd: int) -> None:
    while os.lseek(fd, 0, os.SEEK_CUR) < 4_000_000:
        os.write(fd, bytes(100_000))


@pytest.mark.oldest_and_newest_etcd
def test_b11_one_close_is_one_revision(lab: Lab) -> None:
    with revisions(lab, 1):
        sh(lab.path, "echo new > file")
    with revisions(lab, 1):
        sh(lab.path, "echo replaced > file")
    with revisions(lab, 1):
        sh(lab.path, "echo appended >> file")
    with revisions(lab, 1), (lab.path / "file").open("r+b", buffering=0) as opened:
        for n in range(20):
            opened.write(b"%d" % n)
    with revisions(lab, 1):
        os.truncate(lab.path / "file", 2)
    assert lab.value("file") == b"01"
    assert lab.version("file") == 5


def test_b11_every_shell_does_it_in_one_revision(lab: Lab) -> None:
    """They duplicate the descriptor, close one and write to the other."""
    for script in (
        "echo new > a",
        "echo replaced > a",
        "cat a > b",
        "echo new >> c",
        ": > a",
        "touch d",
        "tee e < b > /dev/null",
        "bash -c 'echo new > f'",
        "bash -c 'cat a > f'",
        "(echo one; echo two) > g",
    ):
        with revisions(lab, 1):
            sh(lab.path, script)
    assert lab.value("g") == b"one\ntwo\n"
    assert lab.value("a") == b""


@pytest.mark.parametrize("mode", MODES)
def test_b13_a_file_elsewhere_with_the_same_inode_number_is_another(
    pool: Pool, cached: Lab, mode: str
) -> None:
    """A shell's last close must report what could not be published, whatever else it has open."""
    with (
        pool.private(cached.etcd, mode, "--prefix", "/same1") as one,
        pool.private(cached.etcd, mode, "--prefix", "/same2") as two,
    ):
        one.expect_log("")
        with (two.path / "file").open("wb") as elsewhere:
            fd = os.open(one.path / "file", os.O_CREAT | os.O_WRONLY, 0o644)
            assert os.fstat(elsewhere.fileno()).st_ino == os.fstat(fd).st_ino
            with cached.client.full():
                assert errno_of_close(os.dup(fd)) == 0, "it is open still"
                assert errno_of_close(fd) == errno.ENOSPC


def test_b11_a_large_file_is_one_revision(lab: Lab) -> None:
    with revisions(lab, 1):
        (lab.path / "file").write_bytes(os.urandom(1_000_000))


def test_b11_other_changes_are_one_revision_each(lab: Lab) -> None:
    (lab.path / "file").write_bytes(b"value")
    for change in ("mkdir d", "mv file d/f", "mv d/f file", "rmdir d", "rm file"):
        with revisions(lab, 1):
            sh(lab.path, change)
    with revisions(lab, 0):
        sh(lab.path, "! rm missing 2>&1; ! mkdir . 2>&1; ! rmdir missing 2>&1")


@pytest.mark.oldest_and_newest_etcd
def test_b12_readers_put_nothing(lab: Lab) -> None:
    (lab.path / "file").write_bytes(b"value\n")
    with revisions(lab, 0):
        sh(
            lab.path,
            "cat file; ls -la; find .; stat file; head -c 1 file; wc -c < file; cat < file",
        )
        with (lab.path / "file").open("rb") as opened:
            opened.read()
            os.fsync(opened.fileno())


def test_b12_nothing_changed_nothing_put(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value\n")
    before = file.stat().st_mtime_ns
    with revisions(lab, 0):
        with file.open("r+b"):
            pass
        with file.open("ab"):
            pass
        sh(
            lab.path,
            "exec 3<> file; exec 3>&-; exec 3>> file; exec 3>&-; chmod 644 file",
        )
        os.truncate(file, 6)
        file.write_bytes(b"value\n")
    assert lab.version("file") == 1
    assert file.read_bytes() == b"value\n"
    assert file.stat().st_mtime_ns >= before


def test_b13_nobody_else_sees_anything_before_the_close(lab: Lab) -> None:
    with (lab.path / "new").open("wb", buffering=0) as opened:
        opened.write(b"one")
        assert lab.value("new") is None
        os.fsync(opened.fileno())
        assert lab.value("new") == b"one"
        opened.write(b" two")
        assert lab.value("new") == b"one"
        assert (lab.path / "new").read_bytes() == b"one two"
    assert lab.value("new") == b"one two"
    assert lab.version("new") == 2


def test_b13_a_duplicated_descriptor_publishes_at_each_close(lab: Lab) -> None:
    fd = os.open(lab.path / "file", os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, b"one")
    os.close(os.dup(fd))
    assert lab.value("file") == b"one"
    os.close(fd)
    assert lab.version("file") == 1


@pytest.mark.oldest_and_newest_etcd
def test_b14_an_append_goes_to_the_newest_value(lab: Lab) -> None:
    (lab.path / "log").write_bytes(b"one\n")
    with (lab.path / "log").open("ab", buffering=0) as opened:
        opened.write(b"three\n")
        lab.client.put(lab.key("log"), b"one\ntwo\n")
    assert lab.value("log") == b"one\ntwo\nthree\n"
    assert (lab.path / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_b14_a_write_at_the_old_end_is_an_append(lab: Lab) -> None:
    (lab.path / "log").write_bytes(b"one\n")
    with (lab.path / "log").open("r+b", buffering=0) as opened:
        opened.seek(0, os.SEEK_END)
        opened.write(b"three\n")
        lab.client.put(lab.key("log"), b"one\ntwo\n")
    assert lab.value("log") == b"one\ntwo\nthree\n"


@pytest.mark.oldest_and_newest_etcd
def test_b15_a_partial_overwrite_that_lost_is_stale(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"0123456789")
    fd = os.open(file, os.O_RDWR)
    os.pwrite(fd, b"ab", 3)
    lab.put("file", b"by another client")
    assert errno_of_close(fd) == errno.ESTALE
    assert lab.value("file") == b"by another client"
    assert file.read_bytes() == b"by another client"


def test_b15_of_whole_replacements_the_last_wins(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"old")
    with file.open("wb", buffering=0) as opened:
        opened.write(b"mine")
        lab.put("file", b"by another client")
    assert lab.value("file") == b"mine"
    assert file.read_bytes() == b"mine"


def test_b15_a_new_file_takes_the_name_from_whoever_took_it_meanwhile(lab: Lab) -> None:
    with (lab.path / "file").open("wb", buffering=0) as opened:
        opened.write(b"mine")
        lab.put("file", b"by another client")
    assert lab.value("file") == b"mine"
    assert (lab.path / "file").read_bytes() == b"mine"


@pytest.mark.oldest_and_newest_etcd
def test_b16_o_excl_claims_the_name_at_open(lab: Lab) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    fd = os.open(lab.path / "lock", flags, 0o644)
    assert lab.value("lock") == b""
    os.write(fd, b"holder")
    os.close(fd)
    assert lab.value("lock") == b"holder"
    lab.put("other", b"")
    with pytest.raises(FileExistsError):
        os.open(lab.path / "other", flags)


def test_b16_a_name_taken_behind_the_mount_is_refused_by_etcd(lab: Lab) -> None:
    """The mirror may not know yet: etcd decides."""
    for n in range(20):
        name = f"lock{n}"
        lab.client.put(lab.key(name), b"theirs")
        with pytest.raises(FileExistsError):
            os.open(lab.path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        assert lab.value(name) == b"theirs"


def test_b17_too_large_fails_at_the_write(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"old value")
    fd = os.open(file, os.O_WRONLY | os.O_TRUNC)
    with pytest.raises(OSError, match="too large") as caught:
        write_for_ever(fd)
    assert caught.value.errno == errno.EFBIG
    assert 1_500_000 < os.fstat(fd).st_size < 1_572_864
    assert errno_of_close(fd) in {0, errno.EFBIG}
    assert lab.value("file") == b"old value"
    assert file.read_bytes() == b"old value"
    assert lab.version("file") == 1


def test_b17_truncate_cannot_make_it_too_large(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"old value")
    with pytest.raises(OSError, match="too large") as caught:
        os.truncate(file, 1 << 30)
    assert caught.value.errno == errno.EFBIG
    assert file.read_bytes() == b"old value"
    assert lab.version("file") == 1


def test_b17_a_large_value_fits(lab: Lab) -> None:
    value = os.urandom(1_500_000)
    (lab.path / "file").write_bytes(value)
    assert lab.value("file") == value
    assert (lab.path / "file").read_bytes() == value


def test_b17_a_smaller_limit(pool: Pool, lab: Lab) -> None:
    for mode in MODES:
        with pool.private(lab.etcd, mode, "--max-file-size", "64K") as mounted:
            path = mounted.path / lab.path.name
            (path / "fits").write_bytes(bytes(60_000))
            with pytest.raises(OSError, match="too large"):
                (path / "fits").write_bytes(bytes(70_000))
            assert lab.value("fits") == bytes(60_000)
            with pytest.raises(OSError, match="too large"):
                (path / f"new{mode}").write_bytes(bytes(70_000))
            assert lab.value(f"new{mode}") is None
            assert not (path / f"new{mode}").exists()
            # What others put may be larger, and can be read.
            lab.client.put(lab.key("large"), bytes(100_000))
            mounted.wait(lab.client.revision())
            assert (path / "large").read_bytes() == bytes(100_000)


# --- open files that lose their name --------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b19_an_unlinked_file_is_not_resurrected(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    with file.open("r+b", buffering=0) as opened:
        file.unlink()
        opened.write(b"later")
        os.fsync(opened.fileno())
        assert os.pread(opened.fileno(), 10, 0) == b"later"
    assert lab.own_keys() == []
    assert os.listdir(lab.path) == []


def test_b19_a_file_deleted_by_another_client_is_not_resurrected(lab: Lab) -> None:
    file = lab.path / "file"
    for flags in (os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC):
        file.write_bytes(b"value")
        fd = os.open(file, flags)
        os.write(fd, b"later")
        lab.delete("file")
        assert not file.exists()
        os.fsync(fd)
        os.close(fd)
        assert lab.own_keys() == []
        assert os.listdir(lab.path) == []


def test_b19_a_file_replaced_by_another_file(lab: Lab) -> None:
    (lab.path / "file").write_bytes(b"old")
    (lab.path / "next").write_bytes(b"next")
    with (lab.path / "file").open("r+b", buffering=0) as opened:
        (lab.path / "next").rename(lab.path / "file")
        opened.write(b"OLD and more")
    assert lab.value("file") == b"next"
    assert lab.own_keys() == [b"file"]


def test_b19_a_file_made_anew_by_another_client_is_not_overwritten(lab: Lab) -> None:
    file = lab.path / "file"
    file.write_bytes(b"old")
    with file.open("r+b", buffering=0) as opened:
        opened.write(b"late")
        lab.delete("file")
        lab.put("file", b"made anew")
    assert lab.value("file") == b"made anew"
    assert file.read_bytes() == b"made anew"


def test_b19_a_file_in_a_directory_that_another_client_made_a_file(lab: Lab) -> None:
    """Its key was once made from the path that was left of it."""
    lab.put("d/e/cut-off", b"value")
    with (lab.path / "d" / "e" / "cut-off").open("r+b", buffering=0) as opened:
        opened.write(b"later")
        lab.shown(lab.client.change_all([(lab.key("d"), b"a file")], [lab.key("d/e/cut-off")]))
        assert os.listdir(lab.path) == ["d"]
        assert (lab.path / "d").read_bytes() == b"a file"
    assert lab.own_keys() == [b"d"]
    assert lab.client.get(b"/cut-off") is None


def test_b19_a_new_file_in_a_directory_that_another_client_removed(lab: Lab) -> None:
    lab.put("d/file", b"value")
    with (lab.path / "d" / "new").open("wb", buffering=0) as opened:
        opened.write(b"value")
        lab.delete("d/file")
        assert os.listdir(lab.path / "d") == ["new"]
    assert lab.own_keys() == [b"d/new"]
    assert os.listdir(lab.path) == ["d"]


# --- renaming and removing ------------------------------------------------------------------


@pytest.mark.oldest_and_newest_etcd
def test_b21_a_rename_is_one_revision_of_both_keys(lab: Lab) -> None:
    (lab.path / "a").write_bytes(b"value")
    (lab.path / "b").write_bytes(b"replaced")
    with revisions(lab, 1):
        (lab.path / "a").rename(lab.path / "b")
    assert lab.own_keys() == [b"b"]
    assert lab.value("b") == b"value"


def test_b21_a_rename_takes_the_newest_value_with_it(lab: Lab) -> None:
    for n in range(20):
        (lab.path / "a").write_bytes(b"old")
        lab.client.put(lab.key("a"), b"newest %d" % n)
        (lab.path / "a").rename(lab.path / "b")
        assert lab.value("b") == b"newest %d" % n
        assert (lab.path / "b").read_bytes() == b"newest %d" % n


def test_b22_rmdir_is_refused_by_etcd_when_a_key_is_below(lab: Lab) -> None:
    """The mirror may not know of the key yet."""
    for n in range(20):
        directory = lab.path / f"d{n}"
        directory.mkdir()
        lab.client.put(lab.key(f"d{n}/new"), b"value")
        with pytest.raises(OSError, match="not empty"):
            directory.rmdir()
        assert lab.value(f"d{n}/new") == b"value"
        lab.shown(lab.client.revision())
        assert os.listdir(directory) == ["new"]


def test_b22_a_removal_of_what_another_client_removed_says_so(lab: Lab) -> None:
    for n in range(20):
        (lab.path / f"f{n}").write_bytes(b"value")
        lab.client.delete(lab.key(f"f{n}"))
        with pytest.raises(FileNotFoundError):
            (lab.path / f"f{n}").unlink()
    lab.shown(lab.client.revision())
    assert os.listdir(lab.path) == []


@pytest.mark.oldest_and_newest_etcd
@pytest.mark.parametrize("old", [b"old", None], ids=["replaced", "made"])
def test_b126_what_failed_goes_over_nothing_that_was_written_later(
    lab: Lab, old: bytes | None
) -> None:
    lab.mounted.expect_log("")
    file = lab.path / "file"
    if old is not None:
        lab.put("file", old)
    failed = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.write(failed, b"3")
    copy = os.dup(failed)
    with lab.client.full():
        assert errno_of_close(copy) == errno.ENOSPC
    assert lab.value("file") == old
    file.write_bytes(b"4")
    assert errno_of_close(failed) == errno.ESTALE
    assert lab.value("file") == b"4"
    assert file.read_bytes() == b"4"
