"""The one-dimensional tasks, each with its known conditional density p(y|x).

toy 1 and toy 2 are those of papers I and II, `paper4` is the second task of paper IV, `slabs` is ours: uniform slabs
that move with x, a hole between them and heavy tails, as far from a mixture of a few Gaussians as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal, StudentT

DATA = Path(__file__).parent / "data"
ROUNDING = 1e-5
"""Targets at the border of a slab may have been rounded to its other side."""


@dataclass(frozen=True)
class Task:
    """Data and truth of a task.

    Attributes:
        name: Short name.
        title: What it is, for tables and pictures.
        train, validation, test: Pairs x, y of shape (N, 1), float32; validation and test may be None.
        log_prob: True log p(y|x) in float64, x and y broadcast against each other.
        x_range, y_range: Window of the Kullback-Leibler divergence, an even grid.
        x_points, y_points: Its size.
    """

    name: str
    title: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None
    test: tuple[Tensor, Tensor] | None
    log_prob: Callable[[Tensor, Tensor], Tensor]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_points: int = 2048
    y_points: int = 2048

    @property
    def x_grid(self) -> Tensor:
        """Values of x, shape (X, 1), float64."""
        return torch.linspace(*self.x_range, self.x_points, dtype=torch.double)[:, None]

    @property
    def y_grid(self) -> Tensor:
        """Values of y, shape (Y,), float64."""
        return torch.linspace(*self.y_range, self.y_points, dtype=torch.double)

    @cache  # noqa: B019 (tasks live as long as the program)
    def truth(self) -> Tensor:
        """Log-probabilities of the cells of the grid given x, shape (Y, X), as in the papers' evaluation."""
        density = self.log_prob(self.x_grid[:, 0], self.y_grid[:, None]).exp() + 1e-30
        return (density / density.sum(0)).log()

    def kl_divergence(self, log_values: Tensor) -> Tensor:
        """D_KL(p_true || p_model), averaged over x, after normalising both over the grid.

        Args:
            log_values: Unnormalised log-density of the model on the grid, shape (Y, X).

        Returns:
            The divergence in nats, a scalar.

        Source:
            The evaluation in the code of Gustafsson et al., BMVC 2020, with logsumexp in place of sums of exponentials.
        """
        truth = self.truth()
        return (truth.exp() * (truth - log_values.double().log_softmax(0))).sum(0).mean()


def _csv(name: str) -> tuple[Tensor, Tensor]:
    columns = torch.from_numpy(np.loadtxt(DATA / name, delimiter=",", skiprows=1, dtype=np.float32))
    return columns[:, :1].contiguous(), columns[:, 1:].contiguous()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _toy1_log_prob(x: Tensor, y: Tensor) -> Tensor:
    humps = torch.stack(torch.broadcast_tensors(
        Normal(x.sin(), 0.075).log_prob(y) + math.log(0.8), Normal(-x.sin(), 0.075).log_prob(y) + math.log(0.2)
    )).logsumexp(0)  # fmt: skip
    shifted = LogNormal(0.0, 0.25, validate_args=False).log_prob((y + 1).clamp_min(1e-12)).expand_as(humps)
    shifted = torch.where(y + 1 > 1e-12, shifted, -torch.inf)
    return torch.where(x < 0, humps, shifted)


def toy1(seed: int | None = None, rows: int = 2000) -> Task:
    """Toy 1 of papers I and II: two humps to the left, a shifted log-normal to the right.

    Args:
        seed: Draw another training set, for development; by default the one shipped with paper IV.
        rows: Its size.
    """
    if seed is None:
        train = _csv("toy1_train.csv")
    else:
        g = _generator(seed)
        x = 6 * torch.rand(rows, 1, generator=g) - 3
        sign = torch.where(torch.rand(x.shape, generator=g) < 0.8, 1.0, -1.0)
        noise = torch.randn(x.shape, generator=g)
        train = x, torch.where(x < 0, sign * x.sin() + 0.075 * noise, (0.25 * noise).exp() - 1)
    return Task("toy1", "toy 1 (papers I, II)", train, None, None, _toy1_log_prob, (-3, 3), (-3, 3))


def _toy2_log_prob(x: Tensor, y: Tensor) -> Tensor:
    return Normal(x.sin(), 0.15 * torch.sigmoid(x)).log_prob(y)


def toy2(seed: int | None = None, rows: int = 2000) -> Task:
    """Toy 2 of papers I and II: a Gaussian whose scale falls to .007 on the left.

    Args:
        seed: Of the training set; a fixed one by default (the papers' set was not published).
        rows: Its size.
    """
    g = _generator(20 if seed is None else seed)
    x = 6 * torch.rand(rows, 1, generator=g) - 3
    y = x.sin() + 0.15 * torch.sigmoid(x) * torch.randn(x.shape, generator=g)
    return Task("toy2", "toy 2 (papers I, II)", (x, y), None, None, _toy2_log_prob, (-3, 3), (-3, 3))


def _uniform_log_prob(y: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    width = torch.as_tensor(high - low, dtype=y.dtype)
    inside = (y >= low - ROUNDING) & (y <= high + ROUNDING)
    return torch.where(inside, -width.log(), -torch.inf)


def _beta_log_prob(y: Tensor) -> Tensor:
    # y = 5 Beta(.5, 1) + .5, whose density is ((y - .5) / 5)^(-1/2) / 10.
    t = (y - 0.5) / 5
    inside = (t > -ROUNDING) & (t <= 1 + ROUNDING)
    return torch.where(inside, -0.5 * t.clamp_min(1e-7).log() - math.log(10), -torch.inf)


def _paper4_log_prob(x: Tensor, y: Tensor) -> Tensor:
    index = (3799 * x).round()
    t = ((index - 800) / 999).clamp(0, 1) * 5
    m = 3 * t.cos() - 2
    normal = Normal(m, (m.abs() / 4).clamp_min(1e-6)).log_prob(y)
    s = ((index - 1800) / 499).clamp(0, 1)
    slab = _uniform_log_prob(y, -2 - 2.5 * s, -0.5 + 9.5 * s)
    thirds = torch.stack([_uniform_log_prob(y, *ends) for ends in ((8.0, 8.5), (1.0, 4.0), (-4.5, -3.0))])
    thirds = thirds.logsumexp(0) - math.log(3)
    normal, slab, thirds, beta, index = torch.broadcast_tensors(normal, slab, thirds, _beta_log_prob(y), index)
    return torch.where(index < 800, beta, torch.where(index < 1800, normal, torch.where(index < 2300, slab, thirds)))


def paper4(seed: int | None = None) -> Task:
    """Task 2 of paper IV: a Beta, a Gaussian of changing width, a growing slab and three slabs, one after the other.

    Args:
        seed: Draw another set, for development; by default the one shipped with paper IV.
    """
    if seed is None:
        parts = [_csv(f"paper4_task2_{name}.csv") for name in ("train", "val", "test")]
    else:
        g, n = np.random.default_rng(seed), 3800
        m = 3 * np.cos(np.linspace(0, 5, 1000)) - 2
        third = g.integers(3, size=1500)
        low, high = np.array([8.0, 1.0, -4.5])[third], np.array([8.5, 4.0, -3.0])[third]
        y = np.concatenate([
            5 * g.beta(0.5, 1, 800) + 0.5, g.normal(m, np.abs(m) / 4),
            g.uniform(np.linspace(-2, -4.5, 500), np.linspace(-0.5, 9, 500)), g.uniform(low, high),
        ])  # fmt: skip
        order = g.permutation(n)
        x, y = (torch.tensor(a[order], dtype=torch.float32)[:, None] for a in (np.arange(n) / (n - 1), y))
        parts = [(x[rows], y[rows]) for rows in (slice(0, 1710), slice(1710, 1900), slice(1900, n))]
    return Task("paper4", "task 2 of paper IV", *parts, _paper4_log_prob, (0, 1), (-12.5, 12.5), 950, 8192)


def _slab_edges(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    c = (2.5 * x).sin()
    return c, c - 1.2, c - 0.7 + 0.2 * x, c + 0.4, c + 0.9 - 0.3 * x


def _slabs_log_prob(x: Tensor, y: Tensor) -> Tensor:
    c, low1, high1, low2, high2 = _slab_edges(x)
    beyond = ((y - c).abs() - 1.3) / 0.4
    tail = StudentT(2.0, validate_args=False).log_prob(beyond.clamp_min(0)) - math.log(0.4)
    tail = torch.where(beyond > 0, tail, -torch.inf)
    first, second = _uniform_log_prob(y, low1, high1), _uniform_log_prob(y, low2, high2)
    parts = torch.stack(torch.broadcast_tensors(first, second, tail))
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=parts.dtype).log()
    return (parts + shares.reshape(3, *(1,) * (parts.ndim - 1))).logsumexp(0)


def slabs(seed: int | None = None, rows: int = 16_000) -> Task:
    """Our own: two slabs that move with x and change their widths, a hole between them, Student tails beyond.

    y is uniform on the first slab (probability .5) or the second (.3), or lies beyond |y - c(x)| = 1.3 with the tails
    of a Student distribution with two degrees of freedom (.2), so that its variance is infinite.

    Args:
        seed: Of the training, validation and test sets; a fixed one by default.
        rows: Training rows.
    """
    g = _generator(40 if seed is None else seed)
    n = rows + 1000 + 4000
    x = 2 * torch.rand(n, 1, generator=g) - 1
    c, low1, high1, low2, high2 = _slab_edges(x)
    kind, u = torch.rand(x.shape, generator=g), torch.rand(x.shape, generator=g)
    # |T| of Student's distribution with two degrees of freedom, by its inverse cdf.
    p = torch.rand(x.shape, generator=g).clamp(1e-6, 1 - 1e-6)
    student = p * (2 / (1 - p * p)).sqrt()
    side = torch.where(torch.rand(x.shape, generator=g) < 0.5, 1.0, -1.0)
    y = torch.where(kind < 0.5, torch.lerp(low1, high1, u), torch.lerp(low2, high2, u))
    y = torch.where(kind < 0.8, y, c + side * (1.3 + 0.4 * student))
    parts = [(x[part], y[part]) for part in (slice(0, rows), slice(rows, rows + 1000), slice(rows + 1000, n))]
    title = "moving slabs with a hole and heavy tails (ours)"
    return Task("slabs", title, *parts, _slabs_log_prob, (-1, 1), (-12, 12), 1024, 8192)


TASKS: dict[str, Callable[..., Task]] = {"toy1": toy1, "toy2": toy2, "paper4": paper4, "slabs": slabs}
