"""A head along one dimension as a table: a node of a row's own then costs a look-up in place of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Table", "tabulate"]

FIRST, LAST = 256, 4096
"""Intervals of the coarsest and of the finest table."""


class Table:
    r"""Functions of v in [-1, 1], one a row, by cubic polynomials through four neighbouring values each.

    The error falls with the fourth power of the number of values.

    Args:
        values: At K + 1 evenly spaced places, K ≥ 3, shape (K + 1, B).
    """

    def __init__(self, values: Tensor) -> None:
        self.count = len(values) - 1
        y = values.T.contiguous()  # a row's values side by side
        before, here, there, beyond = (y[:, k : self.count - 2 + k] for k in range(4))
        # Of the polynomial through all four, in t from `here` (0) to `there` (1).
        cubic = (beyond - before) / 6 + (here - there) / 2
        square = (before + there) / 2 - here
        self.coefficients = torch.stack([here, there - here - square - cubic, square, cubic], -1).reshape(-1, 4)

    def __call__(self, v: Tensor) -> Tensor:
        """Values at v, (S, B) to (S, B)."""
        position = (v + 1) * (self.count / 2)
        index = position.floor().clamp_(1, self.count - 2)
        t = position - index
        pieces = self.count - 2
        row = torch.arange(v.shape[1], device=v.device) * pieces - 1
        a, b, c, d = self.coefficients.index_select(0, (index.long() + row).flatten()).view(*v.shape, 4).unbind(-1)
        return torch.addcmul(a, t, torch.addcmul(b, t, torch.addcmul(c, t, d)))


def tabulate(function: Callable[[Tensor], Tensor], like: Tensor, tolerance: float = 2e-5) -> Table | None:
    """Tabulate functions, finer and finer until the error is within the tolerance.

    Args:
        function: Shared places v, shape (G, 1, 1), to values (G, B).
        like: A tensor of the dtype and device of v.
        tolerance: The error that is allowed, in nats.

    Returns:
        The table; None where the finest one is too coarse.
    """
    values = function(torch.linspace(-1, 1, FIRST + 1, dtype=like.dtype, device=like.device)[:, None, None])
    while (count := len(values) - 1) <= LAST:
        middles = (2 * torch.arange(count, dtype=like.dtype, device=like.device) + 1) / count - 1
        between = function(middles[:, None, None])
        table = Table(values)
        error = float((table(middles[:, None].expand_as(between)) - between).abs().max())
        if error <= tolerance:
            return table
        values = torch.cat([torch.stack([values[:-1], between], 1).flatten(0, 1), values[-1:]])
        # With twice as many values the error is a sixteenth, or an eighth where it does not fall so fast yet.
        if error <= 8 * tolerance and 2 * count <= LAST:
            return Table(values)
    return None
