"""The methods: what each tries on the validation rows, and how the chosen setting is trained.

Every method gets the same training and validation rows, and tries up to three settings (the estimator: its defaults
alone). The one with the best validation score is kept. What stops early does so by the validation rows too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energyreg import EnergyRegressionModel, EnergyRegressor
from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import TargetSpace
from energyreg.networks.proposals import DistributionProposal
from experiments.uci.data import Split
from experiments.uci.forecasts import EstimatorForecast, Forecast, GaussianForecast, QuantileForecast, SampleForecast

__all__ = ["METHODS", "Method", "Outcome"]

Array = NDArray[np.float64]
Predict = Callable[[Array], Forecast]

QUANTILES = 19
"""Quantiles that LightGBM learns: 1/38, 3/38, ..., a model each."""
SAMPLES = 100
"""Draws of Treeffuser for a row."""
DIFFUSION_ROWS = 250
"""Test rows of a split that Treeffuser predicts at most: it solves a differential equation for each draw of a row."""


@dataclass(frozen=True)
class Outcome:
    """A method trained on one split.

    Args:
        predict: Maps rows to forecasts.
        setting: The chosen setting.
        seconds: Time of its training.
        tuning_seconds: Time of all trials before it.
    """

    predict: Predict
    setting: dict[str, Any]
    seconds: float
    tuning_seconds: float


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        name: Its name in the tables.
        fit: Trains one setting on a split with a seed.
        settings: What to choose from.
        trial: Changes of the setting in the trials, which may be cheaper than the training.
        test_rows: Test rows of a split that are predicted at most.
        splits: Splits at most, for a method that takes very long.
        needs: Packages that it needs.
    """

    name: str
    fit: Callable[..., Predict]
    settings: Sequence[dict[str, Any]] = ({},)
    trial: dict[str, Any] = field(default_factory=dict)
    test_rows: int | None = None
    splits: int | None = None
    needs: tuple[str, ...] = ()

    def run(self, split: Split, seed: int) -> Outcome:
        """Choose a setting by the validation rows, and train it."""
        started = time.perf_counter()
        best, setting, predict, chosen_seconds = np.inf, dict(self.settings[0]), None, 0.0
        for candidate in self.settings if len(self.settings) > 1 else ():
            before = time.perf_counter()
            trained = self.fit(split, seed, **{**candidate, **self.trial})
            seconds = time.perf_counter() - before
            forecast = trained(split.x_validation)
            score = forecast.nll(split.y_validation)
            score = forecast.crps(split.y_validation) if score is None else score
            if score < best:
                best, setting, predict, chosen_seconds = score, dict(candidate), trained, seconds
        if predict is not None and not self.trial:
            return Outcome(predict, setting, chosen_seconds, time.perf_counter() - started - chosen_seconds)
        tuned = time.perf_counter()
        predict = self.fit(split, seed, **setting)
        return Outcome(predict, setting, time.perf_counter() - tuned, tuned - started)


# ---------------------------------------------------------------------------------------------- networks


class _Mixture(EnergyRegressor):
    """The estimator with a mixture density network in place of the energy: all else, the encoder too, is the same."""

    def _new_model(
        self, num_features: int, space: TargetSpace, rows: int, frequency_scale: float | None, dropout: float | None,
        slabs: Sequence[tuple[float, float]] = (),
    ) -> EnergyRegressionModel:  # fmt: skip
        return EnergyRegressionModel.mixture_for_table(
            num_features, space, num_components=self.num_components, width=self._width(rows), depth=self.depth,
            dropout=dropout, num_rows=rows, frequency_scale=frequency_scale,
        )  # fmt: skip


class _Flow(EnergyRegressor):
    """The estimator with a neural spline flow in place of the energy; `num_components` are its bins."""

    def _new_model(
        self, num_features: int, space: TargetSpace, rows: int, frequency_scale: float | None, dropout: float | None,
        slabs: Sequence[tuple[float, float]] = (),
    ) -> EnergyRegressionModel:  # fmt: skip
        import zuko

        width = self._width(rows)
        mixture = EnergyRegressionModel.mixture_for_table(
            num_features, space, width=width, depth=self.depth, dropout=dropout,
            num_rows=rows, frequency_scale=frequency_scale,
        )  # fmt: skip
        flow = zuko.flows.NSF(1, width, transforms=1, bins=self.num_components, hidden_features=(width,))
        return EnergyRegressionModel(
            mixture.encoder, None, proposal=DistributionProposal(flow), base=ProposalBase(Marginal(1)), space=space
        )


def _network(kind: type[EnergyRegressor]) -> Callable[..., Predict]:
    def fit(split: Split, seed: int, **setting: Any) -> Predict:
        regressor = kind(random_state=seed, **setting)
        regressor.fit(split.x, split.y, eval_set=(split.x_validation, split.y_validation))
        return lambda x: EstimatorForecast(regressor, x)

    return fit


# ---------------------------------------------------------------------------------------------- trees


def _catboost(split: Split, seed: int, **setting: Any) -> Predict:
    from catboost import CatBoostRegressor

    model = CatBoostRegressor(
        iterations=3000, learning_rate=0.05, loss_function="RMSEWithUncertainty", random_seed=seed, verbose=0,
        thread_count=1, allow_writing_files=False, **setting,
    )  # fmt: skip
    model.fit(split.x, split.y, eval_set=(split.x_validation, split.y_validation), early_stopping_rounds=100)

    def predict(x: Array) -> Forecast:
        mean, variance = model.predict(x).T
        return GaussianForecast(mean, np.sqrt(variance))

    return predict


def _ngboost(split: Split, seed: int, max_depth: int) -> Predict:
    from ngboost import NGBRegressor
    from sklearn.tree import DecisionTreeRegressor

    base = DecisionTreeRegressor(criterion="friedman_mse", max_depth=max_depth)
    model = NGBRegressor(Base=base, n_estimators=2000, learning_rate=0.03, verbose=False, random_state=seed)
    model.fit(split.x, split.y, X_val=split.x_validation, Y_val=split.y_validation, early_stopping_rounds=50)

    def predict(x: Array) -> Forecast:
        p = model.pred_dist(x)
        return GaussianForecast(p.loc, p.scale)

    return predict


def _lightgbm(split: Split, seed: int, num_leaves: int) -> Predict:
    import lightgbm

    models = []
    for level in (np.arange(QUANTILES) + 0.5) / QUANTILES:
        model = lightgbm.LGBMRegressor(
            objective="quantile", alpha=level, n_estimators=2000, learning_rate=0.05, num_leaves=num_leaves,
            min_child_samples=10, random_state=seed, n_jobs=1, verbose=-1,
        )  # fmt: skip
        stop = lightgbm.early_stopping(50, verbose=False)
        model.fit(split.x, split.y, eval_set=[(split.x_validation, split.y_validation)], callbacks=[stop])
        models.append(model)
    return lambda x: QuantileForecast(np.stack([model.predict(x) for model in models], 1))


def _treeffuser(split: Split, seed: int, **setting: Any) -> Predict:
    from treeffuser import Treeffuser

    # It takes its validation rows from those it is given, so it gets all of them, and the same share is held out.
    x, y = np.concatenate([split.x, split.x_validation]), np.concatenate([split.y, split.y_validation])
    model = Treeffuser(seed=seed, n_jobs=1, eval_percent=len(split.y_validation) / len(y), **setting)
    model.fit(x, y)

    def predict(x: Array) -> Forecast:
        samples = model.sample(x, n_samples=SAMPLES, n_parallel=SAMPLES, n_steps=50, seed=seed)
        return SampleForecast(np.asarray(samples).reshape(SAMPLES, len(x)).T)

    return predict


ONE = {"n_members": 1}

METHODS = [
    Method("energy", _network(EnergyRegressor)),
    Method("mixture", _network(_Mixture), [{"num_components": k} for k in (3, 8, 20)], ONE),
    Method("deep-ensemble", _network(_Mixture), [{"num_components": 1}]),
    Method(
        "flow", _network(_Flow), [{"num_components": bins, "n_members": 3} for bins in (4, 8, 16)], ONE, splits=5,
        needs=("zuko",),
    ),
    Method("catboost", _catboost, [{"depth": depth} for depth in (4, 6, 8)], needs=("catboost",)),
    Method("ngboost", _ngboost, [{"max_depth": depth} for depth in (2, 3, 5)], needs=("ngboost",)),
    Method("lightgbm", _lightgbm, [{"num_leaves": leaves} for leaves in (7, 15, 31)], needs=("lightgbm",)),
    Method("treeffuser", _treeffuser, test_rows=DIFFUSION_ROWS, splits=3, needs=("treeffuser",)),
]  # fmt: skip
