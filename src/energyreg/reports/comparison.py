"""A page that compares models: scores, densities of chosen rows, calibration, learning curves, log Z, the code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from energyreg import plots
from energyreg.reports.content import Drawing, Section, SectionedReport, Table
from energyreg.reports.drawings import interval_drawings, pit_drawing, region_in_words, tall_log_partition
from energyreg.reports.numbers import number, small

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from energyreg.inference.points import WeightedPoints
    from energyreg.models.predictive import Diagnostics, PredictiveDistribution

__all__ = ["Example", "ModelResult", "Partition", "Report", "Score"]


@dataclass(frozen=True)
class Score:
    """A column of the table of scores.

    Args:
        key: Key of the value in `ModelResult.scores`.
        name: Heading of the column, with its unit.
        explanation: What it means, in a sentence or two for a reader who has never met it.
        aim: The best possible value: −inf where lower is better, inf where higher is, or a number to come close to.
            None where no value is better than another.
        format: Format of the value, as for `format()`.
    """

    key: str
    name: str
    explanation: str
    aim: float | None = -math.inf
    format: str = ".3f"

    def distance(self, value: float) -> float:
        """How far a value, as it is shown, is from the best: comparable between models, lower is better."""
        shown = float(self.show(value).replace(",", "").rstrip("%"))
        if self.format.endswith("%"):
            shown /= 100
        if self.aim is None or math.isnan(shown):
            return math.inf
        return shown * -math.copysign(1.0, self.aim) if math.isinf(self.aim) else abs(shown - self.aim)

    def is_best(self, name: str, scores: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether no other of several models (name → scores) shows a better value than the named one."""
        distances = {other: self.distance(values[self.key]) for other, values in scores.items() if self.key in values}
        mine = distances.get(name, math.inf)
        return len(distances) > 1 and math.isfinite(mine) and mine <= min(distances.values())

    def show(self, value: float) -> str:
        """The value as the table shows it, with commas from 10,000 on."""
        comma = "," if self.format.startswith(".") and abs(value) >= 9_999.5 else ""
        return format(value, comma + self.format)


@dataclass(frozen=True)
class ModelResult:
    """What one model did.

    Args:
        name: Short name, used in all figures.
        description: One sentence: what kind of density it predicts.
        scores: Key of a `Score` → value.
        pit: PIT values of the test rows, shape (B,); see :func:`energyreg.evaluation.metrics.pit`.
        history: `History` of the training, with lists `train_loss` and `validation_nll`.
        examples: Predictive distribution of the rows of `Report.examples`.
    """

    name: str
    description: str
    scores: Mapping[str, float]
    pit: Any
    history: Any
    examples: PredictiveDistribution


@dataclass(frozen=True)
class Example:
    """A row whose densities are drawn.

    Args:
        title: Short heading: what kind of row it is.
        note: One sentence: how it was chosen.
        y: The observed target.
    """

    title: str
    note: str
    y: float


@dataclass(frozen=True)
class Partition:
    """log Z of one model's test rows, and an independent estimate of it for some of them.

    Args:
        model: Name of the model.
        quadrature: `model(x).diagnostics`, for B rows.
        sampled: log Z of the same rows by importance sampling: `WeightedPoints`, or `Diagnostics`.
        num_samples: Samples per row of it.
        proposal: Name of what was sampled from.
    """

    model: str
    quadrature: Diagnostics
    sampled: WeightedPoints | Diagnostics
    num_samples: int
    proposal: str


@dataclass(frozen=True)
class Report:
    """Everything on the page. All texts are plain: markup in them is shown, not obeyed.

    Args:
        title: Heading of the page.
        summary: Paragraphs below it: the question and the answer.
        models: Results, in one order for all figures and tables.
        scores: Columns of the table.
        examples: Rows whose densities are drawn.
        target: Name and unit of y.
        level: Probability of the highlighted regions.
        code: The Python lines that made it.
        setup: Term → fact: data, split, sizes, machine, seed, versions.
        partition: What is known about log Z of the energy-based model. Optional.
        choice: How the examples were chosen.
        footer: Licence and citation of the data.
    """

    title: str
    summary: Sequence[str]
    models: Sequence[ModelResult]
    scores: Sequence[Score]
    examples: Sequence[Example]
    target: str
    code: str
    setup: Mapping[str, str]
    level: float = 0.9
    partition: Partition | None = None
    choice: str = ""
    footer: Sequence[str] = field(default_factory=tuple)


def sections_of(report: Report) -> SectionedReport:
    """A comparison as a page of sections; ValueError where it has no models, or numbers of examples that differ."""
    if not report.models:
        raise ValueError("report has no models. Pass at least one ModelResult.")
    for model in report.models:
        if int(model.examples.batch_shape[0]) != len(report.examples):
            raise ValueError(
                f"{model.name!r} predicts {int(model.examples.batch_shape[0])} example rows, but report.examples has "
                f"{len(report.examples)}. Predict exactly the rows of the examples, in their order."
            )
    sections = [
        _scores(report),
        Section(
            "densities", "What each model predicts",
            [f"The strong colour is where a model puts {report.level:.0%} of its probability, in the smallest region "
             "that holds as much. The dashed line is what was observed. The number at the right is log p there: higher "
             f"is better, and 0.69 more is twice the density. {report.choice}"],
            drawings=[_density(report, row) for row in range(len(report.examples))], short="Densities",
        ),
        _calibration(report),
        _training(report),
        *([_partition(report, report.partition)] if report.partition is not None else []),
        Section(
            "code", "The code",
            ["These very lines trained the models above; they are read from the program that made this page."],
            code=report.code, short="Code",
        ),
        Section("setup", "How it was made", facts=report.setup, short="Setup"),
    ]  # fmt: skip
    return SectionedReport(report.title, report.summary, sections, report.footer)


def _scores(report: Report) -> Section:
    def shown(score: Score, model: ModelResult) -> str:
        return score.show(model.scores[score.key]) if score.key in model.scores else "–"

    values = {model.name: model.scores for model in report.models}
    rows = [
        [
            {"text": model.name, "note": model.description, "model": index},
            *({"text": shown(score, model), "best": score.is_best(model.name, values)} for score in report.scores),
        ]
        for index, model in enumerate(report.models)
    ]
    return Section(
        "scores", "Scores",
        ["All on test rows that no model saw in training. The best value of each column is bold."],
        [Table("Table of scores", ["Model", *(score.name for score in report.scores)], rows)],
        {score.name: score.explanation for score in report.scores},
    )  # fmt: skip


def _density(report: Report, row: int) -> Drawing:
    example = report.examples[row]
    models = {model.name: model.examples for model in report.models}
    observed = [example.y for example in report.examples]
    regions = [f"{name}: {region_in_words(p, row, report.level, lambda v: number(v, 3))}" for name, p in models.items()]
    return Drawing(
        lambda: plots.densities(
            models, observed, rows=[row], level=report.level, label=report.target, columns=1
        ),
        f"{example.title}. Predicted densities of {report.target}. {'; '.join(regions)}. "
        f"Observed: {number(example.y, 3)}.",
        example.title, example.note,
    )  # fmt: skip


def _calibration(report: Report) -> Section:
    pits = {model.name: np.asarray(model.pit, dtype=float) for model in report.models}
    highest = max(1.08 * float(np.histogram(pit, 20, range=(0, 1))[0].max()) * 20 / len(pit) for pit in pits.values())
    return Section(
        "calibration", "Are the probabilities kept?",
        ["For each test row, take the probability that the model gave to all values below the observed one. If the "
         "model is right, these numbers are spread evenly, and every bar has height 1: a bump in the middle means "
         "densities that are too wide, high ends mean too narrow ones. A calibrated model keeps 99 of 100 bars in the "
         "grey band.",
         "The same for intervals: one with a nominal probability of 90% should hold 90 of 100 observed values, and so "
         "for every other level. The curve of a calibrated model is the diagonal, and the last figure enlarges the "
         "distance from it. A calibrated model stays in the grey band in 95 of 100 test sets of this size."],
        drawings=[
            *(pit_drawing(pit, name, name, index, highest) for index, (name, pit) in enumerate(pits.items())),
            *interval_drawings(pits),
        ],
        short="Calibration",
    )  # fmt: skip


def _training(report: Report) -> Section:
    histories = {model.name: model.history for model in report.models}
    drawings = []
    for quantity, label, title in (
        ("validation_nll", "nats", "Validation NLL"), ("train_loss", "loss", "Training loss"),
    ):  # fmt: skip
        lowest = "; ".join(
            f"{name}: {np.nanmin(values):.3f} after epoch {int(np.nanargmin(values)) + 1} of {len(values)}"
            for name, values in ((name, getattr(history, quantity)) for name, history in histories.items())
        )

        def draw(quantity: str = quantity, label: str = label) -> Figure:
            return plots.learning_curves(histories, quantity=quantity, label=label, legend=quantity == "validation_nll")

        drawings.append(Drawing(draw, f"{title} by epoch. Lowest values: {lowest}.", title))
    return Section(
        "training", "Training",
        ["The validation NLL compares the models. Each keeps the weights of its best epoch on the validation rows, "
         "marked by a dot.",
         "The training loss is that of each model’s own objective, in units of standardised y and with dropout: read "
         "its course, not its level."],
        drawings=drawings,
    )  # fmt: skip


def _partition(report: Report, partition: Partition) -> Section:
    quadrature, sampled = partition.quadrature, partition.sampled
    index = [model.name for model in report.models].index(partition.model)
    reference, error, log_z, stderr, k_hat, size = (
        np.asarray(values, dtype=float)
        for values in (
            quadrature.log_partition, quadrature.log_partition_stderr, sampled.log_partition,
            sampled.log_partition_stderr, sampled.pareto_k, sampled.effective_sample_size,
        )
    )  # fmt: skip
    trusted = k_hat <= 0.7
    near = np.abs(log_z - reference) <= 2 * stderr
    agree = f"{near[trusted].mean() if trusted.any() else math.nan:.0%}"
    rows = f"{len(reference):,}"
    return Section(
        "partition", "Can log Z be trusted?",
        ["The energy-based model learns f(x, y), a log-density up to a constant. p(y|x) = exp f(x, y) / Z(x) needs the "
         "partition function Z(x), an integral over y. In one dimension it is computed by adaptive quadrature, whose "
         f"estimated error is at most {small(float(np.nanmax(error)))} nats over {rows} test rows.",
         f"The figure checks it by another method: importance sampling, with {partition.num_samples:,} samples per row "
         f"from the {partition.proposal}. Drawn is the difference of the two estimates of log Z, with bars of two "
         f"standard errors of the sampling (median error {np.nanmedian(stderr):.2g})."],
        terms={
            "Pareto k̂": "Tells whether the samples cover the density. It is up to 0.7 for "
            f"{trusted.mean():.0%} of the rows; above (crosses), few samples carry the estimate, and the bars are too "
            "short.",
            "Agreement": f"Of the rows with k̂ up to 0.7, {agree} agree within two standard errors; 95% is the aim.",
            "Effective sample size (ESS)": "How many independent samples of p(y|x) the weighted ones are worth; "
            f"{np.nanmedian(size):,.0f} in the median.",
        },
        drawings=[
            Drawing(
                lambda: tall_log_partition(sampled, reference=reference, index=index),
                "Difference of two estimates of log Z with error bars, Pareto k-hat and effective sample size, for "
                f"some of {rows} test rows. The estimates agree within two standard errors for {agree} of the rows "
                "with k-hat up to 0.7.",
            )
        ],
        short="Trust in log Z",
    )  # fmt: skip
