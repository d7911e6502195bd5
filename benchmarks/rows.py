"""What a row of the table is: the work, its target, and the measurement that fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from benchmarks.timing import Ratio

__all__ = ["Benchmark", "Measurement", "Options", "Skipped", "in_milliseconds"]


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: Rounds of paired timing.
        quick: Whether smaller sizes will do where the time is long: a look, not a result.
        tiny: Whether sizes are as small as can be, for the tests; the figures mean nothing then.
        device: Where the models are.
    """

    rounds: int = 15
    quick: bool = False
    tiny: bool = False
    device: str = "cpu"

    def size(self, full: int, quick: int | None = None, tiny: int | None = None) -> int:
        """The size that goes with the options."""
        if self.tiny and tiny is not None:
            return tiny
        return quick if (self.quick or self.tiny) and quick is not None else full


class Skipped(Exception):
    """There is no measurement here, for the reason given."""


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        value: The figure that the target is about.
        quartiles: Its quartiles over the rounds, where there are some.
        ratio: What the guard compares, where it is not the value itself.
        seconds: Absolute times by name, for information: they are never compared.
        details: Anything else, by name.
        met: Whether the target is met, where value and limit alone do not say.
    """

    value: float
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    met: bool | None = None

    @classmethod
    def of(cls, ratio: Ratio, seconds: Mapping[str, float], **details: Any) -> Measurement:
        """A ratio with its quartiles."""
        return cls(ratio.median, (ratio.low, ratio.high), seconds=dict(seconds), details=details)


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    Attributes:
        name: Short name, for `--only`.
        work: What is done.
        target: What is wanted, in words.
        measure: Does it.
        limit: The number in the target; None for figures without one.
        better: Whether a higher or a lower figure is better.
        format: Format of the figure, with its unit.
        guarded: What the guard compares: the value, the measurement's ratio (where lower is better), or nothing.
        once: Whether it is measured with one number of threads only.
        long: Whether it takes minutes, so that --quick leaves it out.
        asked: Whether it is measured only where `--only` names it.
    """

    name: str
    work: str
    target: str
    measure: Callable[[Options], Measurement]
    limit: float | None = None
    better: Literal["higher", "lower"] = "lower"
    format: str = "{:.2f} ×"
    guarded: Literal["value", "ratio", "nothing"] = "nothing"
    once: bool = False
    long: bool = False
    asked: bool = False

    def met(self, measurement: Measurement) -> bool | None:
        """Whether the target is met; None where there is none."""
        if measurement.met is not None or self.limit is None:
            return measurement.met
        if self.better == "higher":
            return measurement.value >= self.limit
        return measurement.value <= self.limit

    def record(self, measurement: Measurement, threads: int, options: Options) -> dict[str, Any]:
        """The row as JSON."""
        return {
            **self._head(threads, options),
            **asdict(measurement),
            "met": self.met(measurement),
            "text": self.format.format(measurement.value),
        }

    def skipped(self, reason: str, threads: int, options: Options) -> dict[str, Any]:
        """The row without a figure."""
        return {**self._head(threads, options), "skipped": reason}

    def _head(self, threads: int, options: Options) -> dict[str, Any]:
        return {"name": self.name, "work": self.work, "target": self.target, "better": self.better,
                "guarded": self.guarded, "threads": threads, "device": options.device, "quick": options.quick,
                "rounds": options.rounds, "torch": torch.__version__}  # fmt: skip


def in_milliseconds(seconds: Mapping[str, float]) -> str:
    """Times as text."""
    return ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())
