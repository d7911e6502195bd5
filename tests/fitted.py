"""Small estimators of every kind of target, each fitted once, and rows for them."""

from functools import cache

import numpy as np
import pandas as pd

from energyreg.estimators.table import EnergyRegressor

KINDS = {"real": ["y"], "positive": ["y"], "count": ["y"], "circle": ["y"], "two": ["y", "z"]}
"""Kind → names of its outputs."""


def rows(count, seed=0):
    """A table with a number, a category and a missing value, and targets that are linear in the number."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count)
    table = pd.DataFrame({"x": x, "w": rng.normal(size=count), "group": rng.choice(["a", "b", "c"], count)})
    table.loc[3, "w"] = np.nan
    return table, 2 * x + rng.normal(size=count)


def targets(kind, y):
    if kind == "positive":
        return np.exp(y / 3)
    if kind == "count":
        return np.maximum(np.round(y + 5), 0)
    if kind == "circle":
        return (350 + 20 * y) % 360
    return np.stack([y, y**2 + np.cos(7 * y)], 1) if kind == "two" else y


@cache
def fitted(kind):
    """An estimator of this kind of target that has seen one epoch."""
    table, y = rows(120)
    target = {"circle": ("circle", 0, 360), "two": "real"}.get(kind, kind)
    return EnergyRegressor(target=target, n_members=1, epochs=1, random_state=0).fit(table, targets(kind, y))
