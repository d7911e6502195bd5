"""Densities over boxes by importance sampling, and the noise that samples them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.importance import AdaptiveImportanceSampling
from energyreg.inference.peaks import displacement
from energyreg.inference.points import WeightedPoints
from energyreg.vision.boxes.geometry import Boxes2D, Geometry, RelativeSpace, by_coordinate

__all__ = ["BoxDistribution", "box_noise", "inside"]

NOISE_SCALES = (0.075, 0.15, 0.3)
"""Scales of the noise by default: those of NCE and NCE+ for object detection (Gustafsson et al., BMVC 2020)."""
WINDOW = (0.5, 0.7)
"""Where a density over boxes has its support, by default: centres within half a box, sizes within a factor of two."""
FEWEST = 96
"""Samples below which samplers have too little to follow."""


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
    return Boxes2D().noise([centre, centre if size is None else size], antithetic=antithetic)


@dataclass(frozen=True)
class BoxDistribution:
    r"""Densities over boxes, B of them, each around its own reference box, from weighted points of model space.

    .. math:: p(y|x) = \frac{e^{f(x, y)}}{Z(x)} \left| \frac{dz}{dy} \right|, \qquad Z = \int_W e^{f(x, z)} dz

    f alone has no finite integral over all boxes, as it is flat far away from the object. So the density is that of the
    boxes in a window W around the reference, where its mass is in practice.

    Args:
        energy: f, (*S, B, D) in model space to (*S, B).
        space: The coordinates.
        points: Weighted points in model space.
        window: Half-widths of W for each kind of coordinate: of upright boxes in the centre and in the logarithm of the
            sides.
        geometry: What the boxes are.
    """

    energy: Callable[[Tensor], Tensor]
    space: RelativeSpace
    points: WeightedPoints
    window: Sequence[float] = WINDOW
    geometry: Geometry = Boxes2D()  # noqa: RUF009 (it is frozen)

    @classmethod
    def around(
        cls,
        energy: Callable[[Tensor], Tensor],
        reference: Tensor,
        *,
        noise: GaussianNoise,
        num_samples: int = 256,
        window: Sequence[float] = WINDOW,
        geometry: Geometry | None = None,
        adaptive: bool = False,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> BoxDistribution:
        """The density around reference boxes by importance sampling from noise around them.

        Args:
            energy: f in the coordinates relative to `reference`, (M, B, 4) to (M, B).
            reference: Boxes, shape (B, D).
            noise: The importance sampler; its largest scale should reach the ends of the window.
            num_samples: Samples M per box.
            window: See above.
            geometry: What the boxes are; upright ones in an image by default.
            adaptive: Whether two thirds of the samples come from samplers that follow the density of each box; see
                :class:`~energyreg.inference.importance.AdaptiveImportanceSampling`. Below 96 samples there is too
                little to follow, and M is rounded to a multiple of 6. All boxes share their samples then.
            shared: Whether all boxes get the same samples, relative to their references: then what is said of a box
                does not depend on the others, but the errors of different boxes go together.
            generator: Source of randomness; torch's global one by default.

        Raises:
            ValueError: If num_samples is not a whole number ≥ 1, or a half-width is not > 0.
        """
        check_count("num_samples", num_samples)
        geometry = Boxes2D() if geometry is None else geometry
        halves = by_coordinate(geometry, window, "window")
        if not all(isinstance(half, int | float) and half > 0 for half in halves):
            raise ValueError(f"window is {window!r}; expected numbers > 0.")
        space = geometry.space(reference)

        def limited(z: Tensor) -> Tensor:
            return torch.where(inside(z, halves), energy(z), -torch.inf)

        if adaptive and num_samples >= FEWEST:
            part = 2 * round(num_samples / 6)
            rule = AdaptiveImportanceSampling(part, 2, part)
            proposal = noise(torch.zeros_like(reference))
            points = rule(limited, proposal, generator=generator, periodic=geometry.periodic)
            return cls(energy, space, points, window, geometry)
        origin = torch.zeros_like(reference[:1] if shared else reference)
        z = noise.sample(origin, num_samples, generator=generator)
        log_q = noise.log_prob(z, origin) + math.log(num_samples)
        z = z.expand(-1, len(reference), -1)
        return cls(energy, space, WeightedPoints(z, limited(z) - log_q), window, geometry)

    def log_prob(self, boxes: Tensor) -> Tensor:
        """Log-density of boxes (*S, B, D) in nats and their units, (*S, B), such as per pixel⁴; -inf outside of W."""
        valid = self.space.contains(boxes)
        safe = torch.where(valid[..., None], boxes, self.space.reference)
        z = self.space.to_model(safe)
        value = self.energy(z) - self.points.log_partition + self.space.log_abs_det_jacobian(safe)
        halves = by_coordinate(self.geometry, self.window, "window")
        return torch.where(valid & inside(z, halves), value, -torch.inf)

    @property
    def mean(self) -> Tensor:
        """Mean box, shape (B, D); of an angle the direction of the mean vector."""
        mean = self.points.expectation(self.space.to_user)
        if not any(self.geometry.periodic):
            return mean
        boxes, weights = self.space.to_user(self.points.y), self.points.masses[..., None]
        circular = torch.atan2((weights * boxes.sin()).sum(0), (weights * boxes.cos()).sum(0))
        return torch.where(torch.tensor(self.geometry.periodic, device=mean.device), circular, mean)

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each number of a box, shape (B, D): of each corner coordinate, in pixels."""
        mean, periodic = self.mean, self.geometry.periodic
        return self.points.expectation(lambda z: displacement(mean, self.space.to_user(z), periodic).square()).sqrt()

    @property
    def effective_sample_size(self) -> Tensor:
        """Samples that the weighted ones are worth, shape (B,); below a few dozen nothing here is to be trusted."""
        return self.points.effective_sample_size

    @property
    def pareto_k(self) -> Tensor:
        """Shape of the weights' tail, shape (B,); above 0.7 nothing here is to be trusted, either."""
        return self.points.pareto_k

    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Boxes drawn from the weighted points, shape (S, B, D).

        All B rows use the same random numbers, so that a row does not depend on the others.
        """
        z = self.points.y
        source = z.device if generator is None else generator.device
        uniforms = torch.rand(num_samples, 1, generator=generator, dtype=torch.double, device=source)
        index = self.points.indices_at(uniforms.to(z.device).expand(-1, z.shape[1]))
        return self.space.to_user(z.gather(0, index[..., None].expand(-1, -1, z.shape[-1])))

    def expected_iou(self, boxes: Tensor) -> Tensor:
        """Mean IoU of boxes (B, D) with the true box, shape (B,)."""
        return self.points.expectation(lambda z: self.geometry.iou(self.space.to_user(z), boxes))

    def iou_probability(self, boxes: Tensor, thresholds: Sequence[float]) -> Tensor:
        """Probability that the IoU of boxes (B, D) with the true box exceeds each threshold, shape (B, T).

        Raises:
            ValueError: If a threshold is not in [0, 1).
        """
        levels = np.asarray(thresholds, dtype=float)
        if levels.ndim != 1 or not bool(((levels >= 0) & (levels < 1)).all()):
            raise ValueError(f"thresholds is {thresholds!r}; expected numbers in [0, 1).")
        limits = torch.as_tensor(levels, dtype=boxes.dtype, device=boxes.device)

        def exceeds(z: Tensor) -> Tensor:
            return (self.geometry.iou(self.space.to_user(z), boxes)[..., None] > limits).to(boxes.dtype)

        # Rounding must not make a probability of 1.0000001.
        return self.points.expectation(exceeds).clamp(0, 1)


def inside(z: Tensor, halves: Sequence[float]) -> Tensor:
    """Whether points of model space (*S, D) lie in the window of these D half-widths, shape (*S)."""
    return (z.abs() <= z.new_tensor(list(halves))).all(-1)
