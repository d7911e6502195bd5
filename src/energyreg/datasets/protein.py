"""UCI's protein table: nine properties of a predicted protein structure, and how far it is from the true one."""

import lzma
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Protein", "load_protein"]

FEATURES = ("F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9")
TARGET = "RMSD"
ROWS = 45_730
# Decimals of each column (features, then the target) in UCI's file: times 10**decimals, all values are integers.
DECIMALS = (2, 2, 5, 4, 4, 4, 2, 0, 4, 3)
# A 64-bit integer for each value, column by column, and in a column by significance: first all highest bytes, last all
# lowest ones. Bytes that look alike then stand together, and xz needs a fifth less than for UCI's text.
BUNDLED = Path(__file__).with_name("protein.i64.xz")
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Protein:
    """The protein table and its split.

    Attributes:
        x: Features, float64, shape (45730, 9).
        y: Target, the root-mean-square deviation from the native structure in ångström, float64, shape (45730, 1).
        train: Row numbers of the training part, ascending, shape (37042,).
        validation: Row numbers of the validation part, ascending, shape (4115,).
        test: Row numbers of the test part, ascending, shape (4573,).
        feature_names: Names of the columns of x.
        target_name: Name of the target.
        licence: Licence of the data.
        citation: Whom to cite.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    feature_names: tuple[str, ...] = FEATURES
    target_name: str = TARGET
    licence: str = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
    citation: str = (
        "Rana, P. (2013). Physicochemical Properties of Protein Tertiary Structure [Dataset]. "
        "UCI Machine Learning Repository. https://doi.org/10.24432/C5QW3H"
    )


def load_protein(path: str | os.PathLike[str] | None = None) -> Protein:
    """Load UCI's "Physicochemical Properties of Protein Tertiary Structure", and one fixed split of it.

    Each row is a predicted structure (a decoy) of a protein from CASP 5 to 9. Many inputs are compatible with both a
    good and a bad prediction, so p(y|x) often has two modes. The columns of x are

    - F1, total surface area,
    - F2, non-polar exposed area,
    - F3, fractional area of exposed non-polar residues,
    - F4, fractional area of the exposed non-polar part of a residue,
    - F5, exposed area weighted with the molecular mass,
    - F6, average deviation from the standard exposed area of a residue,
    - F7, Euclidean distance,
    - F8, secondary structure penalty,
    - F9, spatial distribution constraints (N, K value),

    and y lies in [0, 20.999] ångström; 272 of the targets are exactly 0.

    The split is random, as is standard for this table: the rows are ordered by the first 45,730 outputs of PCG64 seeded
    with 0; the first tenth is the test part, the first tenth of the others the validation part. It is the same for
    every version of NumPy.

    Know this before you trust a score: **1,711 rows repeat an earlier row** in all ten columns (44,019 are distinct),
    and this split, like any random one, puts equal rows on both sides. 281 of the 4,573 test rows (6.1 %) have an
    identical row in the training part, as have 237 of the 4,115 validation rows (5.8 %). Scores on this table flatter a
    model that memorises.

    Args:
        path: UCI's own `CASP.csv` (header `RMSD,F1,...,F9`), to be read in place of the bundled copy, which holds
            exactly the same numbers.

    Returns:
        The table, with `x` in float64, shape (45730, 9), and `y` in ångström, shape (45730, 1).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or not this table. The message names the file.

    Example:
        >>> data = load_protein()
        >>> data.x[data.train].shape, data.y[data.test].shape
        ((37042, 9), (4573, 1))
        >>> data.x[0, :3], data.y[0]
        (array([1.35583e+04, 4.30535e+03, 3.17540e-01]), array([17.284]))
    """
    table = _read_bundled(BUNDLED) if path is None else _read_csv(Path(path))
    train, validation, test = _split()
    return Protein(x=table[:, :-1], y=table[:, -1:], train=train, validation=validation, test=test)


def _split() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the row numbers of the training, validation and test part."""
    # NumPy keeps the raw output of a bit generator the same in all versions; that of Generator.permutation may change.
    order = np.argsort(np.random.PCG64(SPLIT_SEED).random_raw(ROWS), kind="stable")
    test, others = np.split(order, [ROWS // 10])
    validation, train = np.split(others, [len(others) // 10])
    return np.sort(train), np.sort(validation), np.sort(test)


def _read_bundled(path: Path) -> NDArray[np.float64]:
    """Read the compressed copy: the features, then the target, shape (45730, 10)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. It is part of energyreg: install the package again.")
    columns = len(DECIMALS)
    try:
        content = lzma.decompress(path.read_bytes())
        planes = np.frombuffer(content, np.uint8).reshape(columns, 8, ROWS)
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). It is part of energyreg: install the package again.") from error
    integers = np.ascontiguousarray(planes.transpose(2, 0, 1)).view(">i8")[..., 0]
    # Both numbers are exact in float64, so their quotient is the float64 nearest to the decimal that UCI's file has.
    return integers / 10.0 ** np.array(DECIMALS)


def _read_csv(path: Path) -> NDArray[np.float64]:
    """Read UCI's CASP.csv, and put the target last, shape (45730, 10)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give the path of UCI's CASP.csv, or none for the bundled copy.")
    names = [TARGET, *FEATURES]
    try:
        header, _, body = path.read_text(encoding="utf-8-sig").partition("\n")
        if [name.strip(' "') for name in header.strip().split(",")] != names:
            raise ValueError(f"its first line should be {','.join(names)}, but begins {header[:60]!r}")
        rows = body.split("\n") if (body := body.rstrip()) else []
        if len(rows) != ROWS:
            raise ValueError(f"it should have {ROWS} rows under its header, but has {len(rows)}")
        table = np.loadtxt(rows, delimiter=",", ndmin=2)
        if table.shape[1] != len(names):
            raise ValueError(f"it should have {len(names)} columns, but has {table.shape[1]}")
        if not np.isfinite(table).all():
            raise ValueError(f"row {int(np.argmin(np.isfinite(table).all(1)))} holds a NaN or an infinite number")
    except ValueError as error:
        raise ValueError(f"{path} is not UCI's protein table: {error}. Fetch CASP.csv again.") from error
    return np.roll(table, -1, axis=1)
