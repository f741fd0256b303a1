"""The completion files, in the shells that they are for."""

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from etcdfs.cli.install import DATA

SHARE = DATA / "share"
BASH = SHARE / "bash-completion/completions/etcdfs"
ZSH = SHARE / "zsh/site-functions"
FISH = SHARE / "fish/vendor_completions.d/etcdfs.fish"
TIMEOUT_S = 50


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return one in which `etcdfs` is this source."""
    program = tmp_path / "etcdfs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m etcdfs "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}


def printed(environment: dict[str, str], *command: str) -> list[str]:
    done = subprocess.run(
        command, capture_output=True, check=True, env=environment, text=True, timeout=TIMEOUT_S
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


LOGS = ["--log-file", "--log-format"]


@pytest.mark.parametrize(
    ("words", "fitting"),
    [
        (["mount", "--log-f"], LOGS),
        (["mount", "--log-format", "js"], ["json"]),
        (["umo"], ["umount"]),
    ],
)
def test_bash(environment: dict[str, str], words: list[str], fitting: list[str]) -> None:
    script = """
        . "$1"; shift
        COMP_WORDS=(etcdfs "$@") COMP_CWORD=$#
        _etcdfs etcdfs
        printf '%s\\n' "${COMPREPLY[@]}"
        complete -p etcdfs
    """
    found = printed(environment, "bash", "-c", script, "bash", str(BASH), *words)
    assert found == [*fitting, "complete -o default -F _etcdfs etcdfs"]


@pytest.mark.programs("fish")
def test_fish(environment: dict[str, str]) -> None:
    def complete(line: str) -> list[str]:
        found = printed(environment, "fish", "-c", f"source {FISH}; complete -C '{line}'")
        return [line.partition("\t")[0] for line in found]

    assert complete("etcdfs mount --log-f") == LOGS
    assert complete("etcdfs mount --log-format js") == ["json"]
    assert complete("etcdfs umount /us") == ["/usr/"]


@pytest.mark.programs("zsh")
def test_zsh(environment: dict[str, str]) -> None:
    """On the very first try: a file of `site-functions` is the function, not what defines it."""
    shell = pexpect.spawn("zsh", ["-fi"], env=environment, timeout=TIMEOUT_S, encoding="utf-8")
    try:
        shell.sendline(
            f"PS1='% '; fpath=({ZSH} $fpath); autoload -Uz compinit; compinit -u; echo re''ady"
        )
        shell.expect("ready")
        shell.send("etcdfs mount --log-fo\t")
        shell.expect("--log-format")
        shell.send("js\t")
        shell.expect("json")
    finally:
        shell.close(force=True)
