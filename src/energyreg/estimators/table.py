"""`EnergyRegressor`: conditional densities of a table's target, with the scikit-learn API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from energyreg.errors import DataError
from energyreg.estimators.columns import encode_table
from energyreg.estimators.core import DensityRegressor, draw_seed, fit_rows
from energyreg.estimators.learning import FEWEST_TO_SPLIT, check_weights, prepare
from energyreg.estimators.settings import Settings
from energyreg.estimators.splits import notice_order, order_of
from energyreg.modes import with_gradients
from energyreg.tables.blocks import FileTable, MemoryTable, Source
from energyreg.tables.columns import read_columns
from energyreg.tables.files import TableFileError, error_about
from energyreg.tables.targets import read_targets

__all__ = ["EnergyRegressor"]


class EnergyRegressor(DensityRegressor):
    r"""Regression that predicts the whole density p(y|x), for tables of any kind.

    Its predictions are the methods of :class:`~energyreg.estimators.core.DensityRegressor`.

    Numbers, categories, dates and missing values of X are handled inside, learned on the training rows only (see
    :class:`~energyreg.tables.TablePreprocessor`). The model is that of
    :meth:`~energyreg.models.model.EnergyRegressionModel.for_table`, an ensemble of them by default, with the epoch of
    the best validation likelihood and calibrated on the same rows.

    Args:
        target: Where y lives: "real", "positive", ("interval", low, high), ("circle", low, high) for a periodic
            quantity, "count" for whole numbers ≥ 0, or a target space of
            :mod:`energyreg.densities.spaces`. A list of these for several outputs, one each.
        n_members: Models to train. "auto": 8 below 20,000 rows, else 6; for several outputs 5 below 5,000 rows, 3 below
            50,000, else 2. The first four are pilots (two where only one of `dropout` and `frequency_scale` is open;
            none with several outputs, a single feature, no held-out rows, or fewer than two members more): one for
            each of two dropout probabilities and two frequency scales. The others get those in proportion to the
            weights that the pilots earn on the held-out rows, and their learning rate comes down by about the pilots'
            best epoch. All are members, but for those of next to no weight.
        epochs: Passes over the training rows. "auto": as many as make 1,000 steps, from 20 to 150.
        batch_size: Rows per step; see :func:`energyreg.fit`.
        learning_rate: Peak learning rate.
        width: Width of the encoder. "auto": 128 below 20,000 rows, else 256.
        depth: Its hidden layers.
        dropout: Dropout probability after each of them; None to choose between 0 and 0.2 by the pilots, and without
            pilots for 0.1 below 20,000 rows, else 0.2, and none with a single feature.
        frequency_scale: How fast the encoder's periodic features vary (see
            :class:`~energyreg.networks.encoders.TableEncoder`). "auto" to choose between 0.25 and 1 by the pilots from
            500 rows on; without pilots it is the encoder's default.
        base: Base measure: "marginal", the smooth marginal of y; "proposal", a mixture density network that the
            energy departs from; "auto": "proposal" below 10,000 rows, but not where y has point masses. A joint model
            of more than two outputs always has a proposal.
        outputs: How several outputs are modelled: "joint", one energy of all of them; "chain", the chain rule with one
            energy for each given x and those before it, in the order of the columns (see :mod:`energyreg.chain`);
            "auto": the chain from three outputs on.
        num_components: Gaussians of the mixture density network, where there is one.
        validation_fraction: Share of the rows held out, by which the epoch and the calibration are chosen, but 20,000
            rows at most; None or 0 for none. Ignored with an `eval_set`, and below 40 rows.
        split: Which rows are held out: "random"; "time" for the latest ones, by the dates of the index or of the only
            column of dates, else by the order of the rows; "auto" is "random", with a warning where the rows are in the
            order of a date. `groups` of `fit` are never divided.
        time_budget: Seconds that `fit` may take, calibration and conformal scores included: a few steps are timed, one
            member is trained with as many epochs as fit (on a part of the rows, where one epoch is too long), and
            others follow while there is time; `verbose` and the log say how many. A warning says where the first
            member got less than without a budget. Results then depend on the machine.
        calibrate: Whether the members' weights, temperature and defensive mixture weight are chosen on the validation
            rows (10,000 of them at most, 500 for several outputs).
        conformal: Whether `validation_fraction` of the rows more are held out, by which intervals and highest-density
            regions get exact finite-sample coverage.
        max_levels: Categories of a column with a code of their own.
        min_count: Training rows that a category needs for that.
        random_state: Seed of everything: int, RandomState or None.
        n_jobs: Threads of torch during fit and predictions; None leaves them as they are.
        device: "cpu", "cuda", "auto", or None for the CPU, which is fast enough for most tables.
        verbose: Whether a progress bar and the choices are shown.

    Attributes:
        model_: The ensemble, an :class:`~energyreg.models.ensemble.EnergyEnsemble`; a model where there is one member.
            It is in double precision for one output, so that predictions do not depend on the rows predicted together.
        preprocessor_: What was learned about X.
        target_: The kind of each output, a :class:`~energyreg.estimators.targets.Target`.
        space_: Target space.
        calibration_: Temperature and defensive mixture weight.
        history_: History of the first member's training; those of all that were trained in `histories_`.
        lattice_step_: Distance of the values of y where they are counts or rounded, else None.
        n_features_in_: Columns of X.
        feature_names_in_: Their names, where X had some.
        n_outputs_: Columns of y.
        n_samples_fit_: Rows of the table that `fit` was given; not kept in files.
        n_iter_: Epochs of the training.
        frequency_scales_: The members' frequency scales; None for the encoder's default.
        dropouts_: Their dropout probabilities; None for the encoder's default.
        member_weights_: The members' weights in the mixture of their densities.
        n_members_: Members of the ensemble.

    Raises:
        ImportError: If scikit-learn is not installed.

    Counts and rounded values (whose density would spike at each value) are made continuous for the training, by noise
    that is uniform over the rounding: "count" always, "real", "positive" and "interval" where y has ties and all values
    are multiples of one step, or are few and well apart. `score_samples` and `predict_probabilities` undo it. A value
    of the only output that recurs exactly among continuous ones is spread over a narrow width; a warning names it.

    Wild targets, so far from all others that no tail explains them, are left out of the training and the calibration;
    a warning names their rows and values.

    Weights (`sample_weight`) weight the loss of each training row, and the validation likelihood and the calibration
    each validation row; only their ratios matter. A row of weight 2 counts as one that is there twice (but the batches
    are others), and rows of weight 0 as not there at all. What is learned of X and the marginal of y are not weighted,
    nor are conformal scores.

    Large tables: see `fit_file`, and pass arrays as float32 or mapped from a file (:class:`numpy.memmap`). A table is
    encoded in blocks of rows, so that `fit` needs one float32 copy of X and little more; beyond 200,000 training rows
    :class:`~energyreg.tables.TablePreprocessor` learns from that many, chosen at random.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 2))
    >>> y = X[:, 0] + 0.3 * rng.normal(size=200)
    >>> regressor = EnergyRegressor(n_members=1, epochs=5, width=16, random_state=0).fit(X, y)
    >>> regressor.predict(X[:3]).shape, regressor.predict_interval(X[:3]).shape, regressor.score_samples(X, y).shape
    ((3,), (3, 2), (200,))
    """

    def __init__(
        self,
        *,
        target: Any = "real",
        n_members: Any = "auto",
        epochs: Any = "auto",
        batch_size: int | None = None,
        learning_rate: float = 3e-3,
        width: Any = "auto",
        depth: int = 2,
        dropout: float | None = None,
        frequency_scale: Any = "auto",
        base: str = "auto",
        outputs: str = "auto",
        num_components: int = 8,
        validation_fraction: float | None = 0.1,
        split: str = "auto",
        time_budget: float | None = None,
        calibrate: bool = True,
        conformal: bool = False,
        max_levels: int = 256,
        min_count: int = 4,
        random_state: Any = None,
        n_jobs: int | None = None,
        device: str | None = None,
        verbose: bool = False,
    ) -> None:
        self.target = target
        self.n_members = n_members
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.frequency_scale = frequency_scale
        self.base = base
        self.outputs = outputs
        self.num_components = num_components
        self.validation_fraction = validation_fraction
        self.split = split
        self.time_budget = time_budget
        self.calibrate = calibrate
        self.conformal = conformal
        self.max_levels = max_levels
        self.min_count = min_count
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.device = device
        self.verbose = verbose

    # Fit -------------------------------------------------------------------------------------------------------------

    @with_gradients
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        eval_set: Any = None,
        *,
        groups: Any = None,
        time: Any = None,
    ) -> EnergyRegressor:
        """Learn p(y|x).

        Args:
            X: Table of N rows: an array, a pandas or polars frame, or an Arrow table.
            y: Targets, shape (N,), or (N, D) for several outputs.
            sample_weight: Weights of the rows, shape (N,); see the class.
            eval_set: Pair (X, y) to choose the epoch and the calibration by, instead of a part of the rows.
            groups: Group of each row, shape (N,), such as a person: no group is trained on and held out, neither for
                the choice of the epoch and the calibration nor for conformal scores. It is no input.
            time: Time of each row, shape (N,), dates or numbers: the latest rows are held out, as by `split="time"`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If the data or a parameter cannot be used; the message says which, why, and what to do.
            TypeError: If X is sparse, or holds something that is no number, text, boolean or date.
            TrainingError: If the training diverges.
        """
        started = perf_counter()
        settings = Settings.of(self)
        source = MemoryTable(X, "X")
        targets = read_targets(y, "y", source.rows)
        weights = check_weights(sample_weight, source.rows)
        return self._fit_source(settings, source, targets, weights, eval_set, started, groups, time)

    @with_gradients
    def fit_file(
        self,
        path: str | os.PathLike[str],
        target: str | Sequence[str],
        *,
        drop: Sequence[str] = (),
        sample_weight: str | None = None,
        eval_set: Any = None,
        missing: Sequence[str] = (),
        group_column: str | None = None,
        time_column: str | None = None,
    ) -> EnergyRegressor:
        """Learn p(y|x) from a table in a file that need not fit into memory; the same as `fit` of the same table.

        The file is read in blocks of rows, three times. The encoded rows (4 bytes for each value) are kept in memory up
        to 256 MiB, else in a temporary file that is removed whatever happens; set TMPDIR to choose its folder. Targets
        and weights stay in memory, with some bytes for each row.

        Args:
            path: Parquet (.parquet, .pq), Feather (.feather, .arrow) or CSV (.csv, .tsv, .txt).
            target: Target column, or several for several outputs.
            drop: Columns that are not used.
            sample_weight: Column of the rows' weights.
            eval_set: As in `fit`.
            missing: Cells that stand for a missing value, besides the usual ones.
            group_column: Column of the groups, as in `fit`; it is no input.
            time_column: Column of the time, as in `fit`; it is an input, too, unless it is dropped.

        Returns:
            The estimator itself.

        Raises:
            FileNotFoundError: If there is no such file.
            energyreg.tables.files.TableFileError: If the file is damaged or empty, lacks a column, or holds what cannot
                be used; the message names the column and the row, counted from 1. It is a ValueError.
            ValueError: If a parameter cannot be used.
            TrainingError: If the training diverges.
            OSError: If there is no room for the temporary file.
        """
        started = perf_counter()
        settings = Settings.of(self)
        names = [target] if isinstance(target, str) else list(target)
        if not names or isinstance(drop, str) or not all(isinstance(name, str) for name in (*names, *drop)):
            raise ValueError(f"target is {target!r} and drop is {drop!r}; expected names of columns, drop as a list.")
        settings.log(f"Reading {path}.")
        source = FileTable(path, names, drop, sample_weight, missing, group_column, time_column)
        weights = np.ones(source.rows) if source.weights is None else source.weights
        try:
            if not (weights > 0).any():
                raise ValueError(f"column {sample_weight!r}, the weights, is 0 in every row.")
            groups, times = source.groups, source.time
            return self._fit_source(settings, source, source.targets, weights, eval_set, started, groups, times)
        except (ValueError, TypeError) as error:
            if isinstance(error, TableFileError):
                raise
            raise error_about(error, Path(path), names) from error

    def _fit_source(
        self,
        settings: Settings,
        source: Source,
        targets: np.ndarray,
        weights: np.ndarray,
        eval_set: Any,
        started: float,
        groups: Any,
        time: Any,
    ) -> EnergyRegressor:
        """Learn from a table in memory or in a file."""
        if source.rows < 2:
            raise DataError(
                "{name} has n_samples = 1 row; expected at least 2 to learn from, and better 100. Pass more.", name="X"
            )
        x_evaluation, evaluation = (None, None) if eval_set is None else _read_pair(eval_set)
        order = order_of(settings.split, source.rows, source.times, groups, time)
        held_out = settings.conformal or (settings.validation_fraction and eval_set is None)
        if settings.split == "auto" and groups is None and time is None and held_out and source.rows >= FEWEST_TO_SPLIT:
            notice_order(source.times)
        rows = prepare(self.target, settings, targets, weights, evaluation, draw_seed(self.random_state), order)
        fit_rows(self, settings, source, rows, x_evaluation, started)
        return self

    def encode(self, X: Any) -> np.ndarray:
        """The inputs of the model: the columns of a table as :class:`~energyreg.tables.TablePreprocessor` returns them.

        Args:
            X: Table of B rows with the columns of the training.

        Returns:
            Shape (B, F), float32: numbers first, then codes of categories.

        Raises:
            ValueError: If the columns are not those of the training, or hold values of another kind.
            sklearn.exceptions.NotFittedError: If the estimator has not been fitted.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        return encode_table(self, X)


def _read_pair(eval_set: Any) -> tuple[Any, np.ndarray]:
    """The table and the targets, (N, D), of rows that the user holds out."""
    if not isinstance(eval_set, (tuple, list)) or len(eval_set) not in (1, 2):
        raise ValueError(f"eval_set is a {type(eval_set).__name__}; expected a pair (X, y).")
    pair = eval_set[0] if len(eval_set) == 1 else eval_set  # a list of one pair, as boosting libraries take it
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError("eval_set has an entry that is no pair (X, y).")
    _, _, rows = read_columns(pair[0], "X of eval_set")
    targets = read_targets(pair[1], "y of eval_set", rows)
    return pair[0], targets
