r"""Base measures: the reference that the energy is relative to, f(x, y) = log p₀(y) + g(x, y).

Heads never see y itself but its *unit coordinates* under the base, u = F₀(y) in (0, 1) per dimension, scaled to
v = 2u - 1. There g is a continuous function on a bounded set, so it is bounded: Z(x) is finite, the tails are those of
the base, and the importance weights relative to it are exp g. The same coordinates carry the quadrature:

.. math:: Z = \int_{(0,1)^D} e^{g} du

All of this happens in model space (see :mod:`energyreg.densities.spaces`), where periodic dimensions are angles in [-π,
π).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from energyreg.densities.angles import periodic_flags

__all__ = ["Lebesgue", "Marginal", "ProposalBase", "ProposalReference"]


class Lebesgue(nn.Module):
    """The Lebesgue measure on a window around the training targets, as in the papers, where f has no base.

    On all of R^D an energy that is bounded has no finite partition function; the papers evaluate theirs on a grid over
    a fixed range, which is this window. Outside it the density is zero. Periodic dimensions use the whole circle.

    Args:
        dim: Target dimensions D.
        periodic: Whether each dimension is an angle; none by default.
        margin: How far the window reaches beyond the smallest and largest training target, relative to their range.

    Raises:
        ValueError: If dim < 1, periodic has another length than dim, or margin is negative.
    """

    low: Tensor
    high: Tensor
    fitted: Tensor

    def __init__(self, dim: int = 1, periodic: Sequence[bool] | None = None, margin: float = 0.5) -> None:
        super().__init__()
        if not margin >= 0:
            raise ValueError(f"margin is {margin}; expected a number ≥ 0.")
        self.dim, self.periodic, self.margin = dim, periodic_flags(dim, periodic), margin
        bound = torch.tensor([math.pi if flag else 4.0 for flag in self.periodic])
        self.register_buffer("low", -bound)
        self.register_buffer("high", bound.clone())
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, z: Tensor, window: Tensor | None = None) -> None:
        """Set the window from the training targets in model space, shape (N, D).

        Args:
            z: The targets.
            window: The first and the last model value that stand for a target, shape (2, D): it ends there at the
                latest (see :func:`energyreg.densities.ends.window`).
        """
        smallest, largest = z.amin(0), z.amax(0)
        reach = self.margin * (largest - smallest).clamp_min(1e-6)
        angle = torch.tensor(self.periodic, device=z.device)
        self.low.copy_(torch.where(angle, torch.full_like(smallest, -math.pi), smallest - reach))
        self.high.copy_(torch.where(angle, torch.full_like(largest, math.pi), largest + reach))
        if window is not None:
            first, last = window.to(self.low)
            self.low.copy_(torch.maximum(self.low, first))
            self.high.copy_(torch.minimum(self.high, last))
        self.fitted.fill_(True)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of the uniform distribution on the window, (*S, D) to (*S,); -inf outside."""
        inside = ((z >= self.low) & (z <= self.high)).all(-1)
        log_volume = (self.high - self.low).log().sum()
        return torch.where(inside, -log_volume, torch.full_like(log_volume, -torch.inf))

    def to_unit(self, z: Tensor) -> Tensor:
        """Unit coordinates in [0, 1], (*S, D) to (*S, D); points outside are moved to the border."""
        return ((z - self.low) / (self.high - self.low)).clamp(0, 1)

    def from_unit(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`to_unit`."""
        return self.low + u * (self.high - self.low)


class Marginal(nn.Module):
    r"""The smooth marginal distribution of the training targets, with full support: a product over dimensions.

    Each dimension is a mixture of Gaussians centred at equally spaced quantiles of the targets, plus a broad logistic
    component for the tails (on a circle: wrapped Gaussians plus the uniform). It is tabulated once, and read by cubic
    Hermite interpolation of the cdf and of the log-density, so that its price does not depend on the number of
    components and both are differentiable in y.

    Slabs are for values that many rows share, such as a steering of exactly 0, after they were spread over a cell
    (dequantised): each is a uniform component as heavy as its share of the training targets, so that the density has
    its two edges exactly, and in the unit coordinates a slab is as wide as it is probable.

    Args:
        dim: Target dimensions D.
        periodic: Whether each dimension is an angle; none by default.
        num_components: Gaussians per dimension.
        broad_share: Weight of the broad component, in (0, 1).
        broad_scale: Standard deviation of the broad component, relative to the targets'.
        num_knots: Size of the table.
        slabs: Ends (low, high) of each slab, in model space, disjoint; for one dimension that is no angle.

    Raises:
        ValueError: If an argument is out of its range.

    >>> base = Marginal()
    >>> base.fit(torch.linspace(-1, 1, 100)[:, None])
    >>> u = torch.tensor([[0.1], [0.5], [0.9]])
    >>> base.to_unit(base.from_unit(u)).round(decimals=4).T
    tensor([[0.1000, 0.5000, 0.9000]])
    """

    fitted: Tensor
    start: Tensor
    step: Tensor
    cdf_table: Tensor
    pdf_table: Tensor
    log_pdf_table: Tensor
    slope_table: Tensor
    slab_ends: Tensor
    slab_shares: Tensor

    def __init__(
        self,
        dim: int = 1,
        periodic: Sequence[bool] | None = None,
        num_components: int = 64,
        broad_share: float = 0.04,
        broad_scale: float = 2.0,
        num_knots: int = 4096,
        slabs: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__()
        if num_components < 1:
            raise ValueError(f"num_components is {num_components}; expected at least 1.")
        if not 0 < broad_share < 1:
            raise ValueError(f"broad_share is {broad_share}; expected a number in (0, 1): the tails need some of it.")
        if not broad_scale > 0:
            raise ValueError(f"broad_scale is {broad_scale}; expected a number > 0.")
        if num_knots < 256:
            raise ValueError(f"num_knots is {num_knots}; expected at least 256.")
        if num_components > num_knots:
            raise ValueError(f"num_components is {num_components}; expected at most num_knots, {num_knots}.")
        self.dim, self.periodic = dim, periodic_flags(dim, periodic)
        self.num_components, self.broad_share, self.broad_scale = num_components, broad_share, broad_scale
        self.num_knots = num_knots
        self.slabs = _check_slabs(slabs, self.periodic)
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("start", torch.zeros(dim))
        self.register_buffer("step", torch.ones(dim))
        for name in ("cdf_table", "pdf_table", "log_pdf_table", "slope_table"):
            self.register_buffer(name, torch.zeros(dim, num_knots + 1))
        if self.slabs:
            self.register_buffer("slab_ends", torch.tensor(self.slabs))
            self.register_buffer("slab_shares", torch.zeros(len(self.slabs)))
        if self.start.is_meta:  # sizes without values, as `energyreg.load` asks for them first
            return
        # A standard normal target until `fit`, so that an unfitted model is a model too.
        normal = torch.special.ndtri((torch.arange(512, dtype=torch.double) + 0.5) / 512)
        circle = (torch.arange(512, dtype=torch.double) + 0.5) / 512 * 2 * math.pi - math.pi
        standard = torch.stack([circle if flag else normal for flag in self.periodic], -1)
        self._tabulate(standard, standard)

    def fit(self, z: Tensor, window: Tensor | None = None) -> None:
        """Tabulate the marginals of the training targets in model space, shape (N, D), which need no window."""
        z = z.detach().double().cpu()
        self._tabulate(self._fit_slabs(z) if self.slabs else z, z)
        self.fitted.fill_(True)

    @torch.no_grad()
    def _fit_slabs(self, z: Tensor) -> Tensor:
        """Set the slabs' shares; return the targets that lie in none, which the smooth part is made of."""
        low, high = torch.tensor(self.slabs, dtype=torch.double).unbind(1)
        inside = (z >= low) & (z <= high)
        shares = inside.double().mean(0)
        # The smooth part must reach everywhere, also where all targets are point masses.
        most = 1 - self.broad_share
        self.slab_shares.copy_(shares * (most / shares.sum().clamp_min(most)))
        others = z[~inside.any(1)]
        return others if len(others) > 1 else z

    @torch.no_grad()
    def _tabulate(self, z: Tensor, everything: Tensor) -> None:
        """Tabulate the smooth part: Gaussians on the targets z that lie in no slab, tails as wide as all targets."""
        for d in range(self.dim):
            build = self._circle_table if self.periodic[d] else self._line_table
            start, stop, cdf, pdf, slope = build(z[:, d], everything[:, d])
            self.start[d] = start
            self.step[d] = (stop - start) / self.num_knots
            self.cdf_table[d], self.pdf_table[d] = cdf, pdf
            self.log_pdf_table[d], self.slope_table[d] = pdf.log(), slope

    def _components(self, z: Tensor, everything: Tensor) -> tuple[Tensor, Tensor]:
        levels = (torch.arange(self.num_components, dtype=torch.double) + 0.5) / self.num_components
        # torch.quantile refuses more than 16 million values; sorting is as good here.
        ordered = z.sort().values
        position = levels * (len(z) - 1)
        lower = position.floor().long()
        upper = (lower + 1).clamp_max(len(z) - 1)
        centres = torch.lerp(ordered[lower], ordered[upper], position - lower)
        spread = z.std().clamp_min(1e-6)
        # The floor is wider for few targets, whose quantiles lie close together at random.
        floor = spread * max(0.05, 0.5 * len(z) ** -0.2)
        # The few targets outside of slabs may lie close together: no component is finer than the table.
        floor = torch.maximum(floor, 0.03 * everything.std())
        gaps = torch.gradient(centres)[0] if self.num_components > 1 else spread[None]
        return centres, 1.5 * torch.maximum(gaps, floor.expand_as(gaps))

    def _line_table(self, z: Tensor, everything: Tensor) -> tuple[float, float, Tensor, Tensor, Tensor]:
        centres, scales = self._components(z, everything)
        middle = everything.mean()
        broad = self.broad_scale * everything.std().clamp_min(1e-6) * math.sqrt(3) / math.pi
        # Beyond 20 scales the logistic tail is a straight line in log space, which the interpolation continues exactly.
        start = float(min((centres - 8 * scales).min(), middle - 20 * broad))
        stop = float(max((centres + 8 * scales).max(), middle + 20 * broad))
        knots = torch.linspace(start, stop, self.num_knots + 1, dtype=torch.double)
        t = (knots[:, None] - centres) / scales
        gaussian = (-0.5 * t.square()).exp() / (scales * math.sqrt(2 * math.pi))
        share = (1 - self.broad_share) / self.num_components
        logistic = torch.sigmoid((knots - middle) / broad)
        tail = self.broad_share * logistic * torch.sigmoid((middle - knots) / broad) / broad
        cdf = share * torch.special.ndtr(t).sum(1) + self.broad_share * logistic
        pdf = share * gaussian.sum(1) + tail
        slope = (share * (-t / scales * gaussian).sum(1) + tail * (1 - 2 * logistic) / broad) / pdf
        return start, stop, cdf, pdf, slope

    def _circle_table(self, z: Tensor, everything: Tensor) -> tuple[float, float, Tensor, Tensor, Tensor]:
        centres, scales = self._components(z, everything)
        knots = torch.linspace(-math.pi, math.pi, self.num_knots + 1, dtype=torch.double)
        share = (1 - self.broad_share) / self.num_components
        cdf = self.broad_share * (knots + math.pi) / (2 * math.pi)
        pdf = torch.full_like(knots, self.broad_share / (2 * math.pi))
        derivative = torch.zeros_like(knots)
        for turn in range(-3, 4):
            t = (knots[:, None] - centres - 2 * math.pi * turn) / scales
            gaussian = (-0.5 * t.square()).exp() / (scales * math.sqrt(2 * math.pi))
            cdf = cdf + share * (torch.special.ndtr(t) - torch.special.ndtr(t[:1])).sum(1)
            pdf = pdf + share * gaussian.sum(1)
            derivative = derivative + share * (-t / scales * gaussian).sum(1)
        return -math.pi, math.pi, cdf / cdf[-1], pdf, derivative / pdf

    def _locate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the knot below in the flattened tables, position between the knots, clamped and not."""
        position = (z - self.start) / self.step
        index = position.detach().floor().clamp(0, self.num_knots - 1)
        offset = torch.arange(self.dim, device=z.device) * (self.num_knots + 1)
        # NaN has no index: it takes the first knot and comes out as NaN.
        return index.nan_to_num(0.0).long() + offset, (position - index).clamp(0, 1), position - index

    @staticmethod
    def _hermite(table: Tensor, slope: Tensor, index: Tensor, t: Tensor, step: Tensor) -> Tensor:
        table, slope = table.reshape(-1), slope.reshape(-1)
        y0, y1 = table[index], table[index + 1]
        m0, m1 = slope[index] * step, slope[index + 1] * step
        return y0 + t * (m0 + t * (3 * (y1 - y0) - 2 * m0 - m1 + t * (2 * (y0 - y1) + m0 + m1)))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats, (*S, D) to (*S,)."""
        smooth = self._log_prob(*self._locate(z))
        if not self.slabs:
            return smooth
        low, high = self.slab_ends.unbind(1)
        heights = torch.where((z >= low) & (z <= high), self.slab_shares / (high - low), 0.0).sum(-1)
        return torch.logaddexp(smooth + self._smooth_share.log(), heights.log())

    @property
    def _smooth_share(self) -> Tensor:
        return 1 - self.slab_shares.sum()

    def _log_prob(self, index: Tensor, inside: Tensor, t: Tensor) -> Tensor:
        value = self._hermite(self.log_pdf_table, self.slope_table, index, inside, self.step)
        beyond = (
            (t - inside)
            * self.step
            * torch.where(t < 0, self.slope_table[:, 0].expand_as(t), self.slope_table[:, -1].expand_as(t))
        )
        return (value + torch.where(t == inside, torch.zeros_like(beyond), beyond)).sum(-1)

    def to_unit(self, z: Tensor) -> Tensor:
        """Unit coordinates u = F₀(z), strictly monotone inside the table, (*S, D) to (*S, D) in [0, 1]."""
        smooth = self._smooth_unit(z)
        if not self.slabs:
            return smooth
        low, high = self.slab_ends.unbind(1)
        below = (self.slab_shares * ((z - low) / (high - low)).clamp(0, 1)).sum(-1, keepdim=True)
        return (self._smooth_share * smooth + below).clamp(0, 1)

    @property
    def breaks(self) -> Tensor | None:
        """Unit coordinates where the density jumps, at the ends of the slabs, ascending; None without any."""
        return self.to_unit(self.slab_ends.reshape(-1, 1))[:, 0].detach() if self.slabs else None

    def _unit(self, index: Tensor, inside: Tensor) -> Tensor:
        return self._hermite(self.cdf_table, self.pdf_table, index, inside, self.step).clamp(0, 1)

    @torch.no_grad()
    def from_unit(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`to_unit`: quantiles of the marginals, (*S, D) to (*S, D)."""
        return self._from_unit_with_slabs(u) if self.slabs else self._from_unit(u)

    def _from_unit_with_slabs(self, u: Tensor) -> Tensor:
        """The same by pieces: between two slabs the smooth part's quantile, within one Newton's method."""
        share, ends, slabs = self._smooth_share, self.slab_ends, self.slab_shares
        cumulative = slabs.cumsum(0)
        before = cumulative - slabs
        low, high = ends.unbind(1)
        smooth = share * self._smooth_unit(ends.reshape(-1, 1)).reshape(-1, 2)
        first, last = smooth[:, 0] + before, smooth[:, 1] + cumulative  # u at the ends of each slab
        passed = (slabs * (u >= last)).sum(-1, keepdim=True)
        z = self._from_unit(((u - passed) / share).clamp(0, 1))
        for k in range(len(self.slabs)):
            within = (u > first[k]) & (u < last[k])
            width = high[k] - low[k]
            t = ((u - first[k]) / (last[k] - first[k])).clamp(0, 1)
            for _ in range(4):  # from the linear guess: the smooth part is close to a line within a slab
                place = low[k] + t * width
                index, inside, _ = self._locate(place)
                residual = share * self._unit(index, inside) + before[k] + slabs[k] * t - u
                slope = share * self._log_prob(index, inside, inside).exp()[..., None] * width + slabs[k]
                t = (t - residual / slope).clamp(0, 1)
            z = torch.where(within, low[k] + t * width, z)
        return z

    def _smooth_unit(self, z: Tensor) -> Tensor:
        index, inside, _ = self._locate(z)
        return self._unit(index, inside)

    @torch.no_grad()
    def _from_unit(self, u: Tensor) -> Tensor:
        columns = []
        for d in range(self.dim):
            table, pdf = self.cdf_table[d], self.pdf_table[d]
            value = u[..., d].contiguous()
            index = (torch.searchsorted(table, value, right=True) - 1).clamp(0, self.num_knots - 1)
            y0, y1 = table[index], table[index + 1]
            m0, m1 = pdf[index] * self.step[d], pdf[index + 1] * self.step[d]
            tiny = torch.finfo(table.dtype).tiny
            t = ((value - y0) / (y1 - y0).clamp_min(tiny)).clamp(0, 1)
            for _ in range(3):  # Newton on the interpolant that `to_unit` reads, from the linear guess
                a, b = 3 * (y1 - y0) - 2 * m0 - m1, 2 * (y0 - y1) + m0 + m1
                residual = y0 + t * (m0 + t * (a + t * b)) - value
                t = (t - residual / (m0 + t * (2 * a + 3 * t * b)).clamp_min(tiny)).clamp(0, 1)
            columns.append(self.start[d] + (index + t) * self.step[d])
        return torch.stack(columns, -1)


def _check_slabs(slabs: Sequence[Sequence[float]], periodic: Sequence[bool]) -> tuple[tuple[float, float], ...]:
    found = sorted((float(low), float(high)) for low, high in slabs)
    if found and (len(periodic) != 1 or periodic[0]):
        raise ValueError(
            f"slabs are given for {len(periodic)} dimension(s) with periodic={tuple(periodic)}; expected one dimension "
            "that is no angle."
        )
    for low, high in found:
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"slabs has ({low}, {high}); expected finite ends with low < high.")
    for (_, high), (low, _) in itertools.pairwise(found):
        if low < high:
            raise ValueError(f"slabs overlap between {low} and {high}; expected disjoint ones.")
    return tuple(found)


class ProposalBase(nn.Module):
    r"""The learned proposal q(y|x) as the base: f(x, y) = log q(y|x) + g(x, y). The model starts as the proposal.

    The head's coordinates are those of the reference, the same for all x, or those of the target *standardised* by
    the proposal's mean and standard deviation in each dimension:

    .. math:: v = \frac{t}{\sqrt{2 + t^2}}, \qquad t = \frac{y - E_q[y|x]}{\sqrt{Var_q[y|x]}}

    (2 F(t) - 1 with F the cdf of Student's t with two degrees of freedom.) Then g is a correction of the proposal's
    shape, of which few rows say enough, while the proposal says where the target is. With `detach` the proposal, and an
    encoder that it shares with the head, learn as they would without the head. A separable head takes several times as
    long then, as no two rows share their coordinates.

    Args:
        reference: Unconditional measure that gives the head its coordinates and the quadrature its nodes. The marginal
            of the training targets by default (one dimension; pass another for more).
        detach: Whether f sees q as given. Then the likelihood of f trains only g, and q needs an objective of its own
            (its likelihood, or J_KL). Trials on small tables favour this.
        standardised: Whether the head sees the target standardised by the proposal, which must have a mean and a
            variance then. The coordinates carry no gradient to the proposal where `detach` is true.

    Raises:
        ValueError: If standardised is true and a dimension is an angle.
    """

    def __init__(
        self, reference: Marginal | Lebesgue | None = None, detach: bool = True, standardised: bool = False
    ) -> None:
        super().__init__()
        self.reference = Marginal() if reference is None else reference
        self.detach, self.standardised = detach, standardised
        if standardised and any(self.reference.periodic):
            raise ValueError(
                f"standardised is True, but the reference has periodic={self.reference.periodic}; an angle has no "
                "standard deviation to measure by."
            )

    @property
    def dim(self) -> int:
        """Target dimensions D."""
        return self.reference.dim

    @property
    def periodic(self) -> tuple[bool, ...]:
        """Whether each dimension is an angle."""
        return self.reference.periodic

    @property
    def fitted(self) -> Tensor:
        """Whether the reference has seen the training targets."""
        return self.reference.fitted

    def fit(self, z: Tensor, window: Tensor | None = None) -> None:
        """Fit the reference to the training targets in model space, shape (N, D)."""
        self.reference.fit(z, window)


class ProposalReference(ProposalBase):
    r"""The learned proposal as the base *and* as the reference: the head sees the target in the proposal's own cdf.

    .. math:: f(x, y) = \log q(y|x) + g(x, u), \qquad u = F_q(y|x), \qquad Z(x) = \int_0^1 e^{g(x, u)} du

    As with :class:`ProposalBase` the model starts as the proposal. But the nodes of Z are the same u for all rows, so
    that a separable head takes one matrix product for them, however narrow q(y|x) is; and g says how the shape of q
    is to change, wherever the target is. For one dimension, and a proposal that is a
    :class:`~energyreg.densities.mixtures.GaussianMixture`.

    Args:
        reference: What the densities of several such models have in common, for their mixture, for calibration and for
            chains: the marginal of the training targets by default.
        detach: Whether f sees q as given; see :class:`ProposalBase`.

    Raises:
        ValueError: If the reference has more than one dimension.
    """

    def __init__(self, reference: Marginal | Lebesgue | None = None, detach: bool = True) -> None:
        super().__init__(reference, detach)
        if self.reference.dim != 1:
            raise ValueError(
                f"reference has {self.reference.dim} dimensions; expected one. The cdf of the proposal gives unit "
                "coordinates in one dimension only: use ProposalBase, or a chain of one-dimensional factors."
            )
