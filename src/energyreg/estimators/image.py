"""`ImageRegressor`: conditional densities of what is on an image, with the scikit-learn API."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import nn

from energyreg.checks import check_count, check_type
from energyreg.estimators.columns import encode_table
from energyreg.estimators.core import DensityRegressor, draw_seed, fit_rows, undone_on_failure
from energyreg.estimators.learning import Rows, check_weights, prepare
from energyreg.estimators.settings import Settings, find_device, threads
from energyreg.estimators.state import State
from energyreg.estimators.table import EnergyRegressor
from energyreg.images.features import extract_features, file_key
from energyreg.images.files import ImageFiles, explain_memory, image_loader
from energyreg.models import checkpoint
from energyreg.models.model import EnergyRegressionModel
from energyreg.modes import with_gradients
from energyreg.networks.encoders import VectorEncoder
from energyreg.networks.image_encoders import ImageEncoder
from energyreg.randomness import RandomSource
from energyreg.tables import files as tablefiles
from energyreg.tables.blocks import MemoryTable
from energyreg.tables.columns import column_names
from energyreg.tables.targets import read_targets
from energyreg.training.fitting import fit
from energyreg.training.history import History

__all__ = ["ImageRegressor", "load_estimator"]

FINE_TUNING_EPOCHS = 10
"""Epochs of the fine-tuning where `fine_tune` is True."""


class ImageState(State):
    """What a file of an :class:`ImageRegressor` holds besides the model."""

    encoder: ImageEncoder
    skipped: dict[str, str]


class ImageRegressor(DensityRegressor):
    r"""Regression on images that predicts the whole density p(y|x).

    A network that was made for classification turns each image into features, as it is or with its last stages
    fine-tuned first; on these works what :class:`~energyreg.estimators.table.EnergyRegressor` does on the columns of a
    table: an ensemble of energy-based models, weighted and calibrated on held-out images. Wherever that takes a table
        X, this
    takes files: a list of paths, an array or a column of them, a folder, or a frame with a column `image`. Images are
    read in batches and never kept; the features of the last call are, 4 C bytes an image.

    Args:
        backbone: "timm:NAME", "torchvision:NAME" or a module; see
            :class:`~energyreg.networks.image_encoders.ImageEncoder`.
        weights: Its weights: "package", a file, None or "pretrained"; see there.
        image_size: Height and width to which images are resized, in pixels.
        resize: "squash" for the whole image, "crop" for the square in its middle.
        fine_tune: Whether the last stages of the network are trained first, with one energy-based model on top; or for
            how many epochs (True: 10). Weights of rows do not count there, but for 0.
        trainable: How many of the last stages, or "all"; of use with `fine_tune` only.
        fine_tune_learning_rate: Peak learning rate of the fine-tuning.
        augment: Called as ``augment(image, target)`` in the fine-tuning; see :mod:`energyreg.images.augment`.
        image: Column of a frame that holds the paths.
        folder: Where relative paths start; the working directory by default.
        cache: Folder in which features are kept, so that an image goes through a network once; None for none. See
            :func:`~energyreg.images.extract_features`.
        checkpoint_dir: Folder in which each epoch of the fine-tuning is kept; a `fit` of the same images and settings
            goes on from there, as after a kill. None for none.
        on_error: What `fit` does with a file that cannot be read: "raise", or "skip" it and warn. A prediction for
            such a file is always an error.
        duplicates: Whether two rows of `fit` may name one file: "raise" or "allow".
        image_batch_size: Images that go through the network at once.
        workers: Processes that read images; 0 for none.
        epochs: Passes over the training rows of the training on features.
        time_budget: Seconds of the training on features, beyond what it takes to make them.
        device: Where the network and the models run.
        **others: `target`, `n_members`, `batch_size`, `learning_rate`, `width`, `depth`, `dropout`, `base`, `outputs`,
            `num_components`, `validation_fraction`, `calibrate`, `conformal`, `random_state`, `n_jobs` and `verbose`
            are those of :class:`~energyreg.estimators.table.EnergyRegressor`.

    Attributes:
        encoder_: The network, frozen, with the weights of the fine-tuning.
        fine_tuning_: History of the fine-tuning; None without.
        skipped_: Files of `fit` that could not be read, with the reasons.

    Raises:
        ImportError: If scikit-learn is not installed.

    >>> regressor = ImageRegressor(target=("interval", 0, 120), cache="features")
    >>> regressor.fit(["a.jpg", "b.jpg"], [31, 58])  # doctest: +SKIP
    >>> regressor.predict_interval(["c.jpg"], 0.9)  # doctest: +SKIP
    """

    # The network itself is in the file; what follows is of use in a fit, or belongs to one machine.
    not_in_files = ("weights", "augment", "folder", "cache", "checkpoint_dir")

    def __init__(
        self,
        *,
        backbone: Any = "timm:tf_efficientnet_lite0",
        weights: Any = "package",
        image_size: int = 112,
        resize: str = "squash",
        fine_tune: Any = False,
        trainable: Any = 2,
        fine_tune_learning_rate: float = 1e-3,
        augment: Callable[..., Any] | None = None,
        image: str = "image",
        folder: Any = None,
        cache: Any = None,
        checkpoint_dir: Any = None,
        on_error: str = "raise",
        duplicates: str = "raise",
        image_batch_size: int = 64,
        workers: int = 0,
        target: Any = "real",
        n_members: Any = "auto",
        epochs: Any = "auto",
        batch_size: int | None = None,
        learning_rate: float = 3e-3,
        width: int = 128,
        depth: int = 2,
        dropout: float | None = None,
        base: str = "auto",
        outputs: str = "auto",
        num_components: int = 8,
        validation_fraction: float | None = 0.1,
        time_budget: float | None = None,
        calibrate: bool = True,
        conformal: bool = False,
        random_state: Any = None,
        n_jobs: int | None = None,
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.image_size = image_size
        self.resize = resize
        self.fine_tune = fine_tune
        self.trainable = trainable
        self.fine_tune_learning_rate = fine_tune_learning_rate
        self.augment = augment
        self.image = image
        self.folder = folder
        self.cache = cache
        self.checkpoint_dir = checkpoint_dir
        self.on_error = on_error
        self.duplicates = duplicates
        self.image_batch_size = image_batch_size
        self.workers = workers
        self.target = target
        self.n_members = n_members
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.base = base
        self.outputs = outputs
        self.num_components = num_components
        self.validation_fraction = validation_fraction
        self.time_budget = time_budget
        self.calibrate = calibrate
        self.conformal = conformal
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.device = device
        self.verbose = verbose

    # Fit -------------------------------------------------------------------------------------------------------------

    @undone_on_failure
    @with_gradients
    def fit(self, X: Any, y: Any, sample_weight: Any = None, eval_set: Any = None) -> ImageRegressor:
        """Learn p(y|x) from images.

        Args:
            X: Files, N of them; see the class.
            y: Targets, shape (N,), or (N, D) for several outputs.
            sample_weight: Weights of the rows, shape (N,).
            eval_set: Pair (files, y) to choose the epoch and the calibration by, instead of a part of the rows.

        Returns:
            The estimator itself.

        Raises:
            FileNotFoundError: If a file is missing; before anything is read, as the others about rows.
            ValueError: If the data or a parameter cannot be used; the message says which, why, and what to do.
            energyreg.images.ImageFileError: If an image cannot be read; it is a ValueError, and names the file.
            energyreg.images.ImageWorkerError: If a process that reads images dies.
            energyreg.images.ImageMemoryError: If memory runs out; the message says what to lower.
            TrainingError: If the training diverges.
        """
        settings = self._settings()
        files = self._files(X, "X", self.get_params(deep=False), self.duplicates, self.on_error)
        targets = read_targets(y, "y", len(files), "X")
        weights = check_weights(sample_weight, len(files))
        files_held, held = (None, None) if eval_set is None else self._evaluation_files(eval_set)
        seed = draw_seed(self.random_state)
        rows = prepare(self.target, settings, targets, weights, held, seed)  # before an image is read
        self.encoder_ = self._new_encoder(seed)
        self.fine_tuning_: History | None = None
        epochs = FINE_TUNING_EPOCHS if self.fine_tune is True else int(self.fine_tune)
        with threads(self.n_jobs):
            if epochs:
                if self.on_error == "skip":  # the rows held out must be the same later on
                    for _ in image_loader(files, self.image_batch_size, workers=self.workers):
                        pass
                    good = [row for row, path in enumerate(files.paths) if str(path) not in files.failed]
                    failed, files = files.failed, files.take(good)
                    files.failed, targets, weights = failed, targets[good], weights[good]
                    rows = prepare(self.target, settings, targets, weights, held, seed)
                self._fine_tune(settings, files, rows, files_held, epochs)
            x = self._extract(files)
            read = ~np.isnan(x).any(1)
            self.skipped_ = dict(files.failed)
            x_held = None if files_held is None else self._extract(files_held)
        if not read.all():
            rows = prepare(self.target, settings, targets[read], weights[read], held, seed)
        fit_rows(self, settings, MemoryTable(x[read], "X"), rows, x_held, time.perf_counter(), _of_features)
        return self

    @with_gradients
    def fit_file(
        self,
        path: str | os.PathLike[str],
        target: str | Sequence[str],
        *,
        drop: Sequence[str] = (),
        sample_weight: str | None = None,
        eval_set: Any = None,
    ) -> ImageRegressor:
        """Learn p(y|x) from a table of files and targets, such as a CSV file.

        Args:
            path: Parquet, Feather or CSV. Paths of images start at its folder where `folder` is None.
            target: Target column, or several for several outputs.
            drop: Without effect: only the columns that are named are read.
            sample_weight: Column of the rows' weights.
            eval_set: As in `fit`.

        Returns:
            The estimator itself.

        Raises:
            energyreg.tables.files.TableFileError: If the table is damaged or lacks a column.
            ValueError: As `fit`, like all else.
        """
        import pandas

        names = [target] if isinstance(target, str) else list(target)
        wanted = [self.image, *names, *([] if sample_weight is None else [sample_weight])]
        there = tablefiles.columns_of(path)
        for name in wanted:
            if name not in there:
                raise tablefiles.TableFileError(path, f"there is no column {name!r}; the columns are {there}.")
        frame = pandas.concat(tablefiles.read_chunks(path, columns=wanted), ignore_index=True)
        if self.folder is None:
            frame[self.image] = [str(Path(path).parent / str(name)) for name in frame[self.image]]
        weight = None if sample_weight is None else frame[sample_weight].to_numpy()
        return self.fit(frame[self.image], frame[names].to_numpy(), weight, eval_set)

    def _settings(self) -> Settings:
        """The parameters of the training, after a check of all."""
        settings = Settings.of(self, frequency_scale=1.0, max_levels=256, min_count=4, split="random")
        check_count("image_size", self.image_size)
        check_count("image_batch_size", self.image_batch_size)
        if not isinstance(self.fine_tune, (bool, np.bool_)):
            check_count("fine_tune", self.fine_tune, also=", True or False")
        if self.augment is not None and not callable(self.augment):
            raise ValueError(f"augment is a {type(self.augment).__name__}; expected a callable (image, target).")
        return settings

    def _new_encoder(self, seed: int, trainable: str | int = "none") -> ImageEncoder:
        if isinstance(self.backbone, ImageEncoder):
            raise ValueError("backbone is an ImageEncoder; pass what it was made of, and its weights.")
        backbone = self.backbone
        if isinstance(backbone, nn.Module):
            backbone = copy.deepcopy(backbone)
        own = isinstance(backbone, nn.Module) and self.weights == "package"  # the default, which names no such module
        with RandomSource(seed).everywhere():
            return ImageEncoder(backbone, None if own else self.weights, trainable, self.image_size)

    def _files(
        self, X: Any, name: str, parameters: dict[str, Any], duplicates: str = "allow", on_error: str = "raise"
    ) -> ImageFiles:
        """Files of a list, an array, a folder, or a column of a frame."""
        columns = column_names(X)
        if columns is not None:
            if self.image not in columns:
                raise ValueError(
                    f"{name} has no column {self.image!r} with the files; its columns are "
                    f"{', '.join(map(repr, columns[:8]))}. Pass image=, the name of the column."
                )
            X = X.column(self.image).to_pylist() if hasattr(X, "column_names") else X[self.image]
        elif getattr(X, "ndim", 1) == 2 and X.shape[1] == 1:
            X = X[:, 0]
        if X is None:
            raise ValueError(f"{name} is None; expected files: a list of paths, a folder, or a frame.")
        return ImageFiles(
            X, size=parameters["image_size"], resize=parameters["resize"], on_error=on_error, duplicates=duplicates,
            folder=self.folder,
        )  # fmt: skip

    def _evaluation_files(self, eval_set: Any) -> tuple[ImageFiles, np.ndarray]:
        pair = eval_set[0] if isinstance(eval_set, (tuple, list)) and len(eval_set) == 1 else eval_set
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"eval_set is a {type(eval_set).__name__}; expected a pair (files, y).")
        files = self._files(pair[0], "eval_set", self.get_params(deep=False), self.duplicates)
        return files, read_targets(pair[1], "y of eval_set", len(files), "eval_set")

    def _fine_tune(
        self, settings: Settings, files: ImageFiles, rows: Rows, files_held: ImageFiles | None, epochs: int
    ) -> None:
        """Train the last stages of the network on the rows that the models are trained on later."""
        train, held_out = rows.train, rows.held_out
        encoder = self._new_encoder(rows.seed, self.trainable)
        with RandomSource(rows.seed).everywhere():  # random_state decides, not what was drawn before
            model = EnergyRegressionModel.for_table(1, rows.target.space(), width=encoder.num_features)
        model.encoder = encoder
        model.to(find_device(self.device)).fit_preprocessing(None, rows.z[train])
        size = min(self.image_batch_size, len(train))
        loader = image_loader(
            files.take(rows.known[train], transform=self.augment, targets=rows.z[train]), size, shuffle=True,
            workers=self.workers, drop_last=True,
        )  # fmt: skip
        held: ImageFiles | None = None
        if files_held is not None:
            held = files_held.take(rows.evaluated, targets=rows.z_evaluation)
        elif len(held_out):
            held = files.take(rows.known[held_out], targets=rows.z[held_out])
        settings.log(f"Fine-tuning {self.trainable} stages for {epochs} epochs on {len(train)} images.")
        with explain_memory(image_batch_size=size, image_size=self.image_size, trainable=self.trainable):
            self.fine_tuning_ = fit(
                model, loader, epochs=epochs, learning_rate=self.fine_tune_learning_rate, seed=rows.seed,
                validation=None if held is None else image_loader(held, size, workers=self.workers),
                checkpoint_dir=self.checkpoint_dir, resume=self.checkpoint_dir is not None, progress=bool(self.verbose),
            )  # fmt: skip
        encoder.trainable = "none"
        encoder.freeze("none")
        self.encoder_ = encoder.eval()

    def _extract(self, files: ImageFiles) -> np.ndarray:
        keys = [file_key(path) for path in files.paths]
        known = getattr(self, "_recent", None)
        if known is not None and known[0] is self.encoder_ and all(key in known[1] for key in keys):
            return known[2][[known[1][key] for key in keys]]
        features = extract_features(
            self.encoder_, files, self.image_batch_size, workers=self.workers, device=find_device(self.device),
            cache=self.cache, progress=bool(self.verbose),
        )  # fmt: skip
        if not files.failed:  # a prediction for a broken file is an error
            self._recent = self.encoder_, {key: row for row, key in enumerate(keys)}, features
        return features

    # Predictions -----------------------------------------------------------------------------------------------------

    def encode(self, X: Any) -> np.ndarray:
        """The inputs of the model: features of images, standardised.

        Args:
            X: Files, B of them.

        Returns:
            Shape (B, F), float32.

        Raises:
            energyreg.images.ImageFileError: If an image cannot be read.
            sklearn.exceptions.NotFittedError: If the estimator has not been fitted.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        files = self._files(X, "X", self.fitted_parameters_)
        with threads(self.n_jobs):
            features = self._extract(files)
        return encode_table(self, features)

    # Files -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a file holds besides the model."""
        state = super().state()
        if isinstance(state["parameters"]["backbone"], nn.Module):
            state["parameters"]["backbone"] = None
        return {**state, "encoder": self.encoder_, "skipped": self.skipped_}

    @classmethod
    def load(cls, path: str | os.PathLike[str], encoder: ImageEncoder | None = None) -> ImageRegressor:
        """Read an estimator that :meth:`save` wrote; its predictions are those of the saved one.

        Args:
            path: File to read, with or without its suffix.
            encoder: Where the backbone was a module of your own: ``ImageEncoder(module)``, whose weights are
                overwritten.

        Raises:
            FileNotFoundError: If there is no such file.
            energyreg.CheckpointError: If the file is damaged, or no estimator of images.
        """
        model, state = checkpoint.load_estimator(path, None if encoder is None else {"encoder": encoder})
        if not isinstance(state.get("encoder"), ImageEncoder):
            raise checkpoint.CheckpointError(
                f"Cannot load {os.fspath(path)!r}: it is an EnergyRegressor, for tables; read it by its load()."
            )
        with checkpoint.reading(path):
            return cls.from_state(model, state)

    @classmethod
    def from_state(cls, model: Any, state: dict[str, Any]) -> Self:
        """The estimator of a model, and of the rest of what a file holds."""
        check_type("state", state, ImageState, finite=False)
        self = super().from_state(model, state)
        self.encoder_, self.skipped_, self.fine_tuning_ = state["encoder"], state["skipped"], None
        if self.encoder_.num_features != self.n_features_in_:
            raise ValueError("encoder contradicts the rest")
        return self


def load_estimator(path: str | os.PathLike[str]) -> tuple[DensityRegressor, dict[str, Any]]:
    """Read an estimator of tables or of images, whichever a file holds.

    Args:
        path: File to read, with or without its suffix.

    Returns:
        The estimator, and all else that the file holds, as :func:`energyreg.models.checkpoint.load_estimator` returns
        it.

    Raises:
        FileNotFoundError: If there is no such file.
        energyreg.CheckpointError: If the file is damaged, or no estimator's.
    """
    model, state = checkpoint.load_estimator(path)
    kind: type[DensityRegressor] = ImageRegressor if isinstance(state.get("encoder"), ImageEncoder) else EnergyRegressor
    with checkpoint.reading(path):
        return kind.from_state(model, state), state


def _of_features(encoder: Any) -> VectorEncoder:
    """An encoder of features with the sizes of one for tables, which is made first: a seed's weights depend on it."""
    return VectorEncoder(encoder.num_features, encoder.context_dim, encoder.depth, encoder.dropout)
