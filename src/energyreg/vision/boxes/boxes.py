"""Boxes as regression targets: coordinates relative to a reference box, noise in them, and densities over boxes.

A box is (x1, y1, x2, y2) in pixels, corners, without the extra pixel that some old code adds to its size. In model
space it is where its centre lies in the reference box's widths and heights, and the logarithm of its size:

>>> import torch
>>> space = BoxSpace(torch.tensor([[10.0, 10.0, 30.0, 50.0]]))
>>> space.to_model(torch.tensor([[12.0, 14.0, 32.0, 54.0]]))
tensor([[0.1000, 0.1000, 0.0000, 0.0000]])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.points import WeightedPoints

__all__ = ["BoxDistribution", "BoxSpace", "box_noise", "check_boxes", "paired_iou", "variance_voting"]

NOISE_SCALES = (0.075, 0.15, 0.3)
"""Scales of the noise by default: those of NCE and NCE+ for object detection (Gustafsson et al., BMVC 2020)."""
WINDOW = (0.5, 0.7)
"""Where a density over boxes has its support, by default: centres within half a box, sizes within a factor of two."""
OUTSIDE = 1.0
"""Pixels that an annotated box may reach beyond its image: annotation tools round."""
SMALLEST_STDDEV = 1e-3
"""Pixels; a smaller standard deviation counts as this in a vote, so that one of 0 has no infinite weight."""


def torchvision() -> ModuleType:
    """torchvision, imported when it is needed.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(
            "Detection needs torchvision, which is not installed. Install it with: pip install 'energyreg[vision]'"
        ) from error
    return torchvision


@dataclass(frozen=True)
class BoxSpace:
    r"""Coordinates of boxes relative to reference boxes, one for each of the B rows of a batch.

    .. math:: z = \left( \frac{c_x - c_x^0}{w_0}, \frac{c_y - c_y^0}{h_0}, \log\frac{w}{w_0}, \log\frac{h}{h_0} \right)

    The reference box itself is at 0. The papers' coordinates differ by a constant only, for the digits' sake. They do
    not change where an image is resized and its boxes with it.

    Args:
        reference: Reference boxes, corners in pixels, shape (B, 4).
    """

    reference: Tensor

    @property
    def dim(self) -> int:
        """Dimensions D = 4."""
        return 4

    @property
    def periodic(self) -> tuple[bool, ...]:
        """No dimension is an angle."""
        return (False,) * 4

    def _frame(self) -> tuple[Tensor, Tensor]:
        first, last = self.reference.split(2, -1)
        return (first + last) / 2, last - first

    def to_model(self, boxes: Tensor) -> Tensor:
        """Boxes to model space: corners in pixels to z, both of shape (*S, B, 4). NaN where a side is not positive."""
        centre, size = self._frame()
        first, last = boxes.split(2, -1)
        return torch.cat([((first + last) / 2 - centre) / size, ((last - first) / size).log()], -1)

    def to_user(self, z: Tensor) -> Tensor:
        """Points of model space to boxes: z to corners in pixels, both of shape (*S, B, 4)."""
        centre, size = self._frame()
        place, log_size = z.split(2, -1)
        centre, half = centre + size * place, size * log_size.exp() / 2
        return torch.cat([centre - half, centre + half], -1)

    def log_abs_det_jacobian(self, boxes: Tensor) -> Tensor:
        """log |det dz/dy| at boxes of shape (*S, B, 4), shape (*S, B): densities in z to densities per pixel⁴."""
        # Corners to centre and size has determinant 1.
        size = boxes[..., 2:] - boxes[..., :2]
        return -(self._frame()[1].log() + size.log()).sum(-1)

    def contains(self, boxes: Tensor) -> Tensor:
        """Whether boxes are finite and have positive sides, shape (*S, B)."""
        return boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)


def box_noise(
    centre: Sequence[float] = NOISE_SCALES, size: Sequence[float] | None = None, *, antithetic: bool = False
) -> GaussianNoise:
    """Noise around boxes in the coordinates of :class:`BoxSpace`: K Gaussians, one component for all four numbers.

    Args:
        centre: Standard deviations of the centre, K of them, in sides of the reference box.
        size: The same for the logarithm of the sides; by default those of the centre.
        antithetic: As in :class:`~energyreg.densities.noise.GaussianNoise`.

    Raises:
        ValueError: If the two differ in length, or a scale is not a finite number > 0.

    Source:
        Gustafsson et al., BMVC 2020, as in its code.

    >>> box_noise([0.1, 0.2]).scales
    ((0.1, 0.1, 0.1, 0.1), (0.2, 0.2, 0.2, 0.2))
    """
    size = centre if size is None else size
    if len(centre) != len(size):
        raise ValueError(
            f"centre has {len(centre)} scales and size {len(size)}; expected as many, one for each component."
        )
    return GaussianNoise([(c, c, s, s) for c, s in zip(centre, size, strict=True)], antithetic=antithetic)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes with their counterparts, where `torchvision.ops.box_iou` takes all pairs.

    Args:
        boxes: Corners, shape (*S, 4).
        others: Corners, of a shape that broadcasts with it.

    Returns:
        Numbers in [0, 1], shape (*S); 0 where neither has an area.
    """
    first, last = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    areas = [(each[..., 2:] - each[..., :2]).clamp_min(0).prod(-1) for each in (boxes, others)]
    overlap = (last - first).clamp_min(0).prod(-1)
    union = areas[0] + areas[1] - overlap
    return torch.where(union > 0, overlap / torch.where(union > 0, union, 1.0), 0.0)


def variance_voting(boxes: Tensor, stddevs: Tensor, labels: Tensor, width: float) -> Tensor:
    r"""Move each border of each box to the weighted mean of what the boxes of its class around it say.

    .. math:: x_j' = \frac{\sum_i p_{ij} x_i / \sigma_i^2}{\sum_i p_{ij} / \sigma_i^2}, \qquad
        p_{ij} = e^{-(1 - \mathrm{IoU}_{ij})^2 / \sigma_t} \text{ where IoU}_{ij} > 0

    So a border that one box does not know moves to where another sees it. Scores do not count, nor does a coordinate
    whose σ is not finite. A width of 0.02 listens to close neighbours only: p is 0.14 at an IoU of 0.8, 4e-6 at 0.5.

    Args:
        boxes: Boxes of one image, corners, shape (N, 4).
        stddevs: Standard deviations σ of their coordinates, shape (N, 4).
        labels: Their classes, shape (N,).
        width: σ_t, how far the influence of a box reaches; > 0.

    Returns:
        Boxes, shape (N, 4). One that overlaps none of its class, or that would lose its area, stays bit-equal.

    Source:
        He et al., "Bounding box regression with uncertainty for accurate object detection", CVPR 2019 (variance
        voting), whose suppression goes by the boxes before the vote.

    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 10.0, 10.0]])
    >>> stddevs = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    >>> variance_voting(boxes, stddevs, torch.tensor([1, 1]), 1e6)
    tensor([[ 0.9000,  0.0000, 10.0000, 10.0000],
            [ 0.9000,  0.0000, 10.0000, 10.0000]])
    """
    iou = paired_iou(boxes[:, None], boxes[None])
    heard = (iou > 0) & (labels[:, None] == labels[None])
    share = torch.where(heard, (-(1 - iou).square() / width).exp(), 0.0)
    share.fill_diagonal_(1.0)  # also where a box without area does not even overlap itself
    precision = torch.where(stddevs.isfinite(), stddevs.clamp_min(SMALLEST_STDDEV) ** -2, 0.0)
    weights = share[..., None] * precision
    # Written as a shift, so that a box by itself stays what it is, to the last bit.
    voted = boxes + (weights * (boxes[None] - boxes[:, None])).sum(1) / weights.sum(1)
    # Each border has weights of its own, so that in principle they may cross; NaN compares as False.
    return torch.where((voted[:, 2:] > voted[:, :2]).all(1, keepdim=True), voted, boxes)


def check_boxes(boxes: Tensor, size: tuple[int, int] | None = None, *, image: object = None) -> None:
    """Refuse annotated boxes that cannot be what was meant, by the name of their image and their number in it.

    Args:
        boxes: Corners (x1, y1, x2, y2) in pixels, shape (N, 4).
        size: Height and width of the image; None to skip what needs them.
        image: What errors call the image: a file name, an id.

    Raises:
        ValueError: The shape is wrong, a coordinate is not finite, a box has no positive width or height or reaches
            more than a pixel beyond the image, or the boxes are certain to be (x, y, width, height).
        TypeError: boxes is no tensor of real numbers.
    """
    where = "" if image is None else f" of image {image}"
    if not isinstance(boxes, Tensor) or boxes.is_complex():
        raise TypeError(f"boxes{where} is a {type(boxes).__name__}; expected a tensor of shape (N, 4).")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes{where} has shape {tuple(boxes.shape)}; expected (N, 4): corners (x1, y1, x2, y2).")
    first, last = boxes[:, :2], boxes[:, 2:]
    for bad, what in (
        (~boxes.isfinite().all(1), "expected finite numbers"),
        (~(last > first).all(1), "expected corners (x1, y1, x2, y2) with x1 < x2 and y1 < y2"),
    ):
        if bool(bad.any()):
            number = int(bad.nonzero()[0])
            raise ValueError(f"Box {number}{where} is {_numbers(boxes[number])}; {what}.{_hint(boxes, size)}")
    if size is None:
        return
    height, width = size
    limit = boxes.new_tensor([width, height])
    outside = (first < -OUTSIDE).any(1) | (last > limit + OUTSIDE).any(1)
    if bool(outside.any()):
        number = int(outside.nonzero()[0])
        raise ValueError(
            f"Box {number}{where} is {_numbers(boxes[number])}, which lies outside of the image of width {width} and "
            f"height {height}; expected 0 ≤ x1 < x2 ≤ {width} and 0 ≤ y1 < y2 ≤ {height}. Clip it, or look whether the "
            "boxes belong to another size of the image."
        )


def _numbers(box: Tensor) -> str:
    return f"({', '.join(f'{value:.6g}' for value in box.tolist())})"


def _hint(boxes: Tensor, size: tuple[int, int] | None) -> str:
    """Corners that are not in order, while all boxes fit into the image as (x, y, width, height), are just that."""
    first, last = boxes[:, :2], boxes[:, 2:]
    fits = bool(boxes.isfinite().all()) and bool((last > 0).all()) and bool((first >= 0).all())
    if size is not None:
        fits = fits and bool((first + last <= boxes.new_tensor([size[1], size[0]]) + OUTSIDE).all())
    if not fits:
        return ""
    return (
        " The boxes look like (x, y, width, height); convert them: torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')."
    )


@dataclass(frozen=True)
class BoxDistribution:
    r"""Densities over boxes, B of them, each around its own reference box, from weighted points of model space.

    .. math:: p(y|x) = \frac{e^{f(x, y)}}{Z(x)} \left| \frac{dz}{dy} \right|, \qquad Z = \int_W e^{f(x, z)} dz

    f alone has no finite integral over all boxes, as it is flat far away from the object. So the density is that of the
    boxes in a window W around the reference, where its mass is in practice.

    Args:
        energy: f, (*S, B, 4) in model space to (*S, B).
        space: The coordinates.
        points: Weighted points in model space.
        window: Half-widths of W in the centre and in the logarithm of the sides.
    """

    energy: Callable[[Tensor], Tensor]
    space: BoxSpace
    points: WeightedPoints
    window: tuple[float, float] = WINDOW

    @classmethod
    def around(
        cls,
        energy: Callable[[Tensor], Tensor],
        reference: Tensor,
        *,
        noise: GaussianNoise,
        num_samples: int = 256,
        window: tuple[float, float] = WINDOW,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> BoxDistribution:
        """The density around reference boxes by importance sampling from noise around them.

        Args:
            energy: f in the coordinates relative to `reference`, (M, B, 4) to (M, B).
            reference: Boxes in pixels, shape (B, 4).
            noise: The importance sampler; its largest scale should reach the ends of the window.
            num_samples: Samples M per box.
            window: See above.
            shared: Whether all boxes get the same samples, relative to their references: then what is said of a box
                does not depend on the others, but the errors of different boxes go together.
            generator: Source of randomness; torch's global one by default.

        Raises:
            ValueError: If num_samples is not a whole number ≥ 1, or a half-width is not > 0.
        """
        check_count("num_samples", num_samples)
        if len(window) != 2 or not all(isinstance(half, int | float) and half > 0 for half in window):
            raise ValueError(f"window is {window!r}; expected two numbers > 0.")
        origin = torch.zeros_like(reference[:1] if shared else reference)
        z = noise.sample(origin, num_samples, generator=generator)
        log_q = noise.log_prob(z, origin) + math.log(num_samples)
        z = z.expand(-1, len(reference), -1)
        log_weights = energy(z) - log_q
        log_weights = torch.where(_inside(z, window), log_weights, -torch.inf)
        return cls(energy, BoxSpace(reference), WeightedPoints(z, log_weights), window)

    def log_prob(self, boxes: Tensor) -> Tensor:
        """Log-density of boxes (*S, B, 4) in nats, per pixel⁴, shape (*S, B); -inf outside of the window."""
        valid = self.space.contains(boxes)
        safe = torch.where(valid[..., None], boxes, self.space.reference)
        z = self.space.to_model(safe)
        value = self.energy(z) - self.points.log_partition + self.space.log_abs_det_jacobian(safe)
        return torch.where(valid & _inside(z, self.window), value, -torch.inf)

    @property
    def mean(self) -> Tensor:
        """Mean box, corners in pixels, shape (B, 4)."""
        return self.points.expectation(self.space.to_user)

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each corner coordinate, in pixels, shape (B, 4)."""
        mean = self.mean
        return self.points.expectation(lambda z: (self.space.to_user(z) - mean).square()).sqrt()

    @property
    def effective_sample_size(self) -> Tensor:
        """Samples that the weighted ones are worth, shape (B,); below a few dozen nothing here is to be trusted."""
        return self.points.effective_sample_size

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Boxes drawn from the weighted points, corners in pixels, shape (S, B, 4).

        All B rows use the same random numbers, so that a row does not depend on the others.
        """
        z = self.points.y
        source = z.device if generator is None else generator.device
        uniforms = torch.rand(num_samples, 1, generator=generator, dtype=torch.double, device=source)
        index = self.points.indices_at(uniforms.to(z.device).expand(-1, z.shape[1]))
        return self.space.to_user(z.gather(0, index[..., None].expand(-1, -1, 4)))

    def expected_iou(self, boxes: Tensor) -> Tensor:
        """Mean IoU of boxes (B, 4) with the true box, shape (B,)."""
        return self.points.expectation(lambda z: paired_iou(self.space.to_user(z), boxes))

    def iou_probability(self, boxes: Tensor, thresholds: Sequence[float]) -> Tensor:
        """Probability that the IoU of boxes (B, 4) with the true box exceeds each threshold, shape (B, T).

        Raises:
            ValueError: If a threshold is not in [0, 1).
        """
        levels = np.asarray(thresholds, dtype=float)
        if levels.ndim != 1 or not bool(((levels >= 0) & (levels < 1)).all()):
            raise ValueError(f"thresholds is {thresholds!r}; expected numbers in [0, 1).")
        limits = torch.as_tensor(levels, dtype=boxes.dtype, device=boxes.device)

        def exceeds(z: Tensor) -> Tensor:
            return (paired_iou(self.space.to_user(z), boxes)[..., None] > limits).to(boxes.dtype)

        # Rounding must not make a probability of 1.0000001.
        return self.points.expectation(exceeds).clamp(0, 1)


def _inside(z: Tensor, window: tuple[float, float]) -> Tensor:
    limit = z.new_tensor([window[0], window[0], window[1], window[1]])
    return (z.abs() <= limit).all(-1)
