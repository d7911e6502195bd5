"""A time budget: one good member first, then as many as fit; and one message, which is true."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest

from energyreg import EnergyRegressor
from energyreg.estimators import learning, members, time_budget
from energyreg.estimators.settings import Settings
from energyreg.training import loop

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 2))
Y = X[:, 0] + 0.3 * RNG.normal(size=120)
FAST = {"epochs": 3, "width": 8, "num_components": 2, "random_state": 0}


class Clock:
    """Time that only training steps take: `seconds` for each row of each member."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock, step = Clock(1e-3), loop.Training._step

    def timed(training, number, batch, sums):
        step(training, number, batch, sums)
        clock.now += clock.seconds * len(batch.y)

    monkeypatch.setattr(loop.Training, "_step", timed)
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr("energyreg.estimators.table.perf_counter", clock.perf_counter)
    return clock


def test_the_plan_keeps_to_the_budget(clock):
    """Seconds of a step and a validation are given, so that the choice is a matter of arithmetic."""
    settings = Settings.of(EnergyRegressor(time_budget=100.0))
    plan = time_budget.TimePlan(step=0.1, steps=20, validation=0.5, afterwards=10.0)
    # 0.9 of 90 s are planned for; an epoch of one member takes 2.5 s, and no member has fewer so that there are more.
    assert plan.choose(settings, 40, 3, 1000, 50, 0.0) == (32, 1, 1000)
    assert plan.choose(settings, 16, 3, 1000, 50, 0.0) == (16, 2, 1000)
    assert plan.choose(settings, 10, 1, 1000, 50, 0.0) == (10, 1, 1000)
    slow = time_budget.TimePlan(step=5.0, steps=20, validation=2.0, afterwards=10.0)
    assert slow.choose(settings, 20, 2, 1000, 50, 0.0) == (1, 1, 750)


def test_members_follow_while_they_and_their_calibration_fit():
    assert time_budget.members_more(100.0, training=10.0, afterwards=0.0, there=1, most=7) == 7
    assert time_budget.members_more(100.0, training=20.0, afterwards=0.0, there=1, most=7) == 4
    assert time_budget.members_more(100.0, training=20.0, afterwards=10.0, there=1, most=7) == 2
    assert time_budget.members_more(-1.0, training=20.0, afterwards=10.0, there=1, most=7) == 0


@pytest.mark.parametrize(
    ("budget", "trained", "said"),
    [
        # 108 rows in 3 epochs are 0.32 s for a member; the plan takes some steps first.
        (100.0, [5], None),
        (2.5, [2, 3, 4], None),
        (0.65, [1], None),
        (0.4, [1], "in which 1 of 5 members had"),
    ],
)
def test_more_time_makes_more_members_and_never_shorter_ones(clock, budget, trained, said):
    settings = {**FAST, "frequency_scale": 1.0, "calibrate": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regressor = EnergyRegressor(**settings, n_members=5, time_budget=budget).fit(X, Y)
    assert len(regressor.histories_) in trained
    assert clock.now <= budget * 1.1
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == (said is not None) and all(said in text for text in texts)
    if said is None:
        alone = EnergyRegressor(**settings, n_members=1).fit(X, Y)
        assert regressor.histories_[0].train_loss == alone.history_.train_loss


def test_without_time_for_an_epoch_some_rows_are_used(clock):
    clock.seconds = 1.0
    with pytest.warns(
        UserWarning, match=r"time_budget is 1 s, in which one member saw \d+ of the 108 training rows"
    ) as said:
        EnergyRegressor(**FAST, time_budget=1.0).fit(X, Y)
    assert len(said) == 1


def test_training_stops_when_the_machine_is_slower_than_planned(monkeypatch):
    limits = []

    def watched(build, data, number, epochs, options, chained):
        limits.append(options.get("time_limit"))
        if limits[-1] is not None:
            options = options | {"time_limit": 1e-3}  # as if the rest of the budget were gone
        return members.train_members(build, data, number, epochs, options, chained)

    for module in (learning, time_budget):
        monkeypatch.setattr(module, "train_members", watched)
    with pytest.warns(UserWarning, match="in which 1 of 8 members had 0 of 50 epochs, the last of which was cut short"):
        regressor = EnergyRegressor(**{**FAST, "epochs": 50}, time_budget=30.0).fit(X, Y)
    assert limits[:2] == [None, None] and 0 < limits[2] < 30 and len(limits) == 3
    assert regressor.history_.timed_out and np.isfinite(regressor.score_samples(X, Y)).all()


@pytest.mark.filterwarnings("ignore:(time_budget is|The calibration)")
def test_a_time_budget_is_kept_about():
    started = time.perf_counter()
    EnergyRegressor(time_budget=2.0, width=8, random_state=0).fit(RNG.normal(size=(9_000, 2)), RNG.normal(size=9_000))
    assert time.perf_counter() - started < 2.0 * 1.1 + 2.0
