"""Whether Markov chains have converged, and how many independent draws they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from energyreg.densities.angles import periodic_flags

__all__ = ["effective_sample_size", "rhat"]


def _columns(samples: Tensor) -> Tensor:
    """Split each chain in two and bring the draws to the end: (N, C, B, D) to (B, D, 2 C, N / 2), in double precision.

    Raises:
        ValueError: If there are fewer than four draws a chain, or another number of dimensions.
    """
    if samples.ndim != 4 or len(samples) < 4:
        raise ValueError(
            f"samples has shape {tuple(samples.shape)}; expected (N, C, B, D) with at least N = 4 draws a chain."
        )
    half = len(samples) // 2  # of an odd number the middle draw is left out
    return torch.cat([samples[:half], samples[-half:]], 1).double().permute(2, 3, 1, 0)


def _rank_normalised(columns: Tensor) -> Tensor:
    """Normal scores of the ranks among all draws of all chains, ties sharing their average rank."""
    flat = columns.flatten(-2).contiguous()
    ordered = flat.sort(-1).values
    rank = (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1) / 2
    return torch.special.ndtri((rank.double() - 0.375) / (flat.shape[-1] + 0.25)).reshape(columns.shape)


def _split_rhat(columns: Tensor) -> Tensor:
    within = columns.var(-1).mean(-1)
    n = columns.shape[-1]
    return ((n - 1) / n + columns.mean(-1).var(-1) / within).sqrt()


def _linear_rhat(samples: Tensor) -> Tensor:
    ordered = samples.flatten(0, 1).sort(0).values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    bulk = _split_rhat(_rank_normalised(_columns(samples)))
    return torch.maximum(bulk, _split_rhat(_rank_normalised(_columns((samples - median).abs()))))


def _linear_ess(samples: Tensor) -> Tensor:
    columns = _rank_normalised(_columns(samples))
    m, n = columns.shape[-2:]
    means = columns.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(columns - means, n=2 * n).abs().square()
    covariance = torch.fft.irfft(spectrum, n=2 * n)[..., :n].mean(-2) / n
    within = covariance[..., :1] * n / (n - 1)
    total = within * (n - 1) / n + means.var(-2)
    correlation = 1 - (within - covariance) / total
    correlation[..., 0] = 1
    num_pairs = max(n // 2 - 1, 1)
    even = correlation[..., : 2 * num_pairs : 2]
    pairs = even + correlation[..., 1 : 2 * num_pairs : 2]
    # Geyer: the sums of pairs are positive and fall, for a reversible chain; what does not is noise.
    first = (pairs > 0).cumprod(-1).sum(-1, keepdim=True).clamp_max(num_pairs - 1)
    kept = torch.arange(num_pairs, device=pairs.device) < first
    time = 2 * torch.where(kept, pairs.cummin(-1).values, torch.zeros_like(pairs)).sum(-1) - 1
    time = time + even.gather(-1, first)[..., 0].clamp_min(0)
    size = m * n / time.clamp_min(1 / math.log10(m * n))
    return torch.where(total[..., 0] > 0, size, torch.nan)


def _for_angles_too(
    statistic: Callable[[Tensor], Tensor],
    worst: Callable[[Tensor, Tensor], Tensor],
    samples: Tensor,
    periodic: Sequence[bool] | None,
) -> Tensor:
    """A statistic of the samples; for an angle, which has no order, the worse of those of its cosine and its sine."""
    value = statistic(samples)
    flags = periodic_flags(samples.shape[-1], periodic)
    if any(flags):
        angle = torch.tensor(flags, device=samples.device)
        value = torch.where(angle, worst(statistic(samples.cos()), statistic(samples.sin())), value)
    # A chain that diverged has ranks like any other: only the positions tell.
    finite = samples.isfinite().flatten(0, 1).all(0)
    return torch.where(finite, value, torch.nan).to(samples.dtype)


def rhat(samples: Tensor, *, periodic: Sequence[bool] | None = None) -> Tensor:
    r"""Rank-normalised split R-hat: how much wider all chains together are than each half of a chain by itself.

    .. math:: \hat R = \sqrt{\frac{\frac{n - 1}{n} W + \frac1n B}{W}}

    with B and W the variances between and within half chains of n draws, of the normal scores of the draws' ranks; the
    larger of that for the draws and for their distances from the median.

    Args:
        samples: Draws in the order of the chains, shape (N, C, B, D).
        periodic: Whether each dimension is an angle, for which its cosine and sine are looked at; none by default.

    Returns:
        R-hat, shape (B, D). Near 1 if the chains agree; above 1.01 do not trust them. NaN where no chain moved at all,
        or a draw is not finite.

    Raises:
        ValueError: If samples has not four dimensions, or N < 4.

    Source:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner, Bayesian Analysis 2021.

    >>> stuck = torch.randn(500, 2, 1, 1) + torch.tensor([-5.0, 5.0])[:, None, None]
    >>> bool(rhat(stuck) > 1.1)
    True
    """
    return _for_angles_too(_linear_rhat, torch.maximum, samples, periodic)


def effective_sample_size(samples: Tensor, *, periodic: Sequence[bool] | None = None) -> Tensor:
    r"""Bulk effective sample size: how many independent draws would give means as exact as these.

    .. math:: \frac{N C}{1 + 2 \sum_{t \geq 1} \rho_t}

    with the autocorrelations ρ of the draws' normal scores, over half chains, summed as far as Geyer's initial monotone
    sequence goes. Chains that disagree count as correlated, so that it is small for them.

    Args:
        samples: Draws in the order of the chains, shape (N, C, B, D).
        periodic: Whether each dimension is an angle, for which its cosine and sine are looked at; none by default.

    Returns:
        The size, shape (B, D), at most N C log10(N C), which antithetic chains can reach. NaN where no chain moved at
        all, or a draw is not finite.

    Raises:
        ValueError: If samples has not four dimensions, or N < 4.

    Source:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner, Bayesian Analysis 2021; Geyer, Statistical Science 1992.

    >>> draws = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    >>> bool(effective_sample_size(draws) > 1500), bool(effective_sample_size(draws.cumsum(0)) < 100)
    (True, True)
    """
    return _for_angles_too(_linear_ess, torch.minimum, samples, periodic)
