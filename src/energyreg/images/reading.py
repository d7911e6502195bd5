"""One image file of any kind to RGB pixels, or to a small copy."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from energyreg.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFileError", "as_rgb", "read_rgb", "thumbnail"]

BACKGROUND = (255, 255, 255)
"""Colour behind what is transparent: white, as on a page."""


DRAFT = 2
"""A large JPEG is decoded at a fraction of its size, but at least so many times the size that is wanted."""


THUMBNAIL_QUALITY = 80
"""JPEG quality of small copies: about 4 kB at 128 pixels."""


class ImageFileError(DataError):
    """A file that cannot be read as an image; the message names it and says why."""


def read_rgb(path: str | os.PathLike[str], size: int, resize: str = "squash") -> Tensor:
    """Read an image of any kind as RGB.

    Grey, palette, CMYK and 16-bit images (0 to 65,535) are converted, what is transparent lies on white, an image that
    its EXIF data say was taken with the camera turned is turned back, and of an animation the first picture counts.

    Args:
        path: The file.
        size: Height and width of the result, in pixels.
        resize: "squash" for the whole image, whatever its proportions; "crop" for the largest square in its middle.

    Returns:
        Shape (3, size, size), uint8.

    Raises:
        ImageFileError: If the file is no image, is damaged, or has values without a known range.
        ImportError: If Pillow is not installed.
    """
    picture = _decode(path, size)
    width, height = picture.size
    box = (0.0, 0.0, float(width), float(height))
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    from PIL.Image import Resampling

    # A filter that widens as the image shrinks, so that fine patterns do not turn into coarse ones.
    pixels = np.array(picture.resize((size, size), Resampling.BICUBIC, box=box))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def thumbnail(path: str | os.PathLike[str], size: int = 128) -> bytes:
    """A small copy of an image with its proportions.

    Args:
        path: The file, of any kind that :func:`read_rgb` reads.
        size: Width or height of the copy in pixels, whichever is larger; a smaller image keeps its size.

    Returns:
        A JPEG file.

    Raises:
        ImageFileError: As :func:`read_rgb`.
        ImportError: If Pillow is not installed.
    """
    picture = _decode(path, size)
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return buffer.getvalue()


def _decode(path: str | os.PathLike[str], size: int) -> Image:
    """An image as RGB; a large JPEG at a fraction of its size, not below `DRAFT` times the size that is wanted."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Reading images needs Pillow, which is not installed: pip install 'energyreg[vision]'") from (
            error
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody here looks at
            with Image.open(path) as image:
                image.draft("RGB", (DRAFT * size, DRAFT * size))
                return as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOMEM):
            raise
        reason = str(error).strip().splitlines()
        raise ImageFileError(
            "{path} cannot be read as an image: {reason}. Replace or remove it{advice}.",
            path=os.fspath(path), reason=reason[0].rstrip(".") if reason else repr(error),
            advice=', or pass on_error="skip"',
        ) from error  # fmt: skip


def as_rgb(image: Image) -> Image:
    """An open image of Pillow as RGB, turned as its EXIF data say, on white where it is transparent.

    Raises:
        ValueError: If it has values without a known range.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data say nothing of the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        top = 1.0 if image.mode == "F" else 65_535.0
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
            raise ValueError(
                f"it has values from {values.min():.6g} to {values.max():.6g}, where from 0 to {top:.6g} was expected"
            )
        image = pil.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = pil.new("RGBA", image.size, (*BACKGROUND, 255))
        image = pil.alpha_composite(ground, image)
    return image.convert("RGB")
