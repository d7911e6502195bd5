"""Conformal regions and intervals: coverage in finite samples, whatever the density.

They need no model assumption, only that the calibration rows and the new ones are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from energyreg.checks import check_level
from energyreg.densities import ends
from energyreg.inference.regions import mass_above, threshold_below_mass
from energyreg.inference.row_blocks import RowBlock
from energyreg.models.predictive import HighestDensityRegion, PredictiveDistribution

__all__ = ["ConformalIntervals", "ConformalRegions"]

CENTRAL = (0.05, 0.5, 0.95)
"""Levels of the quantiles that the conformal intervals of several outputs are measured by."""

ROUNDING = 1e-9
"""What is added to a score, so that a row with that very score is inside its interval, however numbers are rounded."""


class _Conformal:
    """Scores of calibration rows, by group, and their conformal quantiles; larger scores are stranger rows.

    Args:
        source: A fitted estimator with `predict_distribution`, or a function of x that returns p(y|x), as a model.
        x: Inputs of the calibration rows, which the source must not have been trained or tuned on.
        y: Their targets in user units, shape (N, D), or (N,) for D = 1.
        groups: A label for each calibration row. Coverage then holds within each group, and each needs enough rows.
    """

    def __init__(self, source: Any, x: Any, y: Any, groups: Any = None) -> None:
        self.distribution: Callable[[Any], PredictiveDistribution] = getattr(source, "predict_distribution", source)
        if not callable(self.distribution):
            raise ValueError(
                f"source is a {type(source).__name__}; expected a fitted estimator, or a function that returns p(y|x)."
            )
        p = self.distribution(x)
        rows = p.batch_shape[0]
        targets = y if isinstance(y, Tensor) else torch.as_tensor(np.array(y))
        targets = p.as_targets(targets[:, None] if targets.ndim == 1 and p.event_shape[0] == 1 else targets)
        if targets.ndim != 2 or not bool(targets.isfinite().all()):
            raise ValueError("y must hold one finite target for each row of x; drop the other rows.")
        scores = self._score(p, targets).double().cpu().numpy()
        labels = self._labels(groups, rows)
        known = [None] if labels is None else sorted(set(labels.tolist()), key=str)
        self.scores = {g: np.sort(scores if labels is None else scores[labels == g]) for g in known}

    @classmethod
    def from_scores(cls, source: Callable[[Any], PredictiveDistribution], scores: np.ndarray) -> Self:
        """The same without groups, from scores that are known."""
        self = cls.__new__(cls)
        self.distribution, self.scores = source, {None: np.sort(scores)}
        return self

    def _score(self, p: PredictiveDistribution, y: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _labels(groups: Any, rows: int) -> np.ndarray | None:
        if groups is None:
            return None
        labels = np.asarray(groups)
        if labels.shape != (rows,):
            raise ValueError(f"groups has shape {labels.shape}; expected ({rows},), one label per row.")
        return labels

    def quantile(self, level: float, group: Any = None) -> float:
        """The score up to which a row is inside, for a coverage of at least `level`; infinite with too few rows.

        It is the ⌈(n + 1) level⌉-th smallest of the n scores of the group.

        Raises:
            ValueError: If the level is not in (0, 1), or the group was not among the calibration rows.
        """
        check_level(level)
        if group not in self.scores:
            known = ", ".join(repr(label) for label in list(self.scores)[:5])
            raise ValueError(f"groups has {group!r}, which no calibration row belongs to; there are {known}.")
        scores = self.scores[group]
        # A hair below, so that 0.9 · 10 is the 9th of 9 rows, not the 10th.
        rank = math.ceil((len(scores) + 1) * level - 1e-9)
        return float(scores[rank - 1]) if rank <= len(scores) else math.inf

    def _quantiles(self, level: float, groups: Any, rows: int) -> Tensor:
        """The quantile of each new row's group, shape (B,)."""
        labels = self._labels(groups, rows)
        grouped = None not in self.scores
        if grouped != (labels is not None):
            what = "were given" if grouped else "were not given"
            raise ValueError(f"groups {what} for the calibration rows; do the same for the new rows.")
        if labels is None:
            return torch.full((rows,), self.quantile(level), dtype=torch.double)
        values = {label: self.quantile(level, label) for label in set(labels.tolist())}
        return torch.tensor([values[label] for label in labels.tolist()], dtype=torch.double)


class ConformalRegions(_Conformal):
    r"""Highest-density regions with exact marginal coverage in finite samples, by split conformal prediction.

    A calibration row's score says how unlikely its target was. A new row's region holds all y whose score is not beyond
    the conformal quantile, so that

    .. math:: P(y_{new} \in C(x_{new})) \ge \text{level}

    for rows that are exchangeable with the calibration rows, and at most level + 1 / (n + 1) where scores do not tie.

    Args:
        source: A fitted estimator with `predict_distribution`, or a function of x that returns p(y|x), as a model.
        x: Inputs of the calibration rows, which the source must not have been trained or tuned on.
        y: Their targets in user units, shape (N, D), or (N,) for D = 1.
        groups: A label for each calibration row. Coverage then holds within each group, and each needs enough rows: 9
            for a level of 0.9, 19 for 0.95. With fewer the region is everything.
        score: "mass", the probability of the smallest highest-density region that holds y: regions are highest-density
            regions of another level, and adapt to each row. Or "density", -log p(y|x): one threshold on the density for
            all rows, the smallest regions on average, where rows with a flat density may be left out.

    Attributes:
        scores: The calibration rows' scores in ascending order, by group (None without groups).

    Raises:
        ValueError: If an argument cannot be used.

    Source:
        Vovk et al., "Algorithmic learning in a random world", 2005; Lei et al., JASA 2013 ("density"); Izbicki et al.,
        "CD-split and HPD-split", JMLR 2022 ("mass").

    >>> from energyreg.models.model import EnergyRegressionModel
    >>> model = EnergyRegressionModel.mixture_for_table(2, width=8).eval()
    >>> x, y = torch.randn(99, 2), torch.randn(99)
    >>> regions = ConformalRegions(model, x, y)
    >>> region = regions(x, level=0.9)
    >>> len(region.intervals), bool(region.contains(y[:, None]).sum() >= 90)
    (99, True)
    """

    score = "mass"

    def __init__(self, source: Any, x: Any, y: Any, groups: Any = None, score: str = "mass") -> None:
        if score not in ("mass", "density"):
            raise ValueError(f"score is {score!r}; expected 'mass' or 'density'.")
        self.score = score
        super().__init__(source, x, y, groups)

    def _score(self, p: PredictiveDistribution, y: Tensor) -> Tensor:
        if self.score == "density":
            return -p.log_prob(y)
        return p.gather(lambda block: mass_above(block, y[block.rows]))

    def __call__(self, x: Any, level: float = 0.9, groups: Any = None) -> HighestDensityRegion:
        """The regions of new rows.

        Args:
            x: Inputs, B rows.
            level: Coverage.
            groups: Their labels, if the calibration rows have some.

        Returns:
            A threshold on the log-density of each row (-inf where the region is everything), and for D = 1 the regions
            as unions of intervals.

        Raises:
            ValueError: If the level is not in (0, 1), or groups do not fit those of the calibration rows.
        """
        p = self.distribution(x)
        quantiles = self._quantiles(level, groups, p.batch_shape[0]).to(p.device)

        def threshold(block: RowBlock, density: Tensor) -> tuple[Tensor, Tensor]:
            q = quantiles[block.rows]
            if self.score == "density":
                log_threshold = (-q).to(density.dtype)
            else:
                log_threshold = threshold_below_mass(block, density, q) - block.log_partition
            return log_threshold, log_threshold + block.log_partition

        return p.region(level, threshold)


class ConformalIntervals(_Conformal):
    r"""Intervals with exact marginal coverage in finite samples, for dimensions that are no angles.

    For one dimension the score of a row is :math:`|2 F(y|x) - 1|`, so the interval is the predictive one of another
    level. For several outputs all intervals of a row hold theirs **together** with the given probability: the score is

    .. math:: \max_d \max\left(\frac{z_d - m_d}{u_d - m_d}, \frac{m_d - z_d}{m_d - l_d}\right)

    in model space, with the median m and the quantiles l and u at 0.05 and 0.95 of each output's marginal; so each
    interval is the predictive one, longer or shorter by one factor for all.

    Args:
        source: A fitted estimator with `predict_distribution`, or a function of x that returns p(y|x), as a model.
        x: Inputs of the calibration rows, which the source must not have been trained or tuned on.
        y: Their targets in user units, shape (N, D), or (N,) for D = 1.
        groups: A label for each calibration row; see :class:`ConformalRegions`.

    Raises:
        ValueError: If an argument cannot be used.

    Source:
        Chernozhukov, Wüthrich and Zhu, "Distributional conformal prediction", PNAS 2021 (one dimension); Romano,
        Patterson and Candès, "Conformalized quantile regression", NeurIPS 2019 (scores from quantiles).
    """

    def _score(self, p: PredictiveDistribution, y: Tensor) -> Tensor:
        if any(p.space.periodic):
            raise ValueError("ConformalIntervals has no beginning to count from on a circle; use ConformalRegions.")
        if p.event_shape[0] == 1:
            # A target at an end of the space is in every interval that reaches into the end's margin.
            first, last = ends.margins(p.space)
            return (2 * p.cdf(y.double().clamp(first, last)) - 1).abs()
        below, middle, above = self._central(p)
        z = p.space.to_model(y)
        return torch.maximum((z - middle) / above, (middle - z) / below).amax(-1)

    @staticmethod
    def _central(p: PredictiveDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Median in model space and the lengths below and above it, shape (B, D) each."""
        low, middle, high = p.space.to_model(p.central_quantiles(CENTRAL))
        tiny = torch.finfo(torch.float32).eps
        return (middle - low).clamp_min(tiny), middle, (high - middle).clamp_min(tiny)

    def __call__(self, x: Any, level: float = 0.9, groups: Any = None) -> Tensor:
        """The intervals of new rows; all of the target's space where there are too few calibration rows.

        Args:
            x: Inputs, B rows.
            level: Coverage.
            groups: Their labels, if the calibration rows have some.

        Returns:
            Lower and upper ends in user units, shape (B, 2) for D = 1, else (B, D, 2).

        Raises:
            ValueError: If the level is not in (0, 1), or groups do not fit those of the calibration rows.
        """
        p = self.distribution(x)
        q = self._quantiles(level, groups, p.batch_shape[0]).to(p.device)
        if p.event_shape[0] > 1:
            below, middle, above = self._central(p)
            factor = torch.where(q.isfinite(), q + ROUNDING * (1 + q.abs()), 0.0)[:, None]
            both = torch.stack([p.space.to_user(middle - factor * below), p.space.to_user(middle + factor * above)])
            found = torch.where(q.isfinite()[:, None], ends.snap(p.space, both), ends.bounds(p.space)[:, None])
            return found.permute(1, 2, 0)
        inner = (q + ROUNDING).clamp_max(1)
        both = p.icdf(torch.stack([(1 - inner) / 2, (1 + inner) / 2]))
        found = torch.where(q >= 1, ends.bounds(p.space), ends.snap(p.space, both[..., None])[..., 0])
        return found.to(both.dtype).T
