"""Why a training cannot go on: which rows, which quantities, the likely cause."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from energyreg.training.settings import TrainingSettings
from energyreg.training.step import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["TrainingError"]

# Losses are nats of standardised targets, where a sane model is within a few tens.
EXPLOSION = 1e6


class TrainingError(RuntimeError):
    """Training cannot go on, as a loss or gradient is not finite or the loss explodes."""


class Watch:
    """Looks at the losses and gradients of each step, and explains what went wrong.

    Args:
        fabric: Where the training runs.
        settings: Its settings.
        num_members: Members of the ensemble; 1 for a model by itself.
        steps: Steps of an epoch.
        scaled: Whether the loss is scaled, so that infinite gradients are part of the method.
        rows: Row numbers in the caller's data; None for a DataLoader.
    """

    def __init__(
        self, fabric: Fabric, settings: TrainingSettings, num_members: int, steps: int, scaled: bool,
        rows: Tensor | None,
    ) -> None:  # fmt: skip
        self.fabric, self.settings, self.num_members = fabric, settings, num_members
        self.steps, self.scaled, self.rows = steps, scaled, rows
        self.first_losses: list[float | None] = [None] * num_members

    def _of(self, member: int) -> str:
        """Name the member in a message, where there are several."""
        return "" if self.num_members == 1 else f" of member {member} (seed {self.settings.seed + member})"

    def check_losses(self, losses: list[float], epoch: int, number: int, batch: Batch) -> None:
        """Stop where a member's loss of a step is not finite or explodes; epoch and step count from 0."""
        for member, loss in enumerate(losses):
            first = self.first_losses[member]
            if first is None and math.isfinite(loss):
                first = self.first_losses[member] = loss
            # False for NaN, and for infinity either way.
            if -math.inf < loss < EXPLOSION + abs(first or 0.0):
                continue
            where = f"in epoch {epoch + 1}, batch {number + 1} of {self.steps}"
            part, of = batch.part(member, self.num_members), self._of(member)
            if math.isfinite(loss):
                self._stop(
                    f"the loss{of} exploded to {loss:.3g} nats {where}",
                    f"The learning rate is too high (now {self.settings.learning_rate:g}; try a third of it), or "
                    f"gradients are not limited enough (gradient_clip is {self.settings.gradient_clip}).",
                    part,
                )
            self._stop(f"the loss{of} is {loss} {where}", self._cause(part), part)

    def check_norms(self, norms: list[float], epoch: int, number: int, batch: Batch) -> None:
        """Stop where the norm of a member's gradient is not finite."""
        for member, norm in enumerate(norms):
            # With a loss scale, infinite gradients are its way to find the scale; that step is skipped.
            if math.isfinite(norm) or self.scaled:
                continue
            self._stop(
                f"the norm of the gradient{self._of(member)} is {norm} in epoch {epoch + 1}, batch {number + 1} "
                f"of {self.steps}, though the loss is finite",
                "A backward pass overflowed or divided by zero: look for sqrt, log, norm or a division at 0 in your "
                "encoder or head. torch.autograd.set_detect_anomaly(True) names the operation; precision='64-true' "
                "tells overflow from the rest.",
                batch.part(member, self.num_members),
            )

    def _cause(self, batch: Batch) -> str:
        y, finite = batch.y, batch.finite
        if finite is None and isinstance(batch.x, Tensor):
            finite = batch.x.isfinite().all()
        if finite is not None and not bool(finite):
            return "x has values that are not finite in this batch: clean the dataset behind the DataLoader."
        if not bool(y.isfinite().all()):
            return "y has values that are not finite in this batch: clean the dataset behind the DataLoader."
        lower = (
            f"Lower the learning rate (now {self.settings.learning_rate:g}) or gradient_clip "
            f"(now {self.settings.gradient_clip})"
        )
        if self.settings.precision.endswith("mixed"):
            lower += f", or use precision='32-true' (now {self.settings.precision!r})"
        f_target = batch.diagnostics.get("f_target")
        if f_target is not None and not bool(f_target.isfinite().all()):
            return f"The energy f(x, y) is not finite at the targets themselves: the network has overflowed. {lower}."
        if batch.reason is not None and "q has no density" in batch.reason:
            return batch.reason
        return (
            f"The energy is finite at the targets, so look at the other quantities of the objective: log Z, or the "
            f"density of the noise. {lower}; a proposal that collapses needs a larger min_scale."
        )

    def _stop(self, what: str, cause: str, batch: Batch) -> NoReturn:
        raise TrainingError(f"Training stopped: {what}. {self._details(batch)}Likely cause: {cause}")

    def _details(self, batch: Batch) -> str:
        """Which rows, and which quantities of them."""
        parts = []
        bad = torch.zeros(len(batch.y), dtype=torch.bool, device=batch.per_example.device)
        for name, value in {"loss": batch.per_example, **batch.diagnostics}.items():
            wrong = ~value.isfinite() | (value.abs() > EXPLOSION) if name == "loss" else ~value.isfinite()
            if value.shape == bad.shape:
                bad |= wrong
            if bool(wrong.any()):
                parts.append(f"{name} of {int(wrong.sum())} of {wrong.numel()}")
        if not parts:
            return ""
        places = bad.nonzero()[:5, 0].cpu()
        named = "rows" if batch.rows is not None else "rows of the batch"
        if self.rows is not None and batch.rows is not None:
            places = self.rows[batch.rows[places]]
        more = ", ..." if int(bad.sum()) > 5 else ""
        here = f" in process {self.fabric.global_rank}" if self.fabric.world_size > 1 else ""
        return f"Affected{here}: {'; '.join(parts)} ({named} {', '.join(map(str, places.tolist()))}{more}). "

    def check_validation(self, nlls: list[float], epoch: int) -> None:
        """Stop where a member's validation NLL is not a number."""
        for member, nll in enumerate(nlls):
            if math.isnan(nll):
                raise TrainingError(
                    f"Training stopped: the validation NLL{self._of(member)} is nan after epoch {epoch + 1}. Likely "
                    "cause: The model's density is not a number at some validation rows: check the head and the "
                    "encoder there, in evaluation mode. A lower learning rate (now "
                    f"{self.settings.learning_rate:g}) helps where the weights have grown out of bounds."
                )
