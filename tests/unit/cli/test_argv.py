"""What a command line is about, at a glance."""

import os
from pathlib import Path

import pytest

from etcdfs.cli.argv import likely_mountpoint, original_form


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
