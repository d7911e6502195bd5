"""`EnergyRegressor`: conditional densities of a table's target, with the manners of scikit-learn."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import numbers
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from energyreg.densities.bases import Marginal, ProposalBase
from energyreg.densities.spaces import TargetSpace
from energyreg.errors import DataError
from energyreg.estimators.targets import Target, point_masses
from energyreg.inference.integrators import ImportanceSampling
from energyreg.models import checkpoint
from energyreg.models.calibration import Calibration, ConformalIntervals, ConformalRegions
from energyreg.models.chain import EnergyChain
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.models.model import EnergyRegressionModel
from energyreg.models.predictive import HighestDensityRegion, PredictiveDistribution
from energyreg.tables.blocks import FileTable, MemoryTable, Scratch, Source, encode, rows_to_learn_from
from energyreg.tables.columns import column_names, read_columns
from energyreg.tables.files import TableFileError, error_about
from energyreg.tables.preprocessing import TablePreprocessor
from energyreg.tables.targets import read_targets
from energyreg.training.chains import fit_chain
from energyreg.training.data import default_batch_size
from energyreg.training.ensembles import fit_ensemble
from energyreg.training.fitting import fit
from energyreg.training.history import History

try:
    from sklearn.base import BaseEstimator, RegressorMixin
except ImportError as error:
    raise ImportError(
        "EnergyRegressor needs scikit-learn, which is not installed. Install it with: pip install 'energyreg[tables]'"
    ) from error

__all__ = ["EnergyRegressor"]

LOGGER = logging.getLogger("energyreg")

STEPS = 1_000
"""Training steps that are worth taking, however few the rows."""
EPOCHS = (20, 150)
"""Fewest and most passes over the rows by default."""
FREQUENCY_SCALES = (0.25, 1.0)
"""Frequency scales that the scouts try: smooth, as kin8nm wants it, and jagged, as naval does."""
FEWEST_TO_SPREAD = 500
"""Rows from which on they do."""
DROPOUTS = (0.0, 0.2)
"""Dropout that the scouts try: none, as tables without noise want it (naval, energy), and as much as most do."""
MORE_DROPOUT = 20_000
"""Rows from which on the dropout without scouts is that of the model's default."""
WIDTHS = ((20_000, 128), (math.inf, 256))
"""Training rows below which the encoder has this width by default."""
MEMBERS = ((20_000, 8), (math.inf, 6))
"""Training rows below which the ensemble has so many members by default."""
MEMBERS_OF_SEVERAL = ((5_000, 5), (50_000, 3), (math.inf, 2))
"""The same for several outputs."""
FEWEST_AFTER_SCOUTS = 2
"""Members that must be left to train once the scouts have come back; else there are no scouts."""
AVERAGING = 8.0
"""Exponent of the average of the weights (see :func:`energyreg.fit`)."""
MORE_EPOCHS, FEWEST_EPOCHS = 1.25, 10
"""Epochs of the members after the scouts, as a multiple of the scouts' best, and at least: their learning rate comes
down by then, where that of the scouts was still high."""
SCOUTS_PATIENCE = 3
"""The scouts stop after this part of the epochs without an improvement."""
LEAST_SHARE = 0.1
"""Members whose weight is below this part of an equal one are dropped: they would cost time in each prediction."""
FEWEST_TO_SPLIT = 40
"""Rows below which none are held out by default: they are worth more in the training."""
BUDGET_SHARE = 0.8
"""Share of a time budget that is planned for; a machine does not run evenly."""
MOST_HELD_OUT = 20_000
"""Rows held out at most, for validation and for conformal scores: more would tell nothing, and take time."""
CALIBRATION_ROWS = 10_000
"""Validation rows by which the two numbers of the calibration are chosen, at most."""
CALIBRATION_BYTES = 2**25
"""Working memory of the calibration."""
ENCODED_IN_MEMORY = 2**28
"""Bytes up to which the encoded rows of a table that is not in memory are kept there."""
MOST_JUDGED, BOOTSTRAP = 2_000, 1_000
"""Held-out rows by which the scouts are judged, at most, and how often they are drawn anew."""
LEAST_LOG_DENSITY = -1e6
"""What a log-density of -inf counts as among them."""
TIMED_ROWS, CALIBRATED_TO_TIME = 2_048, 256
"""Validation rows that are predicted, and calibrated on, to see how long it takes."""
PREDICTION_ROWS = 16_384
"""Rows of a table that are predicted at once, by default."""
KINDS_OF_PREDICTION = ("mean", "median", "mode")
BASES = ("auto", "marginal", "proposal")
OUTPUTS = ("auto", "joint", "chain")
CHAINED_FROM = 3
"""Outputs from which on they are a chain by default."""
SAMPLES = 1024
"""Points per row of a density of several outputs that has a proposal."""
ROWS_OF_SEVERAL = 500, 2_000
"""Rows by which densities of several outputs are calibrated, and get their conformal scores, at most: each takes as
long as a prediction."""
LATTICE_NODES = 16
"""Points of the rule that integrates the density over a cell of the lattice."""


class EnergyRegressor(RegressorMixin, BaseEstimator):
    r"""Regression that predicts the whole density p(y|x), for tables of any kind.

    Numbers, categories, dates and missing values of X are handled inside, learned on the training rows only (see
    :class:`~energyreg.tables.TablePreprocessor`). The model is that of
    :meth:`~energyreg.models.model.EnergyRegressionModel.for_table`, an ensemble of them by default, with the epoch of
    the best validation likelihood and calibrated on the same rows.

    Args:
        target: Where y lives: "real", "positive", ("interval", low, high), ("circle", low, high) for a quantity that
            starts anew at `high`, "count" for whole numbers ≥ 0, or a target space of
            :mod:`energyreg.densities.spaces`. A list of these for several outputs, one each.
        n_members: Models to train. "auto": 8 below 20,000 rows, else 6; for several outputs 5 below 5,000 rows, 3 below
            50,000, else 2. The first four are scouts (two where only one of `dropout` and `frequency_scale` is open;
            none with several outputs, a single feature, no held-out rows, or fewer than two members more): one for
            each of two dropout probabilities and two frequency scales. The others get those in proportion to the
            weights that the scouts earn on the held-out rows, and their learning rate comes down by about the scouts'
            best epoch. All are members, but for those of next to no weight.
        epochs: Passes over the training rows. "auto": as many as make 1,000 steps, from 20 to 150.
        batch_size: Rows per step; see :func:`energyreg.fit`.
        learning_rate: Peak learning rate.
        width: Width of the encoder. "auto": 128 below 20,000 rows, else 256.
        depth: Its hidden layers.
        dropout: Dropout probability after each of them; None to choose between 0 and 0.2 by the scouts, and without
            scouts for 0.1 below 20,000 rows, else 0.2, and none with a single feature.
        frequency_scale: How fast the encoder's periodic features vary (see
            :class:`~energyreg.networks.encoders.TableEncoder`). "auto" to choose between 0.25 and 1 by the scouts from
            500 rows on; without scouts it is the encoder's default.
        base: Base measure: "marginal", the smooth marginal of y; "proposal", a mixture density network that the
            energy departs from; "auto": "proposal" below 10,000 rows, but not where y has atoms. A joint model of more
            than two outputs always has a proposal.
        outputs: How several outputs are modelled: "joint", one energy of all of them; "chain", the chain rule with one
            energy for each given x and those before it, in the order of the columns (see :mod:`energyreg.chain`);
            "auto": the chain from three outputs on.
        num_components: Gaussians of the mixture density network, where there is one.
        validation_fraction: Share of the rows held out, by which the epoch and the calibration are chosen, but 20,000
            rows at most; None or 0 for none. Ignored with an `eval_set`, and below 40 rows.
        time_budget: Seconds that `fit` may take: a few steps are timed, and epochs and members chosen to fit (and rows,
            where one epoch is too long); `verbose` and the log say which. Where the machine is slower than planned,
            training stops at the last step that the budget allows, with the best weights so far, and a warning says
            so. Results then depend on the machine.
        calibrate: Whether the members' weights, temperature and defensive share are chosen on the validation rows
            (10,000 of them at most, 500 for several outputs).
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
        calibration_: Temperature and defensive share.
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
    are multiples of one step. `score_samples` and `predict_probabilities` undo it.

    Weights (`sample_weight`) weight the loss of each training row, and the validation likelihood and the calibration
    each validation row; only their ratios matter. A row of weight 2 counts as one that is there twice (but the batches
    are others), and rows of weight 0 as not there at all. What is learned of X and the marginal of y are not weighted,
    nor are conformal scores.

    Large tables: see `fit_file`, and pass arrays as float32 or mapped from a file (:class:`numpy.memmap`). A table is
    encoded in blocks of rows, so that `fit` needs one float32 copy of X and little more; beyond 200,000 training rows
    :class:`~energyreg.tables.TablePreprocessor` learns from that many, chosen by chance.

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
        self.time_budget = time_budget
        self.calibrate = calibrate
        self.conformal = conformal
        self.max_levels = max_levels
        self.min_count = min_count
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.device = device
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = False
        tags.target_tags.multi_output = True
        return tags

    # Fit -------------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None, eval_set: Any = None) -> EnergyRegressor:
        """Learn p(y|x).

        Args:
            X: Table of N rows: an array, a pandas or polars frame, or an Arrow table.
            y: Targets, shape (N,), or (N, D) for several outputs.
            sample_weight: Weights of the rows, shape (N,); see the class.
            eval_set: Pair (X, y) to choose the epoch and the calibration by, instead of a part of the rows.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If the data or a parameter cannot be used; the message says which, why, and what to do.
            TypeError: If X is sparse, or holds something that is no number, text, boolean or date.
            TrainingError: If the training diverges.
        """
        started = time.perf_counter()
        self._check_parameters()
        source = MemoryTable(X, "X")
        targets = read_targets(y, "y", source.rows)
        return self._fit_source(source, targets, _weights(sample_weight, source.rows), eval_set, started)

    def fit_file(
        self,
        path: str | os.PathLike[str],
        target: str | Sequence[str],
        *,
        drop: Sequence[str] = (),
        sample_weight: str | None = None,
        eval_set: Any = None,
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
        started = time.perf_counter()
        self._check_parameters()
        names = [target] if isinstance(target, str) else list(target)
        if not names or isinstance(drop, str) or not all(isinstance(name, str) for name in (*names, *drop)):
            raise ValueError(f"target is {target!r} and drop is {drop!r}; expected names of columns, drop as a list.")
        self._say(f"Reading {path}.")
        source = FileTable(path, names, drop, sample_weight)
        weights = np.ones(source.rows) if source.weights is None else source.weights
        try:
            if not (weights > 0).any():
                raise ValueError(f"column {sample_weight!r}, the weights, is 0 in every row.")
            return self._fit_source(source, source.targets, weights, eval_set, started)
        except (ValueError, TypeError) as error:
            if isinstance(error, TableFileError):
                raise
            raise error_about(error, Path(path), names) from error

    def _fit_source(
        self, source: Source, targets: np.ndarray, weights: np.ndarray, eval_set: Any, started: float
    ) -> EnergyRegressor:
        """Learn from a table in memory or in a file."""
        self.n_samples_fit_ = source.rows
        if source.rows < 2:
            raise DataError(
                "{name} has n_samples = 1 row; expected at least 2 to learn from, and better 100. Pass more.", name="X"
            )
        self._set_features(source.given, source.names, source.width)
        self.n_outputs_ = targets.shape[1]
        self.target_ = Target.parse(self.target, self.n_outputs_)
        space = self.target_.space()
        self._check_targets(space, targets, "y")
        known = np.flatnonzero(weights > 0)  # the others count as not there
        targets, weights = targets[known], weights[known]
        evaluation = None if eval_set is None else self._evaluation(eval_set, space)
        seed = self._seed()
        rng = np.random.default_rng(seed)
        train, held_out, conformal = self._split(len(known), evaluation is not None, weights, rng)
        steps = self.target_.rounding_steps(targets)
        self.lattice_step_ = (steps[0] or None) if self.n_outputs_ == 1 else None
        self._point_masses = point_masses(targets[train], self.lattice_step_)

        self.preprocessor_ = TablePreprocessor(self.max_levels, self.min_count)
        learned_on = rows_to_learn_from(known[train], source.width, seed)
        self.preprocessor_.fit_columns(source.names, source.take(learned_on))
        for note in self.preprocessor_.notes_:
            self._say(note[:1].upper() + note[1:])
        z = self.target_.dequantise(targets, steps, rng)
        parts = [known[part] for part in (train, held_out, conformal)]
        with Scratch(ENCODED_IN_MEMORY if source.on_disk else None) as scratch:
            x, x_held_out, x_conformal = encode(source, self.preprocessor_, parts, scratch)
            validation: tuple[np.ndarray, np.ndarray] | None = None
            validation_weights = None
            if evaluation is not None:
                self._check_features(evaluation[0], "X of eval_set")
                x_val = self.preprocessor_.transform(evaluation[0], "X of eval_set")
                validation = x_val, self.target_.dequantise(evaluation[1], steps, rng)
            elif len(held_out):
                validation, validation_weights = (x_held_out, z[held_out]), weights[held_out]
            with self._threads():
                self._train(x, z[train], weights[train], validation, validation_weights, space, seed, started)
                self._calibrate(validation, validation_weights, seed)
        self._conformal_rows(x_conformal, targets[conformal])
        return self

    def _check_parameters(self) -> None:
        for name in ("epochs", "n_members", "width"):
            if getattr(self, name) != "auto":
                _check_whole(name, getattr(self, name), ' or "auto"')
        if self.batch_size is not None:
            _check_whole("batch_size", self.batch_size, " or None")
        for name in ("depth", "num_components", "max_levels", "min_count"):
            _check_whole(name, getattr(self, name))
        if self.n_jobs is not None and (not _is_whole(self.n_jobs) or self.n_jobs == 0):
            raise ValueError(f"n_jobs is {self.n_jobs!r}; expected a whole number, -1 for all cores, or None.")
        for name, least, below, none in (
            ("learning_rate", 0.0, math.inf, False), ("dropout", -1.0, 1.0, True), ("time_budget", 0.0, math.inf, True),
            ("validation_fraction", -1.0, 1.0, True),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and none:
                continue
            fine = _is_number(value) and least < value < below
            if not fine or (least < 0 and value < 0):
                span = "> 0" if least == 0 else "from 0 to below 1"
                raise ValueError(f"{name} is {value!r}; expected a number {span}{' or None' if none else ''}.")
        scale = self.frequency_scale
        if not (_is_number(scale) and 0 < scale < math.inf) and not (isinstance(scale, str) and scale == "auto"):
            raise ValueError(f'frequency_scale is {scale!r}; expected a number > 0 or "auto".')
        if self.base not in BASES:
            raise ValueError(f"base is {self.base!r}; expected one of {', '.join(map(repr, BASES))}.")
        if self.outputs not in OUTPUTS:
            raise ValueError(f"outputs is {self.outputs!r}; expected one of {', '.join(map(repr, OUTPUTS))}.")
        if self.device not in (None, "auto") and not isinstance(self.device, (str, torch.device)):
            raise ValueError(f"device is {self.device!r}; expected 'cpu', 'cuda', 'auto' or None.")
        for name in ("calibrate", "conformal"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False.")

    def _seed(self) -> int:
        from sklearn.utils import check_random_state

        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _say(self, text: str) -> None:
        LOGGER.info(text)
        if self.verbose:
            print(text)

    def _set_features(self, given: Sequence[Any] | None, names: Sequence[str] | None, count: int) -> None:
        self.n_features_in_ = count
        if names is not None and given is not None and all(isinstance(name, str) for name in given):
            self.feature_names_in_ = np.asarray(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _check_targets(self, space: TargetSpace, targets: np.ndarray, name: str) -> None:
        self.target_.check(space, targets, name)
        constant = np.flatnonzero((targets == targets[0]).all(0))
        if name == "y" and len(constant):
            raise DataError(
                "{name} has the same value in every row of column {column!r}: {value:.9g}; expected targets that "
                "vary. Check how it was made, or drop the column.",
                name="y", column=constant[0], value=targets[0, constant[0]],
            )  # fmt: skip

    def _evaluation(self, eval_set: Any, space: TargetSpace) -> tuple[Any, np.ndarray]:
        if not isinstance(eval_set, (tuple, list)) or len(eval_set) not in (1, 2):
            raise ValueError(f"eval_set is a {type(eval_set).__name__}; expected a pair (X, y).")
        pair = eval_set[0] if len(eval_set) == 1 else eval_set  # a list of one pair, as boosting libraries take it
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError("eval_set has an entry that is no pair (X, y).")
        _, _, rows = read_columns(pair[0], "X of eval_set")
        targets = read_targets(pair[1], "y of eval_set", rows)
        if targets.shape[1] != space.dim:
            raise ValueError(f"y of eval_set has {targets.shape[1]} column(s), but y has {space.dim}.")
        self._check_targets(space, targets, "y of eval_set")
        return pair[0], targets

    def _split(
        self, rows: int, evaluated: bool, weights: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows to train on, to validate on, and for conformal scores."""
        known = np.flatnonzero(weights > 0)
        order = known[rng.permutation(len(known))]
        fraction = self.validation_fraction or 0.0
        share = 0.1 if fraction == 0 else fraction
        held_out = (
            0 if evaluated or fraction == 0 or len(order) < FEWEST_TO_SPLIT else max(round(fraction * len(order)), 1)
        )
        held_out = min(held_out, MOST_HELD_OUT)
        conformal = min(max(round(share * len(order)), 1), MOST_HELD_OUT) if self.conformal else 0
        if len(order) - held_out - conformal < 2:
            raise ValueError(
                f"X has {len(order)} rows with a weight above 0, of which {held_out} are held out for validation and "
                f"{conformal} for conformal scores; expected at least 2 to train on. Lower validation_fraction."
            )
        parts = np.split(order, [held_out, held_out + conformal])
        return np.sort(parts[2]), np.sort(parts[0]), np.sort(parts[1])

    # Training --------------------------------------------------------------------------------------------------------

    def _train(
        self,
        x: np.ndarray,
        y: np.ndarray,
        weights: np.ndarray,
        validation: tuple[np.ndarray, np.ndarray] | None,
        validation_weights: np.ndarray | None,
        space: TargetSpace,
        seed: int,
        started: float,
    ) -> None:
        rows = len(y)
        auto = _by_rows(MEMBERS if self.n_outputs_ == 1 else MEMBERS_OF_SEVERAL, rows)
        members = auto if self.n_members == "auto" else int(self.n_members)
        batch_size = self.batch_size or default_batch_size(y)
        steps = max(rows // min(batch_size, rows), 1)
        epochs = min(max(round(STEPS / steps), EPOCHS[0]), EPOCHS[1]) if self.epochs == "auto" else int(self.epochs)
        settings: dict[str, Any] = {
            "batch_size": batch_size, "learning_rate": self.learning_rate, "seed": seed, "sample_weight": weights,
            "validation": None if validation is None else (*validation, validation_weights), "averaging": AVERAGING,
        }  # fmt: skip
        data = torch.as_tensor(x), torch.as_tensor(y)
        usual = _Trial(
            None if self.frequency_scale == "auto" else float(self.frequency_scale), self._dropout(x.shape[1], rows)
        )

        slabs: list[tuple[float, float]] = []
        if len(self._point_masses):
            space = copy.deepcopy(space)
            space.fit(data[1])  # the uniform components are told in its units
            slabs = self.target_.uniform_components(space, self._point_masses, self.lattice_step_ or 0.0)

        def builder(trials: Sequence[_Trial]) -> Any:
            endless = itertools.cycle(trials)

            def build() -> EnergyRegressionModel | EnergyChain:
                trial = next(endless)
                model = self._new_model(x.shape[1], space, rows, trial.frequency_scale, trial.dropout, slabs)
                return model.to(self._device())

            return build

        if self.time_budget is not None:
            plan = self._plan_time(builder([usual]), data, settings, epochs, members, steps)
            epochs, members, used = self._choose_by_time(plan, epochs, members, rows, batch_size, started)
            settings["time_limit"] = max(self.time_budget - (time.perf_counter() - started) - plan.afterwards, 1e-3)
            if used < rows:
                chosen = np.sort(np.random.default_rng([seed, 2]).choice(rows, used, replace=False))
                data, settings["sample_weight"] = (data[0][chosen], data[1][chosen]), weights[chosen]
                steps = max(used // batch_size, 1)
                rows = used
        until = time.perf_counter() + settings.get("time_limit", math.inf)
        self._say(
            f"Training {members} member{'s' * (members > 1)} for {epochs} epochs of {steps} steps on {rows} rows, "
            f"{0 if validation is None else len(validation[1])} held out."
        )
        settings["progress"] = bool(self.verbose)
        trials = self._scouts(x.shape[1], rows, members, usual, validation is not None)
        self.model_: EnergyRegressionModel | EnergyEnsemble | EnergyChain
        if trials:
            patience = max(epochs // SCOUTS_PATIENCE, 1)
            scouts, histories = _fit(
                builder(trials), data, len(trials), epochs, {**settings, "patience": patience}, False
            )
            assert isinstance(scouts, EnergyEnsemble)
            rest, epochs = self._after_scouts(scouts, trials, histories, members, epochs, settings)
            if rest:
                if "time_limit" in settings:
                    settings["time_limit"] = max(until - time.perf_counter(), 1e-3)
                settings["seed"] = seed + len(trials)
                others, more = _fit(builder(rest), data, len(rest), epochs, settings, False)
                assert isinstance(others, EnergyEnsemble)
                scouts = EnergyEnsemble([*scouts.models(), *others.models()]).eval()
                trials, histories = [*trials, *rest], [*histories, *more]
            self.model_, self.histories_ = scouts, histories
        else:
            trials = [usual] * members
            self.model_, self.histories_ = _fit(
                builder(trials), data, members, epochs, settings, self._chained(space.dim)
            )
        self._set_precision()
        self.frequency_scales_ = [trial.frequency_scale for trial in trials]
        self.dropouts_ = [trial.dropout for trial in trials]
        self.space_ = self.model_.space
        self.history_ = self.histories_[0]
        self.n_members_, self.n_iter_ = len(trials), max(len(history.train_loss) for history in self.histories_)

    def _scouts(self, num_features: int, rows: int, members: int, usual: _Trial, judged: bool) -> list[_Trial]:
        """What the scouts try; nothing where nothing is open, or nobody could profit by it."""
        if self.n_outputs_ > 1 or num_features == 1 or not judged:
            return []
        spread = self.frequency_scale == "auto" and rows >= FEWEST_TO_SPREAD
        trials = [
            _Trial(scale, dropout)
            for dropout in (DROPOUTS if self.dropout is None else (usual.dropout,))
            for scale in (FREQUENCY_SCALES if spread else (usual.frequency_scale,))
        ]
        return trials if len(trials) > 1 and members >= len(trials) + FEWEST_AFTER_SCOUTS else []

    def _after_scouts(
        self,
        scouts: EnergyEnsemble,
        trials: Sequence[_Trial],
        histories: Sequence[History],
        members: int,
        epochs: int,
        settings: dict[str, Any],
    ) -> tuple[list[_Trial], int]:
        """What the other members get, and their epochs; none if the user or the clock has had enough."""
        if any(history.interrupted or history.timed_out for history in histories):
            return [], epochs
        try:
            x, y, weights = settings["validation"]
            shares = self._chances(scouts, x, y, weights, settings["seed"])
        except KeyboardInterrupt:
            for history in histories:
                history.interrupted = True
            warnings.warn("fit was interrupted after the first members, which are the model.", stacklevel=5)
            return [], epochs
        counts = _allot(shares, members - len(trials))
        best = sum(share * (history.best_epoch or epochs) for share, history in zip(shares, histories, strict=True))
        more = max(math.ceil(MORE_EPOCHS * float(best)), FEWEST_EPOCHS)
        for trial, share, count in zip(trials, shares, counts, strict=True):
            self._say(
                f"Dropout {trial.dropout}, frequency scale {trial.frequency_scale}: the best with probability "
                f"{share:.2f}, {count} more members of {more} epochs."
            )
        return [trial for trial, count in zip(trials, counts, strict=True) for _ in range(count)], more

    @staticmethod
    def _chances(
        scouts: EnergyEnsemble, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None, seed: int
    ) -> np.ndarray:
        """Each scout's probability of being the best, by the Bayesian bootstrap over the held-out rows.

        Source:
            Yao, Vehtari, Simpson and Gelman, "Using stacking to average Bayesian predictive distributions", Bayesian
            Analysis 2018 (pseudo-BMA+).
        """
        rng = np.random.default_rng([seed, 4])
        rows = np.sort(rng.choice(len(y), MOST_JUDGED, replace=False)) if len(y) > MOST_JUDGED else np.arange(len(y))
        targets = torch.as_tensor(y[rows])
        with torch.no_grad():
            log_p = [
                member(torch.as_tensor(x[rows])).log_prob(targets).double().cpu().numpy() for member in scouts.models()
            ]
        table = np.maximum(np.stack(log_p), LEAST_LOG_DENSITY)
        draws = rng.gamma(
            np.ones(len(rows)) if weights is None else weights[rows] / weights.mean(), size=(BOOTSTRAP, len(rows))
        )
        return np.bincount((draws @ table.T).argmax(1), minlength=len(table)) / BOOTSTRAP

    def _new_model(
        self,
        num_features: int,
        space: TargetSpace,
        rows: int,
        frequency_scale: float | None,
        dropout: float | None,
        slabs: Sequence[tuple[float, float]],
    ) -> EnergyRegressionModel | EnergyChain:
        """A member, with weights of its own."""
        # A mixture has no edges, so where there are atoms their slabs are the better start.
        few = {"auto": None if slabs else rows, "marginal": None, "proposal": 0}[self.base]
        sizes: dict[str, Any] = {
            "width": self._width(rows), "depth": self.depth, "dropout": dropout,
            "num_components": self.num_components, "num_rows": few,
            "cardinalities": self.preprocessor_.cardinalities_,
        }  # fmt: skip
        if self._chained(space.dim):
            return EnergyChain.for_table(num_features, copy.deepcopy(space), **sizes)
        model = EnergyRegressionModel.for_table(
            num_features, copy.deepcopy(space), frequency_scale=frequency_scale, **sizes
        )
        if slabs:
            marginal = Marginal(1, slabs=slabs)
            model.base = ProposalBase(marginal) if isinstance(model.base, ProposalBase) else marginal
        return model

    def _chained(self, dim: int) -> bool:
        return dim >= {"auto": CHAINED_FROM, "joint": math.inf, "chain": 2}[self.outputs]

    def _width(self, rows: int) -> int:
        return _by_rows(WIDTHS, rows) if self.width == "auto" else int(self.width)

    def _dropout(self, num_features: int, rows: int) -> float | None:
        """Dropout probability without scouts; None for that of the model's default."""
        if self.dropout is not None or num_features == 1 or rows >= MORE_DROPOUT:
            return self.dropout
        return 0.1

    def _set_precision(self) -> None:
        """Double for one output, where the points are few; for several the time for it is better spent on points."""
        if self.n_outputs_ == 1:
            self.model_.double()

    def _plan_time(
        self,
        build: Any,
        data: tuple[Tensor, Tensor],
        settings: dict[str, Any],
        epochs: int,
        members: int,
        steps: int,
    ) -> _TimePlan:
        """What the training takes, by the time that some steps, some validation rows and their calibration take."""
        x, y = data
        size = min(settings["batch_size"], len(y))
        held_out, tried = settings["validation"], settings["validation"]
        if held_out is not None:
            tried = [None if part is None else part[:TIMED_ROWS] for part in held_out]
        seconds = {}
        try:
            for count in (2, min(2 + max(steps, 2), 12)):  # the first run pays for what is done once, too
                chosen = torch.arange(count * size) % len(y)
                trial = {
                    **settings, "sample_weight": settings["sample_weight"][chosen], "validation": tried,
                    "progress": False,
                }  # fmt: skip
                before = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what they say of is said again by the training itself
                    model, histories = _fit(build, (x[chosen], y[chosen]), members, 1, trial, self._chained(y.shape[1]))
                if any(history.interrupted for history in histories):
                    raise KeyboardInterrupt
                seconds[count] = _epoch_seconds(histories, members) or time.perf_counter() - before
            afterwards = self._time_afterwards(model, tried, held_out)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "fit was interrupted while the time of some steps was measured; there is no model yet."
            ) from None
        (few, short), (many, long) = sorted(seconds.items())
        step = max((long - short) / (many - few), long / many / 4)
        validation = max(long - step * many, 0.0)
        if held_out is not None:
            validation *= len(held_out[1]) / len(tried[1])
        return _TimePlan(step / members, steps, validation / members, afterwards)

    def _time_afterwards(self, model: Any, tried: Any, held_out: Any) -> float:
        """Seconds that the calibration will take, and the conformal scores, which are about as much work a row."""
        if tried is None or not (self.calibrate or self.conformal):
            return 0.0
        one = self.n_outputs_ == 1
        count = CALIBRATED_TO_TIME if one else CALIBRATED_TO_TIME // 8
        x, y = tried[0][:count], tried[1][:count]
        before = time.perf_counter()
        integrator = ImportanceSampling(SAMPLES) if self._needs_samples(model) else None
        model = model.double() if one else model
        if isinstance(model, EnergyEnsemble):
            model.fit_weights(x, y, integrator=integrator)
        Calibration.fit(model(x, integrator=integrator), torch.as_tensor(y))
        each = (time.perf_counter() - before) / len(y)
        most = (CALIBRATION_ROWS, len(held_out[1])) if one else ROWS_OF_SEVERAL
        rows = sum(min(len(held_out[1]), m) * w for m, w in zip(most, (self.calibrate, self.conformal), strict=True))
        # A quarter of the budget at most: a first call may take many times as long as those after it.
        return min(each * rows, (self.time_budget or math.inf) / 4)

    def _choose_by_time(
        self, plan: _TimePlan, epochs: int, members: int, rows: int, batch_size: int, started: float
    ) -> tuple[int, int, int]:
        """Epochs, members and rows that fit the time budget."""
        budget = self.time_budget or 0.0
        left = (budget - plan.afterwards) * BUDGET_SHARE - (time.perf_counter() - started)
        wanted = members
        while members > 1 and left / plan.epoch(members) < epochs / 2:
            members -= 1
        epoch = plan.epoch(members)
        possible = int(left / epoch)
        if possible >= 1:
            chosen = min(epochs, possible)
            self._say(
                f"An epoch of {wanted} members takes about {plan.epoch(wanted):.2g} s, {left:.3g} s are left: {chosen} "
                f"epochs of {members} instead of {epochs} of {wanted}, about {chosen * epoch:.3g} s."
            )
            return chosen, members, rows
        # A part of the rows, so that the schedule comes to its end: the learning rate must become small.
        possible = int((left - plan.validation * members) / (plan.step * members))
        used = min(max(possible, 1) * batch_size, rows)
        warnings.warn(
            f"time_budget is {budget:g} s, but an epoch takes about {epoch:.2g} s; {used} of the {rows} training rows "
            "are used, chosen by chance, and each once. Pass a longer budget.",
            stacklevel=5,
        )
        return 1, members, max(used, 2)

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device("cpu" if self.device is None else self.device)

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        if self.n_jobs is None:
            yield
            return
        before = torch.get_num_threads()
        cores = os.cpu_count() or 1
        torch.set_num_threads(self.n_jobs if self.n_jobs > 0 else max(cores + 1 + self.n_jobs, 1))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _calibrate(
        self, validation: tuple[np.ndarray, np.ndarray] | None, weights: np.ndarray | None, seed: int
    ) -> None:
        self.calibration_ = Calibration()
        self.member_weights_ = _weights_of(self.model_)
        if not self.calibrate or validation is None:
            return
        x, y = validation
        most = CALIBRATION_ROWS if self.n_outputs_ == 1 else ROWS_OF_SEVERAL[0]
        if len(y) > most:
            rows = np.sort(np.random.default_rng([seed, 3]).choice(len(y), most, replace=False))
            x, y, weights = x[rows], y[rows], None if weights is None else weights[rows]
        try:
            integrator = ImportanceSampling(SAMPLES) if self._needs_samples(self.model_) else None
            if isinstance(self.model_, EnergyEnsemble):
                self.model_.fit_weights(x, y, weights, integrator=integrator, memory_budget=CALIBRATION_BYTES)
                self._drop_members()
            p = self.model_(x, integrator=integrator, memory_budget=CALIBRATION_BYTES)
            self.calibration_ = Calibration.fit(p, torch.as_tensor(y), weights)
        except KeyboardInterrupt:
            for history in self.histories_:
                history.interrupted = True
            warnings.warn("fit was interrupted in the calibration; the model is as it was trained.", stacklevel=4)
            return
        if len(self.member_weights_) > 1:
            self._say(f"Weights of the members: {', '.join(f'{weight:.2f}' for weight in self.member_weights_)}.")
        t, share = self.calibration_.inverse_temperature, self.calibration_.base_share
        self._say(f"Calibration on {len(y)} rows: energy times {t:.3g}, {share:.2g} of the base.")

    def _drop_members(self) -> None:
        """Drop the members whose weights are next to nothing."""
        assert isinstance(self.model_, EnergyEnsemble)
        weights = np.array(self.model_.shares)
        kept = np.flatnonzero(weights >= LEAST_SHARE / len(weights))
        if len(kept) < len(weights):
            members = self.model_.models()
            weights = weights[kept] / weights[kept].sum()
            self.model_ = EnergyEnsemble([members[i] for i in kept.tolist()], weights.tolist()).eval()
            self.frequency_scales_ = [self.frequency_scales_[i] for i in kept]
            self.dropouts_ = [self.dropouts_[i] for i in kept]
            self.n_members_ = len(kept)
        self.member_weights_ = weights.tolist()

    def _conformal_rows(self, x: np.ndarray, y: np.ndarray) -> None:
        for name in ("conformal_regions_", "conformal_intervals_"):
            if hasattr(self, name):
                delattr(self, name)
        if not self.conformal:
            return
        if self.n_outputs_ > 1 and len(y) > ROWS_OF_SEVERAL[1]:
            chosen = np.random.default_rng(len(y)).choice(len(y), ROWS_OF_SEVERAL[1], replace=False)
            x, y = x[chosen], y[chosen]
        self.conformal_regions_ = ConformalRegions(self._distribution, x, y)
        if not any(self.space_.periodic):
            self.conformal_intervals_ = ConformalIntervals(self._distribution, x, y)

    # Predictions -----------------------------------------------------------------------------------------------------

    def _check_features(self, X: Any, name: str = "X") -> None:
        """Names and number of columns, with the messages of scikit-learn."""
        given = column_names(X)
        known = getattr(self, "feature_names_in_", None)
        named = given is not None and all(isinstance(column, str) for column in given)
        count = len(given) if given is not None else None
        if known is not None and named and given is not None:
            if list(known) == given:
                return
            extra, missing = sorted(set(given) - set(known)), sorted(set(known) - set(given))
            parts = ["The feature names should match those that were passed during fit.\n"]
            for title, found in (("unseen at fit time", extra), ("seen at fit time, yet now missing", missing)):
                if found:
                    shown = "".join(f"- {column}\n" for column in found[:5]) + ("- ...\n" if len(found) > 5 else "")
                    parts.append(f"Feature names {title}:\n{shown}")
            if not extra and not missing:
                parts.append("Feature names must be in the same order as they were in fit.\n")
            raise ValueError("".join(parts))
        if known is not None and not named:
            warnings.warn(
                f"X does not have valid feature names, but {type(self).__name__} was fitted with feature names",
                stacklevel=4,
            )
        elif known is None and named:
            warnings.warn(
                f"X has feature names, but {type(self).__name__} was fitted without feature names", stacklevel=4
            )
        if count is not None and count != self.n_features_in_:
            self._refuse_count(count, name)

    def _refuse_count(self, count: int, name: str) -> None:
        raise DataError(
            "{name} has {count} features, but {estimator} is expecting {expected} features as input. Pass the columns "
            "that were passed to fit.",
            name=name, count=count, estimator=type(self).__name__, expected=self.n_features_in_,
        )  # fmt: skip

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
        names, columns, rows = read_columns(X, "X")
        self._check_features(X)
        if len(columns) != self.n_features_in_:
            self._refuse_count(len(columns), "X")
        return self.preprocessor_.transform_columns(names, columns, rows)

    def _distribution(self, x: np.ndarray) -> PredictiveDistribution:
        integrator = ImportanceSampling(SAMPLES) if self._needs_samples(self.model_) else None
        return self.calibration_(self.model_(x, integrator=integrator))

    @staticmethod
    def _needs_samples(model: EnergyRegressionModel | EnergyEnsemble | EnergyChain) -> bool:
        if isinstance(model, EnergyChain):
            return False
        integrator = model._integrator() if isinstance(model, EnergyEnsemble) else model.default_integrator()
        return isinstance(integrator, ImportanceSampling)

    def predict_distribution(self, X: Any) -> PredictiveDistribution:
        """The predictive distribution p(y|x), in the units of y; for counts and rounded values the continuous one.

        Args:
            X: Table of B rows with the columns of the training.

        Raises:
            ValueError: If the columns are not those of the training, or hold values of another kind.
            sklearn.exceptions.NotFittedError: If the estimator has not been fitted.
        """
        x = self.encode(X)
        with self._threads():
            return self._distribution(x)

    def _by_blocks(self, X: Any, function: Any) -> np.ndarray:
        """Apply a function of a distribution to blocks of rows, and join what it returns along the first dimension."""
        x = self.encode(X)
        with self._threads():
            blocks = [x[start : start + PREDICTION_ROWS] for start in range(0, len(x), PREDICTION_ROWS)]
            parts = [function(self._distribution(block)).double().cpu().numpy() for block in blocks]
        return np.concatenate(parts)

    def predict(self, X: Any, kind: str = "mean") -> np.ndarray:
        """One number per row and output.

        Args:
            X: Table of B rows.
            kind: "mean", "median" or "mode" (the highest point of the density). On a circle the mean is the direction
                of the mean vector. Median and mode of counts are whole numbers.

        Returns:
            Shape (B,), or (B, D) for several outputs.

        Raises:
            ValueError: If kind is another, or X does not fit; see :meth:`predict_distribution`.
        """
        if kind not in KINDS_OF_PREDICTION:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, KINDS_OF_PREDICTION))}.")
        values = self._by_blocks(X, lambda p: getattr(p, kind))
        values = self.target_.clip(values) if kind == "mean" else self.target_.round(values)
        return values[:, 0] if self.n_outputs_ == 1 else values

    def predict_interval(self, X: Any, level: float = 0.9) -> np.ndarray:
        """Equal-tailed interval of each row, and of each output by itself.

        With `conformal` its coverage is at least `level` on average over new rows, whatever the density is like; of
        several outputs, of all their intervals together. Not on a circle, where only
        :meth:`predict_highest_density_region` has that.

        Args:
            X: Table of B rows.
            level: Probability of the interval.

        Returns:
            Lower and upper ends, shape (B, 2), or (B, D, 2) for several outputs.

        Raises:
            ValueError: If the level is not in (0, 1), or X does not fit.
        """
        _check_level(level)
        if hasattr(self, "conformal_intervals_"):
            x = self.encode(X)
            return self.target_.round(self.conformal_intervals_(x, level).double().cpu().numpy())
        return self.target_.round(self._by_blocks(X, lambda p: p.interval(level)))

    def predict_quantiles(self, X: Any, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> np.ndarray:
        """Quantiles of each row, and of each output by itself.

        Args:
            X: Table of B rows.
            levels: Probabilities, L of them.

        Returns:
            Shape (B, L), or (B, L, D) for several outputs. On a circle they count from its lower end.

        Raises:
            ValueError: If a level is not in (0, 1), or X does not fit.
        """
        levels = [float(level) for level in np.atleast_1d(np.asarray(levels, dtype=float))]
        for level in levels:
            _check_level(level, "levels")
        if self.__sklearn_is_fitted__() and self.n_outputs_ > 1:
            return self._by_blocks(X, lambda p: p.central_quantiles(levels).transpose(0, 1))
        return self.target_.round(self._by_blocks(X, lambda p: p.quantile(torch.tensor(levels, dtype=torch.double)).T))

    def predict_highest_density_region(self, X: Any, level: float = 0.9) -> HighestDensityRegion:
        """The smallest region of each row with this probability; for one output a union of intervals.

        With `conformal` its coverage is at least `level` on average over new rows, whatever the density is like.

        Args:
            X: Table of B rows.
            level: Probability of the region.

        Raises:
            ValueError: If the level is not in (0, 1), or X does not fit.
        """
        _check_level(level)
        x = self.encode(X)
        with self._threads():
            if hasattr(self, "conformal_regions_"):
                return self.conformal_regions_(x, level)
            return self._distribution(x).highest_density_region(level)

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw from p(y|x).

        Args:
            X: Table of B rows.
            n_samples: Draws per row, S.
            random_state: Their seed; the estimator's by default, so that the same call gives the same draws.

        Returns:
            Shape (B, S), or (B, S, D) for several outputs. Counts are whole numbers.

        Raises:
            ValueError: If n_samples is no whole number of at least 1, or X does not fit.
        """
        from sklearn.utils import check_random_state

        _check_whole("n_samples", n_samples)
        state = check_random_state(self.random_state if random_state is None else random_state)
        generator = torch.Generator().manual_seed(int(state.randint(2**31 - 1)))
        draws = self._by_blocks(X, lambda p: p.sample((int(n_samples),), generator=generator).transpose(0, 1))
        return self.target_.round(draws[..., 0] if self.n_outputs_ == 1 else draws)

    def score_samples(self, X: Any, y: Any = None) -> np.ndarray:
        """Log-density of each target, in nats and the units of y.

        For counts it is the log-probability; for rounded values that of the value, per unit of y.

        Args:
            X: Table of B rows.
            y: Targets, shape (B,) or (B, D). Without them the log-density to expect, minus the entropy: how certain
                the model is of each row.

        Returns:
            Shape (B,); -inf outside the target space, and for what is no count.

        Raises:
            ValueError: If y does not fit, or X does not.
        """
        if y is None:
            return -self._by_blocks(X, lambda p: p.entropy())
        x = self.encode(X)
        targets = read_targets(y, "y", len(x))
        if targets.shape[1] != self.n_outputs_:
            raise ValueError(f"y has {targets.shape[1]} column(s), but the estimator predicts {self.n_outputs_}.")
        parts = []
        with self._threads():
            for start in range(0, len(x), PREDICTION_ROWS):
                rows = slice(start, start + PREDICTION_ROWS)
                p = self._distribution(x[rows])
                parts.append(self.log_density(p, targets[rows]))
        return np.concatenate(parts)

    def log_density(self, p: PredictiveDistribution, targets: np.ndarray) -> np.ndarray:
        """Log-densities as :meth:`score_samples` counts them, by a distribution that is there already.

        Args:
            p: What :meth:`predict_distribution` returned for B rows.
            targets: Their targets, shape (B, D).

        Returns:
            Shape (B,).
        """
        if self.lattice_step_ is None:
            return p.log_prob(torch.as_tensor(targets)).double().cpu().numpy()
        kind = self.target_.kinds[0]
        possible = kind.possible(targets)
        low, high = kind.bins(np.where(possible, targets, kind.inside(self.lattice_step_)), self.lattice_step_)
        log_probability = self._log_probability(p, low[None, :, 0], high[None, :, 0])[0]
        return np.where(possible[:, 0], log_probability - np.log(high - low)[:, 0], -np.inf)

    def _log_probability(self, p: PredictiveDistribution, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Log-probability of intervals, (S, B): by the cdf, or from the density where the difference is lost."""
        ends = torch.as_tensor(np.stack([low, high]))
        cdf = p.cdf(ends[..., None]).double().cpu()
        difference = (cdf[1] - cdf[0]).clamp_min(0).numpy()
        edge = self.target_.first_bin_edge
        if edge is not None:  # what lies below belongs to no value
            below = p.cdf(torch.full((1, len(low[0]), 1), edge, dtype=torch.double)).double().cpu().numpy()
            difference = difference / (1 - below)
        small = difference < 1e-3
        with np.errstate(divide="ignore"):
            result = np.log(difference)
        if small.any():
            nodes, shares = np.polynomial.legendre.leggauss(LATTICE_NODES)
            total = np.full(low.shape, -np.inf)
            for node, share in zip(nodes, shares / 2, strict=True):
                place = torch.as_tensor(low + (high - low) * (node + 1) / 2)
                density = p.log_prob(place[..., None]).double().cpu().numpy()
                total = np.logaddexp(total, density + math.log(share))
            total = total + np.log(high - low)
            result = np.where(small, total - (0.0 if edge is None else np.log(1 - below)), result)
        return result

    def predict_probabilities(self, X: Any, values: Any) -> np.ndarray:
        """Probabilities of the values that counts or rounded targets can take.

        Args:
            X: Table of B rows.
            values: Values, V of them.

        Returns:
            Shape (B, V). Over all values they sum to 1 (for rounded values to the probability of their range). For
            rounded values it is the probability of half a step to either side.

        Raises:
            ValueError: If the targets were neither counts nor rounded, a value is outside their space, or X does not
                fit.
        """
        x = self.encode(X)
        if self.lattice_step_ is None:
            raise ValueError(
                "predict_probabilities is for counts and rounded targets, but those of fit were continuous, where a "
                "single value has probability 0. Use predict_distribution(X).cdf, or fit with target='count'."
            )
        values = np.atleast_1d(np.asarray(values, dtype=float))
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"values has shape {values.shape}; expected finite numbers, shape (V,).")
        impossible = values[~self.target_.kinds[0].possible(values)]
        if len(impossible) and self.target_.counts:
            raise ValueError(f"values holds {impossible[0]:.9g}, which is no count; expected whole numbers ≥ 0.")
        if len(impossible):
            raise ValueError(f"values holds {impossible[0]:.9g}, outside the targets' space {self.target!r}.")
        low, high = self.target_.bins(values, self.lattice_step_)
        with self._threads():
            p = self._distribution(x)
            ends = [np.broadcast_to(end[:, None], (len(values), len(x))) for end in (low, high)]
            return np.exp(self._log_probability(p, *ends)).T

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibration_")

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the fitted estimator to one safetensors file, without pickle; it appears whole or not at all.

        Args:
            path: File to write; the suffix ``.safetensors`` is appended where it is missing.

        Returns:
            The path of the file.

        Raises:
            sklearn.exceptions.NotFittedError: If the estimator has not been fitted.
            energyreg.CheckpointError: If a parameter cannot be stored.
            OSError: If the file cannot be written.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        parameters = self.get_params(deep=False)
        if not isinstance(self.random_state, (int, type(None))):
            parameters["random_state"] = (
                None if not isinstance(self.random_state, np.integer) else int(self.random_state)
            )
        state = {
            "parameters": {name: _plain(value) for name, value in parameters.items()},
            "preprocessor": self.preprocessor_.state(),
            "feature_names": self.feature_names_in_.tolist() if hasattr(self, "feature_names_in_") else None,
            "n_features": self.n_features_in_,
            "n_outputs": self.n_outputs_,
            "n_iter": self.n_iter_,
            "frequency_scales": self.frequency_scales_,
            "dropouts": self.dropouts_,
            "lattice_step": self.lattice_step_,
            "calibration": [self.calibration_.inverse_temperature, self.calibration_.base_share],
            "conformal": {
                name: getattr(self, name).scores[None].tolist()
                for name in ("conformal_regions_", "conformal_intervals_")
                if hasattr(self, name)
            },
            "histories": [history.to_dict() for history in self.histories_],
        }
        return checkpoint.save_estimator(copy.deepcopy(self.model_).float(), self._to_store(state), path)

    def _to_store(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a file holds besides the model; a subclass adds to it."""
        return state

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EnergyRegressor:
        """Read an estimator that :meth:`save` wrote; its predictions are those of the saved one.

        Args:
            path: File to read, with or without its suffix.

        Raises:
            FileNotFoundError: If there is no such file.
            energyreg.CheckpointError: If the file is damaged, or no estimator's.
        """
        return cls._from_stored(*checkpoint.load_estimator(path))

    @classmethod
    def _from_stored(cls, model: Any, state: dict[str, Any]) -> Self:
        """The estimator of what a file holds."""
        self = cls(**state["parameters"])
        self.model_ = model
        self.preprocessor_ = TablePreprocessor.from_state(state["preprocessor"])
        if state["feature_names"] is not None:
            self.feature_names_in_ = np.asarray(state["feature_names"], dtype=object)
        self.space_ = model.space
        self.n_features_in_, self.n_outputs_, self.n_iter_ = state["n_features"], state["n_outputs"], state["n_iter"]
        self.target_ = Target.parse(self.target, self.n_outputs_)
        one = model.factors[0] if isinstance(model, EnergyChain) else model
        self.frequency_scales_, self.dropouts_ = state["frequency_scales"], state["dropouts"]
        self.member_weights_ = _weights_of(model)
        self.n_members_ = len(one) if isinstance(one, EnergyEnsemble) else 1
        self.lattice_step_ = state["lattice_step"]
        self.histories_ = [History(**history) for history in state["histories"]]
        self.history_ = self.histories_[0]
        self.calibration_ = Calibration(*state["calibration"])
        for kind, name in ((ConformalRegions, "conformal_regions_"), (ConformalIntervals, "conformal_intervals_")):
            if name in state["conformal"]:
                setattr(self, name, kind.from_scores(self._distribution, np.asarray(state["conformal"][name])))
        self.model_.to(self._device())
        self._set_precision()
        return self


# ---------------------------------------------------------------------------------------------- parts of fit


@dataclass(frozen=True)
class _Trial:
    """What the members may differ in; None for the model's default."""

    frequency_scale: float | None
    dropout: float | None


@dataclass(frozen=True)
class _TimePlan:
    """Seconds of a step and of the validation after an epoch, each of one member; and what comes after the training."""

    step: float
    steps: int
    validation: float
    afterwards: float

    def epoch(self, members: int) -> float:
        return (self.step * self.steps + self.validation) * members


def _fit(
    build: Any, data: tuple[Tensor, Tensor], members: int, epochs: int, settings: dict[str, Any], chained: bool
) -> tuple[EnergyRegressionModel | EnergyEnsemble | EnergyChain, list[History]]:
    """Train what `build` builds, which is called once for each member."""
    if chained:
        chain = fit_chain(build, *data, n_members=members, epochs=epochs, **settings)
        return chain, [history for factor in chain.histories for history in factor]
    if members > 1:
        ensemble = fit_ensemble(build, *data, n_members=members, epochs=epochs, **settings)
        return ensemble, ensemble.histories
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        model = build()
    return model, [fit(model, *data, epochs=epochs, **settings)]


def _by_rows(table: Sequence[tuple[float, int]], rows: int) -> int:
    """The value of the first entry whose bound is above the number of rows."""
    return next(value for below, value in table if rows < below)


def _allot(shares: np.ndarray, count: int) -> list[int]:
    """Whole numbers that sum to `count`, in proportion to shares that sum to 1: by largest remainders."""
    exact = shares * count
    whole = np.floor(exact).astype(int)
    for index in np.argsort(whole - exact, kind="stable")[: count - whole.sum()]:
        whole[index] += 1
    return whole.tolist()


def _epoch_seconds(histories: list[History], members: int) -> float:
    """Seconds of the first epoch: of the first member, which stands for all; of a chain for each factor."""
    return sum(history.seconds[0] for history in histories[::members] if history.seconds)


def _weights_of(model: EnergyRegressionModel | EnergyEnsemble | EnergyChain) -> list[float]:
    """The weights of an ensemble's members."""
    return model.shares if isinstance(model, EnergyEnsemble) else [1.0]


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _check_whole(name: str, value: Any, also: str = "") -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1{also}.")


def _check_level(level: Any, name: str = "level") -> None:
    if not _is_number(level) or not 0 < level < 1:
        raise ValueError(f"{name} is {level!r}; expected a probability between 0 and 1, such as 0.9.")


def _weights(sample_weight: Any, rows: int) -> np.ndarray:
    if sample_weight is None:
        return np.ones(rows)
    if isinstance(sample_weight, numbers.Real):
        return np.ones(rows)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.ndim != 1:
        raise ValueError(f"Sample weights must be 1D array or scalar: sample_weight has shape {weights.shape}.")
    if len(weights) != rows:
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(rows,)}: one weight for each row of X.")
    if not np.isfinite(weights).all() or (weights < 0).any():
        row = int((~np.isfinite(weights) | (weights < 0)).argmax())
        raise ValueError(f"sample_weight has {weights[row]} in row {row}; expected finite numbers ≥ 0.")
    if not (weights > 0).any():
        raise ValueError("All sample weights are zero: sample_weight must have a number above zero for some row.")
    return weights


def _plain(value: Any) -> Any:
    """A constructor argument as a file can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, torch.device) else value
