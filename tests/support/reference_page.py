"""Prints docs/reference.md, made from the commands, the table of options and the errors.

`make reference` writes the page; a test fails while the page is not what this prints.
"""

import errno
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from typer.main import get_command

from etcdfs.cli.main import app
from etcdfs.cli.option_parsing import (
    ALIASES,
    FLAGS,
    IGNORED,
    KERNEL,
    KERNEL_VALUED,
    REFUSED,
    VALUED,
)
from etcdfs.errors import CallerError, CommandError, EtcdfsError, StoreError
from etcdfs.options import OPTIONS, Option, Panel

_Error = TypeVar("_Error", bound=EtcdfsError)

_INTRODUCTION: Final = """\
# Reference

Made by `make reference` from the table of options (`etcdfs/options.py`) and the classes of errors
(`etcdfs/errors.py`); change those.

## Commands
"""

_OPTIONS: Final = """\
## Options of `etcdfs mount`

A flag wins over `-o`, and `-o` over the environment; of two variables the first counts.
Sizes are bytes, or `64K`, `64M`, `1GiB` (powers of 1024), `1GB` (powers of 1000).
Durations are seconds, or `500ms`, `5s`, `1m30s`.
A flag's variable is `on` or `off` (or true, false, yes, no, 1, 0).
"""

_LISTS: Final = """\
### Option lists

`-o` takes options as mount(8) and fstab write them: `ro,prefix=/app,cache_size=64M`.
`_` may stand for `-`. A value cannot have a comma in it: repeat `endpoints=`.
What is neither in the tables above nor here is refused.
`nosuid` and `nodev` are always on for users; `nosymfollow` works for root from Linux 5.12 on, for
others from libfuse 3.17 on. What begins with `x-` or `X-`, mount(8) and systemd see to themselves.
"""

_EXIT_CODES: Final = """\
## Exit codes

A command that fails says why in one line on stderr, and ends with one of these:
"""

_ERRORS: Final = """\
## Errors

What a system call in the mount returns when it fails:
"""

_KERNELS: Final = """\
The kernel adds its own: ENOTCONN when the daemon has died or was ended while somebody waited,
ENODEV for a shared map that could not be coherent, and EOPNOTSUPP for fallocate(2) and O_TMPFILE.
"""

_BORDER: Final = {
    errno.EIO: "etcdfs made a mistake; the log has a traceback.",
    errno.ENOMEM: "The daemon has no memory left.",
}
"""What no class of errors stands for."""


def reference() -> str:
    """Return the page."""
    parts = [_INTRODUCTION, *_commands(), _OPTIONS, *_options(), _LISTS, *_lists()]
    parts += [_EXIT_CODES, *_table(("Code", "Meaning"), exit_codes())]
    parts += [_ERRORS, *_table(("errno", "When"), errnos()), _KERNELS]
    return "\n".join(parts)


def _commands() -> Iterator[str]:
    """Yield what each command is for, and its options that the table does not have."""
    yield "`etcdfs MOUNTPOINT ENDPOINT` is short for `etcdfs mount MOUNTPOINT --endpoints ENDPOINT`.\n"
    table = {f"--{name}" for name in OPTIONS}
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        own = [p for p in command.params if name != "mount" or not table & set(p.opts)]
        arguments = [p.metavar for p in own if p.param_type_name == "argument"]
        yield f"### `etcdfs {' '.join([name, *arguments])}`\n\n{command.help}\n"
        yield from _table(
            ("Option", "Default", "Meaning"),
            (
                (
                    ", ".join(f"`{opt} {p.metavar or ''}".rstrip() + "`" for opt in p.opts),
                    p.show_default if isinstance(p.show_default, str) else "",
                    p.help,
                )
                for p in own
                if p.param_type_name == "option"
            ),
        )


def _options() -> Iterator[str]:
    for panel in Panel:
        yield f"### {panel.value}\n"
        yield from _table(
            ("Option", "`-o`", "Environment", "Default", "Meaning"),
            (_row(row) for row in OPTIONS.values() if row.panel is panel),
        )


def _row(row: Option) -> tuple[str, ...]:
    value = row.metavar or "|".join(row.choices) or row.kind.value
    flags = [f"--{row.name} {value}".rstrip(), f"--no-{row.name}" * row.negatable, row.short]
    listed = [f"{row.name}={value or 'on|off'}"] if row.name in VALUED else [row.name]
    listed += [name for name, (meant, _) in FLAGS.items() if meant == row.name != name]
    listed += [f"{name}={value}" for name, meant in ALIASES.items() if meant == row.name]
    return (
        "" if row.is_secret else _code(flags),
        "" if row.is_secret else _code(listed),
        _code(row.variables),
        row.default_text,
        f"{row.help} {row.more}".strip(),
    )


def _lists() -> Iterator[str]:
    yield f"- For the kernel: {_code([*sorted(KERNEL), *(f'{n}=' for n in sorted(KERNEL_VALUED))])}."
    yield f"- Accepted, and without a meaning here: {_code(sorted(IGNORED))}, `x-...`, `X-...`."
    yield from (f"- Refused: `{name}`: {why}." for name, why in REFUSED.items())
    yield ""


def exit_codes() -> Iterator[tuple[str, str]]:
    """Yield each exit code and its meaning."""
    yield "0", "Done."
    yield "1", "The daemon died, or another error of etcdfs itself."
    for error in sorted(_below(CommandError), key=lambda error: error.exit_code):
        yield str(error.exit_code), _meaning(error)
    yield "128 + n", "Signal n came while the mount was being made (130: Ctrl-C)."


def errnos() -> Iterator[tuple[str, str]]:
    """Yield each errno and when it is returned."""
    when: dict[int, dict[str, None]] = defaultdict(dict)
    for family in (CallerError, StoreError):
        for error in _below(family):
            when[error.errno][_meaning(error)] = None
    for number, meaning in _BORDER.items():
        when[number][meaning] = None
    for number in sorted(when, key=lambda number: errno.errorcode[number]):
        name = "ENOTSUP" if number == errno.ENOTSUP else errno.errorcode[number]
        yield name, " ".join(when[number])


def _below(parent: type[_Error]) -> Iterator[type[_Error]]:
    for child in parent.__subclasses__():
        yield child
        yield from _below(child)


def _meaning(error: type[EtcdfsError]) -> str:
    """Return the first paragraph of what a class says of itself."""
    return " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())


def _code(texts: Iterable[str]) -> str:
    return ", ".join(f"`{text}`".replace("|", r"\|") for text in texts if text)


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for line in (head, ("---",) * len(head), *lines):
        yield f"| {' | '.join(line)} |"
    yield ""


if __name__ == "__main__":
    sys.stdout.write(reference())
