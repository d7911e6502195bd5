"""What a fitted estimator does on a table, as one page: scores, calibration, densities, importances, trust in log Z."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from energyreg import plots
from energyreg.evaluation import JointScores, LinearForecast, evaluate, evaluate_jointly, permutation_importance
from energyreg.evaluation.compare import SCREENING_ROWS
from energyreg.reports import row_sections, score_sections
from energyreg.reports.content import Drawing, Section, SectionedReport, Table
from energyreg.reports.drawings import tall_log_partition
from energyreg.reports.numbers import minus, number
from energyreg.reports.rows import (
    IMPORTANCE_COLUMNS,
    JOINT_MODE_ROWS,
    JOINT_ROWS,
    LINEAR,
    MARGINAL,
    MODE_ROWS,
    MODEL,
    PARTITION_ROWS,
    Array,
    ReportRows,
    importance_rows,
    shown_value,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from energyreg.estimators.core import DensityRegressor

__all__ = ["describe", "number_of_steps"]

CHUNK_ROWS = 4_096
IMAGE_STEPS = 4
"""Steps of a report whatever the columns."""
GRID, GRID_ROWS = 4_001, 12
"""Points of the independent check of log Z, and of how many rows."""


def describe(
    regressor: DensityRegressor,
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
        seed: Seed of the bootstrap, the shuffling, and of draws.
        progress: Called with 1 after each of `number_of_steps(table)` steps; for images, of `IMAGE_STEPS`.

    Returns:
        The page, for :func:`energyreg.reports.page.write`.

    Raises:
        ValueError: If the table does not fit the estimator, or there is not an image for each row.
        energyreg.images.ImageFileError: If an image cannot be read.
    """
    if images is not None and len(images) != len(table):
        raise ValueError(f"images has {len(images)} files, but table has {len(table)} rows; expected one for each.")
    table, y = table.reset_index(drop=True), np.array(y, dtype=np.float64)
    chunks = ((table.iloc[i : i + CHUNK_ROWS], y[i : i + CHUNK_ROWS]) for i in range(0, len(table), CHUNK_ROWS))
    scores = evaluate(regressor, chunks, seed=seed)
    progress(1)
    joint: dict[str, JointScores] = {}
    if len(targets) > 1:
        line = None if scores.linear is None else LinearForecast(regressor)
        found = evaluate_jointly(regressor, table.iloc[:JOINT_ROWS], y[:JOINT_ROWS], line, seed=seed)
        joint = {name: part for name, part in zip((MODEL, MARGINAL, LINEAR), found, strict=True) if part is not None}
    progress(1)
    importances = {}
    if images is None:
        some = slice(0, importance_rows(len(table), table.shape[1], len(targets) == 1))
        importances = permutation_importance(
            regressor, table.iloc[some], y[some], seed=seed, progress=progress, most=IMPORTANCE_COLUMNS
        )
    numbers = list(labels or [str(i + 1) for i in range(len(table))])
    rows = ReportRows(
        regressor, table, y, numbers, targets, scores, joint, importances, total or len(table), seed, images
    )  # fmt: skip
    modes = row_sections.find_modes(rows, min(len(y), MODE_ROWS if rows.one else JOINT_MODE_ROWS))
    progress(1)
    several = [i for i, count in enumerate(modes.counts.tolist()) if count > 1]
    several.sort(key=lambda i: -float(modes.probabilities[i][1]))
    chosen, gallery, keys = row_sections.densities(rows, modes, several)
    sections = [
        _data(rows), score_sections.scores(rows), score_sections.calibration(rows),
        score_sections.sharpness(rows), score_sections.groups(rows), chosen, gallery,
        row_sections.surprises(rows, keys), row_sections.several_modes(rows, modes, several, keys),
        *([_importance(rows)] if images is None else []), _partition(rows),
        Section("setup", "Model and run", facts=dict(facts or {}), short="Setup"),
    ]  # fmt: skip
    progress(1)
    return SectionedReport(title, score_sections.summary(rows), sections, ["Made by energyreg."])


def number_of_steps(table: DataFrame) -> int:
    """How many steps `describe` takes for a table."""
    columns = table.shape[1]
    return IMAGE_STEPS + (columns if columns <= IMPORTANCE_COLUMNS else IMPORTANCE_COLUMNS + 1)


def _data(rows: ReportRows) -> Section:
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
                low, middle, high = (number(float(v)) for v in known.quantile([0, 0.5, 1]))
                values = f"{low} to {high}, median {middle}"
            elif pandas.api.types.is_datetime64_any_dtype(series.dtype) and len(known):
                values = f"{known.min():%Y-%m-%d} to {known.max():%Y-%m-%d}"
            elif len(known):
                first = known.value_counts()
                values = f"{len(first):,} different, {first.iloc[0] / len(known):.0%} are {shown_value(first.index[0])}"
            else:
                values = "nothing"
            lines.append([str(name), what, {"text": missing, "sort": float(series.isna().mean())}, values])
    if rows.images is not None:
        name = str(rows.table.columns[0])
        lines.append([name, "image", {"text": "none", "sort": 0.0}, f"{len(rows.images):,} files"])
    drawings = []
    for d, name in enumerate(rows.targets):
        low, middle, high = (number(float(v)) for v in np.quantile(rows.y[:, d], [0.05, 0.5, 0.95]))
        drawings.append(
            Drawing(
                lambda d=d, name=name: plots.histogram(rows.y[:, d], label=name),  # type: ignore[misc]
                f"Histogram of the observed values of {name}: 90% of them from {low} to {high}, median {middle}.",
                f"Observed {name}",
            )
        )
    count = len(rows.y)
    origin = f"chosen at random from {rows.total:,}" if rows.total > count else "all of the table"
    text = f"{count:,} rows were looked at, {origin}."
    bounds = [
        f"{what} from the first {limit:,}"
        for what, limit in (
            ("importances", rows.importance_rows),
            ("modes", MODE_ROWS if rows.one else JOINT_MODE_ROWS),
            ("log Z", PARTITION_ROWS),
        )
        if count > limit and (what != "importances" or rows.importances)
    ]
    if bounds:
        text += f" What takes long is found from fewer: {', '.join(bounds)} rows."
    headings = ["Column", "Part", "Missing", "Values"]
    table = Table("Columns of the table", headings, lines, sortable=len(lines) > 2, words=(1, 3))
    return Section("data", "Data", [text], [table], drawings=drawings)


def _importance(rows: ReportRows) -> Section:
    losses = rows.importances
    count, beyond = rows.importance_rows, len(losses) - IMPORTANCE_COLUMNS
    top = max([mean for mean, _ in losses.values()] + [1e-12])
    lines = [
        [name, {"text": minus(f"{mean:.3f}"), "share": max(mean, 0.0) / top, "sort": mean}, f"± {1.96 * error:.3f}"]
        for name, (mean, error) in losses.items()
    ]
    return Section(
        "importance", "Which columns matter",
        [f"How much log-density the model loses, in nats, where a column is shuffled among {count:,} rows. "
         "Columns that tell the same share their importance, and may all seem unimportant."
         + (f" Of {len(losses):,} columns the {IMPORTANCE_COLUMNS} most important come first; the other {beyond:,} are "
            f"as a first look at {min(SCREENING_ROWS, count):,} rows found them." if beyond > 0 else "")],
        [Table("Permutation importance", ["Column", "Loss (nats)", "95%"], lines)], short="Importance",
    )  # fmt: skip


def _partition(rows: ReportRows) -> Section:
    count = min(len(rows.y), PARTITION_ROWS)
    regressor = rows.regressor
    diagnostics = regressor.predict_distribution(rows.table.iloc[:count]).diagnostics
    error, k, size = (
        part.double().cpu().numpy()
        for part in (diagnostics.log_partition_stderr, diagnostics.pareto_k, diagnostics.effective_sample_size)
    )
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
            "With one output the integral is a sum over adaptive cells; its error is a half-sample estimate, from two "
            "interleaved halves of them."
        )
        some = regressor.predict_distribution(rows.table.iloc[: min(count, GRID_ROWS)])
        ends = some.quantile(torch.tensor([1e-5, 1 - 1e-5], dtype=torch.double)).double().reshape(2, -1)
        grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, GRID, dtype=torch.double)[:, None]
        mass = torch.trapezoid(some.log_prob(grid[..., None]).double().exp(), grid, dim=0).numpy()
        facts["Independent check"] = (
            f"summed over a plain grid of {GRID:,} points, the densities of {len(mass)} rows hold a probability of "
            f"{mass.min():.4f} to {mass.max():.4f}; 1 is right"
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
            lambda: tall_log_partition(diagnostics),
            f"log Z of some of {count:,} rows with bars of two standard errors, Pareto k̂ and effective sample size. "
            f"Pareto k̂ is {facts['Pareto k̂']}; the effective sample size is {facts['Effective sample size']}.",
            "log Z and its diagnostics",
        )
    return Section(
        "partition", "Can log Z be trusted?", paragraphs, drawings=[drawing], facts=facts, short="Trust in log Z"
    )
