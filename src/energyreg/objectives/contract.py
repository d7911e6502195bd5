"""What objectives have in common: their result, its checks and diagnostics.

All have one contract: ``objective(f, q, y, generator=...)`` returns a :class:`Loss`. f is an
:class:`~energyreg.inference.energy.Energy` or any function of y, q the proposal or None, y the targets in model space.
None sees a model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.inference.energy import AnyEnergy
from energyreg.objectives import losses

__all__ = ["EnergyObjective", "Loss", "NonFiniteLossError", "Terms", "as_loss"]


class Loss(NamedTuple):
    """What an objective returns.

    Attributes:
        per_example: The loss of each example, in nats, shape (B,).
        diagnostics: Named quantities of each example, without gradient, shape (B,).
    """

    per_example: Tensor
    diagnostics: dict[str, Tensor]


class NonFiniteLossError(ValueError):
    """A loss is not finite: f or q is NaN or infinite somewhere, or q has no density at a target.

    Attributes:
        loss: The loss as it is.
    """

    def __init__(self, message: str, loss: Loss) -> None:
        super().__init__(message)
        self.loss = loss


def checked_loss(per_example: Tensor, diagnostics: dict[str, Tensor], **parts: Tensor | Sequence[Tensor]) -> Loss:
    """The loss, unless it is not finite: then an error that says which part of it is not, and in how many rows.

    Args:
        per_example: The loss of each example.
        diagnostics: What comes with it.
        **parts: Ingredients by the name of the argument that they came from: q at the targets, f at the targets first.
    """
    loss = Loss(per_example, {name: value.detach() for name, value in diagnostics.items()})
    # On a GPU this question would wait for the step; `fit` looks at many losses at once, later.
    if per_example.is_cuda or bool(per_example.isfinite().all()):
        return loss
    rows, found = per_example.numel(), []
    for name, part in parts.items():
        values = [value.detach() for value in ([part] if isinstance(part, Tensor) else part)]
        nowhere = int((values[0] == -torch.inf).sum()) if values[0].ndim == 1 else 0
        if nowhere and name == "q":
            found.append(
                f"q has no density at the target in {nowhere} of {rows} rows ({nowhere / rows:.1%}): give it support "
                "wherever a target may be, e.g. by a broad component"
            )
        elif nowhere and name == "f":
            found.append(
                f"f is -inf at the target in {nowhere} of {rows} rows ({nowhere / rows:.1%}): its base has no density "
                "there"
            )
        wrong = sum(int((value.isnan() | (value == torch.inf)).sum()) for value in values)
        if wrong:
            found.append(f"{name} is NaN or infinite at {wrong} of {sum(value.numel() for value in values)} points")
    bad = int((~per_example.isfinite()).sum())
    reason = "; ".join(found) or "f is -inf at every sample of a row, or the loss itself has overflowed"
    raise NonFiniteLossError(f"The loss of {bad} of {rows} rows is not finite: {reason}.", loss)


def as_loss(result: Any, objective: object) -> Loss:
    """Return what an objective returned as a :class:`Loss`; a tensor is a loss without diagnostics.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(result, Tensor):
        return Loss(result, {})
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and isinstance(result[1], dict):
        return Loss(*result)
    raise TypeError(
        f"{type(objective).__name__} returned a {type(result).__name__}; expected energyreg.objectives.Loss("
        "per_example, diagnostics), or a tensor of shape (B,), the loss of each example."
    )


def check_weights(**weights: float) -> None:
    """Check that weights are finite numbers ≥ 0."""
    for name, weight in weights.items():
        if not isinstance(weight, (int, float, np.number)) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}; expected a finite number ≥ 0.")


def check_scale(name: str, scale: float | Sequence[float]) -> float | tuple[float, ...]:
    """The scale as a number or a tuple, so that the objective stays a value."""
    try:
        values = torch.as_tensor(scale, dtype=torch.double)
    except (TypeError, ValueError, RuntimeError):
        values = torch.full((1, 1), torch.nan)
    if values.ndim > 1 or not values.numel() or not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"{name} is {scale}; expected a finite number > 0, or one per target dimension.")
    return tuple(values.tolist()) if values.ndim else float(values)


def check_length(name: str, scale: float | Sequence[float], dim: int) -> None:
    """Check that scales are one number, or one per dimension."""
    if isinstance(scale, tuple) and len(scale) != dim:
        raise ValueError(f"{name} has {len(scale)} numbers, but y has {dim} dimensions.")


def target_first(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values at the target, (B,), and at the samples behind it, (M, B), which went through f in one pass."""
    target, samples = values.split([1, len(values) - 1])
    return target[0], samples


def weight_diagnostics(f_target: Tensor, log_weights: Tensor) -> dict[str, Tensor]:
    """What the weights of independent samples say, as :class:`~energyreg.inference.points.WeightedPoints` does."""
    with torch.no_grad():
        log_weights = log_weights.detach()
        log_z = log_weights.logsumexp(0)
        # Kish's effective sample size from Σ w², and the delta method's variance of log Z, which is Σ w² - 1/M over
        # (M - 1)/M for normalised weights w.
        second = (2 * (log_weights - log_z)).exp_().sum(0)
        m = len(log_weights)
        stderr = ((second - 1 / m).clamp_min(0) * m / (m - 1 or math.nan)).sqrt()
        return {
            "f_target": f_target,
            "log_partition": log_z,
            "log_partition_stderr": stderr,
            "effective_sample_size": second.reciprocal(),
        }


class Terms(NamedTuple):
    """What an :class:`EnergyObjective` says of f.

    Attributes:
        loss: The loss of each example, shape (B,).
        diagnostics: Named quantities of each example, shape (B,).
        parts: Ingredients by name, for the message if the loss is not finite; f at the targets comes first.
    """

    loss: Tensor
    diagnostics: dict[str, Tensor]
    parts: dict[str, Tensor | Sequence[Tensor]]


class EnergyObjective(ABC):
    """An objective of f alone. Beside it the proposal, where the model has one, learns by its own likelihood.

    Attributes:
        proposal_weight: Weight of the proposal's own negative log-likelihood.
    """

    proposal_weight: float

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weights(proposal_weight=self.proposal_weight)

    @abstractmethod
    def energy_loss(self, f: AnyEnergy, y: Tensor, generator: torch.Generator | None) -> Terms:
        """Return the loss of f for targets y in model space, shape (B, D)."""

    def __call__(
        self, f: AnyEnergy, q: Distribution | None, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss for targets y in model space, shape (B, D)."""
        loss, diagnostics, parts = self.energy_loss(f, y, generator)
        if q is not None and self.proposal_weight:
            log_q = q.log_prob(y)
            loss = loss + self.proposal_weight * losses.proposal_nll(log_q)
            parts = {**parts, "q": log_q}
        return checked_loss(loss, diagnostics, **parts)
