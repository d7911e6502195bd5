"""Encoders: x to context, run once per x. Any module that maps (B, ...) to (B, C) is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from energyreg.checks import check_count
from energyreg.randomness import generator_for

__all__ = [
    "MixedTableEncoder", "QuantileNormalizer", "RobustNormalizer", "TableEncoder", "TwinEncoder", "VectorEncoder",
]  # fmt: skip


ROWS_PER_KNOT = 64
"""Training rows for each knot of a quantile normaliser that has its own."""
FEWEST_KNOTS = 9
"""Knots of their own, however few the rows."""
NORMAL_QUARTILES = 1.349
"""Distance of the quartiles of a standard normal."""
LEAST_SPREAD = 0.5
"""Least spread of a feature, in its standard deviations."""
COLUMNS_AT_ONCE = 64
"""Columns that are sorted at once, for the memory."""


def _monotone_curve(values: Tensor, count: int) -> Tensor:
    """Ascending values at even places, (K, F), at `count` even places along the monotone cubic through them.

    Source:
        Fritsch and Butland, SIAM Journal on Scientific and Statistical Computing 1984 (slopes by harmonic means).
    """
    if len(values) == count:
        return values
    rise = values.diff(dim=0)
    inner = torch.where(rise[:-1] * rise[1:] > 0, 2 * rise[:-1] * rise[1:] / (rise[:-1] + rise[1:]), 0.0)
    slope = torch.cat([rise[:1], inner, rise[-1:]])
    place = torch.linspace(0, len(values) - 1, count, dtype=values.dtype, device=values.device)
    left = place.floor().long().clamp_max(len(values) - 2)
    t = (place - left)[:, None]
    bend = 3 * rise[left] - 2 * slope[left] - slope[left + 1]
    curve = values[left] + t * (slope[left] + t * (bend + t * (slope[left] + slope[left + 1] - 2 * rise[left])))
    return torch.where(t == 1, values[left + 1], curve).cummax(0).values  # rounding


class QuantileNormalizer(nn.Module):
    """Map each feature to a standard normal through its training quantiles; values beyond them are clipped.

    So no wild feature value can drive the network far from what it has seen. Ties go to the middle of their ranks; a
    constant feature becomes 0.

    Args:
        num_features: Columns F.
        num_quantiles: Knots per feature. With fewer than 64 training rows for each they follow a smooth curve.

    Raises:
        ValueError: If num_features < 1 or num_quantiles < 2.

    >>> normalizer = QuantileNormalizer(1)
    >>> normalizer.fit(torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)) ** 5)
    >>> [round(score, 1) for score in normalizer(torch.tensor([[0.0], [0.6**5], [1e9]]))[:, 0].tolist()]
    [-2.9, 0.2, 2.9]
    """

    knots: Tensor
    fitted: Tensor

    def __init__(self, num_features: int, num_quantiles: int = 257) -> None:
        super().__init__()
        check_count("num_features", num_features)
        check_count("num_quantiles", num_quantiles, 2)
        self.num_features, self.num_quantiles = num_features, num_quantiles
        self.register_buffer("knots", torch.linspace(-3, 3, num_quantiles).expand(num_features, -1).clone())
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the knots from training features, shape (N, F)."""
        ordered = x.double().sort(0).values
        knots = self._quantiles(ordered, self.num_quantiles)
        # With few rows, a knot for every few of them would make the map as jagged as the rows happen to lie. Then a
        # smooth curve goes through fewer of them, unless the values repeat: for those each step is meant.
        count = max(len(x) // ROWS_PER_KNOT + 1, FEWEST_KNOTS)
        if count < self.num_quantiles:
            repeat = (ordered.diff(dim=0) == 0).sum(0) > len(x) // 2
            knots = torch.where(repeat, knots, _monotone_curve(self._quantiles(ordered, count), self.num_quantiles))
        self.knots.copy_(knots.T)
        self.fitted.fill_(True)

    @staticmethod
    def _quantiles(ordered: Tensor, count: int) -> Tensor:
        """Quantiles at `count` even levels from 0 to 1, shape (count, F)."""
        position = torch.linspace(0, len(ordered) - 1, count, dtype=torch.double, device=ordered.device)
        lower = position.floor().long()
        upper = (lower + 1).clamp_max(len(ordered) - 1)
        return torch.lerp(ordered[lower], ordered[upper], (position - lower)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, F) to scores (B, F) within the scores of the outermost knots."""
        value, last = x.T.contiguous().to(self.knots.dtype), self.num_quantiles - 1
        left = torch.searchsorted(self.knots, value)  # knots below the value
        right = torch.searchsorted(self.knots, value, right=True)  # knots below or at it
        index = (right - 1).clamp(0, last - 1)
        y0, y1 = self.knots.gather(1, index), self.knots.gather(1, index + 1)
        fraction = ((value - y0) / (y1 - y0).clamp_min(torch.finfo(y0.dtype).tiny)).clamp(0, 1)
        middle = (left + right - 1).to(fraction.dtype) / 2
        position = torch.where(right - left > 1, middle, index + fraction)
        # The outermost ranks stand for half a knot, as the scores of the extremes of a normal sample do.
        return torch.special.ndtri((position + 0.5) / (last + 1)).T


class Dropout(nn.Module):
    """Dropout from random bytes: torch's own costs as much as the layer it follows on a CPU, this a fifth of that.

    The probability is rounded to a multiple of 1/256, and the scale goes by the rounded one. It is a buffer, so that
    the members of an ensemble, batched by vmap, may each have their own.
    """

    only_initial: ClassVar[tuple[str, ...]] = ("active",)
    threshold: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        threshold = min(round(p * 256), 255)
        self.active = threshold > 0
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.active):
            return x
        generator = generator_for(x.device)
        # Made from x, so that the members of an ensemble have bits of their own.
        if x.device.type == "cpu":
            words = x.new_empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
            bits = words.view(torch.uint8)[: x.numel()].view(x.shape)
        else:
            bits = torch.empty_like(x, dtype=torch.uint8).random_(0, 256, generator=generator)
        return x * (bits >= self.threshold) * (256 / (256 - self.threshold.to(x.dtype)))


class _TableModule(nn.Module):
    """What the encoders of tables have in common: a normaliser of their first columns, and hidden layers."""

    num_features: int
    normalizer: QuantileNormalizer | RobustNormalizer

    def _set_sizes(self, num_features: int, context_dim: int, depth: int, dropout: float) -> None:
        check_count("num_features", num_features)
        check_count("context_dim", context_dim)
        check_count("depth", depth)
        _check_probability("dropout", dropout)
        self.num_features, self.context_dim, self.depth, self.dropout = num_features, context_dim, depth, dropout

    @property
    def fitted(self) -> Tensor:
        """Whether the normaliser has seen the training features."""
        return self.normalizer.fitted

    def fit(self, x: Tensor) -> None:
        """Fit the normaliser, x of shape (N, F)."""
        self.normalizer.fit(x)

    def _check_columns(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; this encoder takes (B, {self.num_features}).")


def _check_probability(name: str, probability: float) -> None:
    if not 0 <= probability < 1:
        raise ValueError(f"{name} is {probability}; expected a probability in [0, 1).")


class TableEncoder(_TableModule):
    """Encoder for tables of numbers: quantile-normalised features, periodic embeddings, an MLP with dropout.

    Args:
        num_features: Columns F.
        context_dim: Context channels C, the width of the hidden layers too.
        depth: Hidden layers.
        dropout: Dropout probability after each hidden layer.
        num_frequencies: Periodic features per column; 0 for none.
        frequency_scale: Standard deviation of their initial frequencies, in periods per standard deviation of the
            feature.

    Raises:
        ValueError: If an argument is out of its range.

    Source:
        Gorishniy et al., "On embeddings for numerical features in tabular deep learning", NeurIPS 2022.
    """

    only_initial: ClassVar[tuple[str, ...]] = ("frequency_scale", "dropout")
    """Arguments that shape the initial weights only, so that members of an ensemble may differ in them."""

    def __init__(
        self,
        num_features: int,
        context_dim: int = 256,
        depth: int = 2,
        dropout: float = 0.2,
        num_frequencies: int = 16,
        frequency_scale: float = 0.5,
    ) -> None:
        super().__init__()
        self._set_sizes(num_features, context_dim, depth, dropout)
        check_count("num_frequencies", num_frequencies, 0)
        self.num_frequencies, self.frequency_scale = num_frequencies, frequency_scale
        self.normalizer = QuantileNormalizer(num_features)
        self.frequencies = nn.Parameter(2 * math.pi * frequency_scale * torch.randn(num_features, num_frequencies))
        self.layers = _hidden_layers(num_features * (2 * num_frequencies + 1), context_dim, depth, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, F) to contexts (B, C).

        Raises:
            ValueError: If x has another number of columns.
        """
        self._check_columns(x)
        scores = self.normalizer(x)
        return self.layers(torch.cat(_with_periodic_features(scores, self.frequencies), 1))


class MixedTableEncoder(_TableModule):
    """Encoder for tables of numbers and categories: as `TableEncoder`, with a learned vector for each category.

    The last columns of x hold the categories as whole numbers from 0 on. Code 0 stands for all categories that are too
    rare to have learned a vector of their own, or were not seen at all: in training a few codes become 0 at random, so
    that its vector learns what is true of all of them.

    Args:
        num_numeric: Columns of numbers, which come first; none is allowed.
        cardinalities: How many codes each column of categories has.
        context_dim: Context channels C, the width of the hidden layers too.
        depth: Hidden layers.
        dropout: Dropout probability after each hidden layer.
        num_frequencies: Periodic features per column of numbers; 0 for none.
        frequency_scale: Standard deviation of their initial frequencies, in periods per standard deviation of the
            feature.
        other_rate: Fraction of the codes that are 0 in training.

    Raises:
        ValueError: If an argument is out of its range, or there is no column at all.

    Source:
        Gorishniy et al., "On embeddings for numerical features in tabular deep learning", NeurIPS 2022 (numbers);
        Guo and Berkhahn, "Entity embeddings of categorical variables", 2016 (categories).

    >>> encoder = MixedTableEncoder(num_numeric=1, cardinalities=[3, 5], context_dim=8)
    >>> encoder(torch.tensor([[0.3, 2, 4], [-1.0, 0, 1]])).shape
    torch.Size([2, 8])
    """

    only_initial: ClassVar[tuple[str, ...]] = ("frequency_scale", "dropout")
    """Arguments that shape the initial weights only, so that members of an ensemble may differ in them."""

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        context_dim: int = 256,
        depth: int = 2,
        dropout: float = 0.2,
        num_frequencies: int = 16,
        frequency_scale: float = 0.5,
        other_rate: float = 0.01,
    ) -> None:
        super().__init__()
        self.cardinalities = [int(cardinality) for cardinality in cardinalities]
        check_count("num_numeric", num_numeric, 0)
        check_count("columns", num_numeric + len(self.cardinalities))
        for place, number in enumerate(self.cardinalities):
            check_count(f"cardinalities[{place}]", number)
        self._set_sizes(num_numeric + len(self.cardinalities), context_dim, depth, dropout)
        check_count("num_frequencies", num_frequencies, 0)
        _check_probability("other_rate", other_rate)
        self.num_numeric, self.other_rate = num_numeric, other_rate
        self.num_frequencies, self.frequency_scale = num_frequencies, frequency_scale
        width = 0
        if num_numeric:
            self.normalizer = QuantileNormalizer(num_numeric)
            frequencies = 2 * math.pi * frequency_scale * torch.randn(num_numeric, num_frequencies)
            self.frequencies = nn.Parameter(frequencies)
            width += num_numeric * (2 * num_frequencies + 1)
        self.embeddings = nn.ModuleList()
        for number in self.cardinalities:
            # A rule of thumb: the width grows a little faster than the square root of the number of categories.
            size = min(max(round(1.6 * number**0.56), 1), 64)
            self.embeddings.append(nn.Embedding(number, size))
            width += size
        self.layers = _hidden_layers(width, context_dim, depth, dropout)

    @property
    def fitted(self) -> Tensor:
        """Whether the normaliser has seen the training features; categories have nothing to fit."""
        return self.normalizer.fitted if self.num_numeric else torch.tensor(True)

    def fit(self, x: Tensor) -> None:
        """Fit the feature normaliser, x of shape (N, F)."""
        if self.num_numeric:
            self.normalizer.fit(x[:, : self.num_numeric])

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, F) to contexts (B, C); codes out of their range count as 0.

        Raises:
            ValueError: If x has another number of columns.
        """
        self._check_columns(x)
        parts = []
        if self.num_numeric:
            parts += _with_periodic_features(self.normalizer(x[:, : self.num_numeric]), self.frequencies)
        codes = x[:, self.num_numeric :]
        if self.training and self.other_rate:
            drawn = torch.empty_like(codes).uniform_(generator=generator_for(codes.device))
            codes = torch.where(drawn < self.other_rate, 0.0, codes)
        for column, embedding in enumerate(self.embeddings):
            code, known = codes[:, column], self.cardinalities[column]
            parts.append(embedding(torch.where((code >= 0) & (code < known), code, 0.0).long()))
        return self.layers(torch.cat(parts, 1))


def _with_periodic_features(scores: Tensor, frequencies: Tensor) -> list[Tensor]:
    """Scores (B, F) and their periodic features, (B, F K) each, for frequencies (F, K)."""
    phase = scores[..., None] * frequencies
    return [scores, phase.sin().flatten(1), phase.cos().flatten(1)]


def _hidden_layers(
    width: int, context_dim: int, depth: int, dropout: float, activation: type[nn.Module] = nn.SiLU
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, context_dim), activation(), Dropout(dropout)]
        width = context_dim
    return nn.Sequential(*layers)


class RobustNormalizer(nn.Module):
    """Centre each feature at its training median, divide by its training spread, and clip.

    Some features of a network hardly vary over the training images and are huge on a new one; the clip keeps them from
    driving the model far from what it has seen. The spread is the interquartile range as a standard deviation, but
    never below a part of the standard deviation itself, which matters for features that are mostly one value (0 after
    a ReLU). A constant feature becomes 0.

    Args:
        num_features: Columns F.
        limit: Largest absolute value, in spreads.

    Raises:
        ValueError: If num_features < 1 or limit ≤ 0.

    >>> normalizer = RobustNormalizer(1)
    >>> normalizer.fit(torch.arange(101.0)[:, None])
    >>> [round(value, 2) for value in normalizer(torch.tensor([[50.0], [60.0], [1e9]]))[:, 0].tolist()]
    [0.0, 0.27, 4.0]
    """

    center: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, num_features: int, limit: float = 4.0) -> None:
        super().__init__()
        check_count("num_features", num_features)
        if not limit > 0:
            raise ValueError(f"limit is {limit}; expected a number above 0.")
        self.num_features, self.limit = num_features, limit
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set centre and spread from training features, shape (N, F)."""
        for start in range(0, self.num_features, COLUMNS_AT_ONCE):
            columns = slice(start, start + COLUMNS_AT_ONCE)
            ordered = x[:, columns].double().sort(0).values
            low, middle, high = (QuantileNormalizer._quantiles(ordered, 5)[k] for k in (1, 2, 3))
            deviation = ordered.std(0, correction=0)
            spread = torch.maximum((high - low) / NORMAL_QUARTILES, LEAST_SPREAD * deviation)
            self.center[columns] = middle.to(self.center)
            # Constant but for rounding: nothing to be learned from, and 0 wherever it is met.
            constant = deviation <= 1e-6 * middle.abs()
            self.scale[columns] = torch.where(constant, torch.inf, spread).to(self.scale)
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, F) to scores (B, F) within the limit."""
        return ((x - self.center) / self.scale).clamp(-self.limit, self.limit)


class VectorEncoder(_TableModule):
    """Encoder for features of another network: robustly standardised and clipped, then an MLP with dropout.

    For features that are many and smooth already, such as those of an `ImageEncoder`; for the columns of a table use
    :class:`TableEncoder`.

    Args:
        num_features: Columns F.
        context_dim: Context channels C, the width of the hidden layers too.
        depth: Hidden layers.
        dropout: Dropout probability after each hidden layer.

    Raises:
        ValueError: If an argument is out of its range.

    >>> VectorEncoder(num_features=64, context_dim=16)(torch.randn(5, 64)).shape
    torch.Size([5, 16])
    """

    only_initial: ClassVar[tuple[str, ...]] = ("dropout",)
    """Arguments in which the members of an ensemble may differ."""

    def __init__(self, num_features: int, context_dim: int = 256, depth: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self._set_sizes(num_features, context_dim, depth, dropout)
        self.normalizer = RobustNormalizer(num_features)
        self.layers = _hidden_layers(num_features, context_dim, depth, dropout, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, F) to contexts (B, C).

        Raises:
            ValueError: If x has another number of columns.
        """
        self._check_columns(x)
        return self.layers(self.normalizer(x))


class TwinEncoder(nn.Module):
    """Two encoders of one input: the head sees the context of the first, the proposal that of the second.

    The two have no parameter in common, as paper IV's mixture and its energy-based teacher: neither the energy nor the
    proposal shapes the other's features.

    Args:
        energy: Maps x to the head's context, shape (B, C).
        proposal: Maps x to the proposal's context, shape (B, C').

    Source:
        Gustafsson et al., AISTATS 2022 (mixture density network with an energy-based teacher).
    """

    def __init__(self, energy: nn.Module, proposal: nn.Module) -> None:
        super().__init__()
        self.energy, self.proposal = energy, proposal
        self._channels: int | None = None
        if isinstance(shape := getattr(energy, "input_shape", None), tuple):
            self.input_shape = shape
        if isinstance(columns := getattr(energy, "num_features", None), int):
            self.num_features = columns

    @property
    def fitted(self) -> bool:
        """Whether both encoders have seen the training inputs."""
        return all(bool(getattr(part, "fitted", True)) for part in (self.energy, self.proposal))

    def fit(self, x: Tensor) -> None:
        """Fit both encoders, as far as they have anything to fit."""
        for part in (self.energy, self.proposal):
            fit = getattr(part, "fit", None)
            if callable(fit) and not bool(getattr(part, "fitted", True)):
                fit(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map x to both contexts, one behind the other, shape (B, C + C')."""
        energy, proposal = self.energy(x), self.proposal(x)
        self._channels = energy.shape[-1]
        return torch.cat([energy, proposal], -1)

    def split(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The context of the head, (B, C), and that of the proposal, (B, C'), from what `forward` returned."""
        assert self._channels is not None
        return context[..., : self._channels], context[..., self._channels :]
