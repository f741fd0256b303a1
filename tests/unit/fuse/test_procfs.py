"""Whether a process has a file open: the very file, not one of the same number elsewhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcdfs.fuse.procfs import Openers, has_open
from tests.mount.lab import memory_directory

ME = os.getpid()
W = os.O_WRONLY | os.O_CREAT


def device_of(path: Path) -> str:
    number = path.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


@pytest.fixture
def file() -> Iterator[Path]:
    with memory_directory() as directory:
        file = directory / "file"
        file.touch()
        yield file


def test_only_a_descriptor_for_writing_counts(file: Path) -> None:
    inode, device = file.stat().st_ino, device_of(file)
    assert not has_open(ME, inode, device=device)
    with file.open("rb"):
        assert not has_open(ME, inode, device=device)
    with file.open("r+b"):
        assert has_open(ME, inode, device=device)
        assert not has_open(ME, inode + 1, device=device)
    assert not has_open(ME, inode, device=device)


def test_the_same_number_in_another_file_system_is_another_file(file: Path) -> None:
    with file.open("r+b"):
        assert not has_open(ME, file.stat().st_ino, device=device_of(Path("/proc")))


def test_a_process_that_has_ended_has_nothing_open(file: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not has_open(ended.pid, file.stat().st_ino, device=device_of(file))


def test_openers_are_known_until_the_file_is_released(file: Path) -> None:
    openers = Openers()
    inode = file.stat().st_ino
    with file.open("r+b"):
        openers.note(1, W, ME, inode)
        openers.note(2, os.O_RDONLY, ME, inode)
        assert not openers.has_still(1), "the mount's own device is not known yet"
        openers.device = device_of(file)
        assert openers.has_still(1)
        assert not openers.has_still(2)
        openers.forget(1)
        openers.forget(2)
        assert not openers.has_still(1)
