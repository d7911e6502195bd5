"""`energyreg predict` and `energyreg sample`: what a model says of each row of a table, in another table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from energyreg.cli.console import InputError
from energyreg.cli.inputs import local, present, target_columns
from energyreg.cli.model_file import Fitted, load
from energyreg.cli.options import Data, Identifier, Model, Quiet, Seed, Strict, TableOutput, TargetOfData, Threads
from energyreg.progress import Progress

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["predict", "sample"]

SAMPLES_AT_ONCE = 1_000_000


class PointKind(StrEnum):
    """What one number stands for a density."""

    mean = "mean"
    median = "median"
    mode = "mode"


def predict(
    model: Model,
    data: Data,
    output: TableOutput,
    level: Annotated[float, typer.Option(help="Probability of the interval.")] = 0.9,
    quantiles: Annotated[str, typer.Option(help="Levels of quantiles, as .05,.5,.95.", show_default=False)] = "",
    kind: Annotated[PointKind, typer.Option(help="The one number of each row.")] = PointKind.mean,
    density_at_target: Annotated[
        bool, typer.Option("--density-at-target", help="Add log p of the target, which the table must have.")
    ] = False,
    identifier: Identifier = None,
    target: TargetOfData = None,
    threads: Threads = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Predict a number, an interval and quantiles for each row; memory stays bounded, whatever the rows."""
    from energyreg.tables import files as tablefiles

    levels = _levels(quantiles)
    if not 0 < level < 1:
        raise InputError(f"--level is {level}; expected a probability between 0 and 1, such as 0.9.")
    writer = tablefiles.TableWriter(output)
    data = local(data)
    fitted = load(model, threads, data, strict)
    names = fitted.targets(target) if density_at_target else list(target or fitted.facts.get("targets", []))
    from energyreg.scoring.columns import Asked, predict_columns

    asked = Asked((kind.value,), (level,), levels, density_at_target, outputs=fitted.facts.get("targets", ()))

    def columns_of(frame: DataFrame, x: Any, offset: int) -> dict[str, Any]:
        y = target_columns(frame, names, data, offset) if density_at_target else None
        return predict_columns(fitted.regressor, x, asked, y)

    rows = _stream(fitted, data, writer, columns_of, names, identifier, "Predicting", quiet, fitted.chunk_rows)
    if not quiet:
        typer.echo(f"Wrote {output}: {rows:,} rows.", err=writer.is_stream)


def sample(
    model: Model,
    data: Data,
    output: TableOutput,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Draws for each row.")] = 100,
    seed: Seed = 0,
    identifier: Identifier = None,
    threads: Threads = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Draw from the predicted density of each row: a table with one line for each draw."""
    from energyreg.tables.files import TableWriter

    writer = TableWriter(output)
    data = local(data)
    fitted = load(model, threads, data, strict)
    import numpy as np

    from energyreg.scoring.columns import sample_columns

    names = list(fitted.facts.get("targets", []))
    state = np.random.RandomState(seed)  # what scikit-learn takes; it goes on from chunk to chunk

    def columns_of(frame: DataFrame, x: Any, offset: int) -> dict[str, Any]:
        return sample_columns(fitted.regressor, x, number, names, first_row=offset + 1, random_state=state)

    at_once = max(min(SAMPLES_AT_ONCE // number, fitted.chunk_rows), 1)
    rows = _stream(fitted, data, writer, columns_of, names, identifier or [], "Sampling", quiet, at_once, number)
    if not quiet:
        typer.echo(f"Wrote {output}: {number:,} draws for each of {rows:,} rows.", err=writer.is_stream)


def _stream(
    fitted: Fitted,
    data: Path,
    writer: Any,
    columns_of: Callable[[DataFrame, Any, int], dict[str, Any]],
    targets: Sequence[str],
    identifiers: Sequence[str] | None,
    what: str,
    quiet: bool,
    chunk_rows: int,
    repeat: int = 1,
) -> int:
    """Read a table in chunks, and write what a function makes of each; returns how many rows there were.

    Without identifiers the columns that the model was not fitted on come first, or else the number of the row.
    """
    import pandas

    from energyreg.tables import files as tablefiles

    count, done = identifiers is None, 0
    if identifiers is None:
        used = {*(fitted.columns or tablefiles.columns_of(data)), *targets, *fitted.facts.get("targets", [])}
        identifiers = [name for name in tablefiles.columns_of(data) if name not in used]
    if not writer.is_stream and writer.path.resolve() == data.resolve():
        raise InputError(f"{data}: --output is the input; choose another file.")
    total = tablefiles.count_rows(data)
    with Progress(what, "rows", total, not quiet, transient=True) as progress, writer:
        for frame, numbers in fitted.chunks(data, text=identifiers, rows=chunk_rows):
            present(frame, identifiers, data, "--id names")
            x = fitted.inputs(frame, data, [*targets, *identifiers])
            with fitted.about(data, x, targets, numbers):
                columns = columns_of(frame, fitted.typed(x), done)
            if count:  # a column that is called as one of the predictions gives way
                identifiers = [name for name in identifiers if name not in columns]
                columns = columns if identifiers else {"row": numbers} | columns
            twice = [name for name in identifiers if name in columns]
            if twice:
                raise InputError(f"--id {twice[0]}: the output has a column of this name already; rename it.")
            copied = {name: frame[name].repeat(repeat).reset_index(drop=True) for name in identifiers}
            writer.write(pandas.DataFrame(copied | columns))
            done += len(frame)
            progress(len(frame))
    return done


def _levels(text: str) -> list[float]:
    levels = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            level = float(part)
        except ValueError:
            level = math.nan
        if not 0 < level < 1:
            raise InputError(f"--quantiles has {part!r}; expected probabilities between 0 and 1, as .05,.5,.95.")
        levels.append(level)
    return levels
