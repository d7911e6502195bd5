"""Files of data sets, read so that whatever is wrong with one is said in a line that names it.

All of these raise FileNotFoundError where there is no such file or folder, IsADirectoryError or NotADirectoryError
where it is the other of the two, ImportError where the library that reads such files is not installed, and ValueError
where the content is damaged, is of another shape, or lacks something that was asked for.
"""

from __future__ import annotations

import csv
import math
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "existing_file",
    "existing_folder",
    "images_of",
    "natural_key",
    "numbers",
    "pictures",
    "read_csv",
    "read_h5",
    "read_h5_images",
    "read_image",
    "read_mat",
    "read_npz",
    "read_text",
]

PathLike = str | os.PathLike[str]


def existing_folder(path: PathLike, what: str) -> Path:
    """The folder as a path; `what` says what it should hold."""
    path = Path(path)
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; expected {what}.")
    return _existing(path, what)


def existing_file(path: PathLike, what: str) -> Path:
    """The file as a path; `what` says what it should be."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected {what}.")
    return _existing(path, what)


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {what}.")
    return path


def images_of(folder: Path) -> Path:
    """Where the images of a folder with labels are: in `images/`, or beside the labels."""
    return folder / "images" if (folder / "images").is_dir() else folder


def pictures(folder: Path, suffixes: Collection[str] = (".jpg",)) -> list[Path]:
    """The files of a folder that end thus, in any case, in natural order."""
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in suffixes), key=natural_key)


def natural_key(path: PathLike) -> list[tuple[int, int, str]]:
    """Sorting key under which `2.jpg` comes before `10.jpg`."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", Path(path).name)]


def read_text(path: PathLike, what: str) -> str:
    """The file as text in UTF-8."""
    path = existing_file(path, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); expected {what}.") from error


def read_csv(path: PathLike, columns: Iterable[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV whose header must hold `columns`; further columns are kept."""
    reader = csv.DictReader(read_text(path, what).splitlines(), restkey="", restval="\0")
    header = list(reader.fieldnames or [])
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} has the columns {header[:8]}; expected {what}, with {', '.join(missing)} too.")
    rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if "" in row or "\0" in row.values():
            raise ValueError(f"{path}, row {number}: has more or fewer than {len(header)} fields, as the header has.")
    if not rows:
        raise ValueError(f"{path} has a header, but no rows; expected {what}.")
    return rows


def numbers(values: Sequence[str], path: PathLike, column: str) -> NDArray[np.float64]:
    """Text as finite numbers, shape (N,); an error names the file, the column and the row."""
    found = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        found[row] = number
        if not math.isfinite(number):
            raise ValueError(f"{path}, row {row + 1}: {column} is {value!r}; expected a finite number.")
    return found


@contextmanager
def _reading(path: Path, what: str, *damage: type[Exception]) -> Iterator[None]:
    """Name the file in an error of reading it: a ValueError, an OSError, or one of `damage`."""
    errors: tuple[type[Exception], ...] = (ValueError, OSError, *damage)
    try:
        yield
    except errors as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}.") from error


def _require(keys: Sequence[str], found: Iterable[str], says: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{says} {', '.join(missing)}")


def read_npz(path: PathLike, keys: Sequence[str], what: str) -> list[NDArray[Any]]:
    """Arrays of an npz file, never pickled objects."""
    path = existing_file(path, what)
    with (
        _reading(path, what, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error),
        path.open("rb") as file,  # NumPy leaves a file open that it cannot read, if it has opened it itself
        np.load(file, allow_pickle=False) as archive,
    ):
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array; expected an archive of several")
        _require(keys, archive.files, f"holds {archive.files}, but not")
        return [archive[key] for key in keys]


def read_h5(path: PathLike, keys: Sequence[str], what: str, optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Data sets of an HDF5 file, whole; of `optional` only those that it holds."""
    path = existing_file(path, what)
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is HDF5, which h5py reads: pip install h5py") from error
    with _reading(path, what, KeyError, RuntimeError), h5py.File(path, "r") as file:
        _require(keys, file, f"holds {sorted(file)}, but not")
        return {key: np.asarray(file[key][()]) for key in [*keys, *(key for key in optional if key in file)]}


def read_h5_images(
    path: PathLike, what: str, keys: tuple[str, str] = ("images", "labels"), channels: int = 3
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Images, uint8 of shape (N, channels, H, W), and labels, shape (N,), of CcGAN's HDF5 files.

    Args:
        path: The file.
        what: What it should be.
        keys: Names of the images and of the labels in the file; the last word of a name is that of the messages.
        channels: Number of channels; where it is 1, the file may leave that dimension out.
    """
    data = read_h5(path, keys, what)
    images, labels = data[keys[0]], data[keys[1]].astype(np.float64).reshape(-1)
    if channels == 1 and images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] != channels or images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(
            f"{path} has images of shape {images.shape}, {images.dtype}, and {len(labels)} labels; expected {what}: "
            f"uint8 of shape (N, {channels}, H, W), and N labels."
        )
    return images, labels


def read_mat(path: PathLike, keys: Sequence[str], what: str) -> list[NDArray[np.float64]]:
    """Arrays of a MATLAB file (before version 7.3), as float64."""
    path = existing_file(path, what)
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ImportError(f"{path} is a MATLAB file, which SciPy reads: pip install scipy") from error
    # A damaged file ends in whatever the parser meets first.
    with _reading(path, what, MatReadError, TypeError, EOFError, IndexError, NotImplementedError, zlib.error):
        found = loadmat(path, variable_names=list(keys))
        _require(keys, found, "has no variable")
        return [np.asarray(found[key], dtype=np.float64) for key in keys]


def read_image(path: PathLike, what: str) -> NDArray[np.uint8]:
    """An image as bytes: shape (H, W) or (H, W, C), a bilevel image as 0 and 255."""
    path = existing_file(path, what)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{path} is an image, which Pillow reads: pip install 'energyreg[vision]'") from error
    # Pillow raises SyntaxError for a broken PNG.
    with _reading(path, what, SyntaxError, EOFError), Image.open(path) as image:
        mode = {"1": "L", "P": "RGB", "PA": "RGB"}.get(image.mode, image.mode)
        pixels = np.asarray(image.convert(mode))
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path} has pixels of type {pixels.dtype}; expected {what}, with 8 bits a channel.")
    return pixels
