"""`energyreg report`: one page on how a model does on a table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from energyreg import __version__
from energyreg.cli.console import InputError, check_writable
from energyreg.cli.inputs import in_words, local, present, target_columns
from energyreg.cli.model_file import Fitted, FittedOnImages, load
from energyreg.cli.options import Data, Model, Quiet, Seed, Strict, TargetOfData, Threads
from energyreg.progress import Progress

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["report"]


def report(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write.")] = Path("report.html"),
    max_rows: Annotated[int, typer.Option(min=2, help="Rows that are looked at, chosen at random.")] = 10_000,
    identifier: Annotated[str | None, typer.Option("--id", help="Column that names the rows.")] = None,
    target: TargetOfData = None,
    seed: Seed = 0,
    threads: Threads = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page on how a model does on a table: scores, calibration, densities, importances."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: the report is an HTML page; choose a name that ends in .html.")
    data = local(data)
    fitted = load(model, threads, data, strict)
    from energyreg.reports import page as reports
    from energyreg.reports import table_report

    names = fitted.targets(target)
    if fitted.columns is None:
        raise InputError(f"{model}: was fitted on a table without column names, which a report needs.")
    check_writable(output)
    frame, total = _some_rows(fitted, data, names, identifier, max_rows, seed)
    x, y = fitted.inputs(frame, data), target_columns(frame, names, data)
    labels = [str(value) for value in (frame.index if identifier is None else frame[identifier])]
    facts = {
        "Model": str(model), "Data": in_words(str(data)), "Trained on": f"{fitted.facts.get('rows') or 'unknown'} rows",
        "Members": str(fitted.regressor.n_members_), "Epochs": str(fitted.regressor.n_iter_),
        "Version": f"energyreg {__version__}", "Seed": str(seed),
    }  # fmt: skip
    images = list(x[fitted.columns[0]]) if isinstance(fitted, FittedOnImages) else None
    steps = table_report.number_of_steps(x) if images is None else table_report.IMAGE_STEPS
    with fitted.about(data, x, names, frame.index):
        if images is None:
            x = fitted.typed(x)
            noted = [*fitted.facts.get("notes", []), *map(in_words, fitted.said.values())]
            facts |= {"Odd cells and columns": " ".join(noted)} if noted else {}
        else:  # all at once, before anything else is shown
            fitted.regressor.set_params(verbose=not quiet)
            with contextlib.redirect_stdout(sys.stderr):
                fitted.regressor.encode(x)
        with Progress("Report", "steps", steps, not quiet, transient=True) as progress:
            page = table_report.describe(
                fitted.regressor, x, y, names, title=f"Densities of {' and '.join(names)}", labels=labels, facts=facts,
                total=total, images=images, seed=seed, progress=progress,
            )  # fmt: skip
    with Progress("Drawing", "figures", page.num_figures, not quiet, transient=True) as progress:
        reports.write(page, output, progress=progress)
    if not quiet:
        typer.echo(f"Wrote {output}: {len(frame):,} rows" + (f" of {total:,}." if total > len(frame) else "."))


def _some_rows(
    fitted: Fitted, data: Path, names: Sequence[str], identifier: str | None, limit: int, seed: int
) -> tuple[DataFrame, int]:
    """Rows of a table, chosen at random where it has more than the limit, and how many it has.

    The index of the rows is their number in the file.
    """
    import numpy as np
    import pandas

    from energyreg.tables.files import CHUNK_ROWS

    rng = np.random.default_rng(seed)
    kept: DataFrame | None = None
    keys = np.empty(0)
    also = [] if identifier is None else [identifier]
    for frame, numbers in fitted.chunks(data, text=also, targets=names, rows=CHUNK_ROWS):
        present(frame, also, data, "--id names")
        target_columns(frame, names, data, numbers[0] - 1)
        frame.index = pandas.RangeIndex(numbers.start, numbers.stop)
        keys = np.concatenate([keys, rng.random(len(frame))])
        kept = frame if kept is None else pandas.concat([kept, frame])
        if len(kept) > limit:
            chosen = np.sort(np.argsort(keys)[:limit])
            kept, keys = kept.iloc[chosen], keys[chosen]
    assert kept is not None
    if len(kept) < 2:
        raise InputError(f"{data}: the table has one row; a report needs at least 2, and better 100.")
    return kept, numbers[-1]
