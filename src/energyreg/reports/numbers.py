"""Numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["fixed", "minus", "number", "small"]


def minus(text: str) -> str:
    """A number's text with a minus sign in place of a hyphen, and the sign of infinity."""
    return text.replace("-", "−") if not text.startswith("-inf") else "−∞"


def number(value: float, digits: int = 4) -> str:
    """A number with so many digits: 0.1234, 1234, all that lie before the decimal point (514,600), and 1.2·10⁻⁷."""
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return minus(f"{value + 0.0:g}").replace("inf", "∞")  # and no minus before 0
    if not 1e-4 <= size < 1e15:
        return _power_of_ten(f"{value:.{digits}g}")  # which drops zeros at the end
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    text = f"{value:{_comma(size)}.{decimals}f}"
    return minus(text.rstrip("0").rstrip(".") if decimals else text)


def fixed(size: float, digits: int = 4) -> Callable[[float], str]:
    """How numbers around a size are shown: with the decimals that give it so many digits, the same for all."""
    if not 1e-4 <= abs(size) < 1e15:
        return lambda value: number(value, 3)
    decimals = max(digits - 1 - math.floor(math.log10(abs(size))), 0)
    return lambda value: minus(f"{value:{_comma(max(abs(size), abs(value)))}.{decimals}f}")


def _comma(size: float) -> str:
    return "," if size >= 9_999.5 else ""  # none in the year 2026


def _power_of_ten(text: str) -> str:
    """4.8e-07 as 4.8·10⁻⁷."""
    figure, exponent = text.split("e")
    return minus(figure) + f"·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def small(value: float) -> str:
    """A small number: 0.012, but 4.8·10⁻⁷."""
    if value == 0 or not math.isfinite(value) or abs(value) >= 1e-3:
        return f"{value:.2g}"
    return _power_of_ten(f"{value:.1e}")
