"""Tables as data: columns, targets, preprocessing, files. No model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["TablePreprocessor", "column_names", "read_targets"]


def __getattr__(name: str) -> Any:
    # Only when asked for: the command line reads files of tables before it needs NumPy.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("energyreg.tables.preprocessing"), name)


if TYPE_CHECKING:
    from energyreg.tables.preprocessing import TablePreprocessor, column_names, read_targets
