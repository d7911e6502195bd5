"""The papers' small energy networks compiled, where there is a C++ compiler: a step takes a third of the time."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["extension", "fused_energy"]


@cache
def extension() -> Any | None:
    """The compiled functions, or None, with a warning, on a machine that cannot compile them."""
    from torch.utils.cpp_extension import load

    # torch looks for ninja on the path, where an environment that is not activated is not.
    with suppress(ImportError):
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    source = Path(__file__).with_name("fused.cpp")
    flags = ["-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512"]
    try:
        return load("energyreg_one_dimensional", [str(source)], extra_cflags=flags)
    except (RuntimeError, OSError, ImportError) as error:
        warnings.warn(f"networks run uncompiled, some three times slower: {error}", stacklevel=2)
        return None


class _FusedEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameters: Tensor, from_x: Tensor, points: Tensor, shape: tuple[int, int, bool]) -> Tensor:
        ctx.save_for_backward(parameters, from_x, points)
        ctx.shape = shape
        return extension().energy(parameters, from_x, points, *shape)  # type: ignore[union-attr]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_values: Tensor) -> tuple[Tensor | None, ...]:
        of_parameters, _, of_points, _ = ctx.needs_input_grad
        d_parameters, d_from_x, d_points = extension().gradient(  # type: ignore[union-attr]
            *ctx.saved_tensors, d_values.contiguous(), *ctx.shape, of_points, of_parameters
        )
        return *((d_parameters, d_from_x) if of_parameters else (None, None)), d_points if of_points else None, None


def fused_energy(parameters: Tensor, from_x: Tensor, points: Tensor, *, y_layers: int, residual_layers: int,
                 tanh: bool) -> Tensor:  # fmt: skip
    """Values of the energy networks of S seeds; differentiable once.

    Args:
        parameters: The weights of a seed in a row, in the order of evaluation, shape (S, P).
        from_x: What x gives to the first joint layer, its bias included, shape (S, 10, B).
        points: Shape (S, B, M).
        y_layers: Layers of the y-branch.
        residual_layers: Layers after the first joint one.
        tanh: Whether units are tanh; ReLU if not.

    Returns:
        f of shape (S, B, M).
    """
    return _FusedEnergy.apply(parameters, from_x.contiguous(), points.contiguous(), (y_layers, residual_layers, tanh))  # type: ignore[no-any-return]
