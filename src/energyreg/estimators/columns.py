"""Columns of tables for predictions: whether they are those of the training, and what the model sees of them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from energyreg.errors import DataError
from energyreg.tables.columns import column_names, read_columns

__all__ = ["check_features", "encode_table"]


def encode_table(estimator: Any, X: Any) -> np.ndarray:
    """The columns of a table as the preprocessor of a fitted estimator returns them.

    Raises:
        ValueError: If the columns are not those of the training, or hold values of another kind.
    """
    names, columns, rows = read_columns(X, "X")
    check_features(estimator, X)
    if len(columns) != estimator.n_features_in_:
        _refuse_count(estimator, len(columns), "X")
    return estimator.preprocessor_.transform_columns(names, columns, rows)


def check_features(estimator: Any, X: Any, name: str = "X") -> None:
    """Refuse names and numbers of columns that are not those of the training, with the messages of scikit-learn."""
    given = column_names(X)
    known = getattr(estimator, "feature_names_in_", None)
    named = given is not None and all(isinstance(column, str) for column in given)
    count = len(given) if given is not None else None
    if known is not None and named and given is not None:
        if list(known) == given:
            return
        extra, missing = sorted(set(given) - set(known)), sorted(set(known) - set(given))
        parts = ["The feature names should match those that were passed during fit.\n"]
        for title, found in (("unseen at fit time", extra), ("seen at fit time, yet now missing", missing)):
            if found:
                shown = "".join(f"- {column}\n" for column in found[:5]) + ("- ...\n" if len(found) > 5 else "")
                parts.append(f"Feature names {title}:\n{shown}")
        if not extra and not missing:
            parts.append("Feature names must be in the same order as they were in fit.\n")
        raise ValueError("".join(parts))
    if known is not None and not named:
        warnings.warn(
            f"X does not have valid feature names, but {type(estimator).__name__} was fitted with feature names",
            stacklevel=5,
        )
    elif known is None and named:
        warnings.warn(
            f"X has feature names, but {type(estimator).__name__} was fitted without feature names", stacklevel=5
        )
    if count is not None and count != estimator.n_features_in_:
        _refuse_count(estimator, count, name)


def _refuse_count(estimator: Any, count: int, name: str) -> None:
    raise DataError(
        "{name} has {count} features, but {estimator} is expecting {expected} features as input. Pass the columns "
        "that were passed to fit.",
        name=name, count=count, estimator=type(estimator).__name__, expected=estimator.n_features_in_,
    )  # fmt: skip
