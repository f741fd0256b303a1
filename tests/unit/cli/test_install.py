"""What `etcdfs install-helper` puts where, below a root of the test's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from etcdfs.cli.install import DATA, find_command, install_files, remove_files, strangers
from etcdfs.errors import InstallError

UNIT = DATA / "lib/systemd/system/etcdfs@.service"


@pytest.fixture
def command(tmp_path: Path) -> Path:
    path = tmp_path / "venv" / "bin" / "etcdfs"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_every_file_of_the_package_gets_its_place(tmp_path: Path, command: Path) -> None:
    root = tmp_path / "root"
    done = install_files(command, root)
    found = contents(root)
    assert found.pop("sbin/mount.etcdfs") == str(command)
    assert found.pop("usr/local/bin/etcdfs") == str(command)
    shared = [path for path in DATA.rglob("*") if path.is_file()]
    assert sorted(found.values()) == sorted(path.read_text() for path in shared)
    assert "usr/local/lib/systemd/system/etcdfs@.service" in found
    assert len(done) == len(found) + 2
    assert {(root / path).stat().st_mode & 0o777 for path in found} == {0o644}


def test_installing_again_renews_and_removing_leaves_nothing(tmp_path: Path, command: Path) -> None:
    root = tmp_path / "root"
    unit = root / "usr/local/lib/systemd/system/etcdfs@.service"
    install_files(command, root)
    unit.write_text("old")
    before = contents(root)
    assert install_files(command, root)
    assert unit.read_text() != "old"
    assert contents(root).keys() == before.keys()
    assert len(remove_files(command, root)) == len(before)
    assert contents(root) == {}
    assert remove_files(command, root) == []


def test_what_is_not_ours_stays(tmp_path: Path, command: Path) -> None:
    root = tmp_path / "root"
    (root / "sbin").mkdir(parents=True)
    helper = root / "sbin" / "mount.etcdfs"
    helper.write_text("of a package")
    with pytest.raises(InstallError, match="is there already"):
        install_files(command, root)
    assert helper not in remove_files(command, root)
    assert helper.read_text() == "of a package"
    helper.unlink()
    helper.symlink_to("/elsewhere/etcdfs")
    assert helper not in remove_files(command, root)
    install_files(command, root)
    assert helper.readlink() == command


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path, command: Path) -> None:
    (tmp_path / "sbin").write_text("a file")
    with pytest.raises(InstallError, match=r"sbin/mount\.etcdfs: "):
        install_files(command, tmp_path)


def test_the_command_is_the_one_that_was_called(command: Path, tmp_path: Path) -> None:
    link = tmp_path / "etcdfs"
    link.symlink_to(command)
    assert find_command(str(link)) == command
    own = Path(sys.executable).with_name("etcdfs")
    assert find_command("/usr/lib/python3/etcdfs/__main__.py") == Path(os.path.realpath(own))


def test_no_command_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InstallError, match="install the package first"):
        find_command("-c")


def test_what_others_could_change_is_named(command: Path) -> None:
    assert strangers(Path("/usr/bin/env")) == []
    command.parent.chmod(0o777)
    assert command.parent in strangers(command)


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path, command: Path) -> None:
    """As far as its own checker, which need not be there, can tell without a system."""
    unit = tmp_path / "etcdfs@mnt-etcd.service"
    text = UNIT.read_text()
    unit.write_text(text.replace("ExecStart=etcdfs ", f"ExecStart={command} "))
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", unit],
            capture_output=True,
            check=False,
            text=True,
            timeout=50,
        )
    except FileNotFoundError:
        pytest.skip("no systemd-analyze")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.programs("systemd-analyze")
def test_the_unit_is_as_closed_as_a_mount_can_be(tmp_path: Path) -> None:
    """10 is nothing, 0 all: what is left is what would hide the mount, and what mounts it."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=50", UNIT],
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout


def test_the_unit_sees_the_file_system_of_the_host(tmp_path: Path) -> None:
    """Every option that unshares it would hide the mount from everybody (systemd.exec(5))."""
    options = {
        line.partition("=")[0] for line in UNIT.read_text().splitlines() if not line.startswith("#")
    }
    assert not options & {
        *("BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "InaccessiblePaths"),
        *("NoExecPaths", "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateTmp"),
        *("ProcSubset", "ProtectControlGroups", "ProtectHome", "ProtectKernelLogs"),
        *("ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem"),
        *("ReadOnlyPaths", "ReadWritePaths", "RootDirectory", "RootImage", "TemporaryFileSystem"),
    }
