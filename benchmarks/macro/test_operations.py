"""The common calls, side by side: tmpfs, mounts, a C file system, a raw client, etcdctl."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, final

import pytest

from benchmarks.harness.figures import (
    Cost,
    Figures,
    Report,
    Table,
    duration,
    number,
    ratio,
    slowest,
)
from benchmarks.harness.file_operations import LARGE
from benchmarks.harness.memfs import CannotCompileError
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.sampling import Plan, in_turns
from benchmarks.harness.targets import (
    ETCDCTL,
    MEMFS,
    MODES,
    OPERATIONS,
    RAW,
    TARGETS,
    TMPFS,
    EtcdctlTarget,
    MemfsTarget,
    MountTarget,
    RawTarget,
    Target,
    TmpfsTarget,
    find_tmpfs,
    put_keys,
)
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

BASES: Final = {"to_tmpfs": TMPFS, "to_raw_client": RAW, "to_c": MEMFS}
"""What a target is compared with, if that could be measured."""

PLAN: Final = Plan(turns=40, calls=25, warm_up=20, counted=50)
SLOWER: Final = {
    "listing of 100": Plan(turns=20, calls=25, warm_up=5, counted=20),
    "listing of 10 000": Plan(turns=6, calls=5, warm_up=3, counted=5),
}
SMOKE_PLAN: Final = Plan(turns=2, calls=2, warm_up=2, counted=5)
SMOKE_LARGE: Final = 300


@dataclass(frozen=True, slots=True)
class Result:
    figures: Figures
    cost: Cost


@final
class Bench:
    """Measures an operation on all targets when the first of them is asked for.

    Attributes:
        left_out: Targets that cannot be had here, and why.
        results: By operation and target.
    """

    def __init__(
        self, targets: tuple[Target, ...], left_out: dict[str, str], *, smoke: bool
    ) -> None:
        self._targets = targets
        self._smoke = smoke
        self.left_out = left_out
        self.results: dict[str, dict[str, Result]] = {}

    def of(self, operation: str) -> dict[str, Result]:
        if operation not in self.results:
            self.results[operation] = self._measure(operation)
        return self.results[operation]

    def _measure(self, operation: str) -> dict[str, Result]:
        plan = SMOKE_PLAN if self._smoke else SLOWER.get(operation, PLAN)
        targets = [target for target in self._targets if operation in TARGETS[target.name]]
        figures = in_turns({t.name: t.sampler(operation) for t in targets}, plan)
        return {t.name: Result(figures[t.name], t.cost(operation, plan.counted)) for t in targets}

    def ratios(self, operation: str, target: str) -> dict[str, float]:
        """Return how many times what another target takes, by the names in `BASES`."""
        results = self.of(operation)
        p50 = results[target].figures.p50
        return {
            name: p50 / results[base].figures.p50
            for name, base in BASES.items()
            if base in results and base != target
        }

    def table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        numbers: list[dict[str, object]] = []
        for operation, results in self.results.items():
            for index, (target, result) in enumerate(results.items()):
                ratios = self.ratios(operation, target)
                rows.append(("" if index else operation, *_row(target, result, ratios)))
                numbers.append(
                    {"operation": operation, "target": target} | _numbers(result, ratios)
                )
        left_out = tuple(f"Without {target}: {why}." for target, why in self.left_out.items())
        return Table(
            "Operations: ratios are of medians; requests are per call",
            (
                "operation",
                "on",
                "calls",
                "p50",
                "p99",
                "/tmpfs",
                "/raw",
                "/C",
                "etcd",
                "FUSE requests",
            ),
            tuple(rows),
            (
                "",
                "FUSE requests after a + do not keep the caller waiting. < marks the slowest of"
                " fewer than 100 calls.",
                *left_out,
            ),
            name="operations",
            figures=tuple(numbers),
        )


def _row(target: str, result: Result, ratios: dict[str, float]) -> tuple[str, ...]:
    figures, cost = result.figures, result.cost
    return (
        target,
        str(len(figures.samples)),
        duration(figures.p50),
        slowest(figures),
        *(ratio(ratios[name], 1) if name in ratios else "" for name in BASES),
        "" if target in {TMPFS, MEMFS} else number(cost.etcd),
        cost.describe() if target.startswith("--") or target == MEMFS else "",
    )


def _numbers(result: Result, ratios: dict[str, float]) -> dict[str, object]:
    figures, cost = result.figures, result.cost
    return {
        "calls": len(figures.samples),
        "p50": figures.p50,
        "p99": figures.p99,
        **ratios,
        "fuse_requests": dict(cost.requests),
        "etcd_requests": cost.etcd,
    }


@pytest.fixture(scope="module")
def bench(etcd: EtcdProcess, report: Report, smoke: bool) -> Iterator[Bench]:
    memory = find_tmpfs()
    if memory is None:
        pytest.skip("there is no tmpfs to compare with")
    large = SMOKE_LARGE if smoke else LARGE
    targets: list[Target] = []
    left_out: dict[str, str] = {}
    with ExitStack() as stack:

        def add(target: Target) -> None:
            stack.callback(target.close)
            targets.append(target)

        add(TmpfsTarget(Path(mkdtemp(prefix="etcdfs-bench-", dir=memory)), large))
        put_keys(etcd, large)
        for mode in MODES:
            add(MountTarget(etcd, mode))
        try:
            add(MemfsTarget(large))
        except CannotCompileError as exc:
            left_out[MEMFS] = str(exc)
        add(RawTarget(etcd.endpoint, large))
        try:
            add(EtcdctlTarget(etcd, large))
        except FileNotFoundError as exc:
            left_out[ETCDCTL] = str(exc)
        bench = Bench(tuple(targets), left_out, smoke=smoke)
        yield bench
        if bench.results:
            report.add(bench.table())


@pytest.mark.parametrize(
    ("operation", "target"),
    [(o, t) for o in OPERATIONS for t, measured in TARGETS.items() if o in measured],
)
def test_operation(bench: Bench, benchmark: Any, operation: str, target: str) -> None:
    if target in bench.left_out:
        pytest.skip(bench.left_out[target])
    result = bench.of(operation)[target]
    benchmark.group = operation
    replay(benchmark, result.figures.samples, **_numbers(result, bench.ratios(operation, target)))
