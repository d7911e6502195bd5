"""The tasks: two known densities in three dimensions, and the head poses of BIWI from 88 features of a network."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

__all__ = ["TASKS", "Task"]

VALIDATION_SUBJECTS = ("02", "09", "19")
TRAIN_STRIDE, TEST_STRIDE = 4, 8
"""Frames of a video resemble their neighbours: of the head poses every fourth is trained on, every eighth judged."""
ROWS, VALIDATION_ROWS, TEST_ROWS = 1_000, 150, 1_000


@dataclass(frozen=True)
class Task:
    """Data of a task.

    Attributes:
        train, validation, test: Pairs x (N, F), y (N, 3).
        log_prob: True log p(y|x) of pairs (x, y), in nats; None where nobody knows it.
        groups: A number for each test row; rows of one group are not independent.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    log_prob: Callable[[Tensor, Tensor], Tensor] | None
    groups: np.ndarray


def _bent_parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density of the first output; centre of the second and of the third, given those before."""
    share = torch.sigmoid(2 * x[:, 0])
    humps = torch.stack([Normal(1.0, 0.3).log_prob(y[:, 0]) + share.log(), Normal(-1.0, 0.3).log_prob(y[:, 0]) +
                         (1 - share).log()]).logsumexp(0)  # fmt: skip
    return humps, y[:, 0].square() + x[:, 0], (3 * y[:, 0]).sin() * (1 + x[:, 1]) + 0.5 * y[:, 1]


def bent_log_prob(x: Tensor, y: Tensor) -> Tensor:
    """A bent ridge with two humps: y₂ follows the square of y₁, and y₃ a wave of y₁ and y₂."""
    first, second, third = _bent_parts(x, y)
    return first + Normal(second, 0.15).log_prob(y[:, 1]) + Normal(third, 0.2).log_prob(y[:, 2])


def _bent(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(rows, 2, generator=generator, dtype=torch.double) - 1
    up = torch.rand(rows, generator=generator) < torch.sigmoid(2 * x[:, 0])
    noise = torch.randn(rows, 3, generator=generator, dtype=torch.double)
    y = torch.zeros(rows, 3, dtype=torch.double)
    y[:, 0] = torch.where(up, 1.0, -1.0) + 0.3 * noise[:, 0]
    y[:, 1] = _bent_parts(x, y)[1] + 0.15 * noise[:, 1]
    y[:, 2] = _bent_parts(x, y)[2] + 0.2 * noise[:, 2]
    return x, y


def _gaussians(x: Tensor) -> tuple[Tensor, list[MultivariateNormal]]:
    """Log-share of the first and both components of a mixture of two correlated Gaussians."""
    zero = torch.zeros_like(x[:, 0])
    share = torch.sigmoid(1.5 * x[:, 1])
    means = [torch.stack([x[:, 0], x[:, 1], x[:, 0] * x[:, 1]], -1), torch.stack([-x[:, 0], zero + 1, x[:, 0]], -1)]
    factors = torch.tensor(
        [[[0.5, 0.0, 0.0], [0.45, 0.2, 0.0], [-0.3, 0.2, 0.2]], [[0.3, 0.0, 0.0], [-0.5, 0.2, 0.0], [0.2, 0.4, 0.3]]],
        dtype=x.dtype,
    )
    return share, [MultivariateNormal(m, scale_tril=f) for m, f in zip(means, factors, strict=True)]


def gaussians_log_prob(x: Tensor, y: Tensor) -> Tensor:
    """The density of a mixture of two correlated Gaussians, which a mixture network can represent."""
    share, (one, other) = _gaussians(x)
    return torch.logaddexp(one.log_prob(y) + share.log(), other.log_prob(y) + (1 - share).log())


def _mixture(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(rows, 2, generator=generator, dtype=torch.double) - 1
    share, parts = _gaussians(x)
    noise = torch.randn(rows, 3, 1, generator=generator, dtype=torch.double)
    draws = [part.mean + (part.scale_tril @ noise)[..., 0] for part in parts]
    return x, torch.where((torch.rand(rows, generator=generator) < share)[:, None], *draws)


def _known(draw: Callable[[int, int], tuple[Tensor, Tensor]], log_prob: Callable[[Tensor, Tensor], Tensor]) -> Task:
    sets = [draw(rows, seed) for seed, rows in enumerate((ROWS, VALIDATION_ROWS, TEST_ROWS))]
    return Task(*sets, log_prob, np.arange(TEST_ROWS))


def head_pose(folder: Path) -> Task:
    """Head poses in degrees; train, validation and test share no video sequence.

    Rows without a name of their sequence are left out, as they might be of one that is held out.

    Args:
        folder: Has biwi_train.npz, biwi_test.npz (arrays `features` and `poses`) and their `_frames.csv`.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    parts = {}
    for name in ("train", "test"):
        with np.load(folder / f"biwi_{name}.npz") as file:
            x, y = torch.from_numpy(file["features"]), torch.from_numpy(file["poses"].astype(np.float64))
        with (folder / f"biwi_{name}_frames.csv").open(encoding="utf-8", newline="") as file:
            subjects = np.array([row["subject"] for row in csv.DictReader(file)])
        parts[name] = x, y, subjects
    x, y, subjects = parts["train"]
    held_out = np.isin(subjects, VALIDATION_SUBJECTS)
    train = np.flatnonzero((subjects != "") & ~held_out)[::TRAIN_STRIDE]
    validation = np.flatnonzero(held_out)[::TEST_STRIDE]
    x_test, y_test, subjects_test = parts["test"]
    test = np.flatnonzero(subjects_test != "")[::TEST_STRIDE]
    groups = np.unique(subjects_test[test], return_inverse=True)[1]
    sets = [(x[rows], y[rows]) for rows in (train, validation)]
    return Task(*sets, (x_test[test], y_test[test]), None, groups)


TASKS: dict[str, Callable[[Path], Task]] = {
    "bent": lambda folder: _known(_bent, bent_log_prob),
    "gaussians": lambda folder: _known(_mixture, gaussians_log_prob),
    "head pose": head_pose,
}
