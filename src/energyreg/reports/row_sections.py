"""The sections on single rows: their densities, the most surprising ones, and those with several modes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from energyreg import plots
from energyreg.evaluation.scores import QUANTILES
from energyreg.images.reading import thumbnail
from energyreg.inference.modes import Modes
from energyreg.reports.content import Drawing, Gallery, GalleryItem, Section, Table
from energyreg.reports.drawings import region_in_words
from energyreg.reports.numbers import minus, number
from energyreg.reports.rows import LEVEL, MODEL, Array, ReportRows, shown_value

SHOWN_IMAGES, THUMBNAIL = 6, 128
"""Images of each kind that are shown first, and their largest side in pixels."""
SPREAD, SURPRISING, SEVERAL = 12, 12, 10
"""Rows of the gallery: evenly spread by certainty, most surprising, with several modes."""
SHOWN_INPUTS = 40
"""Inputs of a row that stand beside its density, the most important first."""
PROMINENCE, LEAST_PROBABILITY, STARTS = 0.2, 0.05, 64
"""Modes that count: how far the valley before a higher one lies below them, in nats, and their least probability. And
where the ascent to modes of several outputs starts, times."""
MOST_COUNTS = 500
"""Counts that are looked at one by one."""
DRAWS = 200
ALL_TAG, SURPRISE_TAG, MODES_TAG = "Evenly spread by certainty", "Most surprising", "Several modes"


def densities(rows: ReportRows, modes: Modes, several: Sequence[int]) -> tuple[Section, Section, dict[int, str]]:
    """The sections of chosen rows and of the gallery, and row → its id in the page."""
    order = np.argsort(rows.uncertainty, kind="stable")
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
            "The images that the model is most certain of, those that it is least certain of (by "
            f"{rows.by_width}), and the most surprising ones: they got the least density at the observed value. {kind}"
        )
    return (
        Section("densities", title, [kind], drawings=drawings, short="Densities"),
        Section(
            "rows", "Row by row",
            [f"{len(items)} rows to look through: from the most certain to the least (by {rows.by_width}), the most "
             "surprising, and those with several modes."],
            gallery=Gallery("Densities row by row", items),
        ),
        {row: f"#row-{row + 1}" for row in tags},
    )  # fmt: skip


def _inputs(rows: ReportRows, row: int) -> dict[str, str]:
    names = list(rows.importances)
    facts = {name: shown_value(rows.table[name].iloc[row]) for name in names[:SHOWN_INPUTS]}
    if len(names) > SHOWN_INPUTS:
        facts["And"] = f"{len(names) - SHOWN_INPUTS:,} more columns"
    return facts


def _density(rows: ReportRows, row: int, title: str, note: str) -> Drawing:
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


def _one_density(rows: ReportRows, row: int, title: str, note: str) -> Drawing:
    one_row = rows.table.iloc[row : row + 1]
    observed, target = float(rows.y[row, 0]), rows.targets[0]
    if rows.regressor.target_.counts:
        low, high = rows.regressor.predict_quantiles(one_row, [0.001, 0.999])[0]
        if math.floor(high) - math.floor(low) < 80:
            values = np.arange(math.floor(low), math.floor(high) + 1, dtype=float)
            values = np.union1d(values, [observed]) if abs(observed - values).min() < 40 else values
            shares = rows.regressor.predict_probabilities(one_row, values)[0]
            ends = rows.regressor.predict_interval(one_row, LEVEL)[0]
            best = values[int(shares.argmax())]
            return Drawing(
                lambda: plots.probabilities(values, shares, observed, label=target),
                f"Predicted probabilities of {target} for row {rows.numbers[row]}. The most probable value is "
                f"{number(best)} ({shares.max():.0%}); 90% interval {number(ends[0])} to {number(ends[1])}. Observed: "
                f"{number(observed)}.",
                title, note,
            )  # fmt: skip
    p = rows.regressor.predict_distribution(one_row)
    return Drawing(
        lambda: plots.densities({MODEL: p}, [observed], level=LEVEL, label=target, columns=1, circle=rows.circle(0)),
        f"Predicted density of {target} for row {rows.numbers[row]}. {region_in_words(p, 0, LEVEL, rows.place)}. "
        f"Observed: {number(observed)}.",
        title, note,
    )  # fmt: skip


def _joint_density(rows: ReportRows, row: int, title: str, note: str) -> Drawing:
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


def _heading(rows: ReportRows, row: int, keys: Mapping[int, str], suffix: str = "") -> dict[str, Any]:
    """First cell of a line about a row, with a link to its density where the page has it."""
    text: dict[str, Any] = {"text": f"Row {rows.numbers[row]}{suffix}"}
    return text | ({"href": keys[row]} if row in keys else {})


def surprises(rows: ReportRows, keys: Mapping[int, str]) -> Section:
    """The rows whose observed value got the least density."""
    model = rows.scores.model
    lines = []
    for row, d in product(rows.surprising[:SURPRISING], range(len(rows.targets))):
        mean, pit, log_p = float(rows.y[row, d] + model.error[row, d]), float(model.pit[row, d]), -model.nll[row]
        lines.append([
            _heading(rows, row, keys, rows.suffix(d)),
            {"text": number(rows.y[row, d]), "sort": float(rows.y[row, d])},
            {"text": rows.place(mean, d), "sort": mean},
            {"text": _below(pit, rows.one), "sort": pit},
            {"text": minus(f"{log_p:.2f}"), "sort": max(float(log_p), -1e300)},
        ])  # fmt: skip
    headings = ["Row", "Observed", "Predicted mean", "Probability below", "log p" if rows.one else "log p (joint)"]
    return Section(
        "surprises", "Most surprising rows",
        ["The rows whose observed value got the least density: errors in the data, rare cases, or what the model "
         "lacks. A row leads to its density."],
        [Table("Most surprising rows", headings, lines, sortable=True)], short="Surprises",
    )  # fmt: skip


def find_modes(rows: ReportRows, count: int) -> Modes:
    """Pronounced modes of the first rows; of counts, of the probabilities."""
    table = rows.table.iloc[:count]
    if rows.regressor.target_.counts:
        most = float(rows.regressor.predict_quantiles(table, [1 - 1e-4]).max())
        if most < MOST_COUNTS:
            values = np.arange(most + 2)
            return _modes_of_counts(values, rows.regressor.predict_probabilities(table, values))
    return rows.regressor.predict_distribution(table).modes(
        min_prominence=PROMINENCE, min_probability=LEAST_PROBABILITY, num_starts=STARTS
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
            depth = [height[p] - height[valleys[max(i - 1, 0) : i + 1]].max() for i, p in enumerate(peaks)]
            weak = [i for i in range(len(peaks)) if depth[i] < PROMINENCE or mass[i] < LEAST_PROBABILITY]
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


def several_modes(rows: ReportRows, modes: Modes, several: Sequence[int], keys: Mapping[int, str]) -> Section:
    """The rows whose density has more than one mode."""
    lines = []
    for row in several[:SEVERAL]:
        pairs = list(zip(modes.values[row].tolist(), modes.probabilities[row].tolist(), strict=True))[:3]

        def at(value: Sequence[float]) -> str:
            parts = [rows.place(part, d) for d, part in enumerate(value)]
            return parts[0] if rows.one else f"({', '.join(parts)})"

        count = len(modes.values[row])
        places = "; ".join(f"{at(value)} ({share:.0%})" for value, share in pairs)
        lines.append([
            _heading(rows, row, keys), {"text": str(count), "sort": count},
            {"text": places, "sort": float(modes.probabilities[row][1])}, at(rows.y[row].tolist()),
        ])  # fmt: skip
    looked_at = len(modes.values)
    share = len(several) / looked_at
    text = f"{len(several):,} of {looked_at:,} rows ({share:.1%}) have a density with more than one mode."
    if several:
        text += " The most pronounced: where the modes are, and how much probability lies around each."
    headings = ["Row", "Modes", "At (probability)", "Observed"]
    table = [Table("Rows with several modes", headings, lines, sortable=True)] if lines else []
    return Section("modes", "Rows with several modes", [text], table, short="Modes")
