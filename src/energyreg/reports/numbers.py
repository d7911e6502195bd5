"""Numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["fixed", "minus", "number", "small"]


def minus(text: str) -> str:
    """A number's text with a minus sign in place of a hyphen, and the sign of infinity."""
    return text.replace("-", "−") if not text.startswith("-inf") else "−∞"


def number(value: float, digits: int = 4) -> str:
    """A number with so many digits: 0.1234, 1234, and all that lie before the decimal point: 74,100."""
    if not 10**digits - 0.5 <= abs(value) < 1e15:
        return minus(f"{value:.{digits}g}")
    return minus(f"{value:,.0f}" if abs(value) >= 9_999.5 else f"{value:.0f}")  # no comma in the year 2026


def fixed(size: float) -> Callable[[float], str]:
    """How numbers around a size are shown: with the decimals that give it four digits, the same for all."""
    if not 1e-4 <= abs(size) < 1e15:
        return lambda value: minus(f"{value:.3g}")
    decimals = max(3 - math.floor(math.log10(abs(size))), 0)
    group = "," if abs(size) >= 1e4 else ""
    return lambda value: minus(f"{value:{group}.{decimals}f}")


def small(value: float) -> str:
    """A small number: 0.012, but 4.8·10⁻⁷."""
    if value == 0 or not math.isfinite(value) or abs(value) >= 1e-3:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
