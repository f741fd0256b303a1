"""Samples taken elsewhere, handed to pytest-benchmark as if it had taken them.

pytest-benchmark measures one target after the other. Then a neighbour's minute of work falls on
one of them, and the ratio between two is worth nothing. So the targets are measured in turns,
many short ones, and each benchmark *replays* its samples through pytest-benchmark's own timer
hook: its JSON, storage and comparison work as usual.

Concurrency: none; one benchmark replays at a time.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

_readings: Iterator[float] = iter(())


def replayed_time() -> float:
    """Return the next reading of the clock: the start of a round, then its end, and so on."""
    return next(_readings)


def replay(benchmark: Any, samples: tuple[float, ...], **extra: object) -> None:
    """Enter samples into a benchmark whose timer is `replayed_time`."""
    global _readings  # noqa: PLW0603 - the hook is a function without arguments
    _readings = _clock(samples)
    benchmark.extra_info.update(extra)
    benchmark.pedantic(_nothing, rounds=len(samples))


def _clock(samples: Iterable[float]) -> Iterator[float]:
    # Every round starts at 0: sums of many would round the short ones.
    return itertools.chain.from_iterable((0.0, sample) for sample in samples)


def _nothing() -> None:
    """Take the place of what was measured."""
