"""Pilot search: the first members try settings, and the others get those that the held-out rows favour."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from energyreg.estimators.members import Builder, Trial
from energyreg.models.ensemble import EnergyEnsemble
from energyreg.training.history import History

__all__ = ["after_pilots", "allot", "best_probabilities", "pilot_trials"]

FREQUENCY_SCALES = (0.25, 1.0)
"""Frequency scales that the pilots try: smooth, as kin8nm wants it, and jagged, as naval does."""
FEWEST_TO_SPREAD = 500
"""Rows from which on they do."""
DROPOUTS = (0.0, 0.2)
"""Dropout that the pilots try: none, as tables without noise want it (naval, energy), and as much as most do."""
FEWEST_AFTER_PILOTS = 2
"""Members that must be left to train after the pilots; else there are no pilots."""
MORE_EPOCHS, FEWEST_EPOCHS = 1.25, 10
"""Epochs of the members after the pilots, as a multiple of the pilots' best, and at least: their learning rate comes
down by then, where that of the pilots was still high."""
MOST_JUDGED, BOOTSTRAP = 2_000, 1_000
"""Held-out rows by which the pilots are judged, at most, and how often they are resampled."""
LEAST_LOG_DENSITY = -1e6
"""What a log-density of -inf counts as among them."""


def pilot_trials(builder: Builder, usual: Trial, members: int, judged: bool) -> list[Trial]:
    """What the pilots try; nothing where nothing is open, or no other members could profit.

    Args:
        builder: Builds the members.
        usual: What members get without pilots.
        members: How many there will be.
        judged: Whether there are held-out rows.
    """
    if builder.space.dim > 1 or builder.num_features == 1 or not judged:
        return []
    spread = builder.settings.frequency_scale == "auto" and builder.rows >= FEWEST_TO_SPREAD
    trials = [
        Trial(scale, dropout)
        for dropout in (DROPOUTS if builder.settings.dropout is None else (usual.dropout,))
        for scale in (FREQUENCY_SCALES if spread else (usual.frequency_scale,))
    ]
    return trials if len(trials) > 1 and members >= len(trials) + FEWEST_AFTER_PILOTS else []


def after_pilots(
    pilots: EnergyEnsemble,
    trials: Sequence[Trial],
    histories: Sequence[History],
    builder: Builder,
    members: int,
    epochs: int,
    options: dict[str, Any],
) -> tuple[list[Trial], int]:
    """What the other members get, and their epochs; none where training was interrupted, or its time is over.

    Args:
        pilots: The pilots, trained.
        trials: What each of them tried.
        histories: Their histories.
        builder: Builds the members.
        members: How many there will be in all.
        epochs: Epochs of the pilots.
        options: Arguments of their training, with the held-out rows.
    """
    if any(history.interrupted or history.timed_out for history in histories):
        return [], epochs
    try:
        x, y, weights = options["validation"]
        chances = best_probabilities(pilots, x, y, weights, options["seed"])
    except KeyboardInterrupt:
        for history in histories:
            history.interrupted = True
        warnings.warn("fit was interrupted after the first members, which are the model.", stacklevel=6)
        return [], epochs
    counts = allot(chances, members - len(trials))
    best = sum(chance * (history.best_epoch or epochs) for chance, history in zip(chances, histories, strict=True))
    more = max(math.ceil(MORE_EPOCHS * float(best)), FEWEST_EPOCHS)
    for trial, chance, count in zip(trials, chances, counts, strict=True):
        builder.settings.log(
            f"Dropout {trial.dropout}, frequency scale {trial.frequency_scale}: the best with probability "
            f"{chance:.2f}, {count} more members of {more} epochs."
        )
    return [trial for trial, count in zip(trials, counts, strict=True) for _ in range(count)], more


def best_probabilities(
    pilots: EnergyEnsemble, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None, seed: int
) -> np.ndarray:
    """Each pilot's probability of being the best, by the Bayesian bootstrap over the held-out rows.

    Source:
        Yao, Vehtari, Simpson and Gelman, "Using stacking to average Bayesian predictive distributions", Bayesian
        Analysis 2018 (pseudo-BMA+).
    """
    rng = np.random.default_rng([seed, 4])
    rows = np.sort(rng.choice(len(y), MOST_JUDGED, replace=False)) if len(y) > MOST_JUDGED else np.arange(len(y))
    inputs, targets = torch.as_tensor(x[rows]), torch.as_tensor(y[rows])
    with torch.no_grad():
        log_p = [member(inputs).log_prob(targets).double().cpu().numpy() for member in pilots.models()]
    table = np.maximum(np.stack(log_p), LEAST_LOG_DENSITY)
    draws = rng.gamma(
        np.ones(len(rows)) if weights is None else weights[rows] / weights.mean(), size=(BOOTSTRAP, len(rows))
    )
    return np.bincount((draws @ table.T).argmax(1), minlength=len(table)) / BOOTSTRAP


def allot(fractions: np.ndarray, count: int) -> list[int]:
    """Whole numbers that sum to `count`, in proportion to fractions that sum to 1: by largest remainders."""
    exact = fractions * count
    whole = np.floor(exact).astype(int)
    for index in np.argsort(whole - exact, kind="stable")[: count - whole.sum()]:
        whole[index] += 1
    return whole.tolist()
