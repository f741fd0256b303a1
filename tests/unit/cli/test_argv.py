"""What a command line is about, at a glance."""

import os
from pathlib import Path

import pytest

from etcdfs.cli.argv import helper_form, likely_mountpoint, original_form


@pytest.mark.parametrize(
    "line",
    [
        "mount /m",
        "mount /m/",
        "mount //m",
        "mount /m --cache --prefix /app",
        "mount --cache /m",
        "mount --prefix /app /m",
        "mount -o ro,noexec /m --log-file /log",
        "mount ./m/../../m",
        "/m 127.0.0.1:2379",
        "/m http://127.0.0.1:2379 --cache",
    ],
)
def test_where_a_daemon_will_be_wanted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr" if "../.." in line else "/")
    assert likely_mountpoint(line.split()) == "/m"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--help",
        "--version",
        "mount",
        "mount --help",
        "mount /m -h",
        "mount /m --foreground",
        "mount -f /m",
        "mount --cache",
        "mount ..",
        "mount /",
        "umount /m",
        "umount /m --timeout 5",
        "moutn m",
    ],
)
def test_where_none_will_be(line: str) -> None:
    assert likely_mountpoint(line.split()) is None


def test_the_mountpoint_itself_is_not_touched(tmp_path: Path) -> None:
    """A daemon that hangs there would keep us for good; its parent may be a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "mnt").symlink_to("/somewhere/else")
    place = os.path.join(tmp_path, "link", "mnt")
    assert likely_mountpoint(["mount", place]) == os.path.join(tmp_path, "real", "mnt")


def test_a_unix_socket_in_fstab_is_an_endpoint_without_a_prefix() -> None:
    source = "unix:///run/a%20b/client:0"
    assert original_form([source, "/m", "-o", "cache"]) == [
        *("mount", "/m", "--endpoints", source, "-o", f"fsname={source}", "-o", "cache"),
    ]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("a:1/x /m", "mount /m --endpoints a:1 -o fsname=a:1/x --prefix /x"),
        (
            "etcd /m -v -o rw,endpoints=a:1,exec,suid,dev -t etcdfs",
            "mount /m -o fsname=etcd -o rw,endpoints=a:1,exec",
        ),
        ("-rn etcd -s /m -o cache", "mount /m -o fsname=etcd -o ro -o cache"),
        ("etcd /m -w", "mount /m -o fsname=etcd -o rw"),
        ("etcd /m -N /proc/1/ns/mnt", "mount --help"),
        ("etcd /m --cache", "mount /m -o fsname=etcd --cache"),
        ("etcd", "mount --help"),
        ("--help", "mount --help"),
    ],
)
def test_what_mount_asks_of_its_helper(line: str, meant: str) -> None:
    assert helper_form(line.split()) == meant.split()


@pytest.mark.parametrize("flags", ["-f", "-vf", "-fn"])
def test_a_fake_mount_is_none(flags: str) -> None:
    assert helper_form(["etcd", "/m", flags, "-o", "rw"]) is None
