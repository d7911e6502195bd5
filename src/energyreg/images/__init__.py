"""Images as data: reading, files, cached features, augmentation. No model."""

from energyreg.images.features import extract_features
from energyreg.images.files import (
    ImageFiles,
    ImageLoader,
    ImageMemoryError,
    ImageWorkerError,
    explain_memory,
    image_loader,
    image_paths,
)
from energyreg.images.reading import ImageFileError, read_rgb, thumbnail

__all__ = [
    "ImageFileError",
    "ImageFiles",
    "ImageLoader",
    "ImageMemoryError",
    "ImageWorkerError",
    "explain_memory",
    "extract_features",
    "image_loader",
    "image_paths",
    "read_rgb",
    "thumbnail",
]
