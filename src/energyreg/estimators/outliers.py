"""Wild targets: single values so far from all others that they would set the scale of the whole model.

A heavy tail is no reason to leave a value out. Far out in a tail the logarithms of the distances from the median are
spaced like exponential variables (Rényi), with a rate that the tail itself tells (Hill). A value is wild only where
the gap before it is far beyond what that rate allows, so Student's t, Cauchy and log-normal targets have none.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg.densities.spaces import TargetSpace

__all__ = ["Fences", "find_fences", "fences_of", "warn_of_outliers"]

MOST_WILD = 0.02
"""Fraction of the rows, on each side, beyond which values are a part of the distribution, however far they are."""
LEAST_DISTANCE, LEAST_RATIO = 20.0, 5.0
"""How far a wild value is at least: in standard deviations of the others, and in largest distances among them."""
SURPRISE = 12.0
"""Spacing of the logarithms, in means of what the tail allows, from which on the gap is no tail's: e⁻¹² by chance."""
FEWEST_IN_TAIL, FRACTION_OF_TAIL = 10, 0.1
"""Values that the rate of the tail is estimated from: a fraction of those of the side, and at least so many."""
FEWEST_ON_SIDE = 50
"""Values of a side, below which those of both sides stand for it."""
NAMED = 5
"""Outliers that a warning names."""

Array = NDArray[np.float64]
Fences = tuple[Array, Array]
"""Lower and upper ends, in a space's unconstrained coordinates, between which the targets that are not wild lie."""


def fences_of(values: Array) -> tuple[float, float]:
    """Ends between which the values lie that are not wild; infinite where none is.

    Args:
        values: Values on an unbounded scale, shape (N,).
    """
    middle = np.median(values)
    kept = values - middle
    most = max(int(MOST_WILD * len(values)), 1)
    low = high = np.inf
    for _ in range(len(values)):  # a wild value on one side may hide those on the other
        low, high = min(low, _end(-kept, most)), min(high, _end(kept, most))
        inside = kept[(-low <= kept) & (kept <= high)]
        if len(inside) == len(kept):
            break
        kept = inside
    return float(middle - low), float(middle + high)


def _end(offset: Array, most: int) -> float:
    """The offset from the median beyond which values are wild, of which there are `most` at most."""
    side, tail = np.sort(offset[offset > 0])[::-1], np.sort(np.abs(offset[offset != 0]))[::-1]
    if len(side) >= FEWEST_ON_SIDE:
        tail = side
    for count in range(min(most, len(side)), 0, -1):
        nearest = side[count - 1]
        if (side >= nearest).sum() > most:  # many rows share this value: it is a point mass
            continue
        rest = tail[tail < nearest]
        size = max(int(FRACTION_OF_TAIL * len(rest)), FEWEST_IN_TAIL)
        if len(rest) <= size:
            continue
        if nearest < max(LEAST_RATIO * rest[0], LEAST_DISTANCE * np.sqrt(np.mean(rest**2))):
            continue
        mean_spacing = np.mean(np.log(rest[:size] / rest[size]))
        if count * np.log(nearest / rest[0]) > SURPRISE * mean_spacing:
            return float(np.sqrt(nearest) * np.sqrt(rest[0]))  # between the two, on the scale of the test
    return np.inf


def find_fences(space: TargetSpace, targets: Array) -> Fences:
    """The fences of each output.

    Args:
        space: Target space, not fitted yet: its map is that onto the unconstrained coordinates.
        targets: Targets, shape (N, D).
    """
    z = _coordinates(space, targets)
    ends = [
        (-np.inf, np.inf) if periodic else fences_of(z[:, column]) for column, periodic in enumerate(space.periodic)
    ]
    low, high = np.array(ends).T
    return low, high


def warn_of_outliers(
    space: TargetSpace, targets: Array, fences: Fences, rows: NDArray[np.intp], name: str
) -> NDArray[np.bool_]:
    """Say which targets are wild, if any.

    Args:
        space: As in :func:`find_fences`.
        targets: Targets, shape (N, D).
        fences: What :func:`find_fences` returned.
        rows: Number of each row in the user's table, shape (N,).
        name: What the warning calls the targets.

    Returns:
        Which rows are wild in an output, shape (N,).
    """
    z = _coordinates(space, targets)
    wild = (z < fences[0]) | (z > fences[1])
    found: NDArray[np.bool_] = np.asarray(wild.any(1))
    if not found.any():
        return found
    several = targets.shape[1] > 1
    places = np.argwhere(wild)
    named = ", ".join(
        f"{targets[row, column]:.6g} in row {rows[row]}" + (f", column {column}" if several else "")
        for row, column in places[:NAMED].tolist()
    )
    columns: Sequence[int] = sorted(set(places[:, 1].tolist()))
    usual = "; ".join(
        f"{targets[~wild[:, c], c].min():.6g} to {targets[~wild[:, c], c].max():.6g}"
        + (f" in column {c}" if several else "")
        for c in columns
        if not wild[:, c].all()
    )
    warnings.warn(
        f"{name} has {len(places)} wild value{'s' * (len(places) > 1)} far from all others: {named}"
        f"{', ...' if len(places) > NAMED else ''} (rows count from 0; the others go from {usual}). The model is "
        "trained and calibrated without these rows. Correct or drop them; if such values are real, predict a "
        "transformed target, such as a logarithm.",
        stacklevel=7,
    )
    return found


def _coordinates(space: TargetSpace, targets: Array) -> Array:
    unfitted = copy.deepcopy(space)
    return unfitted.to_model(torch.as_tensor(targets)).double().cpu().numpy()
