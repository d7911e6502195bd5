"""What happened in a training: `History`, and the sums over an epoch that it is made from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from energyreg.progress import duration
from energyreg.training.step import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

__all__ = ["History"]


@dataclass(repr=False)
class History:
    """What happened in a training, one entry an epoch; epochs count from 1.

    Attributes:
        train_loss: Mean loss over the epoch's batches, in nats of the model space (with dropout, noise and all).
        validation_nll: Mean of -log p(y|x) on the validation data after the epoch, in nats and user units; empty
            without validation data.
        learning_rate: Learning rate at the end of the epoch.
        seconds: Duration of the epoch, validation included.
        diagnostics: The objective's diagnostics by name, means over the epoch.
        best_epoch: Epoch with the lowest validation NLL, whose weights the model has; None without validation data.
        stopped_early: Whether `patience` ended the training.
        interrupted: Whether a KeyboardInterrupt did.
        timed_out: Whether `time_limit` did; the last epoch is part of one then, unless it was just complete.
        total_seconds: Duration of all, preparation and resumed parts included.
    """

    train_loss: list[float] = field(default_factory=list)
    validation_nll: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int | None = None
    stopped_early: bool = False
    interrupted: bool = False
    total_seconds: float = 0.0
    timed_out: bool = False

    @property
    def best_validation_nll(self) -> float | None:
        """Validation NLL of the best epoch, in nats and user units; None without validation data."""
        return None if self.best_epoch is None else self.validation_nll[self.best_epoch - 1]

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain lists and numbers, for JSON."""
        return dataclasses.asdict(self)

    def plot(self, ax: Any = None) -> Figure:
        """Draw the training loss and the validation NLL against the epoch.

        The two differ by a constant (the loss is in model space) and by dropout, so compare their shapes, not their
        levels.

        Args:
            ax: Matplotlib axes to draw into; by default a new figure.

        Returns:
            The figure.

        Raises:
            ImportError: Matplotlib is not installed; ``pip install 'energyreg[tables]'`` brings it.
            ValueError: There is no completed epoch.
        """
        from energyreg import plots

        if not self.train_loss:
            raise ValueError("There is nothing to plot: no epoch was completed.")
        curves = {"training loss": SimpleNamespace(values=self.train_loss)}
        if self.validation_nll:
            curves["validation NLL"] = SimpleNamespace(values=self.validation_nll)
        return plots.learning_curves(curves, quantity="values", label="nats", ax=ax)

    def __repr__(self) -> str:
        parts = [f"{len(self.train_loss)} epochs in {duration(self.total_seconds)}"]
        if self.train_loss:
            parts.append(f"training loss {self.train_loss[-1]:.4f}")
        if self.best_epoch is not None:
            parts.append(f"best validation NLL {self.best_validation_nll:.4f} nats in epoch {self.best_epoch}")
        if self.stopped_early or self.interrupted or self.timed_out:
            parts.append(
                "stopped early" if self.stopped_early else "interrupted" if self.interrupted else "out of time"
            )
        return f"History({', '.join(parts)})"


class Sums:
    """Means over an epoch, one a member."""

    def __init__(self, num_members: int) -> None:
        self.losses, self.steps = [0.0] * num_members, 0
        self.diagnostics: dict[str, tuple[Tensor, int]] = {}

    def add_losses(self, losses: list[float]) -> None:
        self.losses = [total + loss for total, loss in zip(self.losses, losses, strict=True)]
        self.steps += 1

    def add_diagnostics(self, batches: list[Batch]) -> None:
        members = len(self.losses)
        for name in batches[0].diagnostics:
            values = torch.cat([batch.diagnostics[name].reshape(members, -1) for batch in batches], 1).double()
            total, count = self.diagnostics.get(name, (0.0, 0))
            self.diagnostics[name] = (values.sum(1) + total, count + values.shape[1])

    def mean_losses(self) -> list[float]:
        return [loss / self.steps if self.steps else math.nan for loss in self.losses]

    def mean_diagnostics(self, fabric: Fabric) -> dict[str, list[float]]:
        if not self.diagnostics:
            return {}
        sums = torch.stack(
            [torch.stack([total, torch.full_like(total, count)]) for total, count in self.diagnostics.values()]
        )
        if fabric.world_size > 1:
            sums = fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        return dict(zip(self.diagnostics, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
