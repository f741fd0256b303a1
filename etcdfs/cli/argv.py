"""The command line at a glance, before it is parsed.

Knows: how to tell what a command line is about without knowing its options. Does not know: anything
that takes time to import (see `spawn`).

Concurrency: none; pure functions.
"""

import os

_WITH_MOUNTPOINT = {"mount", "umount", "status", "doctor"}
"""Commands that a path may follow; the first field of fstab cannot be one of them."""

_NOT_IN_BACKGROUND = {"-f", "--foreground", "-h", "--help", "--version"}


def original_form(arguments: list[str]) -> list[str]:
    """Return the arguments with a form that has no command in it spelt out as `mount ...`.

    * `MOUNTPOINT ENDPOINT ...`: the short form.
    * `SOURCE MOUNTPOINT -o OPTIONS`, with an absolute mountpoint: how mount.fuse3 calls us for
      `mount -t fuse.etcdfs` and fstab.

    A first argument that is no directory, before a second that is no endpoint, is left to
    fail as the mistyped command it probably is.
    """
    match arguments:
        case [first, second, *_] if (
            first in _WITH_MOUNTPOINT or first.startswith("-") or second.startswith("-")
        ):
            return arguments
        case [source, mountpoint, *rest] if mountpoint.startswith("/") and not source.startswith(
            ("/", ".")
        ):
            return ["mount", mountpoint, *_source_options(source), *_from_fstab(rest)]
        case [mountpoint, endpoint, *rest] if "/" in mountpoint or ":" in endpoint:
            return ["mount", mountpoint, "--endpoints", endpoint, *rest]
        case _:
            return arguments


def _source_options(source: str) -> list[str]:
    """Return what the first field of fstab says: endpoints, perhaps a prefix, or just a label.

    mount(8) must find it in the list of mounts again, or `mount -a` would mount it twice.
    """
    shown = [] if set(source) & set(", \\") else ["-o", f"fsname={source}"]
    if ":" not in source:
        return shown
    if source.startswith("unix://"):  # all of it is a path
        return ["--endpoints", source, *shown]
    scheme = source.rfind("://")
    slash = source.find("/", 0 if scheme < 0 else scheme + 3)
    endpoints, prefix = (source, "") if slash < 0 else (source[:slash], source[slash:])
    named = ["--endpoints", endpoints, *shown]
    return named if prefix in {"", "/"} else [*named, "--prefix", prefix]


def _from_fstab(options: list[str]) -> list[str]:
    """Return options without those that mount.fuse3 and mount(8) add, and no mount of ours has."""
    return [
        ",".join(part for part in text.split(",") if part not in {"dev", "suid"})
        if before == "-o"
        else text
        for before, text in zip(["", *options], options, strict=False)
    ]


HELPER = "mount.etcdfs"
"""The name by which mount(8) finds us for `mount -t etcdfs`."""


def helper_form(arguments: list[str]) -> list[str] | None:
    """Return what mount(8) asks of its helper, as a command line of `etcdfs`.

    That is `SOURCE MOUNTPOINT [-fnrsvw] [-o OPTIONS] [-t TYPE]` (mount(8), "EXTERNAL HELPERS").
    `-n`, `-s` and `-v` mean nothing here; what else there may be is left to fail as an option.

    Returns:
        None for `-f`: nothing is to be done.
    """
    operands: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in {"-o", "-t"}:
            value = next(rest, "")
            options += ["-o", value] if argument == "-o" else []
        elif argument.startswith("-") and set(argument[1:]) <= _HELPER_FLAGS:
            if "f" in argument:
                return None
            options += [part for flag in argument[1:] for part in _MEANINGS.get(flag, ())]
        else:
            (options if argument.startswith("-") else operands).append(argument)
    if len(operands) != _HELPER_OPERANDS:
        return ["mount", "--help"]
    source, mountpoint = operands
    return ["mount", mountpoint, *_source_options(source), *_from_fstab(options)]


_HELPER_FLAGS = frozenset("fnrsvw")
_HELPER_OPERANDS = 2
_MEANINGS = {"r": ("-o", "ro"), "w": ("-o", "rw")}


def has_empty_operand(arguments: list[str]) -> bool:
    """Say whether an argument that is no option's value is empty: a variable that was not set.

    As a path it would mean the current directory.
    """
    pairs = zip(["", *arguments], arguments, strict=False)
    return any(not text and not before.startswith("-") for before, text in pairs)


def likely_mountpoint(arguments: list[str]) -> str | None:
    """Return where a daemon will probably be wanted; None if it will not be.

    This is a guess, and need be no more: a wrong one costs time. Without knowing which options
    take a value, an argument counts that does not follow an option, else the last one.
    """
    match original_form(arguments):
        case ["mount", *rest] if not _NOT_IN_BACKGROUND & set(rest):
            pairs = list(zip(["mount", *rest], rest, strict=False))
        case _:
            return None
    operands = [(before, text) for before, text in pairs if text and not text.startswith("-")]
    if not operands:
        return None
    sure = [text for before, text in operands if not before.startswith("-")]
    return _absolute(sure[0] if sure else operands[-1][1])


def _absolute(path: str) -> str | None:
    """Return the path as `mountpoint.resolve` gives it for a directory, without touching that.

    A mount whose daemon hangs blocks whoever touches it. Paths that end in a link or in `..`
    are not worth more.
    """
    parent, name = os.path.split(path.rstrip("/"))
    if name in {"", ".", ".."}:
        return None
    try:
        return os.path.join(os.path.realpath(parent), name)
    except OSError:  # there is no current directory
        return None
