"""Columns of text are numbers or dates where nearly all cells are: the odd ones are read, or missing and named."""

import datetime
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from energyreg.errors import DataError, DataTypeError
from energyreg.estimators.table import EnergyRegressor
from energyreg.tables import blocks
from energyreg.tables.blocks import FileTable, MemoryTable
from energyreg.tables.cells import CellWarning, ColumnWarning, Reading, Tally, number, time
from energyreg.tables.columns import read_columns
from energyreg.tables.preprocessing import TablePreprocessor
from energyreg.tables.targets import read_targets

RNG = np.random.default_rng(0)
NUMBERS = RNG.normal(size=60).round(3)
DAYS = [f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}" for i in range(60)]
FAST = {"n_members": 1, "epochs": 1, "width": 8, "random_state": 0}


def microseconds(text):
    return float(np.datetime64(text, "us").astype(np.int64))


@pytest.mark.parametrize(
    ("text", "convention", "expected"),
    [
        ("12", "point", (12, "")), (" -1.5 ", "point", (-1.5, "")), (".5", "point", (0.5, "")),
        ("1e3", "point", (1000, "")), ("1.2D+03", "point", (1200, "")), ("1,234.5", "point", (1234.5, "")),
        ("1 234 567", "point", (1234567, "")), ("1\u202f234", "point", (1234, "")), ("1'234.5", "point", (1234.5, "")),
        ("\u22120.5", "point", (-0.5, "")), ("\u20132", "point", (-2, "")), ("\uff0d\uff11", "point", (-1, "")),
        ("12 %", "point", (12, "%")), ("$1,200", "point", (1200, "$")), ("-3 \u20ac", "point", (-3, "\u20ac")),
        ("1,5", "comma", (1.5, "")), ("1.234,5", "comma", (1234.5, "")), ("inf", "point", (np.inf, "")),
        *((text, "point", None) for text in ("", "?", "-", "1,5", "12,34", "1.2.3", "12 kg", "0x10", "1_0", "$1%")),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text, convention, expected):
    assert number(text, convention) == expected


@pytest.mark.parametrize(
    ("text", "convention", "expected"),
    [
        ("2023-12-31", "iso", "2023-12-31"), ("2023-12-31T10:20:30.25", "iso", "2023-12-31T10:20:30.25"),
        ("2023-12-31 10:20+02:00", "iso", "2023-12-31T10:20"), ("2023-12-31T10:00:00Z", "iso", "2023-12-31T10:00"),
        ("31.12.2023", "iso", "2023-12-31"), ("2023/1/5", "iso", "2023-01-05"), ("31/12/2023", "day", "2023-12-31"),
        ("12/31/2023 1:05 PM", "month", "2023-12-31T13:05"), ("0031-01-01", "iso", "0031-01-01"),
        *((text, "iso", None) for text in ("2023-13-01", "2023-02-30", "31/12/2023", "2023-12-31 25:00", "12", "?")),
    ],
)  # fmt: skip
def test_dates_as_people_write_them(text, convention, expected):
    assert time(text, convention) == (None if expected is None else microseconds(expected))


ODD = ["?", "-", "n.a.", "abc", "\u2212", "12 %"]
READ = {"1,234.5": 1234.5, "\u22120.5": -0.5, "1.2D+03": 1200.0}


def fitted(column):
    """A column, its reading, and its warning."""
    source = MemoryTable(pd.DataFrame({"a": column, "b": 1.0}), "X")
    (said,) = source.warnings
    return source.take(np.arange(source.rows))[0], str(said)


@pytest.mark.parametrize("cell", [*ODD, *READ, "31.12.2023"])
def test_one_bad_cell_never_costs_a_column_of_numbers(cell):
    column, said = fitted([cell, *map(str, NUMBERS)])
    assert column.kind == "number"
    np.testing.assert_array_equal(column.values, [READ.get(cell, np.nan), *NUMBERS])
    assert "column 'a' of X: 1 value is" in said and f"{cell!r} in row 0" in said
    assert ("taken as missing" in said) == (cell not in READ)


@pytest.mark.parametrize("cell", [*ODD, "31.12.2023", "05/06/2024", "2024-02-30", "17"])
def test_one_bad_cell_never_costs_a_column_of_dates(cell):
    column, said = fitted([*DAYS, cell])
    assert column.kind == "time"
    expected = microseconds("2023-12-31") if cell == "31.12.2023" else np.nan
    np.testing.assert_array_equal(column.values, [*map(microseconds, DAYS), expected])
    assert f"{cell!r} in row 60" in said


def test_markers_do_not_count_and_other_cells_do():
    many, _ = fitted([*map(str, NUMBERS), *["?"] * 40])
    assert many.kind == "number" and np.isnan(many.values[60:]).all()
    source = MemoryTable(pd.DataFrame({"a": [*map(str, NUMBERS), *["abc"] * 4]}), "X")
    assert source.take(np.arange(64))[0].kind == "text" and not source.warnings  # 6 % are no numbers


@pytest.mark.parametrize("column", [list("1234567890") * 3, ["01", "02", "?"] * 20, list("abc") * 20, ["?"] * 20])
def test_labels_stay_labels(column):
    source = MemoryTable(pd.DataFrame({"a": column}), "X")
    assert source.take(np.arange(len(column)))[0].kind == "text" and not source.warnings


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1,5", "2,25", "1.234,5"] * 4, [1.5, 2.25, 1234.5] * 4),
        (["1,234", "2,250", "12,500"] * 4, [1234, 2250, 12500] * 4),
        (["5 %", "12 %", "7.5 %"] * 4, [5, 12, 7.5] * 4),
    ],
)
def test_a_convention_is_that_of_the_column(cells, expected):
    assert fitted(cells)[0].values.tolist() == expected


@pytest.mark.parametrize(
    ("cells", "kind", "first"),
    [
        (["31/12/2023", "01/02/2024"] * 10, "time", "2023-12-31"),
        (["12/31/2023", "01/02/2024"] * 10, "time", "2023-12-31"),
        (["01/02/2024", "03/04/2024"] * 10, "text", None),  # nobody can tell
    ],
)
def test_days_and_months_need_evidence(cells, kind, first):
    source = MemoryTable(pd.DataFrame({"a": cells}), "X")
    column = source.take(np.arange(20))[0]
    assert column.kind == kind
    if first:
        assert column.values[0] == microseconds(first)


@pytest.mark.parametrize("values", [[1.5, "?", *NUMBERS], [1.5, "1,234.5", None, *NUMBERS]])
def test_text_among_numbers_of_python(values):
    column, said = fitted(pd.Series(values, dtype=object))
    assert column.kind == "number" and column.values[0] == 1.5 and f"{values[1]!r} in row 1" in said


def test_what_training_took_as_missing_is_missing_later_and_other_words_are_refused():
    frame = pd.DataFrame({"a": ["abc", *map(str, NUMBERS)], "day": [*DAYS, "?"]})
    with pytest.warns(CellWarning) as said:
        regressor = EnergyRegressor(**FAST).fit(frame, np.arange(61.0))
    assert len(said) == 2 == len(regressor.preprocessor_.notes_)
    assert [w for w in regressor.preprocessor_.features_ if "missing" in w] == ["a is missing", "day is missing"]
    again = TablePreprocessor.from_state(regressor.preprocessor_.state())
    typed = pd.DataFrame({"a": [np.nan, *NUMBERS], "day": pd.to_datetime([*DAYS, None])})
    with pytest.warns(CellWarning, match="taken as missing as in training"):
        np.testing.assert_array_equal(again.transform(frame), again.transform(typed))
    with pytest.warns(CellWarning):
        clean = again.typed(frame)
    assert clean["a"].dtype == float and clean["day"].dtype.kind == "M"
    with pytest.raises(DataError, match="column 'a' has 'xyz' in row 3; expected a number") as caught:
        again.transform(frame.assign(a=[*map(str, NUMBERS[:3]), "xyz", *map(str, NUMBERS[:57])]))
    assert (caught.value.row, caught.value.column) == (3, "a")


def test_dates_in_text_are_dates():
    frame = pd.DataFrame({"day": DAYS})
    assert TablePreprocessor().fit(frame).features_[0] == "day, days"
    assert TablePreprocessor().fit(frame).transform(frame).shape == (60, 3)
    for table in (frame, pl.from_pandas(frame), pa.Table.from_pandas(frame), frame.to_numpy()):
        assert MemoryTable(table, "X").take(np.arange(2))[0].kind == "time"


def test_no_column_is_dropped_in_silence():
    frame = pd.DataFrame({"id": [f"k{i}" for i in range(60)], "one": 1, "a": NUMBERS})
    with pytest.warns(ColumnWarning, match="Column 'id' has only labels of fewer than 4 rows.* Column 'one' has"):
        EnergyRegressor(**FAST).fit(frame, NUMBERS)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_a_file_in_blocks_is_judged_as_a_whole(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 256)
    cells = RNG.normal(size=600).round(3).astype(str).astype(object)
    cells[[3, 400]] = ["?", "n/k"]
    frame = pd.DataFrame({"a": cells, "day": "2024-01-05", "y": np.arange(600)})
    frame.loc[300, "day"] = "31.12.2023"
    path = tmp_path / f"t.{suffix}"
    frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, index=False)
    source = FileTable(path, ["y"])
    assert [r.kind for r in source.readings.values()] == ["number", "time"]
    a, day = source.take(np.arange(600))
    assert np.flatnonzero(np.isnan(a.values)).tolist() == [3, 400] and not np.isnan(day.values).any()
    assert str(source.warnings[0]).startswith(f"{path}: column 'a' of the table: 2 values are not numbers")
    assert "'?' in row 4, 'n/k' in row 401" in str(source.warnings[0])
    whole = MemoryTable(frame[["a", "day"]], "X").take(np.arange(600))
    for one, other in zip((a, day), whole, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_a_tally_is_bounded_and_a_reading_is_plain_data():
    tally = Tally()
    tally.add([f"word {i}" for i in range(3_000)])
    assert len(tally.odd["number"]) == 1_000 and tally.reading() == Reading()


# ---------------------------------------------------------------------------------------------- dtypes

DATES = [datetime.date(2024, 1, 1) + datetime.timedelta(i) for i in range(60)]
TIMES = [datetime.time(i % 24, 30) for i in range(60)]


@pytest.mark.parametrize(
    ("table", "kind", "first"),
    [
        (pd.DataFrame({"d": pd.array(DATES, dtype=pd.ArrowDtype(pa.date32()))}), "time", microseconds("2024-01-01")),
        (pd.DataFrame({"d": pd.array(DATES, dtype=pd.ArrowDtype(pa.date64()))}), "time", microseconds("2024-01-01")),
        (pd.DataFrame({"t": pd.array(TIMES, dtype=pd.ArrowDtype(pa.time64("us")))}), "duration", 1800),
        (pd.DataFrame({"t": TIMES}), "duration", 1800),
        (pa.table({"t": TIMES}), "duration", 1800),
        (pl.DataFrame({"t": TIMES}), "duration", 1800),
        (pd.DataFrame({"b": pd.cut(np.arange(60), [-1, 30, 60])}), "text", "(-1, 30]"),
        (pd.DataFrame({"b": pd.arrays.IntervalArray.from_breaks(range(61))}), "text", "(0, 1]"),
        (torch.ones(60, 1).bfloat16(), "number", 1),
        (np.ma.masked_array(np.ones((3, 1)), [[0], [1], [0]]), "number", 1),
        (np.ma.masked_array(np.array([["a"], ["b"]]), [[0], [1]]), "text", "a"),
    ],
)
def test_dtypes_are_what_they_say(table, kind, first):
    _, (column,), _ = read_columns(table, "X")
    assert column.kind == kind and column.values[0] == first
    if isinstance(table, np.ma.MaskedArray):
        assert column.missing().tolist() == table.mask[:, 0].tolist()


@pytest.mark.parametrize("table", [pl.DataFrame({"a": [1.0]}).lazy(), torch.eye(3).to_sparse()])
def test_tables_that_are_not_there_are_refused_in_words(table):
    with warnings.catch_warnings(), pytest.raises(DataTypeError, match="X is a "):
        warnings.simplefilter("error")
        MemoryTable(table, "X")


def test_a_masked_target_is_refused_and_tensors_of_any_dtype_are_read():
    with pytest.raises(DataError, match="y is masked in 1 of 3 rows, the first in row 1"):
        read_targets(np.ma.masked_array([1.0, 1e6, 2.0], [False, True, False]), "y", 3)
    assert read_targets(torch.arange(3).bfloat16(), "y", 3)[:, 0].tolist() == [0, 1, 2]


def test_whole_numbers_beyond_a_float_are_said_and_are_labels_where_they_are_categories():
    big = 2**53 + np.arange(4)
    with pytest.warns(UserWarning, match=r"column 'a' of X has whole numbers beyond 2\^53, such as 9007199254740995"):
        read_columns(pd.DataFrame({"a": big}), "X")
    _, (column,), _ = read_columns(pd.DataFrame({"a": pd.Categorical(big)}), "X")
    assert column.values.tolist() == list(map(str, big))
