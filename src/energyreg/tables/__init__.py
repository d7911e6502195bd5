"""Tables as data: columns, targets, preprocessing, files. No model."""

from energyreg.tables.preprocessing import (
    TablePreprocessor,
    column_names,
    read_targets,
)

__all__ = [
    "TablePreprocessor",
    "column_names",
    "read_targets",
]
