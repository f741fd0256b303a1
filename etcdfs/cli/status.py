"""`etcdfs status`: asks mounts how they are, and shows it to a person or a program.

Knows: how a mount is asked without being waited for, and what of its status document a person
wants to see first. Does not know: how the values come about (`etcdfs.daemon.status`).

A mount whose daemon hangs holds whoever asks it, and that cannot even be killed. So a process of
its own asks, and is left to itself when no answer comes.

Concurrency: plain blocking code, each wait bounded.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from etcdfs.errors import NotAnsweringError, NotMountedError
from etcdfs.process.mountpoint import Mounted, find_mounted, find_mounts
from etcdfs.process.printable import printable

ANSWER_TIMEOUT_S: Final = 5.0
"""How long a mount may take to say how it is; all of it is in its memory."""

_ASK: Final = "import os, sys; os.write(1, os.getxattr(sys.argv[1], 'user.etcdfs.statistics'))"
"""Not the file in the control directory: a mount may be without it."""

_READ_CONFIG: Final = "import sys; sys.stdout.write(open(sys.argv[1] + '/.etcdfs/config').read())"

_WIDTH: Final = 120  # where there is no terminal
_KINDS: Final = 6  # of requests that are shown

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one mount said.

    Attributes:
        mountpoint: Which one.
        status: Its status document; None if there was none.
        error: Why not; empty if there was one.
    """

    mountpoint: str
    status: Document | None = None
    error: str = ""


def show_status(mountpoint: str | None, *, as_json: bool, watch: bool, interval_s: float) -> None:
    """Print how a mount is, or all mounts of the machine; with `watch` again and again.

    Args:
        mountpoint: As `resolve` returns it; None for all that are there.
        as_json: The status document, or a list of `Answer`; one line each time with `watch`.
        watch: Until it is interrupted.
        interval_s: How often.

    Raises:
        NotMountedError: There is no such mount, or none at all.
        NotAnsweringError: One of them did not say how it is.
    """
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    answers = ask(mountpoint)
    if not watch:
        if as_json:
            _print_json(answers, mountpoint, indent=2)
        elif mountpoint is None or not answers[0].error:
            console.print(_shown(answers, {}, mountpoint))
        for answer in answers:
            if answer.error:
                raise NotAnsweringError(f"{answer.mountpoint}: {answer.error}")
        return
    try:
        if as_json:
            _follow_json(answers, mountpoint, interval_s)
        else:
            _follow(console, answers, mountpoint, interval_s)
    except KeyboardInterrupt:  # that is how it is ended
        return


def _follow_json(answers: Sequence[Answer], mountpoint: str | None, interval_s: float) -> None:
    while True:
        _print_json(answers, mountpoint, indent=None)
        threading.Event().wait(interval_s)
        answers = ask(mountpoint)


def _follow(
    console: Console, answers: Sequence[Answer], mountpoint: str | None, interval_s: float
) -> None:
    before: dict[str, Document] = {}
    live = Live(console=console, screen=True, auto_refresh=False)
    with live if console.is_terminal else nullcontext():
        while True:
            shown = _shown(answers, before, mountpoint)
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            threading.Event().wait(interval_s)
            before = {a.mountpoint: a.status for a in answers if a.status is not None}
            answers = ask(mountpoint)


def _print_json(answers: Sequence[Answer], mountpoint: str | None, *, indent: int | None) -> None:
    found: Any = [asdict(answer) for answer in answers]
    if mountpoint is not None:
        found = answers[0].status
    if found is not None:
        sys.stdout.write(json.dumps(found, indent=indent) + "\n")
        sys.stdout.flush()


# --- asking ---------------------------------------------------------------------------------


def ask(mountpoint: str | None) -> list[Answer]:
    """Ask a mount, or all that this process sees.

    Raises:
        NotMountedError: There is none.
    """
    if mountpoint is None:
        mounts = [mounted for mounted in find_mounts() if mounted.ours]
        if not mounts:
            raise NotMountedError("no etcdfs is mounted")
    else:
        found = find_mounted(mountpoint)
        if found is None or not found.ours:
            raise NotMountedError(f"no etcdfs is mounted on {mountpoint}")
        mounts = [found]
    with ThreadPoolExecutor(max_workers=len(mounts)) as threads:  # many may keep quiet
        return list(threads.map(_ask, mounts))


def read_config(mountpoint: str) -> dict[str, Any] | None:
    """Return what a mount was told, without secrets; None if nothing of ours is mounted there.

    Raises:
        NotAnsweringError: It is, and does not say: its daemon is gone, or it has no control
            directory.
    """
    mounted = find_mounted(mountpoint)
    if mounted is None or not mounted.ours:
        return None
    answer = _ask(mounted, _READ_CONFIG)
    if answer.error:
        raise NotAnsweringError(f"{mountpoint} does not say its options: {answer.error}")
    return None if answer.status is None else dict(answer.status)


def _ask(mounted: Mounted, question: str = _ASK) -> Answer:
    path = mounted.path
    asking = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", question, path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        said, complaint = asking.communicate(timeout=ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        asking.kill()
        # It may end no sooner than the mount does; only a thread waits for that.
        threading.Thread(target=asking.communicate, daemon=True).start()
        return Answer(mountpoint=path, error=f"no answer within {ANSWER_TIMEOUT_S:g} s")
    if asking.returncode != 0:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        return Answer(mountpoint=path, error=_why(last))
    status = json.loads(said)
    if question == _ASK and "mount" not in status:
        return Answer(mountpoint=path, error="its daemon is of an older version of etcdfs")
    return Answer(mountpoint=path, status=status)


def _why(complaint: str) -> str:
    if "[Errno 107]" in complaint or "[Errno 103]" in complaint:  # ENOTCONN, ECONNABORTED
        return "its daemon is gone; etcdfs umount clears it"
    if "[Errno 13]" in complaint or "[Errno 1]" in complaint:
        return "only root and whoever mounted it may ask"
    return printable(complaint.partition(": ")[2] or complaint)


# --- showing --------------------------------------------------------------------------------


def _shown(
    answers: Sequence[Answer], before: Mapping[str, Document], mountpoint: str | None
) -> RenderableType:
    if mountpoint is None:
        return _overview(answers)
    (answer,) = answers
    if answer.status is None:
        return Text(printable(f"{answer.mountpoint}: {answer.error}"))
    return _details(answer.status, before.get(answer.mountpoint))


def _overview(answers: Sequence[Answer]) -> RenderableType:
    table = Table(box=box.SIMPLE)
    for heading in ("mountpoint", "prefix", "etcd", "mode", "revision", "state"):
        table.add_column(heading, overflow="fold")
    for answer in answers:
        if answer.status is None:
            cells = ["", "", "", "", answer.error]
        else:
            status = answer.status
            mount, store = status["mount"], status["store"]
            cells = [mount["prefix"], store["endpoint"], mount["mode"], str(_revision(status))]
            cells.append(state_of(status))
        table.add_row(*(Text(printable(cell)) for cell in (answer.mountpoint, *cells)))
    return table


def _details(status: Document, before: Document | None) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines(status, before):
        table.add_row(name, Text(printable(value)))
    return Group(table)


def lines(status: Document, before: Document | None = None) -> Iterator[tuple[str, str]]:
    """Yield what a person wants to see of a status document, with rates since an earlier one."""
    mount, store, cache = status["mount"], status["store"], status["value_cache"]
    yield "mount", f"{mount['mountpoint']} ({mount['access']}, {mount['mode']})"
    yield (
        "daemon",
        f"etcdfs {mount['version']}, process {mount['pid']}, up {_time(mount['uptime_s'])}",
    )
    yield "prefix", mount["prefix"] or "(all keys)"
    others = [each for each in store["endpoints"] if each != store["endpoint"]]
    yield "etcd", " ".join([f"{store['endpoint']} (in use)", *others])
    yield "state", state_of(status)
    mirror = status.get("mirror")
    lag = f", {mirror['lag']} behind what etcd has answered with" if mirror else ""
    yield "revision", f"{_revision(status)}{lag}"
    if mirror:
        yield (
            "keys",
            f"{mirror['keys']} with {_size(mirror['bytes'])}; {mirror['listed_keys']} at the last"
            f" listing, {mirror['events']} changes since",
        )
    asked = cache["hits"] + cache["misses"]
    hits = f", {cache['hits'] / asked:.0%} of {asked} reads from it" if asked else ""
    yield (
        "values",
        f"{cache['entries']} in {_size(cache['size'])} of {_size(cache['capacity'])}{hits}",
    )
    yield "requests", _requests(status, before)
    kernel = status["kernel"]
    stuck = f", {kernel['stuck']} directories stuck" if kernel["stuck"] else ""
    yield "invalidations", f"{kernel['invalidated']} done, {kernel['waiting']} waiting{stuck}"
    told = status["inotify"]
    yield (
        "inotify",
        f"{told['replayed']} changes told, {told['waiting']} waiting, {told['dropped']} dropped",
    )
    dirty = status["write_buffer"]
    yield "files", f"{status['open_files']} open, {dirty['files']} dirty ({_size(dirty['size'])})"
    for name, section in (("audits", "audit"), ("of attributes", "attribute_audit")):
        if audit := status.get(section):
            found = (
                f"{audit['differences']} differences mended"
                if audit["differences"]
                else "no difference"
            )
            yield (
                name,
                f"{audit['audits']} of {audit['keys']} keys, {audit['failed']} failed: {found}",
            )
    if kept := status.get("snapshot"):
        yield "snapshot", _snapshot(kept)
    problems = status["log"]
    if problems["last_problem"]:
        count = problems["warnings"] + problems["errors"]
        since = _time(mount["started_at"] + mount["uptime_s"] - problems["last_problem_at"])
        yield "last problem", f"{problems['last_problem']} ({since} ago; {count} in all)"


def state_of(status: Document) -> str:
    """Return in one line whether a mount is well."""
    staleness = status.get("staleness")
    if staleness is None:
        return "asks etcd every time"
    if staleness["refused"]:
        return f"shows nothing: {staleness['refused']}"
    since = _time(staleness["state_s"])
    if not staleness["connected"]:
        return f"not connected for {since}; shows what it had {_time(staleness['stale_s'])} ago"
    return f"connected for {since}"


def _revision(status: Document) -> int:
    return int(status.get("mirror", status["store"])["revision"])


def _requests(status: Document, before: Document | None) -> str:
    """Return the most frequent requests of the kernel, per second if there is an earlier count."""
    counts: Mapping[str, int] = status["requests"]
    elapsed_s = 0.0 if before is None else status["mount"]["uptime_s"] - before["mount"]["uptime_s"]
    if before is None or elapsed_s <= 0:  # the first time, or the daemon is another
        rates = {name: float(count) for name, count in counts.items()}
        unit, form = "", "{:.0f}"
    else:
        earlier = before["requests"]
        rates = {name: (n - earlier.get(name, 0)) / elapsed_s for name, n in counts.items()}
        unit, form = "/s", "{:.1f}"
    most = sorted(rates, key=lambda name: (-rates[name], name))[:_KINDS]
    total = form.format(sum(rates.values()))
    kinds = ", ".join(f"{name} {form.format(rates[name])}" for name in most if rates[name])
    return f"{total}{unit}" + (f" ({kinds})" if kinds else "")


def _snapshot(kept: Mapping[str, Any]) -> str:
    return "; ".join(
        [
            f"{kept['keys']} keys of revision {kept['revision']}, {_time(kept['age_s'])} old",
            _size(kept["size"]),
            *(["shown, as etcd does not answer"] if kept["offline"] else []),
            *([f"it cannot be written: {kept['error']}"] if kept["error"] else []),
        ]
    )


def _time(seconds: float) -> str:
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
