"""Images as data: reading, files, cached features, augmentation. No model."""

from energyreg.images.files import (
    ImageFileError,
    ImageFiles,
    ImageLoader,
    ImageMemoryError,
    ImageWorkerError,
    explain_memory,
    extract_features,
    image_loader,
    image_paths,
    read_rgb,
    thumbnail,
)

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
