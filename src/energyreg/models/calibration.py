r"""Calibration after training: temperature and a defensive mixture weight of the base.

A density that overfits is too sharp, and has holes where a test point may fall. Both are repaired on rows that the
training has not seen, by two numbers:

.. math:: p(y|x) = (1 - ε) \frac{p_0(y) \, r(x, y)^t}{\int p_0(y') \, r(x, y')^t \, dy'} + ε \, p_0(y),
   \qquad r(x, y) = \frac{p_\text{model}(y|x)}{p_0(y)}

where p₀ is the reference measure, the smooth marginal of the training targets (of several outputs: the product of
theirs). t multiplies the energy relative to it:
0 is the marginal, 1 the model. So it is the same in whatever units y is measured, the tails stay p₀'s, and Z is finite;
where p(y|x) is almost as wide as p₀, t shifts it towards p₀ (or away), too, as a shrinkage does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.inference.cells import Cells
from energyreg.inference.energy import ReferencedEnergy
from energyreg.inference.integrators import AdaptiveQuadrature, StratifiedQuadrature
from energyreg.inference.nodes import Nodes
from energyreg.inference.points import WeightedPoints
from energyreg.inference.row_blocks import RowBlock, Rows
from energyreg.models.conformal import ConformalIntervals, ConformalRegions
from energyreg.models.predictive import PredictiveDistribution

__all__ = ["Calibration", "ConformalIntervals", "ConformalRegions"]

POWERS = tuple(2 ** (i / 14) for i in range(-14, 15))
"""Inverse temperatures that are tried, from 1/2 to 2."""
SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
"""Shares of the base that are tried, besides the least one."""
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
        targets = p.as_targets(y)
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
                    log_weights, relative = _weights_and_relative(block)
                    return t * block.log_partition + (log_weights + (t - 1) * relative).logsumexp(0)

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
        log_weights, relative = _weights_and_relative(block)
        log_weights = (log_weights + (t - 1) * relative).log_softmax(0)
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


def _weights_and_relative(block: RowBlock) -> tuple[Tensor, Tensor]:
    """Normalised log-weights of the nodes and their log-density relative to the reference, (M, B) both, in double."""
    log_weights = block.nodes.log_weights.double().log_softmax(0)
    z = block.nodes.y.to(block.dtype)
    jacobian = block.space.log_abs_det_jacobian(block.space.to_user(z)) + block.f.reference.log_prob(z).double()
    relative = block.point_density().double() - block.log_partition.double() - jacobian
    # A point of no weight stays one, whatever the power.
    return log_weights, torch.where(log_weights > -torch.inf, relative, torch.zeros_like(relative))


def _log_calibrated(log_density: Tensor, share: float) -> Tensor:
    if share == 0:
        return log_density
    return torch.logaddexp(log_density + math.log1p(-share), torch.full_like(log_density, math.log(share)))


def _tempered(p: PredictiveDistribution, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of p at the targets relative to the reference, (B,), and log Z of each power of it, (P, B)."""

    def columns(block: RowBlock) -> Tensor:
        nodes, z = block.nodes, p.space.to_model(y[block.rows]).to(p.dtype)
        at_target = (block.f(z) - block.f.reference.log_prob(z)).double()
        if isinstance(nodes, Cells):
            log_z = nodes.log_masses.double().logsumexp(0)
            log_weights = nodes.log_masses.double() - log_z
            relative, at_target = log_weights - nodes.log_widths, at_target - log_z
        else:
            log_weights, relative = _weights_and_relative(block)
            at_target = at_target - block.log_partition.double()
        log_zs = torch.stack([(log_weights + (t - 1) * relative).logsumexp(0) for t in POWERS])
        return torch.cat([at_target[None], log_zs]).T

    both = p.gather(columns).cpu().T
    return both[0], both[1:]
