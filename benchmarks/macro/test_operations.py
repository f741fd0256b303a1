"""The common calls, side by side: tmpfs, both kinds of mount, a raw client."""

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
from benchmarks.harness.replay import replay, replayed_time
from benchmarks.harness.sampling import Plan, in_turns
from benchmarks.harness.targets import (
    LARGE,
    OPERATIONS,
    MountTarget,
    RawTarget,
    Target,
    TmpfsTarget,
    find_tmpfs,
)
from tests.support.etcd_process import EtcdProcess

pytestmark = [pytest.mark.benchmark(timer=replayed_time), pytest.mark.timeout(600)]

TARGETS: Final = ("tmpfs", "--cache", "--no-cache", "raw client")
PLAN: Final = Plan(turns=40, calls=25, warm_up=20, counted=50)
SLOWER: Final = {
    "listdir 100": Plan(turns=20, calls=25, warm_up=5, counted=20),
    "listdir 10 000": Plan(turns=6, calls=5, warm_up=2, counted=5),
}
SMOKE_PLAN: Final = Plan(turns=2, calls=2, warm_up=2, counted=5)
SMOKE_LARGE: Final = 300


@dataclass(frozen=True, slots=True)
class Result:
    figures: Figures
    cost: Cost


@final
class Bench:
    """Measures an operation on all targets when the first of them is asked for."""

    def __init__(self, targets: tuple[Target, ...], *, smoke: bool) -> None:
        self._targets = targets
        self._smoke = smoke
        self.results: dict[str, dict[str, Result]] = {}

    def result(self, operation: str, target: str) -> Result:
        if operation not in self.results:
            self.results[operation] = self._measure(operation)
        return self.results[operation][target]

    def _measure(self, operation: str) -> dict[str, Result]:
        plan = SMOKE_PLAN if self._smoke else SLOWER.get(operation, PLAN)
        figures = in_turns({t.name: t.sampler(operation) for t in self._targets}, plan)
        return {
            t.name: Result(figures[t.name], t.cost(operation, plan.counted)) for t in self._targets
        }

    def table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for operation, results in self.results.items():
            tmpfs, raw = results["tmpfs"].figures.p50, results["raw client"].figures.p50
            for index, (target, result) in enumerate(results.items()):
                figures, cost = result.figures, result.cost
                is_mount = target.startswith("--")
                rows.append(
                    (
                        "" if index else operation,
                        target,
                        str(len(figures.samples)),
                        duration(figures.p50),
                        slowest(figures),
                        ratio(figures.p50, tmpfs),
                        ratio(figures.p50, raw),
                        "" if target == "tmpfs" else number(cost.etcd),
                        cost.describe() if is_mount else "",
                    )
                )
        return Table(
            "Operations: ratios are of medians; FUSE and etcd requests are per call",
            ("operation", "on", "calls", "p50", "p99", "/tmpfs", "/raw", "etcd", "FUSE requests"),
            tuple(rows),
            (
                "",
                "FUSE requests after a + do not keep the caller waiting. < marks the slowest of"
                " fewer than 100 calls.",
            ),
        )


@pytest.fixture(scope="module")
def bench(etcd: EtcdProcess, report: Report, smoke: bool) -> Iterator[Bench]:
    memory = find_tmpfs()
    if memory is None:
        pytest.skip("there is no tmpfs to compare with")
    large = SMOKE_LARGE if smoke else LARGE
    with ExitStack() as stack:

        def closed_at_the_end(target: Target) -> Target:
            stack.callback(target.close)
            return target

        directory = Path(mkdtemp(prefix="etcdfs-bench-", dir=memory))
        bench = Bench(
            (
                closed_at_the_end(TmpfsTarget(directory, large)),
                closed_at_the_end(MountTarget(etcd, "--cache", large)),
                closed_at_the_end(MountTarget(etcd, "--no-cache", large)),
                closed_at_the_end(RawTarget(etcd.endpoint, large)),
            ),
            smoke=smoke,
        )
        yield bench
        if bench.results:
            report.add(bench.table())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(bench: Bench, benchmark: Any, operation: str, target: str) -> None:
    result = bench.result(operation, target)
    benchmark.group = operation
    replay(
        benchmark,
        result.figures.samples,
        p50=result.figures.p50,
        p99=result.figures.p99,
        to_tmpfs=result.figures.p50 / bench.result(operation, "tmpfs").figures.p50,
        to_raw_client=result.figures.p50 / bench.result(operation, "raw client").figures.p50,
        fuse_requests=dict(result.cost.requests),
        etcd_requests=result.cost.etcd,
    )
