"""Modes of the caller: whatever torch, NumPy and warnings are set to, fits and predictions work alike."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import energyreg as er
from energyreg.evaluation import metrics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 2))
Y = X[:, 0] + 0.1 * RNG.normal(size=64)
INPUTS, TARGETS = torch.tensor(X, dtype=torch.float32), torch.tensor(Y, dtype=torch.float32)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "errstate": lambda: np.errstate(all="raise"),
    "float64": default_dtype,
    "default device": lambda: torch.device("meta"),  # where nothing can be computed
    "warnings as errors": warnings_as_errors,
}


def estimator(**settings: Any) -> er.EnergyRegressor:
    defaults = {"n_members": 1, "epochs": 1, "width": 8, "random_state": 0, "calibrate": False}
    return er.EnergyRegressor(**{**defaults, **settings})


def network() -> er.EnergyRegressionModel:
    encoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1))
    proposal = er.proposals.MixtureDensityNetwork(8)
    return er.EnergyRegressionModel(encoder, er.heads.SeparableHead(8), proposal=proposal)


@pytest.fixture(scope="module")
def models() -> tuple[er.EnergyRegressor, er.EnergyRegressionModel]:
    model = network()
    er.fit(model, INPUTS, TARGETS, epochs=1)
    return estimator().fit(X, Y), model


@pytest.mark.parametrize("mode", MODES)
def test_fits_work_in_every_mode(mode: str) -> None:
    model = network()
    loader = DataLoader(TensorDataset(INPUTS, TARGETS), 16, shuffle=True)
    with MODES[mode]():
        one, several = estimator().fit(X, Y), estimator(n_members=2, target="positive").fit(X, np.exp(Y))
        chain = estimator(outputs="chain").fit(X, np.column_stack([Y, -Y]))
        er.fit(model, INPUTS, TARGETS, epochs=1)
        er.fit(model, loader, epochs=1)
    for fitted in (one, several, chain):
        assert np.isfinite(fitted.predict(X[:3])).all()
    assert bool(model(INPUTS).log_prob(TARGETS).isfinite().all())
    if mode != "float64":  # where initial weights are drawn with more digits
        np.testing.assert_array_equal(one.predict(X[:3]), estimator().fit(X, Y).predict(X[:3]))


@pytest.mark.parametrize("mode", MODES)
def test_predictions_files_and_scores_are_the_same_in_every_mode(
    mode: str, models: tuple[er.EnergyRegressor, er.EnergyRegressionModel], tmp_path: Path
) -> None:
    fitted, model = models

    def answers() -> dict[str, Any]:
        p, q = fitted.predict_distribution(X[:5]), model(INPUTS[:5])
        regressor = er.EnergyRegressor.load(fitted.save(tmp_path / "estimator"))
        own = {"encoder": nn.Sequential(nn.Linear(2, 8, device="cpu", dtype=torch.float32), nn.Dropout(0.1))}
        return {
            "mean": fitted.predict(X[:5]),
            "mode": fitted.predict(X[:5], kind="mode"),
            "interval": fitted.predict_interval(X[:5]),
            "quantiles": fitted.predict_quantiles(X[:5]),
            "sample": fitted.sample(X[:5], 3, random_state=0),
            "score_samples": fitted.score_samples(X, Y),
            "score": fitted.score(X, Y),
            "region": np.asarray(fitted.predict_highest_density_region(X[:2]).intervals[0]),
            "loaded": regressor.predict(X[:5]),
            "evaluate": list(metrics.evaluate(p, Y[:5]).values()),
            "own log_prob": q.log_prob(TARGETS[:5]),
            "own mean": q.mean,
            "own mode": q.mode,
            "own quantiles": q.quantile([0.1, 0.5]),
            "own entropy": q.entropy(),
            "own sample": q.sample((3,), generator=torch.Generator().manual_seed(0)),
            "own refined": q.refine(TARGETS[:5, None]),
            "own evaluate": list(metrics.evaluate(q, TARGETS[:5]).values()),
            "own loaded": er.load(er.save(model, tmp_path / "own"), **own)(INPUTS[:5]).mean,
        }

    expected = answers()
    with MODES[mode]():
        found = answers()
    for name, value in expected.items():
        assert np.asarray(found[name]).dtype == np.asarray(value).dtype, name
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), rtol=1e-6, err_msg=name)


def test_a_model_made_in_inference_mode_is_trained() -> None:
    with torch.inference_mode():
        model = network()
        before = model.head.state_dict()
        er.fit(model, INPUTS, TARGETS, epochs=1)
    assert any(not torch.equal(value, before[name]) for name, value in model.head.state_dict().items())
    with torch.inference_mode():
        ensemble = er.fit_ensemble([network(), network()], INPUTS, TARGETS, epochs=1)
    assert bool(ensemble(INPUTS).log_prob(TARGETS).isfinite().all())
