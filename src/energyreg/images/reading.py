"""One image file of any kind to RGB pixels, or to a small copy."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from energyreg.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFileError", "decode", "read_rgb", "thumbnail"]

SKIP = ', or pass on_error="skip"'
BACKGROUND = (255, 255, 255)
"""Colour behind what is transparent: white, as on a page."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Formats that are read, by Pillow's names. Of others, some start programmes (EPS) or have had many faults."""
MOST_PIXELS = 2**26
"""Pixels of an image, at most, such as 8,192 × 8,192: decoded and as RGB they take half a gigabyte."""
MOST_PIXELS_IN_PART = 2**28
"""The same of a JPEG that is decoded at a fraction of its size."""
STRIP = 2**20
"""Pixels that are converted to RGB at once."""
BLACK = 4095
"""A 16-bit or 32-bit image whose values end here or below has fewer bits than it says: 12 or 8."""
DRAFT = 2
"""A large JPEG is decoded at a fraction of its size, but at least so many times the size that is wanted."""
THUMBNAIL_QUALITY = 80
"""JPEG quality of small copies: about 4 kB at 128 pixels."""


class ImageFileError(DataError):
    """A file that cannot be read as an image; the message names it and says why."""


def read_rgb(path: str | os.PathLike[str], size: int, resize: str = "squash") -> Tensor:
    """Read an image of any kind as RGB.

    JPEG, PNG, BMP, GIF, TIFF, WebP and PPM, of up to 2²⁶ pixels (a JPEG that need not be decoded whole: 2²⁸). Grey,
    palette, CMYK and 16-bit images (0 to 65,535) are converted, what is transparent lies on white, an image that its
    EXIF data say was taken with the camera turned is turned back, and of an animation the first picture counts.

    Args:
        path: The file.
        size: Height and width of the result, in pixels.
        resize: "squash" for the whole image, whatever its proportions; "crop" for the largest square in its middle.

    Returns:
        Shape (3, size, size), uint8.

    Raises:
        ImageFileError: If the file is no such image, is damaged or too large, or its values have no known range: up to
            4,095, say, where 65,535 is white.
        ImportError: If Pillow is not installed.
    """
    picture = decode(path, size, SKIP)
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
    picture = decode(path, size, SKIP)
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return buffer.getvalue()


def decode(path: str | os.PathLike[str], size: int | None = None, advice: str = "") -> Image:
    """The image in a file as RGB, turned as its EXIF data say, on white where it is transparent.

    Args:
        path: The file.
        size: Height and width that are wanted, in pixels: a large JPEG is decoded at a fraction of its size, not below
            `DRAFT` times that. None for the whole image.
        advice: What an error says the caller can do, besides to replace or remove the file.

    Raises:
        ImageFileError: If the file is no image of `FORMATS`, is damaged or too large, or has values without a known
            range.
        ImportError: If Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("Reading images needs Pillow, which is not installed: pip install 'energyreg[vision]'") from (
            error
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody here looks at
            with Image.open(path, formats=FORMATS) as image:
                _check_pixels(image, image.format == "JPEG" and not image.info.get("progressive"))
                if size is not None:
                    image.draft("RGB", (DRAFT * size, DRAFT * size))
                _check_pixels(image)
                return _as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOMEM):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            reason = f"cannot identify it as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        text = "{path} cannot be read as an image: {reason}. Replace or remove it{advice}."
        raise ImageFileError(text, path=os.fspath(path), reason=reason, advice=advice) from error


def _check_pixels(image: Image, in_part: bool = False) -> None:
    """Refuse an image that takes too much memory, before it is decoded; more may be decoded in part."""
    width, height = image.size
    most = MOST_PIXELS_IN_PART if in_part else MOST_PIXELS
    if width * height > most:
        raise ValueError(f"it has {width:,} x {height:,} pixels, where at most {most:,} are read; make it smaller")


def _as_rgb(image: Image) -> Image:
    """An open image as RGB; converted in strips, as a large one fits into memory once but not several times."""
    from PIL import Image as pil
    from PIL import ImageOps

    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data say nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    width, height = image.size
    step = max(STRIP // width, 1)
    boxes = [(0, start, width, min(start + step, height)) for start in range(0, height, step)]
    top = 1.0 if image.mode == "F" else 65_535.0
    raw = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if raw:
        _check_range((np.asarray(image.crop(box)) for box in boxes), top)
    result = pil.new("RGB", image.size)
    for box in boxes:
        part = image.crop(box)
        if raw:
            part = pil.fromarray(np.rint(np.asarray(part).astype(np.float64) * (255 / top)).astype(np.uint8))
        if part.has_transparency_data:
            part = part.convert("RGBA")
            part = pil.alpha_composite(pil.new("RGBA", part.size, (*BACKGROUND, 255)), part)
        result.paste(part.convert("RGB"), box)
    return result


def _check_range(strips: Iterable[np.ndarray], top: float) -> None:
    """Refuse values without a known range, and those that would be black though they are none.

    Raises:
        ValueError: If there are such.
    """
    ends = np.array([(strip.min(), strip.max()) for strip in strips], np.float64)
    low, high = ends[:, 0].min(), ends[:, 1].max()  # NaN where there is one
    if not (low >= 0 and high <= top):
        raise ValueError(f"it has values from {low:.6g} to {high:.6g}, where from 0 to {top:.6g} was expected")
    if top > 1 and 0 < high <= BLACK:
        raise ValueError(
            f"its values end at {high:.0f}, where {top:.0f} is white, so that it would be nearly black; write them "
            "with 8 bits, or multiply them so that they reach up to 65535"
        )
