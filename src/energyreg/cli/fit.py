"""`energyreg fit`: learn the density of a table's column, and write a model file."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from energyreg import __version__
from energyreg.cli.console import INTERRUPTED, InputError, check_writable, print_json, stop
from energyreg.cli.info import describe
from energyreg.cli.inputs import about, about_images, image_files, in_words, local, present, target_columns
from energyreg.cli.model_file import Fitted, FittedOnImages, about_training, save, use_threads
from energyreg.cli.options import Data, Json, Quiet, Seed, Strict, Threads

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from energyreg.estimators.image import ImageRegressor
    from energyreg.estimators.table import EnergyRegressor

__all__ = ["fit"]

LARGE_BYTES, LARGE_ROWS = 2**26, 250_000
"""Size or rows of a table beyond which `fit` reads it in blocks instead of whole."""


class OnError(StrEnum):
    """What `fit` does with an image that cannot be read."""

    stop = "raise"
    skip = "skip"


def _of_images(help: str, default: str | None = None, **more: Any) -> Any:
    """An option for images, under a heading of its own in the help."""
    return typer.Option(help=help, rich_help_panel="Images", show_default=default or True, **more)


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
    missing: Annotated[
        list[str] | None, typer.Option("--na", help="Cell that stands for a missing value; may be repeated.")
    ] = None,
    strict: Strict = False,
    time_column: Annotated[
        str | None, typer.Option(help="Hold out the latest rows by this column.", show_default="rows at random")
    ] = None,
    group_column: Annotated[
        str | None,
        typer.Option(help="Never hold out a part of a group, such as a person; no input.", show_default="none"),
    ] = None,
    conformal: Annotated[bool, typer.Option("--conformal", help="Intervals with a guaranteed coverage.")] = False,
    image: Annotated[
        str | None, _of_images("Column of image files, to predict from instead of the other columns.")
    ] = None,
    backbone: Annotated[str | None, _of_images("timm:NAME or torchvision:NAME.", "timm:tf_efficientnet_lite0")] = None,
    weights: Annotated[
        str | None,
        _of_images(
            "Of the backbone: package (in an installed package), pretrained (downloaded), none, or a file.", "package"
        ),
    ] = None,
    image_size: Annotated[int | None, _of_images("Pixels to a side.", "112", min=1)] = None,
    fine_tune: Annotated[int | None, _of_images("Epochs of the backbone's last stages.", "none", min=1)] = None,
    cache: Annotated[Path | None, _of_images("Folder for features, to fit again without the images.", "none")] = None,
    workers: Annotated[int | None, _of_images("Processes that read images.", "0", min=0)] = None,
    on_error: Annotated[OnError | None, _of_images("What to do with a broken image.", "raise")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Learn the density of a column given the others, or given images, and write a model file.

    Ctrl-C ends the training early: the best model so far is written, and the exit status is 130.
    """
    started = time.monotonic()
    data, missing = local(data), list(missing or [])
    said: dict[str, str] = {}
    kinds = [_target_kind(kind) for kind in target_kind or ["real"]]
    if len(set(target)) < len(target):
        raise InputError("--target names a column twice.")
    if time_column is not None and group_column is not None:
        raise InputError("--time-column and --group-column are both given; pass one of them.")
    beside = {"--time-column": time_column, "--group-column": group_column}
    for option, name in beside.items():
        if name is not None and name in target:
            raise InputError(f"{option} names {name!r}, which is a target; name another column.")
    both = [name for name in target if name in (drop or [])]
    if both:
        raise InputError(f"--drop names {both[0]!r}, which is a target; drop other columns.")
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
    for option, given in {"--drop": drop, **beside}.items():
        if image is not None and given:
            raise InputError(f"{option} is for tables; with --image no other column is looked at.")
    from energyreg.files import with_suffix

    output = with_suffix(output)
    check_writable(output)
    large = image is None and _is_large(data)
    if large:
        from energyreg.tables.files import columns_of

        names = [name for name in columns_of(data) if name not in {*target, *(drop or []), group_column}]
    else:
        names, frame, y, whole = _training_table(data, target, drop or [], missing, image=image, beside=beside)

    from energyreg.estimators.table import EnergyRegressor
    from energyreg.training.failures import TrainingError

    held_out = None
    if share is None:
        _, other, other_y, _ = _training_table(Path(validation), target, [], missing, keep=names, image=image)
        held_out = (other, other_y)
    use_threads(threads)
    settings: dict[str, Any] = {
        "target": kinds[0] if len(kinds) == 1 else kinds, "n_members": members or "auto", "epochs": epochs or "auto",
        "time_budget": time_budget, "validation_fraction": 0.1 if share is None else share, "conformal": conformal,
        "random_state": seed, "verbose": not quiet,
    }  # fmt: skip
    regressor: EnergyRegressor | ImageRegressor
    if image is None:
        regressor, explained = EnergyRegressor(**settings), about(data, target, strict=strict, said=said)
    else:
        from energyreg.estimators.image import ImageRegressor

        if network.get("weights") == "none":
            network["weights"] = None
        regressor = ImageRegressor(image=image, **network, **settings)
        explained = about_images(data, frame, target, range(1, len(frame) + 1), fitting=True, said=said)
    # Whatever the training prints is no result: stdout is for those.
    with contextlib.redirect_stdout(sys.stderr), explained:
        try:
            if large:
                assert isinstance(regressor, EnergyRegressor)
                regressor.fit_file(
                    data, list(target), drop=drop or [], eval_set=held_out, missing=missing, group_column=group_column,
                    time_column=time_column,
                )  # fmt: skip
                rows = regressor.n_samples_fit_
            else:
                order = {"groups": group_column, "time": time_column} if image is None else {}
                hanging: dict[str, Any] = {key: whole[name] for key, name in order.items() if name is not None}
                regressor.fit(frame, y if len(target) > 1 else y[:, 0], eval_set=held_out, **hanging)
                rows = len(frame) - len(getattr(regressor, "skipped_", ()))
        except TrainingError:
            raise
        except KeyboardInterrupt:
            stop("Stopped before there was a model; nothing was written.", INTERRUPTED)
    interrupted = any(history.interrupted for history in regressor.histories_)
    history = regressor.history_
    facts = {
        "targets": list(target), "data": data.name, "rows": rows, "seconds": round(time.monotonic() - started, 1),
        "version": __version__, "interrupted": interrupted, "seed": seed,
        "missing": missing, "notes": [in_words(note) for note in said.values()],
    }  # fmt: skip
    kind = Fitted if image is None else FittedOnImages
    about_model = json.dumps(describe(kind(regressor, output, facts)), default=repr)  # which `info` reads at once
    path = save(regressor, output, facts | {"about": about_model})
    nll = history.best_validation_nll
    if as_json:
        print_json({"model": str(path), **facts, "validation_nll": nll} | about_training(regressor))
    elif not quiet:
        score = f", validation NLL {nll:.4f} nats" if nll is not None else ""
        typer.echo(f"Wrote {path}: {rows:,} rows, {facts['seconds']} s{score}.")
    if interrupted:
        stop(f"The training was interrupted; {path} has the best model so far.", INTERRUPTED)


def _is_large(path: Path) -> bool:
    """Whether a table is to be read in blocks; what cannot be read is not, as the reader has more to say of it."""
    from energyreg.tables import files as tablefiles

    with contextlib.suppress(OSError):
        return path.stat().st_size > LARGE_BYTES or tablefiles.count_rows(path) > LARGE_ROWS
    return False


def _training_table(
    path: Path,
    target: Sequence[str],
    drop: Sequence[str],
    missing: Sequence[str],
    keep: Sequence[str] | None = None,
    image: str | None = None,
    beside: Mapping[str, str | None] | None = None,
) -> tuple[list[str], DataFrame, np.ndarray, DataFrame]:
    """Names of the inputs, their columns, the targets, and all columns; `beside` are options and columns they name."""
    from energyreg.tables import files as tablefiles

    frame = tablefiles.read(path, kinds=None if image is None else {image: "text"}, missing=missing)
    frame.columns = [str(name) for name in frame.columns]
    present(frame, target, path, "--target names")
    present(frame, drop, path, "--drop names")
    for option, name in (beside or {}).items():
        present(frame, [] if name is None else [name], path, f"{option} names")
    y = target_columns(frame, target, path)
    left_out = {*target, *drop, (beside or {}).get("--group-column")}
    names = [name for name in frame.columns if name not in left_out] if keep is None else list(keep)
    if not names:
        raise InputError(f"{path}: no column is left to predict from; there must be one besides the target.")
    if len(frame) < 2:
        raise InputError(f"{path}: the table has one row; expected at least 2 to learn from, and better 100.")
    if image is not None:
        return names, image_files(frame, image, path, "--image names"), y, frame
    return names, frame[present(frame, names, path, "the training table has")], y, frame


def _target_kind(text: str) -> Any:
    from energyreg.estimators.kinds import kind_and_ends

    kind, colon, ends = text.partition(":")
    with contextlib.suppress(ValueError):
        given = (kind, *(float(end) for end in ends.split(","))) if colon else kind
        kind_and_ends(given)
        return given
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
