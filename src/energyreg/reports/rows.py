"""The rows that a report on a table is about, and what its sections ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from energyreg.evaluation import LEVELS, Evaluation, JointScores, RowScores
from energyreg.reports.numbers import number

if TYPE_CHECKING:
    from pandas import DataFrame

    from energyreg.estimators.core import DensityRegressor

LEVEL = 0.9
"""Probability of the intervals and regions that are shown."""
BOOTSTRAPS = 400
IMPORTANCE_ROWS, IMPORTANCE_WORK, IMPORTANCE_COLUMNS = 2_000, 4_800, 12
"""Rows by which the importance of a column is found, as many as the second says for all of them together; and how many
columns of a wide table are looked at so closely."""
MODE_ROWS, PARTITION_ROWS = 500, 500
"""Rows whose modes are looked for, and whose log Z is examined."""
JOINT_ROWS, JOINT_MODE_ROWS = 1_000, 100
"""Rows whose joint density of several outputs is looked at by draws; by ascent, which costs more."""
RANGE_TO_BE_RELATIVE = 2.0
"""Ratio of the 95% to the 5% quantile from which on an interval is wide or narrow for its value."""
MODEL, MARGINAL, LINEAR = "Model", "Marginal", "Linear"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReportRows:
    """The rows of a report, as all its parts need them."""

    regressor: DensityRegressor
    table: DataFrame
    y: Array
    numbers: Sequence[str]
    targets: Sequence[str]
    scores: Evaluation
    joint: Mapping[str, JointScores]
    importances: Mapping[str, tuple[float, float]]
    total: int
    seed: int
    images: Sequence[str] | None = None

    @property
    def one(self) -> bool:
        return len(self.targets) == 1

    @property
    def importance_rows(self) -> int:
        """How many rows the importance of a column is found by."""
        return importance_rows(len(self.table), self.table.shape[1], self.one)

    @property
    def forecasts(self) -> dict[str, RowScores]:
        """Name → scores, the model first."""
        found = {MODEL: self.scores.model, MARGINAL: self.scores.marginal}
        return found | ({LINEAR: self.scores.linear} if self.scores.linear is not None else {})

    def relative(self, d: int) -> bool:
        """Whether the uncertainty of an output is judged relative to its value: where all have one sign, and differ."""
        size = np.abs(self.y[:, d])
        one_sign = (self.y[:, d] > 0).all() or (self.y[:, d] < 0).all() or self.regressor.target_.kinds[d].whole
        low, high = np.quantile(size, [0.05, 0.95])
        return bool(self.circle(d) is None and one_sign and high > RANGE_TO_BE_RELATIVE * low)

    @property
    def uncertainty(self) -> Array:
        """How uncertain the model is of each row: the width of its interval, of several outputs the mean rank.

        The width is divided by the median where that is :meth:`relative`.
        """
        model = self.scores.model
        width = model.width[:, LEVELS.index(LEVEL)].copy()
        for d in filter(self.relative, range(len(self.targets))):
            size = np.abs(self.y[:, d])
            median = np.abs(self.y[:, d] + model.median_error[:, d])
            width[:, d] /= median + 1 if self.regressor.target_.kinds[d].whole else np.maximum(median, size.min())
        return width[:, 0] if self.one else np.argsort(np.argsort(width, 0, kind="stable"), 0).mean(1)

    @property
    def by_width(self) -> str:
        """What the uncertainty is, in words."""
        relative = any(map(self.relative, range(len(self.targets))))
        return "the width of the 90% interval" + (", relative to the predicted median" if relative else "")

    @property
    def surprising(self) -> list[int]:
        """The rows, the least density first."""
        return np.argsort(-self.scores.model.nll, kind="stable").tolist()

    def circle(self, d: int) -> tuple[float, float] | None:
        """Ends of the range of an output that lies on a circle."""
        return self.regressor.target_.kinds[d].circle

    def place(self, value: float, d: int = 0) -> str:
        """A value of an output; on a circle within its range."""
        circle = self.circle(d)
        return number(circle[0] + (value - circle[0]) % (circle[1] - circle[0]) if circle else value)

    def suffix(self, d: int) -> str:
        return "" if self.one else f", {self.targets[d]}"


def importance_rows(rows: int, columns: int, one: bool) -> int:
    """How many of the rows the importance of a column is found by; fewer for several outputs, which cost more."""
    work = IMPORTANCE_WORK // max(min(columns, IMPORTANCE_COLUMNS), 1)
    return min(rows, max(work, 1) if one else max(work // 2, 1), IMPORTANCE_ROWS if one else JOINT_ROWS)


# ---------------------------------------------------------------------------------------------- numbers


def bootstrap_means(values: Array, seed: int) -> Array:
    """Means of the columns over resampled rows, (N, C) to (BOOTSTRAPS, C); the same rows for all columns."""
    rng = np.random.default_rng(seed)
    count = len(values)
    return np.stack([values[rng.integers(0, count, count)].mean(0) for _ in range(BOOTSTRAPS)])


def ends_of_bootstrap(means: Array) -> tuple[float, float]:
    """Ends of the 95% interval of bootstrapped means, shape (BOOTSTRAPS,)."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def by_chance(count: int, level: float) -> tuple[float, float]:
    """Shares of rows inside that a calibrated model has in 95 of 100 samples of this size."""
    from scipy.stats import binom

    low, high = binom.ppf([0.025, 0.975], count, level)
    return float(low) / count, float(high) / count


def marked(share: float, low: float, high: float) -> str:
    """A coverage, with an arrow where it is lower or higher than chance explains."""
    return f"{share:.1%}" + (" ↓" if share < low else " ↑" if share > high else "")


def shown_value(value: Any) -> str:
    """A cell of the table, as the page shows it."""
    import pandas

    if pandas.isna(value):
        return "missing"
    if isinstance(value, pandas.Timestamp):
        return f"{value:%Y-%m-%d %H:%M}".removesuffix(" 00:00")
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return number(float(value), 6)
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
