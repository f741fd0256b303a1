"""The command line: what a person types, and the one line they read when it goes wrong.

Knows: commands, flags and environment variables, and who wins when they differ. Does not know: what
an option's text means (`option_parsing`), and the daemon, which it starts as another process so that
`etcdfs --help` loads neither grpc nor pyfuse3.

Concurrency: none.
"""

import contextlib
import logging
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from getpass import getpass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from etcdfs import __version__
from etcdfs.cli.argv import has_empty_operand, original_form
from etcdfs.cli.flags import (
    AnyMountpoint,
    AsJson,
    Fix,
    Foreground,
    InstallRoot,
    Interval,
    Lazy,
    MountedAt,
    Mountpoint,
    OptionLists,
    RemoveHelper,
    UnmountTimeout,
    Watch,
    WouldBeMountpoint,
    takes_the_table,
)
from etcdfs.cli.install import find_command, install_files, remove_files, strangers
from etcdfs.cli.option_parsing import OptionList, parse_option_list, read_options
from etcdfs.cli.option_values import OFF, ON, parse_fields, parse_seconds
from etcdfs.errors import CommandError, UsageError
from etcdfs.options import OPTIONS, SECURITY, Kind, LogSettings, decode_options
from etcdfs.process.launcher import become_doctor, dismiss, run_in_foreground, start_in_background
from etcdfs.process.logs import Formatter, has_journal, open_log
from etcdfs.process.mountpoint import prepare, resolve, unmount
from etcdfs.process.printable import printable
from etcdfs.process.spawn import Spawned
from etcdfs.process.startup_protocol import Failed, Handover, Ready, offline_line

log = logging.getLogger(__name__)

app = typer.Typer(
    name="etcdfs",
    pretty_exceptions_enable=False,  # our own mistakes show a plain traceback
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"etcdfs {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
]


# --- commands -------------------------------------------------------------------------------


@app.callback(
    epilog="[bold]etcdfs MOUNTPOINT ENDPOINT[/bold] is short for "
    "[bold]etcdfs mount MOUNTPOINT --endpoints ENDPOINT[/bold]."
)
def etcdfs(version: Version = False) -> None:
    """Mount etcd v3 as a directory tree: every file is a key."""


@app.command()
@takes_the_table
def mount(
    ctx: typer.Context,
    mountpoint: Mountpoint,
    foreground: Foreground = False,
    option_lists: OptionLists = [],  # noqa: B006 -- typer never hands it out
    **said: bool | str | list[str],
) -> None:
    """Mount etcd. Returns once the mount is usable; the daemon goes on in the background."""
    listed = parse_option_list(",".join(option_lists))
    handover = _handover(mountpoint, _texts(ctx, said, listed), listed.fuse_options)
    early: Spawned | None = ctx.obj
    prepare(handover.options.mountpoint)
    if foreground:
        run_in_foreground(handover)
    word = start_in_background(handover, early)
    if isinstance(word, Ready) and word.note:
        typer.echo(f"etcdfs: {word.note}", err=True)
    match word:
        case Ready(client_url=str(url), etcd=etcd):
            typer.echo(f"etcdfs: {etcd}", err=True)
            typer.echo(url)
        case Failed(message=message, exit_code=exit_code):
            raise typer.Exit(_say(message, exit_code))
        case Ready() as ready:
            typer.echo(offline_line(ready), err=True, nl=False)


@app.command()
def umount(mountpoint: MountedAt, timeout: UnmountTimeout = "30", lazy: Lazy = False) -> None:
    """Take a mount away. Returns once its daemon has ended."""
    unmount(resolve(str(mountpoint)), parse_seconds(timeout), lazy=lazy)


@app.command()
@takes_the_table
def doctor(
    ctx: typer.Context,
    mountpoint: WouldBeMountpoint = Path("/"),
    fix: Fix = False,
    option_lists: OptionLists = [],  # noqa: B006 -- typer never hands it out
    **said: bool | str | list[str],
) -> None:
    """Check this machine, etcd and the keys, with the options of a mount; 70 if something is wrong."""
    listed = parse_option_list(",".join(option_lists))
    handover = _handover(mountpoint, _texts(ctx, said, listed), listed.fuse_options)
    if not {"endpoints", "embedded"} & _said(ctx, listed):
        from etcdfs.cli.status import read_config  # noqa: PLC0415 -- as there

        handover = _as_mounted(handover, read_config(handover.options.mountpoint))
    become_doctor(handover, *(["--fix"] if fix else []))


@app.command()
def status(
    mountpoint: AnyMountpoint = None,
    as_json: AsJson = False,
    watch: Watch = False,
    interval: Interval = "2",
) -> None:
    """Say how a mount is, or all mounts of the machine: connection, revision, requests, audits."""
    from etcdfs.cli.status import show_status  # noqa: PLC0415 -- only who wants it loads rich

    show_status(
        None if mountpoint is None else resolve(str(mountpoint)),
        as_json=as_json,
        watch=watch,
        interval_s=_interval(interval),
    )


@app.command()
def install_helper(root: InstallRoot = Path("/"), remove: RemoveHelper = False) -> None:
    """Let the system find etcdfs: mount -t etcdfs, fstab, systemd.

    Run it again after each upgrade, and with --remove before etcdfs is uninstalled.
    """
    command = find_command(sys.argv[0])
    if remove:
        for place in remove_files(command, root):
            typer.echo(f"removed {place}")
        return
    for place in install_files(command, root):
        typer.echo(f"installed {place}")
    if foreign := strangers(command):
        log.warning("root runs %s now, and others than root can change %s", command, foreign[0])


def _interval(text: str) -> float:
    seconds = parse_seconds(text)
    if not seconds:
        raise UsageError("--interval: it must be more than 0")
    return seconds


def _said(ctx: typer.Context, listed: OptionList) -> set[str]:
    """Return which options were said by a flag or by -o."""
    sources = {name: ctx.get_parameter_source(name.replace("-", "_")) for name in OPTIONS}
    flags = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    return flags | listed.texts.keys()


def _as_mounted(handover: Handover, config: dict[str, Any] | None) -> Handover:
    """Return the options of what is mounted, if something is, with the password of these."""
    if config is None:
        return handover
    config["security"]["password"] = handover.options.security.password
    return replace(handover, options=decode_options(config))


# --- putting texts together -----------------------------------------------------------------


def _texts(
    ctx: typer.Context, said: Mapping[str, bool | str | list[str]], listed: OptionList
) -> dict[str, str]:
    """Return what was said: a flag wins over -o, and -o over the environment."""
    flags: dict[str, str] = {}
    environment: dict[str, str] = {}
    for parameter, value in said.items():
        source = ctx.get_parameter_source(parameter)
        if source is not None and source.name in {"COMMANDLINE", "ENVIRONMENT"}:
            texts = flags if source.name == "COMMANDLINE" else environment
            texts[parameter.replace("_", "-")] = _as_text(value)
    return _settle_etcd(environment, {**listed.texts, **flags})


def _as_text(value: bool | str | list[str]) -> str:
    match value:
        case bool():
            return ON if value else OFF
        case str():
            return value
        case list():
            return ",".join(value)


def _settle_etcd(environment: dict[str, str], said: dict[str, str]) -> dict[str, str]:
    """Return all texts, with an etcd to talk to.

    With --embedded whatever the shell has for etcdctl is about another etcd.

    Raises:
        UsageError: The environment asks for what this version cannot do.
    """
    if {**environment, **said}.get("embedded", OFF) == ON:
        for name in ("endpoints", *(row.name for row in SECURITY)):
            environment.pop(name, None)
        return {**environment, **said}
    if os.environ.get("ETCDCTL_DISCOVERY_SRV"):
        raise UsageError(
            "ETCDCTL_DISCOVERY_SRV is set, and etcdfs does not discover members by DNS;"
            " unset it, and name them by --endpoints"
        )
    passwords = [os.environ[name] for name in OPTIONS["password"].variables if name in os.environ]
    if passwords and not _has_password(said):
        environment["password"] = passwords[0]
    return _ask_for_password({"endpoints": OPTIONS["endpoints"].shown, **environment, **said})


def _has_password(texts: Mapping[str, str]) -> bool:
    return ":" in texts.get("user", "") or not {"password", "password-file"}.isdisjoint(texts)


def _ask_for_password(texts: dict[str, str]) -> dict[str, str]:
    """Return the texts with a password for their user, asked for on the terminal if need be."""
    if texts.get("user") and not _has_password(texts) and sys.stdin.isatty():
        texts["password"] = getpass(f"Password of etcd's user {texts['user']}: ")
    return texts


def _handover(mountpoint: Path, texts: dict[str, str], fuse_options: tuple[str, ...]) -> Handover:
    """Return what the daemon is told, with every path absolute: its directory is `/`."""
    place = resolve(str(mountpoint))
    for name, row in OPTIONS.items():
        if name in texts and row.kind in {Kind.FILE, Kind.DIRECTORY}:
            texts[name] = _outside(place, name, texts[name])
    owner = {"uid": str(os.getuid()), "gid": str(os.getgid())}
    options = read_options(place, {**owner, **texts}, fuse_options)
    log = LogSettings(**parse_fields(LogSettings, texts))
    if log.file is not None:
        _check_log_file(log.file)
    if log.format == "journal" and log.file is not None:
        raise UsageError("--log-format journal goes to the journal, not to --log-file")
    if log.format == "journal" and not has_journal():
        raise UsageError("--log-format journal: there is no journal of systemd here")
    return Handover(options=options, log=log)


def _outside(mountpoint: str, name: str, text: str) -> str:
    """Return an absolute path that is not below the mountpoint.

    Raises:
        UsageError: It is: the daemon would wait for itself.
    """
    if not text:
        raise UsageError(f"--{name} is empty")
    try:
        path = Path(text).absolute()
    except OSError as exc:
        raise UsageError(f"--{name} {text}: no current directory: {exc.strerror}") from None
    if path.is_relative_to(mountpoint) or Path(os.path.realpath(path)).is_relative_to(mountpoint):
        raise UsageError(f"--{name} {text} is inside the mountpoint")
    return str(path)


def _check_log_file(file: str) -> None:
    try:
        fd = open_log(file)
    except OSError as exc:
        raise UsageError(f"--log-file {file} cannot be written: {exc.strerror}") from None
    with os.fdopen(fd, "wb"):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise UsageError(f"--log-file {file} is a FIFO: the mount would wait for its reader")


# --- the way in and out ---------------------------------------------------------------------


def run(arguments: Sequence[str], early: Spawned | None = None) -> int:
    """Run a command line and return a documented status.

    Args:
        arguments: What follows the program's name.
        early: A daemon that was started because one seemed to be wanted; ended if it is not.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(Formatter("etcdfs: %(message)s"))
    logging.basicConfig(handlers=[to_stderr], level=logging.WARNING)
    spelt_out = original_form(list(arguments)) or ["--help"]
    try:
        if has_empty_operand(spelt_out):
            raise UsageError("an argument is empty; the mountpoint, most likely")
        return app(spelt_out, prog_name="etcdfs", standalone_mode=False, obj=early) or 0
    except CommandError as exc:
        return _say(str(exc), exc.exit_code)
    except typer.TyperException as exc:
        return _say(exc.format_message(), exc.exit_code)
    except OSError as exc:  # what is printed cannot be written
        return _say(str(exc), 1)
    finally:
        if early is not None:
            dismiss(early)


def main() -> NoReturn:
    """Run the command line of this process, and exit with a documented status."""
    sys.exit(run(sys.argv[1:]))


def _say(message: str, exit_code: int) -> int:
    """Say what went wrong in one line, whatever the message was made of; return the status."""
    with contextlib.suppress(OSError):  # nobody can read it; the status still tells
        sys.stderr.write(f"etcdfs: {printable(' '.join(message.split()))}\n")
    return exit_code


if __name__ == "__main__":
    main()
