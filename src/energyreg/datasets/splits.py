"""Splits that keep together what belongs together: frames of a recording, pictures of a person, tiles of a slide.

A random split of such rows puts near copies of the training data into the test set, and every score flatters a model
that memorises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["split_by_blocks", "split_by_group"]

Rows = tuple[NDArray[np.int64], ...]


def split_by_blocks(
    time: NDArray[Any] | Sequence[float],
    block: float,
    *,
    fractions: Sequence[float] = (0.8, 0.2),
    gap: float = 0.0,
    groups: NDArray[Any] | Sequence[str] | None = None,
    seed: int = 0,
) -> Rows:
    """Split a recording into parts by blocks of time.

    Time is cut into blocks of one length, counted from the first row of each group, and whole blocks are dealt to the
    parts at random. Rows within `gap` of a block of another part are left out, since neighbouring frames show the same
    scene. scikit-learn's ``TimeSeriesSplit`` trains on the past only, and ``GroupShuffleSplit`` leaves no gap.

    Args:
        time: Time of each row, in any unit, shape (N,): a frame's number will do. Need not be sorted.
        block: Length of a block, in the same unit; long against the time in which the scene changes.
        fractions: Shares of the parts, which sum to 1, such as (train, validation, test). They hold for the number of
            blocks, to the nearest block, and every part gets at least one.
        gap: Rows this close, or closer, to a row of another part in the same group are left out; 0 for none.
        groups: Recording of each row, shape (N,); times of different recordings are not compared.
        seed: Seed of the draw.

    Returns:
        Row numbers of each part, in the order of `fractions`, ascending.

    Raises:
        ValueError: time is not finite or not of shape (N,), block is not positive, gap is negative, fractions do not
            sum to 1, there are fewer blocks than parts, or a gap leaves a part empty.

    Example:
        >>> import numpy as np
        >>> train, test = split_by_blocks(np.arange(1000), block=100, fractions=(0.7, 0.3), gap=5, seed=1)
        >>> len(set(train // 100) & set(test // 100)), abs(train[:, None] - test).min() > 5
        (0, np.True_)
    """
    moments = np.asarray(time, dtype=np.float64)
    if moments.ndim != 1 or len(moments) == 0 or not np.isfinite(moments).all():
        raise ValueError(f"time has shape {moments.shape}; expected finite times of shape (N,), with N > 0.")
    if not block > 0 or not math.isfinite(block):
        raise ValueError(f"block is {block}; expected a positive length of time.")
    if not gap >= 0:
        raise ValueError(f"gap is {gap}; expected a length of time, or 0 for none.")
    _, group = _labels(groups, len(moments))
    start = np.full(group.max() + 1, np.inf)
    np.minimum.at(start, group, moments)
    number = np.floor((moments - start[group]) / block).astype(np.int64)
    blocks, of_row = np.unique(np.stack([group, number], axis=1), axis=0, return_inverse=True)
    part = _deal(len(blocks), fractions, seed, "blocks of time")[of_row.reshape(-1)]
    keep = _far_from_others(moments, group, part, gap)
    parts = tuple(np.flatnonzero(keep & (part == k)) for k in range(len(fractions)))
    for k, rows in enumerate(parts):
        if len(rows) == 0:
            raise ValueError(f"gap is {gap}, which leaves part {k} without rows; make it smaller, or block longer.")
    return parts


def split_by_group(
    groups: NDArray[Any] | Sequence[str], *, fractions: Sequence[float] = (0.8, 0.2), seed: int = 0
) -> Rows:
    """Split rows into two or more parts so that no group is in two of them.

    scikit-learn's ``GroupShuffleSplit`` does it for two parts; this does it for any number.

    Args:
        groups: Group of each row, shape (N,): a person, a sequence, a slide.
        fractions: Shares of the parts, which sum to 1, such as (train, validation, test). They hold for the number of
            groups, to the nearest group, and every part gets at least one.
        seed: Seed of the draw.

    Returns:
        Row numbers of each part, in the order of `fractions`, ascending.

    Raises:
        ValueError: A row has no group (an empty name), fractions do not sum to 1, or there are fewer groups than parts.

    Example:
        >>> train, test = split_by_group(["anna", "anna", "ben", "cleo"], fractions=(0.7, 0.3))
        >>> len(train) + len(test)
        4
    """
    names, group = _labels(groups, len(groups))
    if "" in names:
        rows = np.flatnonzero(group == names.index(""))
        raise ValueError(
            f"groups is empty in {len(rows)} rows, the first of which is row {rows[0]}; expected the group of each "
            f"row; leave out rows whose group is not known."
        )
    part = _deal(len(names), fractions, seed, "groups")[group]
    return tuple(np.flatnonzero(part == k) for k in range(len(fractions)))


def _labels(groups: NDArray[Any] | Sequence[str] | None, n: int) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the groups, and the number of each row's group, shape (N,)."""
    labels = np.zeros(n, dtype=np.str_) if groups is None else np.asarray(groups).astype(np.str_)
    if labels.shape != (n,) or n == 0:
        raise ValueError(f"groups has shape {labels.shape}; expected ({n},), a group for each row, and some rows.")
    names, number = np.unique(labels, return_inverse=True)
    return names.tolist(), number.reshape(-1).astype(np.int64)


def _deal(count: int, fractions: Sequence[float], seed: int, what: str) -> NDArray[np.int64]:
    """Deal things to parts at random: the part of each, shape (count,)."""
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or len(shares) < 2 or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"fractions is {tuple(fractions)}; expected two or more positive shares that sum to 1.")
    if count < len(shares):
        raise ValueError(f"there are {count} {what} for {len(shares)} parts; expected at least one for each part.")
    sizes = np.diff(np.rint(np.concatenate([[0], shares.cumsum()]) * count).astype(np.int64))
    while (sizes == 0).any():  # rounding can leave a small part empty: the largest one gives
        sizes[sizes.argmin()] += 1
        sizes[sizes.argmax()] -= 1
    # As for the protein table: the raw output of a bit generator is the same in all versions of NumPy.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    part = np.empty(count, dtype=np.int64)
    part[order] = np.repeat(np.arange(len(shares)), sizes)
    return part


def _far_from_others(
    time: NDArray[np.float64], group: NDArray[np.int64], part: NDArray[np.int64], gap: float
) -> NDArray[np.bool_]:
    """Which rows are farther than `gap` from every row of another part in their group, shape (N,)."""
    keep = np.ones(len(time), dtype=bool)
    if gap == 0:
        return keep
    order = np.lexsort((time, group))
    g, t, p = group[order], time[order], part[order]
    # The nearest row of another part, on either side, is the one beside the run of rows of one part in one group.
    starts = np.flatnonzero((np.diff(g) != 0) | (np.diff(p) != 0)) + 1
    edges = np.concatenate([[0], starts, [len(t)]])
    run = np.searchsorted(starts, np.arange(len(t)), side="right")
    for beside in (edges[run] - 1, edges[run + 1]):
        there = beside.clip(0, len(t) - 1)
        keep[order] &= (beside != there) | (g[there] != g) | (np.abs(t - t[there]) > gap)
    return keep
