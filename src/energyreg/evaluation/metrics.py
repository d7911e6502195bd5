r"""Scores of a predictive distribution against the targets that came true.

Every function takes the same arguments and works in user units:

- `p`: what a model returned for B inputs; it needs `event_shape` and the methods that the score reads (`log_prob`,
  `cdf`, `quantile`, `interval`, `sample`);
- `y`: the B observed targets, shape (B, D), or (B,) for D = 1;
- `level`: nominal probability of an interval or region, in (0, 1).

Scores are means over the B rows. All raise a ValueError where `y` has another shape than `p` predicts, no rows, or
values that are not finite, where `level` is outside of (0, 1), and where a score of one output meets several; those of
scoringrules raise an ImportError where it is not installed.

Lower is better for `negative_log_likelihood`, `crps`, `energy_score` and `calibration_error`. Both proper scores, the
likelihood and the CRPS, are smallest in expectation for the true density alone; coverage and PIT only ask whether the
stated probabilities are kept, which a vague forecast can also do. So read calibration next to a proper score, never
instead of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from energyreg.modes import as_usual

if TYPE_CHECKING:
    from energyreg.models.predictive import PredictiveDistribution

__all__ = [
    "calibration_error",
    "coverage",
    "crps",
    "energy_score",
    "evaluate",
    "interval_width",
    "kolmogorov_smirnov",
    "negative_log_likelihood",
    "pit",
]

# Numbers held at once by a score that compares many points with every target: 2**22 doubles are 32 MiB, and
# scoringrules keeps some five arrays of that size.
_BUDGET = 2**22


@as_usual
def negative_log_likelihood(p: PredictiveDistribution, y: Any) -> float:
    """Mean of −log p(y|x), in nats and user units.

    Returns:
        The mean over the B rows; infinite where a target lies outside the target space. Changing the unit of y shifts
        it by a constant, so compare only models of the same targets in the same unit.
    """
    targets = _targets(p, y)
    return float(-p.log_prob(targets).double().mean())


@as_usual
def crps(p: PredictiveDistribution, y: Any, *, num_quantiles: int = 256) -> float:
    r"""Mean continuous ranked probability score, in the unit of y (D = 1).

    .. math:: \mathrm{CRPS}(F, y) = \int (F(t) - 1\{y \le t\})^2 \, dt = 2 \int_0^1 \rho_\tau(y - F^{-1}(\tau)) \, d\tau

    The second integral is taken by the midpoint rule over `num_quantiles` equally spaced levels, which is scoringrules'
    `qd` estimator on that ensemble of quantiles. (Its `fair` and `pwm` estimators correct for *random* members and are
    off by 1/M here.) With 256 levels the mean is within 1e-3 of the closed form for Gaussians and their mixtures.

    Args:
        p: Distribution of B inputs, D = 1.
        y: Their targets.
        num_quantiles: Levels of the midpoint rule.

    Returns:
        The mean over the B rows. For a forecast that is one point it is the absolute error. On a circle it measures
        along the cut-open circle, so it depends on where the circle is cut.

    Source:
        Laio and Tamea, HESS 2007 (the quantile form); Gneiting and Raftery, JASA 2007.
    """
    scoringrules = _scoringrules()
    targets = _one_dimensional(p, y, "crps", "energy_score")
    if num_quantiles < 1:
        raise ValueError(
            f"num_quantiles is {num_quantiles}, but the integral over levels needs at least 1; 256 is good."
        )
    rows = targets.shape[0]
    levels = (torch.arange(num_quantiles, dtype=torch.float64) + 0.5) / num_quantiles
    obs = targets[:, 0].cpu().numpy()
    total = 0.0
    # Chunks over levels, not rows: p cannot be cut into rows, and the score is a plain mean over levels.
    for part in _chunks(num_quantiles, per_item=rows):
        quantiles = p.quantile(levels[part]).double().cpu().numpy().T
        scores = scoringrules.crps_quantile(obs, quantiles, levels[part].numpy(), backend="numpy")
        total += float(np.mean(scores)) * quantiles.shape[1]
    return total / num_quantiles


@as_usual
def energy_score(p: PredictiveDistribution, y: Any, *, num_samples: int = 256, seed: int = 0) -> float:
    r"""Mean energy score, the CRPS of several dimensions, in the unit of y.

    .. math:: \mathrm{ES}(P, y) = E\|Y - y\| - \tfrac12 E\|Y - Y'\|, \qquad Y, Y' \sim P

    Estimated on samples, without bias (the `fair` estimator). The Euclidean norm adds the dimensions as they are: bring
    them to comparable units first.

    Args:
        p: Distribution of B inputs.
        y: Their targets.
        num_samples: Samples per row, at least 2.
        seed: Seed of the samples.

    Returns:
        The mean over the B rows; for D = 1 an estimate of the CRPS.

    Raises:
        ValueError: `num_samples` is below 2.

    Source:
        Gneiting and Raftery, JASA 2007, section 4.3.
    """
    scoringrules = _scoringrules()
    targets = _targets(p, y)
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, but the distance between two samples needs at least 2.")
    generator = torch.Generator().manual_seed(seed)
    samples = p.sample((num_samples,), generator=generator).double().cpu().numpy()
    obs = targets.cpu().numpy()
    total = 0.0
    for part in _chunks(obs.shape[0], per_item=num_samples**2 * obs.shape[1]):
        scores = scoringrules.es_ensemble(
            obs[part], samples[:, part], m_axis=0, v_axis=-1, estimator="fair", backend="numpy"
        )
        total += float(np.sum(scores))
    return total / obs.shape[0]


@as_usual
def pit(p: PredictiveDistribution, y: Any) -> Tensor:
    """Probability integral transform F(y|x): the predicted probability of a target up to the observed one (D = 1).

    Returns:
        Values in [0, 1], shape (B,), float64. For a calibrated model they are uniform: a bump in the middle of their
        histogram means intervals that are too wide, a U intervals that are too narrow, a slope a bias.

    Source:
        Gneiting, Balabdaoui and Raftery, JRSS-B 2007.
    """
    targets = _one_dimensional(p, y, "pit", "coverage")
    # Quadrature can leave a cdf a rounding error outside [0, 1], where a histogram would lose the value.
    return p.cdf(targets).double().clamp(0.0, 1.0)


@as_usual
def kolmogorov_smirnov(p: PredictiveDistribution, y: Any) -> float:
    """Largest distance between the distribution of the PIT values and the uniform one, in [0, 1] (D = 1).

    By chance alone a calibrated model exceeds 1.36 / √B in one of twenty sets of B rows.
    """
    return _kolmogorov_smirnov(pit(p, y))


@as_usual
def calibration_error(p: PredictiveDistribution, y: Any) -> float:
    r"""Mean gap between nominal and empirical probability, over all quantile levels, in [0, 1/2] (D = 1).

    .. math:: \int_0^1 \left| \tfrac1B \#\{i : F(y_i|x_i) \le \tau\} - \tau \right| d\tau

    A value of 0.02 says: the quantile at level τ was undershot by τ ± 0.02 of the targets, on average over τ. A
    calibrated model gets about 0.31 / √B from sampling alone (the mean absolute value of a Brownian bridge).
    """
    return _calibration_error(pit(p, y))


@as_usual
def coverage(p: PredictiveDistribution, y: Any, level: float = 0.9) -> float:
    """Fraction of targets inside the predicted region of probability `level`.

    It is close to the level where the model is calibrated. The region is the equal-tailed interval for D = 1, and the
    highest-density region for D > 1.

    Returns:
        A fraction in [0, 1]. Its standard error is √(level (1 − level) / B) for a calibrated model.
    """
    targets = _targets(p, y)
    level = _level(level)
    if targets.shape[1] == 1:
        return _share_inside(p, targets, _interval(p, level))
    return float(p.highest_density_region(level).contains(targets).double().mean())


@as_usual
def interval_width(p: PredictiveDistribution, level: float = 0.9) -> float:
    """Mean width of the equal-tailed interval of probability `level`, in the unit of y (D = 1).

    Of two models with the nominal coverage, the one with narrower intervals says more.
    """
    dim = _event_dim(p)
    if dim != 1:
        raise ValueError(
            f"interval_width is defined for one target dimension, but p predicts {dim}. "
            "Take p.interval(level), shape (B, D, 2), for the width in each dimension."
        )
    return float(_interval(p, _level(level)).diff(dim=1).mean())


@as_usual
def evaluate(p: PredictiveDistribution, y: Any, level: float = 0.9) -> dict[str, float]:
    """All scores that suit the number of target dimensions.

    Returns:
        For D = 1 `nll`, `crps`, `coverage`, `interval_width`, `calibration_error` and `ks`; for D > 1 `nll`,
        `energy_score` and `coverage`. Plain floats, ready for JSON.
    """
    level = _level(level)
    scores = {"nll": negative_log_likelihood(p, y)}
    if _event_dim(p) > 1:
        return scores | {"energy_score": energy_score(p, y), "coverage": coverage(p, y, level)}
    # Interval and PIT once for two scores each: a distribution of many rows computes them again at every call.
    interval, values = _interval(p, level), pit(p, y)
    return scores | {
        "crps": crps(p, y),
        "coverage": _share_inside(p, _targets(p, y), interval),
        "interval_width": float(interval.diff(dim=1).mean()),
        "calibration_error": _calibration_error(values),
        "ks": _kolmogorov_smirnov(values),
    }


def _interval(p: PredictiveDistribution, level: float) -> Tensor:
    return p.interval(level).double().cpu()


def _share_inside(p: PredictiveDistribution, targets: Tensor, interval: Tensor) -> float:
    low, high = interval[:, :1], interval[:, 1:]
    period = getattr(getattr(p, "space", None), "period", None)
    if period is not None:  # the interval of an angle may run past the end of the circle
        return float(((targets - low) % float(period) <= high - low).double().mean())
    return float(((low <= targets) & (targets <= high)).double().mean())


def _kolmogorov_smirnov(values: Tensor) -> float:
    values = values.sort().values
    rows = values.shape[0]
    steps = torch.arange(rows + 1, dtype=values.dtype, device=values.device) / rows
    return float(torch.maximum((steps[1:] - values).max(), (values - steps[:-1]).max()))


def _calibration_error(values: Tensor) -> float:
    values = values.sort().values
    rows = values.shape[0]
    # The integral is exact: between neighbouring PIT values the empirical cdf is the constant c, and |c − τ| integrates
    # to the difference of s(τ) = (τ − c)|τ − c| / 2.
    ends = values.new_tensor([0.0, 1.0])
    edges = torch.cat([ends[:1], values, ends[1:]])
    constant = torch.arange(rows + 1, dtype=values.dtype, device=values.device) / rows
    low, high = edges[:-1] - constant, edges[1:] - constant
    return float((high * high.abs() - low * low.abs()).sum() / 2)


def _scoringrules() -> ModuleType:
    try:
        import scoringrules
    except ImportError as error:
        raise ImportError(
            "This score is computed by scoringrules, which is not installed. Install it with: "
            "pip install 'energyreg[tables]'"
        ) from error
    return scoringrules


def _event_dim(p: PredictiveDistribution) -> int:
    return int(p.event_shape[0]) if len(p.event_shape) else 1


def _targets(p: PredictiveDistribution, y: Any) -> Tensor:
    """Observed targets as a float64 tensor of shape (B, D) that fits `p`."""
    rows, dim = int(p.batch_shape[0]), _event_dim(p)
    # A copy of what numpy may hold read-only, as pandas does, which torch warns of.
    targets = torch.as_tensor(y) if isinstance(y, Tensor) else torch.tensor(np.asarray(y))
    if targets.ndim == 1 and dim == 1:
        targets = targets[:, None]
    if tuple(targets.shape) != (rows, dim):
        shapes = f"({rows}, {dim})" + (f" or ({rows},)" if dim == 1 else "")
        raise ValueError(
            f"y has shape {tuple(targets.shape)}, but p predicts {rows} rows of {dim} target dimension(s). Pass the "
            f"targets of the very rows that the model was called with, shape {shapes}."
        )
    if rows == 0:
        raise ValueError("y has no rows, and a mean over none is undefined. Pass at least one row.")
    targets = targets.detach().double().cpu()
    bad = ~torch.isfinite(targets).all(-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"y has {int(bad.sum())} row(s) with NaN or infinite values, the first at row {first}: "
            f"{targets[first].tolist()}. Drop these rows from x and y, then predict again."
        )
    return targets


def _one_dimensional(p: PredictiveDistribution, y: Any, name: str, instead: str) -> Tensor:
    if _event_dim(p) != 1:
        raise ValueError(f"{name} is defined for one target dimension, but p predicts {_event_dim(p)}. Use {instead}.")
    return _targets(p, y)


def _level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, but a probability strictly between 0 and 1 was expected, such as 0.9.")
    return float(level)


def _chunks(items: int, per_item: int) -> Iterator[slice]:
    size = max(1, _BUDGET // max(1, per_item))
    return (slice(start, min(start + size, items)) for start in range(0, items, size))
