"""What the target of an estimator can be: a kind for each output, parsed once, that answers all that depends on it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg.densities import spaces
from energyreg.densities.spaces import TargetSpace
from energyreg.errors import DataError
from energyreg.estimators.kinds import kind_and_ends

__all__ = ["Bounded", "Circular", "Count", "InSpace", "Positive", "Real", "Target"]

POINT_MASS_FRACTION, POINT_MASS_HEIGHT = 0.05, 4.0
"""Fraction of the rows, and multiple of the neighbours' rows, from which on a rounded value is a point mass."""
FINE_STEP = 0.05
"""Rounding step, in standard deviations, above which the smooth marginal shows a point mass by itself."""
FEW_VALUES, LEAST_GAP, SAME = 0.2, 0.1, 1e-6
"""Distinct values for each row, up to which they are a rounding without an exact grid; their least gap as a multiple of
the median one; and differences that are none, as a fraction of the range."""
ATOM_FRACTION, FEWEST_OF_ATOM, MOST_ATOMS = 0.02, 5, 16
"""Fraction of the rows, and rows, from which on a value that recurs exactly is a point mass; and how many can be."""
LEAST_CONTINUOUS = 0.1
"""Fraction of the rows that the other values have at least, where there are point masses."""
ATOM_WIDTH = 1e-3
"""Width over which a point mass is spread, in interquartile ranges of the other values."""
REPEATED = 0.5
"""Distinct values for each row, below which repeats are said."""
NAMED = 5
"""Point masses that a warning names."""
SPIKES = (
    "Log-densities there can be raised without bound by spikes at these values, so that they say little; the fit takes "
    "longer, too. Round the targets to a grid, or add noise to them."
)
LEAST_NUMBERS = 16
"""Numbers of float32 that a uniform component holds at least; a narrower one is none to the training."""
UNEVEN = 0.3
"""Nats by which the density may differ between the ends of a bin in model space that a uniform component stands for."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Real:
    """A real number; the other kinds say in what they differ."""

    whole: ClassVar[bool] = False
    """Whether the values are whole numbers."""
    limited: ClassVar[bool] = False
    """Whether the space ends, so that a value plus half a rounding step may lie outside."""
    first_bin_edge: ClassVar[float | None] = None
    """Lower edge of the lowest bin, where the space of the model goes on below it."""

    def space(self, dim: int) -> TargetSpace:
        """The target space of `dim` outputs of this kind."""
        return spaces.Real(dim)

    @property
    def circle(self) -> tuple[float, float] | None:
        """Ends of the range of a periodic quantity."""
        return None

    @property
    def period(self) -> float:
        """Period of a periodic quantity, 0 for any other."""
        return self.circle[1] - self.circle[0] if self.circle else 0.0

    def possible(self, values: Array) -> NDArray[np.bool_]:
        """Whether values can be observed."""
        return np.isfinite(values)

    def inside(self, step: float) -> float:
        """A value that can be observed, or lies in the bin of one."""
        return step

    def rounding_step(self, values: Array) -> float | None:
        """Distance of the values where they are rounded, shape (N,) to a number; else None."""
        return rounding_step(values)

    def bins(self, values: Array, step: float) -> tuple[Array, Array]:
        """Lower and upper edges of the bins of rounded values, within the target space."""
        return values - step / 2, values + step / 2


@dataclass(frozen=True)
class Positive(Real):
    """A number above zero."""

    limited: ClassVar[bool] = True

    def space(self, dim: int) -> TargetSpace:
        return spaces.Positive(dim)

    def possible(self, values: Array) -> NDArray[np.bool_]:
        return values > 0

    def bins(self, values: Array, step: float) -> tuple[Array, Array]:
        low, high = super().bins(values, step)
        return np.maximum(low, values / 2), high


@dataclass(frozen=True)
class Bounded(Real):
    """A number from `low` to `high`."""

    low: float
    high: float
    limited: ClassVar[bool] = True

    def space(self, dim: int) -> TargetSpace:
        return spaces.Interval(self.low, self.high, dim=dim)

    def possible(self, values: Array) -> NDArray[np.bool_]:
        return (self.low <= values) & (values <= self.high)

    def inside(self, step: float) -> float:
        return (self.low + self.high) / 2

    def bins(self, values: Array, step: float) -> tuple[Array, Array]:
        low, high = super().bins(values, step)
        return np.maximum(low, self.low), np.minimum(high, self.high)


@dataclass(frozen=True)
class Circular(Bounded):
    """A periodic quantity, such as an angle: `high` is the same as `low`."""

    def space(self, dim: int) -> TargetSpace:
        return spaces.Circle(self.high - self.low, self.low, dim=dim)

    @property
    def circle(self) -> tuple[float, float] | None:
        return self.low, self.high

    def rounding_step(self, values: Array) -> float | None:
        return None


@dataclass(frozen=True)
class Count(Real):
    """A whole number ≥ 0, of which the model sees the real number that it is the rounded value of."""

    whole: ClassVar[bool] = True
    first_bin_edge: ClassVar[float | None] = -0.5

    def possible(self, values: Array) -> NDArray[np.bool_]:
        return (values >= 0) & (values == np.floor(values))

    def rounding_step(self, values: Array) -> float | None:
        return 1.0


@dataclass(frozen=True)
class InSpace(Real):
    """One of the outputs of a target space that the user made."""

    given: TargetSpace
    limited: ClassVar[bool] = True

    def space(self, dim: int) -> TargetSpace:
        if self.given.dim != dim:
            raise ValueError(
                f"y has {dim} column(s), but target is a space of {self.given.dim} dimension(s): {self.given!r}."
            )
        space = copy.deepcopy(self.given)
        for module in space.modules():
            if "fitted" in dict(module.named_buffers(recurse=False)):
                module.fitted = torch.tensor(False)
        return space

    def rounding_step(self, values: Array) -> float | None:
        return None


KINDS: dict[str, type[Real]] = {
    "real": Real, "positive": Positive, "count": Count, "interval": Bounded, "circle": Circular,
}  # fmt: skip


def parse_kind(given: Any) -> Real:
    """The kind that a word, or a tuple of a word and two numbers, stands for.

    Raises:
        ValueError: If it is no such.
    """
    if isinstance(given, TargetSpace):
        raise ValueError("target is a list with a target space in it; pass energyreg.spaces.Product(...) of all.")
    name, *ends = kind_and_ends(given)
    return KINDS[name](*ends)


@dataclass(frozen=True)
class Target:
    """The kinds of all outputs, D of them.

    Attributes:
        parts: Kinds, each with the number of successive outputs that share one target space.
    """

    parts: tuple[tuple[Real, int], ...]

    @classmethod
    def parse(cls, given: Any, outputs: int) -> Target:
        """The target that the user describes.

        Args:
            given: "real", "positive", "count", ("interval", low, high), ("circle", low, high), or a target space; or a
                list of these, one for each output.
            outputs: How many outputs there are, D.

        Raises:
            ValueError: If it is none of these, or does not fit the number of outputs.
        """
        if isinstance(given, TargetSpace):
            return cls(((InSpace(given), outputs),))
        if not isinstance(given, list):
            return cls(((parse_kind(given), outputs),))
        if len(given) != outputs:
            raise ValueError(f"target has {len(given)} entries, but y has {outputs} column(s); pass one for each.")
        return cls(tuple((parse_kind(entry), 1) for entry in given))

    @property
    def kinds(self) -> list[Real]:
        """The kind of each output."""
        return [kind for kind, dim in self.parts for _ in range(dim)]

    @property
    def only(self) -> Real | None:
        """The kind of the only output; None where there are several."""
        return self.kinds[0] if len(self.kinds) == 1 else None

    @property
    def counts(self) -> bool:
        """Whether the only output is a count."""
        return self.only is not None and self.only.whole

    @property
    def first_bin_edge(self) -> float | None:
        """Lower edge of the lowest bin of the only output, where the space of the model goes on below it."""
        return None if self.only is None else self.only.first_bin_edge

    @property
    def periods(self) -> list[float]:
        """The period of each output, 0 for those that are not periodic."""
        return [kind.period for kind in self.kinds]

    def space(self) -> TargetSpace:
        """A target space of all outputs, not fitted yet."""
        parts = [kind.space(dim) for kind, dim in self.parts]
        return parts[0] if len(parts) == 1 else spaces.Product(*parts)

    def check(self, space: TargetSpace, targets: Array, name: str) -> None:
        """Refuse targets (N, D) that cannot be observed.

        Args:
            space: What :meth:`space` returned.
            targets: The targets.
            name: What the message calls them.

        Raises:
            energyreg.errors.DataError: If a count is no whole number ≥ 0, or a value is outside the space.
        """
        for column, kind in enumerate(self.kinds):
            values = targets[:, column]
            if kind.whole and not kind.possible(values).all():
                bad = ~kind.possible(values)
                row = int(bad.argmax())
                raise DataError(
                    "{name} has {value:.9g} in row {row}, column {column!r}, and {others} more values that are no "
                    "counts; expected whole numbers ≥ 0. Choose another target, or drop rows.",
                    name=name, value=values[row], rows=[row], column=column, others=int(bad.sum()) - 1,
                )  # fmt: skip
        space.check(torch.as_tensor(targets), name)

    # Rounded values --------------------------------------------------------------------------------------------------

    def rounding_steps(self, targets: Array) -> list[float]:
        """The rounding step of each output of targets (N, D); 0 for what is continuous.

        Of several outputs those are left as they are whose noise could leave the target space.
        """
        steps = [
            None if self.only is None and kind.limited else kind.rounding_step(targets[:, column])
            for column, kind in enumerate(self.kinds)
        ]
        return [step or 0.0 for step in steps]

    def bins(self, values: Array, step: float) -> tuple[Array, Array]:
        """Lower and upper edges of the bins of rounded values of the only output, within the target space."""
        return self.kinds[0].bins(values, step)

    def dequantise(
        self, targets: Array, steps: Sequence[float], rng: np.random.Generator, atoms: Array | None = None
    ) -> Array:
        """Targets (N, D) with noise that is uniform over the bins of those that are rounded, and of point masses.

        Args:
            targets: The targets.
            steps: What :meth:`rounding_steps` returned.
            rng: Where the noise comes from.
            atoms: What :meth:`atoms` returned, if anything.
        """
        if self.only is None:
            return targets + rng.uniform(-0.5, 0.5, targets.shape) * np.array(steps)
        if steps[0]:
            return rng.uniform(*self.bins(targets, steps[0]))
        for low, high in () if atoms is None else atoms.tolist():
            inside = (low <= targets) & (targets <= high)
            targets = np.where(inside, rng.uniform(low, high, targets.shape), targets)
        return targets

    def uniform_components(self, space: TargetSpace, edges: Array) -> list[tuple[float, float]]:
        """Bins of the only output in model space, where their density is even and float32 tells their ends apart.

        Args:
            space: The target space, fitted.
            edges: Lower and upper edges in user units, shape (V, 2).
        """
        if not len(edges):
            return []
        low, high = torch.as_tensor(edges)[..., None].unbind(1)
        found = torch.cat([space.to_model(low), space.to_model(high)], 1)
        slope = space.log_abs_det_jacobian(low) - space.log_abs_det_jacobian(high)
        resolution = LEAST_NUMBERS * torch.finfo(torch.float32).eps * found.abs().amax(1)
        even = found.isfinite().all(1) & (found.diff(dim=1)[:, 0] > resolution) & (slope.abs() < UNEVEN)
        return [(low, high) for low, high in found[even].tolist()]

    # Point masses ----------------------------------------------------------------------------------------------------

    def atoms(self, targets: Array, steps: Sequence[float], name: str) -> Array:
        """Narrow bins around values of the only output that recur exactly among continuous ones; warn of repeats.

        Args:
            targets: Targets, shape (N, D).
            steps: What :meth:`rounding_steps` returned.
            name: What warnings call the targets.

        Returns:
            Lower and upper edges in user units, shape (V, 2).
        """
        edges: list[tuple[float, float]] = []
        for column, (kind, step) in enumerate(zip(self.kinds, steps, strict=True)):
            if step:
                continue
            values, counts = np.unique(targets[:, column], return_counts=True)
            often = counts >= max(ATOM_FRACTION * len(targets), FEWEST_OF_ATOM)
            often &= (often.sum() <= MOST_ATOMS) & (counts[~often].sum() > LEAST_CONTINUOUS * len(targets))
            where = "" if self.only else f", column {column},"
            rest = counts[~often]
            if often.any():
                named = sorted(zip(counts[often] / len(targets), values[often], strict=True), reverse=True)
                said = ", ".join(f"{value:.6g} in {fraction:.3g} of the rows" for fraction, value in named[:NAMED])
                text = f"{name}{where} has point masses among continuous values: exactly {said}"
                if self.only and not kind.period and not isinstance(kind, InSpace):
                    edges += self._around(targets, values[often], values[~often])
                    width = max(high - low for low, high in edges)
                    warnings.warn(
                        f"{text}. Each is spread evenly over a width of at most {width:.2g}, on which its log-density "
                        "depends. For probabilities, round the targets to a grid, or predict the point masses by a "
                        "model of their own.",
                        stacklevel=7,
                    )
                else:
                    warnings.warn(f"{text}. {SPIKES}", stacklevel=7)
            if len(rest) < REPEATED * rest.sum() and rest.sum() > FEWEST_OF_ATOM:
                warnings.warn(
                    f"{name}{where} takes only {len(values)} distinct values in {len(targets)} rows, but they lie on "
                    f"no grid that could be found. {SPIKES}",
                    stacklevel=7,
                )
        return np.array(edges).reshape(-1, 2)

    def _around(self, targets: Array, atoms: Array, others: Array) -> list[tuple[float, float]]:
        """Bins around values, of equal width in model space, within the target space."""
        space = self.space()
        space.fit(torch.as_tensor(targets))
        z, nearby = (space.to_model(torch.as_tensor(values)[:, None]).numpy()[:, 0] for values in (atoms, others))
        width = ATOM_WIDTH * max(float(np.subtract(*np.quantile(nearby, [0.75, 0.25]))), 1e-3)
        if len(z) > 1:
            width = min(width, float(np.diff(z).min()) / 2)
        ends = torch.as_tensor(np.stack([z - width / 2, z + width / 2], 1))[..., None]
        low, high = space.to_user(ends).numpy()[..., 0].T
        return [(min(a, v), max(b, v)) for a, b, v in zip(low.tolist(), high.tolist(), atoms.tolist(), strict=True)]

    # Predictions -----------------------------------------------------------------------------------------------------

    def round(self, values: Array) -> Array:
        """Quantiles or draws of counts to whole numbers ≥ 0: those of a count are the continuous ones, rounded."""
        return np.maximum(np.floor(values + 0.5), 0.0) if self.counts else values

    def clip(self, values: Array) -> Array:
        """Means of counts to numbers ≥ 0."""
        return np.maximum(values, 0.0) if self.counts else values


def rounding_step(values: Array) -> float | None:
    """The step of which all values, shape (N,), are multiples, where ties show that they are rounded; else None."""
    known = np.unique(values)
    if len(known) < 2 or len(known) > 0.5 * len(values):
        return None
    few = len(known) <= FEW_VALUES * len(values)
    # Decimal steps first: the least gap between rounded values may be several of them.
    step = float(np.diff(known).min())
    if step <= 64 * np.spacing(np.abs(known).max()):
        return _least_gap(known) if few else None
    decimal = 10.0 ** math.floor(math.log10(step) + 1e-9)
    for candidate in (float(f"{step:.6g}"), step, 5 * decimal, 2 * decimal, decimal):
        if candidate > step * (1 + 1e-6):
            continue
        places = (known - known[0]) / candidate
        if np.abs(places - np.rint(places)).max() < 1e-3:
            return candidate
    return _least_gap(known) if few else None


def _least_gap(known: Array) -> float | None:
    """The least gap between few values on no exact grid, as of truncated floats; None where it says nothing of them."""
    gaps = np.diff(known)
    gaps = gaps[gaps > SAME * (known[-1] - known[0])]  # its mean at least is
    step = float(gaps.min())
    return step if step > LEAST_GAP * np.median(gaps) else None


def point_masses(targets: Array, step: float | None) -> Array:
    """Finely rounded values that stand out from their neighbours, such as a steering of exactly 0.

    Args:
        targets: Targets of one output, shape (N, 1).
        step: Their rounding step; None where they are not rounded.

    Returns:
        The values, shape (V,).
    """
    if not step or step > FINE_STEP * targets.std():
        return np.empty(0)
    values, counts = np.unique(targets[:, 0], return_counts=True)
    places = np.rint((values - values[0]) / step).astype(int)
    known = dict(zip(places.tolist(), counts.tolist(), strict=True))
    beside = np.array([max(known.get(place - 1, 0), known.get(place + 1, 0)) for place in places.tolist()])
    return values[(counts >= POINT_MASS_FRACTION * len(targets)) & (counts >= POINT_MASS_HEIGHT * beside)]
