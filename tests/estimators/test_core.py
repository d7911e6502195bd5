"""What counts is what was fitted: parameters set afterwards and fits that fail change nothing."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import energyreg as er
from energyreg import files
from energyreg.estimators import core

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 2)), RNG.gamma(2.0, size=60)
OTHER: dict[str, Any] = {
    "target": "count", "n_members": 3, "epochs": 7, "batch_size": 9, "learning_rate": 1.0, "width": 4, "depth": 5,
    "dropout": 0.5, "frequency_scale": 3.0, "base": "proposal", "outputs": "chain", "num_components": 2,
    "validation_fraction": 0.4, "split": "time", "time_budget": 1.0, "calibrate": False, "conformal": False,
    "max_levels": 2, "min_count": 1, "random_state": 5, "n_jobs": 1, "device": "cpu", "verbose": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted() -> er.EnergyRegressor:
    settings = {"n_members": 1, "epochs": 1, "width": 8, "depth": 1, "random_state": 0}
    return er.EnergyRegressor(target="positive", conformal=True, **settings).fit(X, Y)


def answers(regressor: er.EnergyRegressor) -> list[np.ndarray]:
    median, interval = regressor.predict(X[:4], "median"), regressor.predict_interval(X[:4])
    return [regressor.predict(X[:4]), median, interval, regressor.score_samples(X, Y), regressor.sample(X[:4], 3)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_parameters_that_are_set_after_fit_change_neither_predictions_nor_the_file(
    fitted: er.EnergyRegressor, tmp_path: Path
) -> None:
    before, parameters = answers(fitted), fitted.get_params()
    content = files.read_tensors(fitted.save(tmp_path / "before"), files.ESTIMATOR)[1]
    assert set(OTHER) == set(parameters)
    fitted.set_params(**OTHER)
    try:
        assert same(answers(fitted), before)
        assert files.read_tensors(fitted.save(tmp_path / "after"), files.ESTIMATOR)[1] == content  # with a checksum
    finally:
        fitted.set_params(**parameters)
    assert er.EnergyRegressor.load(tmp_path / "after").get_params() == parameters


def test_a_list_that_is_changed_after_fit_changes_nothing(tmp_path: Path) -> None:
    target = ["positive", "real"]
    settings = {"n_members": 1, "epochs": 1, "width": 8, "depth": 1, "calibrate": False}
    regressor = er.EnergyRegressor(target=target, **settings).fit(X, np.stack([Y, -Y], 1))
    target[0] = "count"
    assert er.EnergyRegressor.load(regressor.save(tmp_path / "model")).target == ["positive", "real"]


@pytest.mark.parametrize("place", ["early", "late", "interrupted"])
def test_a_fit_that_fails_leaves_the_old_model(
    fitted: er.EnergyRegressor, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before = answers(fitted)
    expected: type[BaseException] = ValueError
    if place == "late":
        monkeypatch.setattr(core, "ConformalRegions", lambda *_: 1 / 0)
        expected = ZeroDivisionError
    elif place == "interrupted":

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(core, "learn", interrupt)
        expected = KeyboardInterrupt
    wide = np.concatenate([X, X], 1)
    with pytest.raises(expected):
        fitted.fit(wide, np.where(np.arange(60) == 3, -1.0, Y) if place == "early" else Y)
    assert same(answers(fitted), before) and fitted.n_features_in_ == 2


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({}, 1),
        ({"n_members": 2}, 1),
        ({"target": "positive", "conformal": True}, 1),
        ({"outputs": "joint"}, 2),
        ({"outputs": "chain"}, 2),
    ],
)
def test_predictions_and_regions_can_be_pickled_as_results_of_a_worker_process(
    settings: dict[str, Any], outputs: int
) -> None:
    y = Y if outputs == 1 else np.stack([Y, Y + X[:, 0]], 1)
    regressor = er.EnergyRegressor(**{"n_members": 1, "epochs": 1, "width": 8, "random_state": 0} | settings).fit(X, y)
    p, region = regressor.predict_distribution(X[:4]), regressor.predict_highest_density_region(X[:4])
    targets = torch.as_tensor(y[:4])
    for _ in range(2):  # before it keeps anything for later, and afterwards
        copy = pickle.loads(pickle.dumps(p))
        assert torch.equal(copy.log_prob(targets), p.log_prob(targets))
        draws = [each.sample((3,), generator=torch.Generator().manual_seed(0)) for each in (copy, p)]
        assert torch.equal(*draws)
    some = p.select([2, 0])
    assert torch.equal(pickle.loads(pickle.dumps(some)).mean, some.mean)
    assert torch.equal(pickle.loads(pickle.dumps(region)).contains(targets), region.contains(targets))
