"""`energyreg evaluate`: scores of a model's predictions for a table that has the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energyreg.cli.console import print_json, print_table
from energyreg.cli.inputs import in_words, local, target_columns
from energyreg.cli.model_file import Fitted, load
from energyreg.cli.options import Data, Json, Model, Quiet, Strict, TargetOfData, Threads
from energyreg.progress import Progress

if TYPE_CHECKING:
    import numpy as np

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    data: Data,
    target: TargetOfData = None,
    threads: Threads = None,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score the predictions for a table that has the targets, against a constant and a linear forecast."""
    from energyreg.tables import files as tablefiles

    data = local(data)
    fitted = load(model, threads, data, strict)
    from energyreg import evaluation

    names = fitted.targets(target)
    total = tablefiles.count_rows(data)
    with Progress("Scoring", "rows", total, not quiet, transient=True) as progress:
        scores = evaluation.evaluate(fitted.regressor, _pairs(fitted, data, names), progress=progress)
    found = {"scores": scores.model.summary(), "marginal": scores.marginal.summary()}
    if scores.linear is not None:
        found["linear"] = scores.linear.summary()
    if as_json:
        print_json({"model": str(model), "data": in_words(str(data)), "rows": scores.rows, "targets": names} | found)
        return
    _print_scores(found, names, scores.rows)


def _pairs(fitted: Fitted, data: Path, names: Sequence[str]) -> Iterator[tuple[Any, np.ndarray]]:
    for frame, numbers in fitted.chunks(data, targets=names):
        y = target_columns(frame, names, data, numbers[0] - 1)
        x = fitted.inputs(frame, data, names)
        with fitted.about(data, x, names, numbers):
            x = fitted.typed(x)
            fitted.regressor.encode(x)
        yield x, y


def _print_scores(found: Mapping[str, Mapping[str, Any]], names: Sequence[str], rows: int) -> None:
    from energyreg.reports.numbers import fixed

    lines = []
    titles = {"nll": "NLL (nats)", "crps": "CRPS", "rmse": "RMSE of the mean", "mae": "MAE of the median"}
    for key, value in found["scores"].items():
        what, _, level = key.partition("_")
        title = titles.get(key, f"{level}% interval: {what}")
        several = isinstance(value, list)
        for index, name in enumerate(names if several else [""]):
            values = [scores[key][index] if several else scores[key] for scores in found.values()]
            show = fixed(max(map(abs, values)), 5) if what not in ("nll", "coverage") else "{:.4f}".format
            cells = [f"{v:.1%}" if what == "coverage" else show(v) for v in values]
            lines.append([f"{title}, {name}" if name else title, *cells])
    print_table([f"{rows:,} rows", "model", *list(found)[1:]], lines)
