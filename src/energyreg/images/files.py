"""Images in files: read one by one, whatever their kind, and turned into features that are kept on the disk.

>>> files = ImageFiles(["a.jpg", "b.png"], [31.0, 58.0], size=112)  # doctest: +SKIP
>>> loader = image_loader(files, batch_size=64, shuffle=True, workers=2)  # doctest: +SKIP
>>> features = extract_features(ImageEncoder("timm:resnet18"), files, cache="features")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from energyreg.errors import DataError, MissingFileError
from energyreg.files import CheckpointError, digest, read_tensors, write_tensors, writing_error
from energyreg.progress import Progress
from energyreg.tables.targets import read_targets

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ImageFileError", "ImageFiles", "ImageLoader", "ImageMemoryError", "ImageWorkerError", "explain_memory",
    "extract_features", "image_loader", "image_paths", "read_rgb", "thumbnail",
]  # fmt: skip

LOGGER = logging.getLogger("energyreg")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""What counts as an image in a folder."""
RESIZES = ("squash", "crop")
ON_ERROR = ("raise", "skip")
DUPLICATES = ("raise", "allow")
BACKGROUND = (255, 255, 255)
"""Colour behind what is transparent: white, as on a page."""
DRAFT = 2
"""A large JPEG is decoded at a fraction of its size, but at least so many times the size that is wanted."""
THUMBNAIL_QUALITY = 80
"""JPEG quality of small copies: about 4 kB at 128 pixels."""
SHARD = 512
"""Images whose features are in one file of the cache: what a kill costs at most."""
CACHE_FORMAT = "energyreg-features"
CACHE_VERSION = 1
"""To be raised when the same file would give other features."""
SHOWN = 3
"""Broken files that a message names."""
SECONDS_TO_DIE = 1.0
"""How long to wait for the end of a worker whose pipe is broken."""

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ImageFileError(DataError):
    """A file that cannot be read as an image; the message names it and says why."""


class ImageWorkerError(RuntimeError):
    """A process that reads images has died; the message says which setting helps."""


class ImageMemoryError(MemoryError):
    """Memory has run out; the message says which settings to lower."""


# ---------------------------------------------------------------------------------------------- one file


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


# ---------------------------------------------------------------------------------------------- many files


def image_paths(files: Any, folder: str | os.PathLike[str] | None = None, name: str = "files") -> list[Path]:
    """Paths of images that exist.

    Args:
        files: Paths: a list, a NumPy array or a column of a frame; or a folder, for all images in it and below it, in
            the order of their names.
        folder: Where relative paths start; the working directory by default.
        name: What an error calls them.

    Raises:
        FileNotFoundError: If a file or folder is missing; the message names the first one and its row.
        ValueError: If there is nothing, or something that is no path.
    """
    base = Path() if folder is None else Path(folder)
    if isinstance(files, (str, os.PathLike)):
        return _images_below(base / files, name)
    if getattr(files, "ndim", 1) != 1 or hasattr(files, "columns"):
        raise ValueError(
            f"{name} is a {type(files).__name__} of {getattr(files, 'ndim', 2)} dimensions; expected a list of paths, "
            "or one column of them."
        )
    try:
        entries = files.tolist() if hasattr(files, "tolist") else list(files)
    except TypeError:
        raise ValueError(f"{name} is a {type(files).__name__}; expected a list of paths, or a folder.") from None
    if not entries:
        raise ValueError(f"{name} is empty; expected at least one image.")
    paths = []
    for row, entry in enumerate(entries):
        if not isinstance(entry, (str, os.PathLike)) or not os.fspath(entry):
            missing = entry is None or entry != entry or entry == "" or type(entry).__name__ in ("NAType", "NaTType")
            found = "no path" if missing else f"a {type(entry).__name__}: {entry!r}"
            text = "{name} has {found} in row {row}; expected paths of images. Drop the row, or fill it in."
            raise DataError(text, name=name, found=found, rows=[row])
        paths.append(base / entry)
    absent = [row for row, path in enumerate(paths) if not path.is_file()]
    if absent:
        first = paths[absent[0]]
        what = "is a folder" if first.is_dir() else "does not exist"
        more = f", and {len(absent) - 1} more of {len(paths)} files are missing" if len(absent) > 1 else ""
        hint = f" Paths start at {str(base)!r}: is folder right?" if folder is not None else ""
        text = "{name}: {path} (row {row}) {what}{others}.{hint}"
        raise MissingFileError(text, name=name, path=first, rows=absent[:1], what=what, others=more, hint=hint)
    return paths


def _images_below(folder: Path, name: str) -> list[Path]:
    if folder.is_file():
        raise ValueError(f"{name} is {str(folder)!r}, a single file; expected a list of paths, or a folder.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: the folder {str(folder)!r} does not exist.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        there = sum(1 for path in folder.rglob("*") if path.is_file())
        raise ValueError(
            f"{name}: the folder {str(folder)!r} has no images ({there} other files); expected files that end in "
            f"{', '.join(SUFFIXES)}."
        )
    return paths


class ImageFiles(Dataset[Any]):
    """Images in files, with or without targets, as a data set of PyTorch; nothing is read before it is asked for.

    Args:
        files: Paths, or a folder; see :func:`image_paths`.
        targets: Targets in user units, shape (N,) or (N, D), or None.
        size: Height and width of the images, in pixels.
        resize: "squash" or "crop"; see :func:`read_rgb`.
        transform: Called as ``transform(image, target)`` with the image, uint8 of shape (3, size, size), and its
            target, float64 of shape (D,) (of shape (0,) without targets); returns both anew. See
            :mod:`energyreg.images.augment`.
        on_error: What :func:`image_loader` and :func:`extract_features` do with a file that cannot be read: "raise",
            or "skip" it, count it in `failed`, and warn at the end.
        duplicates: Whether two rows may name one file: "raise" or "allow". Where they may not, it is mostly as the
            file was labelled twice, or stands in the training data and in the test data.
        folder: Where relative paths start.

    Attributes:
        paths: The paths, N of them.
        targets: The targets as float64, shape (N, D), or None.
        failed: Why files could not be read, by their path, as far as they were tried by a loader.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If there is no image, two rows name one file, or the targets are missing, no numbers, not finite or
            not as many.
    """

    def __init__(
        self,
        files: Any,
        targets: Any = None,
        *,
        size: int = 224,
        resize: str = "squash",
        transform: Transform | None = None,
        on_error: str = "raise",
        duplicates: str = "raise",
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size is {size!r}; expected a whole number of pixels, at least 1.")
        for name, value, known in (
            ("resize", resize, RESIZES), ("on_error", on_error, ON_ERROR), ("duplicates", duplicates, DUPLICATES),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}.")
        if transform is not None and not callable(transform):
            raise ValueError(f"transform is a {type(transform).__name__}; expected a callable (image, target).")
        self.paths = image_paths(files, folder)
        if duplicates == "raise":
            _refuse_duplicates(self.paths)
        self.targets = None
        if targets is not None:
            self.targets = torch.from_numpy(read_targets(targets, "targets", len(self.paths), "files"))
        self.size, self.resize, self.transform, self.on_error = int(size), resize, transform, on_error
        self.failed: dict[str, str] = {}
        self._told = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """The image, uint8 of shape (3, size, size), and its target, shape (D,), where there are targets.

        Raises:
            ImageFileError: If the file cannot be read.
        """
        image = read_rgb(self.paths[index], self.size, self.resize)
        target = torch.empty(0, dtype=torch.float64) if self.targets is None else self.targets[index].clone()
        if self.transform is not None:
            image, target = self.transform(image, target)
        return image if self.targets is None else (image, target)

    def take(self, rows: Any, *, transform: Transform | None = None, targets: Any = None) -> ImageFiles:
        """Some of the files, by the numbers of their rows.

        Args:
            rows: Row numbers, n of them.
            transform: Of the result; None for none.
            targets: Its targets, shape (n,) or (n, D); those of the rows by default.
        """
        rows = [int(row) for row in rows]
        if targets is None and self.targets is not None:
            targets = self.targets[rows]
        return ImageFiles(
            [self.paths[row] for row in rows], targets, size=self.size, resize=self.resize, transform=transform,
            on_error=self.on_error, duplicates="allow",
        )  # fmt: skip

    def tell(self) -> None:
        """Warn of the files that could not be read, where there are more than at the last time."""
        if len(self.failed) == self._told:
            return
        names, self._told = list(self.failed), len(self.failed)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        warnings.warn(
            f"{len(names)} of {len(self)} images could not be read and were left out: {', '.join(names[:SHOWN])}"
            f"{more}. The first: {self.failed[names[0]]}",
            stacklevel=3,
        )


def _refuse_duplicates(paths: Sequence[Path]) -> None:
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        earlier = first.setdefault(os.path.realpath(path), row)
        if earlier != row:
            raise DataError(
                "{name} has {path} in row {rows[0]} and in row {rows[1]}; expected each file once. Drop one of the "
                "rows{advice}.",
                name="files", path=path, rows=[earlier, row], advice=', or pass duplicates="allow"',
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------- loading


class _Guarded(Dataset[Any]):
    """The files, with an error in place of an image: raised in a worker, it would reach the user as a traceback."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Any, ImageFileError | None]:
        try:
            return index, self.files[index], None
        except ImageFileError as error:
            return index, None, error

    def join(
        self, rows: Sequence[tuple[int, Any, ImageFileError | None]]
    ) -> tuple[list[int], Any, list[tuple[int, ImageFileError]]]:
        """Numbers of the rows that could be read, a batch of them, and the rows that could not, with the errors."""
        broken = [(index, error) for index, _, error in rows if error is not None]
        read = [(index, item) for index, item, error in rows if error is None]
        numbers = [index for index, _ in read]
        if not read:
            return numbers, None, broken
        labelled = self.files.targets is not None
        images = [item[0] if labelled else item for _, item in read]
        for index, image in zip(numbers, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{self.files.paths[index]} has shape {tuple(image.shape)} after the transform, but "
                    f"{self.files.paths[numbers[0]]} has {tuple(images[0].shape)}; expected the same for all images of "
                    "a batch."
                )
        x = torch.stack(images)
        return numbers, (x, torch.stack([item[1] for _, item in read])) if labelled else x, broken


class ImageLoader(DataLoader[Any]):
    """What :func:`image_loader` makes: yields images, uint8 (B, 3, H, W), with their targets, (B, D), if there are any.

    A batch of skipped files alone is left out.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for _, batch in self.numbered():
            yield batch

    def numbered(self) -> Iterator[tuple[list[int], Any]]:
        """Row numbers of each batch, and the batch.

        Raises:
            ImageFileError: If a file cannot be read, and its data set says so.
            ImageWorkerError: If a worker dies.
        """
        guarded: _Guarded = self.dataset  # type: ignore[assignment]
        files, count = guarded.files, 0
        iterator = super().__iter__()
        while True:
            try:
                numbers, batch, broken = next(iterator)
            except StopIteration:
                break
            except (RuntimeError, OSError, EOFError) as error:
                sign = self._sign_of_death(iterator, error)
                if sign is None:
                    raise
                raise ImageWorkerError(
                    f"A process that reads images died ({sign}), mostly as memory ran out. Lower workers (now "
                    f"{self.num_workers}; 0 reads in this process) or batch_size (now {self.batch_size})."
                ) from error
            for index, unread in broken:
                if files.on_error == "raise":
                    raise unread
                files.failed[str(files.paths[index])] = str(unread)
            count += 1
            if count == len(self):  # who counts batches never asks for one more
                files.tell()
            if numbers:
                yield numbers, batch

    def _sign_of_death(self, iterator: Any, error: Exception) -> str | None:
        """What tells that a worker has died; None if none has. The others are ended then.

        PyTorch says so by an error, but only once its signal has come: until then a broken pipe is all there is. And it
        says so again and again, wherever the program is, as long as it knows of the worker.
        """
        workers = getattr(iterator, "_workers", [])
        if not workers or "Original Traceback" in str(error):  # an error inside a worker, which lives
            return None
        sign = str(error) if "DataLoader worker" in str(error) else None
        if sign is None:
            try:
                for worker in workers:
                    worker.join(SECONDS_TO_DIE)
                dead = [worker for worker in workers if worker.exitcode]
                sign = f"process {dead[0].pid} ended with code {dead[0].exitcode}" if dead else None
            except RuntimeError as second:
                sign = str(second)
        if sign is not None:
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()
            with contextlib.suppress(RuntimeError, ValueError):  # forgotten already
                torch._C._remove_worker_pids(id(iterator))
            self._iterator = None
        return None if sign is None else sign.strip().splitlines()[0].rstrip(". ")


def image_loader(
    files: ImageFiles, batch_size: int = 64, *, shuffle: bool = False, workers: int = 0, drop_last: bool = False
) -> ImageLoader:
    """A DataLoader of images, for :func:`energyreg.fit`.

    Args:
        files: The files.
        batch_size: Images of a batch.
        shuffle: Whether their order is drawn anew in each pass.
        workers: Processes that read images besides this one; 0 for none.
        drop_last: Whether images that do not fill the last batch are left out.

    Raises:
        ValueError: If an argument cannot be used.
    """
    if not isinstance(files, ImageFiles):
        raise ValueError(f"files is a {type(files).__name__}; expected ImageFiles(paths, targets, size=...).")
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}.")
    guarded = _Guarded(files)
    return ImageLoader(
        guarded, batch_size=int(batch_size), shuffle=shuffle, num_workers=int(workers), drop_last=drop_last,
        collate_fn=guarded.join, persistent_workers=workers > 0,
    )  # fmt: skip


@contextlib.contextmanager
def explain_memory(**settings: Any) -> Iterator[None]:
    """Says which settings to lower where memory runs out, with their values.

    Raises:
        ImageMemoryError: If memory runs out inside, on the CPU or on a GPU.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        signs = ("out of memory", "can't allocate memory", "not enough memory")
        known = isinstance(error, MemoryError) or any(sign in text for sign in signs)
        if not known or isinstance(error, ImageMemoryError):
            raise
        knobs = " or ".join(f"{name} (now {value})" for name, value in settings.items())
        first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
        raise ImageMemoryError(f"Out of memory: {first.rstrip('.')}. Lower {knobs}.") from error


# ---------------------------------------------------------------------------------------------- features


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
    anew.

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
                LOGGER.warning("A file of the cache is damaged, and its features are computed anew: %s", error)
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
