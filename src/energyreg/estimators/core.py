"""What the estimators of tables and of images share: predictions, storing, and the fit to encoded rows."""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import numpy as np
import torch

from energyreg.checks import check_count, check_level, check_type
from energyreg.densities.ends import snap
from energyreg.estimators.columns import check_features
from energyreg.estimators.learning import Rows, Validation, learn
from energyreg.estimators.linear import LinearGaussian
from energyreg.estimators.members import integrator_of, weights_of
from energyreg.estimators.settings import Settings, find_device, threads
from energyreg.estimators.state import State, available, check_state
from energyreg.estimators.targets import Target
from energyreg.estimators.time_budget import ROWS_OF_SEVERAL
from energyreg.models import checkpoint
from energyreg.models.calibration import Calibration
from energyreg.models.chain import EnergyChain
from energyreg.models.conformal import ConformalIntervals, ConformalRegions
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.models.predictive import HighestDensityRegion, PredictiveDistribution
from energyreg.modes import as_usual, with_gradients
from energyreg.tables.blocks import Scratch, Source, encode, rows_to_learn_from
from energyreg.tables.cells import ColumnWarning
from energyreg.tables.preprocessing import TablePreprocessor
from energyreg.tables.targets import read_targets
from energyreg.training.history import History

try:
    from sklearn.base import BaseEstimator, RegressorMixin
except ImportError as error:
    raise ImportError(
        "EnergyRegressor needs scikit-learn, which is not installed. Install it with: pip install 'energyreg[tables]'"
    ) from error

__all__ = ["DensityRegressor", "draw_seed", "fit_rows", "undone_on_failure"]

ENCODED_IN_MEMORY = 2**28
"""Bytes up to which the encoded rows of a table that is not in memory are kept there."""
PREDICTION_ROWS = 16_384
"""Rows of a table that are predicted at once, by default."""
KINDS_OF_PREDICTION = ("mean", "median", "mode")
BIN_NODES = 16
"""Points of the rule that integrates the density over the bin of a rounded value."""


P = ParamSpec("P")
T = TypeVar("T")


def undone_on_failure(fit: Callable[P, T]) -> Callable[P, T]:
    """A function that fits its first argument, or leaves it as it was where an error ends the fit."""

    @functools.wraps(fit)
    @with_gradients
    def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        attributes = vars(args[0])
        before = dict(attributes)
        try:
            return fit(*args, **kwargs)
        except BaseException:
            attributes.clear()
            attributes.update(before)
            raise

    return whole


class DensityRegressor(RegressorMixin, BaseEstimator):
    """Predictions of a fitted estimator, whatever it makes its inputs of: :meth:`encode` says that.

    What counts is what was fitted: a parameter that is set afterwards changes neither predictions nor what
    :meth:`save` writes, until the next `fit`. Those that say how the work is done (`n_jobs`, `device`, `verbose`, and
    where images are) hold at once. A `fit` that fails leaves the estimator as it was.

    Long: the methods of scikit-learn's API, most of whose lines say what they take and return.
    """

    not_in_files: ClassVar[tuple[str, ...]] = ()
    """Parameters by which a later `fit` reads, writes or runs something: a file holds None for them."""

    model_: Any
    target_: Target
    preprocessor_: TablePreprocessor
    calibration_: Calibration
    lattice_step_: float | None
    linear_baseline_: LinearGaussian | None
    histories_: list[History]
    fitted_parameters_: dict[str, Any]
    n_features_in_: int
    n_outputs_: int
    n_iter_: int
    random_state: Any
    n_jobs: int | None
    device: Any
    target: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = False
        tags.target_tags.multi_output = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibration_")

    # Predictions -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, X: Any) -> np.ndarray:
        """The inputs of the model, (B, F), of what `fit` takes."""

    def _distribution(self, x: np.ndarray) -> PredictiveDistribution:
        return self.calibration_(self.model_(x, integrator=integrator_of(self.model_)))

    @as_usual
    def predict_distribution(self, X: Any) -> PredictiveDistribution:
        """The predictive distribution p(y|x), in the units of y; for counts and rounded values the continuous one.

        Args:
            X: What :meth:`encode` takes, B examples.

        Raises:
            ValueError: If X does not fit.
            sklearn.exceptions.NotFittedError: If the estimator has not been fitted.
        """
        x = self.encode(X)
        with threads(self.n_jobs):
            return self._distribution(x)

    def _by_blocks(self, X: Any, function: Any) -> np.ndarray:
        """Apply a function of a distribution to blocks of rows, and join what it returns along the first dimension."""
        x = self.encode(X)
        with threads(self.n_jobs):
            blocks = [x[start : start + PREDICTION_ROWS] for start in range(0, len(x), PREDICTION_ROWS)]
            parts = [function(self._distribution(block)).double().cpu().numpy() for block in blocks]
        return np.concatenate(parts)

    def _snapped(self, values: np.ndarray) -> np.ndarray:
        """Values of several outputs (*S, D), where single precision has rounded the ends of the space."""
        return snap(self.model_.space, torch.from_numpy(values)).numpy()

    @as_usual
    def predict(self, X: Any, kind: str = "mean") -> np.ndarray:
        """One number per row and output.

        Args:
            X: B examples.
            kind: "mean", "median" or "mode" (the highest point of the density). On a circle the mean is the direction
                of the mean vector. Median and mode of counts are whole numbers.

        Returns:
            Shape (B,), or (B, D) for several outputs.

        Raises:
            ValueError: If kind is another, or X does not fit; see :meth:`predict_distribution`.
        """
        if kind not in KINDS_OF_PREDICTION:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, KINDS_OF_PREDICTION))}.")
        values = self._by_blocks(X, lambda p: getattr(p, kind))
        values = self.target_.clip(values) if kind == "mean" else self.target_.round(values)
        return values[:, 0] if self.n_outputs_ == 1 else values

    @as_usual
    def predict_interval(self, X: Any, level: float = 0.9) -> np.ndarray:
        """Equal-tailed interval of each row, and of each output by itself.

        With `conformal` its coverage is at least `level` on average over new rows, whatever the density is like; of
        several outputs, of all their intervals together. Not on a circle, where only
        :meth:`predict_highest_density_region` has that.

        Args:
            X: B examples.
            level: Probability of the interval.

        Returns:
            Lower and upper ends, shape (B, 2), or (B, D, 2) for several outputs.

        Raises:
            ValueError: If the level is not in (0, 1), or X does not fit.
        """
        check_level(level)
        if hasattr(self, "conformal_intervals_"):
            found = self.conformal_intervals_(self.encode(X), level).double().cpu().numpy()
        else:
            found = self._by_blocks(X, lambda p: p.interval(level))
        return self.target_.round(found if self.n_outputs_ == 1 else self._snapped(found.swapaxes(1, 2)).swapaxes(1, 2))

    @as_usual
    def predict_quantiles(self, X: Any, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Quantiles of each row, and of each output by itself.

        Args:
            X: B examples.
            levels: Probabilities, L of them.

        Returns:
            Shape (B, L), or (B, L, D) for several outputs. On a circle they count from its lower end.

        Raises:
            ValueError: If a level is not in (0, 1), or X does not fit.
        """
        levels = [float(level) for level in np.atleast_1d(np.asarray(levels, dtype=float))]
        for level in levels:
            check_level(level, "levels")
        if self.__sklearn_is_fitted__() and self.n_outputs_ > 1:
            return self._snapped(self._by_blocks(X, lambda p: p.central_quantiles(levels).transpose(0, 1)))
        return self.target_.round(self._by_blocks(X, lambda p: p.quantile(torch.tensor(levels, dtype=torch.double)).T))

    @as_usual
    def predict_highest_density_region(self, X: Any, level: float = 0.9) -> HighestDensityRegion:
        """The smallest region of each row with this probability; for one output a union of intervals.

        With `conformal` its coverage is at least `level` on average over new rows, whatever the density is like.

        Args:
            X: B examples.
            level: Probability of the region.

        Raises:
            ValueError: If the level is not in (0, 1), or X does not fit.
        """
        check_level(level)
        x = self.encode(X)
        with threads(self.n_jobs):
            if hasattr(self, "conformal_regions_"):
                return self.conformal_regions_(x, level)
            return self._distribution(x).highest_density_region(level)

    @as_usual
    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw from p(y|x).

        Args:
            X: B examples.
            n_samples: Draws per row, S.
            random_state: Their seed; the estimator's by default, so that the same call gives the same draws.

        Returns:
            Shape (B, S), or (B, S, D) for several outputs. Counts are whole numbers.

        Raises:
            ValueError: If n_samples is no whole number of at least 1, or X does not fit.
        """
        from sklearn.utils import check_random_state
        from sklearn.utils.validation import check_is_fitted

        check_count("n_samples", n_samples)
        check_is_fitted(self)
        state = check_random_state(self.fitted_parameters_["random_state"] if random_state is None else random_state)
        generator = torch.Generator().manual_seed(int(state.randint(2**31 - 1)))
        draws = self._by_blocks(X, lambda p: p.sample((int(n_samples),), generator=generator).transpose(0, 1))
        return self.target_.round(draws[..., 0] if self.n_outputs_ == 1 else draws)

    @as_usual
    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        """Log-density of each target, in nats and the units of y.

        For counts it is the log-probability; for rounded values that of the value, per unit of y.

        Args:
            X: B examples.
            y: Targets, shape (B,) or (B, D). Without them the log-density to expect, minus the entropy: how certain
                the model is of each row.

        Returns:
            Shape (B,); -inf outside the target space, and for what is no count.

        Raises:
            ValueError: If y does not fit, or X does not.
        """
        if y is None:
            return -self._by_blocks(X, lambda p: p.entropy())
        x = self.encode(X)
        targets = read_targets(y, "y", len(x))
        if targets.shape[1] != self.n_outputs_:
            raise ValueError(f"y has {targets.shape[1]} column(s), but the estimator predicts {self.n_outputs_}.")
        parts = []
        with threads(self.n_jobs):
            for start in range(0, len(x), PREDICTION_ROWS):
                rows = slice(start, start + PREDICTION_ROWS)
                p = self._distribution(x[rows])
                parts.append(self.log_density(p, targets[rows]))
        return np.concatenate(parts)

    @as_usual
    def log_density(self, p: PredictiveDistribution, targets: np.ndarray) -> np.ndarray:
        """Log-densities as :meth:`score_samples` counts them, by a distribution that is there already.

        Args:
            p: What :meth:`predict_distribution` returned for B rows.
            targets: Their targets, shape (B, D).

        Returns:
            Shape (B,).
        """
        if self.lattice_step_ is None:
            return p.log_prob(torch.as_tensor(targets)).double().cpu().numpy()
        kind = self.target_.kinds[0]
        possible = kind.possible(targets)
        low, high = kind.bins(np.where(possible, targets, kind.inside(self.lattice_step_)), self.lattice_step_)
        log_probability = self._log_probability(p, low[None, :, 0], high[None, :, 0])[0]
        return np.where(possible[:, 0], log_probability - np.log(high - low)[:, 0], -np.inf)

    def _log_probability(self, p: PredictiveDistribution, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Log-probability of intervals, (S, B): by the cdf, or from the density where the difference is lost."""
        ends = torch.as_tensor(np.stack([low, high]))
        cdf = p.cdf(ends[..., None]).double().cpu()
        difference = (cdf[1] - cdf[0]).clamp_min(0).numpy()
        edge = self.target_.first_bin_edge
        if edge is not None:  # what lies below belongs to no value
            below = p.cdf(torch.full((1, len(low[0]), 1), edge, dtype=torch.double)).double().cpu().numpy()
            difference = difference / (1 - below)
        small = difference < 1e-3
        with np.errstate(divide="ignore"):
            result = np.log(difference)
        if small.any():
            nodes, weights = np.polynomial.legendre.leggauss(BIN_NODES)
            total = np.full(low.shape, -np.inf)
            for node, weight in zip(nodes, weights / 2, strict=True):
                place = torch.as_tensor(low + (high - low) * (node + 1) / 2)
                density = p.log_prob(place[..., None]).double().cpu().numpy()
                total = np.logaddexp(total, density + math.log(weight))
            total = total + np.log(high - low)
            result = np.where(small, total - (0.0 if edge is None else np.log(1 - below)), result)
        return result

    @as_usual
    def predict_probabilities(self, X: Any, values: Any) -> np.ndarray:
        """Probabilities of the values that counts or rounded targets can take.

        Args:
            X: B examples.
            values: Values, V of them.

        Returns:
            Shape (B, V). Over all values they sum to 1 (for rounded values to the probability of their range). For
            rounded values it is the probability of half a step to either side.

        Raises:
            ValueError: If the targets were neither counts nor rounded, a value is outside their space, or X does not
                fit.
        """
        x = self.encode(X)
        if self.lattice_step_ is None:
            raise ValueError(
                "predict_probabilities is for counts and rounded targets, but those of fit were continuous, where a "
                "single value has probability 0. Use predict_distribution(X).cdf, or fit with target='count'."
            )
        values = np.atleast_1d(np.asarray(values, dtype=float))
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"values has shape {values.shape}; expected finite numbers, shape (V,).")
        impossible = values[~self.target_.kinds[0].possible(values)]
        if len(impossible) and self.target_.counts:
            raise ValueError(f"values holds {impossible[0]:.9g}, which is no count; expected whole numbers ≥ 0.")
        if len(impossible):
            space = self.fitted_parameters_["target"]
            raise ValueError(f"values holds {impossible[0]:.9g}, outside the targets' space {space!r}.")
        low, high = self.target_.bins(values, self.lattice_step_)
        with threads(self.n_jobs):
            p = self._distribution(x)
            ends = [np.broadcast_to(end[:, None], (len(values), len(x))) for end in (low, high)]
            return np.exp(self._log_probability(p, *ends)).T

    def set_conformal(self, wanted: bool, x: np.ndarray, y: np.ndarray) -> None:
        """Take the conformal scores of encoded rows, or drop those that there are.

        Args:
            wanted: Whether there are to be any.
            x: Inputs of the model, shape (N, F).
            y: Targets, shape (N, D).
        """
        for name in ("conformal_regions_", "conformal_intervals_"):
            if hasattr(self, name):
                delattr(self, name)
        if not wanted:
            return
        if self.n_outputs_ > 1 and len(y) > ROWS_OF_SEVERAL[1]:
            chosen = np.random.default_rng(len(y)).choice(len(y), ROWS_OF_SEVERAL[1], replace=False)
            x, y = x[chosen], y[chosen]
        self.conformal_regions_ = ConformalRegions(self._distribution, x, y)
        if not any(self.model_.space.periodic):
            self.conformal_intervals_ = ConformalIntervals(self._distribution, x, y)

    # Files -----------------------------------------------------------------------------------------------------------

    @as_usual
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the fitted estimator to one safetensors file, without pickle; it appears whole or not at all.

        Args:
            path: File to write; the suffix ``.safetensors`` is appended where it is missing.

        Returns:
            The path of the file.

        Raises:
            sklearn.exceptions.NotFittedError: If the estimator has not been fitted.
            energyreg.CheckpointError: If a parameter cannot be stored.
            OSError: If the file cannot be written.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        return checkpoint.save_estimator(copy.deepcopy(self.model_).float(), self.state(), path)

    @classmethod
    @as_usual
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an estimator that :meth:`save` wrote; its predictions are those of the saved one.

        Args:
            path: File to read, with or without its suffix.

        Raises:
            FileNotFoundError: If there is no such file.
            energyreg.CheckpointError: If the file is damaged, or no estimator's.
        """
        model, state = checkpoint.load_estimator(path)
        with checkpoint.reading(path):
            return cls.from_state(model, state)

    def parameters(self) -> dict[str, Any]:
        """The parameters as they are now; lists are copied."""
        values = self.get_params(deep=False)
        return {name: copy.deepcopy(value) if isinstance(value, list) else value for name, value in values.items()}

    def state(self) -> dict[str, Any]:
        """What a file holds besides the model."""
        parameters = {name: _plain(value) for name, value in self.fitted_parameters_.items()}
        if not isinstance(parameters["random_state"], int):  # a generator cannot be stored
            parameters["random_state"] = None
        return {
            "parameters": parameters | dict.fromkeys(self.not_in_files),
            "preprocessor": self.preprocessor_.state(),
            "feature_names": self.feature_names_in_.tolist() if hasattr(self, "feature_names_in_") else None,
            "n_features": self.n_features_in_,
            "n_outputs": self.n_outputs_,
            "n_iter": self.n_iter_,
            "frequency_scales": self.frequency_scales_,
            "dropouts": self.dropouts_,
            "lattice_step": self.lattice_step_,
            "calibration": [self.calibration_.inverse_temperature, self.calibration_.base_share],
            "conformal": {
                name: getattr(self, name).scores[None].tolist()
                for name in ("conformal_regions_", "conformal_intervals_")
                if hasattr(self, name)
            },
            "linear_baseline": None if self.linear_baseline_ is None else self.linear_baseline_.state(),
            "histories": [history.to_dict() for history in self.histories_],
        }

    @classmethod
    def from_state(cls, model: Any, state: dict[str, Any]) -> Self:
        """The estimator of a model, and of the rest of what a file holds.

        Raises:
            ValueError: If the two do not make one. Other errors may be raised, too, by a state that is damaged.
        """
        check_type("state", state, State, finite=False)
        self = cls(**state["parameters"] | dict.fromkeys(cls.not_in_files))
        self._settings()
        if state["n_outputs"] != model.space.dim:
            raise ValueError(f"n_outputs is {state['n_outputs']}, but the model has {model.space.dim}")
        self.fitted_parameters_ = self.parameters()
        self.model_ = model
        self.preprocessor_ = TablePreprocessor.from_state(state["preprocessor"])
        if state["feature_names"] is not None:
            self.feature_names_in_ = np.asarray(state["feature_names"], dtype=object)
        self.space_ = model.space
        self.n_features_in_, self.n_outputs_, self.n_iter_ = state["n_features"], state["n_outputs"], state["n_iter"]
        self.target_ = Target.parse(self.target, self.n_outputs_)
        one = model.factors[0] if isinstance(model, EnergyChain) else model
        self.frequency_scales_, self.dropouts_ = state["frequency_scales"], state["dropouts"]
        self.member_weights_ = weights_of(model)
        self.n_members_ = len(one) if isinstance(one, EnergyEnsemble) else 1
        self.lattice_step_ = state["lattice_step"]
        self.histories_ = [History(**history) for history in state["histories"]]
        self.history_ = self.histories_[0]
        self.calibration_ = Calibration(*state["calibration"])
        line = state.get("linear_baseline")  # none in files of version 0.1
        sizes = len(self.preprocessor_.features_), self.preprocessor_.cardinalities_, self.n_outputs_
        self.linear_baseline_ = None if line is None else LinearGaussian.from_state(line, *sizes)
        for kind, name in ((ConformalRegions, "conformal_regions_"), (ConformalIntervals, "conformal_intervals_")):
            if name in state["conformal"]:
                setattr(self, name, kind.from_scores(self._distribution, np.asarray(state["conformal"][name])))
        check_state(self)
        self.model_.to(available(find_device(self.device)))
        if self.n_outputs_ == 1:
            self.model_.double()
        self.model_(np.zeros((1, self._width())))  # the inputs fit the model
        return self

    def _settings(self) -> Settings:
        """The parameters of the training, after a check of all."""
        return Settings.of(self)

    def _width(self) -> int:
        """Numbers of an input of the model."""
        return self.preprocessor_.num_numeric_ + len(self.preprocessor_.cardinalities_)


@undone_on_failure
def fit_rows(
    estimator: DensityRegressor,
    settings: Settings,
    source: Source,
    rows: Rows,
    x_evaluation: Any,
    started: float,
    replace_encoder: Callable[[Any], Any] | None = None,
) -> None:
    """Fit an estimator to a table in memory or in a file: sets all its attributes that end in an underscore.

    Args:
        estimator: The estimator.
        settings: Its parameters.
        source: The table.
        rows: What its rows are for, from `energyreg.estimators.learning.prepare`.
        x_evaluation: Table of the rows that the user holds out; None for none.
        started: When the time budget began, by :func:`time.perf_counter`.
        replace_encoder: Makes a member's encoder of the one for tables.
    """
    estimator.n_samples_fit_, estimator.fitted_parameters_ = source.rows, estimator.parameters()
    _set_features(estimator, source.given, source.names, source.width)
    estimator.target_, estimator.n_outputs_, estimator.lattice_step_ = rows.target, rows.space.dim, rows.step
    preprocessor = estimator.preprocessor_ = TablePreprocessor(settings.max_levels, settings.min_count)
    learned_on = rows_to_learn_from(rows.known[rows.train], source.width, rows.seed)
    preprocessor.fit_columns(source.names, source.take(learned_on), source.readings, list(map(str, source.warnings)))
    for warning in source.warnings:
        warnings.warn(warning, stacklevel=4)
    if preprocessor.dropped_ and replace_encoder is None:  # the columns that an encoder made say nothing to a user
        warnings.warn(ColumnWarning(preprocessor.dropped_), stacklevel=4)
    parts = [rows.known[part] for part in (rows.train, rows.held_out, rows.conformal)]
    with Scratch(ENCODED_IN_MEMORY if source.on_disk else None) as scratch:
        x, x_held_out, x_conformal = encode(source, preprocessor, parts, scratch)
        validation: Validation | None = None
        if rows.z_evaluation is not None:
            check_features(estimator, x_evaluation, "X of eval_set")
            encoded = preprocessor.transform(x_evaluation, "X of eval_set")
            if len(encoded) != len(rows.z_evaluation):
                encoded = encoded[rows.evaluated]
            validation = encoded, rows.z_evaluation, None
        elif len(rows.held_out):
            validation = x_held_out, rows.z[rows.held_out], rows.weights[rows.held_out]
        with threads(settings.n_jobs):
            learned = learn(settings, rows, x, validation, preprocessor.cardinalities_, started, replace_encoder)
        estimator.linear_baseline_ = _linear_baseline(rows, learned.model.space, x, preprocessor.cardinalities_)
    estimator.model_, estimator.calibration_ = learned.model, learned.calibration
    estimator.space_, estimator.member_weights_ = learned.model.space, weights_of(learned.model)
    estimator.histories_, estimator.history_ = learned.histories, learned.histories[0]
    estimator.n_iter_ = max(len(history.train_loss) for history in learned.histories)
    estimator.n_members_ = len(learned.trials)
    estimator.frequency_scales_ = [trial.frequency_scale for trial in learned.trials]
    estimator.dropouts_ = [trial.dropout for trial in learned.trials]
    estimator.set_conformal(settings.conformal, x_conformal, rows.targets[rows.conformal])


def _linear_baseline(rows: Rows, space: Any, x: Any, cardinalities: Sequence[int]) -> LinearGaussian | None:
    """A line through the training rows, which reports compare the model with; None where they are too few."""
    y = rows.targets[rows.train]
    if len(y) < 3:
        return None
    if rows.step is not None:  # the middle of a bin, which also at the ends of the space lies inside
        y = np.add(*rows.target.bins(y, rows.step)) / 2
    z = space.to_model(torch.as_tensor(y)).double().cpu().numpy()
    return LinearGaussian.fit(
        x, z, cardinalities=cardinalities, circles=space.periodic, weights=rows.weights[rows.train]
    )


def _set_features(estimator: Any, given: Sequence[Any] | None, names: Sequence[str] | None, count: int) -> None:
    """Number and names of the features, the latter where all are text."""
    estimator.n_features_in_ = count
    if names is not None and given is not None and all(isinstance(name, str) for name in given):
        estimator.feature_names_in_ = np.asarray(names, dtype=object)
    elif hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_


def draw_seed(random_state: Any) -> int:
    """A seed that the parameter of an estimator stands for."""
    from sklearn.utils import check_random_state

    return int(check_random_state(random_state).randint(2**31 - 1))


def _plain(value: Any) -> Any:
    """A constructor argument as a file can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, torch.device) else value
