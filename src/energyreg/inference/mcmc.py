"""Markov chain Monte Carlo: Langevin and MALA chains on an energy, their convergence, and the points that they give.

A chain needs f and its gradient in y, and neither a normaliser nor a proposal, so it serves any number of dimensions.
What it cannot give is log Z. A sampler here is a pure step; the loops around it are small frozen objects. All chains of
all rows take their steps together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.checks import check_count
from energyreg.densities.angles import wrap_angles
from energyreg.densities.mixtures import draw
from energyreg.inference.energy import AnyEnergy, periodic_of
from energyreg.inference.mcmc_diagnostics import effective_sample_size, rhat
from energyreg.inference.points import WeightedPoints
from energyreg.randomness import random_like

__all__ = [
    "Langevin",
    "MALA",
    "Chains",
    "MALAState",
    "langevin_step",
    "mala_init",
    "mala_step",
    "rhat",
    "effective_sample_size",
]


def _check_step_size(step_size: float | Sequence[float] | Tensor, most_dims: int = 3) -> None:
    steps = torch.as_tensor(step_size)
    if not steps.numel() or steps.ndim > most_dims or not (steps.gt(0) & steps.isfinite()).all():
        raise ValueError(f"step_size is {step_size}; expected a finite number > 0, or one per dimension.")


def _check_noise_scale(noise_scale: float) -> None:
    if not 0 <= noise_scale < math.inf:
        raise ValueError(f"noise_scale is {noise_scale}; expected a finite number ≥ 0.")


def _steps(step_size: float | Sequence[float] | Tensor, y: Tensor) -> Tensor:
    """The step sizes as a tensor that multiplies y, with a check of its length."""
    steps = torch.as_tensor(step_size, dtype=y.dtype, device=y.device)
    if steps.ndim and steps.shape[-1] not in (1, y.shape[-1]):
        raise ValueError(
            f"step_size has {steps.shape[-1]} entries, but y has {y.shape[-1]} dimensions; pass a number, or one per "
            "dimension."
        )
    return steps


def _mask(angles: tuple[bool, ...], y: Tensor) -> Tensor | None:
    return torch.tensor(angles, device=y.device) if any(angles) else None


def _wrap(y: Tensor, angle: Tensor | None) -> Tensor:
    return y if angle is None else wrap_angles(y, angle)


class MALAState(NamedTuple):
    """Where the chains are.

    Attributes:
        y: Positions, shape (C, B, D).
        value: f there, shape (C, B).
        gradient: Its gradient, shape (C, B, D).
    """

    y: Tensor
    value: Tensor
    gradient: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether f and its gradient are finite, shape (C, B)."""
        return self.value.isfinite() & self.gradient.isfinite().all(-1)


def mala_init(f: AnyEnergy, y: Tensor) -> MALAState:
    """Evaluate f and its gradient in y alone: no graph is kept, and no parameter of f gets a gradient.

    Args:
        f: AnyEnergy, (C, B, D) to (C, B).
        y: Positions, shape (C, B, D).

    Returns:
        The state from which :func:`mala_step` goes on. The gradient is zero if f does not depend on y.

    Raises:
        ValueError: If f returns another shape than (C, B).
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        value = f(y)
        if value.shape != y.shape[:-1]:
            raise ValueError(
                f"f returned shape {tuple(value.shape)} for y of shape {tuple(y.shape)}; expected "
                f"{tuple(y.shape[:-1])}, one value per point."
            )
        gradient = torch.autograd.grad(value.sum(), y, allow_unused=True)[0] if value.requires_grad else None
    y = y.detach()
    return MALAState(y, value.detach(), torch.zeros_like(y) if gradient is None else gradient)


def _move(
    state: MALAState, step: Tensor, noise_scale: float, angle: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    noise = random_like(torch.randn, state.y.shape, state.y, generator)
    return _wrap(state.y + step.square() / 2 * state.gradient + noise_scale * step * noise, angle)


def langevin_step(
    f: AnyEnergy,
    y: Tensor,
    step_size: float | Sequence[float] | Tensor,
    *,
    noise_scale: float = 1.0,
    periodic: Sequence[bool] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""One step of the unadjusted Langevin algorithm.

    .. math:: y' = y + \frac{\lambda^2}{2} \nabla_y f(y) + \lambda \epsilon, \quad \epsilon \sim N(0, I)

    Args:
        f: AnyEnergy, (M, B, D) to (M, B).
        y: Positions, shape (M, B, D).
        step_size: λ, a number, one per dimension, or a tensor that broadcasts to (M, B, D).
        noise_scale: Factor of the noise; 1 for samples of exp f, 0 for gradient ascent.
        periodic: Whether each dimension is an angle, wrapped to [-π, π), where f does not say it; see
            :func:`~energyreg.inference.energy.periodic_of`.
        generator: Source of randomness; torch's global one by default.

    Returns:
        The next positions, without gradient, shape (M, B, D).

    Raises:
        ValueError: If step_size ≤ 0 or has another length than D, or noise_scale < 0.

    Source:
        Gustafsson et al., "How to train your energy-based model for regression", BMVC 2020 (ML-MCMC).

    >>> langevin_step(lambda y: -y.square().sum(-1) / 2, torch.ones(1, 1, 2), 1.0, noise_scale=0.0)
    tensor([[[0.5000, 0.5000]]])
    """
    _check_step_size(step_size)
    _check_noise_scale(noise_scale)
    angle = _mask(periodic_of(f, y.shape[-1], periodic), y)
    return _move(mala_init(f, y), _steps(step_size, y), noise_scale, angle, generator)


def _mala_step(
    f: AnyEnergy, state: MALAState, step: Tensor, angle: Tensor | None, generator: torch.Generator | None
) -> tuple[MALAState, Tensor]:
    noise = random_like(torch.randn, state.y.shape, state.y, generator)
    uniform = random_like(torch.rand, state.value.shape, state.y, generator)
    trial = mala_init(f, _wrap(state.y + step.square() / 2 * state.gradient + step * noise, angle))
    # The noise that would lead back is -(noise + λ/2 (∇f + ∇f')). It belongs to the path as it was before wrapping:
    # that is exact on a circle too, where the way back by the same number of turns has this density.
    back = noise + step / 2 * (state.gradient + trial.gradient)
    log_ratio = trial.value - state.value + (noise.square() - back.square()).sum(-1) / 2
    acceptance = log_ratio.clamp_max(0).exp()
    acceptance = torch.where(trial.finite & ~acceptance.isnan(), acceptance, torch.zeros_like(acceptance))
    accepted = uniform < acceptance
    wide = accepted[..., None]
    moved = MALAState(
        torch.where(wide, trial.y, state.y),
        torch.where(accepted, trial.value, state.value),
        torch.where(wide, trial.gradient, state.gradient),
    )
    return moved, acceptance


def mala_step(
    f: AnyEnergy,
    state: MALAState,
    step_size: float | Sequence[float] | Tensor,
    *,
    periodic: Sequence[bool] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[MALAState, Tensor]:
    r"""One step of the Metropolis-adjusted Langevin algorithm, which leaves exp f / Z as it is, whatever the step size.

    The step of :func:`langevin_step` is accepted with probability

    .. math:: \min\left(1, e^{f(y') - f(y)} \frac{N(y; y' + \lambda^2 / 2 \nabla f(y'), \lambda^2)}
        {N(y'; y + \lambda^2 / 2 \nabla f(y), \lambda^2)}\right)

    and else the chain stays. A proposal where f or its gradient is not finite is rejected.

    Args:
        f: AnyEnergy, (C, B, D) to (C, B).
        state: From :func:`mala_init` or an earlier step.
        step_size: λ, a number, one per dimension, or a tensor that broadcasts to (C, B, D).
        periodic: As for :func:`langevin_step`.
        generator: Source of randomness; torch's global one by default.

    Returns:
        The next state, and the probability with which each chain's proposal was accepted, shape (C, B).

    Raises:
        ValueError: If step_size ≤ 0 or has another length than D.

    Source:
        Roberts and Tweedie, Bernoulli 1996; in the form of blackjax's `mala`.
    """
    _check_step_size(step_size)
    angle = _mask(periodic_of(f, state.y.shape[-1], periodic), state.y)
    return _mala_step(f, state, _steps(step_size, state.y), angle, generator)


def _spread(start: Tensor, num_chains: int) -> Tensor:
    """A start for each chain, shape (C, B, D), from (B, D) or (C, B, D)."""
    if start.ndim not in (2, 3) or (start.ndim == 3 and len(start) != num_chains) or not torch.is_floating_point(start):
        raise ValueError(
            f"start has shape {tuple(start.shape)} and dtype {start.dtype}; expected floats of shape (B, D), repeated "
            f"over the chains, or ({num_chains}, B, D), one start a chain."
        )
    return start.detach().expand(num_chains, *start.shape[-2:])


REDRAWS = 50
"""How often a start outside the support of exp f is drawn again from q."""
LONGEST = 25.0
"""Most that warm-up multiplies or divides a step size by, as a logarithm: its square is far from overflow."""


def _begin(
    f: AnyEnergy,
    q: Distribution | None,
    start: Tensor | None,
    num_chains: int,
    periodic: Sequence[bool] | None,
    generator: torch.Generator | None,
) -> tuple[MALAState, tuple[bool, ...]]:
    """The first state and which dimensions are angles."""
    if start is not None:
        y, name = _spread(start, num_chains), "start"
    elif q is not None:
        y, name = draw(q, num_chains, generator), "q"
    else:
        raise ValueError(
            "q and start are both None, but the chains must begin somewhere; pass start of shape (B, D), or a proposal."
        )
    angles = periodic_of(f, y.shape[-1], periodic)
    angle = _mask(angles, y)
    state = mala_init(f, _wrap(y, angle))
    if start is None and q is not None:
        # A proposal reaches beyond the window of a Lebesgue base, where f is -inf: such samples are drawn again.
        for _ in range(REDRAWS):
            if state.finite.all():
                break
            y = torch.where(state.finite[..., None], state.y, draw(q, num_chains, generator))
            state = mala_init(f, _wrap(y, angle))
    bad = ~state.finite.all(0)
    if bad.any():
        where = f"in {REDRAWS + 1} draws from q" if name == "q" else "at start"
        raise ValueError(
            f"{name}: f or its gradient is -inf, inf or NaN {where} for {int(bad.sum())} of {len(bad)} rows, the first "
            f"being row {int(bad.nonzero()[0])}; begin the chains where exp f is above 0."
        )
    return state, angles


@dataclass(frozen=True)
class Chains:
    """What a sampler ran through, and whether to trust it.

    Args:
        samples: Positions after warm-up, shape (N, C, B, D).
        acceptance: Mean probability of acceptance after warm-up, shape (B,); None for an unadjusted sampler.
        step_size: Step size of each row after warm-up, shape (B,); its geometric mean over dimensions that differ.
        periodic: Whether each dimension is an angle; none by default.
    """

    samples: Tensor
    acceptance: Tensor | None
    step_size: Tensor
    periodic: Sequence[bool] | None = None

    @cached_property
    def rhat(self) -> Tensor:
        """R-hat of each row and dimension, shape (B, D); above 1.01 the chains are too short. See :func:`rhat`."""
        return rhat(self.samples, periodic=self.periodic)

    @cached_property
    def effective_sample_size(self) -> Tensor:
        """Independent draws that the N C dependent ones are worth, shape (B, D); :func:`effective_sample_size`."""
        return effective_sample_size(self.samples, periodic=self.periodic)

    @property
    def points(self) -> WeightedPoints:
        """All samples of all chains with equal weights 1 / (N C), M = N C of them.

        Their means, quantiles and resamples are those of p(y|x). Their log_partition is 0 and says nothing about log Z,
        which chains cannot give; nor do their weights' effective_sample_size, pareto_k or standard error mean anything:
        look at :attr:`rhat` and :attr:`effective_sample_size` here.
        """
        y = self.samples.flatten(0, 1)
        return WeightedPoints(y, torch.full_like(y[..., 0], -math.log(len(y))), independent=False)


class _Walk(NamedTuple):
    """What all steps of all chains share."""

    f: AnyEnergy
    periodic: tuple[bool, ...]
    angle: Tensor | None
    generator: torch.Generator | None


class MarkovChains(ABC):
    """The loop around the steps of a sampler: begin, warm up, walk, keep."""

    num_chains: int
    num_warmup: int
    step_size: float | Sequence[float]
    periodic: Sequence[bool] | None

    def run(
        self,
        f: AnyEnergy,
        q: Distribution | None = None,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Chains:
        """Warm up, then run the chains and keep their positions.

        Args:
            f: Energy, (C, B, D) to (C, B).
            q: Proposal; the chains begin at its samples where start is None. Those where f is -inf are drawn again.
            start: Where the chains begin, shape (B, D), repeated over the chains, or (C, B, D). R-hat can find modes
                that were missed only if the starts differ.
            generator: Source of randomness; torch's global one by default.

        Returns:
            The chains, with N samples of each, shape (N, C, B, D).

        Raises:
            ValueError: If there is neither q nor start, start has another shape, step_size another length than D, or f
                is not finite at the start.
        """
        state, periodic = _begin(f, q, start, self.num_chains, self.periodic, generator)
        walk = _Walk(f, periodic, _mask(periodic, state.y), generator)
        state, step = self._warm_up(walk, state, _steps(self.step_size, state.y))
        kept, thinning = self._length
        samples = state.y.new_empty(kept, *state.y.shape)
        total = None
        for index in range(kept):
            for _ in range(thinning):
                state, acceptance = self._step(walk, state, step)
                if acceptance is not None:
                    total = acceptance.mean(0) if total is None else total + acceptance.mean(0)
            samples[index] = state.y
        mean = None if total is None else total / (kept * thinning)
        return Chains(samples, mean, step.log().mean(-1).exp().expand(state.y.shape[1]), periodic)

    def __call__(
        self,
        f: AnyEnergy,
        q: Distribution | None = None,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> WeightedPoints:
        """Return the points of :meth:`run`, equally weighted: they cannot give log Z, see :attr:`Chains.points`."""
        return self.run(f, q, start=start, generator=generator).points

    @property
    @abstractmethod
    def _length(self) -> tuple[int, int]:
        """Positions that each chain keeps, and steps per position."""

    def _warm_up(self, walk: _Walk, state: MALAState, step: Tensor) -> tuple[MALAState, Tensor]:
        """Make the steps that are not kept; return the step size to go on with."""
        for _ in range(self.num_warmup):
            state, _ = self._step(walk, state, step)
        return state, step

    @abstractmethod
    def _step(self, walk: _Walk, state: MALAState, step: Tensor) -> tuple[MALAState, Tensor | None]:
        """Make one step of all chains, and say with which probabilities it was accepted, shape (C, B)."""


@dataclass(frozen=True)
class Langevin(MarkovChains):
    r"""Chains of the unadjusted Langevin algorithm, as in training by ML-MCMC.

    .. math:: y \leftarrow y + \frac{\lambda^2}{2} \nabla_y f(y) + \lambda \epsilon, \quad \epsilon \sim N(0, I)

    Nothing is rejected, so the chains' stationary distribution is exp f / Z only in the limit of small λ: for a
    standard normal density they have the variance 1 / (1 - λ² / 4), and they diverge where f curves more than 4 / λ².

    Args:
        num_steps: Steps L that a chain makes after warm-up.
        step_size: λ, a number or one per dimension, in units of model space.
        num_chains: Chains M per row.
        num_warmup: Steps before these, that :meth:`run` does not keep.
        noise_scale: Factor of the noise.
        periodic: Whether each dimension is an angle, where the energy does not say it.

    Raises:
        ValueError: If an argument is out of its range.

    Source:
        Gustafsson et al., "How to train your energy-based model for regression", BMVC 2020 (ML-MCMC: the chains start
        at the target y_i).

    >>> chains = Langevin(num_steps=16, step_size=0.1, num_chains=4)
    >>> chains.sample(lambda y: -y.square().sum(-1) / 2, start=torch.zeros(5, 2)).shape
    torch.Size([4, 5, 2])
    """

    num_steps: int = 16
    step_size: float | Sequence[float] = 0.05
    num_chains: int = 8
    num_warmup: int = 0
    noise_scale: float = 1.0
    periodic: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_steps", self.num_steps)
        check_count("num_chains", self.num_chains)
        check_count("num_warmup", self.num_warmup, 0)
        _check_step_size(self.step_size, most_dims=1)
        _check_noise_scale(self.noise_scale)

    def sample(self, f: AnyEnergy, start: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Where the chains end; with the same generator the last of what :meth:`run` keeps, but without storing it.

        One gradient of f per step, no graph and no trajectory are kept, and no parameter of f gets a gradient. That f
        is finite at the start is not checked: where it is NaN, so are the samples.

        Args:
            f: AnyEnergy, (M, B, D) to (M, B).
            start: Where the chains begin, shape (B, D), repeated over the chains, or (M, B, D).
            generator: Source of randomness; torch's global one by default.

        Returns:
            Samples, without gradient, shape (M, B, D).

        Raises:
            ValueError: If start has another shape, or step_size another length than D.
        """
        y = _spread(start, self.num_chains)
        angle = _mask(periodic_of(f, y.shape[-1], self.periodic), y)
        y, step = _wrap(y, angle), _steps(self.step_size, y)
        for _ in range(self.num_warmup + self.num_steps):
            y = _move(mala_init(f, y), step, self.noise_scale, angle, generator)
        return y

    @property
    def _length(self) -> tuple[int, int]:
        return self.num_steps, 1

    def _step(self, walk: _Walk, state: MALAState, step: Tensor) -> tuple[MALAState, None]:
        return mala_init(walk.f, _move(state, step, self.noise_scale, walk.angle, walk.generator)), None


class _DualAveraging(NamedTuple):
    """Nesterov's dual averaging of the log of a factor on the step size, each row by itself, all of shape (B,)."""

    log_factor: Tensor
    log_average: Tensor
    deficit: Tensor
    updates: int = 0

    def update(self, acceptance: Tensor, target: float, most: float) -> _DualAveraging:
        """One update; its constants are those of Hoffman and Gelman, JMLR 2014, section 3.2."""
        gamma, t0, kappa, centre = 0.05, 10.0, 0.75, math.log(10.0)
        count = self.updates + 1
        deficit = torch.lerp(self.deficit, target - acceptance, 1 / (count + t0))
        log_factor = (centre - math.sqrt(count) / gamma * deficit).clamp(-LONGEST, most)
        return _DualAveraging(log_factor, torch.lerp(self.log_average, log_factor, count**-kappa), deficit, count)


@dataclass(frozen=True)
class MALA(MarkovChains):
    r"""Chains of the Metropolis-adjusted Langevin algorithm, with exp f / Z as stationary distribution.

    It is so at any step size. During warm-up the step size of each row is adapted to the target acceptance by dual
    averaging, from all of the row's chains; then it stays. The proposal as start finds the modes that the chains
    themselves may never cross between. Beware of starts far out in a tail that is steeper than the middle: there every
    step of a good size for the middle is rejected, and the chain stays for long. :attr:`Chains.rhat` shows it.

    Args:
        num_samples: Positions N that each chain keeps.
        num_chains: Chains C per row.
        num_warmup: Steps during which the step size is adapted, not kept.
        step_size: The first step size λ, a number or one per dimension, in units of model space; warm-up multiplies it
            by one factor per row. For an angle it stays below 2π, where a step is uniform on the circle.
        target_acceptance: Probability of acceptance that warm-up aims at; 0.574 is optimal for many dimensions.
        thinning: Steps per position that is kept.
        periodic: Whether each dimension is an angle, where the energy does not say it.

    Raises:
        ValueError: If an argument is out of its range.

    Source:
        Roberts and Tweedie, Bernoulli 1996; Roberts and Rosenthal, JRSS B 1998 (0.574); Hoffman and Gelman, JMLR 2014
        (dual averaging).

    >>> mala = MALA(num_samples=10, num_chains=4, num_warmup=20)
    >>> mala(lambda y: -y.square().sum(-1) / 2, start=torch.zeros(5, 2)).y.shape
    torch.Size([40, 5, 2])
    """

    num_samples: int = 250
    num_chains: int = 8
    num_warmup: int = 250
    step_size: float | Sequence[float] = 0.1
    target_acceptance: float = 0.574
    thinning: int = 1
    periodic: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_samples", self.num_samples)
        check_count("num_chains", self.num_chains)
        check_count("num_warmup", self.num_warmup, 0)
        check_count("thinning", self.thinning)
        _check_step_size(self.step_size, most_dims=1)
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance is {self.target_acceptance}; expected a number in (0, 1).")

    @property
    def _length(self) -> tuple[int, int]:
        return self.num_samples, self.thinning

    def _warm_up(self, walk: _Walk, state: MALAState, step: Tensor) -> tuple[MALAState, Tensor]:
        """The state after warm-up, and the step sizes to keep, shape (B, D)."""
        base = step.expand(state.y.shape[-1])
        # A flat energy on a circle accepts any step, and the factor would grow without limit.
        limits = [math.log(2 * math.pi / float(base[d])) for d, flag in enumerate(walk.periodic) if flag]
        most = min([LONGEST, *limits])
        zero = torch.zeros_like(state.value[0])
        adaptation = _DualAveraging(zero, zero, zero)
        for _ in range(self.num_warmup):
            state, acceptance = self._step(walk, state, base * adaptation.log_factor.exp()[:, None])
            adaptation = adaptation.update(acceptance.mean(0), self.target_acceptance, most)
        return state, base * adaptation.log_average.exp()[:, None]

    def _step(self, walk: _Walk, state: MALAState, step: Tensor) -> tuple[MALAState, Tensor]:
        return _mala_step(walk.f, state, step, walk.angle, walk.generator)
