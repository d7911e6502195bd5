"""Tables as text: CSV files, whose separator, decimal mark and kinds of columns are found by themselves."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import importlib
import io
import lzma
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energyreg.tables.file_errors import TableFileError, check_names, describe_value, first_line

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = ["COMPRESSED", "csv_names", "is_text", "labels_in", "open_text", "read_csv"]

SEPARATORS = ",;\t|"
SAMPLE_BYTES = 65_536
"""How much of a CSV its separator and decimal mark are found by."""
SAMPLE_LINES = 50
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
"""Suffixes of compressed files, and the modules that open them."""
OTHER_CONTENT = (
    (b"PAR1", "a Parquet file"), (b"ARROW1", "a Feather file"), (b"PK\3\4", "a ZIP archive or an Excel workbook"),
    (b"\x1f\x8b", "compressed by gzip"), (b"BZh", "compressed by bzip2"), (b"\xfd7zXZ", "compressed by xz"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook"), (b"%PDF", "a PDF"), (b"\x89HDF", "an HDF5 file"),
)  # fmt: skip
"""First bytes of files that are named as a CSV and are none."""


def is_text(series: Series) -> bool:
    """Whether a column is text, or a mixture of objects."""
    import pandas

    return series.dtype == object or isinstance(series.dtype, pandas.StringDtype)


def labels_in(series: Series) -> Any:
    """The cells of a column as text, None where they are missing."""
    import numpy as np

    return np.array([None if gone else str(v) for v, gone in zip(series, series.isna(), strict=True)], object)


@dataclass(frozen=True)
class _Dialect:
    """How a CSV is written: separator, decimal mark and column names; columns without a name have made-up ones."""

    separator: str
    decimal: str
    names: list[str]
    unnamed: frozenset[str] = frozenset()

    @property
    def features(self) -> list[str]:
        """Names of the columns that have one."""
        return [name for name in self.names if name not in self.unnamed]


def read_csv(
    path: Path, rows: int | None, kinds: Mapping[str, str], columns: Sequence[str] | None, missing: Sequence[str]
) -> Iterator[DataFrame]:
    """Read a CSV in chunks of rows; the arguments are those of :func:`energyreg.tables.files.read_chunks`."""
    import pandas

    dialect = _dialect(path)
    text = {name: str for name in dialect.names if kinds.get(name) in ("text", "time")}
    # A model that was fitted on such columns goes on to find them.
    unnamed = [name for name in dialect.names if name in dialect.unnamed and name not in {*kinds, *(columns or ())}]
    done = 0
    try:
        with warnings.catch_warnings(), open_text(path) as file:
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            reader = pandas.read_csv(
                file, sep=dialect.separator, decimal=dialect.decimal, encoding="utf-8-sig", dtype=text, index_col=False,
                names=dialect.names, header=0, na_values=list(missing) or None,
                usecols=None if columns is None else [dialect.names.index(name) for name in columns],
                chunksize=rows or 2**62, low_memory=False, skipinitialspace=True,
            )  # fmt: skip
            for frame in reader:
                frame.index = pandas.RangeIndex(len(frame))
                if columns is None:
                    for name in unnamed:
                        if name != dialect.names[0]:
                            _refuse_unnamed(path, frame[name], dialect.names.index(name), done)
                    frame = frame.drop(columns=unnamed)
                yield _typed(frame, kinds, dialect.decimal)
                done += len(frame)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise TableFileError(path, f"the compressed file is damaged or incomplete: {first_line(error)}") from None
    except UnicodeDecodeError:
        raise _bad_encoding(path) from None
    except pandas.errors.EmptyDataError:
        raise TableFileError(path, "the file holds no table.") from None
    except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if found:
            what = f"line {found[2]} has {found[3]} values, but the header has {found[1]}"
            raise TableFileError(path, f"{what}; quote values that hold {dialect.separator!r}.") from None
        raise TableFileError(path, f"the file is no complete CSV: {str(error).strip()}.") from None


def _looks_like_dates(series: Series) -> bool:
    known = series.dropna()
    return len(known) > 0 and all(re.match(r"\d{4}-\d\d-\d\d", str(value)) for value in known.iloc[:20])


def _refuse_unnamed(path: Path, series: Series, index: int, done: int) -> None:
    known = series.notna().to_numpy()
    if known.any():
        row = int(known.argmax())
        found = describe_value(series.iloc[row])
        text = f"column {index + 1} has no name in the header, but {found} in row {done + row + 1}; name it."
        raise TableFileError(path, text, row=done + row + 1)


def _typed(frame: DataFrame, kinds: Mapping[str, str], decimal: str) -> DataFrame:
    """The columns as what they are to be; dates in text become dates, unless a cell is none."""
    import pandas

    from energyreg.tables.cells import Reading, Tally
    from energyreg.tables.preprocessing import as_times

    for name in frame.columns:
        kind, series = kinds.get(str(name)), frame[name]
        if not is_text(series):
            continue
        if kind in ("number", "duration"):
            numbers = pandas.to_numeric(series, errors="coerce")
            if not (numbers.isna() & series.notna()).any():
                frame[name] = numbers
                continue
        if kind in (None, "number") and decimal == ",":  # as the columns that pandas could read
            marked = series.str.fullmatch(r"\s*[+-]?\d+,\d+\s*") == True  # noqa: E712 (missing is not)
            if 2 * int(marked.sum()) > int(series.notna().sum()):
                frame[name] = series.where(~marked, series.str.replace(",", "."))
        if kind == "time" or (kind is None and _looks_like_dates(series)):
            labels, tally = labels_in(series), Tally()
            tally.add(labels)
            if not tally.odd["time"]:
                frame[name] = as_times(Reading("time").read(labels)[0])
    return frame


def open_text(path: Path) -> Any:
    """A CSV as bytes, whether it is compressed or not."""
    module = COMPRESSED.get(path.suffix.lower())
    return open(path, "rb") if module is None else importlib.import_module(module).open(path, "rb")


def _dialect(path: Path) -> _Dialect:
    try:
        with open_text(path) as file:
            content = file.read(SAMPLE_BYTES)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if path.suffix.lower() not in COMPRESSED or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise TableFileError(path, f"the compressed file is damaged or incomplete: {first_line(error)}") from None
    complete = len(content) < SAMPLE_BYTES
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise TableFileError(path, "the file is in UTF-16; expected UTF-8. Save it as UTF-8.")
    other = next((kind for start, kind in OTHER_CONTENT if content.startswith(start)), "")
    if other or b"\0" in content:
        raise TableFileError(path, f"the file is {other or 'binary'}, no text; rename it, or save the table as CSV.")
    if not complete:  # the last line may be cut, even within a letter
        content = content[: content.rfind(b"\n") + 1] or content
    try:
        sample = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if complete or error.end < len(content):
            raise _bad_encoding(path) from None
        sample = content.decode("utf-8-sig", "ignore")
    if not sample.strip():
        raise TableFileError(path, "the file is empty; expected a table with a header and rows.")
    markup = re.match(r"(?i)\s*<(!doctype|html|\?xml|table|[a-z]+[ >])|\s*(\{\s*[\"}]|\[\s*[\[{])", sample)
    if markup:
        kind = "HTML or XML" if markup[1] else "JSON"
        raise TableFileError(path, f"the file holds {kind}, no table; save the table as CSV.")
    best: tuple[int, str, list[list[str]]] | None = None
    for separator in SEPARATORS:
        lines = _split(sample, separator)
        # The separator that cuts all lines into as many values as the header, and the more the better.
        width = len(lines[0])
        if width > 1:
            alike = sum(len(line) == width for line in lines) / len(lines)
            score = round(1000 * alike) * 1000 + min(width, 999)
            if best is None or score > best[0]:
                best = score, separator, lines
    if best is None and _cut_by_blanks(sample):
        first = next(line for line in sample.splitlines() if line.strip())
        check_names(path, first.split())
        return _Dialect(r"\s+", ".", first.split())
    _, separator, lines = best or (0, ",", _split(sample, ","))
    names, body = [name.strip() for name in lines[0]], lines[1:]
    if not any(names):
        raise TableFileError(path, "the header has no names; expected the names of the columns in the first line.")
    unnamed = frozenset(f"Unnamed: {i}" for i, name in enumerate(names) if not name)
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    check_names(path, names)
    for number, line in enumerate(body, 2):
        if len(line) > len(names):
            raise TableFileError(
                path,
                f"line {number} has {len(line)} values, but the header has {len(names)}; quote values that "
                f"hold {separator!r}, or check the header.",
            )
    cells = [cell for line in body for cell in line]
    comma = separator != "," and any(re.fullmatch(r"\s*[+-]?\d+,\d+\s*", cell) for cell in cells)
    point = any(re.fullmatch(r"\s*[+-]?\d+\.\d+\s*", cell) for cell in cells)
    return _Dialect(separator, "," if comma and not point else ".", names, unnamed)


def _split(sample: str, separator: str) -> list[list[str]]:
    lines = csv.reader(io.StringIO(sample), delimiter=separator, skipinitialspace=True)
    with contextlib.suppress(csv.Error):
        return [line for line, _ in zip((line for line in lines if line), range(SAMPLE_LINES), strict=False)]
    return [[sample.partition("\n")[0]]]


def _cut_by_blanks(sample: str) -> bool:
    widths = {len(line.split()) for line in sample.splitlines()[:SAMPLE_LINES] if line.strip()}
    return len(widths) == 1 and widths != {1}


def _bad_encoding(path: Path) -> TableFileError:
    offset = 0
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return TableFileError(
                    path,
                    f"line {number} is not UTF-8: byte 0x{line[error.start]:02x} at position "
                    f"{error.start + 1} of the line (byte {offset + error.start} of the file); save the file as UTF-8.",
                )
            offset += len(line)
    return TableFileError(path, "the file is not UTF-8; save it as UTF-8.")


def csv_names(path: Path) -> list[str]:
    """Names of the columns of a CSV that have one.

    Raises:
        TableFileError: As :func:`read_csv`.
    """
    return _dialect(path).features
