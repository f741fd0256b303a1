"""The flags of `etcdfs mount`, made from the table of options, in the panels of --help.

Knows: how typer is told of an option. Does not know: which options there are (`options`), what
their text means (`option_values`), and what is done with it (`main`).

Concurrency: none; declarations only.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from etcdfs.options import OPTIONS, Kind, Option, Panel

Mountpoint = Annotated[
    Path,
    typer.Argument(metavar="MOUNTPOINT", help="The empty directory to mount over."),
]
MountedAt = Annotated[Path, typer.Argument(metavar="MOUNTPOINT", help="Where etcdfs is mounted.")]
Foreground = Annotated[
    bool,
    typer.Option(
        "--foreground",
        "-f",
        rich_help_panel=Panel.MOUNT.value,
        help="Stay, for systemd and containers; log to stderr.",
    ),
]
OptionLists = Annotated[
    list[str],
    typer.Option(
        "-o",
        metavar="OPT,...",
        rich_help_panel=Panel.MOUNT.value,
        show_default=False,
        help="Options as in fstab: ro, allow_other, noexec, or any flag without its dashes.",
    ),
]
AnyMountpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="MOUNTPOINT",
        show_default=False,
        help="Where etcdfs is mounted; all mounts if left out.",
    ),
]
WouldBeMountpoint = Annotated[
    Path,
    typer.Argument(
        metavar="MOUNTPOINT", show_default=False, help="Where it is, or would be, mounted."
    ),
]
Fix = Annotated[
    bool, typer.Option("--fix", help="Delete records of attributes that belong to no key.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the mount says, as JSON.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")]
Interval = Annotated[
    str, typer.Option("--interval", metavar="S", show_default="2", help="How often, with --watch.")
]
UnmountTimeout = Annotated[
    str,
    typer.Option(
        "--timeout", metavar="S", show_default="30", help="How long to wait for the daemon's end."
    ),
]
Lazy = Annotated[
    bool,
    typer.Option(
        "--lazy",
        "-z",
        help="Free the mountpoint even while programs are inside; they go on, the daemon with them.",
    ),
]
InstallRoot = Annotated[
    Path,
    typer.Option(
        "--root",
        metavar="DIR",
        show_default="/",
        help="Put it all below this directory, as who builds a package does.",
    ),
]
RemoveHelper = Annotated[
    bool, typer.Option("--remove", help="Take away again what is there of this etcdfs.")
]


def takes_the_table(command: Callable[..., None]) -> Callable[..., None]:
    """Have typer see a parameter for each option of the table in place of `**said`."""
    own = list(inspect.signature(command).parameters.values())
    table = [_parameter(row) for row in OPTIONS.values() if not row.is_secret]
    positional = [
        each for each in own if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    named = [each for each in own if each.default is not each.empty]
    command.__signature__ = inspect.Signature([*positional, *table, *named])  # type: ignore[attr-defined]
    return command


def _parameter(row: Option) -> inspect.Parameter:
    """Return an option as a parameter; its default only tells that nothing was said."""
    unsaid: Any = {Kind.FLAG: row.default, Kind.ENDPOINTS: []}.get(row.kind, "")
    long = f"--{row.name}/--no-{row.name}" if row.negatable else f"--{row.name}"
    declared = typer.Option(
        unsaid,
        *(name for name in (long, row.short) if name),
        metavar=row.metavar or "|".join(row.choices) or row.kind.value or None,
        autocompletion=(lambda: list(row.choices)) if row.choices else None,
        envvar=row.variables,
        rich_help_panel=row.panel.value,
        show_default=row.default_text or row.kind is not Kind.FLAG,
        help=row.help,
    )
    return inspect.Parameter(
        row.name.replace("-", "_"),
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=declared,
        annotation=type(unsaid) if not isinstance(unsaid, list) else list[str],
    )
