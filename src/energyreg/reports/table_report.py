"""What a fitted estimator does on a table, as one page: scores, calibration, densities, importances, trust in log Z."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg import plots
from energyreg.evaluation import (
    LEVELS,
    Evaluation,
    JointScores,
    RowScores,
    evaluate,
    evaluate_jointly,
    evaluate_linear,
    permutation_importance,
)
from energyreg.evaluation.scores import QUANTILES
from energyreg.images.files import thumbnail
from energyreg.inference.modes import Modes
from energyreg.reports.page import Drawing, Gallery, GalleryItem, Section, SectionedReport, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

    from energyreg.estimators.table import EnergyRegressor

__all__ = ["describe", "number_of_steps"]

LEVEL = 0.9
"""Probability of the intervals and regions that are shown."""
BOOTSTRAPS = 400
IMPORTANCE_ROWS = 2_000
MODE_ROWS = 2_000
JOINT_ROWS, JOINT_MODE_ROWS, STARTS = 1_000, 100, 64
"""Rows whose joint density of several outputs is looked at by draws; by ascent, which costs more; and its starts."""
IMAGE_STEPS = 4
"""Steps of a report whatever the columns."""
SHOWN_IMAGES, THUMBNAIL = 6, 128
"""Images of each kind that are shown first, and their largest side in pixels."""
GRID = 4_001
SPREAD, SURPRISING, SEVERAL = 12, 12, 10
"""Rows of the gallery: evenly spread by certainty, most surprising, with several modes."""
GROUP_COLUMNS, GROUP_LEVELS = 20, 8
SHOWN_INPUTS = 40
"""Inputs of a row that stand beside its density, the most important first."""
PROMINENCE, LEAST_SHARE = 0.2, 0.05
"""Modes that count: how far the valley before a higher one lies below them, in nats, and their least probability."""
MOST_COUNTS = 500
DRAWS = 200
MODEL, MARGINAL, LINEAR = "Model", "Marginal", "Linear"
ALL_TAG, SURPRISE_TAG, MODES_TAG = "Evenly spread by certainty", "Most surprising", "Several modes"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Rows:
    """The rows of a report, as all its parts need them."""

    regressor: EnergyRegressor
    table: DataFrame
    y: Array
    numbers: Sequence[str]
    targets: Sequence[str]
    scores: Evaluation
    linear: RowScores | None
    joint: Mapping[str, JointScores]
    importances: Mapping[str, tuple[float, float]]
    total: int
    seed: int
    images: Sequence[str] | None = None

    @property
    def one(self) -> bool:
        return len(self.targets) == 1

    @property
    def forecasts(self) -> dict[str, RowScores]:
        """Name → scores, the model first."""
        found = {MODEL: self.scores.model, MARGINAL: self.scores.marginal}
        return found | ({LINEAR: self.linear} if self.linear is not None else {})

    @property
    def width(self) -> Array:
        """How uncertain the model is of each row: the width of its interval, of several outputs the mean rank."""
        width = self.scores.model.width[:, LEVELS.index(LEVEL)]
        return width[:, 0] if self.one else np.argsort(np.argsort(width, 0, kind="stable"), 0).mean(1)

    @property
    def surprising(self) -> list[int]:
        """The rows, the least density first."""
        return np.argsort(-self.scores.model.nll, kind="stable").tolist()

    @property
    def importance_order(self) -> list[str]:
        return list(self.importances)

    def circle(self, d: int) -> tuple[float, float] | None:
        """Ends of the range of an output that lies on a circle."""
        return self.regressor.target_.kinds[d].circle

    def show(self, value: float) -> str:
        return _minus(f"{value:.4g}")

    def place(self, value: float, d: int = 0) -> str:
        """A value of an output; on a circle within its range."""
        circle = self.circle(d)
        return self.show(circle[0] + (value - circle[0]) % (circle[1] - circle[0]) if circle else value)

    def suffix(self, d: int) -> str:
        return "" if self.one else f", {self.targets[d]}"


def describe(
    regressor: EnergyRegressor,
    table: DataFrame,
    y: Array,
    targets: Sequence[str],
    *,
    title: str,
    labels: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    total: int | None = None,
    images: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda steps: None,
) -> SectionedReport:
    """Build the report of an estimator on rows that it has not seen.

    Args:
        regressor: The estimator, fitted on a table with column names.
        table: Its columns, B rows; some thousand are enough.
        y: Targets, shape (B, D).
        targets: Names of the targets.
        title: Heading of the page.
        labels: What each row is called; their positions, from 1, by default.
        facts: Term → fact about model and data.
        total: How many rows these were chosen from; B by default.
        images: Files of the rows' images, B of them, where the estimator is one of images: the page shows them, and
            leaves out what is of use for columns only.
        seed: Seed of the bootstrap, the shuffling, the split for the linear baseline, and of draws.
        progress: Called with 1 after each of `number_of_steps(table)` steps; for images, of `IMAGE_STEPS`.

    Returns:
        The page, for :func:`energyreg.report.write`.

    Raises:
        ValueError: If the table does not fit the estimator, or there is not an image for each row.
        energyreg.images.ImageFileError: If an image cannot be read.
    """
    if images is not None and len(images) != len(table):
        raise ValueError(f"images has {len(images)} files, but table has {len(table)} rows; expected one for each.")
    table = table.reset_index(drop=True)
    size = 4_096
    chunks = ((table.iloc[i : i + size], y[i : i + size]) for i in range(0, len(table), size))
    scores = evaluate(regressor, chunks, seed=seed)
    progress(1)
    linear, lines = evaluate_linear(regressor, table, y, seed=seed) if len(y) >= 8 else (None, [])
    joint: dict[str, JointScores] = {}
    if len(targets) > 1:
        found = evaluate_jointly(regressor, table.iloc[:JOINT_ROWS], y[:JOINT_ROWS], lines, seed=seed)
        joint = {name: part for name, part in zip((MODEL, MARGINAL, LINEAR), found, strict=True) if part is not None}
    progress(1)
    some = slice(0, IMPORTANCE_ROWS if len(targets) == 1 else JOINT_ROWS)
    importances = {}
    if images is None:
        importances = permutation_importance(regressor, table.iloc[some], y[some], seed=seed, progress=progress)
    numbers = list(labels or [str(i + 1) for i in range(len(table))])
    rows = _Rows(
        regressor, table, y, numbers, targets, scores, linear, joint, importances, total or len(table), seed, images
    )  # fmt: skip
    modes = _modes(rows, min(len(y), MODE_ROWS if rows.one else JOINT_MODE_ROWS))
    progress(1)
    several = [i for i, count in enumerate(modes.counts.tolist()) if count > 1]
    several.sort(key=lambda i: -float(modes.probabilities[i][1]))
    chosen, gallery, keys = _densities(rows, modes, several)
    sections = [
        _data(rows), _scores(rows), _calibration(rows), _sharpness(rows), _groups(rows), chosen, gallery,
        _surprises(rows, keys), _several_modes(rows, modes, several, keys),
        *([_importance(rows)] if images is None else []), _partition(rows),
        Section("setup", "Model and run", facts=dict(facts or {}), short="Setup"),
    ]  # fmt: skip
    progress(1)
    return SectionedReport(title, _summary(rows), sections, ["Made by energyreg."])


def number_of_steps(table: DataFrame) -> int:
    """How many steps `describe` takes for a table."""
    return IMAGE_STEPS + table.shape[1]


# ---------------------------------------------------------------------------------------------- numbers


def _minus(text: str) -> str:
    return text.replace("-", "−") if not text.startswith("-inf") else "−∞"


def _fixed(size: float) -> Callable[[float], str]:
    """How numbers around a size are shown: with the decimals that give it four digits, the same for all."""
    if not 1e-4 <= abs(size) < 1e7:
        return lambda value: _minus(f"{value:.3g}")
    decimals = max(3 - math.floor(math.log10(abs(size))), 0)
    return lambda value: _minus(f"{value:.{decimals}f}")


def _bootstrap_means(values: Array, seed: int) -> Array:
    """Means of the columns over resampled rows, (N, C) to (BOOTSTRAPS, C); the same rows for all columns."""
    rng = np.random.default_rng(seed)
    count = len(values)
    return np.stack([values[rng.integers(0, count, count)].mean(0) for _ in range(BOOTSTRAPS)])


def _ends(means: Array) -> tuple[float, float]:
    """Ends of the 95% interval of bootstrapped means, shape (BOOTSTRAPS,)."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _by_chance(count: int, level: float) -> tuple[float, float]:
    """Shares of rows inside that a calibrated model has in 95 of 100 samples of this size."""
    from scipy.stats import binom

    low, high = binom.ppf([0.025, 0.975], count, level)
    return float(low) / count, float(high) / count


def _summary(rows: _Rows) -> list[str]:
    count = rows.scores.rows
    names = " and ".join(rows.targets)
    model = rows.scores.model
    infinite = int((~np.isfinite(model.nll)).sum())
    if infinite:
        return [
            f"The density is zero at the observed values of {infinite:,} of {count:,} rows, so the mean log-density is "
            f"infinite: see the most surprising rows. Do {names} lie in the range that the model was told?"
        ]
    gains = {name: other.nll - model.nll for name, other in rows.forecasts.items() if name != MODEL}
    what = {
        MARGINAL: f"a constant forecast, the marginal distribution of {names} in training",
        LINEAR: "a linear Gaussian forecast",
    }
    texts = []
    for name, gain in gains.items():
        if not np.isfinite(gain).all():
            continue
        low, high = _ends(_bootstrap_means(gain[:, None], rows.seed)[:, 0])
        mean = float(gain.mean())
        verdict = (
            "predicts better than"
            if low > 0
            else "predicts worse than"
            if high < 0
            else "is not clearly better or worse than"
        )
        texts.append(
            f"the model {verdict} {what[name]}: it gives the observed values {math.exp(min(mean, 50)):.3g} times the "
            + _minus(f"density in the geometric mean ({mean:.3f} nats; 95% interval {low:.3f} to {high:.3f}).")
        )
    first = [f"On {count:,} rows {texts[0]}"] if texts else []
    further = [f"Also, {text}" for text in texts[1:]]
    inside = model.inside[:, LEVELS.index(LEVEL)].mean(0)
    low, high = _by_chance(count, LEVEL)
    parts = []
    for d, share in enumerate(inside):
        kept = "as promised" if low <= share <= high else "fewer than promised" if share < low else "more than promised"
        of = "" if rows.one else f" of {rows.targets[d]}"
        parts.append(f"{share:.1%} of the observed values{of}, {kept}")
    return [*first, *further, f"Its 90% intervals hold {'; '.join(parts)} (by chance {low:.1%} to {high:.1%})."]


def _scores(rows: _Rows) -> Section:
    others = [name for name in rows.forecasts if name != MODEL]
    headings = ["Score", MODEL]
    for name in others:
        headings += [name, f"Model − {name.lower()}"]
    lines: list[list[str]] = []
    index = LEVELS.index(LEVEL)

    def line(
        name: str, values: Mapping[str, Array], show: Callable[[float], str] | None = None, root: bool = False
    ) -> None:
        power = 0.5 if root else 1.0
        own = values[MODEL]
        if show is None:
            show = _fixed(float(own.mean()) ** power)
        stacked = np.stack([values[key] for key in (MODEL, *others)], 1)
        finite = [bool(np.isfinite(column).all()) for column in stacked.T]
        means = _bootstrap_means(np.where(np.array(finite), stacked, 0.0), rows.seed) ** power
        low, high = _ends(means[:, 0])
        cells = [f"{show(float(own.mean()) ** power)} ({show(low)} to {show(high)})" if finite[0] else "infinite"]
        for i, key in enumerate(others, 1):
            other = float(values[key].mean())
            cells.append(show(other**power) if finite[i] else "infinite")
            if finite[0] and finite[i]:
                low, high = _ends(means[:, 0] - means[:, i])
                difference = float(own.mean()) ** power - other**power
                cells.append(f"{show(difference)} ({show(low)} to {show(high)})")
            else:
                cells.append("–")
        lines.append([name, *cells])

    def of(part: Callable[[RowScores], Array]) -> dict[str, Array]:
        return {name: part(scores) for name, scores in rows.forecasts.items()}

    nats: Callable[[float], str] = lambda v: _minus(f"{v:.3f}")  # noqa: E731
    share: Callable[[float], str] = lambda v: _minus(f"{v:.1%}")  # noqa: E731
    line("NLL (nats)", of(lambda s: s.nll), nats)
    if rows.joint:
        line("Energy score", {name: part.energy_score for name, part in rows.joint.items()})
    for d in range(len(rows.targets)):
        suffix = rows.suffix(d)
        line(f"CRPS{suffix}", of(lambda s, d=d: s.crps[:, d]))  # type: ignore[misc]
        line(f"RMSE of the mean{suffix}", of(lambda s, d=d: s.error[:, d] ** 2), root=True)  # type: ignore[misc]
        line(f"MAE of the median{suffix}", of(lambda s, d=d: abs(s.median_error[:, d])))  # type: ignore[misc]
        line(f"Coverage of 90% intervals{suffix}", of(lambda s, d=d: s.inside[:, index, d]), share)  # type: ignore[misc]
    terms = {
        "NLL": "Mean of −log p at the observed values. Lower is better; 0.69 less is twice the density."
        + ("" if rows.one else " That of all outputs jointly."),
        "CRPS": "How far the predicted distribution lies from the observed value, in the unit of the target. Lower is "
        "better; for a forecast without spread it is the absolute error."
        + (" On a circle, distances go the shorter way." if any(map(rows.circle, range(len(rows.targets)))) else ""),
        "Marginal": "The constant forecast: the distribution of the training targets, the same for every row"
        + ("." if rows.one else ", with independent outputs."),
        "Linear": "A Gaussian of constant width around a linear function of "
        + ("the inputs (categories one-hot)" if rows.images is None else "the network's features")
        + ", in the target space of the model: positive targets are linear in their logarithm, bounded ones in their "
        "logit, angles in the direction. It was fitted to these rows, each predicted from the other folds of five.",
        "Model − other": "Negative is better for the model in all scores but the coverage. An interval without zero is "
        "a difference that chance does not explain.",
    }
    if rows.joint:
        terms["Energy score"] = (
            f"The CRPS of all outputs together, each divided by its standard deviation in training; on {JOINT_ROWS:,} "
            "rows at most, by draws."
        )
    return Section(
        "scores", "Scores against baselines",
        ["In brackets are 95% intervals by bootstrap over the rows; those of differences resample pairs."],
        [Table("Table of scores", headings, lines)], terms, short="Scores",
    )  # fmt: skip


def _calibration(rows: _Rows) -> Section:
    drawings = []
    for d, target in enumerate(rows.targets):
        suffix = "" if rows.one else f" of {target}"
        pits = {name: scores.pit[:, d].clip(0, 1) for name, scores in rows.forecasts.items()}
        pit = pits[MODEL]
        bars = np.histogram(pit, 20, range=(0, 1))[0] * 20 / len(pit)
        drawings.append(
            Drawing(
                lambda pit=pit: plots.pit_histogram(pit),  # type: ignore[misc]
                f"Histogram of the PIT values{suffix} of the model, 20 bars between {bars.min():.2f} and "
                f"{bars.max():.2f}; 1 everywhere is calibrated.",
                f"PIT{suffix}",
            )
        )
        below = "; ".join(
            f"{name} {np.mean(pit <= 0.1):.1%}, {np.mean(pit <= 0.5):.1%}, {np.mean(pit <= 0.9):.1%}"
            for name, pit in pits.items()
        )
        drawings.append(
            Drawing(
                lambda pits=pits: plots.reliability_curve(pits),  # type: ignore[misc]
                f"Reliability diagram{suffix}: share of observed values below the predicted quantiles, against their "
                f"level. Below the 10%, 50% and 90% quantile: {below}.",
                f"Reliability of quantiles{suffix}",
            )
        )
        kept = "; ".join(f"{name} {np.mean(np.abs(2 * pit - 1) <= LEVEL):.1%}" for name, pit in pits.items())
        for gap in (False, True):
            drawings.append(
                Drawing(
                    lambda pits=pits, gap=gap: plots.coverage_curve(pits, gap=gap),  # type: ignore[misc]
                    f"{'Difference of kept and promised' if gap else 'Kept against promised'} probability of intervals"
                    f"{suffix}. At a promised 90%: {kept}.",
                    f"{'The difference, enlarged' if gap else 'Reliability of intervals'}{suffix}",
                )
            )
    paragraphs = [
        "For each row, take the probability that the model gave to all values below the observed one (PIT). If the "
        "model is right, these numbers are spread evenly: a hump in the middle means densities that are too wide, "
        "high ends mean too narrow ones. The grey band is what chance explains.",
        "The reliability diagrams compare what was promised with what came true: of 100 observed values 10 should lie "
        "below the 10% quantile, and 90 inside an interval that promises 90%.",
    ]
    if rows.regressor.lattice_step_ is not None:
        paragraphs.append("A rounded value lies anywhere within its rounding: where, is chosen at random for the PIT.")
    if rows.joint:
        level = rows.joint[MODEL].level
        assert level is not None
        kept = "; ".join(f"{np.mean(level <= at):.1%} at {at:.0%}" for at in LEVELS)
        drawings.append(
            Drawing(
                # An interval of probability c holds y where |2F − 1| ≤ c; a smallest region, where its level is ≤ c.
                lambda: plots.coverage_curve({MODEL: (1 + level) / 2}),
                f"Share of rows in the smallest joint region of a promised probability: {kept}.",
                "Smallest joint regions", f"Regions of all outputs together, on {len(level):,} rows.",
            )
        )  # fmt: skip
    return Section("calibration", "Are the probabilities kept?", paragraphs, drawings=drawings, short="Calibration")


def _sharpness(rows: _Rows) -> Section:
    index = LEVELS.index(LEVEL)
    lines, drawings = [], []
    for d, target in enumerate(rows.targets):
        for i, level in enumerate(LEVELS):
            low, high = _by_chance(rows.scores.rows, level)
            pairs = [(float(s.inside[:, i, d].mean()), float(s.width[:, i, d].mean())) for s in rows.forecasts.values()]
            cells = [f"{_marked(share, low, high)}; {rows.show(width)}" for share, width in pairs]
            lines.append([f"{level:.0%}{rows.suffix(d)}", f"{low:.1%} to {high:.1%}", *cells])
        widths = {name: scores.width[:, index, d] for name, scores in rows.forecasts.items()}
        spread = "; ".join(
            f"{name} {rows.show(float(np.median(width)))} ({rows.show(float(np.quantile(width, 0.1)))} to "
            f"{rows.show(float(np.quantile(width, 0.9)))})"
            for name, width in widths.items()
        )
        drawings.append(
            Drawing(
                lambda widths=widths, target=target: plots.sharpness(  # type: ignore[misc]
                    widths, label=f"width of the 90% interval of {target}"
                ),
                f"Share of rows with a 90% interval of {target} up to a width. Median width (10% to 90% of the rows): "
                f"{spread}.",
                "Widths" if rows.one else f"Widths of {target}",
                "Further to the left is sharper. A steep curve means the same width for all rows.",
            )
        )
    headings = ["Promised", "By chance", *[f"{name}: coverage; width" for name in rows.forecasts]]
    return Section(
        "sharpness", "Sharpness",
        ["How narrow the intervals are. Of two models that keep their promises the sharper one says more. Arrows mark "
         "coverages below (↓) or above (↑) what chance explains; the width is the mean over the rows."],
        [Table("Coverage and width of intervals", headings, lines)], drawings=drawings,
    )  # fmt: skip


def _marked(share: float, low: float, high: float) -> str:
    """A coverage, with an arrow where it is lower or higher than chance explains."""
    return f"{share:.1%}" + (" ↓" if share < low else " ↑" if share > high else "")


def _columns_of_groups(rows: _Rows) -> dict[str, list[tuple[str, NDArray[np.bool_]]]]:
    """What rows are grouped by → groups with their rows."""
    width = rows.width
    order = np.argsort(np.argsort(width, kind="stable"))
    quarter = np.minimum(4 * order // max(len(width), 1), 3)
    names = ("Most certain quarter", "Second quarter", "Third quarter", "Least certain quarter")
    groups = {"certainty of the model": [(name, quarter == number) for number, name in enumerate(names)]}
    for column in rows.importance_order[:GROUP_COLUMNS]:
        found = _levels_of(rows.table[column])
        if len(found) > 1:
            groups[column] = found
    return groups


def _levels_of(series: Series) -> list[tuple[str, NDArray[np.bool_]]]:
    """Groups of a column's rows: its values where they are few, else quarters of numbers or the most frequent."""
    import pandas

    known = series.dropna()
    levels = known.unique()
    missing = series.isna().to_numpy(bool)
    numeric = pandas.api.types.is_numeric_dtype(series.dtype) and not pandas.api.types.is_bool_dtype(series.dtype)
    ordered = numeric or pandas.api.types.is_datetime64_any_dtype(series.dtype)
    groups: list[tuple[str, NDArray[np.bool_]]] = []
    if ordered and len(levels) > 4:
        edges = known.quantile([0, 0.25, 0.5, 0.75, 1]).drop_duplicates().tolist()
        for i, (low, high) in enumerate(pairwise(edges)):
            inside = ((series >= low) if i == 0 else (series > low)) & (series <= high)
            show = (lambda v: _minus(f"{v:.4g}")) if numeric else (lambda v: f"{v:%Y-%m-%d}")
            groups.append((f"{'' if i == 0 else 'above '}{show(low)} to {show(high)}", inside.to_numpy(bool)))
    else:
        kept = levels
        if len(levels) > GROUP_LEVELS:
            kept = known.value_counts().index[: GROUP_LEVELS - 1]
        elif ordered:
            kept = sorted(levels)
        groups = [(str(level), (series == level).fillna(False).to_numpy(bool)) for level in kept]
        if len(kept) < len(levels):
            rest = ~missing & ~np.any([chosen for _, chosen in groups], axis=0)
            groups.append((f"{len(levels) - len(kept):,} others", rest))
    return [*groups, ("missing", missing)] if missing.any() else groups


def _groups(rows: _Rows) -> Section:
    model = rows.scores.model
    by: list[str] = []
    outputs: list[str] = []
    lines: list[list[Any]] = []
    for column, groups in _columns_of_groups(rows).items():
        for name, chosen in groups:
            count = int(chosen.sum())
            if count == 0:
                continue
            for d, target in enumerate(rows.targets):
                by.append(column)
                outputs.append(target)
                cells: list[Any] = [name, {"text": f"{count:,}", "sort": count}]
                for i, level in enumerate(LEVELS):
                    share = float(model.inside[chosen, i, d].mean())
                    cells.append({"text": _marked(share, *_by_chance(count, level)), "sort": share})
                width = float(model.width[chosen, LEVELS.index(LEVEL), d].mean())
                error = float(np.abs(model.median_error[chosen, d]).mean())
                nll = float(model.nll[chosen].mean())
                cells += [
                    {"text": rows.show(width), "sort": width}, {"text": rows.show(error), "sort": error},
                    {"text": _minus(f"{nll:.3f}"), "sort": nll},
                ]  # fmt: skip
                lines.append(cells)
    headings = ["Group", "Rows", *[f"{level:.0%}" for level in LEVELS], "Width (90%)", "MAE", "NLL"]
    filters = {"Groups by": by} | ({} if rows.one else {"Output": outputs})
    more = len(rows.importance_order) - GROUP_COLUMNS
    note = f" The {GROUP_COLUMNS} most important columns are looked at, {more} more are not." if more > 0 else ""
    return Section(
        "groups", "Coverage by group",
        ["Intervals of 50%, 80%, 90% and 95% should hold their share in parts of the data, too. Arrows mark coverages "
         "below (↓) or above (↑) what chance explains for 95 of 100 groups of that size: expect one of 20. "
         "Quarters of the certainty go by the width of the predicted interval: where the model is less certain, the "
         "mean absolute error (MAE) should be larger." + note],
        [Table("Coverage by group", headings, lines, sortable=True, filters=filters)], short="Groups",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- single rows


def _densities(rows: _Rows, modes: Modes, several: Sequence[int]) -> tuple[Section, Section, dict[int, str]]:
    """The sections of chosen rows and of the gallery, and row → its id in the page."""
    order = np.argsort(rows.width, kind="stable")
    last = len(order) - 1
    chosen: dict[int, tuple[str, str]] = {}
    if rows.images is None:
        for share, name, what in (
            (0.01, "Certain", "less certain of 99%"), (0.5, "Typical", "less certain of half"),
            (0.99, "Uncertain", "more certain of 99%"),
        ):  # fmt: skip
            chosen[int(order[round(share * last)])] = name, f"The model is {what} of the rows."
    else:
        for name, ranked in (("Most certain", order[:SHOWN_IMAGES]), ("Least certain", order[::-1][:SHOWN_IMAGES])):
            for rank, row in enumerate(ranked.tolist()):
                chosen.setdefault(row, (f"{name}, {rank + 1}", ""))
    for rank, row in enumerate(rows.surprising[: 3 if rows.images is None else SHOWN_IMAGES]):
        note = "" if rows.images is not None else "Among the rows with the least density at the observed value."
        chosen.setdefault(row, (f"Surprise {rank + 1}", note))
    for row in several[:3]:
        chosen.setdefault(row, ("Several modes", f"{len(modes.values[row])} modes."))
    tags: dict[int, list[str]] = {}
    spread = order[np.unique(np.linspace(0, last, min(SPREAD, len(order))).round().astype(int))].tolist()
    groups = {ALL_TAG: spread, SURPRISE_TAG: rows.surprising[:SURPRISING], MODES_TAG: list(several[:SEVERAL])}
    for tag, members in groups.items():
        for row in members:
            tags.setdefault(row, []).append(tag)
    items = [
        GalleryItem(
            f"row-{row + 1}", _density(rows, row, f"Row {rows.numbers[row]}", ""), tags[row], _inputs(rows, row)
        )
        for row in tags
    ]
    kind = (
        "The bars are the probabilities of the counts; the number at the right is the log-probability of what was "
        "observed (the dashed line)."
        if rows.regressor.target_.counts
        else "The strong colour holds 90% of the probability in the smallest region. The dashed line is what was "
        "observed, the number at the right is log p there."
        if rows.one
        else f"{DRAWS} draws from each row's joint density; the cross or the dashed line is what was observed."
    )
    if rows.circle(0) and rows.one:
        kind += " The axis is a whole turn: its ends are the same point, opposite the mean."
    drawings = [_density(rows, row, f"{title}: row {rows.numbers[row]}", note) for row, (title, note) in chosen.items()]
    title = "Densities of chosen rows"
    if rows.images is not None:
        title = "Images and their densities"
        kind = (
            "The images that the model is most certain of, those that it is least certain of (by the width of the 90% "
            f"interval), and the most surprising ones: they got the least density at the observed value. {kind}"
        )
    return (
        Section("densities", title, [kind], drawings=drawings, short="Densities"),
        Section(
            "rows", "Row by row",
            [f"{len(items)} rows to look through: from the most certain to the least, the most surprising, and those "
             "with several modes."],
            gallery=Gallery("Densities row by row", items),
        ),
        {row: f"#row-{row + 1}" for row in tags},
    )  # fmt: skip


def _inputs(rows: _Rows, row: int) -> dict[str, str]:
    names = rows.importance_order
    facts = {name: _value(rows.table[name].iloc[row]) for name in names[:SHOWN_INPUTS]}
    if len(names) > SHOWN_INPUTS:
        facts["And"] = f"{len(names) - SHOWN_INPUTS:,} more columns"
    return facts


def _value(value: Any) -> str:
    import pandas

    if pandas.isna(value):
        return "missing"
    if isinstance(value, pandas.Timestamp):
        return f"{value:%Y-%m-%d %H:%M}".removesuffix(" 00:00")
    if isinstance(value, (float, np.floating)):
        return _minus(f"{value:.6g}")
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _density(rows: _Rows, row: int, title: str, note: str) -> Drawing:
    """The density of a row, below its image where it has one."""
    drawing = (_one_density if rows.one else _joint_density)(rows, row, title, note)
    if rows.images is None:
        return drawing
    name = Path(rows.images[row]).name
    ends = rows.regressor.predict_interval(rows.table.iloc[row : row + 1], LEVEL)[0].reshape(-1, 2)
    parts = "; ".join(
        f"{target} observed {rows.place(rows.y[row, d], d)}, 90% interval {rows.place(low, d)} to {rows.place(high, d)}"
        for d, (target, (low, high)) in enumerate(zip(rows.targets, ends, strict=True))
    )
    return replace(
        drawing, caption=". ".join(filter(None, [name, drawing.caption])), photo=thumbnail(rows.images[row], THUMBNAIL),
        photo_alternative=f"{name}: {parts}",
    )  # fmt: skip


def _one_density(rows: _Rows, row: int, title: str, note: str) -> Drawing:
    one_row = rows.table.iloc[row : row + 1]
    number = rows.numbers[row]
    observed, target = float(rows.y[row, 0]), rows.targets[0]
    begin = f"Predicted density of {target} for row {number}."
    if rows.regressor.target_.counts:
        low, high = rows.regressor.predict_quantiles(one_row, [0.001, 0.999])[0]
        values = np.arange(math.floor(low), math.floor(high) + 1, dtype=float)
        if len(values) <= 80:
            values = np.union1d(values, [observed]) if abs(observed - values).min() < 40 else values
            shares = rows.regressor.predict_probabilities(one_row, values)[0]
            ends = rows.regressor.predict_interval(one_row, LEVEL)[0]
            best = values[int(shares.argmax())]
            return Drawing(
                lambda: plots.probabilities(values, shares, observed, label=target),
                f"Predicted probabilities of {target} for row {number}. The most probable value is {best:g} "
                f"({shares.max():.0%}); 90% interval {ends[0]:g} to {ends[1]:g}. Observed: {observed:g}.",
                title, note,
            )  # fmt: skip
    p = rows.regressor.predict_distribution(one_row)
    intervals = p.highest_density_region(LEVEL).intervals
    assert intervals is not None
    region = " and ".join(f"{rows.place(float(low))} to {rows.place(float(high))}" for low, high in intervals[0])

    def draw() -> Figure:
        return plots.densities({MODEL: p}, [observed], level=LEVEL, label=target, columns=1, circle=rows.circle(0))

    return Drawing(draw, f"{begin} 90% region {region}. Observed: {rows.show(observed)}.", title, note)


def _joint_density(rows: _Rows, row: int, title: str, note: str) -> Drawing:
    draws = rows.regressor.sample(rows.table.iloc[row : row + 1], DRAWS, random_state=rows.seed)[0]
    observed = rows.y[row].copy()
    intervals = rows.regressor.predict_interval(rows.table.iloc[row : row + 1], LEVEL)[0]
    for d in range(len(rows.targets)):
        circle = rows.circle(d)
        if circle is None:
            continue
        # A turn around the middle of the interval, so that what belongs together is not cut apart.
        period = circle[1] - circle[0]
        start = intervals[d].mean() - period / 2
        draws[:, d] = start + (draws[:, d] - start) % period
        observed[d] = start + (observed[d] - start) % period
    parts = "; ".join(
        f"{name} {rows.place(low, d)} to {rows.place(high, d)}, observed {rows.place(observed[d], d)}"
        for d, (name, (low, high)) in enumerate(zip(rows.targets, intervals, strict=True))
    )
    return Drawing(
        lambda: plots.joint_draws(draws, observed, labels=list(rows.targets)),
        f"Draws from the predicted joint density for row {rows.numbers[row]}. 90% intervals: {parts}.",
        title, note,
    )  # fmt: skip


def _heading(rows: _Rows, row: int, keys: Mapping[int, str], suffix: str = "") -> dict[str, Any]:
    """First cell of a line about a row, with a link to its density where the page has it."""
    text: dict[str, Any] = {"text": f"Row {rows.numbers[row]}{suffix}"}
    return text | ({"href": keys[row]} if row in keys else {})


def _surprises(rows: _Rows, keys: Mapping[int, str]) -> Section:
    model = rows.scores.model
    lines = []
    for row in rows.surprising[:SURPRISING]:
        for d in range(len(rows.targets)):
            mean, pit, log_p = float(rows.y[row, d] + model.error[row, d]), float(model.pit[row, d]), -model.nll[row]
            lines.append(
                [
                    _heading(rows, row, keys, rows.suffix(d)),
                    {"text": rows.show(rows.y[row, d]), "sort": float(rows.y[row, d])},
                    {"text": rows.place(mean, d), "sort": mean},
                    {"text": _below(pit, rows.one), "sort": pit},
                    {"text": _minus(f"{log_p:.2f}"), "sort": max(float(log_p), -1e300)},
                ]
            )
    headings = ["Row", "Observed", "Predicted mean", "Probability below", "log p" if rows.one else "log p (joint)"]
    return Section(
        "surprises", "Most surprising rows",
        ["The rows whose observed value got the least density: errors in the data, rare cases, or what the model "
         "lacks. A row leads to its density."],
        [Table("Most surprising rows", headings, lines, sortable=True)], short="Surprises",
    )  # fmt: skip


def _modes(rows: _Rows, count: int) -> Modes:
    """Pronounced modes of the first rows; of counts, of the probabilities."""
    table = rows.table.iloc[:count]
    if rows.regressor.target_.counts:
        most = float(rows.regressor.predict_quantiles(table, [1 - 1e-4]).max())
        if most < MOST_COUNTS:
            values = np.arange(most + 2)
            return _modes_of_counts(values, rows.regressor.predict_probabilities(table, values))
    return rows.regressor.predict_distribution(table).modes(
        min_prominence=PROMINENCE, min_probability=LEAST_SHARE, num_starts=STARTS
    )


def _modes_of_counts(values: Array, shares: Array) -> Modes:
    """Peaks of probabilities, shape (B, V), of the values 0, 1, ...: as `PredictiveDistribution.modes` finds them."""
    found: list[tuple[Array, Array, Array]] = []
    for row in shares:
        with np.errstate(divide="ignore"):
            height = np.log(np.maximum(row, 1e-300))
        padded = np.concatenate([[-np.inf], height, [-np.inf]])
        peaks = np.flatnonzero((padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:])).tolist()
        while True:  # the least pronounced joins its neighbour, until all are pronounced
            valleys = [a + int(height[a : b + 1].argmin()) for a, b in pairwise(peaks)]
            edges = [0, *valleys, len(values)]
            mass = [float(row[a:b].sum()) for a, b in pairwise(edges)]
            if len(peaks) == 1:
                break
            depth = [
                min(
                    height[peak] - height[valley]
                    for valley in ([valleys[i - 1]] if i else []) + ([valleys[i]] if i < len(valleys) else [])
                )
                for i, peak in enumerate(peaks)
            ]
            weak = [i for i in range(len(peaks)) if depth[i] < PROMINENCE or mass[i] < LEAST_SHARE]
            if not weak:
                break
            del peaks[min(weak, key=lambda i: height[peaks[i]])]
        order = np.argsort(-np.array(mass), kind="stable")
        at = np.array(peaks)[order]
        found.append((values[at][:, None], height[at], np.array(mass)[order]))
    return Modes(*([torch.as_tensor(part[i]) for part in found] for i in range(3)))


def _below(pit: float, exact: bool) -> str:
    """Probability below a value; from quantiles, as of several outputs, it is known between the outermost only."""
    end = 0.5 / QUANTILES
    if not exact and not end < pit < 1 - end:
        return f"below {end:.1%}" if pit <= end else f"above {1 - end:.1%}"
    return f"{pit:.3%}" if exact else f"{pit:.1%}"


def _several_modes(rows: _Rows, modes: Modes, several: Sequence[int], keys: Mapping[int, str]) -> Section:
    lines = []
    for row in several[:SEVERAL]:
        pairs = list(zip(modes.values[row].tolist(), modes.probabilities[row].tolist(), strict=True))[:3]

        def at(value: Sequence[float]) -> str:
            parts = [rows.place(part, d) for d, part in enumerate(value)]
            return parts[0] if rows.one else f"({', '.join(parts)})"

        places = "; ".join(f"{at(value)} ({share:.0%})" for value, share in pairs)
        count = len(modes.values[row])
        observed = at(rows.y[row].tolist())
        second = float(modes.probabilities[row][1])
        lines.append(
            [_heading(rows, row, keys), {"text": str(count), "sort": count}, {"text": places, "sort": second}, observed]
        )
    looked_at = len(modes.values)
    share = len(several) / looked_at
    text = f"{len(several):,} of {looked_at:,} rows ({share:.1%}) have a density with more than one mode."
    if several:
        text += " The most pronounced: where the modes are, and how much probability lies around each."
    headings = ["Row", "Modes", "At (probability)", "Observed"]
    table = [Table("Rows with several modes", headings, lines, sortable=True)] if lines else []
    return Section("modes", "Rows with several modes", [text], table, short="Modes")


# ---------------------------------------------------------------------------------------------- the whole


def _importance(rows: _Rows) -> Section:
    losses = rows.importances
    count = min(len(rows.y), IMPORTANCE_ROWS if rows.one else JOINT_ROWS)
    top = max([mean for mean, _ in losses.values()] + [1e-12])
    lines = [
        [name, {"text": _minus(f"{mean:.3f}"), "share": max(mean, 0.0) / top, "sort": mean}, f"± {1.96 * error:.3f}"]
        for name, (mean, error) in losses.items()
    ]
    return Section(
        "importance", "Which columns matter",
        [f"How much log-density the model loses, in nats, where a column is shuffled among {count:,} rows. "
         "Columns that tell the same share their importance, and may all seem unimportant."],
        [Table("Permutation importance", ["Column", "Loss (nats)", "95%"], lines)], short="Importance",
    )  # fmt: skip


def _partition(rows: _Rows) -> Section:
    count = min(len(rows.y), MODE_ROWS if rows.one else JOINT_ROWS)
    regressor = rows.regressor
    diagnostics = regressor.predict_distribution(rows.table.iloc[:count]).diagnostics
    error = diagnostics.log_partition_stderr.double().cpu().numpy()
    k = diagnostics.pareto_k.double().cpu().numpy()
    size = diagnostics.effective_sample_size.double().cpu().numpy()
    paragraphs = [
        "The model learns f(x, y), a log-density up to a constant; p(y|x) = exp f(x, y) / Z(x) needs the integral Z(x) "
        "over y. These numbers say how well it is known."
    ]
    facts = {
        "Rows": f"{count:,}",
        "Points per row": f"{diagnostics.num_points:,}",
        "Error of log Z": f"at most {np.nanmax(error):.2g} nats, {np.nanmedian(error):.2g} in the median",
    }
    if rows.one:
        paragraphs.append(
            "With one output the integral is a sum over adaptive cells; its error is half the disagreement of two "
            "interleaved halves of them."
        )
        digits = np.log10(np.maximum(error, 1e-16))
        drawing = Drawing(
            lambda: plots.histogram(digits, label="error of log Z (nats), power of ten", color=plots.COLORS[0]),
            f"Histogram of the error of log Z of {count:,} rows, by powers of ten. It is {facts['Error of log Z']}.",
            "Error of log Z",
        )
    else:
        facts["Pareto k̂"] = f"up to 0.7, where the points cover the density, for {np.mean(k <= 0.7):.1%} of the rows"
        facts["Effective sample size"] = f"{np.nanmedian(size):,.0f} in the median, at least {np.nanmin(size):,.0f}"
        drawing = Drawing(
            lambda: plots.log_partition(diagnostics, max_rows=40, color=plots.COLORS[0], figure=_tall_figure()),
            f"log Z of some of {count:,} rows with bars of two standard errors, Pareto k̂ and effective sample size. "
            f"Pareto k̂ is {facts['Pareto k̂']}; the effective sample size is {facts['Effective sample size']}.",
            "log Z and its diagnostics",
        )
    if rows.one:
        some = regressor.predict_distribution(rows.table.iloc[: min(count, 50)])
        ends = some.quantile(torch.tensor([1e-5, 1 - 1e-5], dtype=torch.double)).double().reshape(2, -1)
        grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, GRID, dtype=torch.double)[:, None]
        mass = torch.trapezoid(some.log_prob(grid[..., None]).double().exp(), grid, dim=0).numpy()
        facts["Independent check"] = (
            f"summed over a plain grid of {GRID:,} points, the densities of {len(mass)} rows hold a probability of "
            f"{mass.min():.4f} to {mass.max():.4f}; 1 is right"
        )
    return Section(
        "partition", "Can log Z be trusted?", paragraphs, drawings=[drawing], facts=facts, short="Trust in log Z"
    )


def _tall_figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(3.5, 3.5), layout="constrained")


def _data(rows: _Rows) -> Section:
    import pandas

    lines = []
    targets = pandas.DataFrame({name: rows.y[:, d] for d, name in enumerate(rows.targets)})
    for what, frame in (("target", targets), *([("input", rows.table)] if rows.images is None else [])):
        for name in frame.columns:
            series = frame[name]
            missing = f"{series.isna().mean():.1%}" if series.isna().any() else "none"
            known = series.dropna()
            boolean = pandas.api.types.is_bool_dtype(series.dtype)
            numeric = pandas.api.types.is_numeric_dtype(series.dtype) and not boolean
            if numeric and len(known):
                low, middle, high = (rows.show(float(v)) for v in known.quantile([0, 0.5, 1]))
                values = f"{low} to {high}, median {middle}"
            elif pandas.api.types.is_datetime64_any_dtype(series.dtype) and len(known):
                values = f"{known.min():%Y-%m-%d} to {known.max():%Y-%m-%d}"
            elif len(known):
                first = known.value_counts()
                values = f"{len(first):,} different, {first.iloc[0] / len(known):.0%} are {_value(first.index[0])}"
            else:
                values = "nothing"
            lines.append([str(name), what, {"text": missing, "sort": float(series.isna().mean())}, values])
    if rows.images is not None:
        lines.append(
            [str(rows.table.columns[0]), "image", {"text": "none", "sort": 0.0}, f"{len(rows.images):,} files"]
        )
    drawings = []
    for d, name in enumerate(rows.targets):
        low, middle, high = (rows.show(float(v)) for v in np.quantile(rows.y[:, d], [0.05, 0.5, 0.95]))
        drawings.append(
            Drawing(
                lambda d=d, name=name: plots.histogram(rows.y[:, d], label=name),  # type: ignore[misc]
                f"Histogram of the observed values of {name}: 90% of them from {low} to {high}, median {middle}.",
                f"Observed {name}",
            )
        )
    count = len(rows.y)
    text = f"{count:,} rows were looked at" + (
        f", chosen at random from {rows.total:,}." if rows.total > count else ", all of the table."
    )
    bounds = [
        f"{what} from the first {limit:,}"
        for what, limit in (
            ("importances", IMPORTANCE_ROWS if rows.one else JOINT_ROWS),
            ("modes", MODE_ROWS if rows.one else JOINT_MODE_ROWS),
            ("log Z", MODE_ROWS if rows.one else JOINT_ROWS),
        )
        if count > limit and (what != "importances" or rows.importances)
    ]
    if bounds:
        text += f" What takes long is found from fewer: {', '.join(bounds)} rows."
    headings = ["Column", "Part", "Missing", "Values"]
    table = Table("Columns of the table", headings, lines, sortable=len(lines) > 2, words=(1, 3))
    return Section("data", "Data", [text], [table], drawings=drawings)
