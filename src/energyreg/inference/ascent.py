"""Refinement: gradient ascent on a function of y with backtracking, as papers I to III predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from energyreg.densities.angles import wrap_angles
from energyreg.inference.energy import AnyEnergy, periodic_of
from energyreg.modes import as_usual

__all__ = ["refine"]


@as_usual
def refine(
    function: AnyEnergy,
    start: Tensor,
    *,
    num_steps: int = 10,
    step_size: float | Sequence[float] | Tensor = 0.1,
    decay: float = 0.5,
    periodic: Sequence[bool] | None = None,
) -> Tensor:
    """Climb a function from initial estimates; it never falls.

    A step is kept if the function does not fall; otherwise the point stays and its step is shortened, each point by
    itself. A point where the function is NaN stays.

    Args:
        function: Maps y of shape (*S, B, D) to values (*S, B), each a function of its own y alone.
        start: Initial estimates, shape (*S, B, D).
        num_steps: Steps T.
        step_size: Length λ that multiplies the gradient: a number, one per dimension (D,), or one per point and
            dimension, any shape that broadcasts to (*S, B, D) and ends in D.
        decay: Factor that shortens a rejected step, in (0, 1).
        periodic: Which dimensions are angles, wrapped into [-π, π), where the function does not say it; see
            :func:`~energyreg.inference.energy.periodic_of`.

    Returns:
        Refined estimates, shape (*S, B, D).

    Raises:
        ValueError: If num_steps < 0, step_size ≤ 0 or of another length than D, decay is not in (0, 1), or periodic has
            another length than D.

    Source:
        Gustafsson et al., ECCV 2020 (prediction by gradient ascent, with the step rule of its code).

    >>> refine(lambda y: -(y - 1).square().sum(-1), torch.zeros(1, 2), num_steps=50).round(decimals=3)
    tensor([[1., 1.]])
    """
    return refine_with_values(
        function, start, num_steps=num_steps, step_size=step_size, decay=decay, periodic=periodic
    )[0]


@as_usual
def refine_with_values(
    function: AnyEnergy,
    start: Tensor,
    *,
    num_steps: int = 10,
    step_size: float | Sequence[float] | Tensor = 0.1,
    decay: float = 0.5,
    periodic: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`refine`, with the function's values at the refined estimates, (*S, B), which are known on the way."""
    if num_steps < 0:
        raise ValueError(f"num_steps is {num_steps}; expected a whole number ≥ 0.")
    if not torch.as_tensor(step_size).gt(0).all():
        raise ValueError(f"step_size is {step_size}; expected numbers > 0.")
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}; expected a number in (0, 1).")
    y = start.detach().clone()  # of a tensor made in inference mode, too
    step = _as_step(step_size, y)
    wrap = _wrapper(y, periodic_of(function, y.shape[-1], periodic))

    def value_and_gradient(y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            value = function(y)
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient

    y = wrap(y)
    value, gradient = value_and_gradient(y)
    for number in range(1, num_steps + 1):
        trial = wrap(y + step * gradient)
        if number == num_steps:  # nobody asks where it would go on to
            with torch.no_grad():
                trial_value, trial_gradient = function(trial), gradient
        else:
            trial_value, trial_gradient = value_and_gradient(trial)
        better = (trial_value >= value)[..., None]  # False for NaN: such a step is rejected too
        y = torch.where(better, trial, y)
        gradient = torch.where(better, trial_gradient, gradient)
        value = torch.where(better[..., 0], trial_value, value)
        step = torch.where(better, step, step * decay)
    return y, value


def _as_step(step_size: float | Sequence[float] | Tensor, y: Tensor) -> Tensor:
    step = torch.as_tensor(step_size, dtype=y.dtype, device=y.device)
    dim = y.shape[-1]
    if step.ndim and step.shape[-1] != dim:
        raise ValueError(f"step_size has length {step.shape[-1]}; expected one number, or {dim}, one per dimension.")
    try:
        return step.expand_as(y)
    except RuntimeError:
        raise ValueError(
            f"step_size has shape {tuple(step.shape)}, which does not broadcast to the points' {tuple(y.shape)}."
        ) from None


def _wrapper(y: Tensor, periodic: Sequence[bool]) -> Callable[[Tensor], Tensor]:
    """The function that brings angles into [-π, π) and leaves other dimensions alone."""
    if not any(periodic):
        return lambda y: y
    angle = torch.tensor(periodic, device=y.device)
    return lambda y: wrap_angles(y, angle)
