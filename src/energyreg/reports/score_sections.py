"""The sections on all rows: scores against baselines, calibration, sharpness, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from energyreg import plots
from energyreg.evaluation import LEVELS, RowScores
from energyreg.reports.content import Drawing, Section, Table
from energyreg.reports.drawings import interval_drawings, pit_drawing
from energyreg.reports.numbers import fixed, minus, number
from energyreg.reports.rows import (
    JOINT_ROWS,
    LEVEL,
    LINEAR,
    MARGINAL,
    MODEL,
    Array,
    ReportRows,
    bootstrap_means,
    by_chance,
    ends_of_bootstrap,
    marked,
)

if TYPE_CHECKING:
    from pandas import Series

GROUP_COLUMNS, GROUP_LEVELS = 20, 8
"""Columns whose groups are looked at, and the most groups of a column of words."""


def summary(rows: ReportRows) -> list[str]:
    """The verdict: how the model compares with the simple forecasts, and what its intervals hold."""
    count = rows.scores.rows
    names = " and ".join(rows.targets)
    model = rows.scores.model
    infinite = int((~np.isfinite(model.nll)).sum())
    if infinite:
        return [
            f"The density is zero at the observed values of {infinite:,} of {count:,} rows, so the mean log-density is "
            f"infinite: see the most surprising rows. Do {names} lie in the range that the model was told?"
        ]
    what = {
        MARGINAL: f"a constant forecast, the marginal distribution of {names} in training",
        LINEAR: "a linear Gaussian forecast, fitted to the training rows",
    }
    gains = {name: scores.nll - model.nll for name, scores in rows.forecasts.items() if name != MODEL}
    gains = {name: gain for name, gain in gains.items() if np.isfinite(gain).all()}
    texts = []
    for name in sorted(gains, key=lambda name: gains[name].mean()):  # the strongest first
        mean = float(gains[name].mean())
        low, high = ends_of_bootstrap(bootstrap_means(gains[name][:, None], rows.seed)[:, 0])
        if high < 0:
            mean, low, high = -mean, -high, -low
            text = f"the model predicts worse than {what[name]}: there"
        else:
            text = f"the model {'predicts better' if low > 0 else 'is not clearly better or worse'} than {what[name]}:"
        texts.append(
            f"{text} the density at the observed value is typically {number(math.exp(min(mean, 50)), 3)} times as high "
            "(mean gain in log p: " + minus(f"{mean:.3f} nats; 95% interval {low:.3f} to {high:.3f}).")
        )
    first = [f"On {count:,} rows {texts[0]}{_better_baselines(rows)}"] if texts else []
    further = [f"Also, {text}" for text in texts[1:]]
    if rows.scores.linear is None:
        further.append(
            "There is no linear forecast to compare it with: the model was made by a version that kept none, or from "
            "fewer than 3 rows. Fit it again to have one."
        )
    inside = model.inside[:, LEVELS.index(LEVEL)].mean(0)
    low, high = by_chance(count, LEVEL)
    parts = []
    for d, share in enumerate(inside):
        verdict = "as they should" if low <= share <= high else "too few" if share < low else "more than needed"
        of = "" if rows.one else f" of {rows.targets[d]}"
        parts.append(f"{share:.1%} of the observed values{of}, {verdict}")
    return [*first, *further, f"Its 90% intervals hold {'; '.join(parts)} (sampling alone: {low:.1%} to {high:.1%})."]


def _better_baselines(rows: ReportRows) -> str:
    """Which simple forecasts are more accurate than the model by another score, in sentences."""
    parts: dict[str, Callable[[RowScores], Array]] = {
        "CRPS": lambda s: s.crps, "RMSE": lambda s: s.error**2, "MAE": lambda s: np.abs(s.median_error),
    }  # fmt: skip
    found = []
    for name, scores in rows.forecasts.items():
        if name == MODEL:
            continue
        better = []
        for score, part in parts.items():
            gain = part(rows.scores.model) - part(scores)
            for d, target in enumerate(rows.targets):
                if np.isfinite(gain[:, d]).all():
                    low, _ = ends_of_bootstrap(bootstrap_means(gain[:, [d]], rows.seed)[:, 0])
                    better += [score if rows.one else f"{score} of {target}"] if low > 0 else []
        if better:
            found.append(f" The {name.lower()} forecast has a lower {', '.join(better)} than the model.")
    return "".join(found)


def scores(rows: ReportRows) -> Section:
    """Scores of the model and of the simple forecasts, and their differences, with intervals by bootstrap."""
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
            show = fixed(float(own.mean()) ** power)
        stacked = np.stack([values[key] for key in (MODEL, *others)], 1)
        finite = [bool(np.isfinite(column).all()) for column in stacked.T]
        means = bootstrap_means(np.where(np.array(finite), stacked, 0.0), rows.seed) ** power
        low, high = ends_of_bootstrap(means[:, 0])
        cells = [f"{show(float(own.mean()) ** power)} ({show(low)} to {show(high)})" if finite[0] else "infinite"]
        for i, key in enumerate(others, 1):
            other = float(values[key].mean())
            cells.append(show(other**power) if finite[i] else "infinite")
            if finite[0] and finite[i]:
                low, high = ends_of_bootstrap(means[:, 0] - means[:, i])
                difference = float(own.mean()) ** power - other**power
                cells.append(f"{show(difference)} ({show(low)} to {show(high)})")
            else:
                cells.append("–")
        lines.append([name, *cells])

    def of(part: Callable[[RowScores], Array]) -> dict[str, Array]:
        return {name: part(scores) for name, scores in rows.forecasts.items()}

    nats: Callable[[float], str] = lambda v: minus(f"{v:.3f}")  # noqa: E731
    share: Callable[[float], str] = lambda v: minus(f"{v:.1%}")  # noqa: E731
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
        LINEAR: "A Gaussian of constant width around a linear function of "
        + ("the inputs (categories one-hot)" if rows.images is None else "the network's features")
        + ", in the target space of the model: positive targets are linear in their logarithm, bounded ones in their "
        "logit, angles in the direction. It is a ridge regression on the rows that the model was trained on.",
        "Model − other": "Negative is better for the model in all scores but the coverage. An interval without zero is "
        "a difference that chance does not explain.",
    }
    if rows.scores.linear is None:
        del terms[LINEAR]
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


def calibration(rows: ReportRows) -> Section:
    """PIT values and reliability of quantiles, intervals and joint regions."""
    drawings = []
    for d, target in enumerate(rows.targets):
        suffix = "" if rows.one else f" of {target}"
        pits = {name: scores.pit[:, d].clip(0, 1) for name, scores in rows.forecasts.items()}
        below = "; ".join(
            f"{name} {np.mean(pit <= 0.1):.1%}, {np.mean(pit <= 0.5):.1%}, {np.mean(pit <= 0.9):.1%}"
            for name, pit in pits.items()
        )
        drawings += [
            pit_drawing(pits[MODEL], f"the model{suffix}", f"PIT{suffix}"),
            Drawing(
                lambda pits=pits: plots.reliability_curve(pits),  # type: ignore[misc]
                f"Reliability diagram{suffix}: fraction of observed values below the predicted quantiles, against "
                f"their level. Below the 10%, 50% and 90% quantile: {below}.",
                f"Reliability of quantiles{suffix}",
            ),
            *interval_drawings(pits, suffix),
        ]
    paragraphs = [
        "For each row, take the probability that the model gave to all values below the observed one (PIT). If the "
        "model is right, these numbers are spread evenly: a bump in the middle means densities that are too wide, "
        "high ends mean too narrow ones. The grey band is what chance explains.",
        "The reliability diagrams compare nominal and empirical probabilities: of 100 observed values 10 should lie "
        "below the 10% quantile, and 90 inside a 90% interval.",
    ]
    if rows.regressor.lattice_step_ is not None:
        paragraphs.append("A rounded value lies anywhere within its rounding: where, is chosen at random for the PIT.")
    if rows.joint:
        level = rows.joint[MODEL].level
        assert level is not None
        inside = "; ".join(f"{np.mean(level <= at):.1%} at {at:.0%}" for at in LEVELS)
        drawings.append(
            Drawing(
                # An interval of probability c holds y where |2F − 1| ≤ c; a smallest region, where its level is ≤ c.
                lambda: plots.coverage_curve({MODEL: (1 + level) / 2}),
                f"Fraction of rows in the smallest joint region of a nominal probability: {inside}.",
                "Smallest joint regions", f"Regions of all outputs together, on {len(level):,} rows.",
            )
        )  # fmt: skip
    return Section("calibration", "Are the probabilities kept?", paragraphs, drawings=drawings, short="Calibration")


def sharpness(rows: ReportRows) -> Section:
    """Widths of the intervals, beside their coverage."""
    index = LEVELS.index(LEVEL)
    lines, drawings = [], []
    for d, target in enumerate(rows.targets):
        for i, level in enumerate(LEVELS):
            low, high = by_chance(rows.scores.rows, level)
            pairs = [(float(s.inside[:, i, d].mean()), float(s.width[:, i, d].mean())) for s in rows.forecasts.values()]
            cells = [f"{marked(share, low, high)}; {number(width)}" for share, width in pairs]
            lines.append([f"{level:.0%}{rows.suffix(d)}", f"{low:.1%} to {high:.1%}", *cells])
        widths = {name: scores.width[:, index, d] for name, scores in rows.forecasts.items()}
        spread = "; ".join(
            f"{name} {number(float(np.median(width)))} ({number(float(np.quantile(width, 0.1)))} to "
            f"{number(float(np.quantile(width, 0.9)))})"
            for name, width in widths.items()
        )
        drawings.append(
            Drawing(
                lambda widths=widths, target=target: plots.sharpness(  # type: ignore[misc]
                    widths, label=f"width of the 90% interval of {target}"
                ),
                f"Fraction of rows with a 90% interval of {target} up to a width. Median width (10% to 90% of the "
                f"rows): {spread}.",
                "Widths" if rows.one else f"Widths of {target}",
                "Further to the left is sharper. A steep curve means the same width for all rows.",
            )
        )
    headings = ["Nominal", "By chance", *[f"{name}: coverage; width" for name in rows.forecasts]]
    return Section(
        "sharpness", "Sharpness",
        ["How narrow the intervals are. Of two calibrated models the sharper one says more. Arrows mark "
         "coverages below (↓) or above (↑) what chance explains; the width is the mean over the rows."],
        [Table("Coverage and width of intervals", headings, lines)], drawings=drawings,
    )  # fmt: skip


def groups(rows: ReportRows) -> Section:
    """Coverage, width and error in parts of the data."""
    model = rows.scores.model
    by: list[str] = []
    outputs: list[str] = []
    lines: list[list[Any]] = []
    found = [(column, *group) for column, groups in _columns_of_groups(rows).items() for group in groups]
    for (column, name, chosen), (d, target) in product(found, enumerate(rows.targets)):
        count = int(chosen.sum())
        if count == 0:
            continue
        by.append(column)
        outputs.append(target)
        shares = zip(LEVELS, model.inside[chosen, :, d].mean(0).tolist(), strict=True)
        width = float(model.width[chosen, LEVELS.index(LEVEL), d].mean())
        error = float(np.abs(model.median_error[chosen, d]).mean())
        nll = float(model.nll[chosen].mean())
        lines.append([
            name, {"text": f"{count:,}", "sort": count},
            *({"text": marked(share, *by_chance(count, level)), "sort": share} for level, share in shares),
            {"text": number(width), "sort": width}, {"text": number(error), "sort": error},
            {"text": minus(f"{nll:.3f}"), "sort": nll},
        ])  # fmt: skip
    headings = ["Group", "Rows", *[f"{level:.0%}" for level in LEVELS], "Width (90%)", "MAE", "NLL"]
    filters = {"Groups by": by} | ({} if rows.one else {"Output": outputs})
    more = len(rows.importances) - GROUP_COLUMNS
    note = f" The {GROUP_COLUMNS} most important columns are looked at, {more} more are not." if more > 0 else ""
    return Section(
        "groups", "Coverage by group",
        ["Intervals of 50%, 80%, 90% and 95% should hold as many values in parts of the data, too. Arrows mark "
         "coverages below (↓) or above (↑) what chance explains for 95 of 100 groups of that size: expect one of 20. "
         f"Quarters of the certainty go by {rows.by_width}: where the model is less certain, the mean absolute error "
         "(MAE) should be larger, as a part of the values where the width is." + note],
        [Table("Coverage by group", headings, lines, sortable=True, filters=filters)], short="Groups",
    )  # fmt: skip


def _columns_of_groups(rows: ReportRows) -> dict[str, list[tuple[str, NDArray[np.bool_]]]]:
    """What rows are grouped by → groups with their rows."""
    order = np.argsort(np.argsort(rows.uncertainty, kind="stable"))
    quarter = np.minimum(4 * order // max(len(order), 1), 3)
    names = ("Most certain quarter", "Second quarter", "Third quarter", "Least certain quarter")
    groups = {"certainty of the model": [(name, quarter == number) for number, name in enumerate(names)]}
    for column in list(rows.importances)[:GROUP_COLUMNS]:
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
            show = number if numeric else (lambda v: f"{v:%Y-%m-%d}")
            name = f"{'' if i == 0 else 'above '}{show(low)} to {show(high)}"
            groups.append((name, inside.to_numpy(bool, na_value=False)))
    else:
        kept = levels
        if len(levels) > GROUP_LEVELS:
            kept = known.value_counts().index[: GROUP_LEVELS - 1]
        elif ordered:
            kept = sorted(levels)
        groups = [(str(level), (series == level).to_numpy(bool, na_value=False)) for level in kept]
        if len(kept) < len(levels):
            rest = ~missing & ~np.any([chosen for _, chosen in groups], axis=0)
            groups.append((f"{len(levels) - len(kept):,} others", rest))
    return [*groups, ("missing", missing)] if missing.any() else groups
