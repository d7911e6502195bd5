"""Image files as a data set, and a loader of their batches.

>>> files = ImageFiles(["a.jpg", "b.png"], [31.0, 58.0], size=112)  # doctest: +SKIP
>>> loader = image_loader(files, batch_size=64, shuffle=True, workers=2)  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from energyreg.checks import check_count
from energyreg.errors import DataError, MissingFileError
from energyreg.images.reading import ImageFileError, read_rgb
from energyreg.tables.targets import read_targets

__all__ = [
    "ImageFiles", "ImageLoader", "ImageMemoryError", "ImageWorkerError", "explain_memory", "image_loader",
    "image_paths",
]  # fmt: skip

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""What counts as an image in a folder."""
RESIZES = ("squash", "crop")
ON_ERROR = ("raise", "skip")
DUPLICATES = ("raise", "allow")
SHOWN = 3
"""Broken files that a message names."""
SECONDS_TO_DIE = 1.0
"""How long to wait for the end of a worker whose pipe is broken."""

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ImageWorkerError(RuntimeError):
    """A process that reads images has died; the message says which setting helps."""


class ImageMemoryError(MemoryError):
    """Memory has run out; the message says which settings to lower."""


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
        first: Path | str = paths[absent[0]]
        what = "is a folder" if paths[absent[0]].is_dir() else "does not exist"
        entry = os.fspath(entries[absent[0]])
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", entry):
            first, what = entry, "is an address, not a file; download the images, and pass their paths"
        elif entry != entry.strip() and (base / entry.strip()).is_file():
            what = f"does not exist, but {entry.strip()!r} does: take the spaces around paths away"
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
            target, float64 of shape (D,) (of shape (0,) without targets); returns both as new values. See
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
        check_count("size", size)
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
        self._warned = 0

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

    def warn_failed(self) -> None:
        """Warn of the files that could not be read, where there are more than at the last time."""
        if len(self.failed) == self._warned:
            return
        names, self._warned = list(self.failed), len(self.failed)
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
                files.warn_failed()
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
        shuffle: Whether they are shuffled again in each pass.
        workers: Processes that read images besides this one; 0 for none.
        drop_last: Whether images that do not fill the last batch are left out.

    Raises:
        ValueError: If an argument cannot be used.
    """
    if not isinstance(files, ImageFiles):
        raise ValueError(f"files is a {type(files).__name__}; expected ImageFiles(paths, targets, size=...).")
    check_count("batch_size", batch_size)
    check_count("workers", workers, 0)
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
