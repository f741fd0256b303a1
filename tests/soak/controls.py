"""Negative controls: defects that are planted in the daemon, and what must catch each.

Knows: which faults and what load bring each defect to light. How it is planted is in
`defects/sitecustomize.py`, which the daemon's Python imports before anything else; etcdfs itself
knows nothing of it. A checker that cannot fail proves nothing.

Concurrency: see the conductor.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.soak.conductor import Conductor
from tests.soak.table import FAULTS

NO_AUDIT: Final = ("--audit-interval", "0")
"""Without the audit, which would mend what these defects do before anybody has looked."""


TRIES: Final = 3
"""Runs in which a defect must be caught once: some show only if nothing else has been first."""


@dataclass(frozen=True, slots=True)
class Control:
    """One planted defect.

    Attributes:
        name: Its name in `defects/sitecustomize.py`.
        faults: Titles of the faults during which it shows.
        signs: What it may be caught by: words in the list of failures.
        options: Options of the mounts without which something else would mend it.
    """

    name: str
    faults: tuple[str, ...]
    signs: tuple[str, ...]
    options: tuple[str, ...] = ()


def soaks_defects() -> Any:
    """Return the module in which the defects are, for whoever plants them in this process.

    Its `replace` is to be replaced by one that can be undone.
    """
    path = Path(__file__).parent / "defects" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("soaks_defects", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_control(control: Control, releases: dict[str, Path], seed: int) -> bool:
    """Run with a defect; return whether it was caught, by what should catch it."""
    release, binary = next(iter(releases.items()))
    faults = [fault for fault in FAULTS if fault.title in control.faults]
    assert len(faults) == len(control.faults), control
    by: list[str] = []
    for attempt in range(TRIES):
        conductor = Conductor(seed=seed + attempt, defect=control.name)
        conductor.run({release: binary}, faults, duration_s=0, options=control.options)
        conductor.report(faults)
        by = [found for found in conductor.failures if any(s in found for s in control.signs)]
        if by:
            break
    print(f"defect {control.name}: " + (f"caught: {by[0][:150]}" if by else "NOT CAUGHT"))  # noqa: T201
    return bool(by)


CALM: Final = ("+ nothing at all",)
"""What these defects do, they do under any load."""

_ALL: Final = (
    Control("drop-notification", CALM, ("stale", "differs")),
    Control("early-publish", CALM, ("stale", "inverted")),
    Control("negative-entries", CALM, ("stale", "differs")),
    Control("keep-cache-always", CALM, ("stale", "torn", "differs")),
    Control(
        "no-deduplication",
        ("11 events are told twice",),
        ("made a new version", "backwards", "stale", "inverted"),
    ),
    Control("out-of-order", CALM, ("stale", "inverted", "differs")),
    Control("split-revision", CALM, ("inverted", "stale")),
    Control(
        "no-witness",
        (
            "9 the data is wiped, and filled again beyond",
            "10 restored from a snapshot, and overtaken",
        ),
        ("in step",),
        NO_AUDIT,
    ),
    Control("resume-too-late", ("3 half-open connection",), ("stale", "in step"), NO_AUDIT),
    Control("no-diff", ("7 compaction while disconnected",), ("differs", "stale"), NO_AUDIT),
    Control("lying-wait", CALM, ("stale", "differs")),
    Control("retry-write", ("6 the answer to a write is lost",), ("doubled",)),
    Control("wrong-range-end", CALM, ("stale", "differs"), NO_AUDIT),
    Control(
        "no-hasleader",
        ("4 the member in use is cut off from the others",),
        ("cut off",),
        (*NO_AUDIT, "--watch-timeout", "60"),
    ),
    Control("lost-acknowledgement", CALM, ("lost",)),
    Control("blind-overwrite", CALM, ("lost update",)),
    Control("event-before-content", CALM, ("unheard",)),
    Control("lost-event", CALM, ("unheard",)),
    Control("event-twice", CALM, ("x twice",)),
    Control("replay-reaches-etcd", CALM, ("doubled",)),
)

CONTROLS: Final = {control.name: control for control in _ALL}
