"""The tasks: where their rows come from, how they are split, and what all methods are told of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from energyreg.datasets import (
    atoms,
    load_donkeycar,
    load_headpose_features,
    load_utkface,
    load_vgg_cells,
    split_by_blocks,
)
from experiments.images.features import Grid, Stages, features_of, pooled
from experiments.uci.data import VALIDATION, Split

__all__ = ["TASKS", "Fold", "Rows", "Task", "dequantise"]

Array = NDArray[np.float64]

BLOCK, GAP = 200, 20
"""Frames of a block of the drive, and frames left out on both sides of a border: at a distance of 20 frames steering
correlates by .24, of 50 by .01 or less in size but for the laps that return to the same bends."""
TIME = (0.7, 0.1, 0.2)
"""Shares of the blocks for training, validation and test."""
ATOM = 0.05
"""Share of the training rows with one value of the steering from which on it is an atom."""
CELLS = (100, 30, 70)
"""Pictures of cells for training, validation and test."""
VALIDATION_SEQUENCES = ("02", "09", "19")
"""Sequences of BIWI's training part that are held out, as in `experiments.several_outputs`."""
POSE_TRAIN_STRIDE, POSE_VALIDATION_STRIDE, POSE_TEST_STRIDE = 2, 8, 4
"""Neighbours in a video are alike: so many frames on is the next one that is trained on, validated on, and judged."""


@dataclass(frozen=True)
class Rows(Split):
    """Inputs and targets, with what is known of atoms.

    Attributes:
        slabs: Ends of the cells that atoms were spread over, in user units; for one target.
    """

    slabs: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Fold:
    """Rows of one seed.

    Attributes:
        split: Inputs and targets to train on, validate on and test on; targets of shape (N, D), dequantised.
        exact: Test targets as recorded, (N, D), by which errors are measured.
        ridge: Mean absolute error of ridge regression on the test rows, one a target, where it is a target of the task.
    """

    split: Rows
    exact: Array
    ridge: Sequence[float] | None = None


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Its name in the results.
        unit: Unit of its targets.
        load: Folder of the data, folder of the cache and seed to the rows.
        targets: Names of the targets.
        noise: Scales of the hand-designed noise in user units, as in paper IV.
        epochs: Passes over the training rows, the same for all methods.
        batch: Rows of a step.
        seeds: Seeds, 0 to seeds - 1.
        varied: What a seed changes besides initial weights and the order of rows.
    """

    name: str
    unit: str
    load: Callable[[Path, Path, int], Fold]
    targets: tuple[str, ...]
    noise: tuple[float, float]
    epochs: int
    batch: int
    seeds: int
    varied: str


def dequantise(y: Array, step: float, name: str) -> Array:
    """Targets with noise, uniform over the cell that they were rounded to; the same for all methods and seeds.

    Args:
        y: Targets, shape (N, D).
        step: Width of a cell.
        name: Name of the task, from which the noise comes.
    """
    return y + step * np.random.default_rng(zlib.crc32(name.encode())).uniform(-0.5, 0.5, y.shape)


def _fold(
    x: Array, y: Array, exact: Array, parts: Sequence[NDArray[np.int64]], slabs: tuple[tuple[float, float], ...] = ()
) -> Fold:
    train, held_out, test = parts
    return Fold(Rows(x[train], y[train], x[held_out], y[held_out], x[test], y[test], slabs), exact[test])


def age(data: Path, cache: Path, seed: int) -> Fold:
    """Ages of faces (UTKFace), by the split of `labels.csv`; a tenth of the training part is for validation."""
    task = load_utkface(data / "age")
    x = features_of(task.files, 112, pooled, cache)
    rows = np.random.default_rng(0).permutation(task.rows("train"))
    count = round(VALIDATION * len(rows))
    y = dequantise(task.targets, 1.0, "age")
    return _fold(x, y, task.targets, (rows[count:], rows[:count], task.rows("test")))


def steering_step(angles: Array) -> float:
    """The resolution that steering was recorded with: the usual distance of neighbouring values."""
    return float(np.median(np.diff(np.unique(angles))))


def steering(data: Path, cache: Path, seed: int) -> Fold:
    """Steering of a small car (Donkeycar), by blocks of time that the seed deals to the parts."""
    task = load_donkeycar(data / "steering" / "donkey_lab")
    x = features_of(task.files, 112, Grid, cache)
    assert task.time is not None
    parts = split_by_blocks(task.time, BLOCK, fractions=TIME, gap=GAP, groups=task.groups, seed=seed)
    step = steering_step(task.targets)
    y = dequantise(task.targets, step, "steering")
    slabs = tuple((value - step / 2, value + step / 2) for value in atoms(task.targets[parts[0]], ATOM))
    return _fold(x, y, task.targets, parts, slabs)


def cells(data: Path, cache: Path, seed: int) -> Fold:
    """Numbers of cells in simulated pictures (VGG), split by file at random by the seed."""
    task = load_vgg_cells(data / "cells" / "vgg")
    x = features_of(task.files, 224, Stages, cache)
    rows = np.random.default_rng(seed).permutation(len(task))
    parts = np.split(rows[: sum(CELLS)], np.cumsum(CELLS)[:2])
    return _fold(x, dequantise(task.targets, 1.0, "cells"), task.targets, parts)


def _ridge(split: Split) -> list[float]:
    """Mean absolute errors of ridge regression on clipped features, its penalty chosen on the validation rows."""
    low, high = np.quantile(split.x, [0.001, 0.999], axis=0)
    middle, scale = split.x.mean(0), split.x.std(0) + 1e-6

    def columns(x: Array) -> Array:
        return np.hstack([(np.clip(x, low, high) - middle) / scale, np.ones((len(x), 1))]).astype(np.float64)

    x, best = columns(split.x), (np.inf, [0.0])
    for penalty in np.logspace(-1, 5, 13):
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ split.y)
        error = np.abs(columns(split.x_validation) @ weights - split.y_validation).mean()
        if error < best[0]:
            best = error, np.abs(columns(split.x_test) @ weights - split.y_test).mean(0).tolist()
    return best[1]


def pose(data: Path, cache: Path, seed: int) -> Fold:
    """Yaw, pitch and roll of heads in degrees from 88 given features (BIWI); the parts share no sequence."""
    folder = data / "headpose" / "features"
    train, test = (
        load_headpose_features(folder / f"biwi_{part}.npz", units="degrees", group="sequence")
        for part in ("train", "test")
    )
    assert train.groups is not None
    held_out = np.isin(train.groups, VALIDATION_SEQUENCES)
    # A row of an unknown sequence may be of one that is held out.
    own = train.subset(np.flatnonzero((train.groups != "") & ~held_out)[::POSE_TRAIN_STRIDE])
    other = train.subset(np.flatnonzero(held_out)[::POSE_VALIDATION_STRIDE])
    few = test.subset(np.arange(0, len(test), POSE_TEST_STRIDE))
    split = Rows(own.x, own.targets, other.x, other.targets, few.x, few.targets)
    return Fold(split, few.targets, _ridge(split))


TASKS = [
    Task("age", "years", age, ("age",), (0.1, 20.0), 15, 128, 3, "nothing"),
    Task("steering", "fraction of full lock", steering, ("steering",), (0.0125, 0.5), 15, 128, 3, "the blocks of time"),
    Task("cells", "cells", cells, ("count",), (1.0, 40.0), 80, 32, 5, "the split"),
    Task("pose", "degrees", pose, ("yaw", "pitch", "roll"), (1.0, 10.0), 10, 128, 3, "nothing"),
]
"""Steering in paper IV was in degrees, within ±80 or so: its scales of 1 and 40 are taken as 1/80 and 40/80 here."""
