"""How a training goes: the arguments of `fit` beside model and data, checked once."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["TrainingSettings"]

SCHEDULES = ("one-cycle", "cosine", "constant")
# Half weights would round the target's scale and the energies themselves; mixed precision keeps both.
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
# Purposes of randomness, so that no two draw the same numbers.
SPLIT, ORDER, NOISE, DROPOUT, EVALUATION, SUBSET = range(6)
# Where a training runs, how it reports and where it is kept: a resumed run may have others.
FREE = frozenset(
    {"objective", "time_limit", "checkpoint_dir", "resume", "progress", "accelerator", "devices", "strategy"}
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a training, with the meaning and the defaults that they have in :func:`energyreg.fit`.

    Raises:
        ValueError: If one of them cannot be used.
    """

    epochs: int = 100
    batch_size: int | None = None
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    schedule: str = "one-cycle"
    gradient_clip: float | None = 10.0
    averaging: float | None = None
    patience: int | None = None
    seed: int = 0
    precision: str = "32-true"
    objective: Any = None
    time_limit: float | None = None
    checkpoint_dir: str | os.PathLike[str] | None = None
    resume: bool = False
    progress: bool | None = None
    accelerator: Any = None
    devices: Any = 1
    strategy: Any = "auto"

    def __post_init__(self) -> None:
        """Check the settings."""
        object.__setattr__(self, "precision", str(self.precision))
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if name != "epochs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)):
            raise ValueError(f"seed is {self.seed!r}; expected a whole number.")
        for name, positive in (
            ("learning_rate", True), ("weight_decay", False), ("gradient_clip", True), ("averaging", False),
        ):  # fmt: skip
            value = getattr(self, name)
            if name in ("gradient_clip", "averaging") and value is None:
                continue
            number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
            if not number or not (value > 0 or (value == 0 and not positive)):
                raise ValueError(f"{name} is {value!r}; expected a finite number {'> 0' if positive else '≥ 0'}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; expected one of {', '.join(map(repr, SCHEDULES))}.")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}; expected one of {', '.join(map(repr, PRECISIONS))} (weights stay in "
                "float32 or float64: half precision would round densities and target scales)."
            )
        if self.objective is not None and not callable(self.objective):
            raise ValueError(
                f"objective is a {type(self.objective).__name__}; expected an object such as energyreg.objectives."
                "ExactMaximumLikelihood(), to be called as objective(f, q, z, generator=...)."
            )
        if self.progress is not None and not isinstance(self.progress, bool):
            raise ValueError(f"progress is {self.progress!r}; expected True, False or None.")
        if not isinstance(self.resume, bool):
            raise ValueError(f"resume is {self.resume!r}; expected True or False; the folder goes to checkpoint_dir=.")
        if self.resume and self.checkpoint_dir is None:
            raise ValueError(
                "resume=True needs checkpoint_dir=, the folder where the checkpoints of the earlier run are."
            )
        limit: Any = self.time_limit
        number = isinstance(limit, (int, float, np.number)) and not isinstance(limit, (bool, np.bool_))
        if limit is not None and not (number and limit > 0):
            raise ValueError(f"time_limit is {limit!r}; expected a number of seconds > 0, or None.")

    def conditions(self) -> dict[str, Any]:
        """What must be the same in a resumed run."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in FREE]
        return {name: getattr(self, name) for name in names}
