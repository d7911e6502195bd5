r"""Target spaces: where y lives, and the map between the user's units and the model's.

A model works in *model space*: unconstrained, standardised coordinates z, in which the training targets have mean 0
and standard deviation 1. (A periodic dimension is an angle in [-π, π) around the circular mean of the training targets
instead.) A *target space* knows the map between z and the targets y in the user's units, and its log-determinant, with
which

.. math:: \log p(y) = \log p(z(y)) + \log \left| \det \frac{dz}{dy} \right| .

All arithmetic is in float64, whatever the dtype of the targets and of the network: a target of 1e9 ± 1 keeps its
digits. (Devices without float64 use float32.)

>>> import torch
>>> space = Product(Real(), Circle(period=360.0))
>>> space.fit(torch.tensor([[1.0, 350.0], [2.0, 0.0], [3.0, 10.0]]))
>>> z = space.to_model(torch.tensor([[2.0, 90.0]]))
>>> space.to_user(z)
tensor([[ 2., 90.]], dtype=torch.float64)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.densities.precision import (
    LARGEST,
    MARGIN,
    SMALLEST,
    ExactModule,
    as_number,
    as_numbers,
    first_row,
    float32_inside,
    mean_and_spread,
    to_exact,
)
from energyreg.errors import DataError

__all__ = ["Circle", "Interval", "Positive", "Product", "Real", "TargetSpace"]

Ends = tuple[float | Sequence[float], float | Sequence[float]]
"""First and last value of a range, each one number for all dimensions or one for each."""


class TargetSpace(ExactModule, ABC):
    """A set of targets y with D dimensions, and its map onto the model space of z.

    An unfitted space is usable and does not standardise (``loc`` 0, ``scale`` 1). :meth:`fit` sets both from the
    training targets; they are buffers, and so are saved and loaded with the model. They stay float64 when the model is
    cast (``model.half()``) and follow it to another device.

    Attributes:
        dim: Number of dimensions D.
        periodic: Which dimensions are angles in model space, D bools.
        loc: Origin of the model space, shape (D,), float64.
        scale: Unit of the model space, shape (D,), float64.
        fitted: Whether :meth:`fit` has been called, a bool tensor of shape ().
    """

    dim: int
    periodic: tuple[bool, ...]

    if TYPE_CHECKING:

        @property
        def loc(self) -> Tensor: ...

        @property
        def scale(self) -> Tensor: ...

        @property
        def fitted(self) -> Tensor: ...

    def __init__(self, dim: int, periodic: Iterable[bool]) -> None:
        super().__init__()
        self.dim = dim
        self.periodic = tuple(periodic)

    # The public methods check the shape and choose the precision; the hooks below them can trust both.

    @torch.no_grad()
    def fit(self, y: Tensor) -> None:
        """Standardise the model space on the training targets, by their mean and standard deviation there.

        The mean and the standard deviation (of the population: divided by N) are those of the unconstrained coordinate,
        such as log y; no row is treated as an outlier. A second call replaces the first.

        Args:
            y: Training targets in user units, shape (N, D), at least two rows, on any device.

        Raises:
            ValueError: The shape is not (N, D), there are fewer than two rows, a value is NaN, infinite or outside the
                space, or a column is constant.
        """
        self.check(y)
        if y.ndim != 2:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected (N, {self.dim}); pass one row per example.")
        if len(y) < 2:
            rows = "1 row" if len(y) == 1 else "no rows"
            raise ValueError(f"y has {rows}; expected at least 2, to standardise the targets; pass more rows.")
        y = to_exact(y, self.loc.device)
        loc, spread = self._moments(y)
        if (spread <= 0).any():
            column = int((spread <= 0).nonzero()[0])
            raise ValueError(
                f"y has the same value in every row of column {column}: {y[0, column].item():.9g}; expected targets "
                f"that vary; drop the column, or check how it was made."
            )
        self._standardise(loc, spread, y)

    def to_model(self, y: Tensor) -> Tensor:
        """Map targets to model space.

        Args:
            y: Targets in user units, shape (*S, D), of any real dtype.

        Returns:
            z, shape (*S, D), float64. Finite everywhere: a point outside the space, or NaN, gets z = 0 in the
            dimensions concerned (ask :meth:`contains`).
        """
        return self._to_model(self._exact(y, "y"))

    def to_user(self, z: Tensor) -> Tensor:
        """Map points of the model space to user units.

        Args:
            z: Points of the model space, shape (*S, D), of any real dtype.

        Returns:
            y in user units, shape (*S, D), float64. Inside the space for every finite z, and still inside after a cast
            to float32. NaN stays NaN.
        """
        return self._to_user(self._exact(z, "z"))

    def log_abs_det_jacobian(self, y: Tensor) -> Tensor:
        """The logarithm of the volume that model space has for a unit of volume in user space, log |det dz/dy|.

        Args:
            y: Targets in user units, shape (*S, D).

        Returns:
            log |det dz/dy| at y, summed over the dimensions, shape (*S), float64. Finite everywhere.
        """
        return self._log_derivative(self._exact(y, "y")).sum(-1)

    def contains(self, y: Tensor) -> Tensor:
        """Whether targets lie in the space.

        Args:
            y: Targets in user units, shape (*S, D).

        Returns:
            Bool tensor of shape (*S). False for NaN and infinities.
        """
        return self._inside(self._exact(y, "y")).all(-1)

    def check(self, y: Tensor, name: str = "y") -> None:
        """Raise an error that describes the first bad target, if there is one.

        Args:
            y: Targets in user units, shape (*S, D), on any device. Rows are counted over all of S, from 0.
            name: What the error calls the targets.

        Raises:
            ValueError: The last dimension is not D, or a value is NaN, infinite, or outside the space.
            TypeError: y is no tensor of real numbers.
        """
        rows = to_exact(self._exact(y, name).detach(), self.loc.device).reshape(-1, self.dim)
        bad = ~rows.isfinite()
        if bad.any():
            count, row, column = first_row(bad)
            raise DataError(
                "{name} has NaN or infinite values in {count}, the first in row {row}, column {column!r}: {value}; "
                "expected finite numbers; drop these rows or fill in their values.",
                name=name, count=count, rows=[row], column=column, value=rows[row, column].item(),
            )  # fmt: skip
        bad = ~self._inside(rows)
        if bad.any():
            count, row, column = first_row(bad)
            raise DataError(
                "{name} has values outside {space!r} in {count}, the first in row {row}, column {column!r}: "
                "{value:.9g}; expected {expected}; drop these rows, or choose a space that contains them.",
                name=name, space=self, count=count, rows=[row], column=column, value=rows[row, column].item(),
                expected=self._expected(column),
            )  # fmt: skip

    def _exact(self, y: Tensor, name: str) -> Tensor:
        if not isinstance(y, Tensor) or y.is_complex():
            found = f"dtype {y.dtype}" if isinstance(y, Tensor) else f"type {type(y).__name__}"
            raise TypeError(f"{name} has {found}; expected a tensor of real numbers; convert it with torch.as_tensor.")
        # Without this check a single column would broadcast over all the dimensions.
        if y.ndim == 0 or y.shape[-1] != self.dim:
            columns = "1 column" if self.dim == 1 else f"{self.dim} columns"
            raise ValueError(
                f"{name} has shape {tuple(y.shape)}; expected (..., {self.dim}) for {self!r}; pass {columns}, "
                f"or choose another space."
            )
        return to_exact(y, y.device)

    @abstractmethod
    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and spread of the unconstrained coordinates of y (N, D), each (D,). Spread 0 means constant."""

    @abstractmethod
    def _standardise(self, loc: Tensor, spread: Tensor, y: Tensor) -> None: ...

    @abstractmethod
    def _to_model(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _to_user(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_derivative(self, y: Tensor) -> Tensor:
        """log |dz/dy| of each dimension, shape (*S, D)."""

    @abstractmethod
    def _inside(self, y: Tensor) -> Tensor:
        """Whether each dimension is inside, shape (*S, D)."""

    @abstractmethod
    def _expected(self, column: int) -> str:
        """The values that a column may take, for an error message."""


class _Elementwise(TargetSpace):
    """A space whose dimensions map one by one: z = (link(y) - loc) / scale."""

    loc: Tensor
    scale: Tensor
    fitted: Tensor
    _accepted: Tensor
    _returned: Tensor

    def __init__(self, dim: int, accepted: Ends, returned: Ends, periodic: bool = False) -> None:
        check_count("dim", dim)
        super().__init__(int(dim), (periodic,) * int(dim))
        self.register_buffer("loc", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("fitted", torch.tensor(False))
        # First and last value of each dimension, (2, D); not saved, as the constructor's arguments tell them.
        self.register_buffer("_accepted", _ends(*accepted, dim), persistent=False)
        self.register_buffer("_returned", _ends(*returned, dim), persistent=False)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def _link(self, y: Tensor) -> Tensor:
        """The unconstrained coordinate t of y."""
        return y

    def _inverse_link(self, t: Tensor) -> Tensor:
        return t

    def _log_link_derivative(self, y: Tensor) -> Tensor:
        """log |dt/dy|."""
        return torch.zeros_like(y)

    def _expected(self, column: int) -> str:
        return f"|y| <= {LARGEST:.2g}, the range of float32"

    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return mean_and_spread(self._link(self._clamp(y)))

    def _standardise(self, loc: Tensor, spread: Tensor, y: Tensor) -> None:
        self.loc.copy_(loc)
        self.scale.copy_(spread)
        self.fitted.fill_(True)

    def _to_model(self, y: Tensor) -> Tensor:
        z = (self._link(self._clamp(y)) - self.loc) / self.scale
        return torch.where(self._inside(y), z, 0.0)

    def _to_user(self, z: Tensor) -> Tensor:
        first, last = self._returned
        return self._inverse_link(self.loc + self.scale * z).clamp(first, last)

    def _log_derivative(self, y: Tensor) -> Tensor:
        return self._log_link_derivative(self._clamp(y)) - self.scale.log()

    def _inside(self, y: Tensor) -> Tensor:
        first, last = self._accepted
        return (y >= first) & (y <= last)

    def _clamp(self, y: Tensor) -> Tensor:
        # Outside points go on as a point of the space: a NaN would reach gradients even through a `where` after it.
        first, last = self._accepted
        return torch.where(y.isnan(), last, y).clamp(first, last)


class Real(_Elementwise):
    r"""The real numbers, :math:`z = (y - \mathrm{loc}) / \mathrm{scale}`.

    Args:
        dim: Number of dimensions D.

    Raises:
        ValueError: dim is not a positive integer.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__(dim, (-LARGEST, LARGEST), (-LARGEST, LARGEST))


class Positive(_Elementwise):
    r"""The numbers above 0: z is the standardised logarithm of y, and grows like y itself beyond the training targets.

    .. math:: z = (t - \mathrm{loc}) / \mathrm{scale}, \qquad
        t = \log y \text{ for } y \le k, \quad \log k + y / k - 1 \text{ for } y > k

    The knee k is the largest training target: training sees the logarithm alone. Beyond it no target says how fast the
    density falls, and an exponential tail in model space may have no mean after an exponential map, so that a defensive
    weight of a thousandth carries all of E[y]. With the knee the moments in user units exist wherever those in model
    space do.

    Zero is outside. So are values below 1.2e-38 or above 3.4e38, the range of float32; in another unit they fit.

    Args:
        dim: Number of dimensions D.

    Attributes:
        knee: k, shape (D,), float64. The largest number of float32 until :meth:`fit`, and in files without it.

    Raises:
        ValueError: dim is not a positive integer.
    """

    newer_buffers = ("knee",)
    knee: Tensor

    def __init__(self, dim: int = 1) -> None:
        super().__init__(dim, (SMALLEST, LARGEST), (SMALLEST, LARGEST))
        self.register_buffer("knee", torch.full((dim,), LARGEST, dtype=torch.float64))

    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return mean_and_spread(self._clamp(y).log())  # whatever the knee before

    def _standardise(self, loc: Tensor, spread: Tensor, y: Tensor) -> None:
        super()._standardise(loc, spread, y)
        self.knee.copy_(self._clamp(y).amax(0))

    def _link(self, y: Tensor) -> Tensor:
        return torch.where(y > self.knee, self.knee.log() + (y / self.knee - 1), y.log())

    def _inverse_link(self, t: Tensor) -> Tensor:
        top = self.knee.log()
        # Clamped before the exponential, whose gradient would be infinite times 0 otherwise.
        below = t.clamp(math.log(SMALLEST), math.log(LARGEST)).exp()
        return torch.where(t > top, self.knee * (1 + (t - top).clamp(0, LARGEST)), below)

    def _log_link_derivative(self, y: Tensor) -> Tensor:
        return -torch.minimum(y, self.knee).log()

    def _expected(self, column: int) -> str:
        return f"y > 0, from {SMALLEST:.2g} to {LARGEST:.2g}"


class Interval(_Elementwise):
    r"""The closed interval [low, high]: z is the standardised logit of the fraction :math:`(y - low) / (high - low)`.

    Both ends belong to the space. The fraction is clamped to [1e-6, 1 - 1e-6], so that data at an end have a finite
    density; within a millionth of the width from an end, z and the log-determinant are constant.

    Where float32 cannot represent an end, the end's rounding to float32 is inside too, so that no point of the interval
    gets outside by being stored in float32.

    Args:
        low: Lower end, one number for all dimensions or D numbers.
        high: Upper end, one number for all dimensions or D numbers.
        dim: Number of dimensions D. By default the length of low and high, or 1 where both are numbers.

    Raises:
        ValueError: low or high is not finite in float32, low is not below high, or their lengths differ from dim.

    Example:
        >>> import torch
        >>> Interval(0.0, 100.0).to_model(torch.tensor([[50.0]])).item()
        0.0
        >>> Interval(low=[0.0, -1.0], high=[1.0, 1.0])
        Interval(low=[0.0, -1.0], high=[1.0, 1.0], dim=2)
    """

    low: float | list[float]
    high: float | list[float]

    def __init__(self, low: float | Sequence[float], high: float | Sequence[float], dim: int | None = None) -> None:
        lows, highs = as_numbers(low, "low"), as_numbers(high, "high")
        lengths = {name: len(ends) for name, ends in (("low", lows), ("high", highs)) if isinstance(ends, list)}
        if dim is None:
            dim = max(lengths.values(), default=1)
        else:
            check_count("dim", dim)
        for name, length in lengths.items():
            if length != dim or length == 0:
                raise ValueError(
                    f"{name} has {length} values; expected {max(dim, 1)}, one per dimension; pass one number for all "
                    f"dimensions, or as many as dim."
                )
        pairs = list(zip(*(ends if isinstance(ends, list) else [ends] * dim for ends in (lows, highs)), strict=True))
        for column, (first, last) in enumerate(pairs):
            if not first < last:
                raise ValueError(
                    f"low has the value {first} and high has {last} in dimension {column}; expected low < high; "
                    f"swap or widen them."
                )
        firsts, lasts = zip(*(float32_inside(first, last) for first, last in pairs), strict=True)
        super().__init__(dim, accepted=(lows, highs), returned=(firsts, lasts))
        self.low, self.high = lows, highs

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}, dim={self.dim}"

    @property
    def ends(self) -> list[tuple[float, float]]:
        """Lower and upper end of each dimension."""
        lows, highs = self._accepted.tolist()
        return list(zip(lows, highs, strict=True))

    def _fractions(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # Both from their own end: 1 - fraction would have no digits left near the upper end.
        low, high = self._accepted
        below, above = (y - low) / (high - low), (high - y) / (high - low)
        return below.clamp(MARGIN, 1 - MARGIN), above.clamp(MARGIN, 1 - MARGIN)

    def _link(self, y: Tensor) -> Tensor:
        below, above = self._fractions(y)
        return below.log() - above.log()

    def _inverse_link(self, t: Tensor) -> Tensor:
        low, high = self._accepted
        return torch.where(t < 0, low + (high - low) * t.sigmoid(), high - (high - low) * (-t).sigmoid())

    def _log_link_derivative(self, y: Tensor) -> Tensor:
        low, high = self._accepted
        below, above = self._fractions(y)
        return -below.log() - above.log() - (high - low).log()

    def _inside(self, y: Tensor) -> Tensor:
        low, high = self._accepted.float().to(y.dtype)
        return super()._inside(y) | (y == low) | (y == high)

    def _expected(self, column: int) -> str:
        low, high = self._accepted[:, column].tolist()
        return f"{low:.9g} <= y <= {high:.9g}"


class Circle(_Elementwise):
    r"""Angles, or any other periodic quantity: z is the angle from ``loc``, in radians.

    .. math:: z = 2π (y - \mathrm{loc}) / \mathrm{period}, \text{ wrapped into } [-π, π)

    Every finite y is inside and stands for itself modulo the period; points come back from model space in
    [low, low + period). :meth:`fit` sets ``loc`` to the circular mean of the training targets, which puts the seam
    opposite to where most of them are; ``scale`` is always period / 2π. A density integrates to 1 over one period.

    Args:
        period: Length of a full turn in user units, 2π by default.
        low: Where the reported turn starts, in user units.
        dim: Number of dimensions D, all with this period.

    Raises:
        ValueError: period is not a positive number, low is not finite, period is too short to be added to low, or dim
            is not a positive integer.

    Example:
        >>> import torch
        >>> degrees = Circle(period=360.0, low=-180.0)
        >>> degrees.to_user(degrees.to_model(torch.tensor([[270.0]]))).item()
        -90.0
    """

    def __init__(self, period: float = 2 * math.pi, low: float = 0.0, dim: int = 1) -> None:
        period, low = as_number(period, "period"), as_number(low, "low")
        if period < SMALLEST:
            raise ValueError(
                f"period has the value {period}; expected a positive number; pass the length of a full turn."
            )
        high = low + period
        last = math.nextafter(high, -math.inf)
        if not (abs(high) <= LARGEST and low < last and math.isclose(high - low, period, rel_tol=MARGIN)):
            raise ValueError(
                f"low has the value {low}, to which a period of {period} cannot be added with precision; expected "
                f"numbers of similar size; pass a low nearer to 0."
            )
        first, last = float32_inside(low, last)
        super().__init__(dim, (-LARGEST, LARGEST), (first, last), periodic=True)
        self.period, self.low = period, low
        self.scale.fill_(period / (2 * math.pi))

    def extra_repr(self) -> str:
        return f"period={self.period}, low={self.low}, dim={self.dim}"

    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        angle = self._angle(y, y[0])
        mean = torch.atan2(angle.sin().mean(0), angle.cos().mean(0))
        # Turns apart is the same angle, except for the rounding of y and of the period.
        rounding = 8 * torch.finfo(y.dtype).eps * (1 + y.abs().amax(0) / self.period)
        spread = torch.where(angle.abs().amax(0) <= rounding, 0.0, angle.std(0, correction=0))
        return self._wrap(y[0] + mean * self.scale), spread

    def _standardise(self, loc: Tensor, spread: Tensor, y: Tensor) -> None:
        self.loc.copy_(loc)
        self.fitted.fill_(True)

    def _to_model(self, y: Tensor) -> Tensor:
        return torch.where(self._inside(y), self._angle(self._clamp(y), self.loc), 0.0)

    def _to_user(self, z: Tensor) -> Tensor:
        first, last = self._returned
        return self._wrap(self.loc + self.scale * z).clamp(first, last)

    def _angle(self, y: Tensor, origin: Tensor) -> Tensor:
        # Not floor(turns + 1/2): that sum rounds up to 1 just below a half, and the angle would leave [-π, π).
        turns = ((y - origin) / self.period).remainder(1.0)
        return 2 * math.pi * torch.where(turns < 0.5, turns, turns - 1)

    def _wrap(self, y: Tensor) -> Tensor:
        return self.low + (y - self.low).remainder(self.period)


class Product(TargetSpace):
    """Targets with several parts: the dimensions of the given spaces, one after the other.

    Products inside a product are flattened. ``loc``, ``scale`` and ``fitted`` are read from the parts.

    Args:
        *spaces: The spaces of the parts, at least one.

    Raises:
        ValueError: No space, or one and the same object twice (each part has its own standardisation).
        TypeError: One of the arguments is not a target space.

    Example:
        >>> Product(Real(2), Circle())
        Product(Real(dim=2), Circle(period=6.283185307179586, low=0.0, dim=1))
    """

    spaces: nn.ModuleList

    def __init__(self, *spaces: TargetSpace) -> None:
        parts: list[TargetSpace] = []
        for space in spaces:
            if not isinstance(space, TargetSpace):
                raise TypeError(
                    f"spaces has an argument of type {type(space).__name__}; expected target spaces such as Real(1); "
                    f"pass them one by one: Product(Real(1), Circle())."
                )
            parts.extend(space.parts if isinstance(space, Product) else [space])
        if not parts:
            raise ValueError("spaces has no entries; expected at least one target space; pass for example Real(1).")
        if len({id(part) for part in parts}) < len(parts):
            raise ValueError(
                "spaces has the same object twice; expected one object per part, as each has its own standardisation; "
                "construct it twice, or use its dim argument."
            )
        super().__init__(sum(part.dim for part in parts), [flag for part in parts for flag in part.periodic])
        self.spaces = nn.ModuleList(parts)

    @property
    def loc(self) -> Tensor:
        return torch.cat([part.loc for part in self.parts])

    @property
    def scale(self) -> Tensor:
        return torch.cat([part.scale for part in self.parts])

    @property
    def fitted(self) -> Tensor:
        return torch.stack([part.fitted for part in self.parts]).all()

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.parts))})"

    @property
    def parts(self) -> list[TargetSpace]:
        """The spaces of the parts, none of them a product."""
        return list(self.spaces)  # type: ignore[arg-type]

    def _split(self, y: Tensor) -> Iterable[tuple[TargetSpace, Tensor]]:
        parts = self.parts
        return zip(parts, y.split([part.dim for part in parts], dim=-1), strict=True)

    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        locs, spreads = zip(*(part._moments(columns) for part, columns in self._split(y)), strict=True)
        return torch.cat(locs), torch.cat(spreads)

    def _standardise(self, loc: Tensor, spread: Tensor, y: Tensor) -> None:
        columns = zip(*(self._split(values) for values in (loc, spread, y)), strict=True)
        for (part, part_loc), (_, part_spread), (_, part_y) in columns:
            part._standardise(part_loc, part_spread, part_y)

    def _to_model(self, y: Tensor) -> Tensor:
        return torch.cat([part._to_model(columns) for part, columns in self._split(y)], dim=-1)

    def _to_user(self, z: Tensor) -> Tensor:
        return torch.cat([part._to_user(columns) for part, columns in self._split(z)], dim=-1)

    def _log_derivative(self, y: Tensor) -> Tensor:
        return torch.cat([part._log_derivative(columns) for part, columns in self._split(y)], dim=-1)

    def _inside(self, y: Tensor) -> Tensor:
        return torch.cat([part._inside(columns) for part, columns in self._split(y)], dim=-1)

    def _expected(self, column: int) -> str:
        for part in self.parts:
            if column < part.dim:
                return part._expected(column)
            column -= part.dim
        raise IndexError(column)


def _ends(first: float | Sequence[float], last: float | Sequence[float], dim: int) -> Tensor:
    return torch.stack([torch.as_tensor(end, dtype=torch.float64).expand(dim) for end in (first, last)])
