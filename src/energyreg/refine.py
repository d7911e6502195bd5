"""Refinement: gradient ascent on a function of y with backtracking, as papers I to III predict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["refine"]


def refine(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    num_steps: int = 10,
    step_size: float | Tensor = 0.1,
    decay: float = 0.5,
) -> Tensor:
    """Climb a function from initial estimates; it never falls.

    A step is kept if the function does not fall; otherwise the point stays and its step is shortened, each point by
    itself.

    Args:
        function: Maps y of shape (*S, B, D) to values (*S, B), each a function of its own y alone.
        start: Initial estimates, shape (*S, B, D).
        num_steps: Steps T.
        step_size: Length λ that multiplies the gradient, a number or one per dimension (D,).
        decay: Factor that shortens a rejected step, in (0, 1).

    Returns:
        Refined estimates, shape (*S, B, D).

    Raises:
        ValueError: If num_steps < 0, step_size ≤ 0, or decay is not in (0, 1).

    Source:
        Gustafsson et al., ECCV 2020 (prediction by gradient ascent, with the step rule of its code).

    >>> refine(lambda y: -(y - 1).square().sum(-1), torch.zeros(1, 2), num_steps=50).round(decimals=3)
    tensor([[1., 1.]])
    """
    if num_steps < 0:
        raise ValueError(f"num_steps is {num_steps}; expected a whole number ≥ 0.")
    if not torch.as_tensor(step_size).gt(0).all():
        raise ValueError(f"step_size is {step_size}; expected numbers > 0.")
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}; expected a number in (0, 1).")

    def value_and_gradient(y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            value = function(y)
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient

    y = start.detach()
    step = torch.as_tensor(step_size, dtype=y.dtype, device=y.device) * torch.ones_like(y)
    value, gradient = value_and_gradient(y)
    for _ in range(num_steps):
        trial = y + step * gradient
        trial_value, trial_gradient = value_and_gradient(trial)
        better = (trial_value >= value)[..., None]  # False for NaN: such a step is rejected too
        y = torch.where(better, trial, y)
        gradient = torch.where(better, trial_gradient, gradient)
        value = torch.where(better[..., 0], trial_value, value)
        step = torch.where(better, step, step * decay)
    return y
