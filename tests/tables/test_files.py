"""Files of tables: headers, offsets, metadata and damage."""

import json

import numpy as np
import pandas as pd
import pytest

from energyreg.tables import files

FRAME = pd.DataFrame({"a": np.arange(40.0), "label": list("uv") * 20, "y": np.arange(40) * 2})


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (",a,y", "{i},{i},{i}"),
        ("a,y,", "{i},{i},"),
        (" a ,y ", "{i},{i}"),
        ('"a","y "', "{i},{i}"),
        ("a ;y\t;", "{i};{i};"),
    ],
)
def test_headers_as_programs_write_them(header, row, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(header + "\n" + "".join(row.format(i=i) + "\n" for i in range(5)))
    frame = files.read(path)
    assert files.columns_of(path) == list(frame) == ["a", "y"]
    assert frame["a"].tolist() == frame["y"].tolist() == list(range(5))
    # A model that was fitted on the row numbers goes on to find them.
    if header.startswith(",a"):
        assert list(files.read(path, kinds={"Unnamed: 0": "number"})) == ["Unnamed: 0", "a", "y"]


@pytest.mark.parametrize("ends", [["+01:00", "+02:00"], ["Z", ""], ["", "+0530"], [" UTC", "Z"]])
def test_offsets_that_differ_give_local_time(ends, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("when,y\n" + "".join(f"2023-0{1 + i}-03T10:00:00{ends[i % 2]},{i}\n" for i in range(8)))
    when = files.read(path)["when"]
    assert when.dtype.kind == "M" and when.dt.tz is None and set(when.dt.hour) == {10}


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_what_pandas_keeps_as_index_is_no_column(suffix, tmp_path):
    path = tmp_path / f"t.{suffix}"
    frame = FRAME.set_index(pd.Index(range(100, 140), name="key" if suffix == "parquet" else None))
    frame.to_parquet(path) if suffix == "parquet" else frame.reset_index(drop=True).to_feather(path)
    assert files.columns_of(path) == list(files.read(path)) == list(FRAME)


def test_whole_numbers_among_missing_ones_stay_whole(tmp_path):
    big = pd.array([2**53 + 1, None, 7], dtype="Int64")
    pd.DataFrame({"id": big}).to_parquet(tmp_path / "t.parquet")
    assert files.read(tmp_path / "t.parquet")["id"].tolist() == [2**53 + 1, pd.NA, 7]


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_any_damage_is_said_with_the_name_of_the_file(suffix, tmp_path):
    """Flip bytes all over the file, above all in its metadata: each is read, or refused in words."""
    good = tmp_path / f"good.{suffix}"
    FRAME.to_parquet(good) if suffix == "parquet" else FRAME.to_feather(good)
    content, rng = good.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / f"bad.{suffix}", 0
    places = [*rng.integers(0, len(content), 40), *rng.integers(len(content) // 2, len(content), 80)]
    for place in places:
        damaged = bytearray(content)
        damaged[place : place + 3] = bytes(rng.integers(0, 256, len(damaged[place : place + 3]), dtype=np.uint8))
        path.write_bytes(damaged)
        for read in (
            files.columns_of,
            lambda p: files.typed_columns(p, "text"),
            files.read,
            lambda p: list(files.read_chunks(p, rows=7)),
        ):
            try:
                read(path)
            except files.TableFileError as error:
                refused += 1
                assert str(error).startswith(str(path)) and error.path == path
    assert refused > 20


def test_names_that_cannot_be_decoded_are_said(tmp_path):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"abcdefgh": [1.0, 2.0]}).to_parquet(path)
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"abcd\xff\xfegh"))
    with pytest.raises(files.TableFileError, match=r"t\.parquet: the file is no complete Parquet file"):
        files.read(path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_further_markers_of_missing_values(kind, tmp_path):
    frame = pd.DataFrame({"a": [1.0, -999.0, 3.0], "b": ["x", "none of it", "y"], "c": [4, -999, 5]})
    path = tmp_path / f"t.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    read = files.read(path, missing=["-999", "none of it"])
    assert json.loads(read.isna().to_json(orient="values")) == [[False] * 3, [True] * 3, [False] * 3]
