"""Model files of the command line: a fitted estimator, and the names of its targets."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from energyreg.cli.console import InputError
from energyreg.cli.inputs import about, about_images, image_files, present

if TYPE_CHECKING:
    from pandas import DataFrame

    from energyreg.estimators.core import DensityRegressor
    from energyreg.estimators.image import ImageRegressor

__all__ = ["Fitted", "FittedOnImages", "about_training", "load", "save", "use_threads"]


class Facts(TypedDict, total=False):
    """What the command line adds to a file, as far as it reads it."""

    targets: list[str]
    rows: int | None
    data: str | None
    version: str | None
    missing: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Fitted:
    """A fitted estimator of tables, and what the command line knows besides.

    Attributes:
        regressor: The estimator.
        path: Its file.
        facts: Entries of the file by their names: targets, rows, data, version and others.
        strict: Whether odd cells of tables are an error.
        said: Column → what was said of its cells.
    """

    regressor: DensityRegressor
    path: Path
    facts: Mapping[str, Any]
    strict: bool = False
    said: dict[str, str] = field(default_factory=dict)
    shown_kind: ClassVar[str] = ""
    """What `info` calls the columns; empty for the kind of their values."""

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
    def missing(self) -> list[str]:
        """Cells that stand for a missing value, besides the usual ones."""
        return list(self.facts.get("missing", []))

    @property
    def columns(self) -> list[str] | None:
        """Columns that predictions are made from; None where the training table had no names."""
        names = getattr(self.regressor, "feature_names_in_", None)
        return None if names is None else [str(name) for name in names]

    def chunks(
        self, path: Path, *, text: Sequence[str] = (), targets: Sequence[str] = (), rows: int | None = None
    ) -> Iterator[tuple[DataFrame, range]]:
        """A table by chunks, with the numbers of their rows in the file; columns are read as in training.

        Args:
            path: The table.
            text: Other columns, which are read as text.
            targets: Columns that are read as numbers in any case.
            rows: Rows of a chunk, `chunk_rows` by default.
        """
        from energyreg.tables import files as tablefiles

        also = {name: "text" for name in text if name not in (self.columns or [])}
        kinds = also | self.kinds | dict.fromkeys(targets, "number")
        done = 0
        for frame in tablefiles.read_chunks(path, rows=rows or self.chunk_rows, kinds=kinds, missing=self.missing):
            frame.columns = [str(name) for name in frame.columns]
            yield frame, range(done + 1, done + len(frame) + 1)
            done += len(frame)

    def targets(self, given: Sequence[str] | None = None) -> list[str]:
        """Names of the target columns.

        Raises:
            InputError: If neither the file nor the user names them, or not as many as there are outputs.
        """
        names = list(given or self.facts.get("targets", []))
        outputs = self.regressor.n_outputs_
        if not names:
            raise InputError(f"{self.path}: does not say what the target column is called; pass --target.")
        if len(names) != outputs:
            raise InputError(f"--target names {len(names)} columns, but {self.path} predicts {outputs}.")
        return names

    def inputs(self, frame: DataFrame, path: Path, beside: Sequence[str] = ()) -> Any:
        """The columns of a table that the model takes, in its order; without names, all but those beside."""
        if self.columns is None:
            rest = frame.drop(columns=[name for name in beside if name in frame.columns])
            return rest.to_numpy()
        return frame[present(frame, self.columns, path, "the model was fitted on")]

    def typed(self, x: Any) -> Any:
        """Inputs whose cells of text are read as in training."""
        return x if self.columns is None else self.regressor.preprocessor_.typed(x)

    def about(
        self, path: Path, x: Any, targets: Sequence[str], numbers: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """Words for errors about inputs, which are rows of the table with these numbers."""
        return about(path, targets, numbers, strict=self.strict, said=self.said)


class FittedOnImages(Fitted):
    """An estimator of images, whose input is a column of files."""

    regressor: ImageRegressor
    shown_kind = "image"

    @property
    def chunk_rows(self) -> int:
        """Rows of a table that are predicted at once."""
        from energyreg.evaluation.compare import BLOCK_ROWS

        return BLOCK_ROWS  # an image takes a hundred times as long as a row of numbers, and a block is scored at once

    @property
    def kinds(self) -> dict[str, str]:
        """Column → kind of its values in training."""
        return {self.regressor.image: "text"} | dict.fromkeys(self.facts.get("targets", []), "number")

    @property
    def columns(self) -> list[str]:
        """The column of files."""
        return [self.regressor.image]

    def inputs(self, frame: DataFrame, path: Path, beside: Sequence[str] = ()) -> DataFrame:
        """The column of files."""
        return image_files(frame, self.regressor.image, path, "the model was fitted on")

    def typed(self, x: Any) -> Any:
        """The column of files."""
        return x

    def about(
        self, path: Path, x: Any, targets: Sequence[str], numbers: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """Words for errors about files, which are in rows of the table with these numbers."""
        return about_images(path, x, targets, numbers, strict=self.strict, said=self.said)


def load(path: Path, threads: int | None = None, data: Path | None = None, strict: bool = False) -> Fitted:
    """Read a model file; what is missing of it or of the table to predict is said before anything is imported.

    Raises:
        FileNotFoundError: If one of the files is missing.
        CheckpointError: If the model file is damaged, or none.
        TableFileError: If the table is no file of a known suffix.
    """
    from energyreg.files import with_suffix
    from energyreg.tables.files import check_readable

    if not with_suffix(path).exists():
        raise FileNotFoundError(errno.ENOENT, "There is no such file", str(with_suffix(path)))
    if data is not None:
        check_readable(data)

    from energyreg.checks import check_type
    from energyreg.estimators.image import ImageRegressor, load_estimator
    from energyreg.models import checkpoint

    use_threads(threads)
    regressor, state = load_estimator(path)
    facts = state.get("table", {})
    with checkpoint.reading(with_suffix(path)):
        check_type("table", facts, Facts)
    if not isinstance(regressor, ImageRegressor):
        return Fitted(regressor, path, facts, strict)
    regressor.set_params(verbose=False)
    return FittedOnImages(regressor, path, facts, strict)


def save(regressor: DensityRegressor, path: Path, facts: Mapping[str, Any]) -> Path:
    """Write the estimator with the names of its targets; the file appears whole or not at all."""
    import tempfile

    from energyreg.models import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        plain = regressor.save(Path(folder) / "model")
        model, state = checkpoint.load_estimator(plain)
    return checkpoint.save_estimator(model, state | {"table": dict(facts)}, path)


def use_threads(threads: int | None) -> None:
    """Set the threads of PyTorch; None leaves its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def about_training(regressor: DensityRegressor) -> dict[str, Any]:
    """What `fit` and `info` tell of a training."""
    calibration = regressor.calibration_
    return {
        "members": regressor.n_members_,
        "epochs": regressor.n_iter_,
        "calibration": {
            "inverse_temperature": calibration.inverse_temperature, "base_share": calibration.base_share,
        },
    }  # fmt: skip
