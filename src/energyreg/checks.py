"""Checks of arguments that many rooms share: a clear error at the border, before any work is lost."""

from __future__ import annotations

import numpy as np

__all__ = ["check_count"]


def check_count(name: str, number: int, smallest: int = 1) -> None:
    """Refuse a count that is not a whole number, or too small.

    Raises:
        ValueError: If it is, by the argument's name.
    """
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < smallest:
        raise ValueError(f"{name} is {number!r}; expected a whole number of at least {smallest}.")
