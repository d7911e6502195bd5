r"""Calibration after training: temperature and a defensive share of the base, and conformal regions.

A density that overfits is too sharp, and has holes where a test point may fall. Both are repaired on rows that the
training has not seen, by two numbers:

.. math:: p(y|x) = (1 - ε) \frac{p_0(y) \, r(x, y)^t}{\int p_0(y') \, r(x, y')^t \, dy'} + ε \, p_0(y),
   \qquad r(x, y) = \frac{p_\text{model}(y|x)}{p_0(y)}

where p₀ is the reference measure, the smooth marginal of the training targets (of several outputs: the product of
theirs). t multiplies the energy relative to it:
0 is the marginal, 1 the model. So it is the same in whatever units y is measured, the tails stay p₀'s, and Z is finite;
where p(y|x) is almost as wide as p₀, t shifts it towards p₀ (or away), too, as a shrinkage does.

Conformal regions need no model assumption: their coverage holds in finite samples, whatever the density, as long as the
calibration rows and the new ones are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.inference.energy import ReferencedEnergy
from energyreg.inference.integrators import AdaptiveQuadrature, StratifiedQuadrature
from energyreg.inference.points import Cells, WeightedPoints
from energyreg.models.predictive import HighestDensityRegion, PredictiveDistribution, Rows

__all__ = ["Calibration", "ConformalIntervals", "ConformalRegions"]

POWERS = tuple(2 ** (i / 14) for i in range(-14, 15))
"""Inverse temperatures that are tried, from 1/2 to 2."""
SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
"""Shares of the base that are tried, besides the least one."""
BASE_POINTS = 64
"""Points that stand for the share of the base, where the others are samples."""
CENTRAL = (0.05, 0.5, 0.95)
"""Levels of the quantiles that the conformal intervals of several outputs are measured by."""


# ---------------------------------------------------------------------------------------------- temperature and share


class CalibratedEnergy(ReferencedEnergy):
    r"""The energy function of a calibrated density, for the B rows of a batch; normalised, as the mixture is one.

    Args:
        energy: The model's energy function of these rows.
        inverse_temperature: t.
        base_share: ε.
        log_partition: Log of the integral of the tempered density, shape (B,); None for what is not yet normalised, by
            which it is found: then ε plays no part.
    """

    is_reference = False

    def __init__(
        self,
        energy: ReferencedEnergy,
        inverse_temperature: float,
        base_share: float = 0.0,
        log_partition: Tensor | None = None,
    ) -> None:
        self.energy, self.inverse_temperature = energy, inverse_temperature
        self.base_share, self.log_partition = base_share, log_partition
        self.context, self.reference = energy.context, energy.reference
        self.conditional = energy.conditional
        self.normalised = log_partition is not None

    @cached_property
    def q(self) -> Distribution | None:
        """The model's proposal."""
        return self.energy.q

    def floats_per_point(self, shared: bool) -> int:
        """Working memory of one value of f, in floats; what chunks are sized by."""
        return self.energy.floats_per_point(shared) + 4

    def relative(self, u: Tensor) -> Tensor:
        """Return f - log p₀ at unit coordinates of the reference p₀, (*S, B, D) or (*S, 1, D) to (*S, B)."""
        return self._calibrated(self.energy.relative(u))

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(x, z) of shape (*S, B) for z in model space, shape (*S, B, D), or (*S, 1, D) shared by all rows."""
        reference = self.reference.log_prob(z)
        return reference + self._calibrated(self.energy(z) - reference)

    def _calibrated(self, relative: Tensor) -> Tensor:
        tempered = self.inverse_temperature * relative
        if self.log_partition is None:
            return tempered
        tempered = tempered - self.log_partition.to(tempered.dtype)
        if self.base_share == 0:
            return tempered
        share = torch.full_like(tempered, math.log(self.base_share))
        return torch.logaddexp(tempered + math.log1p(-self.base_share), share)


@dataclass(frozen=True)
class Calibration:
    """Temperature and defensive share of a predictive density.

    Called with a predictive distribution, it returns the calibrated one.

    For one dimension, and for two with a grid, the power of the density is normalised by quadrature. For several it is
    normalised by the points that normalise the density itself: what a power does to each point's weight is known.

    Args:
        inverse_temperature: t, by which the energy relative to the base is multiplied: above 1 sharper than the model,
            below flatter.
        base_share: ε, the share of the base measure, in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    >>> from energyreg.models.model import EnergyRegressionModel
    >>> p = EnergyRegressionModel.mixture_for_table(2, width=8)(torch.zeros(3, 2))
    >>> guarded = Calibration(inverse_temperature=0.9, base_share=0.01)(p)
    >>> far = torch.tensor([30.0] * 3)
    >>> bool((guarded.log_prob(far) > p.log_prob(far)).all())
    True
    """

    inverse_temperature: float = 1.0
    base_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0 < self.inverse_temperature < math.inf:
            raise ValueError(f"inverse_temperature is {self.inverse_temperature}; expected a finite number > 0.")
        if not 0 <= self.base_share < 1:
            raise ValueError(f"base_share is {self.base_share}; expected a share in [0, 1).")

    @classmethod
    def fit(
        cls, p: PredictiveDistribution, y: Any, sample_weight: Any = None, least_share: float | None = None
    ) -> Calibration:
        """Choose both by the likelihood of rows that the training has not seen.

        All pairs of a small grid are tried. The model stays as it is, but for the least share, unless the best pair
        gains more than one standard error of its gain: small validation sets decide nothing.

        Args:
            p: What the model predicts for the validation rows.
            y: Their targets, shape (B, D), or (B,) for D = 1.
            sample_weight: Weights of the rows, shape (B,).
            least_share: Share of the base that is kept in any case. By default 1 / (2 B + 4), at most 0.02: where none
                of B rows fell into a hole, the next one still may, and the price of this insurance is 1 / (2 B) nats.

        Raises:
            ValueError: If an argument cannot be used.
        """
        count = p.batch_shape[0]
        targets = p._as_target(y)
        weight = torch.ones(count, dtype=torch.double) if sample_weight is None else torch.as_tensor(sample_weight)
        if weight.shape != (count,) or not bool((weight >= 0).all()) or not float(weight.sum()) > 0:
            raise ValueError(
                f"sample_weight has shape {tuple(weight.shape)}; expected ({count},) numbers ≥ 0, not all of them 0."
            )
        weight = weight.double() / weight.double().mean()
        least = min(1 / (2 * count + 4), 0.02) if least_share is None else least_share
        as_it_is = cls(1.0, least)
        relative, log_partitions = _tempered(p, targets)
        loss = {
            (power, share): -_log_calibrated(power * relative - log_z, share)
            for power, log_z in zip(POWERS, log_partitions, strict=True)
            for share in (least, *(share for share in SHARES if share > least))
        }
        best = min(loss, key=lambda pair: float((weight * loss[pair]).mean()))
        gain = weight * (loss[1.0, least] - loss[best])
        if not bool(gain.isfinite().all()) or count < 2:
            return as_it_is
        clear = float(gain.mean()) > float(gain.std()) / math.sqrt(count)
        return cls(*best) if clear else as_it_is

    def __call__(self, p: PredictiveDistribution) -> PredictiveDistribution:
        """Return the calibrated distribution of the same rows; p itself where there is nothing to change."""
        if self.inverse_temperature == 1 and self.base_share == 0:
            return p
        return CalibratedDistribution(p, self)


class CalibratedDistribution(PredictiveDistribution):
    """A predictive distribution with a temperature and a share of the base.

    Made by calling a :class:`Calibration`. See :class:`~energyreg.models.predictive.PredictiveDistribution` for what it
    can do.

    Args:
        p: The distribution before.
        calibration: The two numbers.

    Attributes:
        uncalibrated: The distribution before.
        calibration: The two numbers.
    """

    def __init__(self, p: PredictiveDistribution, calibration: Calibration) -> None:
        self.uncalibrated, self.calibration = p, calibration
        self._tempered: Tensor | None = None
        super().__init__(self._mixed, p.batch_shape[0], p._space, p.integrator, **_settings(p))

    def _mixed(self, rows: Rows) -> Any:
        # The same interface by another class: the type checker need not know.
        inner, t = self.uncalibrated._energy(rows), self.calibration.inverse_temperature
        return CalibratedEnergy(inner, t, self.calibration.base_share, self._log_tempered()[rows])

    def _log_tempered(self) -> Tensor:
        """Log of the integral of the tempered density, (B,); computed once, for all rows."""
        if self._tempered is None:
            p, t = self.uncalibrated, self.calibration.inverse_temperature
            if t != 1 and not _by_quadrature(p):

                def log_tempered(chunk: Any) -> Tensor:
                    log_weights, relative = _weights_and_relative(p, chunk)
                    return t * chunk.log_partition + (log_weights + (t - 1) * relative).logsumexp(0)

                self._tempered = p._gather(log_tempered)
                return self._tempered

            def energy(rows: Rows) -> Any:
                return CalibratedEnergy(p._energy(rows), t)

            same = PredictiveDistribution(energy, p.batch_shape[0], p._space, p.integrator, **_settings(p))
            self._tempered = p.log_partition if t == 1 else same.log_partition
        return self._tempered

    def _num_points(self) -> int:
        added = 0 if _by_quadrature(self) or self.calibration.base_share == 0 else BASE_POINTS
        return self.uncalibrated._num_points() + added

    def _integrate(self, f: Any, rows: slice) -> Cells | WeightedPoints:
        if _by_quadrature(self):
            return super()._integrate(f, rows)
        p, t, share = self.uncalibrated, self.calibration.inverse_temperature, self.calibration.base_share
        chunk = p._compute(rows)
        log_weights, relative = _weights_and_relative(p, chunk)
        log_weights = (log_weights + (t - 1) * relative).log_softmax(0)
        if share == 0:
            return WeightedPoints(chunk.z, log_weights.to(self._dtype), chunk.points.independent)
        # The samples would hardly ever fall where only the base has density; so it gets points of its own.
        sobol = torch.quasirandom.SobolEngine(self._dim, scramble=True, seed=self._seed)
        unit = sobol.draw(BASE_POINTS, dtype=torch.double).clamp(1e-7, 1 - 1e-7).to(self._device, self._dtype)
        of_base = f.reference.from_unit(unit[:, None]).expand(-1, f.batch_size, -1)
        log_share = log_weights.new_full((BASE_POINTS, f.batch_size), math.log(share / BASE_POINTS))
        both = torch.cat([log_weights + math.log1p(-share), log_share])
        points = torch.cat([chunk.z.expand(-1, f.batch_size, -1).to(self._dtype), of_base.to(self._dtype)])
        return WeightedPoints(points, both.to(self._dtype), chunk.points.independent)


def _settings(p: PredictiveDistribution) -> dict[str, Any]:
    return {"dtype": p._dtype, "device": p._device, "seed": p._seed, "memory_budget": p._budget}


def _by_quadrature(p: PredictiveDistribution) -> bool:
    return isinstance(p.integrator, (AdaptiveQuadrature, StratifiedQuadrature))


def _weights_and_relative(p: PredictiveDistribution, chunk: Any) -> tuple[Tensor, Tensor]:
    """Normalised log-weights of the points and their log-density relative to the reference, (M, B) both, in double."""
    log_weights = chunk.log_weights.double().log_softmax(0)
    z = chunk.z.to(p._dtype)
    jacobian = p._space.log_abs_det_jacobian(p._space.to_user(z)) + chunk.f.reference.log_prob(z).double()
    relative = p._point_density(chunk).double() - chunk.log_partition.double() - jacobian
    # A point of no weight stays one, whatever the power.
    return log_weights, torch.where(log_weights > -torch.inf, relative, torch.zeros_like(relative))


def _log_calibrated(log_density: Tensor, share: float) -> Tensor:
    if share == 0:
        return log_density
    return torch.logaddexp(log_density + math.log1p(-share), torch.full_like(log_density, math.log(share)))


def _tempered(p: PredictiveDistribution, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of p at the targets relative to the reference, (B,), and log Z of each power of it, (P, B)."""

    def columns(chunk: Any) -> Tensor:
        cells = chunk.cells
        z = p._space.to_model(y[chunk.rows]).to(p._dtype)
        at_target = (chunk.f(z) - chunk.f.reference.log_prob(z)).double()
        if cells is None:
            log_weights, relative = _weights_and_relative(p, chunk)
            at_target = at_target - chunk.log_partition.double()
        else:
            log_z = cells.log_masses.double().logsumexp(0)
            log_weights = cells.log_masses.double() - log_z
            relative, at_target = log_weights - cells.log_widths, at_target - log_z
        log_zs = torch.stack([(log_weights + (t - 1) * relative).logsumexp(0) for t in POWERS])
        return torch.cat([at_target[None], log_zs]).T

    both = p._gather(columns).cpu().T
    return both[0], both[1:]


# ---------------------------------------------------------------------------------------------- conformal regions


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
        targets = p._as_target(targets[:, None] if targets.ndim == 1 and p.event_shape[0] == 1 else targets)
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
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected a probability between 0 and 1.")
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
        return p._gather(lambda chunk: _mass_above(p, chunk, y[chunk.rows]))

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
        quantiles = self._quantiles(level, groups, p.batch_shape[0]).to(p._device)
        thresholds, intervals = [], []
        with torch.no_grad():
            for chunk in p._chunks():
                density, q = p._point_density(chunk), quantiles[chunk.rows]
                if self.score == "density":
                    threshold = (-q).to(density.dtype)
                else:
                    threshold = _threshold(chunk, density, q) - chunk.log_partition
                thresholds.append(threshold)
                if chunk.cells is not None:
                    everything = density.amin(0) - 1
                    inside = torch.maximum(threshold + chunk.log_partition, everything)
                    intervals += p._intervals(chunk, density, inside)
        return HighestDensityRegion(level, torch.cat(thresholds), intervals or None, p)


def _sorted_masses(chunk: Any, density: Tensor) -> tuple[Tensor, Tensor]:
    """Densities of the points in descending order, and the probability of all points up to each, (M, B) both."""
    ordered, order = density.sort(0, descending=True)
    cumulative = chunk.masses.double().gather(0, order).cumsum(0)
    return ordered, cumulative / cumulative[-1]


def _mass_above(p: PredictiveDistribution, chunk: Any, y: Tensor) -> Tensor:
    """Probability of the points where the density is at least that of y, shape (B,)."""
    density = p._point_density(chunk)
    _, cumulative = _sorted_masses(chunk, density)
    count = (density >= p._log_density(chunk.f, y)).sum(0, keepdim=True)
    mass = cumulative.gather(0, (count - 1).clamp_min(0))
    return torch.where(count > 0, mass, torch.zeros_like(mass))[0]


def _threshold(chunk: Any, density: Tensor, mass: Tensor) -> Tensor:
    """The density, up to log Z, above which lies every y whose mass above is at most `mass` (B,), shape (B,)."""
    ordered, cumulative = _sorted_masses(chunk, density)
    count = (cumulative <= mass).sum(0, keepdim=True)
    value = ordered.gather(0, count.clamp_max(len(ordered) - 1))
    return torch.where(count < len(ordered), value, torch.full_like(value, -torch.inf))[0]


class ConformalIntervals(_Conformal):
    r"""Intervals with exact marginal coverage in finite samples, for dimensions that are no angles.

    For one dimension the score of a row is :math:`|2 F(y|x) - 1|`, so the interval is the predictive one of another
    level. For several outputs all intervals of a row hold theirs **together** with the given probability: the score is

    .. math:: \max_d \max\left(\frac{z_d - m_d}{u_d - m_d}, \frac{m_d - z_d}{m_d - l_d}\right)

    in model space, with the median m and the quantiles l and u at 0.05 and 0.95 of each output's marginal; so each
    interval is the predictive one, longer or shorter by one factor for all.

    Args:
        source: As for :class:`ConformalRegions`.
        x: As there.
        y: As there.
        groups: As there.

    Raises:
        ValueError: If an argument cannot be used.

    Source:
        Chernozhukov, Wüthrich and Zhu, "Distributional conformal prediction", PNAS 2021 (one dimension); Romano,
        Patterson and Candès, "Conformalized quantile regression", NeurIPS 2019 (scores from quantiles).
    """

    def _score(self, p: PredictiveDistribution, y: Tensor) -> Tensor:
        if any(p._space.periodic):
            raise ValueError("ConformalIntervals has no beginning to count from on a circle; use ConformalRegions.")
        if p.event_shape[0] == 1:
            return (2 * p.cdf(y) - 1).abs()
        below, middle, above = self._central(p)
        z = p._space.to_model(y)
        return torch.maximum((z - middle) / above, (middle - z) / below).amax(-1)

    @staticmethod
    def _central(p: PredictiveDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Median in model space and the lengths below and above it, shape (B, D) each."""
        low, middle, high = p._space.to_model(p._central(list(CENTRAL)))
        tiny = torch.finfo(torch.float32).eps
        return (middle - low).clamp_min(tiny), middle, (high - middle).clamp_min(tiny)

    def __call__(self, x: Any, level: float = 0.9, groups: Any = None) -> Tensor:
        """The intervals of new rows; from -inf to inf where there are too few calibration rows.

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
        q = self._quantiles(level, groups, p.batch_shape[0]).to(p._device)
        if p.event_shape[0] > 1:
            below, middle, above = self._central(p)
            factor = torch.where(q.isfinite(), q, 0.0)[:, None]
            ends = torch.stack(
                [p._space.to_user(middle - factor * below), p._space.to_user(middle + factor * above)], -1
            )
            everything = torch.tensor([-torch.inf, torch.inf], dtype=ends.dtype, device=ends.device)
            return torch.where(q.isfinite()[:, None, None], ends, everything)
        inner = q.clamp_max(1)
        ends = p.icdf(torch.stack([(1 - inner) / 2, (1 + inner) / 2]))
        everything = torch.tensor([[-torch.inf], [torch.inf]], dtype=ends.dtype, device=ends.device)
        return torch.where(q >= 1, everything, ends).T
