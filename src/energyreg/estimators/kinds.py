"""The words for kinds of targets, and what must come with each; without PyTorch, for the command line."""

from __future__ import annotations

import math
import numbers
from typing import Any

__all__ = ["PLAIN", "RANGES", "kind_and_ends"]

PLAIN = ("real", "positive", "count")
"""Kinds that a word says."""
RANGES = ("interval", "circle")
"""Kinds that need a lower and an upper end."""


def kind_and_ends(given: Any) -> tuple[Any, ...]:
    """The word of a kind, followed by its two ends where it has some.

    Args:
        given: A word, or a tuple or list of a word and two numbers.

    Raises:
        ValueError: If it is no such.
    """
    if isinstance(given, str) and given in PLAIN:
        return (given,)
    if isinstance(given, (tuple, list)) and len(given) == 3 and isinstance(given[0], str) and given[0] in RANGES:
        name, low, high = given
        fine = all(isinstance(end, numbers.Real) and math.isfinite(end) for end in (low, high))
        if not fine or not low < high:
            raise ValueError(f"target is {given!r}; expected finite numbers with low < high.")
        return name, float(low), float(high)
    raise ValueError(
        f'target is {given!r}; expected "real", "positive", ("interval", low, high), ("circle", low, high), "count", '
        "or a space of energyreg.spaces."
    )
