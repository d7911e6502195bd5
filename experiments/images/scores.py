"""Predictive distributions judged on test rows, in the units of the targets."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg.evaluation import metrics
from energyreg.models.predictive import PredictiveDistribution
from experiments.images.data import Fold
from experiments.images.methods import Outcome

__all__ = ["judge"]

LEVEL = 0.9
SCORED_ROWS, DRAWS = 300, 64
"""Test rows, evenly spaced, and draws of the energy score."""
SHOWN_ROWS, GRID, SHOWN_DRAWS = 6, 160, 120
"""Test rows of a picture, places of a density, and draws where there are several targets."""


def mean_nll(p: PredictiveDistribution, y: NDArray[np.float64]) -> float:
    """Mean of -log p(y|x), in nats."""
    return -float(p.log_prob(y).double().mean())


def judge(outcome: Outcome, fold: Fold) -> dict[str, Any]:
    """Scores on the test rows.

    Likelihood, CRPS, coverage and width are of the dequantised targets, errors of the recorded ones. The estimate
    whose error counts is the median of each target.
    """
    x, y, exact = fold.split.x_test, fold.split.y_test, fold.exact
    started = time.perf_counter()
    p = outcome.predict(x)
    nll, interval, median = mean_nll(p, y), p.interval(LEVEL).double().numpy(), p.median.double().numpy()
    several = y.shape[1] > 1
    low, high = (interval[..., 0], interval[..., 1]) if several else (interval[:, :1], interval[:, 1:])
    errors = np.abs(median - exact).mean(0)
    scores: dict[str, Any] = {
        "nll": nll if math.isfinite(nll) else None,
        "mae": float(errors.mean()), "mae_by_target": errors.tolist(),
        "coverage": float(((low <= y) & (y <= high)).mean()), "width": float((high - low).mean()),
        "diverged": not math.isfinite(nll), "test_rows": len(y),
    }  # fmt: skip
    if several:
        few = np.linspace(0, len(y) - 1, min(SCORED_ROWS, len(y))).astype(int)
        scores["crps"] = metrics.energy_score(outcome.predict(x[few]), y[few], num_samples=DRAWS)
        # Of rows that are drawn for each x anew: their errors are independent.
        stderr = p.diagnostics.log_partition_stderr.double().square().sum().sqrt() / len(y)
        scores["nll_integration_se"] = float(stderr) if math.isfinite(float(stderr)) else None
    else:
        scores["crps"] = metrics.crps(p, torch.as_tensor(y))
    if outcome.start is not None:
        refined = p.refine(outcome.start(x)).double().numpy()
        errors = np.abs(refined - exact).mean(0)
        scores |= {"mae_refined": float(errors.mean()), "mae_refined_by_target": errors.tolist()}
    scores["predict_seconds"] = round(time.perf_counter() - started, 2)
    scores["variants"] = {name: mean_nll(predict(x), y) for name, predict in outcome.variants.items()}
    return scores


def picture(outcome: Outcome, fold: Fold) -> dict[str, Any]:
    """Densities of some test rows on a grid, or draws where there are several targets, with the true values."""
    x, y = fold.split.x_test, fold.split.y_test
    order = np.argsort(y[:, 0], kind="stable")
    rows = order[np.linspace(0, len(y) - 1, SHOWN_ROWS + 2).astype(int)[1:-1]]
    p = outcome.predict(x[rows])
    shown: dict[str, Any] = {"rows": rows.tolist(), "truth": y[rows].tolist()}
    if y.shape[1] > 1:
        draws = p.sample((SHOWN_DRAWS,), generator=torch.Generator().manual_seed(0))
        return shown | {"draws": draws[..., :2].double().numpy().round(2).tolist()}
    reach = 0.05 * np.ptp(y)
    grid = np.linspace(y.min() - reach, y.max() + reach, GRID)
    density = p.log_prob(torch.as_tensor(grid)[:, None, None].expand(-1, len(rows), 1)).exp()
    return shown | {"grid": [float(f"{v:.5g}") for v in grid],
                    "density": [[float(f"{v:.4g}") for v in row] for row in density.T.tolist()]}  # fmt: skip
