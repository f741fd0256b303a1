"""Editors, driven in a terminal as a person does."""

import os
import stat
from pathlib import Path

import pexpect
import pytest

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]

ESCAPE = "\x1b"
CTRL_O, CTRL_X = "\x0f", "\x18"


def edit(place: Path, command: str, ready: str, *keys: str) -> None:
    """Run an editor, type keys once it shows `ready`, and see it end well."""
    environment = {**os.environ, "TERM": "xterm", "HOME": str(place), "LC_ALL": "C.UTF-8"}
    child = pexpect.spawn(
        command, cwd=str(place), env=environment, timeout=40, dimensions=(24, 80), encoding="utf-8"
    )
    child.expect_exact(ready)
    for key in keys:
        child.send(key)
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None), child.before


@pytest.mark.programs("vim")
@pytest.mark.parametrize("copy", ["yes", "no", "auto"])
def test_vim_saves(place: Path, copy: str) -> None:
    """With a backup, a swap file and an undo file, all of them beside the file."""
    (place / "f").write_text("first line\nsecond line\n")
    (place / "f").chmod(0o640)
    options = f"set backup backupskip= backupcopy={copy} backupdir=. directory=. undofile undodir=. swapfile"
    vim = f"vim -N -u NONE -i NONE -c '{options}' f"
    edit(place, vim, "second line", "ggdd", "ichanged ", ESCAPE, ":w\r", "Gonew", ESCAPE, ":x\r")
    assert (place / "f").read_text() == "changed second line\nnew\n"
    assert (place / "f~").read_text() in {"first line\nsecond line\n", "changed second line\n"}
    assert stat.S_IMODE((place / "f").stat().st_mode) == 0o640
    assert sorted(os.listdir(place)) == [".f.un~", "f", "f~"]
    edit(place, vim, "changed second", "u", ":x\r")
    assert (place / "f").read_text() == "changed second line\n"


@pytest.mark.programs("vim")
def test_vim_finds_the_swap_file_of_another(place: Path) -> None:
    (place / "f").write_text("value\n")
    vim = "vim -N -u NONE -i NONE f"
    first = pexpect.spawn(vim, cwd=str(place), timeout=40, encoding="utf-8")
    first.expect_exact("value")
    assert ".f.swp" in os.listdir(place)
    second = pexpect.spawn(vim, cwd=str(place), timeout=40, encoding="utf-8")
    second.expect_exact("swap file")
    second.send("a")
    second.expect(pexpect.EOF)
    second.close()
    first.send(":q!\r")
    first.expect(pexpect.EOF)
    first.close()
    assert os.listdir(place) == ["f"]


@pytest.mark.programs("nano")
def test_nano_saves(place: Path) -> None:
    (place / "f").write_text("second line\n")
    edit(place, "nano --ignorercfiles -B f", "second line", "first line\r", CTRL_O, "\r", CTRL_X)
    assert (place / "f").read_text() == "first line\nsecond line\n"
    assert (place / "f~").read_text() == "second line\n"
    assert set(os.listdir(place)) - {".local"} == {"f", "f~"}
