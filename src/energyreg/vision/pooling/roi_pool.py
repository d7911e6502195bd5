r"""Precise RoI Pooling: the mean of a feature map's bilinear surface over each bin of a box, exactly.

.. math:: \mathrm{out}_{pq} = \frac{1}{|b_{pq}|} \int_{b_{pq}} \sum_{ij} F_{ij} h(y - i) h(x - j) \, dx \, dy,
          \qquad h(t) = \max(0, 1 - |t|)

Both the surface and the bin are products of a function of x and one of y, so each bin is a weighted sum of the map's
nodes that it touches. That sum is one call of :func:`torch.nn.functional.embedding_bag`, which gathers and adds without
storing what it gathers, on any device. Its gradients are sums of the same kind, of any order.

>>> import torch
>>> features = torch.arange(4.0).expand(1, 2, 3, 4)  # F[i, j] = j
>>> roi_pool(features, torch.tensor([[0.5, 0.5, 2.5, 1.5]]), output_size=(1, 2))[0, 0]
tensor([[1., 2.]])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from energyreg.vision.pooling.bag import BLOCK, Bag, check_bins, check_boxes, check_indices

__all__ = ["Pyramid", "assign_levels", "roi_pool"]

CANONICAL_SIZE = 224.0
"""Side in pixels of the boxes that belong to `CANONICAL_LEVEL`: that of ImageNet's crops (Lin et al., CVPR 2017)."""
CANONICAL_LEVEL = 4
"""Level, whose nodes are 2⁴ pixels apart, for boxes of `CANONICAL_SIZE`."""
FEW = 2**18
"""Nodes that all boxes together may touch in one group."""
LADDER = [1, 2, *(size for power in range(1, 20) for size in (3 * 2 ** (power - 1), 2 ** (power + 1)))]
"""Numbers of nodes along a side of a bin that boxes are grouped by: each at most one and a half times the last."""


@dataclass(frozen=True)
class Pyramid:
    """Feature maps as one table with a row for each node, which boxes of all levels and images are pooled from.

    Made once for many calls of :func:`roi_pool`, as in a refinement.

    Args:
        table: Features of the nodes, shape (rows, C): level by level, image by image, row by row of a map.
        sizes: Height and width of the maps, one pair a level.
        scales: Nodes per pixel, one number a level.
        num_images: Images N.
    """

    table: Tensor
    sizes: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    num_images: int

    @classmethod
    def of(cls, maps: Tensor | Sequence[Tensor], scales: float | Sequence[float] = 1.0) -> Pyramid:
        """Feature maps as a table.

        Args:
            maps: Shape (N, C, H, W), or a sequence of such, one a level, from the finest on.
            scales: Nodes per pixel, such as 1/4, a number or one a level.

        Raises:
            TypeError: maps holds something else than floating-point tensors.
            ValueError: Shapes or lengths disagree, or a scale is not > 0.
        """
        levels = [maps] if isinstance(maps, Tensor) else list(maps)
        numbers = [float(scales)] if isinstance(scales, int | float) else [float(scale) for scale in scales]
        if not levels:
            raise ValueError("maps is empty; expected at least one feature map.")
        for level in levels:
            if not isinstance(level, Tensor) or not level.is_floating_point():
                found = f"dtype {level.dtype}" if isinstance(level, Tensor) else type(level).__name__
                raise TypeError(f"maps has an entry of {found}; expected floating-point tensors.")
            if level.ndim != 4 or level.shape[:2] != levels[0].shape[:2] or 0 in level.shape[1:]:
                shapes = ", ".join(str(tuple(each.shape)) for each in levels)
                raise ValueError(f"maps has shapes {shapes}; expected (N, C, H, W), with the same N and C.")
        if len(numbers) != len(levels):
            raise ValueError(
                f"scales has {len(numbers)} numbers for {len(levels)} feature maps; expected one for each."
            )
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"scales is {numbers}; expected finite numbers > 0.")
        count, channels = levels[0].shape[:2]
        rows = [level.permute(0, 2, 3, 1).reshape(-1, channels) for level in levels]
        table = rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)
        sizes = tuple((int(level.shape[2]), int(level.shape[3])) for level in levels)
        return cls(table, sizes, tuple(numbers), int(count))

    @property
    def num_levels(self) -> int:
        """Levels L."""
        return len(self.sizes)

    @property
    def channels(self) -> int:
        """Features C of a node."""
        return int(self.table.shape[1])

    def pool(self, boxes: Tensor, image: Tensor, output_size: int) -> Tensor:
        """Pooled features of boxes; see :func:`roi_pool`."""
        return roi_pool(self, boxes, image, output_size=output_size)

    def empty(self, boxes: Tensor, bins: tuple[int, int]) -> Tensor:
        """No rows, but attached to the graph, so that a batch without boxes does not break a backward pass."""
        nothing = boxes.new_zeros((0, self.channels, *bins), dtype=self.table.dtype, device=self.table.device)
        return (boxes.sum() + self.table.sum()).to(self.table.dtype) * nothing

    def places(self, level: Tensor, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of each box's map: nodes per pixel, its first row in the table, its height and its width, shape (R,) each."""
        device = self.table.device
        areas = [height * width for height, width in self.sizes]
        offsets = [self.num_images * sum(areas[:place]) for place in range(len(areas))]
        height, width = torch.tensor(self.sizes, device=device)[level].unbind(1)
        start = torch.tensor(offsets, device=device)[level] + image * height * width
        return torch.tensor(self.scales, device=device, dtype=dtype)[level], start, height, width


def assign_levels(boxes: Tensor, scales: Sequence[float]) -> Tensor:
    r"""The level of a feature pyramid that each box is pooled from: large boxes from coarse ones.

    .. math:: \ell = \lfloor 4 + \log_2(\sqrt{w h} / 224 + 10^{-6}) \rfloor, \text{ limited to the levels there are}

    Args:
        boxes: Corners (x1, y1, x2, y2) in pixels, shape (R, 4).
        scales: Nodes per pixel of the L levels, each half of the one before: 1/4, 1/8, ...

    Returns:
        Indices of levels, from 0 to L - 1, shape (R,). They are piecewise constant in the boxes.

    Raises:
        ValueError: The scales are not powers of two, each half of the one before.

    Source:
        Lin et al., "Feature pyramid networks for object detection", CVPR 2017, equation 1.

    >>> assign_levels(torch.tensor([[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 448.0, 448.0]]), [1 / 4, 1 / 8, 1 / 16, 1 / 32])
    tensor([0, 3])
    """
    numbers = [-math.log2(scale) for scale in scales]
    first = round(numbers[0])
    if any(abs(number - first - place) > 1e-6 for place, number in enumerate(numbers)):
        raise ValueError(
            f"scales is {list(scales)}; expected powers of two, each half of the one before, as in a feature pyramid; "
            "pass the levels of the boxes."
        )
    size = (boxes.detach()[:, 2:] - boxes.detach()[:, :2]).clamp_min(0)
    side = (size[:, 0] * size[:, 1]).sqrt()
    level = (CANONICAL_LEVEL + (side / CANONICAL_SIZE + 1e-6).log2()).floor()
    return (level - first).nan_to_num(0).clamp(0, len(numbers) - 1).long()


@torch.compiler.disable
def roi_pool(
    features: Pyramid | Tensor | Sequence[Tensor],
    boxes: Tensor,
    image: Tensor | None = None,
    *,
    output_size: int | tuple[int, int] = 7,
    scales: float | Sequence[float] = 1.0,
    level: Tensor | None = None,
) -> Tensor:
    """Precise RoI Pooling: mean of the bilinear surface over each bin of each box, without sampling.

    Differentiable in the features and in the boxes' corners, any number of times: the first derivative in a corner is
    continuous, the second exists but where an edge of a bin lies on a row or column of nodes. Node (i, j) of a map is
    at y = i, x = j, without a shift of half a pixel, and features are 0 outside of the map, as in the papers' kernel.
    Boxes may reach beyond the map, at no cost.

    How many nodes a bin touches depends on the boxes, so the work is no fixed graph: under :func:`torch.compile` it
    runs as it is, between compiled parts, and :func:`torch.export.export` cannot take it.

    Args:
        features: Maps (N, C, H, W), a sequence of maps from the finest on, or a :class:`Pyramid` of them.
        boxes: Corners (x1, y1, x2, y2) in pixels, shape (R, 4). R may be 0.
        image: Index of each box's image, shape (R,); may be left out where N = 1.
        output_size: Bins along y and x, (P, Q); one number for both.
        scales: Nodes per pixel, a number or one a level. A pyramid has its own.
        level: Index of each box's level, shape (R,); by default :func:`assign_levels`.

    Returns:
        Means, shape (R, C, P, Q), in the dtype of the features. 0 for a box without area, where the gradient is 0, too;
        NaN for a box that is not finite. Coordinates are in float32 at least.

    Raises:
        ValueError: A shape, an index or output_size is wrong.
        TypeError: The features or boxes are not floating-point tensors.
        RuntimeError: It is to be exported.

    Source:
        Jiang et al., "Acquisition of localization confidence for accurate object detection", ECCV 2018, section 3.4.
    """
    if torch.compiler.is_compiling():  # only by an export: a compiled caller leaves it out
        raise RuntimeError(
            "roi_pool cannot be exported: how many nodes a bin touches depends on the boxes. Export the backbone and "
            "the head by themselves, and call roi_pool between them."
        )
    pyramid = features if isinstance(features, Pyramid) else Pyramid.of(features, scales)
    bins = check_bins(output_size)
    check_boxes(boxes)
    count, device = len(boxes), pyramid.table.device
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, pyramid.table.dtype), torch.float32)
    image = check_indices(image, "image", count, pyramid.num_images, device)
    if level is None and pyramid.num_levels > 1:
        level = assign_levels(boxes.to(device), pyramid.scales)
    level = check_indices(level, "level", count, pyramid.num_levels, device)
    channels = pyramid.channels
    if not count:
        return pyramid.empty(boxes, bins)

    finite = boxes.detach().isfinite().all(1)
    corners = torch.where(finite[:, None], boxes, torch.zeros_like(boxes)).to(device, dtype)
    scale, start, height, width = pyramid.places(level, image, dtype)
    corners = corners * scale[:, None]
    y_axis = _Axis.of(corners[:, 1], corners[:, 3], bins[0], height)
    x_axis = _Axis.of(corners[:, 0], corners[:, 2], bins[1], width)

    table = pyramid.table.float() if pyramid.table.dtype in (torch.half, torch.bfloat16) else pyramid.table
    parts, order = [], []
    for rows, ky, kx in _groups(y_axis.count, x_axis.count, bins[0] * bins[1]):
        y_weight, y_node = y_axis.weights(rows, ky)
        x_weight, x_node = x_axis.weights(rows, kx)
        weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]  # (r, P, Q, ky, kx)
        y_row = start[rows, None, None] + y_node * width[rows, None, None]
        nodes = y_row[:, :, None, :, None] + x_node[:, None, :, None, :]
        flat = (len(rows) * bins[0] * bins[1], ky * kx)
        with torch.autocast(device.type, enabled=False):
            part = Bag.apply(table, weights.to(table.dtype).reshape(flat), nodes.reshape(flat))
        parts.append(part.view(len(rows), *bins, channels))
        order.append(rows)
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts)
    groups = torch.cat(order)
    pooled = _Reorder.apply(pooled, groups.argsort(), groups).permute(0, 3, 1, 2)
    if not bool(finite.all()):
        pooled = torch.where(finite.to(device)[:, None, None, None], pooled, torch.nan)
    return pooled.to(pyramid.table.dtype)


@dataclass(frozen=True)
class _Axis:
    """The bins of all boxes along one axis, in units of nodes.

    Attributes:
        edges: Edges of the bins, from `origin` on, shape (R, bins + 1).
        width: Width of a bin, shape (R,).
        origin: An integer near the box, so that edges keep their digits far from 0, shape (R,).
        first: First node that a bin touches, limited to the map, shape (R, bins).
        count: Most nodes that one of a box's bins touches, shape (R,).
        last: Last node of the map, shape (R,).
    """

    edges: Tensor
    width: Tensor
    origin: Tensor
    first: Tensor
    count: Tensor
    last: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, bins: int, nodes: Tensor) -> _Axis:
        size = (high - low).clamp_min(0)
        last = (nodes - 1).to(low.dtype)
        origin = torch.minimum(low.detach().floor().clamp_min(-1), last)
        steps = torch.arange(bins + 1, device=low.device, dtype=low.dtype) / bins
        edges = (low - origin)[:, None] + size[:, None] * steps
        with torch.no_grad():
            # Node j has weight in a bin [a, b] where j - 1 < b and j + 1 > a.
            begin = torch.minimum((edges[:, :-1].floor() + origin[:, None]).clamp_min(0), last[:, None])
            end = torch.minimum((edges[:, 1:].ceil() + origin[:, None]).clamp_min(0), last[:, None])
            count = (end - begin).amax(1).long() + 1
        return cls(edges, size / bins, origin, begin, count, last)

    def weights(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean of each node's hat function over each bin, and the nodes, both (r, bins, count)."""
        steps = torch.arange(count, device=rows.device, dtype=self.edges.dtype)
        nodes = self.first[rows][..., None] + steps
        last, origin = self.last[rows, None, None], self.origin[rows, None, None]
        edges, width = self.edges[rows], self.width[rows, None, None]
        place = nodes - origin
        area = _hat_integral(edges[:, 1:, None] - place) - _hat_integral(edges[:, :-1, None] - place)
        valid = (width > 0) & (nodes <= last)
        weights = torch.where(valid, area / torch.where(width > 0, width, 1.0), 0.0)
        return weights, torch.minimum(nodes, last).long()


def _hat_integral(t: Tensor) -> Tensor:
    """Integral of max(0, 1 - |s|) from -∞ to t, less 1/2; its derivative is the hat, continuous everywhere."""
    u = t.clamp(-1.0, 1.0)
    return u - 0.5 * u * u.abs()


def _groups(ky: Tensor, kx: Tensor, bins: int) -> list[tuple[Tensor, int, int]]:
    """Boxes whose bins touch about as many nodes: their rows, and the nodes along y and x."""
    ky, kx = _round_up(ky), _round_up(kx)
    y, x = int(ky.max()), int(kx.max())
    if len(ky) * bins * y * x <= FEW:  # what is touched in vain costs less than another group
        return [(torch.arange(len(ky), device=ky.device), y, x)]
    key = ky * 2**20 + kx
    order = key.argsort()
    kinds, counts = torch.unique_consecutive(key[order], return_counts=True)
    groups = []
    for rows, kind in zip(order.split(counts.tolist()), kinds.tolist(), strict=True):
        y, x = divmod(kind, 2**20)
        groups += [(part, y, x) for part in rows.split(max(BLOCK // (bins * y * x), 1))]
    return groups


def _round_up(count: Tensor) -> Tensor:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few groups, and little waste."""
    ladder = torch.tensor(LADDER, device=count.device)
    return ladder[torch.searchsorted(ladder, count)]


class _Reorder(torch.autograd.Function):
    """Rows in another order; its gradient goes back by the inverse, where PyTorch's own would add up row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(gradient, inverse, order), None, None
