"""What holds an inode without having it open: bind mounts, O_PATH, working directories, handles."""

import ctypes
import mmap
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, final

import pytest

from tests.mount.lab import Lab
from tests.mount.machine.twins import drop_caches
from tests.mount.posix.calls import errno_of, opened
from tests.support.churn import until

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts are made by root")

PROC_FD: Final = Path("/proc/self/fd")
AT_FDCWD: Final = -100
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@final
class Container:
    """A mount namespace of its own, in which scripts are run."""

    def __init__(self, home: Path) -> None:
        self.home = home
        command = ["unshare", "--mount", "--propagation=private", "sh", "-c", "echo; exec cat"]
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        assert self._holder.stdout is not None
        self._holder.stdout.readline()

    def sh(self, script: str, *arguments: Path | str) -> str:
        """Return what a script prints, without the newline at its end; it must succeed."""
        command = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "sh", "-euc", script]
        done = subprocess.run(
            [*command, "sh", *arguments], capture_output=True, check=False, text=True, timeout=30
        )
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout.removesuffix("\n")

    def close(self) -> None:
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    try:
        yield made
    finally:
        made.close()


# --- files ----------------------------------------------------------------------------------

Hold = Callable[[Path], AbstractContextManager[Path]]
"""Holds a file without opening it, and yields another path to its inode."""


@pytest.fixture(params=["O_PATH", "bind mount"])
def hold(request: pytest.FixtureRequest, tmp_path: Path) -> Hold:
    @contextmanager
    def by_descriptor(path: Path) -> Iterator[Path]:
        with opened(path, os.O_PATH) as fd:
            yield PROC_FD / str(fd)

    @contextmanager
    def by_mount(path: Path) -> Iterator[Path]:
        place = tmp_path / "bound"
        place.touch()
        subprocess.run(["mount", "--bind", path, place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)

    if request.param == "O_PATH":
        return by_descriptor
    if os.geteuid():
        pytest.skip("mounts are made by root")
    return by_mount


def test_b30_what_is_held_follows_its_key(lab: Lab, hold: Hold) -> None:
    file = lab.path / "file"
    lab.put("file", b"one")
    with hold(file) as held:
        inode = held.stat().st_ino
        assert held.read_bytes() == b"one"
        for value in (b"two", b"longer than before" * 1000, b"", b"3", b"3"):
            lab.put("file", value)
            assert held.stat().st_size == len(value)
            assert held.read_bytes() == value
            assert file.read_bytes() == value
        file.write_bytes(b"from here")
        assert held.read_bytes() == b"from here"
        held.write_bytes(b"through what is held")
        assert file.read_bytes() == lab.value("file") == b"through what is held"
        # What is open while its key is deleted stays what it was, and RELEASE is not waited for.
        until(lambda: not lab.mounted.statistics()["open_files"])
        lab.delete("file")
        assert not file.exists()
        lab.put("file", b"made anew")
        assert held.read_bytes() == b"made anew"
        assert held.stat().st_ino == file.stat().st_ino == inode


def test_b30_a_change_of_attributes_is_no_other_file(lab: Lab, hold: Hold) -> None:
    file = lab.path / "file"
    file.write_bytes(b"value")
    with hold(file) as held:
        os.setxattr(file, "user.etcd.ttl", b"1000")
        assert held.read_bytes() == b"value"
        file.chmod(0o600)
        assert held.stat().st_mode & 0o777 == 0o600
        lab.put("file", b"value")
        assert held.read_bytes() == b"value"
        assert os.getxattr(held, "user.etcd.mod_revision") == b"%d" % lab.client.revision()


def test_b31_what_is_open_keeps_its_version_and_newcomers_read_the_newest(
    lab: Lab, hold: Hold
) -> None:
    file = lab.path / "file"
    lab.put("file", b"one" * 5000)
    with hold(file) as held:
        with opened(held, os.O_RDONLY) as fd, opened(held, os.O_RDONLY) as mapped:
            with mmap.mmap(mapped, 0, access=mmap.ACCESS_READ) as pages:
                for value in (b"two", b"three" * 20_000):
                    lab.put("file", value)
                    assert held.read_bytes() == file.read_bytes() == value
                    assert os.fstat(fd).st_size == 15_000
                    assert os.pread(fd, 20_000, 0) == pages[:] == b"one" * 5000
            with opened(file, os.O_RDONLY) as other:
                assert os.pread(other, 5, 0) == b"three"
                held.write_bytes(b"written by the newcomer")
                assert os.pread(other, 100, 0) == b"written by the newcomer"
            assert file.read_bytes() == lab.value("file") == b"written by the newcomer"
            os.truncate(file, 7)
            assert held.read_bytes() == b"written"
            assert os.pread(fd, 20_000, 0) == b"one" * 5000
        assert held.stat().st_size == 7
        assert held.read_bytes() == b"written"
        os.truncate(held, 3)
        assert file.stat().st_size == 3
        held.chmod(0o600)
        assert file.stat().st_mode & 0o777 == 0o600
        lab.put("file", b"four")
        assert held.stat().st_size == 4
        assert held.read_bytes() == b"four"


@pytest.mark.parametrize("how", ["renamed over", "removed", "removed and made anew"])
def test_b32_what_is_replaced_or_removed_here_stays_what_it_was(
    lab: Lab, hold: Hold, how: str
) -> None:
    file = lab.path / "file"
    lab.put("file", b"old")
    with hold(file) as held:
        if how == "renamed over":
            (lab.path / "other").write_bytes(b"new")
            (lab.path / "other").rename(file)
        else:
            file.unlink()
            if how == "removed and made anew":
                file.write_bytes(b"new")
        assert held.read_bytes() == b"old"
        lab.client.compact(lab.client.revision())
        lab.put("file", b"newer")
        assert held.read_bytes() == b"old"
        assert held.stat().st_size == 3
        held.write_bytes(b"of its own")
        assert held.read_bytes() == b"of its own"
        assert held.stat().st_size == 10
        assert file.read_bytes() == lab.value("file") == b"newer"


def test_b32_what_another_client_deletes_is_read_from_history(lab: Lab, hold: Hold) -> None:
    lab.put("file", b"value")
    with hold(lab.path / "file") as held:
        lab.delete("file")
        assert held.read_bytes() == b"value"
        assert held.stat().st_nlink == 0
        held.write_bytes(b"in vain")
        assert lab.value("file") is None


# --- directories ----------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
def test_b33_a_directory_that_comes_back_is_the_one_that_was_there(
    lab: Lab, *, marked: bool
) -> None:
    directory = lab.path / "d" / "deep"
    lab.put("d/deep/one", b"1")
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        here = PROC_FD / str(fd)
        inode = directory.stat().st_ino
        for number in range(3):
            lab.delete(f"d/deep/{'one' if not number else number - 1}")
            if number != 1:  # seen by others while it was away, or not
                assert not directory.exists()
            assert os.listdir(fd) == []
            if marked:
                lab.put("d/deep/", b"")
                assert os.listdir(fd) == []
                lab.delete("d/deep/")
            lab.put(f"d/deep/{number}", b"value")
            assert os.listdir(fd) == os.listdir(directory) == [str(number)]
            assert (here / str(number)).read_bytes() == b"value"
            assert directory.stat().st_ino == inode
            assert here.readlink() == directory
        (here / "new").write_bytes(b"made there")
        assert lab.value("d/deep/new") == b"made there"


def test_b33_a_working_directory_whose_keys_are_all_replaced_at_once(lab: Lab) -> None:
    lab.put("d/old", b"1")
    with subprocess.Popen(
        ["sh", "-c", "read go; pwd -P; ls; cat new"],
        cwd=lab.path / "d",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        lab.shown(lab.client.change_all([(lab.key("d/new"), b"2")], [lab.key("d/old")]))
        lab.shown(lab.client.delete_below(lab.key("d/")))
        lab.shown(lab.client.put_all([(lab.key("d/new"), b"3")]))
        assert shell.communicate("\n", timeout=30)[0] == f"{lab.path}/d\nnew\n3"


def test_b33_a_directory_that_was_removed_here_does_not_come_back(lab: Lab) -> None:
    (lab.path / "d").mkdir()
    with opened(lab.path / "d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        (lab.path / "d").rmdir()
        lab.put("d/file", b"value")
        assert os.listdir(lab.path / "d") == ["file"]
        assert os.listdir(fd) == []
        with pytest.raises(FileNotFoundError):
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)


# --- what is mounted inside -----------------------------------------------------------------


@needs_root
def test_b34_what_is_mounted_inside_stays(lab: Lab, container: Container) -> None:
    for name in ("app/conf", "app/cache/keep", "app/beside"):
        lab.put(name, b"in etcd")
    (container.home / "local").write_text("local")
    app = lab.path / "app"
    container.sh('mount --bind "$1" "$2"', container.home / "local", app / "conf")
    container.sh('mount -t tmpfs none "$1"; echo over >"$1/file"', app / "cache")

    def check() -> None:
        shown = container.sh('cat "$1/conf" "$1/cache/file"; ls "$1/cache"', app)
        assert shown == "localover\nfile"

    check()
    for name in ("app/beside", "app/new", "app/cache/keep", "app/conf", "app/conf"):
        lab.put(name, b"changed")
        assert (lab.path / name).read_bytes() == b"changed"
        check()
    (app / "cache" / "made").write_text("here")
    lab.delete("app/beside")
    lab.put("app/cache/", b"")
    check()
    lab.delete("app/cache/")
    lab.shown(lab.client.delete_below(lab.key("app/cache/")))
    lab.put("app/cache/again", b"1")
    check()
    assert os.listdir(app / "cache") == ["again"]
    assert [key for key in lab.own_keys() if b"cache" in key] == [b"app/cache/again"]


@needs_root
def test_b34_a_copy_of_a_directory_in_a_container_goes_on(lab: Lab, container: Container) -> None:
    lab.put("d/one", b"1")
    (container.home / "d").mkdir()
    container.sh('mount --bind "$1" "$2"', lab.path / "d", container.home / "d")
    assert container.sh('cat "$1/d/one"', container.home) == "1"
    lab.delete("d/one")
    assert container.sh('ls "$1/d"', container.home) == ""
    lab.put("d/two", b"2")
    assert container.sh('cat "$1/d/two"; ls "$1/d"', container.home) == "2two"


@needs_root
def test_b30_an_overlay_above_the_mount_follows(lab: Lab, container: Container) -> None:
    lab.put("d/file", b"one")
    for name in ("upper", "work", "merged"):
        (container.home / name).mkdir()
    container.sh(
        'cd "$2"; mount -t tmpfs none upper; mkdir upper/u upper/w;'
        ' mount -t overlay overlay -o "lowerdir=$1,upperdir=upper/u,workdir=upper/w" merged',
        lab.path / "d",
        container.home,
    )
    merged = container.home / "merged"
    for value in ("one", "two and more", "3"):
        lab.put("d/file", value.encode())
        assert container.sh('cat "$1/file"', merged) == value


# --- file handles ---------------------------------------------------------------------------


Handle = ctypes.Array[ctypes.c_char]
"""A struct file_handle: how many bytes follow, their type, and they."""

HANDLE_MAX: Final = 128  # MAX_HANDLE_SZ


def handle_of(path: Path) -> Handle:
    head = struct.pack("=Ii", HANDLE_MAX, 0)
    handle, mount_id = ctypes.create_string_buffer(head, 8 + HANDLE_MAX), ctypes.c_int()
    if _LIBC.name_to_handle_at(AT_FDCWD, os.fsencode(path), handle, ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at(2)")
    return handle


def by_handle(mountpoint: Path, handle: Handle) -> bytes:
    """Read a file, or list a directory, by its handle."""
    with opened(mountpoint, os.O_RDONLY | os.O_DIRECTORY) as mount:
        fd = _LIBC.open_by_handle_at(mount, handle, os.O_RDONLY)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at(2)")
    try:
        if os.fstat(fd).st_mode & 0o170000 == 0o040000:
            return os.fsencode(",".join(os.listdir(fd)))
        return os.read(fd, 1000)
    finally:
        os.close(fd)


@needs_root
def test_b35_a_file_handle_leads_to_what_is_still_there(lab: Lab) -> None:
    mirrored = bool(lab.mounted.statistics().get("mirror"))
    top = lab.mounted.path
    lab.put("d/file", b"one")
    file, directory = handle_of(lab.path / "d/file"), handle_of(lab.path / "d")
    for value in (b"one", b"two"):
        lab.put("d/file", value)
        assert by_handle(top, file) == value
        assert by_handle(top, directory) == b"file"
    drop_caches(top)
    if not mirrored:  # inode numbers are of what the kernel holds
        assert errno_of(lambda: by_handle(top, file)) == "ESTALE"
        assert errno_of(lambda: by_handle(top, directory)) == "ESTALE"
        return
    for value in (b"two", b"three"):
        lab.put("d/file", value)
        drop_caches(top)
        assert by_handle(top, file) == value
        drop_caches(top)
        assert by_handle(top, directory) == b"file"
    lab.delete("d/file")
    drop_caches(top)
    assert errno_of(lambda: by_handle(top, file)) == "ESTALE"
