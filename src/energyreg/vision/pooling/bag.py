"""Weighted sums of rows of a table, with derivatives of any order, and the checks that all poolers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["BLOCK", "Bag", "check_bins", "check_boxes", "check_indices"]

BLOCK = 2**20
"""Weighted nodes that are summed in one call: 12 MB of weights and indices."""


class Bag(torch.autograd.Function):
    """Σ_k weights[b, k] table[nodes[b, k]], shape (b, C): `embedding_bag` with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor, nodes: Tensor) -> Tensor:
        ctx.save_for_backward(table, weights, nodes)
        with torch.enable_grad():
            ctx.leaves = [
                each.detach().requires_grad_(needed)
                for each, needed in zip((table, weights), ctx.needs_input_grad[:2], strict=True)
            ]
            ctx.sums = embedding_bag(nodes, ctx.leaves[0], mode="sum", per_sample_weights=ctx.leaves[1])
        return ctx.sums.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        table, weights, nodes = ctx.saved_tensors
        graph = (ctx.sums, *ctx.leaves)
        return *_BagGradient.apply(table, weights, gradient, nodes, ctx.needs_input_grad[:2], graph), None


class _BagGradient(torch.autograd.Function):
    """The gradients of :class:`Bag` in the table and in the weights; their own gradients are bags again."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        weights: Tensor,
        gradient: Tensor,
        nodes: Tensor,
        wanted: tuple[bool, bool],
        graph: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(table, weights, gradient, nodes)
        ctx.wanted = wanted
        if graph is None:
            with torch.enable_grad():
                leaves = [
                    each.detach().requires_grad_(needed) for each, needed in zip((table, weights), wanted, strict=True)
                ]
                graph = (embedding_bag(nodes, leaves[0], mode="sum", per_sample_weights=leaves[1]), *leaves)
        sums, *leaves = graph
        chosen = [leaf for leaf, needed in zip(leaves, wanted, strict=True) if needed]
        # Kept, as the caller may ask for the gradient again; it goes with the caller's graph.
        values = iter(torch.autograd.grad(sums, chosen, gradient.detach().contiguous(), retain_graph=True))
        to_table, to_weights = (next(values) if needed else None for needed in wanted)
        return to_table, to_weights

    @staticmethod
    def backward(ctx: Any, along_table: Tensor | None, along_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        # d/d(table, weights, gradient) of Σ weights · gradient · table[nodes], with one factor replaced at a time.
        table, weights, gradient, nodes = ctx.saved_tensors
        need_table, need_weights, need_gradient = ctx.needs_input_grad[:3]
        to_table = to_weights = to_gradient = None
        if along_weights is not None:
            if need_table:
                to_table, _ = _BagGradient.apply(table, along_weights, gradient, nodes, (True, False), None)
            if need_gradient:
                to_gradient = Bag.apply(table, along_weights, nodes)
        if along_table is not None:
            if need_weights:
                _, to_weights = _BagGradient.apply(along_table, weights, gradient, nodes, (False, True), None)
            if need_gradient:
                part = Bag.apply(along_table, weights, nodes)
                to_gradient = part if to_gradient is None else to_gradient + part
        return to_table, to_weights, to_gradient, None, None, None


def check_bins(output_size: int | tuple[int, int]) -> tuple[int, int]:
    """Bins along y and x."""
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(f"output_size is {output_size!r}; expected a whole number of at least 1, or two of them.")
    return pair[0], pair[1]


def check_boxes(boxes: Tensor, columns: int = 4, meaning: str = "corners (x1, y1, x2, y2)") -> None:
    """Refuse what is no floating-point tensor with so many columns."""
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        found = f"dtype {boxes.dtype}" if isinstance(boxes, Tensor) else f"type {type(boxes).__name__}"
        raise TypeError(f"boxes has {found}; expected a floating-point tensor of shape (R, {columns}).")
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; expected (R, {columns}): {meaning}.")


def check_indices(index: Tensor | None, name: str, count: int, limit: int, device: torch.device) -> Tensor:
    """An index for each box, below `limit`; zeros where nothing is given and there is one choice."""
    if index is None:
        if limit > 1:
            raise ValueError(f"{name} is None, but there are {limit} {name}s; pass the {name} of each box, shape (R,).")
        return torch.zeros(count, dtype=torch.long, device=device)
    if index.shape != (count,) or index.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(index.shape)} and dtype {index.dtype}; expected ({count},) integers."
        )
    if count and not 0 <= int(index.min()) <= int(index.max()) < limit:
        raise ValueError(f"{name} has values from {int(index.min())} to {int(index.max())}; expected 0 to {limit - 1}.")
    return index.to(device, torch.long)
