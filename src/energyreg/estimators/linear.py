"""The linear baseline: what a straight line through the training rows predicts, kept beside the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from energyreg.checks import check_type

__all__ = ["LinearGaussian"]

MOST_COLUMNS, MOST_LEVELS = 1_024, 64
"""Columns that take part at most: of more, those that correlate most with the targets. Levels of a category."""
MOST_ROWS, MOST_WORK = 100_000, 2e10
"""Rows that are fitted to at most, chosen at random, and multiplications."""
BLOCK = 4_096
BEYOND = 0.25
"""How far a line may leave the range of the training targets, as a fraction of it."""
PENALTIES = np.logspace(-8, 4, 49)
"""Ridge penalties to choose from, as multiples of the inputs' mean variance."""

Array = NDArray[np.float64]


class State(TypedDict):
    """What a file holds of a linear baseline."""

    cardinalities: list[int]
    circles: list[bool]
    weights: list[list[float]]
    offset: list[float]
    covariance: list[list[float]]
    ends: list[list[float]]
    rows: int


@dataclass(frozen=True)
class LinearGaussian:
    """A Gaussian of constant width around a linear function of encoded inputs, in a model's target space.

    Fitted by ridge regression, with the penalty of each output by generalised cross-validation. An angle's mean
    direction is that of two linear functions, for its cosine and its sine. Categories are one-hot. The location
    leaves the range of the training targets by a quarter at most: far beyond it, a logarithm makes a line absurd.

    Attributes:
        cardinalities: Codes of each column of categories; the columns of numbers come first.
        circles: Which outputs are angles, D of them.
        weights: Of the inputs on the outputs, then on the sines of the angles, shape (P, D + angles).
        offset: What the location is where the inputs are 0, shape (D + angles,).
        covariance: Of the noise, shape (D, D).
        ends: Least and largest location of each output, shape (2, D).
        rows: Rows that it was fitted to.
    """

    cardinalities: tuple[int, ...]
    circles: tuple[bool, ...]
    weights: Array
    offset: Array
    covariance: Array
    ends: Array
    rows: int

    @classmethod
    def fit(
        cls,
        x: Any,
        z: Array,
        *,
        cardinalities: Sequence[int] = (),
        circles: Sequence[bool] = (),
        weights: Array | None = None,
    ) -> Self:
        """Fit to training rows.

        Args:
            x: Encoded inputs, numbers and then codes, shape (N, F), N ≥ 3; may be mapped from a file.
            z: Targets in model space, shape (N, D).
            cardinalities: Codes of each column of categories.
            circles: Which outputs are angles in radians; none by default.
            weights: Weights of the rows, shape (N,); equal by default.

        Returns:
            The fitted baseline.

        Raises:
            ValueError: If there are fewer than 3 rows.
        """
        if len(z) < 3:
            raise ValueError(f"x has {len(z)} rows; expected at least 3 to fit a line to.")
        angle = np.array(circles or (False,) * z.shape[1])
        sizes, numbers = tuple(int(size) for size in cardinalities), x.shape[1] - len(cardinalities)
        width = numbers + sum(min(size, MOST_LEVELS) for size in sizes)
        size = min(width, MOST_COLUMNS)
        most = int(min(MOST_ROWS, max(MOST_WORK / max(size, 1) ** 2, 4 * size)))
        rows = np.arange(len(z))
        if len(z) > most:
            rows = np.sort(np.random.default_rng(0).choice(len(z), most, replace=False))
        w = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=float)[rows]
        w = w / w.mean()
        z = _finite(np.asarray(z, dtype=float)[rows])
        parts = np.concatenate([np.where(angle, np.cos(z), z), np.sin(z[:, angle])], 1)

        def blocks(columns: Any = slice(None)) -> Iterator[tuple[Array, slice]]:
            for start in range(0, len(rows), BLOCK):
                part = slice(start, start + BLOCK)
                yield _design(np.asarray(x[rows[part]]), sizes)[:, columns], part

        count = len(rows)
        centre, middle = sum(w[p] @ d for d, p in blocks()) / count, w @ parts / count
        square = sum(w[p] @ (d - centre) ** 2 for d, p in blocks()) / count
        cross = sum((w[p, None] * (d - centre)).T @ (parts[p] - middle) for d, p in blocks())
        strength = (np.abs(cross) / np.sqrt(np.maximum(square, 1e-300))[:, None]).max(1)
        chosen = np.sort(np.argsort(-strength, kind="stable")[:size])
        gram = sum((w[p, None] * (d - centre[chosen])).T @ (d - centre[chosen]) for d, p in blocks(chosen))
        total = w @ (parts - middle) ** 2
        solved, used = _ridge(np.asarray(gram), cross[chosen], total, count)
        full = np.zeros((width, parts.shape[1]))
        full[chosen] = solved
        # Digits that a file keeps, so that a loaded baseline is the same.
        full, offset = _short(full), _short(middle - centre @ full)
        low, high = z.min(0), z.max(0)
        ends = _short(np.stack([low - BEYOND * (high - low), high + BEYOND * (high - low)]))
        found = cls(sizes, tuple(angle.tolist()), full, offset, np.eye(z.shape[1]), ends, count)
        residual = np.concatenate([found.residual(z[p], found._location(d)) for d, p in blocks()])
        # As generalised cross-validation has it: with what the error of the line adds on new rows.
        covariance = (w[:, None] * residual).T @ residual * count / (count - min(used, count / 2)) ** 2
        covariance += np.diag(np.maximum(1e-12 * z.var(0), 1e-30))
        if len(covariance) > 1:  # positive with the digits that a file keeps, even where outputs are one line
            covariance += np.diag(1e-7 * np.diag(covariance))
        return cls(found.cardinalities, found.circles, full, offset, _short(covariance), ends, count)

    def location(self, x: Any) -> Array:
        """The linear function of encoded inputs (B, F), in the target space, shape (B, D)."""
        return self._location(_design(np.asarray(x), self.cardinalities))

    def _location(self, design: Array) -> Array:
        parts = design @ self.weights + self.offset
        angle, outputs = np.array(self.circles), len(self.circles)
        location = parts[:, :outputs].clip(*self.ends)
        location[:, angle] = np.arctan2(parts[:, outputs:], parts[:, :outputs][:, angle])
        return location

    def residual(self, z: Array, location: Array) -> Array:
        """Targets minus location, along the shorter way around a circle, shape (B, D)."""
        difference = z - location
        return np.where(self.circles, (difference + math.pi) % (2 * math.pi) - math.pi, difference)

    def state(self) -> dict[str, Any]:
        """What was fitted, as lists and numbers; see :meth:`from_state`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], features: int, cardinalities: Sequence[int], outputs: int) -> Self:
        """The baseline that had this state.

        Args:
            state: What :meth:`state` returned.
            features: Columns of the encoded inputs, F.
            cardinalities: Codes of each column of categories.
            outputs: Outputs, D.

        Raises:
            ValueError: If it does not fit these sizes, or holds what is no number.
        """
        check_type("linear_baseline", state, State)
        sizes, circles = tuple(state["cardinalities"]), tuple(state["circles"])
        if sizes != tuple(cardinalities) or len(circles) != outputs:
            raise ValueError(
                f"cardinalities or circles of the linear baseline are {sizes} and {circles}; expected others."
            )
        numbers: dict[str, Any] = dict(state)
        arrays = {name: np.array(numbers[name], dtype=float) for name in ("weights", "offset", "covariance", "ends")}
        width = features - len(sizes) + sum(min(size, MOST_LEVELS) for size in sizes)
        parts = outputs + sum(circles)
        expected = {"weights": (width, parts), "offset": (parts,), "covariance": (outputs,) * 2, "ends": (2, outputs)}
        for name, shape in expected.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise ValueError(
                    f"{name} of the linear baseline has shape {arrays[name].shape}; expected {shape}, all finite."
                )
        scale = np.sqrt(np.diag(arrays["covariance"]).clip(1e-300))
        if np.linalg.eigvalsh(arrays["covariance"] / np.outer(scale, scale)).min() <= 0:
            raise ValueError("covariance of the linear baseline is not positive definite.")
        return cls(sizes, circles, **arrays, rows=state["rows"])


def _design(x: Array, cardinalities: Sequence[int]) -> Array:
    """Numbers, and one column for each of the more frequent levels of a category."""
    numbers = x.shape[1] - len(cardinalities)
    codes = [x[:, [numbers + i]] == np.arange(min(size, MOST_LEVELS)) for i, size in enumerate(cardinalities)]
    return np.concatenate([x[:, :numbers], *codes], 1).astype(np.float64)


def _finite(z: Array) -> Array:
    """Targets at an infinite end of their space take the outermost finite value."""
    known = np.where(np.isfinite(z), z, np.nan)
    return np.clip(z, np.nanmin(known, 0), np.nanmax(known, 0))


def _ridge(gram: Array, cross: Array, total: Array, count: int) -> tuple[Array, float]:
    """Weights of centred inputs, (P, K), and the mean degrees of freedom that they use.

    The penalty of each column of targets minimises the generalised cross-validation (Golub, Heath and Wahba, 1979).
    """
    if not np.trace(gram) > 1e-200:  # no column, or none that varies
        return np.zeros_like(cross), 1.0
    values, vectors = np.linalg.eigh(gram)
    values = values.clip(0)
    inside = (vectors.T @ cross)[:, None]  # (P, 1, K)
    penalty = max(float(values.mean()), 1e-300) * PENALTIES
    shrunk = values[:, None] + penalty  # (P, L)
    fitted = inside**2 * (2 / shrunk - values[:, None] / shrunk**2)[..., None]
    used = 1 + (values[:, None] / shrunk).sum(0)
    left = np.maximum(1 - used / count, 1e-3)[:, None]
    error = np.maximum(total - fitted.sum(0), 0) / left**2 + np.where(left > 1e-3, 0, np.inf)
    error[-1] = np.where(np.isfinite(error).any(0), error[-1], 0)
    best = error.argmin(0)
    return vectors @ (inside[:, 0] / shrunk[:, best]), float(used[best].mean())


def _short(values: Array) -> Array:
    """The values with nine digits."""
    return np.array([float(f"{value:.9g}") for value in values.ravel()]).reshape(values.shape)
