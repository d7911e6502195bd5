"""How a density is judged: divergence from the truth on the task's grid, and the likelihood of test data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from experiments.one_dimensional.tasks import TASKS, Task

__all__ = ["Score", "cached_task", "evaluate", "window"]

POINTS = 160_000
"""Values of a density computed at once: small enough for the processor's cache."""
PICTURE = (200, 240)
"""Points in x and y of the densities kept for pictures."""
LOWEST = -12.0
"""Log-densities below this are one colour in a picture."""

Density = Callable[[Tensor, Tensor], Tensor]
"""x of shape (X, 1) and y of shape (M, X, 1) to log-densities of shape (S, M, X), for S seeds."""

cached_task = cache(lambda name: TASKS[name]())


@dataclass(frozen=True)
class Score:
    """What is known of the densities of S seeds.

    Attributes:
        kl: D_KL from the truth in nats, one a seed.
        test_nll: Mean of -log p(y|x) on the test data in nats, one a seed; None where the task has no test data.
        picture: Log-density of the first seed over :func:`window`, shape (200, 240), x first.
    """

    kl: list[float]
    test_nll: list[float] | None
    picture: np.ndarray


def window(task: Task) -> tuple[float, float]:
    """Range of y in pictures."""
    low, high = task.train[1].quantile(torch.tensor([0.005, 0.995])).tolist()
    margin = 0.12 * (high - low)
    return max(low - margin, task.y_range[0]), min(high + margin, task.y_range[1])


@torch.no_grad()
def evaluate(task: Task, density: Density, normalised: bool) -> Score:
    """Judge the densities of S seeds.

    Args:
        task: The task.
        density: Their log-densities.
        normalised: Whether they integrate to one. If not, they are normalised over the task's grid of y.
    """
    y_grid = task.y_grid.float()
    low, high = task.y_range
    num_seeds = len(density(task.train[0][:1], task.train[1][None, :1]))
    chunk = max(POINTS // (len(y_grid) * num_seeds), 1)

    def on_grid(x: Tensor) -> Tensor:
        return density(x, y_grid[:, None, None].expand(-1, len(x), 1))

    values = torch.empty(num_seeds, len(y_grid), task.x_points)
    for x, columns in zip(task.x_grid.float().split(chunk), values.split(chunk, -1), strict=True):
        columns.copy_(on_grid(x))
    kl = [float(task.kl_divergence(v)) for v in values]

    log_density = values[0].double().log_softmax(0) + math.log(len(y_grid) / (high - low))
    columns = torch.linspace(0, values.shape[-1] - 1, PICTURE[0]).round().long()
    rows = (torch.linspace(*window(task), PICTURE[1]) - low) / (high - low) * (len(y_grid) - 1)
    picture = log_density[rows.round().long()][:, columns].T.nan_to_num(LOWEST).clamp_min(LOWEST)

    test_nll = None
    if task.test is not None:
        parts = []
        for x, y in zip(*(part.split(chunk) for part in task.test), strict=True):
            log_prob = density(x, y[None])[:, 0]
            if not normalised:
                # Paper IV's rule: the mean of exp f over an even grid times the length of the range.
                log_prob = log_prob - on_grid(x).logsumexp(1) - math.log((high - low) / len(y_grid))
            parts.append(log_prob)
        test_nll = (-torch.cat(parts, -1).double().mean(-1)).tolist()
    # Rounded, the picture takes a quarter of the space on disk.
    return Score(kl, test_nll, ((20 * picture).round() / 20).half().numpy())
