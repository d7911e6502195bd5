"""Tables from the results: means and standard errors over splits, ranks, and paired tests."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

from experiments.results import Records, common, digits_for, mean_and_error, read, write_page
from experiments.uci.data import TABLES
from experiments.uci.methods import METHODS

__all__ = ["report"]

OURS = "energy"
BEST_WITHIN = 0.10
"""Nats by which the estimator may at most be behind the best."""


def values(records: Records, table: str, method: str, score: str, splits: Sequence[int]) -> np.ndarray:
    """A score on some splits; a diverged one counts as infinite."""
    found = records[table, method]
    return np.array([math.inf if found[i][score] is None else found[i][score] for i in splits], dtype=float)


def _table(records: Records, score: str, methods: Sequence[str], digits: int | None, ranked: bool) -> list[str]:
    """A table of one score: a row for each table, the lowest in bold, with the number of splits."""
    lines = ["| table | splits | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    ranks: dict[str, list[int]] = defaultdict(list)
    for table in TABLES:
        known = [method for method in methods if records.get((table.name, method))]
        if OURS not in known:
            continue
        full = [method for method in known if not _partial(records, table.name, method)]
        splits = common(records, table.name, *full)
        if not splits:
            continue
        means = {}
        cells = {}
        for method in known:
            own = splits if method in full else common(records, table.name, method, OURS)
            quantiles_only = score == "nll" and method == "lightgbm"
            if not own or quantiles_only:
                continue
            scores = values(records, table.name, method, score, own)
            means[method] = scores.mean()
            cells[method] = scores, len(own)
        places = digits if digits is not None else digits_for(list(means.values()), 6)
        ours_first = [method for method in means if method in full]
        best = min(ours_first, key=lambda method: means[method]) if ranked else None
        row = []
        for method in methods:
            if method not in cells:
                row.append("")
                continue
            scores, count = cells[method]
            text = mean_and_error(scores, places)
            text = f"**{text}**" if method == best else text
            row.append(text + ("" if method in full else f" ({count})"))
        if ranked and "rounded" not in table.name:
            for method in ours_first:
                ranks[method].append(1 + sum(means[other] < means[method] for other in ours_first))
        lines.append(f"| {table.name} | {len(splits)} | " + " | ".join(row) + " |")
    if ranked:
        mean = [f"{np.mean(ranks[method]):.2f}" if ranks[method] else "" for method in methods]
        lines.append("| *mean rank* | | " + " | ".join(mean) + " |")
    return lines


def _partial(records: Records, table: str, method: str) -> bool:
    """Whether a method has fewer splits or rows of a table than ours: it is shown, with its splits, but not ranked."""
    limited = any(item.name == method and item.splits is not None for item in METHODS)
    return limited or bool(set(records.get((table, OURS), ())) - set(records.get((table, method), ())))


def _paired(records: Records, score: str, methods: Sequence[str]) -> list[str]:
    """Mean differences to ours on the same splits and test rows, with Wilcoxon's signed-rank test."""
    others = [method for method in methods if method != OURS]
    lines = ["| table | " + " | ".join(others) + " |", "|---|" + "---|" * len(others)]
    for table in TABLES:
        row = []
        for method in others:
            if not records.get((table.name, method)) or not records.get((table.name, OURS)):
                row.append("")
                continue
            mine, theirs = records[table.name, OURS], records[table.name, method]
            splits = [
                i for i in common(records, table.name, OURS, method) if mine[i]["test_rows"] == theirs[i]["test_rows"]
            ]
            if not splits or any(records[table.name, method][i][score] is None for i in splits):
                row.append("")
                continue
            difference = values(records, table.name, method, score, splits)
            difference = difference - values(records, table.name, OURS, score, splits)
            places = 3 if score == "nll" else digits_for([difference.mean()], 6)
            text = f"{difference.mean():+.{places}f}"
            if _partial(records, table.name, method):
                text += f" ({len(splits)})"
            if len(splits) >= 5 and difference.any():
                text += f" (p = {wilcoxon(difference).pvalue:.2g})"
            row.append(text)
        if any(row):
            lines.append(f"| {table.name} | " + " | ".join(row) + " |")
    return lines


def _verdicts(records: Records, methods: Sequence[str]) -> list[str]:
    """What the targets ask, counted."""
    lines = []
    for score, title in (("nll", "NLL"), ("crps", "CRPS")):
        first, behind, total = 0, [], 0
        for table in TABLES:
            known = [method for method in methods if not _partial(records, table.name, method)]
            if OURS not in known or "rounded" in table.name:
                continue
            splits = common(records, table.name, *known)
            if not splits:
                continue
            means = {
                method: values(records, table.name, method, score, splits).mean()
                for method in known
                if not (score == "nll" and method == "lightgbm")
            }
            total += 1
            best = min(means, key=lambda method: means[method])
            first += best == OURS
            behind.append((means[OURS] - means[best], table.name, best))
        if total:
            lines.append(f"- {title}: first on {first} of {total} tables.")
        if total and score == "nll":
            far, name, best = max(behind)
            lines.append(f"- Farthest behind the best by NLL: {far:.3f} nats ({name}, {best}).")
    return lines


def report(results: Path) -> None:
    """Write README.md into the folder of results.

    Args:
        results: Folder of results.
    """
    records = read(results, "table", "split")
    methods = [method.name for method in METHODS if any(name == method.name for _, name in records)]
    dense = [method for method in methods if method != "lightgbm"]
    sections: list[tuple[str, Callable[[], list[str]]]] = [
        ("Negative log-likelihood (nats, units of the target)", lambda: _table(records, "nll", dense, 3, True)),
        ("CRPS (units of the target)", lambda: _table(records, "crps", methods, None, True)),
        ("Root mean squared error of the mean", lambda: _table(records, "rmse", methods, None, True)),
        ("Coverage of the 90 % interval", lambda: _table(records, "coverage", methods, 3, False)),
        ("Width of the 90 % interval", lambda: _table(records, "width", methods, None, False)),
        ("Training of the chosen setting (s)", lambda: _table(records, "fit_seconds", methods, 1, False)),
        ("Trials before it (s)", lambda: _table(records, "tuning_seconds", methods, 1, False)),
        ("Predictions and scores of the test rows (s)", lambda: _table(records, "predict_seconds", methods, 1, False)),
        ("NLL of the others minus ours, same splits (Wilcoxon's p)", lambda: _paired(records, "nll", dense)),
        ("CRPS of the others minus ours, same splits (Wilcoxon's p)", lambda: _paired(records, "crps", methods)),
    ]  # fmt: skip
    lines = [
        "# Results", "", "Made by `python -m experiments.uci report`; see ../README.md. Mean ± standard error over "
        "splits; the lowest in bold. Where a method has fewer splits (in brackets), or fewer test rows as Treeffuser, "
        "it is not ranked, but compared with ours on the same splits and rows below. Ranks are over the nine tables "
        "without the rounded ones.", "", *_verdicts(records, methods), "",
    ]  # fmt: skip
    for title, make in sections:
        lines += [f"## {title}", "", *make(), ""]
    write_page(results, lines)
