"""The command line, with the daemon's start replaced by a note of what it would be handed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import etcdfs.cli.main
from etcdfs.cli.argv import likely_mountpoint, original_form
from etcdfs.cli.main import main
from etcdfs.errors import MountpointMissingError
from etcdfs.options import OPTIONS, Endpoint, Kind, LogSettings, MountOptions, Security
from etcdfs.process.spawn import Spawned, daemon_environment
from etcdfs.process.startup_protocol import Failed, Handover, Ready

LOCAL = (Endpoint("127.0.0.1", 2379),)


class Shell:
    """Runs command lines in this process; `handover` is what the daemon would be told."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], place: Path
    ) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.place = place
        self.word: Ready | Failed = Ready(revision=1, keys=1)
        self.handovers: list[Handover] = []
        self.foreground = False
        for name in (name for name in os.environ if name.startswith(("ETCDCTL_", "ETCDFS_"))):
            monkeypatch.delenv(name)
        monkeypatch.setattr(etcdfs.cli.main, "prepare", lambda *_: None)
        monkeypatch.setattr(etcdfs.cli.main, "start_in_background", self._start)
        monkeypatch.setattr(etcdfs.cli.main, "run_in_foreground", self._become)

    def _start(self, handover: Handover, early: Spawned | None) -> Ready | Failed:
        self.handovers.append(handover)
        return self.word

    def _become(self, handover: Handover) -> NoReturn:
        self.foreground = True
        self.handovers.append(handover)
        sys.exit(0)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run one command line; return its status and what it printed."""
        self._monkeypatch.setattr(sys, "argv", ["etcdfs", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return (code or 0, *self._capfd.readouterr())

    def mount(self, *arguments: str) -> MountOptions:
        """Run `etcdfs mount` and return the options that the daemon would get."""
        assert self.run("mount", str(self.place), *arguments) == (0, "", "")
        return self.handovers[-1].options

    def refuses(self, *arguments: str) -> tuple[int, str]:
        """Run a command line that fails; return its status and its one line."""
        code, output, errors = self.run(*arguments)
        assert output == ""
        assert code != 0
        line = re.fullmatch(r"etcdfs: (.+)\n", errors)
        assert line is not None, errors
        return code, line[1]


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    return Shell(monkeypatch, capfd, tmp_path)


# --- mount ----------------------------------------------------------------------------------


def test_mount_alone_has_the_defaults(shell: Shell) -> None:
    assert shell.mount() == MountOptions(
        mountpoint=str(shell.place), endpoints=LOCAL, uid=os.getuid(), gid=os.getgid()
    )
    assert shell.handovers[-1].log == LogSettings()
    assert not shell.foreground


def test_mount_takes_every_option(shell: Shell) -> None:
    options = shell.mount(
        *("--endpoints", "http://a:1,b:2", "--endpoints", "c:3", "--prefix", "/app"),
        *("--cache", "--read-only", "--cache-size", "1M", "--uid", "7", "--gid", "8"),
        *("--file-mode", "600", "--dir-mode", "700", "--umask", "077", "--allow-other"),
        "--no-attrs",
        *("--timeout", "1", "--kernel-timeout", "3", "--settle-timeout", "4"),
        *("--max-file-size", "2M", "--write-buffer", "3M", "-o", "noexec,nosuid", "-o", "fsname=x"),
        *("--log-level", "debug", "--log-file", f"{shell.place}-log"),
    )
    assert options == MountOptions(
        mountpoint=str(shell.place),
        endpoints=(Endpoint("a", 1), Endpoint("b", 2), Endpoint("c", 3)),
        prefix=b"/app/",
        cache=True,
        read_only=True,
        cache_size=1024**2,
        uid=7,
        gid=8,
        file_mode=0o600,
        dir_mode=0o700,
        umask=0o077,
        allow_other=True,
        no_attrs=True,
        timeout_s=1.0,
        kernel_timeout_s=3.0,
        settle_timeout_s=4.0,
        max_file_size=2 * 1024**2,
        write_buffer=3 * 1024**2,
        fuse_options=("noexec", "nosuid", "fsname=x"),
    )
    assert shell.handovers[-1].log == LogSettings(level="debug", file=f"{shell.place}-log")


def test_every_option_has_a_flag_and_a_panel(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    code, output, _ = shell.run("mount", "--help")
    assert code == 0
    for row in OPTIONS.values():
        assert (f"--{row.name} " in output) is not row.is_secret
        assert row.is_secret or row.variables[0] in output
        assert f"─ {row.panel.value} ─" in output


_SAMPLES = {
    Kind.TEXT: "text",
    Kind.PREFIX: "/sample",
    Kind.ENDPOINTS: "sample:1",
    Kind.FILE: "/sample/file",
    Kind.DIRECTORY: "/sample/directory",
    Kind.SIZE: "7M",
    Kind.SECONDS: "7",
    Kind.MODE: "0700",
    Kind.ID: "77",
    Kind.LISTEN: "host:9099",
}
_NEEDED = {
    "cert": ["--key", "/sample/needed"],
    "key": ["--cert", "/sample/needed"],
    "data-dir": ["--embedded"],
    "user": ["--password-file", "/sample/needed"],
    "state-dir": ["--cache"],
    "offline-start": ["--cache", "--state-dir", "/sample/needed"],
}
"""What an option is refused without."""
_TESTED_APART = {"insecure-transport", "password", "password-file"}


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - _TESTED_APART))
def test_every_row_of_the_table_is_a_flag_a_listed_option_and_a_variable(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(etcdfs.cli.main, "_check_log_file", lambda _: None)
    row = OPTIONS[name]
    assert row.field is not None
    field = row.field
    text = row.choices[-1] if row.choices else _SAMPLES.get(row.kind, "")
    needed = _NEEDED.get(name, [])

    def value() -> object:
        handover = shell.handovers[-1]
        groups = (handover.log, handover.options, handover.options.security)
        return next(getattr(each, field) for each in groups if hasattr(each, field))

    shell.mount(*needed, f"--{name}", *([text] if text else []))
    said = value()
    assert said != row.default
    shell.mount(*needed, "-o", f"{name.replace('-', '_')}={text}".removesuffix("="))
    assert value() == said
    monkeypatch.setenv(row.variables[-1], text or "on")
    shell.mount(*needed)
    assert value() == said


def test_embedded_needs_no_endpoints(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the shell has for etcdctl is about another etcd.
    monkeypatch.setenv("ETCDCTL_ENDPOINTS", "https://prod:2379")
    monkeypatch.setenv("ETCDCTL_USER", "root:secret")
    monkeypatch.chdir(shell.place.parent)
    options = shell.mount("--embedded", "--data-dir", "data")
    assert (options.embedded, options.endpoints) == (True, ())
    assert options.data_dir == str(shell.place.parent / "data")


def test_embedded_refuses_endpoints(shell: Shell) -> None:
    place = str(shell.place)
    assert shell.refuses("mount", place, "--embedded", "--endpoints", "a:1")[0] == 2


def test_embedded_prints_its_url_and_says_what_it_runs(shell: Shell) -> None:
    shell.word = Ready(revision=1, keys=1, client_url="unix:///d/client:0", etcd="embedded etcd 3")
    done = shell.run("mount", str(shell.place))
    assert done == (0, "unix:///d/client:0\n", "etcdfs: embedded etcd 3\n")


def test_foreground_becomes_the_daemon(shell: Shell) -> None:
    assert shell.run("mount", str(shell.place), "--foreground") == (0, "", "")
    assert shell.foreground


def test_the_daemons_failure_is_ours(shell: Shell) -> None:
    shell.word = Failed(message="no etcd\nanswered", exit_code=20)
    assert shell.refuses("mount", str(shell.place)) == (20, "no etcd answered")


# --- the original form ----------------------------------------------------------------------


def test_original_form(shell: Shell) -> None:
    assert shell.run(str(shell.place), "http://a:1", "--cache") == (0, "", "")
    options = shell.handovers[-1].options
    assert (options.endpoints, options.cache) == ((Endpoint("a", 1),), True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["mount", "a:1"],
        ["umount", "/mnt/a:b"],
        ["--version"],
        ["/mnt"],
        ["/mnt", "--cache"],
        ["mout", "mnt"],
    ],
)
def test_other_forms_are_left_alone(arguments: list[str]) -> None:
    assert original_form(arguments) == arguments


@pytest.mark.parametrize(
    ("source", "endpoints", "prefix", "label"),
    [
        ("a:1", "a:1", b"/", "fsname=a:1"),
        ("a:1/", "a:1", b"/", "fsname=a:1/"),
        ("http://a:1/app", "a:1", b"/app/", "fsname=http://a:1/app"),
        ("a:1,http://b:2/x/y", "a:1,b:2", b"/x/y/", None),
        ("etcd", "c:3", b"/list/", "fsname=etcd"),
        ("with blank", "c:3", b"/list/", None),
    ],
)
def test_the_form_of_fstab(
    shell: Shell, source: str, endpoints: str, prefix: bytes, label: str | None
) -> None:
    listed = "rw,dev,suid,cache,_netdev"
    listed += "" if ":" in source else ",endpoints=c:3,prefix=/list"
    assert shell.run(source, str(shell.place), "-o", listed) == (0, "", "")
    options = shell.handovers[-1].options
    assert options.mountpoint == str(shell.place)
    assert ",".join(map(str, options.endpoints)) == endpoints
    assert (options.prefix, options.cache) == (prefix, True)
    assert options.fuse_options == (() if label is None else (label,))


def test_a_mistyped_command_is_said_to_be_one(shell: Shell) -> None:
    assert shell.refuses("mout", "mnt")[0] == 2


# --- who wins -------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["ETCDCTL_ENDPOINTS", "ETCDFS_ENDPOINTS"])
def test_endpoints_from_the_environment(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://a:1,http://b:2")
    assert shell.mount().endpoints == (Endpoint("a", 1), Endpoint("b", 2))


def test_timeout_as_etcdctl_has_it(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCDCTL_COMMAND_TIMEOUT", "1m30s")
    assert shell.mount().timeout_s == 90.0


def test_flags_win_over_lists_and_lists_over_the_environment(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETCDFS_CACHE", "1")
    monkeypatch.setenv("ETCDFS_PREFIX", "/environment")
    monkeypatch.setenv("ETCDFS_UID", "1")
    options = shell.mount("-o", "prefix=/list,cache-size=2,ro", "--cache-size", "3")
    assert options.cache
    assert (options.prefix, options.cache_size, options.uid) == (b"/list/", 3, 1)
    assert options.read_only
    assert not shell.mount("--no-cache").cache
    assert shell.mount("--prefix", "").prefix == b""


def test_discovery_is_refused_not_ignored(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCDCTL_DISCOVERY_SRV", "example.com")
    status, line = shell.refuses("mount", str(shell.place))
    assert status == 2
    assert "ETCDCTL_DISCOVERY_SRV" in line


# --- certificates and users -----------------------------------------------------------------


def test_tls_as_etcdctl_has_it(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCDCTL_CACERT", "/ca")
    monkeypatch.setenv("ETCDCTL_CERT", "/cert")
    monkeypatch.setenv("ETCDCTL_KEY", "/key")
    options = shell.mount("--endpoints", "a:1")
    assert options.endpoints == (Endpoint("a", 1, secure=True),)
    assert options.security == Security(cacert="/ca", cert="/cert", key="/key")


@pytest.mark.parametrize(
    ("variable", "value", "skipped"),
    [
        ("ETCDCTL_INSECURE_SKIP_TLS_VERIFY", "true", True),
        ("ETCDCTL_INSECURE_TRANSPORT", "false", False),
    ],
)
def test_flags_of_tls_from_the_environment(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, skipped: bool
) -> None:
    monkeypatch.setenv(variable, value)
    options = shell.mount("--endpoints", "a:1")
    assert options.endpoints == (Endpoint("a", 1, secure=True),)
    assert options.security == Security(skip_verify=skipped)


def test_files_are_made_absolute(shell: Shell) -> None:
    options = shell.mount("--endpoints", "https://a:1", "--cacert", "ca.pem")
    assert options.security.cacert == str(Path("ca.pem").absolute())


@pytest.mark.parametrize(
    ("environment", "flags", "user", "password", "file"),
    [
        ({"ETCDCTL_USER": "u:p:q"}, [], "u", "p:q", None),
        ({"ETCDCTL_USER": "u", "ETCDCTL_PASSWORD": "p"}, [], "u", "p", None),
        ({"ETCDCTL_PASSWORD": "p"}, ["--user", "v:w"], "v", "w", None),
        ({"ETCDCTL_PASSWORD": "p"}, ["--user", "v"], "v", "p", None),
        ({"ETCDFS_PASSWORD": "", "ETCDCTL_PASSWORD": "p"}, ["--user", "v"], "v", "", None),
        (
            {"ETCDCTL_USER": "u", "ETCDCTL_PASSWORD": "p"},
            ["--password-file", "/f"],
            "u",
            None,
            "/f",
        ),
    ],
)
def test_users(
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    flags: list[str],
    user: str,
    password: str | None,
    file: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    security = shell.mount(*flags).security
    assert (security.user, security.password, security.password_file) == (user, password, file)
    assert "password=" not in repr(security)


def test_a_password_is_asked_for_on_a_terminal(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "typed"

    monkeypatch.setattr(etcdfs.cli.main, "getpass", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert shell.mount("--user", "u").security.password == "typed"
    assert asked == ["Password of etcd's user u: "]
    assert shell.mount("--user", "u:p").security.password == "p"
    assert len(asked) == 1


def test_the_daemons_environment_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ETCDCTL_USER", "ETCDCTL_PASSWORD", "ETCDFS_USER", "ETCDFS_PASSWORD"):
        monkeypatch.setenv(name, "u:secret")
    assert "u:secret" not in daemon_environment().values()


def test_grpc_leaves_children_of_the_daemon_alone() -> None:
    assert daemon_environment()["GRPC_ENABLE_FORK_SUPPORT"] == "0"


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["mount"], 2),
        (["mount", "{}", "--frobnicate"], 2),
        (["mount", "{}", "extra"], 2),
        (["mount", ""], 2),
        (["mount", "--cache", "{}", ""], 2),
        (["umount", ""], 2),
        (["", "a:1"], 2),
        (["mount", "{}", "--cache-size", "lots"], 2),
        (["mount", "{}", "--log-level", "loud"], 2),
        (["mount", "{}", "--log-file", "{}/log"], 2),
        (["mount", "{}", "--log-file", ""], 2),
        (["mount", "{}", "--log-file", "/nonexistent/log"], 2),
        (["mount", "{}", "-o", "suid"], 2),
        (["mount", "{}", "--embedded", "--data-dir", "{}/data"], 2),
        (["mount", "{}", "--data-dir", "/d"], 2),
        (["mount", "{}", "-o", "frobnicate"], 2),
        (["mount", "{}", "--endpoints", "a"], 22),
        (["mount", "{}", "--endpoints", "http://a:1", "--cacert", "/ca"], 23),
        (["{}", "http://a:1", "--insecure-skip-tls-verify"], 23),
        (["{}", "http://a:1", "--no-insecure-transport"], 23),
        (["{}", "a:1", "--cert", "/cert"], 23),
        (["{}", "a:1", "--key", "/key"], 23),
        (["{}", "a:1", "--cacert", "{}/ca"], 2),
        (["{}", "a:1", "--user", "u"], 24),
        (["{}", "a:1", "--user", "u:p", "--password-file", "/f"], 24),
        (["{}", "a:1", "--password-file", "/f"], 24),
        (["mount", "{}", "--prefix", "a//b"], 30),
        (["umount", "{}"], 14),
        (["umount", "{}", "--timeout", "soon"], 2),
    ],
)
def test_mistakes_are_one_line_and_a_status(shell: Shell, arguments: list[str], code: int) -> None:
    assert shell.refuses(*(a.replace("{}", str(shell.place)) for a in arguments))[0] == code
    assert not shell.handovers


def test_a_fifo_is_no_log_file(shell: Shell) -> None:
    fifo = shell.place / "fifo"
    os.mkfifo(fifo)
    line = ("mount", "/mnt", "--log-file", str(fifo))
    assert shell.refuses(*line)[0] == 2  # nobody reads it
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    code, complaint = shell.refuses(*line)
    os.close(reader)
    assert code == 2
    assert "is a FIFO" in complaint


def test_paths_need_a_current_directory_only_if_they_are_relative(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert shell.mount("--log-file", str(tmp_path.parent / "log")).mountpoint == str(tmp_path)
    assert shell.refuses("mount", str(tmp_path), "--log-file", "log")[0] == 2
    assert shell.refuses("mount", "place")[0] == 10
    assert likely_mountpoint(["mount", "place"]) is None


def test_the_mountpoint_is_looked_at_first(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object) -> NoReturn:
        raise MountpointMissingError("it does not exist")

    monkeypatch.setattr(etcdfs.cli.main, "prepare", prepare)
    assert shell.refuses("mount", "nowhere") == (10, "it does not exist")
    assert not shell.handovers


# --- the rest -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["mount", "-h"], ["umount", "-h"]])
def test_help(shell: Shell, arguments: list[str]) -> None:
    code, output, errors = shell.run(*arguments)
    assert (code, errors) == (0, "")
    assert "Usage: etcdfs" in output


def test_version(shell: Shell) -> None:
    code, output, _ = shell.run("--version")
    assert code == 0
    assert re.fullmatch(r"etcdfs (\d+\.\d+.*|\(not installed\))\n", output)


def run_module(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "etcdfs", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
        text=True,
        timeout=30,
    )


def test_shell_completion() -> None:
    done = run_module(
        _ETCDFS_COMPLETE="complete_bash", COMP_WORDS="etcdfs mount --kernel", COMP_CWORD="2"
    )
    assert "--kernel-timeout" in done.stdout


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_it_may_be_started_without_descriptors(tmp_path: Path, closed: str) -> None:
    script = f'"$@" {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", sys.executable, "-m", "etcdfs", "mount", "missing"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        text=True,
        timeout=30,
    )
    assert done.returncode == 10
    assert done.stderr.startswith("" if "2>" in closed else "etcdfs: the mountpoint ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["mount", "/nonexistent/x"]])
def test_a_full_disk_for_what_it_says_is_no_traceback(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "etcdfs", *arguments],
            check=False,
            stdout=full,
            stderr=full if "mount" in arguments else subprocess.PIPE,
            text=True,
            timeout=30,
        )
    assert done.returncode == (10 if "mount" in arguments else 1)
    assert "Traceback" not in (done.stderr or "")


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_module("mount", str(tmp_path / "missing"))
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr == f"etcdfs: the mountpoint {tmp_path / 'missing'} does not exist\n"
