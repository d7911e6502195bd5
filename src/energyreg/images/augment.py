r"""Augmentation that changes the target with the image.

Each step is a callable ``step(image, target, generator=None) -> (image, target)``: an image of shape (C, H, W), uint8
or float, and its target of shape (D,) in user units. A flip negates yaw, roll and steering; a rotation turns the head
pose; a crop counts its dots again; colour leaves the target alone. Nothing is written into the input.

A step draws from the generator that it is given, or from torch's global one. Workers of a DataLoader have different
global seeds in each epoch, so that there ``None`` is right: a generator that is copied into the workers would draw the
same numbers in all of them.

**Order.** Steps of a :class:`Compose` run from first to last. Geometry goes first, on the whole picture: crop, flip and
rotate; a flip after a rotation equals the opposite rotation after the flip, and the target follows either way. Then
colour, then :class:`Noise` and :class:`Erase`, which should not be blurred by resizing. Normalise last, outside.
:class:`RandomCropCount` takes the dots in place of a target, so no step that changes the pixels' places may come before
it.

Needs torchvision: ``pip install 'energyreg[vision]'``.

>>> import torch
>>> train = Compose([HorizontalFlip.pose(), Rotate.pose(10), ColorJitter(brightness=0.2)])
>>> image, pose = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([0.5, -0.1, 0.2])
>>> image, pose = train(image, pose, generator=torch.Generator().manual_seed(0))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Generator, Tensor

__all__ = [
    "ColorJitter",
    "Compose",
    "Erase",
    "Grayscale",
    "HorizontalFlip",
    "Noise",
    "RandomCropCount",
    "RandomResizedCrop",
    "Rotate",
    "Step",
    "rotated_pose",
]

TRIES = 10
"""How often a rectangle is drawn that does not fit into the image, before a step falls back."""
BYTE = 255
BILINEAR = 2
"""Number of torchvision's bilinear interpolation, the same as Pillow's."""


class Step(Protocol):
    """What a step of augmentation is: image (C, H, W) and target (D,) to image and target."""

    def __call__(self, image: Tensor, target: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Compose:
    """Run steps one after the other, all with one generator; itself a step.

    Attributes:
        steps: The steps, the first one first.
    """

    steps: Sequence[Step]

    def __call__(self, image: Tensor, target: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        for step in self.steps:
            image, target = step(image, target, generator)
        return image, target


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror the picture, left to right, and the target with it.

    Use :meth:`pose` and :meth:`steering`; an age or a count is not changed by a flip, and needs no `negate`.

    Attributes:
        p: Probability of a flip.
        negate: Columns of the target that change their sign, or a function from the target to the mirrored target.
    """

    p: float = 0.5
    negate: Sequence[int] | Callable[[Tensor], Tensor] = ()

    def __post_init__(self) -> None:
        _check_probability(self.p)

    @classmethod
    def pose(cls, p: float = 0.5, *, yaw: int = 0, roll: int = 2) -> Self:
        """For head poses: yaw and roll are negated, pitch stays. Exact for every pose.

        Mirroring turns a rotation matrix R into M R M with M = diag(-1, 1, 1).
        """
        return cls(p, (yaw, roll))

    @classmethod
    def steering(cls, p: float = 0.5, *, column: int = 0) -> Self:
        """For steering: left becomes right. Right where the road is as likely to be mirrored: not with traffic."""
        return cls(p, (column,))

    def __call__(self, image: Tensor, target: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        _check_image(image)
        if not _happens(self.p, generator):
            return image, target
        return _functional().horizontal_flip(image), self._mirrored(target)

    def _mirrored(self, target: Tensor) -> Tensor:
        if callable(self.negate):
            return self.negate(target)
        target = target.clone()
        for column in self.negate:
            _check_column(target, column, "negate")
            # Plus 0: a steering of 0 stays 0 and does not become -0, which is another value to whoever compares bits.
            target[column] = 0.0 - target[column]
        return target


@dataclass(frozen=True)
class Rotate:
    """Rotate the picture in its plane by a random angle, counter-clockwise as seen where positive, and the target.

    The angle is uniform on [-max_degrees, max_degrees]. Corners that the picture does not cover are filled.

    Use :meth:`pose` for head poses, where the rotation changes all three angles. The `column` is for a target that
    *is* an angle in the picture's plane: it changes by sign × the angle.

    Attributes:
        max_degrees: Greatest angle, in degrees, up to 180.
        column: Column of the target that is the angle, or None if the target does not depend on the rotation.
        sign: +1 where a counter-clockwise rotation increases the target, -1 where it decreases it.
        units: Unit of the target's angles. They are wrapped into [-π, π), or [-180°, 180°).
        fill: Value of the pixels that are not covered.
        angles: Columns of yaw, pitch and roll, if the target is a head pose.
    """

    max_degrees: float
    column: int | None = None
    sign: Literal[1, -1] = 1
    units: Literal["radians", "degrees"] = "radians"
    fill: float = 0.0
    angles: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_degrees <= 180:
            raise ValueError(f"max_degrees is {self.max_degrees}; expected an angle from 0 to 180.")
        if self.sign not in (1, -1):
            raise ValueError(f"sign is {self.sign}; expected 1 or -1.")
        if self.units not in ("radians", "degrees"):
            raise ValueError(f"units is {self.units!r}; expected 'radians' or 'degrees'.")
        if self.column is not None and self.angles is not None:
            raise ValueError("column and angles are both given; expected one: a single angle, or a head pose.")

    @classmethod
    def pose(
        cls,
        max_degrees: float,
        *,
        units: Literal["radians", "degrees"] = "radians",
        columns: tuple[int, int, int] = (0, 1, 2),
        fill: float = 0.0,
    ) -> Self:
        """For head poses as :mod:`energyreg.datasets` returns them, by :func:`rotated_pose`.

        Args:
            max_degrees: Greatest angle of rotation, in degrees.
            units: Unit of the target's angles.
            columns: Columns of yaw, pitch and roll.
            fill: Value of the pixels that are not covered.
        """
        return cls(max_degrees, units=units, angles=columns, fill=fill)

    def __call__(self, image: Tensor, target: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        _check_image(image)
        degrees = _uniform(-self.max_degrees, self.max_degrees, generator)
        turned = _functional().rotate(image, degrees, interpolation=BILINEAR, fill=[self.fill] * image.shape[0])
        radians = math.radians(degrees)
        unit = 1.0 if self.units == "radians" else 180 / math.pi
        target = target.clone()
        if self.column is not None:
            _check_column(target, self.column, "column")
            angle = target[self.column].double() / unit + self.sign * radians
            target[self.column] = (_wrapped(angle) * unit).to(target.dtype)
        elif self.angles is not None:
            for column in self.angles:
                _check_column(target, column, "angles")
            columns = list(self.angles)
            pose = rotated_pose(target[columns].double() / unit, radians)
            target[columns] = (pose * unit).to(target.dtype)
        return turned, target


def rotated_pose(pose: Tensor, radians: float) -> Tensor:
    r"""The head pose that is seen when the picture is rotated in its plane.

    With x to the right, y down and z into the scene, the poses of BIWI, 300W-LP and AFLW2000 are

    .. math:: R = R_x(-\text{pitch})\, R_y(\text{yaw})\, R_z(\text{roll}) ,

    so that roll acts on the head **before** yaw and pitch do. A rotation of the picture by α, counter-clockwise as
    seen, gives :math:`R_z(-\alpha) R`, whose three angles all differ from those of R. Only for a face that looks into
    the camera it is roll - α; at 60° of yaw the rule "a rotation changes roll" is wrong by many degrees.

    Args:
        pose: Yaw, pitch and roll in radians, shape (..., 3).
        radians: α.

    Returns:
        Yaw in [-π/2, π/2], pitch and roll in (-π, π], shape (..., 3). A pose with a yaw beyond ±π/2 comes back as its
        equal with a yaw within.
    """
    yaw, pitch, roll = pose.unbind(-1)
    rotation = _about((1, 2), -pitch) @ _about((2, 0), yaw) @ _about((0, 1), roll)
    r = _about((0, 1), torch.zeros_like(yaw) - radians) @ rotation
    return torch.stack(
        [
            torch.atan2(r[..., 0, 2], torch.hypot(r[..., 1, 2], r[..., 2, 2])),
            torch.atan2(r[..., 1, 2], r[..., 2, 2]),
            torch.atan2(-r[..., 0, 1], r[..., 0, 0]),
        ],
        dim=-1,
    )


def _about(plane: tuple[int, int], angle: Tensor) -> Tensor:
    """Rotation matrices that turn the first axis of the plane towards the second, shape (..., 3, 3)."""
    first, second = plane
    matrix = torch.eye(3, dtype=angle.dtype).expand(*angle.shape, 3, 3).clone()
    matrix[..., first, first] = matrix[..., second, second] = angle.cos()
    matrix[..., second, first] = angle.sin()
    matrix[..., first, second] = -angle.sin()
    return matrix


@dataclass(frozen=True)
class RandomCropCount:
    """Cut a random square out of the picture, and count the dots in it.

    The second argument of the call is the dots, not a target: their pixels as (row, column), shape (n, 2), as
    :class:`energyreg.datasets.CountTask` has them. The target that comes back is their number in the crop, shape (1,),
    float32. A crop holds the pixels from its upper left corner up to, and without, its lower and right border, as those
    of :func:`energyreg.datasets.crops_with_counts`.

    All places that lie inside the picture are equally likely; so pixels near the border are in fewer crops than others.

    Attributes:
        size: Side of the square, in pixels.
    """

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, image: Tensor, target: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        _check_image(image)
        dots = target
        if dots.ndim != 2 or dots.shape[1] != 2:
            raise ValueError(
                f"target has shape {tuple(dots.shape)}; expected the dots, (row, column), of shape (n, 2). "
                f"RandomCropCount counts them, and returns their number as the target."
            )
        height, width = image.shape[-2:]
        if self.size > min(height, width):
            raise ValueError(f"size is {self.size}, but the image has {height} by {width} pixels; use a smaller size.")
        top, left = (
            int(torch.randint(side - self.size + 1, (), generator=generator).item()) for side in (height, width)
        )
        corner = torch.tensor([top, left], dtype=dots.dtype, device=dots.device)
        inside = ((dots >= corner) & (dots < corner + self.size)).all(dim=1)
        crop = image[..., top : top + self.size, left : left + self.size]
        return crop, inside.sum().reshape(1).to(torch.float32)


class _ImageOnly:
    """A step that leaves the target alone: `_changed` has the image, and the generator.

    torchvision's transforms of these names are no substitute: they draw from torch's global state, and take no
    generator.
    """

    colour = False

    def __call__(self, image: Tensor, target: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        _check_image(image, self.colour)
        return self._changed(image, generator), target

    def _changed(self, image: Tensor, generator: Generator | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class RandomResizedCrop(_ImageOnly):
    """Cut a random rectangle out of the picture and resize it to a square; the target stays.

    For targets that do not depend on where in the picture, and how large, the thing is: an age, a head pose (but for
    the perspective). Not for counts, for steering, or for anything measured in pixels.

    Attributes:
        size: Side of the square, in pixels.
        scale: Range of the rectangle's fraction of the area, in (0, 1].
        ratio: Range of its width over its height; uniform on the logarithm.
    """

    size: int
    scale: tuple[float, float] = (0.7, 1.0)
    ratio: tuple[float, float] = (0.9, 1.1)

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_range("scale", self.scale, least=0.0, greatest=1.0)
        _check_range("ratio", self.ratio, least=0.0)

    def _changed(self, image: Tensor, generator: Generator | None) -> Tensor:
        box = _rectangle(image, self.scale, self.ratio, generator)
        if box is None:  # a long picture: the largest square, in the middle
            height, width = image.shape[-2:]
            side = min(height, width)
            box = (height - side) // 2, (width - side) // 2, side, side
        return _functional().resized_crop(image, *box, [self.size, self.size], antialias=True)


@dataclass(frozen=True)
class ColorJitter(_ImageOnly):
    """Change brightness, contrast, saturation and hue by random factors, in random order; the target stays.

    Attributes:
        brightness: b: the factor is uniform on [1 - b, 1 + b], and not below 0.
        contrast: As brightness.
        saturation: As brightness.
        hue: h: the shift is uniform on [-h, h] turns of the colour circle, with h up to 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    colour = True

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}; expected a part of the colour circle from 0 to 0.5.")

    def _changed(self, image: Tensor, generator: Generator | None) -> Tensor:
        functional = _functional()
        changes = [
            (functional.adjust_brightness, self._factor(self.brightness, generator)),
            (functional.adjust_contrast, self._factor(self.contrast, generator)),
            (functional.adjust_saturation, self._factor(self.saturation, generator)),
            (functional.adjust_hue, _uniform(-self.hue, self.hue, generator)),
        ]
        amounts = (self.brightness, self.contrast, self.saturation, self.hue)
        # Numbers are drawn for what is switched off, too: switching it on leaves the other draws as they were.
        for index in torch.randperm(len(changes), generator=generator).tolist():
            if amounts[index] > 0:
                change, value = changes[index]
                image = change(image, value)
        return image

    @staticmethod
    def _factor(amount: float, generator: Generator | None) -> float:
        return _uniform(max(0.0, 1 - amount), 1 + amount, generator)


@dataclass(frozen=True)
class Grayscale(_ImageOnly):
    """Make the picture grey, in three equal channels, with some probability; the target stays.

    Attributes:
        p: The probability.
    """

    p: float = 0.1

    colour = True

    def __post_init__(self) -> None:
        _check_probability(self.p)

    def _changed(self, image: Tensor, generator: Generator | None) -> Tensor:
        grey = _happens(self.p, generator)
        return _functional().rgb_to_grayscale(image, num_output_channels=3) if grey else image


@dataclass(frozen=True)
class Noise(_ImageOnly):
    """Add Gaussian noise to each value of the picture; the target stays.

    Attributes:
        std: Standard deviation, as a fraction of the range from black to white: of 255 for uint8, of 1 for floats.
            A result outside of that range is set to its end; so use it before the picture is normalised.
    """

    std: float

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std is {self.std}; expected 0 or more.")

    def _changed(self, image: Tensor, generator: Generator | None) -> Tensor:
        noise = self.std * torch.randn(image.shape, generator=generator)
        if image.dtype == torch.uint8:
            return (image + BYTE * noise).round_().clamp_(0, BYTE).to(torch.uint8)
        return (image + noise.to(image.dtype)).clamp_(0, 1)


@dataclass(frozen=True)
class Erase(_ImageOnly):
    """Paint over a random rectangle, with some probability; the target stays.

    Not for counts, as things under it would no longer be there to count.

    Attributes:
        p: The probability.
        scale: Range of the rectangle's fraction of the area, in (0, 1].
        ratio: Range of its width over its height; uniform on the logarithm.
        value: What it is painted with.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.2)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: float = 0.0

    def __post_init__(self) -> None:
        _check_probability(self.p)
        _check_range("scale", self.scale, least=0.0, greatest=1.0)
        _check_range("ratio", self.ratio, least=0.0)

    def _changed(self, image: Tensor, generator: Generator | None) -> Tensor:
        if _happens(self.p, generator) and (box := _rectangle(image, self.scale, self.ratio, generator)) is not None:
            top, left, height, width = box
            image = image.clone()
            image[..., top : top + height, left : left + width] = self.value
        return image


# ---------------------------------------------------------------------------------------------- draws and checks


def _uniform(low: float, high: float, generator: Generator | None) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _happens(p: float, generator: Generator | None) -> bool:
    return torch.rand((), generator=generator, dtype=torch.float64).item() < p


def _wrapped(angle: Tensor) -> Tensor:
    """The angle in [-π, π)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _rectangle(
    image: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator | None
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of a random rectangle inside the image; None if no try fits."""
    height, width = image.shape[-2:]
    for _ in range(TRIES):
        area = height * width * _uniform(*scale, generator)
        shape = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1]), generator))
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(height - h + 1, (), generator=generator).item())
            left = int(torch.randint(width - w + 1, (), generator=generator).item())
            return top, left, h, w
    return None


def _functional() -> Any:
    """torchvision's functional transforms."""
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise ImportError(
            "Augmentation needs torchvision, which is not installed. Install it with: pip install 'energyreg[vision]'"
        ) from error
    return functional


def _check_image(image: Tensor, colour: bool = False) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image is a {type(image).__name__}; expected a tensor of shape (C, H, W).")
    channels = (3,) if colour else (1, 3)
    if image.ndim != 3 or image.shape[0] not in channels or 0 in image.shape:
        wanted = "(3, H, W)" if colour else "(3, H, W) or (1, H, W)"
        raise ValueError(f"image has shape {tuple(image.shape)}; expected {wanted}, one picture at a time.")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image has type {image.dtype}; expected uint8, or floats from 0 to 1.")


def _check_column(target: Tensor, column: int, name: str) -> None:
    if target.ndim != 1 or not -len(target) <= column < len(target):
        raise ValueError(f"{name} is column {column} of a target of shape {tuple(target.shape)}; expected it in (D,).")


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; expected a probability from 0 to 1.")


def _check_size(size: int) -> None:
    if not size >= 1:
        raise ValueError(f"size is {size}; expected 1 pixel or more.")


def _check_range(name: str, values: tuple[float, float], least: float, greatest: float = math.inf) -> None:
    low, high = values
    if not (least < low <= high <= greatest and high < math.inf):
        raise ValueError(f"{name} is {tuple(values)}; expected (low, high), above {least:g} and up to {greatest:g}.")
