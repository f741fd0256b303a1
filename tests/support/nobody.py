"""An unprivileged user of the machine, as a real process: what they may not do, the kernel says.

Knows: how to run a piece of Python as a user who owns nothing. Only root can.

Concurrency: plain blocking calls, each bounded.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

NOBODY: Final = 65534

_TIMEOUT_S: Final = 30.0
_FALL: Final = f"""
import ctypes, fcntl, os, signal, socket, sys
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); os.chdir("/")
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def command_as_nobody(code: str, *arguments: str) -> list[str]:
    """Return a command that gives up every right and then runs `code`, with the common imports."""
    return [sys.executable, "-I", "-c", _FALL + code, *arguments]


def run_as_nobody(code: str, *arguments: str) -> str:
    """Run `code` to its end, and return what it prints."""
    return subprocess.run(
        command_as_nobody(code, *arguments),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
    ).stdout


@contextlib.contextmanager
def running_as_nobody(code: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `code` while the body runs, from its first line of output on."""
    command = command_as_nobody(code, *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "it ended without a word"
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """Yield a fresh directory that everybody may enter; those of pytest are private."""
    home = Path(tempfile.mkdtemp(prefix="etcdfs-test-"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        shutil.rmtree(home)
