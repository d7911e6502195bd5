"""The bundled protein table is UCI's, its split never moves, and a bad file is named."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from energyreg.datasets import load_protein, protein
from energyreg.datasets.protein import BUNDLED, FEATURES, ROWS

HEADER = "RMSD,F1,F2,F3,F4,F5,F6,F7,F8,F9"
# Of the features and the target, row by row; of the training, validation and test rows: 8 bytes each, little-endian.
TABLE_SHA256 = "19667c545027b658fa8b2fa3620154e7046b3d263df1ec263514676eb3585096"
SPLIT_SHA256 = "67e9107fc1e94ea69bc14ea965b128ea101da0f4a17520a769ef5d6f71581362"


@pytest.fixture(scope="module")
def data() -> protein.Protein:
    return load_protein()


def write_csv(path: Path, data: protein.Protein, rows: int = ROWS) -> Path:
    table = np.hstack([data.y, data.x])[:rows]
    # repr gives the shortest decimals that read back as the same float64.
    path.write_text("\n".join([HEADER, *(",".join(map(repr, row)) for row in table.tolist())]) + "\n")
    return path


def test_table_has_the_documented_shapes_and_types(data: protein.Protein) -> None:
    assert data.x.shape == (45730, 9) and data.y.shape == (45730, 1)
    assert data.x.dtype == data.y.dtype == np.float64
    assert data.feature_names == FEATURES and data.target_name == "RMSD"
    assert "CC BY 4.0" in data.licence and "10.24432/C5QW3H" in data.citation


def test_values_are_those_of_uci(data: protein.Protein) -> None:
    # The first row, facts of the target, and a hash of all numbers, computed from UCI's text.
    first = [13558.3, 4305.35, 0.31754, 162.173, 1872790.507, 215.359, 4287.87, 102, 27.0302]
    assert data.x[0].tolist() == first and data.y[0, 0] == 17.284
    assert data.y.min() == 0 and data.y.max() == 20.999 and (data.y == 0).sum() == 272
    digest = hashlib.sha256(np.hstack([data.x, data.y]).astype("<f8").tobytes()).hexdigest()
    assert digest == TABLE_SHA256


def test_split_is_a_partition_with_the_documented_sizes(data: protein.Protein) -> None:
    assert (len(data.train), len(data.validation), len(data.test)) == (37042, 4115, 4573)
    assert np.array_equal(np.sort(np.concatenate([data.train, data.validation, data.test])), np.arange(ROWS))


def test_split_never_changes(data: protein.Protein) -> None:
    indices = np.concatenate([data.train, data.validation, data.test]).astype("<i8")
    assert hashlib.sha256(indices.tobytes()).hexdigest() == SPLIT_SHA256


def test_duplicates_are_as_the_docstring_says(data: protein.Protein) -> None:
    distinct, row = np.unique(np.hstack([data.x, data.y]), axis=0, return_inverse=True)
    assert ROWS - len(distinct) == 1711
    assert np.isin(row[data.test], row[data.train]).sum() == 281
    assert np.isin(row[data.validation], row[data.train]).sum() == 237


def test_ucis_own_csv_gives_the_same_table(data: protein.Protein, tmp_path: Path) -> None:
    read = load_protein(write_csv(tmp_path / "CASP.csv", data))
    assert np.array_equal(read.x, data.x) and np.array_equal(read.y, data.y)
    assert np.array_equal(read.test, data.test)


def test_attribution_ships_beside_the_data() -> None:
    text = BUNDLED.with_name("protein.ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in text and "https://doi.org/10.24432/C5QW3H" in text


def test_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv is not a file"):
        load_protein(tmp_path / "nowhere.csv")
    monkeypatch.setattr(protein, "BUNDLED", tmp_path / "gone.xz")
    with pytest.raises(FileNotFoundError, match=r"gone\.xz is missing"):
        load_protein()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1000], lambda b: b"no xz" + b, lambda b: b[:5000] + b"\0" + b[5001:]],
    ids=["truncated", "no xz", "one byte"],
)
def test_damaged_bundle_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    broken = tmp_path / "broken.xz"
    broken.write_bytes(damage(BUNDLED.read_bytes()))
    monkeypatch.setattr(protein, "BUNDLED", broken)
    with pytest.raises(ValueError, match=r"broken\.xz is damaged"):
        load_protein()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "first line should be RMSD,F1"),
        ("<html>Not found</html>", "first line should be RMSD,F1"),
        ("F1,F2,F3,F4,F5,F6,F7,F8,F9,RMSD\n" + "1," * 9 + "1\n", "first line should be RMSD,F1"),
        (HEADER, "45730 rows under its header, but has 0"),
        (HEADER + "\n" + "1," * 9 + "1\n", "45730 rows under its header, but has 1"),
        (HEADER + "\n" + "1,2\n" * ROWS, "10 columns, but has 2"),
        (HEADER + "\n" + ("1," * 9 + "1\n") * (ROWS - 1) + "1,2,3\n", "columns"),
        (HEADER + "\n" + ("1," * 9 + "many\n") * ROWS, "many"),
    ],
    ids=["empty", "html", "order", "no rows", "one row", "two columns", "ragged", "text"],
)
def test_wrong_csv_is_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "CASP.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"CASP\.csv is not UCI's protein table: .*{problem}"):
        load_protein(path)


def test_csv_with_a_missing_number_is_named(data: protein.Protein, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "CASP.csv", data)
    path.write_text(path.read_text().replace("0.26213", "nan", 1))
    with pytest.raises(ValueError, match=r"CASP\.csv .*row 1 holds a NaN"):
        load_protein(path)
