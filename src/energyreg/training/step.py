"""One step of a training: from a batch to its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from energyreg.objectives.contract import NonFiniteLossError, as_loss
from energyreg.training.trainable import Trainable

__all__ = ["TrainingStep"]


class Batch:
    """One step's data.

    No tensor and no container, so that Fabric neither rounds y to half precision nor walks through it.

    Attributes:
        x: Inputs of this process, (b, ...).
        y: Targets of this process in user units, (b, D).
        share: Weight of each row's loss here, such that the mean over the processes is the mean over the whole batch;
            one for all, or of shape (b,).
        rows: Row numbers in the caller's data; None for a DataLoader.
        loss: Filled by the training step: the weighted sum of the losses of each member's rows, (S,), S = 1 where one
            model is trained; without gradient, before Fabric rounds it to float32.
        per_example: The same: the losses, (b,).
        diagnostics: The same: the objective's diagnostics.
        finite: Whether all of x is finite, where that is not known beforehand.
        reason: What the objective says of a loss that is not finite.
    """

    __slots__ = ("diagnostics", "finite", "loss", "per_example", "reason", "rows", "share", "x", "y")

    loss: Tensor
    per_example: Tensor

    def __init__(self, x: Any, y: Tensor, share: float | Tensor, rows: Tensor | None) -> None:
        self.x, self.y, self.share, self.rows = x, y, share, rows
        self.finite: Tensor | None = None
        self.reason: str | None = None
        self.diagnostics: dict[str, Tensor] = {}

    def part(self, member: int, num_members: int) -> Batch:
        """The rows of one member of an ensemble, after the step."""
        if num_members == 1:
            return self
        size = len(self.y) // num_members
        rows = slice(member * size, (member + 1) * size)
        x = self.x[rows] if isinstance(self.x, Tensor) else self.x
        share = self.share[rows] if isinstance(self.share, Tensor) else self.share
        part = Batch(x, self.y[rows], share, None if self.rows is None else self.rows[rows])
        part.finite, part.reason = self.finite, self.reason
        part.loss, part.per_example = self.loss[member : member + 1], self.per_example[rows]
        part.diagnostics = {name: value[rows] for name, value in self.diagnostics.items() if len(value) == len(self.y)}
        return part


class TrainingStep(nn.Module):
    """Model and objective as one module from a batch to its loss: what DDP wraps.

    Args:
        model: The model.
        objective: Called as ``objective(f, q, z, generator=...)``; returns an `energyreg.objectives.Loss`, or a
            tensor with the loss of each example.
        num_members: Members S whose rows a batch holds, one member after the other.
    """

    def __init__(self, model: Trainable, objective: Any, num_members: int = 1) -> None:
        super().__init__()
        self.model, self.objective, self.num_members = model, objective, num_members

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The weighted sum of the losses; it, the losses themselves and the diagnostics are left in the batch, too."""
        f, q, z = self.model.condition(batch.x, batch.y)
        try:
            per_example, diagnostics = as_loss(self.objective(f, q, z, generator=generator), self.objective)
        except NonFiniteLossError as error:  # the loop has more to say about it: which rows, the likely cause
            per_example, diagnostics = error.loss
            batch.reason = str(error)
        if per_example.shape != (len(batch.y),):
            raise ValueError(
                f"The objective returned losses of shape {tuple(per_example.shape)}; expected ({len(batch.y)},), one a "
                "row."
            )
        batch.per_example = per_example.detach()
        batch.diagnostics = {name: value.detach() for name, value in diagnostics.items()}
        # The members share no parameter: the gradient of this sum is that of each member's loss by itself.
        share = batch.share
        if isinstance(share, Tensor):
            share = share.to(per_example.dtype)
            weighted = batch.per_example * share
            loss = (per_example * share).sum()
        else:
            weighted = batch.per_example
            loss = per_example.sum() * share
        if self.num_members == 1:
            batch.loss = loss.detach()[None]
        else:
            batch.loss = weighted.unflatten(0, (self.num_members, -1)).sum(1)
            batch.loss = batch.loss if isinstance(share, Tensor) else batch.loss * share
        return loss


def has_unused_parameters(model: Any, objective: Any, example: tuple[Any, Tensor]) -> bool:
    """Whether some parameters get no gradient (an idle proposal, for one): DDP must know beforehand."""
    device = next(model.parameters()).device
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = example
    x = x.to(device, next(model.parameters()).dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
    model.train()
    TrainingStep(model, objective)(Batch(x, y.to(device), 1.0, None), torch.Generator(device)).backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    model.load_state_dict(before)  # batch statistics moved
    return unused
