"""The tail of importance weights: its generalised Pareto shape, and weights smoothed by it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["pareto_k", "smoothed"]

FEWEST = 25
"""Weights below which there is no fit of their tail."""


class _Tail(NamedTuple):
    """The largest weights of each column, relative to the very largest, and the generalised Pareto fitted to them.

    Attributes:
        order: Where they are among the M weights, ascending by weight, shape (T, B).
        log_largest: Logarithm of the largest weight, shape (B,).
        threshold: The largest weight below the tail, relative to the largest, shape (B,).
        constant: Whether the tail is one value, so that there is nothing to fit, shape (B,).
        k: Shape of the distribution, shape (B,).
        sigma: Its scale, relative to the largest weight, shape (B,).
    """

    order: Tensor
    log_largest: Tensor
    threshold: Tensor
    constant: Tensor
    k: Tensor
    sigma: Tensor


def _fit_tail(log_weights: Tensor) -> _Tail:
    """Fit the largest min(M / 5, 3 √M) of at least 25 log-weights (M, B), in double precision, without gradient."""
    m = len(log_weights)
    tail = math.ceil(min(0.2 * m, 3 * math.sqrt(m)))
    top, index = log_weights.detach().double().topk(tail + 1, dim=0)
    top, index = top.flip(0), index.flip(0)
    weights = (top - top[-1]).exp()
    excess = weights[1:] - weights[0]  # ascending, shape (tail, B)
    constant = excess[-1] <= 1e-12
    excess = torch.where(constant, torch.ones_like(excess), excess.clamp_min(1e-300))
    # Profile likelihood on a data-driven grid of b = k / scale, then its posterior mean.
    grid = 30 + int(math.sqrt(tail))
    steps = 1 - (grid / (torch.arange(1, grid + 1, dtype=torch.double, device=top.device) - 0.5)).sqrt()
    quartile = excess[max(int(tail / 4 + 0.5) - 1, 0)].clamp_min(1e-300)
    b = steps[:, None] / (3 * quartile) + 1 / excess[-1]
    k = torch.stack([torch.log1p(-row * excess).mean(0) for row in b])
    profile = tail * ((-b / k).log() - k - 1)
    b_mean = (profile.nan_to_num(-torch.inf).softmax(0) * b).sum(0)
    k_hat = torch.log1p(-b_mean * excess).mean(0)
    sigma = -k_hat / b_mean
    return _Tail(index[1:], top[-1], weights[0], constant, (tail * k_hat + 5) / (tail + 10), sigma)


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Shape :math:`\hat k` of the generalised Pareto distribution fitted to the largest weights.

    Below 0.5 the weights have a finite variance, below 0.7 estimates from them are still useful; above, they are not to
    be trusted. The tail is the largest min(M / 5, 3 √M) weights.

    Args:
        log_weights: Log-weights, unnormalised, shape (M, B).

    Returns:
        The estimate for each column, shape (B,). 0 where the tail is constant (equal weights), NaN where fewer than 25
        weights are too few for a fit.

    Source:
        Vehtari et al., "Pareto smoothed importance sampling", JMLR 2024; Zhang and Stephens, Technometrics 2009, with
        the weak prior towards 0.5 of the former.

    >>> pareto_k(torch.zeros(100, 2))
    tensor([0., 0.])
    """
    if len(log_weights) < FEWEST:
        return torch.full(log_weights.shape[1:], torch.nan, dtype=log_weights.dtype, device=log_weights.device)
    tail = _fit_tail(log_weights)
    return torch.where(tail.constant, torch.zeros_like(tail.k), tail.k).to(log_weights.dtype)


def smoothed(log_weights: Tensor) -> Tensor:
    """Log-weights (M, B), without gradient, whose largest are the quantiles of the fitted Pareto distribution.

    See :meth:`~energyreg.inference.points.WeightedPoints.pareto_smoothed`.
    """
    raw = log_weights.detach()
    if len(raw) < FEWEST:
        return raw
    tail = _fit_tail(raw)
    count = len(tail.order)
    level = (torch.arange(count, dtype=torch.double, device=raw.device)[:, None] + 0.5) / count
    exponent = -torch.log1p(-level)  # a standard exponential's quantile, which k bends
    bent = torch.where(tail.k.abs() < 1e-9, exponent, torch.expm1(tail.k * exponent) / tail.k)
    # Nothing exceeds the largest raw weight, which is 1 here.
    largest = (tail.threshold + tail.sigma * bent).log().clamp_max(0) + tail.log_largest
    before = raw.gather(0, tail.order)
    kept = tail.constant | ~largest.isfinite() | (before == -torch.inf)
    return raw.scatter(0, tail.order, torch.where(kept, before, largest.to(raw.dtype)))
