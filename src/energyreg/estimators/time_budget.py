"""A time budget: some steps are timed, and epochs, members and rows chosen to fit."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from energyreg.estimators.members import Builder, Data, Trial, integrator_of, train_members
from energyreg.estimators.settings import Settings
from energyreg.models.calibration import Calibration
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.training.history import History

__all__ = ["CALIBRATION_ROWS", "ROWS_OF_SEVERAL", "TimePlan", "plan_time"]

BUDGET_FRACTION = 0.8
"""Fraction of a time budget that is planned for; a machine does not run evenly."""
TIMED_ROWS, CALIBRATED_TO_TIME = 2_048, 256
"""Validation rows that are predicted, and calibrated on, to see how long it takes."""
CALIBRATION_ROWS = 10_000
"""Validation rows by which the two numbers of the calibration are chosen, at most."""
ROWS_OF_SEVERAL = 500, 2_000
"""Rows by which densities of several outputs are calibrated, and get their conformal scores, at most: each takes as
long as a prediction."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a step and of the validation after an epoch, each of one member; and of what follows the training."""

    step: float
    steps: int
    validation: float
    afterwards: float

    def epoch(self, members: int) -> float:
        """Seconds of an epoch."""
        return (self.step * self.steps + self.validation) * members

    def choose(
        self, settings: Settings, epochs: int, members: int, rows: int, batch_size: int, started: float
    ) -> tuple[int, int, int]:
        """Epochs, members and rows that fit the time budget, of as many as are wanted.

        Args:
            settings: Parameters of the estimator, with the budget.
            epochs: Epochs without it.
            members: Members without it.
            rows: Training rows.
            batch_size: Rows of a step.
            started: When the budget began, by :func:`time.perf_counter`.
        """
        budget = settings.time_budget or 0.0
        left = (budget - self.afterwards) * BUDGET_FRACTION - (time.perf_counter() - started)
        wanted = members
        while members > 1 and left / self.epoch(members) < epochs / 2:
            members -= 1
        epoch = self.epoch(members)
        possible = int(left / epoch)
        if possible >= 1:
            chosen = min(epochs, possible)
            settings.log(
                f"An epoch of {wanted} members takes about {self.epoch(wanted):.2g} s, {left:.3g} s are left: {chosen} "
                f"epochs of {members} instead of {epochs} of {wanted}, about {chosen * epoch:.3g} s."
            )
            return chosen, members, rows
        # A part of the rows, so that the schedule comes to its end: the learning rate must become small.
        possible = int((left - self.validation * members) / (self.step * members))
        used = min(max(possible, 1) * batch_size, rows)
        warnings.warn(
            f"time_budget is {budget:g} s, but an epoch takes about {epoch:.2g} s; {used} of the {rows} training rows "
            "are used, chosen at random, and each once. Pass a longer budget.",
            stacklevel=6,
        )
        return 1, members, max(used, 2)


def plan_time(
    builder: Builder, trial: Trial, data: Data, options: dict[str, Any], members: int, steps: int
) -> TimePlan:
    """What the training takes, by the time that some steps, some validation rows and their calibration take.

    Args:
        builder: Builds the members.
        trial: What they get.
        data: Inputs and targets.
        options: Arguments of the training.
        members: How many are trained.
        steps: Steps of an epoch.

    Raises:
        KeyboardInterrupt: If it was interrupted; there is no model yet.
    """
    x, y = data
    size = min(options["batch_size"], len(y))
    held_out, tried = options["validation"], options["validation"]
    if held_out is not None:
        tried = [None if part is None else part[:TIMED_ROWS] for part in held_out]
    build, seconds = builder.each([trial]), {}
    try:
        for count in (2, min(2 + max(steps, 2), 12)):  # the first run pays for what is done once, too
            chosen = torch.arange(count * size) % len(y)
            short = {
                **options, "sample_weight": options["sample_weight"][chosen], "validation": tried, "progress": False,
            }  # fmt: skip
            before = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say of is said again by the training itself
                model, histories = train_members(build, (x[chosen], y[chosen]), members, 1, short, builder.chained)
            if any(history.interrupted for history in histories):
                raise KeyboardInterrupt
            seconds[count] = _epoch_seconds(histories, members) or time.perf_counter() - before
        afterwards = _seconds_afterwards(model, builder, tried, held_out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "fit was interrupted while the time of some steps was measured; there is no model yet."
        ) from None
    (few, least), (many, most) = sorted(seconds.items())
    step = max((most - least) / (many - few), most / many / 4)
    validation = max(most - step * many, 0.0)
    if held_out is not None:
        validation *= len(held_out[1]) / len(tried[1])
    return TimePlan(step / members, steps, validation / members, afterwards)


def _epoch_seconds(histories: list[History], members: int) -> float:
    """Seconds of the first epoch: of the first member, which stands for all; of a chain for each factor."""
    return sum(history.seconds[0] for history in histories[::members] if history.seconds)


def _seconds_afterwards(model: Any, builder: Builder, tried: Any, held_out: Any) -> float:
    """Seconds that the calibration will take, and the conformal scores, which are about as much work a row."""
    settings, one = builder.settings, builder.space.dim == 1
    if tried is None or not (settings.calibrate or settings.conformal):
        return 0.0
    count = CALIBRATED_TO_TIME if one else CALIBRATED_TO_TIME // 8
    x, y = tried[0][:count], tried[1][:count]
    before = time.perf_counter()
    integrator = integrator_of(model)
    model = model.double() if one else model
    if isinstance(model, EnergyEnsemble):
        model.fit_weights(x, y, integrator=integrator)
    Calibration.fit(model(x, integrator=integrator), torch.as_tensor(y))
    each = (time.perf_counter() - before) / len(y)
    most = (CALIBRATION_ROWS, len(held_out[1])) if one else ROWS_OF_SEVERAL
    wanted = settings.calibrate, settings.conformal
    rows = sum(min(len(held_out[1]), m) * w for m, w in zip(most, wanted, strict=True))
    # A quarter of the budget at most: a first call may take many times as long as those after it.
    return min(each * rows, (settings.time_budget or math.inf) / 4)
