"""Paired timing: several ways to do the same work, in turns, so that what disturbs one disturbs the others."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Ratio", "Times", "growth", "paired", "ratio"]

Action = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a ratio over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry a round, of each action."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of one action."""
        return statistics.median(self.seconds[name])

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """Ratio of two actions, round by round."""
        return ratio(self.seconds[numerator], self.seconds[denominator])


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Median of the ratios of pairs, with their quartiles."""
    values = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    if len(values) < 2:
        return Ratio(*values * 3)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection in between."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _seconds(action: Action, calls: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    for _ in range(calls):
        action()
    wait()
    return (time.perf_counter() - started) / calls


def paired(
    actions: Mapping[str, Action],
    rounds: int,
    *,
    device: torch.device | str = "cpu",
    warm_up: int = 3,
    shortest: float = 0.03,
    seed: int = 0,
) -> Times:
    """Time all actions in each round, in random order.

    Args:
        actions: What to time, by name.
        rounds: Rounds.
        device: Where the actions run.
        warm_up: Calls of each action before the first round.
        shortest: Seconds that an action is repeated for in a round, about; its time is the mean over the repetitions.
        seed: Of the order.
    """
    device, order = torch.device(device), random.Random(seed)
    calls = {}
    with undisturbed():
        for name, action in actions.items():
            for _ in range(warm_up):
                action()
            calls[name] = max(math.ceil(shortest / max(_seconds(action, 1, device), 1e-7)), 1)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(rounds):
            names = list(actions)
            order.shuffle(names)
            for name in names:
                seconds[name].append(_seconds(actions[name], calls[name], device))
            gc.collect()
    return Times(seconds)


def growth(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent of the growth of time with size: the slope of a line through log time against log size."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    return statistics.linear_regression(x, y).slope
