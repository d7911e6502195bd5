"""Features of image files by a network, with a cache on the disk.

>>> features = extract_features(ImageEncoder("timm:resnet18"), files, cache="features")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from energyreg.files import CheckpointError, digest, read_tensors, write_tensors, writing_error
from energyreg.images.files import ImageFiles, ImageLoader, explain_memory, image_loader
from energyreg.progress import Progress

__all__ = ["extract_features", "file_key"]

LOGGER = logging.getLogger("energyreg")

SHARD = 512
"""Images whose features are in one file of the cache: what a kill costs at most."""


CACHE_FORMAT = "energyreg-features"


CACHE_VERSION = 1
"""To be raised when the same file would give other features."""


def extract_features(
    encoder: nn.Module,
    files: ImageFiles,
    batch_size: int = 64,
    *,
    workers: int = 0,
    device: str | torch.device | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """Features of images by a network as it is, in evaluation mode.

    With a cache an image is read once, whatever its place among the files: its features are found again by the
    network's weights and settings, the file's path, size and time of change, and the size of the image. They are
    written every 512 images, so that a later call goes on where one was killed. A damaged file of the cache is computed
    again.

    Args:
        encoder: Maps images, uint8 (B, 3, H, W), to features (B, C), such as an
            :class:`~energyreg.networks.image_encoders.ImageEncoder`; C is its `num_features`.
        files: The images.
        batch_size: Images that go through the network at once.
        workers: Processes that read images; 0 for none.
        device: Where the network runs; where it is by default. It is moved back afterwards.
        cache: Folder of the cache, made where it is missing; None for none.
        progress: True for a bar, or a line of text now and then where there is no terminal; None for a bar on a
            terminal only; False for silence.

    Returns:
        Features, float32, shape (N, C); NaN for images that were skipped.

    Raises:
        ImageFileError: If a file cannot be read, and `files` does not skip it.
        ImageWorkerError: If a worker dies.
        ImageMemoryError: If memory runs out.
        ValueError: If an argument cannot be used, or a feature is not finite.
        OSError: If the cache cannot be written.
    """
    count = getattr(encoder, "num_features", None)
    if not isinstance(encoder, nn.Module) or not isinstance(count, int):
        raise ValueError(
            f"encoder is a {type(encoder).__name__} without num_features; expected a module that maps images to "
            "features, such as an ImageEncoder."
        )
    if not isinstance(files, ImageFiles):
        raise ValueError(f"files is a {type(files).__name__}; expected ImageFiles(paths, size=...).")
    if cache is not None and files.transform is not None:
        raise ValueError("files has a transform, whose results a cache cannot tell apart; pass cache=None.")
    image_loader(files, batch_size, workers=workers)  # wrong arguments should fail before the cache is read
    features = np.full((len(files), count), np.nan, np.float32)
    keys = [file_key(path) for path in files.paths]
    rows: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    store = None if cache is None else _Cache(Path(cache), encoder, files)
    if store is not None:
        store.read(rows, features)
    todo = [places[0] for places in rows.values()] if store is None else store.missing(rows)
    if not todo:
        return features
    shown = Progress("Features", "images", len(rows), progress, done=len(rows) - len(todo))
    shown.start()
    loader = image_loader(files.take(todo, transform=files.transform), batch_size, workers=workers)
    try:
        for numbers, vectors in _run(encoder, loader, device, batch_size, files.size):
            for number, vector in zip(numbers, vectors, strict=True):
                if not np.isfinite(vector).all():
                    raise ValueError(
                        f"{files.paths[todo[number]]}: the network's features are not finite; check its weights."
                    )
                features[rows[keys[todo[number]]]] = vector
                if store is not None:
                    store.add(keys[todo[number]], vector)
            shown(len(numbers))
    finally:
        shown.stop()
        files.failed |= loader.dataset.files.failed  # type: ignore[attr-defined]
        if store is not None:
            store.flush()
    return features


@torch.inference_mode()
def _run(
    encoder: nn.Module, loader: ImageLoader, device: str | torch.device | None, batch_size: int, size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Row numbers and features of each batch."""
    home = next((tensor.device for tensor in encoder.state_dict().values()), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    modes = {module: module.training for module in encoder.modules()}
    encoder.to(place).eval()
    try:
        with explain_memory(batch_size=batch_size, image_size=size):
            for numbers, batch in loader.numbered():
                images = batch[0] if isinstance(batch, tuple) else batch
                yield numbers, encoder(images.to(place)).float().cpu().numpy()
    finally:
        encoder.to(home)
        for module, mode in modes.items():
            module.training = mode


def file_key(path: Path) -> bytes:
    """16 bytes that change with the path, the size or the time of change of a file."""
    status = path.stat()
    text = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16]


def _network_key(encoder: nn.Module, files: ImageFiles) -> str:
    """What determines the features of a file: weights and structure of the network, and how the image is read."""
    tensors = {**encoder.state_dict(), **dict(encoder.named_buffers())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    settings = {
        "network": repr(encoder), "size": str(files.size), "resize": files.resize, "version": str(CACHE_VERSION),
    }  # fmt: skip
    return digest(tensors, settings)[:32]


class _Cache:
    """Features on the disk: files of a few hundred rows, each with a checksum, in a folder for each network."""

    def __init__(self, folder: Path, encoder: nn.Module, files: ImageFiles) -> None:
        self.folder = folder / _network_key(encoder, files)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing_error(self.folder, error, 0) from error
        self.count = int(encoder.num_features)  # type: ignore[arg-type]
        self.found: set[bytes] = set()
        self.keys: list[bytes] = []
        self.vectors: list[np.ndarray] = []

    def read(self, rows: dict[bytes, list[int]], features: np.ndarray) -> None:
        """Fill in the features that are known."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                tensors, _ = read_tensors(path, CACHE_FORMAT)
                keys, vectors = tensors["keys"], tensors["features"]
                if keys.shape != (len(vectors), 16) or vectors.shape[1:] != (self.count,):
                    raise CheckpointError(f"{path} has tensors of other shapes")
            except (CheckpointError, KeyError, OSError) as error:
                LOGGER.warning("A file of the cache is damaged, and its features are computed again: %s", error)
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            for key, vector in zip(keys.numpy(), vectors.numpy(), strict=True):
                if (places := rows.get(key.tobytes())) is not None:
                    features[places] = vector
                    self.found.add(key.tobytes())

    def missing(self, rows: dict[bytes, list[int]]) -> list[int]:
        """One row of each file that is not in the cache."""
        return [places[0] for key, places in rows.items() if key not in self.found]

    def add(self, key: bytes, vector: np.ndarray) -> None:
        """Keep the features of a file, and write those of many."""
        self.keys.append(key)
        self.vectors.append(vector)
        if len(self.keys) >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what was kept."""
        if not self.keys:
            return
        keys = np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, 16).copy()
        tensors = {"keys": torch.from_numpy(keys), "features": torch.from_numpy(np.stack(self.vectors))}
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:32]
        write_tensors(self.folder / f"{name}.safetensors", tensors, CACHE_FORMAT, {})
        self.keys, self.vectors = [], []
