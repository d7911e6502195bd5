"""Tables as data: columns, targets, preprocessing, files. No model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["TablePreprocessor", "column_names", "read_targets"]

_ORIGIN = {"TablePreprocessor": "preprocessing", "column_names": "columns", "read_targets": "targets"}


def __getattr__(name: str) -> Any:
    # Only when asked for: the command line reads files of tables before it needs NumPy.
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"energyreg.tables.{_ORIGIN[name]}"), name)


if TYPE_CHECKING:
    from energyreg.tables.columns import column_names
    from energyreg.tables.preprocessing import TablePreprocessor
    from energyreg.tables.targets import read_targets
