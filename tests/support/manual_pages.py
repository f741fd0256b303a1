"""Writes the manual pages, made from docs/man, the commands, the table of options and the errors.

`make reference` writes the pages; a test fails while they are not what this writes. A command that
docs/man has no text for gets a page of its help and options.

The texts are a little Markdown: headings, paragraphs, code, and terms with their meaning after
`: `. `@OPTIONS@` and the like stand for what the tables say.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from etcdfs.cli.install import DATA
from etcdfs.cli.main import app
from etcdfs.cli.option_parsing import ALIASES, IGNORED, KERNEL, KERNEL_VALUED, REFUSED
from etcdfs.options import OPTIONS, Panel
from tests.support.reference_page import errnos, exit_codes

MANUAL: Final = DATA / "share/man"
_TEXTS: Final = Path(__file__).parents[2] / "docs/man"
_ROOT: Final = "etcdfs"
_HELPER: Final = "mount.etcdfs"

Page = list[str]


def pages() -> dict[Path, str]:
    """Return the pages, by their path below `MANUAL`."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    names = [f"{_ROOT}-{name}" for name in sorted(commands)]
    found = {Path("man1/etcdfs.1"): _root(commands, names)}
    for name, command in commands.items():
        page = f"{_ROOT}-{name}"
        found[Path(f"man1/{page}.1")] = _command(name, command, names)
    found[Path("man8/mount.etcdfs.8")] = _helper()
    return found


# --- the pages ------------------------------------------------------------------------------


def _root(commands: dict[str, Any], names: list[str]) -> str:
    listed = [(f"**{_ROOT}-{name}**(1)", _summary(c)) for name, c in sorted(commands.items())]
    text = _text(_ROOT, COMMANDS=_terms(listed), EXIT_CODES=_terms(exit_codes()))
    synopsis = ["etcdfs *COMMAND* [*OPTIONS*] [*MOUNTPOINT*]", "etcdfs *MOUNTPOINT* *ENDPOINT*"]
    return _page(_ROOT, 1, "mount etcd v3 as a directory tree", synopsis, text, [*names, _HELPER])


def _command(name: str, command: Any, names: list[str]) -> str:
    arguments = [
        p.metavar if p.required else f"[{p.metavar}]"
        for p in command.params
        if p.param_type_name == "argument"
    ]
    operands = " ".join(f"*{text}*" for text in arguments)
    page = f"{_ROOT}-{name}"
    own = _terms(_flags(command))
    if (_TEXTS / f"{page}.md").exists():
        options = f"{own}\n\n{_panels()}" if name == "mount" else own
        text = _text(page, OPTIONS=options, LISTS=_terms(_lists()), ERRORS=_terms(errnos()))
    else:
        help_text = f"## DESCRIPTION\n\n{command.help}\n\n## OPTIONS\n\n{own}\n\n"
        text = f"{help_text}## EXIT STATUS\n\nAs **etcdfs**(1).\n"
    others = [other for other in (_ROOT, *names, _HELPER) if other != page]
    synopsis = [f"etcdfs {name} [*OPTIONS*] {operands}".rstrip()]
    return _page(page, 1, _summary(command), synopsis, text, others)


def _helper() -> str:
    synopsis = [
        "mount -t etcdfs [-o *OPTIONS*] *SOURCE* *MOUNTPOINT*",
        "mount.etcdfs *SOURCE* *MOUNTPOINT* [-fnrsvw] [-o *OPTIONS*]",
    ]
    summary = "mount etcd by mount(8), fstab and systemd"
    return _page(_HELPER, 8, summary, synopsis, _text(_HELPER), [_ROOT, "etcdfs-mount"])


def _summary(command: Any) -> str:
    first = command.help.split("\n\n")[0].split(". ")[0].rstrip(".")
    return f"{first[0].lower()}{first[1:]}"


def _text(page: str, **parts: str) -> str:
    text = (_TEXTS / f"{page}.md").read_text()
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    assert not re.search("@[A-Z_]+@", text), page
    return text


# --- what the tables say --------------------------------------------------------------------


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n\n".join(f"{term}\n: {meaning}" for term, meaning in pairs)


def _flags(command: Any) -> Iterator[tuple[str, str]]:
    table = {f"--{name}" for name in OPTIONS}
    for parameter in command.params:
        if parameter.param_type_name == "option" and not table & set(parameter.opts):
            flags = ", ".join(_flag(opt, parameter.metavar) for opt in parameter.opts)
            default = parameter.show_default
            shown = f" Default: {default}." if isinstance(default, str) else ""
            yield flags, f"{parameter.help}{shown}"


def _flag(name: str, value: str | None) -> str:
    return f"**{name}** *{value}*" if value else f"**{name}**"


def _panels() -> str:
    return "\n\n".join(f"### {panel.value}\n\n{_terms(_rows(panel))}" for panel in Panel)


def _rows(panel: Panel) -> Iterator[tuple[str, str]]:
    for row in OPTIONS.values():
        if row.panel is not panel:
            continue
        value = row.metavar or "|".join(row.choices) or row.kind.value
        flags = [_flag(f"--{row.name}", value)] + [f"**--no-{row.name}**"] * row.negatable
        flags += [f"**{row.short}**"] if row.short else []
        default = f" Default: {row.default_text}." if row.default_text else ""
        said = f" Environment: {', '.join(f'`{name}`' for name in row.variables)}."
        term = f"`{row.variables[0]}`" if row.is_secret else ", ".join(flags)
        yield term, f"{row.help} {row.more}".strip() + default + said


def _lists() -> Iterator[tuple[str, str]]:
    valued = [f"{name}=" for name in sorted(KERNEL_VALUED)]
    yield ", ".join([*sorted(KERNEL), *valued]), "For the kernel."
    yield ", ".join(f"{name}=" for name in sorted(ALIASES)), "Other names, for fstab."
    yield (
        f"{', '.join(sorted(IGNORED))}, x-..., X-...",
        "For mount(8), systemd and the boot; they are accepted, and mean nothing here.",
    )
    for name, why in REFUSED.items():
        yield name, f"Refused: {why}."


# --- how a page is written: man(7) ----------------------------------------------------------


def _page(
    name: str, section: int, summary: str, synopsis: list[str], text: str, others: list[str]
) -> str:
    lines = ['.\\" Made by `make reference` from docs/man and the tables; change those.']
    lines += [f'.TH {_roff(name.upper())} {section} "" etcdfs "etcdfs manual"']
    lines += [".SH NAME", f"{_roff(name)} \\- {_roff(summary)}", ".SH SYNOPSIS"]
    for number, line in enumerate(synopsis):
        lines += [".br"] * bool(number) + [
            _inline(f"**{line.split(' ')[0]}**{line[len(line.split(' ')[0]) :]}")
        ]
    lines += _body(text)
    seen = [f"**{other}**({8 if other == _HELPER else 1})" for other in others]
    lines += [".SH SEE ALSO", _inline(", ".join([*seen, "**etcdctl**(1)", "**fusermount3**(1)"]))]
    return "\n".join(lines) + "\n"


def _body(text: str) -> Iterator[str]:
    begins = True  # the first paragraph of a section needs no .PP
    for block in re.split(r"\n\n+", text.strip()):
        lines = block.splitlines()
        if block.startswith("## "):
            yield f".SH {_roff(block[3:])}"
        elif block.startswith("### "):
            yield f".SS {_roff(block[4:])}"
        elif block.startswith("```"):
            yield from (".PP", ".nf", ".RS 4", *map(_roff, lines[1:-1]), ".RE", ".fi")
        elif len(lines) > 1 and lines[1].startswith(": "):
            yield from (".TP", _inline(lines[0]), _inline(lines[1][2:]))
        else:
            yield from ([] if begins else [".PP"])
            yield from map(_inline, lines)
        begins = block.startswith("#")


def _inline(text: str) -> str:
    """Return a line with its `code`, **strong** and *meant* parts in their fonts."""
    parts = re.split(r"(`[^`]+`|\*\*.+?\*\*|\*[^*]+\*)", text)
    return "".join(
        _in_font(part) if number % 2 else _roff(part, number) for number, part in enumerate(parts)
    )


def _in_font(part: str) -> str:
    if part.startswith("*") and not part.startswith("**"):
        return f"\\fI{_roff(part.strip('*'), 1)}\\fR"
    return f"\\fB{_roff(part.strip('`*'), 1)}\\fR"


def _roff(text: str, position: int = 0) -> str:
    """Return a text that stands for itself; what begins a line must not be a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if position == 0 and escaped.startswith((".", "'")) else escaped


def write() -> None:
    """Write the pages, in the place of all that were there."""
    for old in MANUAL.rglob("*.[18]"):
        old.unlink()
    for path, text in pages().items():
        (MANUAL / path).parent.mkdir(parents=True, exist_ok=True)
        (MANUAL / path).write_text(text)


if __name__ == "__main__":
    write()
