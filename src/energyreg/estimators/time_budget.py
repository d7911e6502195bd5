"""A time budget: some steps are timed, one good member is made first, and then as many others as fit."""

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

__all__ = ["CALIBRATION_ROWS", "ROWS_OF_SEVERAL", "TimePlan", "members_more", "plan_time", "warn_of_what_fitted"]

BUDGET_FRACTION = 0.9
"""Fraction of the time left that is planned for; a machine does not run evenly."""
CALIBRATION_FRACTION = 0.1
"""Fraction of a time budget in which one member is calibrated, at most."""
TIMED_ROWS, CALIBRATED_TO_TIME = 2_048, 256
"""Validation rows that are predicted, and calibrated on, to see how long it takes."""
CALIBRATION_ROWS = 10_000
"""Validation rows by which the two numbers of the calibration are chosen, at most."""
ROWS_OF_SEVERAL = 500, 2_000
"""Rows by which densities of several outputs are calibrated, and get their conformal scores, at most: each takes as
long as a prediction."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a step and of the validation after an epoch, each of one member; and of what follows the training.

    Attributes:
        step: Seconds of a step.
        steps: Steps of an epoch.
        validation: Seconds of the validation after an epoch.
        afterwards: Seconds of the calibration and of the conformal scores.
        rows: Rows to calibrate by, so that it does not take more.
    """

    step: float
    steps: int
    validation: float
    afterwards: float
    rows: int = CALIBRATION_ROWS

    def epoch(self, members: int) -> float:
        """Seconds of an epoch."""
        return (self.step * self.steps + self.validation) * members

    def choose(
        self, settings: Settings, epochs: int, members: int, rows: int, batch_size: int, started: float
    ) -> tuple[int, int, int]:
        """Epochs, members and rows that fit the time budget, of as many as are wanted.

        One member gets all its epochs before there is another.

        Args:
            settings: Parameters of the estimator, with the budget.
            epochs: Epochs without it.
            members: Members without it.
            rows: Training rows.
            batch_size: Rows of a step.
            started: When the budget began, by :func:`time.perf_counter`.
        """
        left = ((settings.time_budget or 0.0) - self.afterwards) * BUDGET_FRACTION - (time.perf_counter() - started)
        while members > 1 and left < self.epoch(members) * epochs:
            members -= 1
        possible = int(left / self.epoch(members))
        if possible >= 1:
            return min(epochs, possible), members, rows
        # A part of the rows, so that the schedule comes to its end: the learning rate must become small.
        possible = int((left - self.validation * members) / (self.step * members))
        return 1, members, max(min(max(possible, 1) * batch_size, rows), 2)


def members_more(left: float, training: float, afterwards: float, there: int, most: int) -> int:
    """Members that can be trained yet.

    Args:
        left: Seconds that are left.
        training: Seconds that the training of a member takes.
        afterwards: Seconds that a member takes in calibration and conformal scores, which follow for all together.
        there: Members that there are.
        most: Members that are wanted yet.
    """
    possible = (left * BUDGET_FRACTION - there * afterwards) / max(training + afterwards, 1e-9)
    return max(min(int(possible), most), 0)


def warn_of_what_fitted(
    settings: Settings, wanted: tuple[int, int, int], found: tuple[int, int, int], timed_out: bool
) -> None:
    """Say once what the budget allowed: a warning where already the first member got less than without it.

    Args:
        settings: Parameters of the estimator, with the budget.
        wanted: Epochs, members and rows without it.
        found: Those that there were time for.
        timed_out: Whether the training of the first member was stopped.
    """
    (epochs, members, rows), (epochs_found, members_found, rows_found) = wanted, found
    budget = f"time_budget is {settings.time_budget:g} s"
    if rows_found < rows:
        warnings.warn(
            f"{budget}, in which one member saw {rows_found} of the {rows} training rows, chosen at random, each once. "
            "Pass a longer budget.",
            stacklevel=6,
        )
    elif timed_out or epochs_found < epochs:
        warnings.warn(
            f"{budget}, in which {members_found} of {members} members had {epochs_found} of {epochs} epochs"
            f"{', the last of which was cut short' * timed_out}. Pass a longer budget.",
            stacklevel=6,
        )
    elif members_found < members:
        settings.log(f"{budget[0].upper()}{budget[1:]}, in which {members_found} of {members} members were trained.")


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            afterwards = _afterwards(model, builder, tried, held_out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "fit was interrupted while the time of some steps was measured; there is no model yet."
        ) from None
    (few, least), (many, most) = sorted(seconds.items())
    step = max((most - least) / (many - few), most / many / 4)
    validation = max(most - step * many, 0.0)
    if held_out is not None:
        validation *= len(held_out[1]) / len(tried[1])
    return TimePlan(step / members, steps, validation / members, *afterwards)


def _epoch_seconds(histories: list[History], members: int) -> float:
    """Seconds of the first epoch: of the first member, which stands for all; of a chain for each factor."""
    return sum(history.seconds[0] for history in histories[::members] if history.seconds)


def _afterwards(model: Any, builder: Builder, tried: Any, held_out: Any) -> tuple[float, int]:
    """Seconds of the calibration and of the conformal scores, about as much work a row; and rows to calibrate by."""
    settings, one = builder.settings, builder.space.dim == 1
    most = (CALIBRATION_ROWS, len(held_out[1]) if held_out else 0) if one else ROWS_OF_SEVERAL
    if tried is None or not (settings.calibrate or settings.conformal):
        return 0.0, most[0]
    count = CALIBRATED_TO_TIME if one else CALIBRATED_TO_TIME // 8
    x, y = tried[0][:count], tried[1][:count]
    integrator = integrator_of(model)
    model = model.double() if one else model
    seconds = []
    for rows in (slice(8), slice(None)):  # the first run pays for what is done once, too
        before = time.perf_counter()
        if isinstance(model, EnergyEnsemble):
            model.fit_weights(x[rows], y[rows], integrator=integrator)
        Calibration.fit(model(x[rows], integrator=integrator), torch.as_tensor(y[rows]))
        seconds.append(time.perf_counter() - before)
    each = max(seconds[-1], 1e-9) / len(y)
    budget = settings.time_budget or math.inf
    calibrated = max(min(len(held_out[1]), most[0], int(budget * CALIBRATION_FRACTION / each)), 32)
    rows_of_scores = min(len(held_out[1]), most[1]) * settings.conformal
    return min(each * (calibrated * settings.calibrate + rows_of_scores), budget / 4), calibrated
