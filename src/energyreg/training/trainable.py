"""`Trainable`: all that `fit` asks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Trainable", "check_trainable"]


class Trainable(Protocol):
    """A model that `fit` can train: a `torch.nn.Module` with these members.

    :class:`energyreg.EnergyRegressionModel` and :class:`energyreg.vision.EnergyDetector` are such models.
    """

    # Of the module itself; a Protocol cannot inherit from one.
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...

    @property
    def fitted(self) -> bool:
        """Whether `fit_preprocessing` has nothing left to do."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        ...

    @property
    def preprocesses_inputs(self) -> bool:
        """Whether `fit_preprocessing` reads x; if not, a DataLoader's x are not collected for it."""
        ...

    def fit_preprocessing(self, x: Any, y: Any) -> None:
        """Fit what comes before training, such as the units of the targets; fitted parts stay as they are.

        Args:
            x: Training inputs, or None where `preprocesses_inputs` is False.
            y: Training targets in user units, shape (N, D).
        """
        ...

    def check_inputs(self, x: Any) -> Any:
        """Return inputs as `condition` takes them.

        Raises:
            ValueError: If they cannot be used.
        """
        ...

    def check_targets(self, y: Any) -> Tensor:
        """Return targets of shape (N, D).

        Raises:
            ValueError: If they cannot be used.
        """
        ...

    def condition(self, x: Any, y: Tensor) -> tuple[Any, Any, Tensor]:
        """What an objective takes of a batch: energy, proposal (or None), targets in model space, shape (B, D)."""
        ...

    def default_objective(self) -> Any:
        """The objective of a training that names none."""
        ...

    def __call__(self, x: Any, *, memory_budget: int) -> Any:
        """Return a distribution whose `log_prob(y)`, shape (B,), the validation takes."""
        ...


ASKED = ("condition", "default_objective", "fitted", "dtype", "preprocesses_inputs", "fit_preprocessing",
         "check_inputs", "check_targets")  # fmt: skip
"""What a model has beside being a module."""


def check_trainable(model: Any) -> None:
    """Refuse what `fit` cannot train.

    Raises:
        ValueError: The model is no module, lacks a member of the contract, or has no parameter to train.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {kind}; expected a torch.nn.Module, such as an EnergyRegressionModel.")
    if missing := [name for name in ASKED if not hasattr(model, name)]:
        raise ValueError(
            f"model is a {kind}; expected an EnergyRegressionModel, or a module that implements "
            f"energyreg.training.Trainable. It lacks {', '.join(missing)}."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no parameters to train: all are frozen (requires_grad=False), or there are none."
        )
