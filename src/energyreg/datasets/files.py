"""Files of data sets, read so that whatever is wrong with one is said in a line that names it."""

from __future__ import annotations

import csv
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "existing_file",
    "existing_folder",
    "natural_key",
    "numbers",
    "read_csv",
    "read_h5",
    "read_image",
    "read_mat",
    "read_npz",
    "read_text",
]

PathLike = str | os.PathLike[str]


def existing_folder(path: PathLike, what: str) -> Path:
    """The folder as a path; `what` says what it should hold.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: It is a file.
    """
    path = Path(path)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected {what}.")
    raise FileNotFoundError(f"{path} does not exist; expected {what}.")


def existing_file(path: PathLike, what: str) -> Path:
    """The file as a path; `what` says what it should be.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected {what}.")
    raise FileNotFoundError(f"{path} does not exist; expected {what}.")


def natural_key(path: PathLike) -> list[tuple[int, int, str]]:
    """Sorting key under which `2.jpg` comes before `10.jpg`."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", Path(path).name)]


def read_text(path: PathLike, what: str) -> str:
    """The file as text in UTF-8.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not text.
    """
    path = existing_file(path, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); expected {what}.") from error


def read_csv(path: PathLike, columns: Iterable[str], what: str) -> list[dict[str, str]]:
    """The rows of a CSV whose header must hold `columns`; further columns are kept.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, a row is shorter or longer than the header, or there are no rows.
    """
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
    """Text as finite numbers, shape (N,); an error names the file, the column and the row.

    Raises:
        ValueError: A value is no number, or is not finite.
    """
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


def read_npz(path: PathLike, keys: Sequence[str], what: str) -> list[NDArray[Any]]:
    """Arrays of an npz file, never pickled objects.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, lacks a key, or holds pickled objects.
    """
    path = existing_file(path, what)
    try:
        # NumPy leaves a file open that it cannot read, if it has opened it itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array; expected an archive of several")
            missing = [key for key in keys if key not in archive.files]
            if missing:
                raise ValueError(f"holds {archive.files}, but not {', '.join(missing)}")
            return [archive[key] for key in keys]
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}.") from error


def read_h5(path: PathLike, keys: Sequence[str], what: str, optional: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Data sets of an HDF5 file, whole; of `optional` only those that it holds.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: h5py is not installed.
        ValueError: The file is damaged or lacks a key.
    """
    path = existing_file(path, what)
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is HDF5, which h5py reads: pip install h5py") from error
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in keys if key not in file]
            if missing:
                raise ValueError(f"holds {sorted(file)}, but not {', '.join(missing)}")
            return {key: np.asarray(file[key][()]) for key in [*keys, *(key for key in optional if key in file)]}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}.") from error


def read_h5_images(path: PathLike, what: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The `images`, uint8 of shape (N, 3, H, W), and `labels`, shape (N,), of CcGAN's HDF5 files.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: h5py is not installed.
        ValueError: The file is damaged, lacks one of them, or has other shapes.
    """
    data = read_h5(path, ["images", "labels"], what)
    images, labels = data["images"], data["labels"].astype(np.float64).reshape(-1)
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(
            f"{path} has images of shape {images.shape}, {images.dtype}, and {len(labels)} labels; expected {what}: "
            f"uint8 of shape (N, 3, H, W), and N labels."
        )
    return images, labels


def read_mat(path: PathLike, keys: Sequence[str], what: str) -> list[NDArray[np.float64]]:
    """Arrays of a MATLAB file (before version 7.3), as float64.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: SciPy is not installed.
        ValueError: The file is damaged, or lacks a variable.
    """
    path = existing_file(path, what)
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ImportError(f"{path} is a MATLAB file, which SciPy reads: pip install scipy") from error
    try:
        found = loadmat(path, variable_names=list(keys))
        missing = [key for key in keys if key not in found]
        if missing:
            raise ValueError(f"has no variable {', '.join(missing)}")
        return [np.asarray(found[key], dtype=np.float64) for key in keys]
    # A damaged file ends in whatever the parser meets first.
    except (
        MatReadError,
        ValueError,
        TypeError,
        OSError,
        EOFError,
        IndexError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}.") from error


def read_image(path: PathLike, what: str) -> NDArray[np.uint8]:
    """An image as bytes: shape (H, W) or (H, W, C), a bilevel image as 0 and 255.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Pillow is not installed.
        ValueError: The file is damaged or no image.
    """
    path = existing_file(path, what)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{path} is an image, which Pillow reads: pip install 'energyreg[vision]'") from error
    try:
        with Image.open(path) as image:
            mode = {"1": "L", "P": "RGB", "PA": "RGB"}.get(image.mode, image.mode)
            pixels = np.asarray(image.convert(mode))
    # Pillow raises SyntaxError for a broken PNG.
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {error}.") from error
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path} has pixels of type {pixels.dtype}; expected {what}, with 8 bits a channel.")
    return pixels
