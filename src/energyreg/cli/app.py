"""The command `energyreg`: conditional densities of a table's column, from the shell.

Everything that takes time to import waits inside the commands, so that `energyreg --help` is there at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

try:
    import typer
except ImportError as error:
    raise ImportError(
        "The command energyreg needs Typer, which is not installed. Install it with: pip install 'energyreg[tables]'",
        name="typer",
    ) from error

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from energyreg.estimators.image import ImageRegressor
    from energyreg.estimators.table import EnergyRegressor

__all__ = ["app"]

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
EPILOG = (
    "Exit status: 0 done, 1 the run failed, 2 wrong usage or bad input, 130 interrupted (fit keeps the best model so "
    "far). Tables are CSV, Parquet or Feather, by their suffix; rows count from 1, without the header."
)
SAMPLES_AT_ONCE = 1_000_000
ADVICE = re.compile(r",? or pass \w+=\S+$")
"""What only those who call Python can do about an image."""
LARGE_BYTES, LARGE_ROWS = 2**26, 250_000
"""Size or rows of a table beyond which `fit` reads it in blocks instead of whole."""
SECONDS_PER_LINE = 10.0
IMAGES = "Images"
"""Heading of the options for them in the help."""

app = typer.Typer(
    name="energyreg",
    help="Predict the whole probability density of a table's column: intervals that hold, and never only a number.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class PointKind(StrEnum):
    """What one number stands for a density."""

    mean = "mean"
    median = "median"
    mode = "mode"


class OnError(StrEnum):
    """What `fit` does with an image that cannot be read."""

    stop = "raise"
    skip = "skip"


class InputError(ValueError):
    """The user's input cannot be used; the message is all that is shown."""


# ---------------------------------------------------------------------------------------------- how a command runs


@dataclass
class _Settings:
    """Options before the command."""

    debug: bool = False


_settings = _Settings()


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors are one line on stderr, and a status."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            with _warnings_in_a_line():
                function(*arguments, **options)
        except KeyboardInterrupt:
            _stop("Stopped; nothing was written.", INTERRUPTED)
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort, typer.BadParameter)):
                raise
            if _settings.debug:
                traceback.print_exc()
            _stop(*_explain(error))

    return app.command(epilog=EPILOG)(guarded)


def _explain(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit status."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: there is no such file.", WRONG_INPUT
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}.", FAILED
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)) and message:
        return message, WRONG_INPUT
    if type(error).__name__ in ("TrainingError", "ImageMemoryError", "ImageWorkerError"):
        return message, FAILED
    if isinstance(error, MemoryError):
        return "There is not enough memory; pass fewer rows.", FAILED
    if isinstance(error, ImportError):
        return message, FAILED
    return f"{type(error).__name__}: {message} (run `energyreg --debug ...` for the details)", FAILED


def _stop(message: str, status: int) -> None:
    typer.echo(f"energyreg: {message}", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        typer.echo(f"energyreg: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    _settings.debug = debug
    if version:
        from energyreg import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG_INPUT)


Data = Annotated[Path, typer.Argument(help="Table: .csv, .tsv, .parquet or .feather.", show_default=False)]
Model = Annotated[Path, typer.Argument(help="File that `energyreg fit` wrote.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and warnings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.", show_default="PyTorch's own")]
Identifier = Annotated[
    list[str] | None, typer.Option("--id", help="Column to copy to the output; may be repeated.", show_default=False)
]
TargetOfData = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="Target column, where the model file does not say it.")
]


# ---------------------------------------------------------------------------------------------- progress


@dataclass
class _Progress:
    """A bar with the time left on a terminal, a line now and then elsewhere, nothing when quiet; always on stderr."""

    what: str
    unit: str
    total: int
    quiet: bool
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    bar: Any = None

    def __enter__(self) -> _Progress:
        self.shown = self.started
        if self.quiet:
            return self
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn(self.what), BarColumn(bar_width=24), TextColumn("{task.completed:,.0f} " + self.unit),
                TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.total or None)
            self.bar.start()
        return self

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=min(self.done, self.total) if self.total else self.done)
        elif not self.quiet and now - self.shown >= SECONDS_PER_LINE:
            self.shown = now
            left = (now - self.started) * max(self.total / self.done - 1, 0.0)
            typer.echo(f"{self.what}: {self.done:,} of about {self.total:,} {self.unit}, {left:.0f} s left", err=True)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


# ---------------------------------------------------------------------------------------------- the model file


@dataclass(frozen=True)
class _Fitted:
    """A fitted estimator, and what the command line knows besides."""

    regressor: EnergyRegressor
    path: Path
    facts: Mapping[str, Any]
    shown_kind: ClassVar[str] = ""

    @property
    def chunk_rows(self) -> int:
        """Rows of a table that are predicted at once."""
        from energyreg.tables import files as tablefiles

        return tablefiles.CHUNK_ROWS

    @property
    def kinds(self) -> dict[str, str]:
        """Column → kind of its values in training."""
        plans = self.regressor.preprocessor_.state()["plans"]
        kinds = {name: plan["kind"] for name, plan in zip(self.columns or [], plans, strict=False)}
        return kinds | dict.fromkeys(self.facts.get("targets", []), "number")

    @property
    def columns(self) -> list[str] | None:
        """Columns that predictions are made from; None where the training table had no names."""
        names = getattr(self.regressor, "feature_names_in_", None)
        return None if names is None else [str(name) for name in names]

    def targets(self, given: Sequence[str] | None = None) -> list[str]:
        """Names of the target columns."""
        names = list(given or self.facts.get("targets", []))
        outputs = self.regressor.n_outputs_
        if not names:
            raise InputError(f"{self.path}: does not say what the target column is called; pass --target.")
        if len(names) != outputs:
            raise InputError(f"--target names {len(names)} columns, but {self.path} predicts {outputs}.")
        return names

    def labels(self) -> list[str]:
        """What the outputs are called in files; empty for a single one, which needs no name."""
        outputs = self.regressor.n_outputs_
        if outputs == 1:
            return [""]
        return [f"{name}_" for name in self.facts.get("targets", [f"y{i + 1}" for i in range(outputs)])]

    def inputs(self, frame: DataFrame, path: Path, beside: Sequence[str] = ()) -> Any:
        """The columns of a table that the model takes, in its order."""
        if self.columns is None:
            rest = frame.drop(columns=[name for name in beside if name in frame.columns])
            return rest.to_numpy()
        return frame[_present(frame, self.columns, path, "the model was fitted on")]

    def about(
        self, path: Path, x: Any, targets: Sequence[str], numbers: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """Words for errors about inputs, which are rows of the table with these numbers; see `_about`."""
        return _about(path, targets, numbers[0] - 1)


class _FittedOnImages(_Fitted):
    """An estimator of images, whose input is a column of files."""

    regressor: ImageRegressor
    shown_kind = "image"

    @property
    def chunk_rows(self) -> int:
        from energyreg.evaluation.forecasts import BLOCK_ROWS

        return BLOCK_ROWS  # an image takes a hundred times as long as a row of numbers, and a block is scored at once

    @property
    def kinds(self) -> dict[str, str]:
        return {self.regressor.image: "text"} | dict.fromkeys(self.facts.get("targets", []), "number")

    @property
    def columns(self) -> list[str]:
        return [self.regressor.image]

    def inputs(self, frame: DataFrame, path: Path, beside: Sequence[str] = ()) -> DataFrame:
        return _image_files(frame, self.regressor.image, path, "the model was fitted on")

    def about(
        self, path: Path, x: Any, targets: Sequence[str], numbers: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        return _about_images(path, x, targets, numbers)


def _image_files(frame: DataFrame, column: str, path: Path, why: str) -> DataFrame:
    """The column of files, which start at the folder of the table."""
    files = frame[_present(frame, [column], path, why)]
    return files.assign(**{column: [path.parent / name if isinstance(name, str) else None for name in files[column]]})


def _present(frame: DataFrame, names: Sequence[str], path: Path, why: str) -> list[str]:
    missing = [name for name in names if name not in frame.columns]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        there = ", ".join(repr(str(name)) for name in list(frame.columns)[:8])
        there += ", ..." if len(frame.columns) > 8 else ""
        raise InputError(f"{path}: there is no column {missing[0]!r}{more} that {why}; the columns are {there}.")
    return list(names)


def _load(path: Path, threads: int | None = None) -> _Fitted:
    from energyreg.estimators.image import ImageRegressor, load_estimator

    _use_threads(threads)
    regressor, state = load_estimator(path)
    facts = state.get("table", {})
    if not isinstance(regressor, ImageRegressor):
        return _Fitted(regressor, path, facts)
    # Where the features of the training images were kept, is no place for those of others.
    regressor.set_params(folder=None, cache=None, verbose=False)
    return _FittedOnImages(regressor, path, facts)


def _save(regressor: EnergyRegressor, path: Path, facts: Mapping[str, Any]) -> Path:
    """Write the estimator with the names of its targets; the file appears whole or not at all."""
    import tempfile

    from energyreg.models import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        plain = regressor.save(Path(folder) / "model")
        model, state = checkpoint.load_estimator(plain)
    return checkpoint.save_estimator(model, state | {"table": dict(facts)}, path)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextlib.contextmanager
def _about(path: Path, targets: Sequence[str], offset: int = 0) -> Iterator[None]:
    """Words for the errors of the estimator: file, column names and rows of the file instead of X, y and positions."""
    try:
        yield
    except (ValueError, TypeError) as error:
        from energyreg.files import CheckpointError
        from energyreg.tables.files import TableFileError, error_about

        if isinstance(error, (CheckpointError, TableFileError, InputError)):
            raise
        raise InputError(str(error_about(error, path, targets, offset))) from error


@contextlib.contextmanager
def _about_images(
    path: Path, files: DataFrame, targets: Sequence[str], numbers: Sequence[int], *, fitting: bool = False
) -> Iterator[None]:
    """As `_about` for a column of files, in rows of the table with these numbers."""
    from energyreg.images.files import ImageFileError

    column = str(files.columns[0])
    with _about(path, targets):
        try:
            yield
        except ImageFileError as error:
            rows = [row for row, file in zip(numbers, files[column], strict=True) if str(error).startswith(f"{file} ")]
            text = str(error).replace('on_error="skip"', "--on-error skip") if fitting else ADVICE.sub(".", str(error))
            raise InputError(f"{path}: {f'row {rows[0]}: ' if rows else ''}{text}") from error
        except (FileNotFoundError, ValueError) as error:
            found = re.match(r"files(:| has) (.*)", str(error), re.DOTALL)
            if found is None:
                raise
            text = re.sub(r"\brow (\d+)", lambda m: f"row {numbers[int(m[1])]}", ADVICE.sub(".", found[2]))
            raise InputError(f"{path}: column {column!r}{found[1]} {text}") from error


def _targets(frame: DataFrame, names: Sequence[str], path: Path, offset: int = 0) -> np.ndarray:
    """Target columns as numbers, shape (B, D); an error names the first value that is none."""
    import numpy as np
    import pandas

    from energyreg.tables.files import describe_value

    columns = []
    for name in _present(frame, names, path, "holds the target"):
        series = frame[name]
        values = pandas.to_numeric(series, errors="coerce").astype(np.float64).to_numpy()
        bad = ~np.isfinite(values)
        if not pandas.api.types.is_numeric_dtype(series.dtype) and series.dtype != object:
            text = bad & series.notna().to_numpy()
            if pandas.api.types.is_datetime64_any_dtype(series.dtype):
                text, bad = np.ones(len(values), bool), np.ones(len(values), bool)
            bad = text if text.any() else bad
        if bad.any():
            row = int(bad.argmax())
            found = describe_value(series.iloc[row])
            raise InputError(
                f"{path}: the target column {name!r} has {found} in row {offset + row + 1} ({int(bad.sum())} such "
                f"value{'s' * (int(bad.sum()) > 1)}); expected numbers. Fill in or drop these rows."
            )
        columns.append(values)
    return np.stack(columns, 1)


# ---------------------------------------------------------------------------------------------- fit


@_command
def fit(
    data: Data,
    target: Annotated[list[str], typer.Option("--target", "-t", help="Column to predict; may be repeated.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.", show_default=False)],
    drop: Annotated[list[str] | None, typer.Option(help="Column to leave out; may be repeated.")] = None,
    target_kind: Annotated[
        list[str] | None,
        typer.Option(help="real, positive, count, interval:LOW,HIGH or circle:LOW,HIGH; one for all, or one for each."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="by the rows")] = None,
    members: Annotated[int | None, typer.Option(min=1, help="Models.", show_default="by the rows")] = None,
    time_budget: Annotated[float | None, typer.Option(help="Seconds that the training may take, about.")] = None,
    validation: Annotated[str, typer.Option(help="Share of the rows to choose the epoch by, or a table.")] = "0.1",
    conformal: Annotated[bool, typer.Option("--conformal", help="Intervals with a guaranteed coverage.")] = False,
    image: Annotated[
        str | None,
        typer.Option(
            help="Column of image files, to predict from instead of the other columns.", rich_help_panel=IMAGES
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="timm:NAME or torchvision:NAME.", rich_help_panel=IMAGES, show_default="timm:tf_efficientnet_lite0"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the backbone: package (in an installed package), pretrained (downloaded), none, or a file.",
            rich_help_panel=IMAGES,
            show_default="package",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels to a side.", rich_help_panel=IMAGES, show_default="112")
    ] = None,
    fine_tune: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of the backbone's last stages.", rich_help_panel=IMAGES, show_default="none"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for features, to fit again without the images.", rich_help_panel=IMAGES, show_default="none"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read images.", rich_help_panel=IMAGES, show_default="0")
    ] = None,
    on_error: Annotated[
        OnError | None,
        typer.Option(help="What to do with a broken image.", rich_help_panel=IMAGES, show_default="raise"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Learn the density of a column given the others, or given images, and write a model file.

    Ctrl-C ends the training early: the best model so far is written, and the exit status is 130.
    """
    started = time.monotonic()
    kinds = [_target_kind(kind) for kind in target_kind or ["real"]]
    if len(set(target)) < len(target):
        raise InputError("--target names a column twice.")
    if len(kinds) not in (1, len(target)):
        raise InputError(f"--target-kind is given {len(kinds)} times for {len(target)} targets; give one, or one each.")
    share = _share(validation)
    if time_budget is not None and not 0 < time_budget < math.inf:
        raise InputError(f"--time-budget is {time_budget}; expected a number of seconds above 0.")
    network: dict[str, Any] = {
        "backbone": backbone, "weights": weights, "image_size": image_size, "fine_tune": fine_tune,
        "cache": cache, "workers": workers, "on_error": on_error and on_error.value,
    }  # fmt: skip
    network = {name: value for name, value in network.items() if value is not None}
    if image is None and network:
        option = f"--{next(iter(network)).replace('_', '-')}"
        raise InputError(f"{option} is for images; pass --image, the column of their files, too.")
    if image is not None and drop:
        raise InputError("--drop is for tables; with --image no other column is looked at.")
    output = _model_path(output)
    _check_writable(output)
    large = image is None and _is_large(data)
    if large:
        from energyreg.tables.files import columns_of

        names = [name for name in columns_of(data) if name not in {*target, *(drop or [])}]
    else:
        names, frame, y = _training_table(data, target, drop or [], image=image)

    from energyreg.estimators.table import EnergyRegressor
    from energyreg.training.loop import TrainingError

    held_out = None
    if share is None:
        _, other, other_y = _training_table(Path(validation), target, [], keep=names, image=image)
        held_out = (other, other_y)
    _use_threads(threads)
    settings: dict[str, Any] = {
        "target": kinds[0] if len(kinds) == 1 else kinds, "n_members": members or "auto", "epochs": epochs or "auto",
        "time_budget": time_budget, "validation_fraction": 0.1 if share is None else share, "conformal": conformal,
        "random_state": seed, "verbose": not quiet,
    }  # fmt: skip
    regressor: EnergyRegressor
    if image is None:
        regressor, about = EnergyRegressor(**settings), _about(data, target)
    else:
        from energyreg.estimators.image import ImageRegressor

        if network.get("weights") == "none":
            network["weights"] = None
        regressor = ImageRegressor(image=image, **network, **settings)
        about = _about_images(data, frame, target, range(1, len(frame) + 1), fitting=True)
    # Whatever the training prints is no result: stdout is for those.
    with contextlib.redirect_stdout(sys.stderr), about:
        try:
            if large:
                regressor.fit_file(data, list(target), drop=drop or [], eval_set=held_out)
                rows = regressor._rows
            else:
                regressor.fit(frame, y if len(target) > 1 else y[:, 0], eval_set=held_out)
                rows = len(frame) - len(getattr(regressor, "skipped_", ()))
        except TrainingError:
            raise
        except KeyboardInterrupt:
            _stop("Stopped before there was a model; nothing was written.", INTERRUPTED)
    interrupted = any(history.interrupted for history in regressor.histories_)
    history = regressor.history_
    facts = {
        "targets": list(target), "data": data.name, "rows": rows, "seconds": round(time.monotonic() - started, 1),
        "version": _version(), "interrupted": interrupted, "seed": seed,
    }  # fmt: skip
    path = _save(regressor, output, facts)
    nll = history.best_validation_nll
    if as_json:
        _print_json({"model": str(path), **facts, "validation_nll": nll} | _about_training(regressor))
    elif not quiet:
        score = f", validation NLL {nll:.4f} nats" if nll is not None else ""
        typer.echo(f"Wrote {path}: {rows:,} rows, {facts['seconds']} s{score}.")
    if interrupted:
        _stop(f"The training was interrupted; {path} has the best model so far.", INTERRUPTED)


def _is_large(path: Path) -> bool:
    """Whether a table is to be read in blocks; what cannot be read is not, as the reader has more to say of it."""
    from energyreg.tables import files as tablefiles

    with contextlib.suppress(OSError):
        return path.stat().st_size > LARGE_BYTES or tablefiles.count_rows(path) > LARGE_ROWS
    return False


def _about_training(regressor: EnergyRegressor) -> dict[str, Any]:
    calibration = regressor.calibration_
    return {
        "members": regressor.n_members_,
        "epochs": regressor.n_iter_,
        "calibration": {
            "inverse_temperature": calibration.inverse_temperature, "base_share": calibration.base_share,
        },
    }  # fmt: skip


def _training_table(
    path: Path,
    target: Sequence[str],
    drop: Sequence[str],
    keep: Sequence[str] | None = None,
    image: str | None = None,
) -> tuple[list[str], DataFrame, np.ndarray]:
    """Names of the inputs, their columns, and the targets."""
    from energyreg.tables import files as tablefiles

    frame = tablefiles.read(path, kinds=None if image is None else {image: "text"})
    frame.columns = [str(name) for name in frame.columns]
    _present(frame, target, path, "--target names")
    _present(frame, drop, path, "--drop names")
    y = _targets(frame, target, path)
    names = [name for name in frame.columns if name not in {*target, *drop}] if keep is None else list(keep)
    if not names:
        raise InputError(f"{path}: no column is left to predict from; there must be one besides the target.")
    if len(frame) < 2:
        raise InputError(f"{path}: the table has one row; expected at least 2 to learn from, and better 100.")
    if image is not None:
        return names, _image_files(frame, image, path, "--image names"), y
    return names, frame[_present(frame, names, path, "the training table has")], y


def _target_kind(text: str) -> Any:
    kind, colon, ends = text.partition(":")
    if kind in ("real", "positive", "count") and not colon:
        return kind
    if kind in ("interval", "circle") and colon:
        with contextlib.suppress(ValueError):
            low, high = (float(end) for end in ends.split(","))
            if math.isfinite(low) and math.isfinite(high) and low < high:
                return kind, low, high
    raise InputError(
        f"--target-kind is {text!r}; expected real, positive, count, interval:LOW,HIGH or circle:LOW,HIGH, LOW < HIGH."
    )


def _share(validation: str) -> float | None:
    """The share of rows to hold out; None for a file."""
    try:
        share = float(validation)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise InputError(f"--validation is {validation}; expected a share from 0 to below 1, or a table.")
    return share


def _model_path(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _check_writable(path: Path) -> None:
    """A folder that cannot be written to is found before the work, not after it."""
    from energyreg.files import write_atomically, writing_error

    if path.is_dir():
        raise writing_error(path, IsADirectoryError(21, "is a folder"), 0)
    probe = path.with_name(f".{path.name}.writable-{os.getpid()}")
    try:
        write_atomically(probe, b"")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    probe.unlink()


def _print_json(value: Mapping[str, Any]) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, Mapping):
            return {key: plain(entry) for key, entry in item.items()}
        return [plain(entry) for entry in item] if isinstance(item, (list, tuple)) else item

    typer.echo(json.dumps(plain(value), ensure_ascii=False, indent=2))


def _version() -> str:
    from energyreg import __version__

    return __version__


# ---------------------------------------------------------------------------------------------- predict and sample


@_command
def predict(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .csv, .parquet or .feather.")],
    level: Annotated[float, typer.Option(help="Probability of the interval.")] = 0.9,
    quantiles: Annotated[str, typer.Option(help="Levels of quantiles, as .05,.5,.95.", show_default=False)] = "",
    kind: Annotated[PointKind, typer.Option(help="The one number of each row.")] = PointKind.mean,
    density_at_target: Annotated[
        bool, typer.Option("--density-at-target", help="Add log p of the target, which the table must have.")
    ] = False,
    identifier: Identifier = None,
    target: TargetOfData = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Predict a number, an interval and quantiles for each row; memory stays bounded, whatever the rows."""
    from energyreg.tables import files as tablefiles

    levels = _levels(quantiles)
    if not 0 < level < 1:
        raise InputError(f"--level is {level}; expected a probability between 0 and 1, such as 0.9.")
    writer = tablefiles.TableWriter(output)
    fitted = _load(model, threads)
    names = fitted.targets(target) if density_at_target else list(target or fitted.facts.get("targets", []))

    def rows_of(frame: DataFrame, x: Any, offset: int) -> dict[str, Any]:
        regressor, labels = fitted.regressor, fitted.labels()
        shape = (len(frame), -1, len(labels))
        columns: dict[str, Any] = {}
        point = regressor.predict(x, kind=kind.value).reshape(shape)
        interval = regressor.predict_interval(x, level).reshape(len(frame), len(labels), 2)
        several = regressor.predict_quantiles(x, levels).reshape(shape) if levels else None
        for d, label in enumerate(labels):
            columns[f"{label}{kind.value}"] = point[:, 0, d]
            columns[f"{label}lower_{_percent(level)}"] = interval[:, d, 0]
            columns[f"{label}upper_{_percent(level)}"] = interval[:, d, 1]
            for index, one in enumerate(levels):
                assert several is not None
                columns[f"{label}quantile_{one:g}"] = several[:, index, d]
        if density_at_target:
            y = _targets(frame, names, data, offset)
            columns["log_density"] = regressor.score_samples(x, y)
        return columns

    rows = _stream(fitted, data, writer, rows_of, names, identifier or [], "Predicting", quiet, fitted.chunk_rows)
    if not quiet:
        typer.echo(f"Wrote {output}: {rows:,} rows.")


@_command
def sample(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .csv, .parquet or .feather.")],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="Draws for each row.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    identifier: Identifier = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Draw from the predicted density of each row: a table with one line for each draw."""
    import numpy as np

    from energyreg.tables import files as tablefiles

    writer = tablefiles.TableWriter(output)
    fitted = _load(model, threads)
    names = list(fitted.facts.get("targets", []))
    state = np.random.RandomState(seed)  # what scikit-learn takes; it goes on from chunk to chunk

    def rows_of(frame: DataFrame, x: Any, offset: int) -> dict[str, Any]:
        draws = fitted.regressor.sample(x, number, random_state=state)
        draws = draws.reshape(len(frame) * number, -1)
        columns: dict[str, Any] = {
            "row": np.repeat(np.arange(offset + 1, offset + len(frame) + 1), number),
            "draw": np.tile(np.arange(1, number + 1), len(frame)),
        }
        outputs = names or [f"y{i + 1}" if draws.shape[1] > 1 else "y" for i in range(draws.shape[1])]
        return columns | {name: draws[:, d] for d, name in enumerate(outputs)}

    at_once = max(min(SAMPLES_AT_ONCE // number, fitted.chunk_rows), 1)
    rows = _stream(fitted, data, writer, rows_of, names, identifier or [], "Sampling", quiet, at_once, number)
    if not quiet:
        typer.echo(f"Wrote {output}: {number:,} draws for each of {rows:,} rows.")


def _stream(
    fitted: _Fitted,
    data: Path,
    writer: Any,
    rows_of: Callable[[DataFrame, Any, int], dict[str, Any]],
    targets: Sequence[str],
    identifiers: Sequence[str],
    what: str,
    quiet: bool,
    chunk_rows: int,
    repeat: int = 1,
) -> int:
    """Read a table in chunks, and write what a function makes of each; returns how many rows there were."""
    import pandas

    from energyreg.tables import files as tablefiles

    kinds = {name: "text" for name in identifiers if name not in (fitted.columns or [])} | fitted.kinds
    if writer.path.resolve() == data.resolve():
        raise InputError(f"{data}: --output is the input; choose another file.")
    total = tablefiles.count_rows(data) if data.exists() else 0
    done = 0
    with _Progress(what, "rows", total, quiet) as progress, writer:
        for frame in tablefiles.read_chunks(data, rows=chunk_rows, kinds=kinds):
            frame.columns = [str(name) for name in frame.columns]
            _present(frame, identifiers, data, "--id names")
            x = fitted.inputs(frame, data, [*targets, *identifiers])
            with fitted.about(data, x, targets, range(done + 1, done + len(frame) + 1)):
                columns = rows_of(frame, x, done)
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


def _percent(level: float) -> str:
    return f"{100 * level:.10g}"


# ---------------------------------------------------------------------------------------------- evaluate and info


@_command
def evaluate(
    model: Model,
    data: Data,
    target: TargetOfData = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score the predictions for a table that has the targets, against a constant forecast: the marginal of training."""
    from energyreg.evaluation import forecasts as evaluation
    from energyreg.tables import files as tablefiles

    fitted = _load(model, threads)
    names = fitted.targets(target)
    total = tablefiles.count_rows(data) if data.exists() else 0
    with _Progress("Scoring", "rows", total, quiet) as progress:
        scores = evaluation.evaluate(fitted.regressor, _pairs(fitted, data, names), progress=progress)
    model_scores, marginal = scores.model.summary(), scores.marginal.summary()
    if as_json:
        _print_json(
            {
                "model": str(model), "data": str(data), "rows": scores.rows, "targets": names, "scores": model_scores,
                "marginal": marginal,
            }
        )  # fmt: skip
        return
    _print_scores(model_scores, marginal, names, scores.rows)


def _pairs(fitted: _Fitted, data: Path, names: Sequence[str]) -> Iterator[tuple[Any, np.ndarray]]:
    from energyreg.tables import files as tablefiles

    done = 0
    kinds = fitted.kinds | dict.fromkeys(names, "number")
    for frame in tablefiles.read_chunks(data, rows=fitted.chunk_rows, kinds=kinds):
        frame.columns = [str(name) for name in frame.columns]
        y = _targets(frame, names, data, done)
        x = fitted.inputs(frame, data, names)
        with fitted.about(data, x, names, range(done + 1, done + len(frame) + 1)):
            fitted.regressor._inputs(x)
        yield x, y
        done += len(frame)


def _print_scores(model: Mapping[str, Any], marginal: Mapping[str, Any], names: Sequence[str], rows: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=100, no_color=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, title=None)
    table.add_column(f"{rows:,} rows", no_wrap=True)
    table.add_column("model", justify="right")
    table.add_column("marginal", justify="right")
    titles = {"nll": "NLL (nats)", "crps": "CRPS", "rmse": "RMSE of the mean", "mae": "MAE of the median"}
    for key, value in model.items():
        what, _, level = key.partition("_")
        title = titles.get(key, f"{level}% interval: {what}")
        several = isinstance(value, list)
        for index, name in enumerate(names if several else [""]):
            own, other = (value[index], marginal[key][index]) if several else (value, marginal[key])
            cells = [f"{v:.1%}" if what == "coverage" else f"{v:.4f}" for v in (own, other)]
            table.add_row(f"{title}, {name}" if name else title, *cells)
    console.print(table)


@_command
def report(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write.")] = Path("report.html"),
    max_rows: Annotated[int, typer.Option(min=2, help="Rows that are looked at, chosen at random.")] = 10_000,
    identifier: Annotated[str | None, typer.Option("--id", help="Column that names the rows.")] = None,
    target: TargetOfData = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page on how a model does on a table: scores, calibration, densities, importances."""
    from energyreg.reports import page as reports
    from energyreg.reports import table_report

    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: the report is an HTML page; choose a name that ends in .html.")
    fitted = _load(model, threads)
    names = fitted.targets(target)
    if fitted.columns is None:
        raise InputError(f"{model}: was fitted on a table without column names, which a report needs.")
    _check_writable(output)
    frame, total = _some_rows(fitted, data, names, identifier, max_rows, seed)
    x, y = fitted.inputs(frame, data), _targets(frame, names, data)
    labels = [str(value) for value in (frame.index if identifier is None else frame[identifier])]
    facts = {
        "Model": str(model), "Data": str(data), "Trained on": f"{fitted.facts.get('rows') or 'unknown'} rows",
        "Members": str(fitted.regressor.n_members_), "Epochs": str(fitted.regressor.n_iter_),
        "Version": f"energyreg {_version()}", "Seed": str(seed),
    }  # fmt: skip
    images = list(x[fitted.columns[0]]) if isinstance(fitted, _FittedOnImages) else None
    steps = table_report.number_of_steps(x) if images is None else table_report.IMAGE_STEPS
    with fitted.about(data, x, names, frame.index):
        if images is not None:  # all at once, before anything else is shown
            fitted.regressor.set_params(verbose=not quiet)
            with contextlib.redirect_stdout(sys.stderr):
                fitted.regressor._inputs(x)
        with _Progress("Report", "steps", steps, quiet) as progress:
            page = table_report.describe(
                fitted.regressor, x, y, names, title=f"Densities of {' and '.join(names)}", labels=labels, facts=facts,
                total=total, images=images, seed=seed, progress=progress,
            )  # fmt: skip
    with _Progress("Drawing", "figures", page.num_figures, quiet) as progress:
        reports.write(page, output, progress=progress)
    if not quiet:
        typer.echo(f"Wrote {output}: {len(frame):,} rows" + (f" of {total:,}." if total > len(frame) else "."))


def _some_rows(
    fitted: _Fitted, data: Path, names: Sequence[str], identifier: str | None, limit: int, seed: int
) -> tuple[DataFrame, int]:
    """Rows of a table, chosen at random where it has more than the limit, and how many it has.

    The index of the rows is their number in the file.
    """
    import numpy as np
    import pandas

    from energyreg.tables import files as tablefiles

    rng = np.random.default_rng(seed)
    kept: DataFrame | None = None
    keys = np.empty(0)
    done = 0
    also = {} if identifier is None or identifier in (fitted.columns or []) else {identifier: "text"}
    for frame in tablefiles.read_chunks(data, kinds=also | fitted.kinds | dict.fromkeys(names, "number")):
        frame.columns = [str(name) for name in frame.columns]
        _present(frame, [identifier] if identifier else [], data, "--id names")
        _targets(frame, names, data, done)
        frame.index = pandas.RangeIndex(done + 1, done + len(frame) + 1)
        done += len(frame)
        keys = np.concatenate([keys, rng.random(len(frame))])
        kept = frame if kept is None else pandas.concat([kept, frame])
        if len(kept) > limit:
            chosen = np.sort(np.argsort(keys)[:limit])
            kept, keys = kept.iloc[chosen], keys[chosen]
    assert kept is not None
    if len(kept) < 2:
        raise InputError(f"{data}: the table has one row; a report needs at least 2, and better 100.")
    return kept, done


@_command
def info(model: Model, as_json: Json = False) -> None:
    """Tell what a model file holds."""
    fitted = _load(model)
    regressor, facts = fitted.regressor, fitted.facts
    kinds = fitted.kinds
    history = regressor.history_
    about = {
        "model": str(_model_path(model)),
        "targets": facts.get("targets"),
        "target_kind": regressor.target if isinstance(regressor.target, (str, list, tuple)) else repr(regressor.target),
        "columns": {name: fitted.shown_kind or kinds[name] for name in fitted.columns or []}
        or regressor.n_features_in_,
        "rows": facts.get("rows"),
        "data": facts.get("data"),
        **_about_training(regressor),
        "best_epoch": history.best_epoch,
        "validation_nll": history.best_validation_nll,
        "interrupted": any(one.interrupted for one in regressor.histories_),
        "rounding": regressor.lattice_step_,
        "conformal": hasattr(regressor, "conformal_regions_"),
        "settings": {
            name: value for name, value in regressor.get_params(deep=False).items() if name != "target"
        },
        "parameters": sum(parameter.numel() for parameter in regressor.model_.parameters()),
        "version": facts.get("version"),
    }  # fmt: skip
    if as_json:
        _print_json(about)
        return
    width = max(map(len, about))
    for name, value in about.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        shown = (
            {None: "unknown", True: "yes", False: "no"}.get(value, value)
            if not isinstance(value, int | float) or isinstance(value, bool)
            else value
        )
        typer.echo(f"{name.replace('_', ' '):{width}}  {shown}")


# ---------------------------------------------------------------------------------------------- demo


@_command
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and dropout.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the setting's own")] = None,
    full: Annotated[bool, typer.Option("--full", help="Larger models and several seeds.")] = False,
    threads: Threads = 1,
) -> None:
    """Train three kinds of density on the bundled protein table, and write a page that compares them."""
    arguments = ["--output", str(output), "--seed", str(seed), "--threads", str(threads)]
    arguments += ["--epochs", str(epochs)] * (epochs is not None) + ["--full"] * full
    from energyreg.cli.demo import main

    status = main(arguments)
    if status:
        raise typer.Exit(status)
