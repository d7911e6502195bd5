"""Work as usual in whatever mode the caller is: gradients off, another default device, NumPy's errors raised."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

__all__ = ["as_usual", "make_trainable", "with_gradients"]

P = ParamSpec("P")
T = TypeVar("T")


def as_usual(function: Callable[P, T]) -> Callable[P, T]:
    """A function that makes its tensors on the CPU, or where its inputs are, and does not raise on an underflow.

    torch's default device and NumPy's `errstate` are the caller's, for what the caller makes.
    """

    @functools.wraps(function)
    def usual(*args: P.args, **kwargs: P.kwargs) -> T:
        with _usual():
            return function(*args, **kwargs)

    return usual


def with_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """The same for a function that trains: gradients are on, though it be called in `no_grad` or `inference_mode`."""

    @functools.wraps(function)
    def training(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad(), _usual():
            return function(*args, **kwargs)

    return training


@contextlib.contextmanager
def _usual() -> Iterator[None]:
    elsewhere = torch.get_default_device().type != "cpu"
    # What inference mode makes can never take part in a gradient, such as that of a refinement.
    inference = torch.is_inference_mode_enabled()
    with contextlib.ExitStack() as modes:
        modes.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if elsewhere:
            modes.enter_context(torch.device("cpu"))
        if inference:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        yield


def make_trainable(model: nn.Module) -> None:
    """Replace the tensors of a model that was made in `inference_mode`, which no gradient can ever change."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_inference():
                copy = made.setdefault(id(tensor), tensor.clone())
                parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(copy, tensor.requires_grad) if parameter else copy)
