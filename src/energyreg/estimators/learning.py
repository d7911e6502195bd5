"""From encoded rows to a calibrated model: rows are split and dequantised, members trained, weighted and calibrated."""

from __future__ import annotations

import math
import numbers
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from energyreg.densities.spaces import TargetSpace
from energyreg.errors import DataError
from energyreg.estimators.members import Builder, Model, Trial, integrator_of, sizes, train_members, weights_of
from energyreg.estimators.outliers import find_fences, warn_of_outliers
from energyreg.estimators.pilots import after_pilots, pilot_trials
from energyreg.estimators.settings import Settings
from energyreg.estimators.splits import Order
from energyreg.estimators.targets import Target, point_masses
from energyreg.estimators.time_budget import (
    CALIBRATION_ROWS,
    ROWS_OF_SEVERAL,
    members_more,
    plan_time,
    warn_of_what_fitted,
)
from energyreg.models.calibration import Calibration
from energyreg.models.ensemble import EnergyEnsemble, EnsembleDistribution
from energyreg.training.data import default_batch_size
from energyreg.training.history import History

__all__ = ["Learned", "Rows", "check_weights", "learn", "prepare"]

AVERAGING = 8.0
"""Exponent of the average of the weights (see :func:`energyreg.fit`)."""
PILOTS_PATIENCE = 3
"""The pilots stop after this part of the epochs without an improvement."""
LEAST_WEIGHT = 0.1
"""Members whose weight is below this part of an equal one are dropped: they would cost time in each prediction."""
FEWEST_TO_SPLIT = 40
"""Rows below which none are held out by default: they are worth more in the training."""
MOST_HELD_OUT = 20_000
"""Rows held out at most, for validation and for conformal scores: more would tell nothing, and take time."""
CALIBRATION_BYTES = 2**25
"""Working memory of the calibration."""

Validation = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Inputs, targets, and weights if any, of the rows by which the epoch is chosen."""


@dataclass(frozen=True)
class Rows:
    """Targets of the rows that count, N of them, and what each row is for.

    Attributes:
        target: Kinds of the outputs.
        space: Target space, not fitted yet.
        known: Which rows of the table count, as their weight is above 0, shape (N,).
        targets: Their targets, shape (N, D).
        weights: Their weights, shape (N,).
        train: Which of them the members are trained on; none whose target is wild.
        held_out: Which of them the epoch and the calibration are chosen by; none whose target is wild.
        conformal: Which of them the conformal scores are taken of, whatever their targets.
        z: Targets, dequantised, shape (N, D).
        evaluated: Which of the rows that the user holds out are used; those whose target is not wild.
        z_evaluation: Their targets, dequantised.
        step: Rounding step of the only output; None where it is continuous, or where there are several.
        atoms: Edges of the bins over which point masses among continuous values are spread, shape (V, 2).
        seed: Seed of the training.
    """

    target: Target
    space: TargetSpace
    known: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    conformal: np.ndarray
    z: np.ndarray
    evaluated: np.ndarray | None
    z_evaluation: np.ndarray | None
    step: float | None
    atoms: np.ndarray
    seed: int


def prepare(
    given: Any,
    settings: Settings,
    targets: np.ndarray,
    weights: np.ndarray,
    evaluation: np.ndarray | None,
    seed: int,
    order: Order | None = None,
) -> Rows:
    """Check targets, split their rows, and make rounded ones continuous.

    Args:
        given: The kind of target, as the user describes it.
        settings: Parameters of the estimator.
        targets: Targets of all rows of a table, shape (R, D).
        weights: Their weights, shape (R,).
        evaluation: Targets of rows that the user holds out, if any.
        seed: Seed of the split and of the noise.
        order: How the rows hang together.

    Raises:
        ValueError: If targets cannot be used, or too few are left to train on.
    """
    target = Target.parse(given, targets.shape[1])
    space = target.space()
    target.check(space, targets, "y")
    constant = np.flatnonzero((targets == targets[0]).all(0))
    if len(constant):
        raise DataError(
            "{name} has the same value in every row of column {column!r}: {value:.9g}; expected targets that vary. "
            "Check how it was made, or drop the column.",
            name="y", column=constant[0], value=targets[0, constant[0]],
        )  # fmt: skip
    if evaluation is not None:
        if evaluation.shape[1] != space.dim:
            raise ValueError(f"y of eval_set has {evaluation.shape[1]} column(s), but y has {space.dim}.")
        target.check(space, evaluation, "y of eval_set")
    known = np.flatnonzero(weights > 0)  # the others count as not there
    targets, weights = targets[known], weights[known]
    rng = np.random.default_rng(seed)
    train, held_out, conformal = _split(
        len(known), evaluation is not None, settings, rng, (order or Order()).select(known)
    )
    fences = find_fences(space, targets if evaluation is None else np.concatenate([targets, evaluation]))
    tame = ~warn_of_outliers(space, targets, fences, known, "y")
    train, held_out = train[tame[train]], held_out[tame[held_out]]
    evaluated = None
    if evaluation is not None:
        every = np.arange(len(evaluation))
        evaluated = np.flatnonzero(~warn_of_outliers(space, evaluation, fences, every, "y of eval_set"))
        evaluated = evaluated if len(evaluated) else every
        evaluation = evaluation[evaluated]
    steps = target.rounding_steps(targets[tame])
    atoms = target.atoms(targets[tame], steps, "y")
    z = target.dequantise(targets, steps, rng, atoms)
    z_evaluation = None if evaluation is None else target.dequantise(evaluation, steps, rng, atoms)
    step = (steps[0] or None) if space.dim == 1 else None
    return Rows(
        target,
        space,
        known,
        targets,
        weights,
        train,
        held_out,
        conformal,
        z,
        evaluated,
        z_evaluation,
        step,
        atoms,
        seed,
    )


def _split(
    rows: int, evaluated: bool, settings: Settings, rng: np.random.Generator, order: Order
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to train on, to validate on, and for conformal scores."""
    fraction = settings.validation_fraction or 0.0
    without = evaluated or fraction == 0 or rows < FEWEST_TO_SPLIT
    held_out = 0 if without else min(max(round(fraction * rows), 1), MOST_HELD_OUT)
    conformal = min(max(round((fraction or 0.1) * rows), 1), MOST_HELD_OUT) if settings.conformal else 0
    if rows - held_out - conformal < 2:
        raise ValueError(
            f"X has {rows} rows with a weight above 0, of which {held_out} are held out for validation and "
            f"{conformal} for conformal scores; expected at least 2 to train on. Lower validation_fraction."
        )
    return order.split(rows, held_out, conformal, rng)


@dataclass
class Learned:
    """A trained model, what its members got, and its calibration."""

    model: Model
    trials: list[Trial]
    histories: list[History]
    calibration: Calibration = field(default_factory=Calibration)

    def set_precision(self, outputs: int) -> None:
        """Double for one output, where the points are few; for several the time for it is better spent on points."""
        if outputs == 1:
            self.model.double()

    def weight(self, weights: Sequence[float]) -> list[int]:
        """Give the members their weights, drop those that get next to nothing, and return the numbers of the others."""
        assert isinstance(self.model, EnergyEnsemble)
        kept = [number for number, weight in enumerate(weights) if weight >= LEAST_WEIGHT / len(weights)]
        total, members = sum(weights[number] for number in kept), self.model.models()
        shares = [weights[number] / total for number in kept]
        self.model = EnergyEnsemble([members[number] for number in kept], shares).eval()
        self.trials = [self.trials[number] for number in kept]
        return kept

    def calibrate(self, validation: Validation, seed: int, settings: Settings, most: int = CALIBRATION_ROWS) -> None:
        """Choose the members' weights, the temperature and the defensive mixture weight by `most` held-out rows."""
        x, y, weights = validation
        most = most if y.shape[1] == 1 else min(most, ROWS_OF_SEVERAL[0])
        if len(y) > most:
            rows = np.sort(np.random.default_rng([seed, 3]).choice(len(y), most, replace=False))
            x, y, weights = x[rows], y[rows], None if weights is None else weights[rows]
        try:
            integrator = integrator_of(self.model)
            p = self.model(x, integrator=integrator, memory_budget=CALIBRATION_BYTES)
            if isinstance(self.model, EnergyEnsemble):
                assert isinstance(p, EnsembleDistribution)
                kept = self.weight(p.out_of_fold(torch.as_tensor(y), weights).weights())
                p = p.of_members(kept, self.model.weights)
            self.calibration = Calibration.fit(p, torch.as_tensor(y), weights)
        except KeyboardInterrupt:
            for history in self.histories:
                history.interrupted = True
            warnings.warn("fit was interrupted in the calibration; the model is as it was trained.", stacklevel=6)
            return
        found = weights_of(self.model)
        if len(found) > 1:
            settings.log(f"Weights of the members: {', '.join(f'{weight:.2f}' for weight in found)}.")
        t, defensive = self.calibration.inverse_temperature, self.calibration.base_share
        settings.log(f"Calibration on {len(y)} rows: energy times {t:.3g}, defensive weight {defensive:.2g}.")


def learn(
    settings: Settings,
    rows: Rows,
    x: np.ndarray,
    validation: Validation | None,
    cardinalities: Sequence[int],
    started: float,
    replace_encoder: Callable[[Any], Any] | None = None,
) -> Learned:
    """Train and calibrate what the settings ask for.

    Args:
        settings: Parameters of the estimator.
        rows: What :func:`prepare` returned.
        x: Inputs of the training rows.
        validation: The rows by which the epoch is chosen; None for none.
        cardinalities: Numbers of the categories' codes among the inputs.
        started: When the time budget began, by :func:`time.perf_counter`.
        replace_encoder: Makes a member's encoder of the one for tables.
    """
    seed, space, weights = rows.seed, rows.space, rows.weights[rows.train]
    data = torch.as_tensor(x), torch.as_tensor(rows.z[rows.train])
    count = len(data[1])
    batch_size = settings.batch_size or default_batch_size(data[1])
    members, epochs = sizes(settings, space.dim, count, batch_size)
    steps = max(count // min(batch_size, count), 1)
    options: dict[str, Any] = {
        "batch_size": batch_size, "learning_rate": settings.learning_rate, "seed": seed, "sample_weight": weights,
        "validation": validation, "averaging": AVERAGING,
    }  # fmt: skip
    edges, components = rows.atoms, []
    if rows.step:
        masses = point_masses(rows.targets[rows.train], rows.step)
        edges = np.stack(rows.target.bins(masses, rows.step), 1)
    if len(edges):
        space = rows.target.space()
        space.fit(data[1])  # the uniform components are in its units
        components = rows.target.uniform_components(space, edges)
    builder = Builder(settings, space, x.shape[1], count, cardinalities, components, replace_encoder)
    usual = builder.usual()
    options["progress"] = bool(settings.verbose)
    if settings.time_budget is not None:
        return _learn_in_time(builder, usual, data, members, epochs, options, rows, started)
    settings.log(
        f"Training {members} member{'s' * (members > 1)} for {epochs} epochs of {steps} steps on {count} rows, "
        f"{0 if validation is None else len(validation[1])} held out."
    )
    learned = _train(builder, usual, data, members, epochs, options)
    learned.set_precision(space.dim)
    if settings.calibrate and validation is not None:
        learned.calibrate(validation, seed, settings)
    return learned


def _learn_in_time(
    builder: Builder,
    usual: Trial,
    data: Any,
    members: int,
    epochs: int,
    options: dict[str, Any],
    rows: Rows,
    started: float,
) -> Learned:
    """Train and calibrate within the time budget: one good member first, then as many others as there is time for."""
    settings, validation, seed, outputs = builder.settings, options["validation"], rows.seed, rows.space.dim
    count, batch_size = len(data[1]), options["batch_size"]
    steps = max(count // min(batch_size, count), 1)
    wanted, deadline = (epochs, members, count), started + (settings.time_budget or math.inf)
    conformal = len(rows.conformal) * settings.conformal

    def left() -> float:
        return deadline - time.perf_counter()

    plan = plan_time(builder, usual, data, options, 1, steps)
    epochs, first_members, used = plan.choose(
        settings, epochs, members if builder.chained else 1, count, batch_size, started
    )
    if used < count:
        chosen = np.sort(np.random.default_rng([seed, 2]).choice(count, used, replace=False))
        data = data[0][chosen], data[1][chosen]
        options["sample_weight"], builder = options["sample_weight"][chosen], replace(builder, rows=used)

    def train(trials: list[Trial], number: int, patience: int | None = None) -> tuple[Model, list[History]]:
        """Members of their own seeds, which stop when the time is over but for what follows."""
        limit = max(left() - number * afterwards, 1e-3)
        own = {**options, "time_limit": limit, "seed": seed + done, "patience": patience}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Training stopped after")  # is said once, at the end
            return train_members(builder.each(trials), data, len(trials), epochs, own, builder.chained)

    done, afterwards = 0, plan.afterwards / first_members
    settings.log(f"Training the first {first_members} for {epochs} epochs of {used} rows, {left():.3g} s are left.")
    trials = [usual] * first_members
    model, histories = train(trials, first_members)
    learned = Learned(model, trials, histories)
    done = first_members
    learned.set_precision(outputs)

    def calibrate() -> None:
        if settings.calibrate and validation is not None:
            learned.calibrate(validation, seed, settings, plan.rows)

    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        calibrate()
    spent = time.perf_counter() - begun
    if validation is not None:
        spent *= 1 + conformal / max(min(len(validation[1]), plan.rows), 1)
    afterwards = spent / first_members
    first = learned.histories[0]
    complete = not (first.timed_out or first.interrupted) and (epochs, used) == (wanted[0], count)
    seconds, pilots = first.total_seconds, pilot_trials(builder, usual, members - 1, validation is not None)
    found: list[Trial] = []
    more: list[Any] = []
    later: list[History] = []
    while complete and not builder.chained and done < members:
        number = members_more(left(), seconds, afterwards, done, members - done)
        if not number:
            break
        tried = pilots if pilots and number >= len(pilots) else found[:number] or [usual] * number
        begun = time.perf_counter()
        patience = max(epochs // PILOTS_PATIENCE, 1) if tried is pilots else None
        model, new = train(tried, done + len(tried), patience)
        seconds = (time.perf_counter() - begun) / len(tried)
        complete = not any(history.timed_out or history.interrupted for history in new)
        if not complete and validation is None:
            break  # nothing says whether they are any good
        more, later, found = [*more, *_models(model)], [*later, *new], found[len(tried) :]
        learned.trials, done = [*learned.trials, *tried], done + len(tried)
        if tried is pilots and complete and done < members:
            assert isinstance(model, EnergyEnsemble)
            planned = epochs
            found, epochs = after_pilots(model, pilots, new, builder, members - 1, epochs, {**options, "seed": seed})
            found.sort(key=found.count, reverse=True)
            seconds *= epochs / planned
            complete = bool(found)
        pilots = []
    if more:
        ensemble = EnergyEnsemble(
            [*_models(learned.model), *(model.double() if outputs == 1 else model for model in more)]
        )
        learned.model, learned.histories = ensemble.eval(), [*learned.histories, *later]
        learned.set_precision(outputs)
        calibrate()
    else:
        for warning in said:
            warnings.warn(warning.message, stacklevel=6)
    warn_of_what_fitted(settings, wanted, (len(first.train_loss), done, used), first.timed_out)
    return learned


def _models(model: Any) -> list[Any]:
    return [*model.models()] if isinstance(model, EnergyEnsemble) else [model]


def _train(builder: Builder, usual: Trial, data: Any, members: int, epochs: int, options: dict[str, Any]) -> Learned:
    """Train all members: the pilots first, where there are any, and the others by what they find."""
    trials = pilot_trials(builder, usual, members, options["validation"] is not None)
    if not trials:
        trials = [usual] * members
        model, histories = train_members(builder.each(trials), data, members, epochs, options, builder.chained)
        return Learned(model, trials, histories)
    patience = max(epochs // PILOTS_PATIENCE, 1)
    first = {**options, "patience": patience}
    pilots, histories = train_members(builder.each(trials), data, len(trials), epochs, first, False)
    assert isinstance(pilots, EnergyEnsemble)
    rest, epochs = after_pilots(pilots, trials, histories, builder, members, epochs, options)
    if not rest:
        return Learned(pilots, trials, histories)
    options["seed"] += len(trials)
    others, more = train_members(builder.each(rest), data, len(rest), epochs, options, False)
    assert isinstance(others, EnergyEnsemble)
    ensemble = EnergyEnsemble([*pilots.models(), *others.models()]).eval()
    return Learned(ensemble, [*trials, *rest], [*histories, *more])


def check_weights(sample_weight: Any, rows: int) -> np.ndarray:
    """The weights of rows as an array of float64.

    Raises:
        ValueError: If they are not finite numbers ≥ 0, one for each row, or all are 0.
    """
    if sample_weight is None or isinstance(sample_weight, numbers.Real):
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
