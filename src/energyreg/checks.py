"""Checks of arguments and of what files hold: a clear error at the border, before any work is lost."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import numbers
import types
import typing
from typing import Any

import numpy as np

__all__ = ["check_count", "check_level", "check_type", "is_number", "is_whole"]


def is_number(value: Any) -> bool:
    """Whether a value is a real number, which a boolean is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which a boolean is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def check_count(name: str, number: Any, smallest: int = 1, also: str = "") -> None:
    """Refuse a count that is not a whole number, or too small.

    Args:
        name: What an error calls it.
        number: The count.
        smallest: The least that it may be.
        also: Ends the message with what else it may be.

    Raises:
        ValueError: If it is, by the argument's name.
    """
    if not is_whole(number) or number < smallest:
        raise ValueError(f"{name} is {number!r}; expected a whole number of at least {smallest}{also}.")


def check_level(level: Any, name: str = "level") -> None:
    """Refuse what is no probability between 0 and 1.

    Raises:
        ValueError: If it is, by the argument's name.
    """
    if not is_number(level) or not 0 < level < 1:
        raise ValueError(f"{name} is {level!r}; expected a probability between 0 and 1, such as 0.9.")


def check_type(name: str, value: Any, kind: Any, *, finite: bool = True) -> None:
    """Refuse a value that is not what an annotation says, with all that is inside of it: for what comes from files.

    Args:
        name: What an error calls the value.
        value: The value. Whole numbers pass as floats, booleans as neither; lists and tuples as any sequence.
        kind: The annotation: a class, a union, a literal, a container of these, a TypedDict (whose other keys are not
            looked at), or a dataclass, which means a dict of its fields.
        finite: Whether floats must be finite.

    Raises:
        ValueError: If it is not; the message names the place.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if origin in (typing.Union, types.UnionType):
        chosen = [each for each in inner if _outside_fits(value, each)]
        if len(chosen) == 1:  # so that the error is about what is inside
            check_type(name, value, chosen[0], finite=finite)
            return
        fine = False
        for each in chosen:
            try:
                check_type(name, value, each, finite=finite)
                fine = True
            except ValueError:
                continue
    elif typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        fine = isinstance(value, dict)
        if fine:
            _check_fields(name, value, kind, finite)
    else:
        fine = _outside_fits(value, kind) and _is_held(value, finite)
        if fine and origin is tuple and inner[-1:] != (...,):
            fine = len(value) == len(inner)
            for number, (item, each) in enumerate(zip(value, inner, strict=False)):
                check_type(f"{name}[{number}]", item, each, finite=finite)
        elif fine and origin is not None and issubclass(origin, collections.abc.Mapping):
            for key, item in value.items():
                check_type(f"a key of {name}", key, inner[0], finite=finite)
                check_type(f"{name}[{key!r:.40}]", item, inner[1], finite=finite)
        elif fine and origin is not None and issubclass(origin, collections.abc.Iterable):
            for number, item in enumerate(value):
                check_type(f"{name}[{number}]", item, inner[0], finite=finite)
    if not fine:
        shown = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise ValueError(f"{name} is {value!r:.60}; expected {shown}.")


def _check_fields(name: str, value: dict[str, Any], kind: Any, finite: bool) -> None:
    hints = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):
        needed, allowed = kind.__required_keys__, None
    else:
        fields = dataclasses.fields(kind)
        allowed = {field.name for field in fields}
        none = dataclasses.MISSING
        needed = {field.name for field in fields if field.default is none and field.default_factory is none}
    for key in needed:
        if key not in value:
            raise ValueError(f"{name} has no {key!r}.")
    for key, item in value.items():
        if key in hints and (allowed is None or key in allowed):
            check_type(f"{name}[{key!r}]", item, hints[key], finite=finite)
        elif allowed is not None:
            raise ValueError(f"{name} has an entry {key!r:.40}, which is not known.")


def _outside_fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, whatever is inside of it."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if kind is None or kind is types.NoneType:
        return value is None
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in typing.get_args(kind))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is not None and issubclass(origin, collections.abc.Iterable):
        plain = (dict,) if issubclass(origin, collections.abc.Mapping) else (list, tuple)
        return isinstance(value, origin if origin is tuple else plain)
    return isinstance(value, origin or kind)


def _is_held(value: Any, finite: bool) -> bool:
    """Whether a value is no number, or one that a tensor can hold."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or not finite or math.isfinite(value)
