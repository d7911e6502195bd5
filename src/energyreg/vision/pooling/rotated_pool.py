r"""Pooling of rotated boxes: the mean of a feature map's bilinear surface over each bin, by quadrature.

Along the axes of the map the mean is a product of two integrals, which
:func:`~energyreg.vision.pooling.roi_pool.roi_pool` knows in closed form. A rotated bin crosses the cells of the map in
polygons instead. So the surface is evaluated at Gauss and Legendre's points of each bin, in the frame of the box:

.. math:: \mathrm{out}_{pq} = \sum_{ab} \omega_a \omega_b \, S(c + R(\theta) \, (u_{qb} w, v_{pa} h)),
          \qquad S(x, y) = \sum_{ij} F_{ij} h(y - i) h(x - j)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.vision.pooling.bag import BLOCK, Bag, check_bins, check_boxes, check_indices
from energyreg.vision.pooling.roi_pool import Pyramid, assign_levels

__all__ = ["rotated_roi_pool"]


@torch.compiler.disable
def rotated_roi_pool(
    features: Pyramid | Tensor | Sequence[Tensor],
    boxes: Tensor,
    image: Tensor | None = None,
    *,
    output_size: int | tuple[int, int] = 7,
    points: int = 4,
    scales: float | Sequence[float] = 1.0,
    level: Tensor | None = None,
) -> Tensor:
    r"""Mean of the bilinear surface over each bin of rotated boxes, by n × n points of Gauss and Legendre a bin.

    Conventions are those of :func:`~energyreg.vision.pooling.roi_pool.roi_pool`, which it approaches for boxes without
    rotation. The sum is exact where the surface is linear, and errs by its kinks, which lie on the rows and columns of
    nodes: a kink of the slope by s across a bin of b nodes adds at most :math:`\kappa_n b |s|` to its mean, with
    κ = 0.023, 0.0092 and 0.0028 for n = 2, 4 and 8. So n should be at least the number of nodes along a bin.

    It is the sum that is differentiated, exactly and any number of times, in the features and in all five numbers of a
    box; the first derivative jumps where a point crosses a row or column of nodes.

    Args:
        features: Maps (N, C, H, W), a sequence of maps from the finest on, or a :class:`Pyramid` of them.
        boxes: Centre, sides and angle (cx, cy, w, h, θ), in pixels and radians, shape (R, 5). R may be 0. The angle
            turns the x axis towards the y axis, which is clockwise on a screen; bins turn with the box.
        image: Index of each box's image, shape (R,); may be left out where N = 1.
        output_size: Bins along the height and the width of the box, (P, Q); one number for both.
        points: Points n along either side of a bin. Time and memory grow with n².
        scales: Nodes per pixel, a number or one a level. A pyramid has its own.
        level: Index of each box's level, shape (R,); by default that of an upright box with these sides.

    Returns:
        Means, shape (R, C, P, Q), in the dtype of the features. 0 for a box without area, where the gradient is 0, too;
        NaN for a box that is not finite.

    Raises:
        ValueError: A shape, an index, output_size or points is wrong.
        TypeError: The features or boxes are not floating-point tensors.

    >>> features = torch.arange(5.0).expand(1, 1, 5, 5)  # F[i, j] = j
    >>> quarter = torch.tensor([[2.0, 2.0, 3.0, 2.0, torch.pi / 2]])
    >>> rotated_roi_pool(features, quarter, output_size=(2, 1)).flatten()  # the box's y axis points to the left
    tensor([2.5000, 1.5000])
    """
    pyramid = features if isinstance(features, Pyramid) else Pyramid.of(features, scales)
    bins = check_bins(output_size)
    check_boxes(boxes, 5, "centre, sides and angle (cx, cy, w, h, θ)")
    check_count("points", points)
    count, device, table = len(boxes), pyramid.table.device, pyramid.table
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, table.dtype), torch.float32)
    image = check_indices(image, "image", count, pyramid.num_images, device)
    if level is None and pyramid.num_levels > 1:
        upright = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
        level = assign_levels(upright.to(device), pyramid.scales)
    level = check_indices(level, "level", count, pyramid.num_levels, device)
    if not count:
        return pyramid.empty(boxes, bins)

    finite = boxes.detach().isfinite().all(1).to(device)
    numbers = torch.where(finite[:, None], boxes.to(device, dtype), 0.0)
    area = (numbers[:, 2:4].detach() > 0).all(1)
    scale, *place = pyramid.places(level, image, dtype)
    if table.dtype in (torch.half, torch.bfloat16):
        table = table.float()
    gauss, along = _gauss(points, dtype, device)
    step = max(BLOCK // (4 * points**2 * bins[0] * bins[1]), 1)
    parts = []
    for rows in torch.arange(count, device=device).split(step):
        x, y = _points(numbers[rows], scale[rows], bins, along)
        weights, nodes = _surface(x, y, *(each[rows] for each in place))
        weights = weights * (gauss[:, None] * gauss)[..., None] * area[rows, None, None, None, None, None]
        flat = (len(rows) * bins[0] * bins[1], 4 * points**2)
        with torch.autocast(device.type, enabled=False):
            part = Bag.apply(table, weights.to(table.dtype).reshape(flat), nodes.reshape(flat))
        parts.append(part.view(len(rows), *bins, -1))
    pooled = torch.cat(parts).permute(0, 3, 1, 2)
    return torch.where(finite[:, None, None, None], pooled, torch.nan).to(pyramid.table.dtype)


def _gauss(points: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights with the sum 1 and places in [0, 1] of Gauss and Legendre's rule, shape (n,) each."""
    places, weights = np.polynomial.legendre.leggauss(points)
    return torch.as_tensor(weights / 2).to(device, dtype), torch.as_tensor((places + 1) / 2).to(device, dtype)


def _points(boxes: Tensor, scale: Tensor, bins: tuple[int, int], along: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of all points in units of nodes, (r, P, Q, n, n) each."""
    cx, cy, width, height, angle = boxes.unbind(1)
    # From -1/2 to 1/2 over the box: (P, n) along its height, (Q, n) along its width.
    v, u = ((torch.arange(size, device=along.device)[:, None] + along) / size - 0.5 for size in bins)
    right = (width[:, None, None] * u)[:, None, :, None, :]
    down = (height[:, None, None] * v)[:, :, None, :, None]
    cx, cy, cos, sin, scale = (each[:, None, None, None, None] for each in (cx, cy, angle.cos(), angle.sin(), scale))
    return (cx + cos * right - sin * down) * scale, (cy + sin * right + cos * down) * scale


def _surface(x: Tensor, y: Tensor, start: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the four nodes around each point, 0 beyond the map, and their rows in the table: (..., 4) each."""
    start, height, width = (each[:, None, None, None, None] for each in (start, height, width))
    weights, nodes = [], []
    for where, size in ((y, height), (x, width)):
        # Far away points would overflow whole numbers.
        first = torch.minimum(where.detach().floor().clamp_min(-2), size.to(where.dtype))
        part = (where - first)[..., None]
        near = torch.cat([1 - part, part], -1)
        index = first.long()[..., None] + torch.arange(2, device=x.device)
        weights.append(torch.where((index >= 0) & (index < size[..., None]), near, 0.0))
        nodes.append(torch.minimum(index.clamp_min(0), size[..., None] - 1))
    both = weights[0][..., :, None] * weights[1][..., None, :]
    rows = start[..., None, None] + nodes[0][..., :, None] * width[..., None, None] + nodes[1][..., None, :]
    return both.flatten(-2), rows.flatten(-2)
