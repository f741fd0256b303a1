"""The run: every fault in every arena, on every release, until the time is up.

Knows: the order of things, what is checked after each fault, and what the report says. Does not
know: how a fault is made.

Concurrency: one thread conducts.
"""

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO, final

from tests.soak import (
    faults_apart,
    faults_cluster,
    faults_files,
    faults_guarded,
    faults_hostile,
    faults_single,
    faults_tamper,
)
from tests.soak.arena import Arena, Conditions
from tests.soak.control import until
from tests.soak.etcds import why_no_namespaces
from tests.soak.faults_single import check
from tests.soak.history import EVENT_FAULTS, FOREVER, READ_FAULTS, WRITE_FAULTS, Verdict
from tests.soak.mounts import Mount
from tests.soak.table import ELSEWHERE, Fault

MODULES: Final = (
    faults_apart,
    faults_cluster,
    faults_files,
    faults_guarded,
    faults_hostile,
    faults_single,
    faults_tamper,
)
"""Imported so that their faults are in the table."""

ARENAS: Final = ("single", "tamper", "cluster", "apart", "guarded")
PUTS: Final = 200
"""Puts for each figure of propagation; a fifth of it in a run that only makes each fault once."""


@dataclass(slots=True)
class Row:
    """What became of one fault on one release."""

    times: int = 0
    longest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


@final
class Conductor:
    """Runs faults and keeps the report."""

    def __init__(self, *, seed: int, defect: str = "", out: TextIO = sys.stdout) -> None:
        self._chance = random.Random(seed)
        self._seed = seed
        self._defect = defect
        self._out = out
        self.rows: dict[tuple[str, str], Row] = {}
        self.conditions: list[Conditions] = []
        self.broken: list[str] = []
        self.missing: list[str] = []
        self._bounds: dict[str, float] = {}
        self._ends: float = FOREVER
        self._puts = PUTS

    def run(
        self,
        releases: dict[str, Path],
        faults: Sequence[Fault],
        *,
        duration_s: float,
        options: tuple[str, ...] = (),
    ) -> None:
        """Make every fault at least once on every release, and go on until the time is up."""
        share = duration_s / len(releases)
        self._puts = PUTS if duration_s else PUTS // 5
        for release, binary in releases.items():
            conditions = Conditions(
                release=release,
                binary=binary,
                chance=self._chance,
                defect=self._defect,
                options=options,
            )
            self.conditions.append(conditions)
            ends = time.monotonic() + share
            self._ends = FOREVER  # of the first round every fault is made
            self._round(conditions, faults)
            self._ends = ends
            while time.monotonic() < ends:
                self._round(conditions, faults)

    def _round(self, conditions: Conditions, faults: Sequence[Fault]) -> None:
        why_not = why_no_namespaces()
        for kind in self._chance.sample(ARENAS, len(ARENAS)):
            wanted = [fault for fault in faults if fault.arena == kind]
            if kind == "cluster" and wanted and why_not is not None:
                self.missing.append(f"{len(wanted)} faults of a cluster: {why_not}")
                continue
            if wanted and time.monotonic() < self._ends:
                self._chance.shuffle(wanted)
                self._say(f"\n# etcd {conditions.release}, {kind}")
                try:
                    self._in_arena(conditions, kind, wanted)
                except Exception as exc:  # noqa: BLE001 - it is reported, and the run goes on
                    self._break(f"{conditions.release} {kind}: {type(exc).__name__}: {exc}")

    def _in_arena(self, conditions: Conditions, kind: str, wanted: Iterable[Fault]) -> None:
        with Arena(conditions, kind) as arena:
            waiting = arena.control_file_system()
            if kind in {"apart", "guarded"}:
                for fault in wanted:
                    self._one(arena, fault)
            else:
                with arena.watchdog(3600), arena.loaded() as load:
                    for fault in wanted:
                        load.until_busy()
                        if time.monotonic() < self._ends:
                            self._one(arena, fault)
                    if kind != "tamper":
                        arena.measure_propagation(self._puts)
            self._judge(arena, waiting)

    def _judge(self, arena: Arena, waiting: Callable[[Mount], int] | None) -> None:
        where = f"{arena.conditions.release} {arena.kind}"
        for line in arena.bugs()[:3]:
            self._break(f"{where}: the daemon logged {line}")
        if waiting is not None:
            for mount in (arena.reader, arena.author):
                try:
                    until(lambda mount=mount: waiting(mount) == 0, "", 30)  # type: ignore[misc]
                except Exception as exc:  # noqa: BLE001 - whatever it is, the mount is not well
                    self._break(f"{where}: {mount.name} has requests without an answer: {exc}")

    def _one(self, arena: Arena, fault: Fault) -> None:
        row = self.rows.setdefault((arena.conditions.release, fault.title), Row())
        self._bounds[fault.title] = fault.bound_s
        row.times += 1
        load = arena.load
        failed = 0 if load is None else load.failed_reads()
        began = time.monotonic()
        try:
            with arena.watchdog():
                fault.inject(arena)
                took = arena.recovered(fault.bound_s, history=fault.history)
            row.longest_s = max(row.longest_s, took)
            more = 0 if load is None else load.failed_reads() - failed
            check(fault.reads_fail or not more, f"{more} reads failed")
            outcome = f"recovered after {took:.1f} s"
        except Exception as exc:  # noqa: BLE001 - it is reported, and the run goes on
            outcome = f"{type(exc).__name__}: {exc}"
            row.failures.append(outcome)
            outcome = f"FAILED: {outcome}"
            with contextlib.suppress(Exception):
                arena.revive()
        self._say(f"{time.monotonic() - began:6.1f} s  {fault.title}: {outcome}")

    # --- the report -------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict:
        total = Verdict()
        for conditions in self.conditions:
            total.add(conditions.verdict)
        return total

    @property
    def failures(self) -> list[str]:
        """Return everything that was not as it must be."""
        found = [
            f"etcd {release}: {title}: {failure}"
            for (release, title), row in self.rows.items()
            for failure in row.failures
        ]
        found += self.broken + self.missing
        return found + [f"{count} x {fault}" for fault, count in self.verdict.counts.items()]

    def report(self, faults: Sequence[Fault]) -> None:
        """Say what happened."""
        self._say(f"\n# Report (seed {self._seed}{self._defect and f', defect {self._defect}'})")
        self._say(f"\n{'etcd':5}{'fault':66}{'times':>6}{'recovered':>11}{'bound':>7}")
        for (release, title), row in sorted(self.rows.items()):
            mark = f"  FAILED {len(row.failures)} times" if row.failures else ""
            self._say(
                f"{release:5}{title:66}{row.times:>6}{row.longest_s:>9.1f} s"
                f"{self._bounds[title]:>5.0f} s{mark}"
            )
        made = {title for _, title in self.rows}
        for fault in faults:
            if fault.title not in made:
                self.missing.append(f"{fault.title} did not happen")
        verdict = self.verdict
        self._say("")
        for conditions in self.conditions:
            self._say(_propagation(conditions))
        faults_seen = (*READ_FAULTS, *WRITE_FAULTS, *EVENT_FAULTS)
        counts = Counter(dict.fromkeys(faults_seen, 0)) + verdict.counts
        wrong = ", ".join(f"{fault} {counts[fault]}" for fault in faults_seen)
        self._say(
            f"total: reads {verdict.reads}, writes {verdict.writes} "
            f"({verdict.unknown} more with an unknown outcome), "
            f"failed reads {verdict.errors} {dict(verdict.failures) or ''}, "
            f"inotify events {verdict.heard}, of {verdict.stayed} versions that stayed"
        )
        self._say(f"       {wrong}")
        for example in verdict.examples[:20]:
            self._say(f"  {example}")
        for failure in self.failures:
            self._say(f"FAILED {failure}")
        for name, why in ELSEWHERE.items():
            self._say(f"not made: {name} ({why})")
        self._say("clean" if not self.failures else f"{len(self.failures)} failures")

    def _break(self, what: str) -> None:
        self.broken.append(what)
        self._say(f"FAILED: {what}")

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def _propagation(conditions: Conditions) -> str:
    parts = []
    for name, times in (("mount", conditions.mount), ("raw watch", conditions.raw)):
        for what, index in (("of the answer", 1), ("of sending", 0)):
            found = sorted(time[index] * 1000 for time in times)
            if found:
                half, most = found[len(found) // 2], found[len(found) * 99 // 100]
                parts.append(f"{name}, ms {what}: p50 {half:.2f} p99 {most:.2f}")
    return f"etcd {conditions.release}: seen within, " + "; ".join(parts or ["not measured"])
