"""A batch of rows to named columns: points, intervals, quantiles, densities, probabilities and draws.

Everything here is a pure function of a fitted estimator, rows, and what is asked for: it prints nothing, opens no file,
and can be pickled, so that an engine may call it on its workers, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from energyreg.estimators.table import EnergyRegressor

__all__ = ["Asked", "output_names", "predict_columns", "sample_columns"]

POINTS = ("mean", "median", "mode")


@dataclass(frozen=True)
class Asked:
    """The columns that are asked for; of several outputs each of them for each output, but for the joint density.

    Args:
        points: One number a row: "mean", "median", "mode"; columns of these names.
        intervals: Levels of equal-tailed intervals; columns such as lower_90 and upper_90.
        quantiles: Levels; columns such as quantile_0.05.
        log_density: Whether to add log_density: the log-density of the target, in nats and its units, jointly over all
            outputs; without targets its expectation, minus the entropy.
        probabilities: Values of counts or rounded targets; columns such as probability_3.
        samples: Draws; columns such as sample_1.
        outputs: Names of several outputs, which precede those of their columns, as in price_mean; y1, y2, ... by
            default.

    Raises:
        ValueError: If an entry is out of its range.
    """

    points: Sequence[str] = ("mean",)
    intervals: Sequence[float] = (0.9,)
    quantiles: Sequence[float] = ()
    log_density: bool = False
    probabilities: Sequence[float] = ()
    samples: int = 0
    outputs: Sequence[str] = ()

    def __post_init__(self) -> None:
        for point in self.points:
            if point not in POINTS:
                raise ValueError(f"points has {point!r}; expected some of {', '.join(map(repr, POINTS))}.")
        for name, levels in (("intervals", self.intervals), ("quantiles", self.quantiles)):
            for level in levels:
                if not 0 < level < 1:
                    raise ValueError(f"{name} has {level!r}; expected probabilities between 0 and 1.")
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; expected a whole number of at least 0.")


def output_names(regressor: EnergyRegressor, given: Sequence[str] = ()) -> list[str]:
    """Names of the outputs: those given, or y, or y1, y2, ...

    Raises:
        ValueError: If there are not as many as the estimator predicts.
    """
    count = regressor.n_outputs_
    names = list(given) or ([f"y{i + 1}" for i in range(count)] if count > 1 else ["y"])
    if len(names) != count:
        raise ValueError(f"outputs names {len(names)} columns, but the estimator predicts {count}.")
    return names


def predict_columns(
    regressor: EnergyRegressor, x: Any, asked: Asked, y: Any = None, *, random_state: Any = None
) -> dict[str, np.ndarray]:
    """Predictions for rows, as columns.

    Args:
        regressor: The estimator, fitted.
        x: B rows, as its `predict` takes them.
        asked: The columns.
        y: Targets for the log-density, shape (B,) or (B, D).
        random_state: Of the draws, as `sample` takes it.

    Returns:
        Column by name, shape (B,) each, in the order of the outputs and, for each, of the fields of `Asked`.

    Raises:
        ValueError: If the rows or targets do not fit; see the estimator.

    >>> from energyreg.estimators.table import EnergyRegressor
    >>> x = np.linspace(0, 1, 20)[:, None]
    >>> regressor = EnergyRegressor(n_members=1, epochs=1, width=8, random_state=0).fit(x, x[:, 0])
    >>> columns = predict_columns(regressor, x, Asked(quantiles=(0.5,), log_density=True), x[:, 0])
    >>> list(columns), columns["mean"].shape
    (['mean', 'lower_90', 'upper_90', 'quantile_0.5', 'log_density'], (20,))
    """
    outputs = regressor.n_outputs_
    labels = [f"{name}_" for name in output_names(regressor, asked.outputs)] if outputs > 1 else [""]
    if outputs > 1 and asked.probabilities:
        raise ValueError("probabilities are those of one output, but the estimator predicts several; ask for none.")
    values: list[tuple[str, np.ndarray]] = []  # of all outputs, shape (B, D)
    for point in asked.points:
        values.append((point, regressor.predict(x, kind=point)))
    for level in asked.intervals:
        ends = regressor.predict_interval(x, level)
        percent = f"{100 * level:.10g}"
        values += [(f"lower_{percent}", ends[..., 0]), (f"upper_{percent}", ends[..., 1])]
    if asked.quantiles:
        several = regressor.predict_quantiles(x, list(asked.quantiles))
        values += [(f"quantile_{level:g}", several[:, i]) for i, level in enumerate(asked.quantiles)]
    if asked.probabilities:
        chances = regressor.predict_probabilities(x, list(asked.probabilities))
        values += [(f"probability_{value:g}", chances[:, i]) for i, value in enumerate(asked.probabilities)]
    if asked.samples:
        draws = regressor.sample(x, asked.samples, random_state=random_state)
        values += [(f"sample_{i + 1}", draws[:, i]) for i in range(asked.samples)]
    columns = {
        label + name: column.reshape(len(column), outputs)[:, d]
        for d, label in enumerate(labels)
        for name, column in values
    }
    return columns | ({"log_density": regressor.score_samples(x, y)} if asked.log_density else {})


def sample_columns(
    regressor: EnergyRegressor,
    x: Any,
    number: int,
    outputs: Sequence[str] = (),
    *,
    first_row: int = 1,
    random_state: Any = None,
) -> dict[str, np.ndarray]:
    """Draws for rows, as columns with an entry for each draw.

    Args:
        regressor: The estimator, fitted.
        x: B rows.
        number: Draws a row, S.
        outputs: Names of the outputs; y, or y1, y2, ... by default.
        first_row: What the first row is counted as.
        random_state: As `sample` takes it.

    Returns:
        The row, the draw from 1 to S, and a column for each output, shape (B S,) each.

    Raises:
        ValueError: If the rows do not fit, or the names are not as many as the outputs.
    """
    names = output_names(regressor, outputs)
    draws = regressor.sample(x, number, random_state=random_state)
    count = len(draws)
    flat = draws.reshape(count * number, len(names))
    return {
        "row": np.repeat(np.arange(first_row, first_row + count), number),
        "draw": np.tile(np.arange(1, number + 1), count),
    } | {name: flat[:, d] for d, name in enumerate(names)}
