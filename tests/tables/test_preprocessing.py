"""Tables of every kind become one finite matrix, learned on the training rows only; what cannot is refused in words."""

from __future__ import annotations

import datetime
import json
import pickle

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from energyreg.errors import DataError
from energyreg.networks.encoders import MixedTableEncoder
from energyreg.tables.files import error_about
from energyreg.tables.preprocessing import TablePreprocessor
from energyreg.tables.targets import read_targets


def frame(rows: int = 20) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "number": [1.0, 2.0, None, 4.0] * (rows // 4),
            "text": ["a", "b", None, "a"] * (rows // 4),
            "category": pd.Categorical([1, 2, 3, 1] * (rows // 4)),
            "date": pd.date_range("2024-01-01", periods=rows, freq="7h"),
            "flag": [True, False] * (rows // 2),
            "integer": pd.array([1, None, 3, 4] * (rows // 4), dtype="Int64"),
            "span": pd.to_timedelta(np.arange(rows), unit="h"),
            "zoned": pd.date_range("2024-01-01", periods=rows, freq="5h", tz="Europe/Berlin"),
        }
    )


def test_all_kinds_of_columns_become_numbers_and_codes():
    preprocessor = TablePreprocessor().fit(frame())
    matrix = preprocessor.transform(frame())
    assert matrix.dtype == np.float32 and np.isfinite(matrix).all()
    assert matrix.shape == (20, len(preprocessor.features_))
    codes = matrix[:, preprocessor.num_numeric_ :]
    assert (codes == np.rint(codes)).all() and (codes >= 0).all()
    assert (codes < preprocessor.cardinalities_).all()
    assert "date, hour" in preprocessor.features_ and "number is missing" in preprocessor.features_


@pytest.mark.parametrize("convert", [pl.from_pandas, pa.Table.from_pandas], ids=["polars", "arrow"])
def test_the_library_of_a_table_does_not_matter(convert):
    preprocessor = TablePreprocessor().fit(frame())
    assert np.array_equal(preprocessor.transform(convert(frame())), preprocessor.transform(frame()))
    assert len(TablePreprocessor().fit(convert(frame())).features_) >= len(preprocessor.features_) - 1


def test_a_matrix_depends_on_its_own_row_only():
    preprocessor = TablePreprocessor().fit(frame())
    whole = preprocessor.transform(frame())
    assert np.array_equal(preprocessor.transform(frame().iloc[3:4]), whole[3:4])


def test_columns_are_found_by_name():
    preprocessor = TablePreprocessor().fit(frame())
    turned = frame()[frame().columns[::-1]]
    assert np.array_equal(preprocessor.transform(turned), preprocessor.transform(frame()))


def test_wild_and_huge_numbers_are_clipped_to_the_range_of_training():
    preprocessor = TablePreprocessor().fit(np.array([[-1e308], [0.0], [1.0], [1e308]]))
    assert np.isfinite(preprocessor.transform(np.array([[1.7e308], [-1.7e308]]))).all()
    preprocessor = TablePreprocessor().fit(np.arange(10.0)[:, None])
    assert preprocessor.transform([[1e30]]) == preprocessor.transform([[9.0]])


def test_a_far_origin_costs_no_digits():
    x = 1e9 + np.arange(100.0)[:, None]
    assert len(np.unique(TablePreprocessor().fit(x).transform(x))) == 100


def test_rare_and_unseen_labels_share_code_zero_and_frequent_ones_come_first():
    x = pd.DataFrame({"c": ["b"] * 6 + ["a"] * 4 + ["rare"]})
    preprocessor = TablePreprocessor(min_count=2).fit(x)
    assert preprocessor.transform(pd.DataFrame({"c": ["b", "a", "rare", "new", None]}))[:, 0].tolist() == [
        1,
        2,
        0,
        0,
        0,
    ]


def test_many_labels_are_pooled():
    x = pd.DataFrame({"c": [str(i % 50) for i in range(500)]})
    assert TablePreprocessor(max_levels=10).fit(x).cardinalities_ == [11]


def test_missing_values_have_a_code_where_training_had_some():
    x = pd.DataFrame({"c": ["a", "b", None] * 5})
    assert TablePreprocessor().fit(x).transform(x)[:3, 0].tolist() == [1, 2, 3]


def test_constant_empty_and_unrepeated_columns_are_dropped_with_a_note():
    x = pd.DataFrame({"one": 1.0, "none": [None] * 8, "id": list("abcdefgh"), "x": np.arange(8.0)})
    preprocessor = TablePreprocessor().fit(x)
    assert preprocessor.features_ == ["x"]
    assert [note.split("'")[1] for note in preprocessor.notes_] == ["one", "none", "id"]


def test_a_table_without_anything_to_learn_from_gives_one_column():
    assert TablePreprocessor().fit(np.ones((5, 2))).transform(np.ones((3, 2))).tolist() == [[0.0]] * 3


def test_dates_give_day_weekday_and_hour():
    x = pd.DataFrame({"d": pd.date_range("2024-01-01", periods=48, freq="h")})
    preprocessor = TablePreprocessor().fit(x)
    assert preprocessor.features_ == ["d, days", "d, day of the year", "d, weekday", "d, hour"]
    hour = preprocessor.transform(x)[:, 3]
    assert np.array_equal(hour[:24], hour[24:]) and (np.diff(hour[:24]) > 0).all()


@pytest.mark.parametrize("table", [frame(), frame().drop(columns="zoned").to_numpy(object)], ids=["frame", "array"])
def test_state_survives_json(table):
    preprocessor = TablePreprocessor().fit(table)
    again = TablePreprocessor.from_state(json.loads(json.dumps(preprocessor.state())))
    assert np.array_equal(again.transform(table), preprocessor.transform(table))
    assert again.features_ == preprocessor.features_ and again.cardinalities_ == preprocessor.cardinalities_


FINE = pd.DataFrame({"a": np.arange(8.0), "b": list("xyxyxyxy")})


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (FINE.drop(columns="a"), ValueError, "X lacks the column 'a'; pass the columns of the training"),
        (FINE.assign(z=1), ValueError, "X has the column 'z', which the table in training had not"),
        (FINE.assign(a="text"), ValueError, "column 'a' of X holds text, but held numbers in training"),
        (FINE.assign(b=3.0), ValueError, "column 'b' of X holds numbers, but held text in training"),
        (FINE.assign(a=pd.Timestamp("2024-01-01")), ValueError, "column 'a' of X holds dates, but held numbers"),
        (FINE.assign(a=np.inf), ValueError, "infinite value .inf. in column 'a', row 0, and 7 more"),
        (FINE.assign(a=1j), ValueError, "Complex data not supported: column 'a'"),
        (FINE.assign(a=[[1]] * 8), TypeError, "holds a list in row 0; the argument must be a table where each"),
        (FINE.assign(b=["x", 1] * 4), ValueError, "column 'b' of X mixes text .row 0: 'x'. with numbers .row 1: 1."),
        (FINE.iloc[:0], ValueError, "X has no rows"),
        (FINE[[]], ValueError, "X has no columns"),
        (np.ones((3, 3)), ValueError, "X has 3 columns, but the table in training had 2"),
        (np.ones(3), ValueError, "Expected 2D array, got 1D array instead"),
        (pd.concat([FINE, FINE], axis=1), ValueError, "has the column name 'a' 2 times"),
        ("data.csv", ValueError, "X is 'data.csv'; expected an array or a data frame. Read the file first"),
        (None, ValueError, "X is None; expected an array or a data frame"),
        ([[1.0], [1.0, 2.0]], ValueError, "X is no table"),
    ],
)
def test_bad_tables_are_refused_in_words(table, error, message):
    with pytest.raises(error, match=message):
        TablePreprocessor().fit(FINE).transform(table)


@pytest.mark.parametrize("again", [lambda error: error, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_say_where_they_are(again, tmp_path):
    frame = FINE.assign(**{"{a}": np.where(np.arange(8) == 5, np.inf, 1.0)})
    with pytest.raises(DataError) as caught:
        TablePreprocessor().fit(frame)
    error = again(caught.value)
    assert (error.name, error.row, error.column, error.path) == ("X", 5, "{a}", None)
    found = again(error_about(error, tmp_path / "{t}.csv", ["y"], offset=100))
    assert (found.path, found.row, found.column) == (tmp_path / "{t}.csv", 106, "{a}")
    assert str(found).startswith(
        f"{tmp_path}/{{t}}.csv: the table has an infinite value (inf) in column '{{a}}', row 106"
    )
    with pytest.raises(DataError) as caught:
        read_targets([[1, 2], [3, np.nan]], "y", 2)
    found = error_about(again(caught.value), tmp_path / "t.csv", ["price", "rent"])
    assert (found.row, found.column) == (2, "rent") and "the target has NaN" in str(found)


def test_objects_of_python_are_read():
    x = np.array(
        [[1, "a", datetime.date(2024, 1, 1), True], [2.5, "b", datetime.date(2024, 1, 5), None]] * 4, dtype=object
    )
    preprocessor = TablePreprocessor().fit(x)
    assert preprocessor.features_[:2] == ["column 0", "column 2, days"]


COLUMN = st.one_of(
    st.lists(st.one_of(st.none(), st.floats(allow_infinity=False)), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.integers(-(2**70), 2**70)), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=6, max_size=6),
    st.lists(st.one_of(st.none(), st.datetimes()), min_size=6, max_size=6),
    st.lists(
        st.one_of(st.integers(), st.text(max_size=2), st.binary(max_size=2), st.complex_numbers()),
        min_size=6,
        max_size=6,
    ),
)


@pytest.mark.filterwarnings("ignore::energyreg.tables.cells.CellWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(COLUMN, min_size=1, max_size=4))
def test_any_mix_of_values_is_read_or_refused_in_words(columns):
    table = np.empty((6, len(columns)), object)
    for i, column in enumerate(columns):
        table[:, i] = column
    for x in (table, pd.DataFrame(table), pd.DataFrame({str(i): column for i, column in enumerate(columns)})):
        try:
            preprocessor = TablePreprocessor(min_count=1).fit(x)
        except (ValueError, TypeError) as error:
            assert "X" in str(error)
            continue
        matrix = preprocessor.transform(x)
        assert np.isfinite(matrix).all()
        encoder = MixedTableEncoder(preprocessor.num_numeric_, preprocessor.cardinalities_, context_dim=4)
        encoder.fit(torch.as_tensor(matrix))
        assert encoder(torch.as_tensor(matrix)).isfinite().all()


# ---------------------------------------------------------------------------------------------- the encoder


def test_codes_out_of_range_count_as_other():
    encoder = MixedTableEncoder(1, [3], context_dim=4).eval()
    assert torch.equal(encoder(torch.tensor([[0.2, 9.0]])), encoder(torch.tensor([[0.2, 0.0]])))


def test_categories_alone_make_a_context():
    encoder = MixedTableEncoder(0, [3, 2], context_dim=4)
    encoder.fit(torch.zeros(5, 2))
    assert bool(encoder.fitted) and encoder(torch.zeros(5, 2)).shape == (5, 4)


def test_the_vector_of_other_learns_in_training():
    encoder = MixedTableEncoder(0, [3], context_dim=4, other_rate=0.5).train()
    encoder(torch.ones(200, 1)).sum().backward()
    gradient = encoder.embeddings[0].weight.grad
    assert gradient[0].abs().sum() > 0 and gradient[2].abs().sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_numeric": -1, "cardinalities": [2]}, "num_numeric is -1"),
        ({"num_numeric": 0, "cardinalities": []}, "columns is 0; expected a whole number of at least 1"),
        ({"num_numeric": 1, "cardinalities": [2, 0]}, r"cardinalities\[1\] is 0"),
        ({"num_numeric": 1, "cardinalities": [2], "other_rate": 1.0}, "other_rate is 1.0"),
    ],
)
def test_the_encoder_names_a_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedTableEncoder(**arguments)
