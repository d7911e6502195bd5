"""What a fitted estimator does on a table, as one page: scores, calibration, densities, importances, trust in log Z."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg import plots
from energyreg.evaluation import LEVELS, Evaluation, evaluate, permutation_importance
from energyreg.report import Drawing, Section, SectionedReport, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from energyreg.estimator import EnergyRegressor
    from energyreg.predictive import PredictiveDistribution

__all__ = ["describe", "number_of_steps"]

LEVEL = 0.9
BOOTSTRAPS = 400
IMPORTANCE_ROWS = 2_000
MODE_ROWS = 2_000
GRID = 4_001
MODEL, MARGINAL = "Model", "Marginal"


@dataclass(frozen=True)
class _Rows:
    """The rows of a report, as all its parts need them."""

    regressor: EnergyRegressor
    table: DataFrame
    y: NDArray[np.float64]
    numbers: Sequence[str]
    targets: Sequence[str]
    scores: Evaluation
    p: PredictiveDistribution | None

    def show(self, value: float) -> str:
        return f"{value:.4g}"


def describe(
    regressor: EnergyRegressor,
    table: DataFrame,
    y: NDArray[np.float64],
    targets: Sequence[str],
    *,
    title: str,
    labels: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
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
        seed: Seed of the bootstrap and of the shuffling.
        progress: Called with 1 after each of `number_of_steps(table)` steps.

    Returns:
        The page, for :func:`energyreg.report.write`.
    """
    table = table.reset_index(drop=True)
    size = 4_096
    chunks = ((table.iloc[i : i + size], y[i : i + size]) for i in range(0, len(table), size))
    scores = evaluate(regressor, chunks, seed=seed)
    progress(1)
    one = len(targets) == 1
    p = regressor.predict_distribution(table) if one else None
    numbers = list(labels or [str(i + 1) for i in range(len(table))])
    rows = _Rows(regressor, table, y, numbers, targets, scores, p)
    sections = [_scores(rows, seed), _calibration(rows)]
    progress(1)
    if one:
        sections += [_groups(rows), *_densities(rows)]
    sections.append(_surprises(rows))
    progress(1)
    sections.append(_importance(rows, seed, progress))
    sections.append(_partition(rows))
    sections += [_data(rows), Section("setup", "Model and run", facts=dict(facts or {}), short="Setup")]
    return SectionedReport(title, _summary(rows, seed), sections, ["Made by energyreg."])


def number_of_steps(table: DataFrame) -> int:
    """How many steps `describe` takes for a table."""
    return 3 + table.shape[1]


# ---------------------------------------------------------------------------------------------- numbers


def _bootstrap(values: NDArray[np.float64], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the 95% intervals of the means of columns, shape (N, C) to (C,) each."""
    rng = np.random.default_rng(seed)
    count = len(values)
    means = np.stack([values[rng.integers(0, count, count)].mean(0) for _ in range(BOOTSTRAPS)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def _summary(rows: _Rows, seed: int) -> list[str]:
    count = rows.scores.rows
    gain = (rows.scores.marginal.nll - rows.scores.model.nll)[:, None]
    gain = gain[np.isfinite(gain[:, 0])]
    names = " and ".join(rows.targets)
    if not len(gain):
        return [f"{count:,} rows; the density of {names} is zero at some observed values, so the scores are infinite."]
    (low,), (high,) = _bootstrap(gain, seed)
    mean = float(gain.mean())
    verdict = "predicts better than" if low > 0 else "predicts worse than" if high < 0 else "is not clearly better than"
    inside = float(rows.scores.model.inside[:, LEVELS.index(LEVEL)].mean())
    spread = 1.96 * math.sqrt(LEVEL * (1 - LEVEL) / max(count, 1))
    kept = (
        "as promised"
        if abs(inside - LEVEL) <= spread
        else "fewer than promised"
        if inside < LEVEL
        else "more than promised"
    )
    return [
        f"On {count:,} rows the model {verdict} a constant forecast, the marginal distribution of {names} in training: "
        f"it gives the observed values {math.exp(min(mean, 50)):.3g} times the density in the geometric mean "
        f"({mean:.3f} nats; 95% interval {low:.3f} to {high:.3f}).",
        f"Its 90% intervals hold {inside:.1%} of the observed values, {kept} (by chance up to {spread:.1%} off).",
    ]


def _scores(rows: _Rows, seed: int) -> Section:
    names = {"nll": "NLL (nats)", "crps": "CRPS", "rmse": "RMSE of the mean", "mae": "MAE of the median"}
    headings = ["Score", MODEL, "95% interval", MARGINAL]
    lines: list[list[str]] = []

    def line(name: str, own: NDArray[np.float64], other: NDArray[np.float64], show: Any, root: bool = False) -> None:
        (low,), (high,) = _bootstrap(own[:, None], seed)
        power = 0.5 if root else 1.0
        lines.append(
            [name, show(own.mean() ** power), f"{show(low**power)} to {show(high**power)}", show(other.mean() ** power)]
            if np.isfinite(own).all()
            else [name, "infinite", "–", show(other.mean())]
        )

    model, marginal = rows.scores.model, rows.scores.marginal
    line(names["nll"], model.nll, marginal.nll, lambda v: f"{v:.3f}")
    for d, target in enumerate(rows.targets):
        suffix = f", {target}" if len(rows.targets) > 1 else ""
        line(names["crps"] + suffix, model.crps[:, d], marginal.crps[:, d], rows.show)
        line(names["rmse"] + suffix, model.error[:, d] ** 2, marginal.error[:, d] ** 2, rows.show, root=True)
        line(names["mae"] + suffix, abs(model.median_error[:, d]), abs(marginal.median_error[:, d]), rows.show)
        for index, level in enumerate(LEVELS):
            inside = model.inside[:, index, d], marginal.inside[:, index, d]
            line(f"Coverage of {level:.0%} intervals{suffix}", *inside, lambda v: f"{v:.1%}")
            line(
                f"Width of {level:.0%} intervals{suffix}",
                model.width[:, index, d],
                marginal.width[:, index, d],
                rows.show,
            )
    return Section(
        "scores", "Scores",
        ["The constant forecast is the marginal distribution of the training targets, the same for every row. "
         "Intervals are by bootstrap over the rows."],
        [Table("Table of scores", headings, lines)],
        {
            "NLL": "Mean of −log p at the observed values. Lower is better; 0.69 less is twice the density.",
            "CRPS": "How far the predicted distribution lies from the observed value, in the unit of the target. Lower "
            "is better; for a forecast without spread it is the absolute error.",
            "Coverage": "Share of observed values inside the interval; best at its promise.",
            "Width": "Mean width of the intervals. Narrower is better where the coverage is kept.",
        },
    )  # fmt: skip


def _calibration(rows: _Rows) -> Section:
    drawings = []
    for d, target in enumerate(rows.targets):
        suffix = f" of {target}" if len(rows.targets) > 1 else ""
        pits = {MODEL: rows.scores.model.pit[:, d], MARGINAL: rows.scores.marginal.pit[:, d]}
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
        kept = "; ".join(f"{name} {np.mean(np.abs(2 * pit - 1) <= LEVEL):.1%}" for name, pit in pits.items())
        for gap in (False, True):
            drawings.append(
                Drawing(
                    lambda pits=pits, gap=gap: plots.coverage_curve(pits, gap=gap),  # type: ignore[misc]
                    f"{'Difference of kept and promised' if gap else 'Kept against promised'} probability of intervals"
                    f"{suffix}. At a promised 90%: {kept}.",
                    f"{'The difference, enlarged' if gap else 'Promised and kept'}{suffix}",
                )
            )
    return Section(
        "calibration", "Are the probabilities kept?",
        ["For each row, take the probability that the model gave to all values below the observed one (PIT). If the "
         "model is right, these numbers are spread evenly: a hump in the middle means densities that are too wide, "
         "high ends mean too narrow ones. The grey band is what chance explains.",
         "The curves do the same for intervals: an interval that promises 90% should hold 90 of 100 observed values."],
        drawings=drawings, short="Calibration",
    )  # fmt: skip


def _groups(rows: _Rows) -> Section:
    import pandas

    index = LEVELS.index(LEVEL)
    inside, width = rows.scores.model.inside[:, index, 0], rows.scores.model.width[:, index, 0]
    groups: list[tuple[str, NDArray[np.bool_]]] = []
    order = np.argsort(np.argsort(width, kind="stable"))
    quarter = np.minimum(4 * order // max(len(width), 1), 3)
    for number, name in enumerate(("Most certain quarter", "Second quarter", "Third quarter", "Least certain quarter")):
        groups.append((name, quarter == number))
    for column in rows.table.columns:
        series = rows.table[column]
        if pandas.api.types.is_numeric_dtype(series.dtype) and not pandas.api.types.is_bool_dtype(series.dtype):
            continue
        levels = series.dropna().unique()
        if 2 <= len(levels) <= 8:
            groups += [(f"{column}: {level}", (series == level).fillna(False).to_numpy(bool)) for level in levels]
    lines = []
    for name, chosen in groups[:40]:
        count = int(chosen.sum())
        if count == 0:
            continue
        share = float(inside[chosen].mean())
        error = 1.96 * math.sqrt(LEVEL * (1 - LEVEL) / count)
        lines.append(
            [name, f"{count:,}", f"{share:.1%}", f"{LEVEL - error:.0%} to {min(LEVEL + error, 1):.0%}",
             rows.show(float(width[chosen].mean())), f"{rows.scores.model.nll[chosen].mean():.3f}"]
        )  # fmt: skip
    return Section(
        "groups", "Coverage by group",
        ["The 90% intervals should hold in parts of the data, too. The quarters are of equal size, by the width of the "
         "predicted interval; the other groups are the values of columns with few of them."],
        [Table("Coverage by group", ["Group", "Rows", "Coverage", "By chance", "Width", "NLL"], lines)],
        short="Groups",
    )  # fmt: skip


def _densities(rows: _Rows) -> list[Section]:
    assert rows.p is not None
    width = rows.scores.model.width[:, LEVELS.index(LEVEL), 0]
    order = np.argsort(width, kind="stable")
    last = len(order) - 1
    chosen = {
        int(order[round(0.01 * last)]): ("Certain", "99% of the rows have a wider interval."),
        int(order[round(0.5 * last)]): ("Typical", "Half of the rows have a wider interval."),
        int(order[round(0.99 * last)]): ("Uncertain", "99% of the rows have a narrower interval."),
    }
    surprising = np.argsort(-rows.scores.model.nll, kind="stable")
    for rank, row in enumerate(surprising[:3]):
        chosen.setdefault(
            int(row), (f"Surprise {rank + 1}", "Among the rows with the least density at the observed value.")
        )
    looked_at = min(len(rows.y), MODE_ROWS)
    modes = rows.regressor.predict_distribution(rows.table.iloc[:looked_at]).modes(
        min_prominence=0.2, min_probability=0.05
    )
    several = [i for i, count in enumerate(modes.counts.tolist()) if count > 1]
    several.sort(key=lambda i: -float(modes.probabilities[i][1]))
    for row in several[:3]:
        chosen.setdefault(row, ("Several modes", f"{len(modes.values[row])} modes."))
    lines = []
    for row in several[:10]:
        pairs = list(zip(modes.values[row][:3], modes.probabilities[row][:3], strict=True))
        places = "; ".join(f"{float(value):.4g} ({float(share):.0%})" for value, share in pairs)
        lines.append(
            [f"Row {rows.numbers[row]}", str(len(modes.values[row])), places, rows.show(float(rows.y[row, 0]))]
        )
    share = len(several) / looked_at
    text = f"{len(several):,} of {looked_at:,} rows ({share:.1%}) have a density with more than one mode."
    if several:
        text += " The most pronounced: where the modes are, and how much probability lies around each."
    table = [Table("Rows with several modes", ["Row", "Modes", "At (probability)", "Observed"], lines)] if lines else []
    return [
        Section(
            "densities", "Densities of chosen rows",
            ["The strong colour holds 90% of the probability in the smallest region. The dashed line is what was "
             "observed, the number at the right is log p there."],
            drawings=[_density(rows, row, *words) for row, words in chosen.items()], short="Densities",
        ),
        Section("modes", "Rows with several modes", [text], table, short="Modes"),
    ]  # fmt: skip


def _density(rows: _Rows, row: int, title: str, note: str) -> Drawing:
    p = rows.regressor.predict_distribution(rows.table.iloc[row : row + 1])
    observed = float(rows.y[row, 0])
    intervals = p.highest_density_region(LEVEL).intervals
    assert intervals is not None
    region = " and ".join(f"{float(low):.4g} to {float(high):.4g}" for low, high in intervals[0])

    def draw() -> Figure:
        return plots.densities({MODEL: p}, [observed], level=LEVEL, label=rows.targets[0], columns=1)

    number = rows.numbers[row]
    alternative = (
        f"Predicted density of {rows.targets[0]} for row {number}. 90% region {region}. Observed: {observed:.4g}."
    )
    return Drawing(draw, alternative, f"{title}: row {number}", note)


def _surprises(rows: _Rows) -> Section:
    model = rows.scores.model
    lines = []
    for row in np.argsort(-model.nll, kind="stable")[:10]:
        row = int(row)
        for d, target in enumerate(rows.targets):
            mean = rows.y[row, d] + model.error[row, d]
            name = f"Row {rows.numbers[row]}" + (f", {target}" if len(rows.targets) > 1 else "")
            pit = model.pit[row, d]
            lines.append(
                [
                    name,
                    rows.show(rows.y[row, d]),
                    rows.show(mean),
                    f"{pit:.3%}",
                    f"{-model.nll[row]:.2f}".replace("-", "−"),
                ]
            )
    return Section(
        "surprises", "Most surprising rows",
        ["The rows whose observed value got the least density: errors in the data, rare cases, or what the model "
         "lacks."],
        [Table("Most surprising rows", ["Row", "Observed", "Predicted mean", "Probability below", "log p"], lines)],
        short="Surprises",
    )  # fmt: skip


def _importance(rows: _Rows, seed: int, progress: Callable[[int], None]) -> Section:
    table, y = rows.table.iloc[:IMPORTANCE_ROWS], rows.y[:IMPORTANCE_ROWS]
    losses = permutation_importance(rows.regressor, table, y, seed=seed, progress=progress)
    top = max([mean for mean, _ in losses.values()] + [1e-12])
    lines = [
        [name, {"text": f"{mean:.3f}", "share": max(mean, 0.0) / top}, f"± {1.96 * error:.3f}"]
        for name, (mean, error) in losses.items()
    ]
    return Section(
        "importance", "Which columns matter",
        [f"How much log-density the model loses, in nats, where a column is shuffled among {len(table):,} rows. "
         "Columns that tell the same share their importance, and may all seem unimportant."],
        [Table("Permutation importance", ["Column", "Loss (nats)", "95%"], lines)], short="Importance",
    )  # fmt: skip


def _partition(rows: _Rows) -> Section:
    count = min(len(rows.y), MODE_ROWS)
    regressor = rows.regressor
    x = regressor.preprocessor_.transform(rows.table.iloc[:count])
    diagnostics = regressor.model_(x).diagnostics
    error = diagnostics.log_partition_stderr.double().numpy()
    paragraphs = [
        "The model learns f(x, y), a log-density up to a constant; p(y|x) = exp f(x, y) / Z(x) needs the integral Z(x) "
        "over y. These numbers say how well it is known."
    ]
    facts = {"Rows": f"{count:,}", "Points per row": f"{diagnostics.num_points:,}"}
    facts["Error of log Z"] = f"at most {np.nanmax(error):.2g} nats, {np.nanmedian(error):.2g} in the median"
    if len(rows.targets) > 1:
        k, size = diagnostics.pareto_k.double().numpy(), diagnostics.effective_sample_size.double().numpy()
        facts["Pareto k̂"] = f"up to 0.7, where the points cover the density, for {np.mean(k <= 0.7):.1%} of the rows"
        facts["Effective sample size"] = f"{np.nanmedian(size):,.0f} in the median"
        return Section("partition", "Can log Z be trusted?", paragraphs, facts=facts, short="Trust in log Z")
    some = regressor.predict_distribution(rows.table.iloc[: min(count, 50)])
    ends = some.quantile(torch.tensor([1e-5, 1 - 1e-5], dtype=torch.double)).double().reshape(2, -1)
    grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, GRID, dtype=torch.double)[:, None]
    mass = torch.trapezoid(some.log_prob(grid[..., None]).double().exp(), grid, dim=0).numpy()
    facts["Independent check"] = (
        f"summed over a plain grid of {GRID:,} points, the densities of {len(mass)} rows hold a probability of "
        f"{mass.min():.4f} to {mass.max():.4f}; 1 is right"
    )
    return Section("partition", "Can log Z be trusted?", paragraphs, facts=facts, short="Trust in log Z")


def _data(rows: _Rows) -> Section:
    import pandas

    lines = []
    targets = pandas.DataFrame({name: rows.y[:, d] for d, name in enumerate(rows.targets)})
    for what, frame in (("target", targets), ("input", rows.table)):
        for name in frame.columns:
            series = frame[name]
            missing = f"{series.isna().mean():.1%}" if series.isna().any() else "none"
            known = series.dropna()
            numeric = pandas.api.types.is_numeric_dtype(series.dtype) and not pandas.api.types.is_bool_dtype(
                series.dtype
            )
            if numeric and len(known):
                low, middle, high = (float(v) for v in known.quantile([0, 0.5, 1]))
                values = f"{low:.4g} to {high:.4g}, median {middle:.4g}"
            elif pandas.api.types.is_datetime64_any_dtype(series.dtype) and len(known):
                values = f"{known.min():%Y-%m-%d} to {known.max():%Y-%m-%d}"
            else:
                values = f"{known.nunique():,} different"
            lines.append([str(name), what, missing, values])
    return Section(
        "data", "Data", [f"{len(rows.y):,} rows were looked at."],
        [Table("Columns of the table", ["Column", "Part", "Missing", "Values"], lines)],
    )  # fmt: skip
