r"""Calibration after training: temperature and a defensive mixture weight of the base.

A density that overfits is too sharp, and has holes where a test point may fall. Both are repaired on rows that the
training has not seen, by two numbers:

.. math:: p(y|x) = (1 - ε) \frac{p_0(y) \, r(x, y)^t}{\int p_0(y') \, r(x, y')^t \, dy'} + ε \, p_0(y),
   \qquad r(x, y) = \frac{p_\text{model}(y|x)}{p_0(y)}

where p₀ is the reference measure, the smooth marginal of the training targets (of several outputs: the product of
theirs). t multiplies the energy relative to it: 0 is the marginal, 1 the model. So it is the same in whatever units y
is measured; where p(y|x) is almost as wide as p₀, t shifts it towards p₀ (or away), too, as a shrinkage does.

For t ≤ 1 the tempered density lies between two densities, so that Z ≤ 1 (Hölder) and its tails are theirs. For t > 1
it would be p^t / p₀^(t-1), which nothing bounds beyond the training targets, where p₀ vanishes. There p₀ gives way to a
floor, the density c that p₀ has where the targets end:

.. math:: p^t / (p_0 + c)^{t-1} \le p \, (\max p / c)^{t-1}

So it is proper, its tails are no heavier than the model's, and far out t is an inverse temperature in model space.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional

from energyreg.inference.cells import Cells
from energyreg.inference.energy import ReferencedEnergy
from energyreg.inference.integrators import AdaptiveQuadrature, StratifiedQuadrature
from energyreg.inference.nodes import Nodes
from energyreg.inference.points import WeightedPoints
from energyreg.inference.row_blocks import RowBlock, Rows
from energyreg.models.conformal import ConformalIntervals, ConformalRegions
from energyreg.models.predictive import PredictiveDistribution

__all__ = ["Calibration", "ConformalIntervals", "ConformalRegions"]

ENDS = 0.01
"""Probability under the reference beyond each of the ends where its density is the floor."""
POWERS = tuple(2 ** (i / 14) for i in range(-14, 15))
"""Inverse temperatures that are tried, from 1/2 to 2."""
BASE_WEIGHTS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
"""Weights of the base that are tried, besides the least one."""
BASE_POINTS = 64
"""Points that stand for the share of the base, where the others are samples."""


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
        self.energy, self.inverse_temperature = energy.in_common(), inverse_temperature
        self.base_share, self.log_partition = base_share, log_partition
        self.context, self.reference = self.energy.context, self.energy.reference
        self.conditional = self.energy.conditional
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
        return self._calibrated(self.energy.relative(u), self._log_p0(u))

    def relative_at_own(self, u: Tensor, z: Tensor | None = None) -> Tensor:
        """As :meth:`relative`, at many nodes of each row's own."""
        if z is None and (self.conditional or self.inverse_temperature > 1):
            z = self.reference.from_unit(u)
        return self._calibrated(self.energy.relative_at_own(u, z), self._log_p0(u, z))

    def _log_p0(self, u: Tensor, z: Tensor | None = None) -> Tensor:
        """Log-density of the reference, where the power asks for it."""
        if self.inverse_temperature <= 1:
            return torch.zeros_like(u[..., 0])
        return self.reference.log_prob(self.reference.from_unit(u) if z is None else z)

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(x, z) of shape (*S, B) for z in model space, shape (*S, B, D), or (*S, 1, D) shared by all rows."""
        log_p0 = self.reference.log_prob(z)
        value = log_p0 + self._calibrated(self.energy(z) - log_p0, log_p0)
        return torch.where(log_p0 > -torch.inf, value, log_p0)  # outside a window nothing has any density

    def _calibrated(self, relative: Tensor, log_p0: Tensor) -> Tensor:
        t = self.inverse_temperature
        tempered = _tempered(relative, _surplus(log_p0, self.reference) if t > 1 else None, t)
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
        cls,
        p: PredictiveDistribution | Sequence[PredictiveDistribution],
        y: Any,
        sample_weight: Any = None,
        least_share: float | None = None,
        prior: float = 20.0,
    ) -> Calibration:
        r"""Choose both by the likelihood of rows that the training has not seen.

        All pairs (t, ε) of a small grid are tried. To the n rows come `prior` imagined ones that are as the model says,

        .. math:: \max_{t, ε} \sum_i \log p_{t, ε}(y_i|x_i) - a \, \overline{KL}(p \| p_{t, ε})

        so that few rows change little. And the model stays as it is, but for the least weight of the base, unless the
        best pair gains more than one standard error of its gain.

        Args:
            p: What the model predicts for the validation rows. Where members have held out rows of their own, one
                distribution after the other, each of the members that have not seen its rows.
            y: Targets of all these rows, B of them, in this order, shape (B, D), or (B,) for D = 1.
            sample_weight: How many rows each stands for, shape (B,).
            least_share: Weight of the base that is kept in any case. By default 1 / (2 B + 4), at most 0.02: where none
                of B rows fell into a hole, the next one still may, and the price of this insurance is 1 / (2 B) nats.
            prior: How many rows the model itself counts as, a.

        Raises:
            ValueError: If an argument cannot be used.

        Warns:
            UserWarning: If the best value is the end of what is tried, so that the model is far from calibrated.
        """
        parts = [p] if isinstance(p, PredictiveDistribution) else list(p)
        targets = _targets_of(parts, y)
        count = sum(map(len, targets))
        if not 0 <= prior < math.inf:
            raise ValueError(f"prior is {prior}; expected a finite number of rows ≥ 0.")
        weight = torch.ones(count, dtype=torch.double) if sample_weight is None else torch.as_tensor(sample_weight)
        if weight.shape != (count,) or not bool((weight >= 0).all()) or not float(weight.sum()) > 0:
            raise ValueError(
                f"sample_weight has shape {tuple(weight.shape)}; expected ({count},) numbers ≥ 0, not all of them 0."
            )
        rows = weight.double()
        weight = rows / rows.mean()
        least = min(1 / (2 * count + 4), 0.02) if least_share is None else least_share
        as_it_is = cls(1.0, least)
        log_density, divergence = (torch.cat(each, 1) for each in zip(*map(_powers, parts, targets), strict=True))
        loss = {
            (power, share): -_log_calibrated(tempered, share)
            for power, tempered in zip(POWERS, log_density, strict=True)
            for share in (least, *(share for share in BASE_WEIGHTS if share > least))
        }
        cost = dict(zip(POWERS, divergence.mean(1).tolist(), strict=True))

        def penalised(pair: tuple[float, float]) -> float:
            # KL(p || p_tε) ≤ KL(p || p_t) - log(1 - ε)
            return float((rows * loss[pair]).sum()) + prior * (cost[pair[0]] - math.log1p(-pair[1]))

        best = min(loss, key=penalised)
        gain = weight * (loss[1.0, least] - loss[best])
        if not bool(gain.isfinite().all()) or count < 2:
            return as_it_is
        if not float(gain.mean()) > float(gain.std()) / math.sqrt(count):
            return as_it_is
        ends = {"inverse temperature": (POWERS[0], POWERS[-1]), "weight of the base": BASE_WEIGHTS[-1:]}
        for (name, last), value in zip(ends.items(), best, strict=True):
            if value in last:
                warnings.warn(
                    f"The calibration chose the {name} {value:.3g} by {count} held-out rows, the end of what it tries: "
                    "the model is far from calibrated. Look at its scores on these rows, and train it longer or with "
                    "other settings.",
                    stacklevel=2,
                )
        return cls(*best)

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
        super().__init__(self._mixed, p.num_rows, p.space, p.integrator, **p.settings)

    def select(self, rows: Any) -> PredictiveDistribution:
        """The distribution of some rows, which computes its own nodes."""
        return type(self)(self.uncalibrated.select(rows), self.calibration)

    def _mixed(self, rows: Rows) -> CalibratedEnergy:
        inner, t = self.uncalibrated.energy(rows), self.calibration.inverse_temperature
        return CalibratedEnergy(inner, t, self.calibration.base_share, self._log_tempered()[rows])

    def _log_tempered(self) -> Tensor:
        """Log of the integral of the tempered density, (B,); computed once, for all rows."""
        if self._tempered is None:
            p, t = self.uncalibrated, self.calibration.inverse_temperature
            if t == 1:
                self._tempered = p.log_partition
            elif _by_quadrature(p):
                self._tempered = p.with_energy(lambda rows: CalibratedEnergy(p.energy(rows), t)).log_partition
            else:

                def log_tempered(block: RowBlock) -> Tensor:
                    log_weights, relative, log_p0 = _weights_and_relative(block)
                    change = _tempered(relative, _surplus(log_p0, block.f.reference), t) - relative
                    return t * block.log_partition + (log_weights + change).logsumexp(0)

                self._tempered = p.gather(log_tempered)
        return self._tempered

    def num_points(self) -> int:
        added = 0 if _by_quadrature(self) or self.calibration.base_share == 0 else BASE_POINTS
        return self.uncalibrated.num_points() + added

    def integrate(self, f: Any, rows: slice) -> Nodes:
        if _by_quadrature(self):
            return super().integrate(f, rows)
        p, t, weight = self.uncalibrated, self.calibration.inverse_temperature, self.calibration.base_share
        block = p.block(rows)
        log_weights, relative, log_p0 = _weights_and_relative(block)
        log_weights = (log_weights + _tempered(relative, _surplus(log_p0, f.reference), t) - relative).log_softmax(0)
        y, independent = block.nodes.y, block.nodes.independent
        if weight == 0:
            return WeightedPoints(y, log_weights.to(self.dtype), independent)
        # The samples would hardly ever fall where only the base has density; so it gets points of its own.
        sobol = torch.quasirandom.SobolEngine(self.dim, scramble=True, seed=self.seed)
        unit = sobol.draw(BASE_POINTS, dtype=torch.double).clamp(1e-7, 1 - 1e-7).to(self.device, self.dtype)
        of_base = f.reference.from_unit(unit[:, None]).expand(-1, f.batch_size, -1)
        log_weight = log_weights.new_full((BASE_POINTS, f.batch_size), math.log(weight / BASE_POINTS))
        both = torch.cat([log_weights + math.log1p(-weight), log_weight])
        points = torch.cat([y.expand(-1, f.batch_size, -1).to(self.dtype), of_base.to(self.dtype)])
        return WeightedPoints(points, both.to(self.dtype), independent)


def _by_quadrature(p: PredictiveDistribution) -> bool:
    return isinstance(p.integrator, (AdaptiveQuadrature, StratifiedQuadrature))


def log_floor(reference: Any) -> Tensor:
    """Log of the density that a reference has where the training targets end, shape ().

    In each dimension the lower of those at its two ends, while the other dimensions are at their medians.
    """
    dim = len(reference.periodic)
    at = torch.full((2 * dim + 1, 1, dim), 0.5, device=next(reference.buffers()).device)
    for d in range(dim):
        at[2 * d, 0, d], at[2 * d + 1, 0, d] = ENDS, 1 - ENDS
    log_p0 = reference.log_prob(reference.from_unit(at))[:, 0]
    return log_p0[-1] + (log_p0[:-1].reshape(dim, 2).amin(1) - log_p0[-1]).sum()


def _surplus(log_p0: Tensor, reference: Any) -> Tensor:
    """By how much the floor raises the reference, log(1 + c / p₀), from log p₀."""
    return functional.softplus(log_floor(reference).to(log_p0.dtype) - log_p0)


def _tempered(relative: Tensor, surplus: Tensor | None, t: float) -> Tensor:
    """Log of the tempered density relative to p₀, up to log Z, from that of the density; for t > 1 above the floor."""
    return t * relative if t <= 1 or surplus is None else t * relative - (t - 1) * surplus


def _weights_and_relative(block: RowBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised log-weights of the nodes, their log-density relative to p₀, and log p₀; (M, B) each, in double."""
    log_weights = block.nodes.log_weights.double().log_softmax(0)
    z = block.nodes.y.to(block.dtype)
    log_p0 = block.f.reference.log_prob(z).double()
    jacobian = block.space.log_abs_det_jacobian(block.space.to_user(z)) + log_p0
    relative = block.point_density().double() - block.log_partition.double() - jacobian
    # A point of no weight stays one, whatever the power.
    return log_weights, torch.where(log_weights > -torch.inf, relative, torch.zeros_like(relative)), log_p0


def _log_calibrated(log_density: Tensor, share: float) -> Tensor:
    if share == 0:
        return log_density
    return torch.logaddexp(log_density + math.log1p(-share), torch.full_like(log_density, math.log(share)))


def _targets_of(parts: Sequence[PredictiveDistribution], y: Any) -> list[Tensor]:
    """The targets of each of some distributions, from those of all their rows one after the other."""
    if len(parts) == 1:
        return [parts[0].as_targets(y)]
    y, counts = torch.as_tensor(y), [part.num_rows for part in parts]
    if y.ndim == 0 or len(y) != sum(counts):
        raise ValueError(
            f"y has shape {tuple(y.shape)}; expected targets of {sum(counts)} rows, all those of {len(parts)} "
            "distributions."
        )
    return [part.as_targets(values) for part, values in zip(parts, y.split(counts), strict=True)]


def _powers(p: PredictiveDistribution, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each power of p: log-density at the targets relative to p₀, and the divergence of p from it, (P, B) both."""

    def columns(block: RowBlock) -> Tensor:
        nodes, reference, z = block.nodes, block.f.common, p.space.to_model(y[block.rows]).to(p.dtype)
        log_p0 = reference.log_prob(z)
        at_target, log_p0 = (block.f(z) - log_p0).double(), log_p0.double()
        if isinstance(nodes, Cells):
            log_z = nodes.log_masses.double().logsumexp(0)
            log_weights, at_target = nodes.log_masses.double() - log_z, at_target - log_z
            node_log_p0 = reference.log_prob(nodes.y.to(p.dtype)).double()
            relative = nodes.log_density(block.f).double() - log_z - node_log_p0
        else:
            log_weights, relative, node_log_p0 = _weights_and_relative(block)
            at_target = at_target - block.log_partition.double()
        surplus, node_surplus = _surplus(log_p0, reference), _surplus(node_log_p0, reference)
        found, masses = [], log_weights.exp()
        for t in POWERS:
            change = _tempered(relative, node_surplus, t) - relative
            log_z = (log_weights + change).logsumexp(0)
            divergence = log_z - torch.where(masses > 0, masses * change, 0.0).sum(0)
            found += [_tempered(at_target, surplus, t) - log_z, divergence]
        return torch.stack(found, -1)

    both = p.gather(columns).cpu().T
    return both[::2], both[1::2]
