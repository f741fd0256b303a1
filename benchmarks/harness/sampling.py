"""Measuring several targets in turns, so that noise falls on all of them alike.

Concurrency: plain calls, one at a time; the garbage collector waits meanwhile.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from benchmarks.harness.figures import Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        turns: How often each target has its turn.
        calls: Calls in one turn.
        warm_up: Calls before anything counts.
        counted: Calls whose requests are counted afterwards.
    """

    turns: int
    calls: int
    warm_up: int
    counted: int


Sampler = Callable[[int], list[float]]
"""Makes so many calls and returns how long each took."""


def in_turns(samplers: Mapping[str, Sampler], plan: Plan) -> dict[str, Figures]:
    """Return the figures of every target; who goes first changes from turn to turn."""
    for sample in samplers.values():
        sample(plan.warm_up)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    for _ in range(plan.turns):
        for name in order:
            with _no_collector():
                samples[name] += samplers[name](plan.calls)
        order.append(order.pop(0))
    return {name: Figures(tuple(taken)) for name, taken in samples.items()}


def timed(call: Callable[[], object]) -> Sampler:
    """Return a sampler of a plain call."""

    def sample(count: int) -> list[float]:
        taken: list[float] = []
        for _ in range(count):
            begun = perf_counter()
            call()
            taken.append(perf_counter() - begun)
        return taken

    return sample


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
