"""Dots: images in which a pixel marks each thing that is counted, and the counts of images and of crops of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energyreg.datasets.files import PathLike, read_image

__all__ = ["count_dots", "crops_with_counts", "read_dots"]

THRESHOLD = 128
"""Least value of a dot's brightest channel, of 255."""
LOSSY = {".jpg", ".jpeg"}


def read_dots(path: PathLike) -> NDArray[np.int64]:
    """The dots of an annotation image, as (row, column), in reading order.

    In a lossless image (PNG) **each bright pixel is a dot of its own**. Touching dots are different cells: 159 of the
    200 VGG images have some, and connected components would miscount them. In a JPEG a dot is smeared over its
    neighbours; there a dot is a bright pixel that no neighbour of the eight outshines, and of equal neighbours the
    first.

    Args:
        path: The image, of any mode; only the brightest channel counts, so white and red dots are alike.

    Returns:
        Pixels of the dots, int64, shape (n, 2).

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Pillow is not installed.
        ValueError: The file is damaged, or half of it is bright: then it is no image of dots.
    """
    pixels = read_image(path, "an image of dots")
    if pixels.ndim == 3:
        # An opaque alpha channel is bright everywhere.
        colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
        pixels = pixels[..., :colours].max(axis=2)
    bright = pixels >= THRESHOLD
    if bright.mean() > 0.5:
        raise ValueError(
            f"{path} is bright in {bright.mean():.0%} of its pixels; expected an image of dots on a dark ground."
        )
    if Path(path).suffix.lower() in LOSSY:
        bright &= _peaks(pixels)
    return np.argwhere(bright)


def _peaks(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels no neighbour outshines; of equal neighbours the first in reading order."""
    height, width = pixels.shape
    padded = np.pad(pixels.astype(np.int64), 1, constant_values=-1)
    peak = np.ones(pixels.shape, dtype=bool)
    for row in range(3):
        for column in range(3):
            if (row, column) == (1, 1):
                continue
            other = padded[row : row + height, column : column + width]
            earlier = (row, column) < (1, 1)
            peak &= pixels > other if earlier else pixels >= other
    return peak


def count_dots(path: PathLike) -> int:
    """Number of dots in an annotation image; see :func:`read_dots`."""
    return len(read_dots(path))


def crops_with_counts(
    image: NDArray[Any], dots: NDArray[np.int64], size: int, stride: int | None = None
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.int64]]:
    """Cut an image into square crops, and count the dots in each: a few images become many.

    A crop at (r, c) holds the pixels r ≤ row < r + size and c ≤ column < c + size, so that a dot on a border belongs to
    one tile only. With stride = size the crops are tiles; their counts add up to the number of dots where size divides
    the height and the width. Otherwise what is left at the lower and right border is in no crop.

    Crops of one image are not independent of each other: keep them on one side of a split. With stride < size they
    overlap, and share dots.

    Args:
        image: Pixels, shape (H, W) or (H, W, C).
        dots: Pixels of the dots as (row, column), shape (n, 2).
        size: Side of a crop, in pixels.
        stride: Distance of neighbouring crops, in pixels; by default size.

    Returns:
        Crops, a view of shape (K, size, size) or (K, size, size, C); their counts, float64, shape (K, 1); and the
        (row, column) of their upper left corners, shape (K, 2). Crops are in reading order.

    Raises:
        ValueError: image or dots has another shape, a dot is outside the image, size is larger than the image, or size
            or stride is not positive.

    Example:
        >>> import numpy as np
        >>> dots = np.array([[0, 0], [3, 4], [4, 4]])
        >>> crops, counts, corners = crops_with_counts(np.zeros((8, 8)), dots, size=4)
        >>> counts.ravel(), corners.tolist()
        (array([1., 1., 0., 1.]), [[0, 0], [0, 4], [4, 0], [4, 4]])
    """
    pixels, points = np.asarray(image), np.asarray(dots)
    stride = size if stride is None else stride
    if pixels.ndim not in (2, 3):
        raise ValueError(f"image has shape {pixels.shape}; expected (H, W) or (H, W, C).")
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"dots has shape {points.shape}; expected (n, 2), the row and column of each dot.")
    height, width = pixels.shape[:2]
    if size < 1 or stride < 1 or size > min(height, width):
        raise ValueError(f"size is {size} and stride {stride}, for {height} by {width} pixels; expected 1 or more, "
                         f"and a size that fits.")  # fmt: skip
    outside = (points < 0).any(axis=1) | (points >= [height, width]).any(axis=1)
    if outside.any():
        raise ValueError(
            f"dots has {points[outside][0].tolist()} in it; expected (row, column) inside {height} by {width} pixels."
        )
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (size, size), axis=(0, 1))[::stride, ::stride]
    if pixels.ndim == 3:
        windows = np.moveaxis(windows, 2, -1)
    grid = windows.shape[:2]
    corners = np.stack(np.meshgrid(*(np.arange(n) * stride for n in grid), indexing="ij"), axis=-1).reshape(-1, 2)
    # Sums over rectangles, from the number of dots above and to the left of each pixel.
    number = np.zeros((height + 1, width + 1), dtype=np.int64)
    np.add.at(number, (points[:, 0] + 1, points[:, 1] + 1), 1)
    number = number.cumsum(0).cumsum(1)
    top, left = corners[:, 0], corners[:, 1]
    bottom, right = top + size, left + size
    counts = number[bottom, right] - number[top, right] - number[bottom, left] + number[top, left]
    return windows.reshape(-1, *windows.shape[2:]), counts.astype(np.float64)[:, None], corners
