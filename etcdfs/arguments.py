"""The command line at a glance, before it is parsed.

What this room knows: how to tell what a command line is about without knowing its options. What
it must not know: anything that takes time to import (see `spawn`).

Concurrency: none; pure functions.
"""

import os

_NOT_IN_BACKGROUND = {"-f", "--foreground", "-h", "--help", "--version"}


def original_form(arguments: list[str]) -> list[str]:
    """Return the arguments with `MOUNTPOINT ENDPOINT ...` spelt out as `mount ...`.

    A first argument that is no directory, before a second that is no endpoint, is left to
    fail as the mistyped command it probably is.
    """
    match arguments:
        case [mountpoint, endpoint, *rest] if (
            mountpoint not in {"mount", "umount"}
            and not mountpoint.startswith("-")
            and not endpoint.startswith("-")
            and ("/" in mountpoint or ":" in endpoint)
        ):
            return ["mount", mountpoint, "--endpoints", endpoint, *rest]
        case _:
            return arguments


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
    return os.path.join(os.path.realpath(parent), name)
