"""Tables in blocks: a file or a mapped array gives the model that the same table in memory gives, in bounded memory."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from energyreg import EnergyRegressor
from energyreg.estimators import core, learning
from energyreg.tables import blocks
from energyreg.tables import files as tablefiles
from energyreg.tables.blocks import FileTable, MemoryTable, Scratch, encode, rows_to_learn_from
from energyreg.tables.cells import CellWarning
from energyreg.tables.files import TableFileError
from energyreg.tables.preprocessing import TablePreprocessor

FAST = {"n_members": 1, "epochs": 2, "width": 8, "num_components": 2, "random_state": 0, "split": "random"}
N = 700
RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "a": RNG.normal(size=N),
        "kind": RNG.choice(["u", "v", "w"], N),
        "day": pd.date_range("2024-01-01", periods=N, freq="7h"),
        "some": np.where(RNG.random(N) < 0.2, np.nan, RNG.normal(size=N)),
        "flag": RNG.random(N) < 0.5,
        "whole": RNG.integers(0, 50, N),
    }
)
Y = FRAME["a"].to_numpy() + np.where(FRAME["kind"] == "u", 1.0, 0.0) + 0.3 * RNG.normal(size=N)
TABLE = FRAME.assign(y=Y)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 rows, the least there is; and encoded rows in a file."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 256)
    monkeypatch.setattr(core, "ENCODED_IN_MEMORY", 0)


def written(folder: Path, suffix: str, table: pd.DataFrame = TABLE) -> Path:
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path, row_group_size=300)
    elif suffix == ".feather":
        table.to_feather(path)
    else:
        table.to_csv(path, index=False)
    return path


# ---------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".csv"])
def test_a_file_gives_the_model_of_the_table_in_memory(suffix, tmp_path, monkeypatch):
    path = written(tmp_path, suffix)
    whole = tablefiles.read(path)
    expected = EnergyRegressor(**FAST).fit(whole.drop(columns="y"), whole["y"])
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 256)
    monkeypatch.setattr(core, "ENCODED_IN_MEMORY", 0)
    streamed = EnergyRegressor(**FAST).fit_file(path, "y")
    assert streamed.preprocessor_.state() == expected.preprocessor_.state()
    assert list(streamed.feature_names_in_) == list(FRAME.columns)
    x, y = whole.drop(columns="y"), whole["y"]
    np.testing.assert_array_equal(streamed.score_samples(x, y), expected.score_samples(x, y))


@pytest.mark.parametrize(
    "convert", [lambda frame: frame, pl.from_pandas, lambda f: pa.Table.from_pandas(f, preserve_index=False)]
)
def test_a_frame_in_blocks_is_encoded_as_the_whole(convert, small_blocks):
    table = MemoryTable(convert(FRAME), "X")
    preprocessor = TablePreprocessor().fit_columns(table.names, table.take(np.arange(0, N, 2)))
    whole = TablePreprocessor().fit(FRAME.iloc[::2])
    assert preprocessor.state() == whole.state()
    odd, few = encode(table, preprocessor, [np.arange(1, N, 2), np.array([0, 600])], Scratch(None))
    np.testing.assert_array_equal(odd, whole.transform(FRAME)[1::2])
    np.testing.assert_array_equal(few, whole.transform(FRAME)[[0, 600]])


@pytest.mark.parametrize("kind", ["memmap", "float32", "tensor"])
def test_arrays_in_blocks_give_the_same_predictions(kind, tmp_path, monkeypatch):
    x = FRAME[["a", "whole"]].to_numpy(np.float32)
    expected = EnergyRegressor(**FAST).fit(x, Y)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 256)
    monkeypatch.setattr(core, "ENCODED_IN_MEMORY", 0)
    table = torch.as_tensor(x) if kind == "tensor" else x
    if kind == "memmap":
        np.save(tmp_path / "x.npy", x)
        table = np.load(tmp_path / "x.npy", mmap_mode="r")
    regressor = EnergyRegressor(**FAST).fit(table, Y)
    np.testing.assert_array_equal(regressor.score_samples(x, Y), expected.score_samples(x, Y))


def test_weights_targets_and_dropped_columns_come_from_the_file(tmp_path, small_blocks):
    table = TABLE.assign(w=np.arange(N) % 3, z=-Y)
    path = written(tmp_path, ".parquet", table)
    streamed = EnergyRegressor(**FAST).fit_file(path, "y", drop=["z", "day"], sample_weight="w")
    x = FRAME.drop(columns="day")
    expected = EnergyRegressor(**FAST).fit(x, Y, sample_weight=table["w"])
    np.testing.assert_array_equal(streamed.predict(x), expected.predict(x))
    both = EnergyRegressor(**FAST).fit_file(path, ["y", "z"], drop=["w"])
    assert both.n_outputs_ == 2


def test_blocks_of_a_csv_are_read_as_what_the_whole_is(tmp_path, small_blocks):
    table = pd.DataFrame({"code": ["7"] * 400 + ["x7"] * 300, "late": [np.nan] * 600 + [1.5, 2.5] * 50, "y": Y})
    path = written(tmp_path, ".csv", table)
    regressor = EnergyRegressor(**FAST).fit_file(path, "y")
    plans = regressor.preprocessor_.state()["plans"]
    assert [plan["kind"] for plan in plans] == ["text", "number"]
    assert sorted(plans[0]["levels"]) == ["7", "x7"] and plans[1]["indicator"]


def test_rows_to_learn_from_are_all_or_a_random_part():
    rows = np.arange(0, 900, 3)
    assert rows_to_learn_from(rows, 10, 0) is rows
    many = np.arange(1_000_000)
    some = rows_to_learn_from(many, 10, 0)
    assert len(some) == blocks.LEARNING_ROWS == len(np.unique(some)) and (np.diff(some) > 0).all()
    assert abs(some.mean() / 500_000 - 1) < 0.01  # the standard error is 0.13 %
    assert not np.array_equal(some, rows_to_learn_from(many, 10, 1))
    assert len(rows_to_learn_from(many, 1_000, 0)) == 10_000


# ---------------------------------------------------------------------------------------------- the temporary file


def test_the_matrix_of_a_scratch_file_is_written_and_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Scratch(100) as scratch:
        small, large = scratch.empty(2, 3), scratch.empty(1000, 3)
        large[:] = 7
        assert large.sum() == 21_000 and large.dtype == np.float32 and small.base is None
        if os.name != "nt":
            assert not list(tmp_path.rglob("*.float32"))  # it has no name any more, whatever comes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind_whatever_ends_the_fit(error, tmp_path, monkeypatch, small_blocks):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    seen = []

    def broken(*_, **__):
        seen.append(list(folder.iterdir()))
        raise error

    monkeypatch.setattr(learning, "train_members", broken)
    with pytest.raises(error):
        EnergyRegressor(**FAST).fit_file(written(tmp_path, ".parquet"), "y")
    assert len(seen[0]) == 2 and list(folder.iterdir()) == []


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="the disk is full"), Scratch(0) as scratch:
        scratch.empty(10, 10)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- bad files


def put(table: pd.DataFrame, column: str, row: int, value: object) -> pd.DataFrame:
    changed = table.copy()
    changed[column] = changed[column].astype(object)
    changed.loc[row, column] = value
    return changed


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        (TABLE, {"target": "z"}, r"table\.csv: there is no column 'z'; the columns are 'a', 'kind'"),
        (TABLE, {"sample_weight": "w"}, "there is no column 'w'"),
        (TABLE, {"drop": ["b"]}, "there is no column 'b'"),
        (TABLE, {"sample_weight": "y"}, "target and sample_weight name a column twice"),
        (TABLE[["y"]], {}, "no column is left to predict from"),
        (TABLE.iloc[:0], {}, "the table has a header, but no rows"),
        (put(TABLE, "y", 650, "much"), {}, "the target column 'y' has 'much' in row 651; expected finite numbers"),
        (put(TABLE, "y", 650, None), {}, "the target column 'y' has no value in row 651"),
        (TABLE.assign(y=TABLE["day"]), {}, "the target column 'y' has '2024-01-01 00:00:00' in row 1"),
        (TABLE.assign(w=-1.0), {"sample_weight": "w"}, "the weight column 'w' has '-1.0' in row 1; .* ≥ 0"),
        (TABLE.assign(w=0.0), {"sample_weight": "w"}, "column 'w', the weights, is 0 in every row"),
        (put(TABLE, "a", 300, np.inf), {}, r"table\.csv: the table has an infinite value .*'a', row 301"),
        (TABLE.assign(y=1.0), {}, "the target has the same value in every row of column 'y'"),
        (TABLE.iloc[:1], {}, "expected at least 2 to learn from"),
    ],
)
def test_what_cannot_be_learned_from_is_said(table, arguments, message, tmp_path, small_blocks):
    path = written(tmp_path, ".csv", table)
    arguments = {"target": "y"} | arguments
    with pytest.raises(TableFileError, match=message):
        EnergyRegressor(**FAST).fit_file(path, arguments.pop("target"), **arguments)


def test_files_that_are_none_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        EnergyRegressor(**FAST).fit_file(tmp_path / "no.parquet", "y")
    (tmp_path / "empty.parquet").touch()
    with pytest.raises(TableFileError, match="the file is empty"):
        EnergyRegressor(**FAST).fit_file(tmp_path / "empty.parquet", "y")
    path = written(tmp_path, ".parquet")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TableFileError, match="no complete Parquet file"):
        EnergyRegressor(**FAST).fit_file(path, "y")
    damaged = bytearray(content)
    damaged[200:3000] = bytes(2800)  # the footer is whole, the values are not
    path.write_bytes(damaged)
    with pytest.raises(TableFileError, match="no complete Parquet file"):
        EnergyRegressor(**FAST).fit_file(path, "y")
    with pytest.raises(ValueError, match="expected names of columns"):
        EnergyRegressor(**FAST).fit_file(path, [])
    with pytest.raises(ValueError, match="epochs is 0"):
        EnergyRegressor(**{**FAST, "epochs": 0}).fit_file(path, "y")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, small_blocks):
    path = written(tmp_path, ".parquet")
    table = FileTable(path, ["y"])
    written(tmp_path, ".parquet", TABLE.iloc[:500])
    with pytest.raises(TableFileError, match="has changed while it was read"):
        list(table.blocks())


def test_a_column_of_flags_and_numbers_is_one_of_numbers(small_blocks):
    mixed = np.empty((600, 1), object)
    mixed[:300, 0], mixed[300:, 0] = True, 2.5
    mixed[7], mixed[400] = None, None
    (column,) = MemoryTable(mixed, "X").take(np.arange(600))
    (whole,) = MemoryTable(mixed[:256], "X").take(np.arange(256))
    assert column.kind == "number" and whole.kind == "boolean"
    assert np.nansum(column.values) == 299 + 2.5 * 299 and np.isnan(column.values[[7, 400]]).all()


def test_errors_of_a_block_in_memory_name_the_row_of_the_table(small_blocks):
    x = FRAME[["a", "some"]].to_numpy().copy()
    x[600, 1] = np.inf
    with pytest.raises(ValueError, match=r"infinite value .* in column 1, row 600"):
        EnergyRegressor(**FAST).fit(x, Y)
    mixed = FRAME[["a", "kind"]].to_numpy(object)
    mixed[600, 0] = "text"
    with pytest.warns(CellWarning, match=r"column 0 of X: 1 value is not a number .*'text' in row 600"):
        regressor = EnergyRegressor(**FAST).fit(mixed, Y)
    assert "column 0 is missing" in regressor.preprocessor_.features_
    mixed[600:640, 0] = "text"
    with pytest.raises(ValueError, match=r"column 0 of X mixes numbers .* with text"):
        EnergyRegressor(**FAST).fit(mixed, Y)


# ---------------------------------------------------------------------------------------------- memory

FIT = """
import json, sys, threading, warnings
import numpy as np
from energyreg import EnergyRegressor
from energyreg.estimators import core
kind, path, targets, file_from = sys.argv[1:]
core.ENCODED_IN_MEMORY = int(file_from)
settings = {"n_members": 1, "epochs": 1, "batch_size": 512, "width": 8, "validation_fraction": 0.01}
settings |= {"random_state": 0, "calibrate": False}
rng = np.random.default_rng(0)
EnergyRegressor(**settings).fit(rng.normal(size=(600, 3)), rng.normal(size=600))
if kind == "parquet":
    import pandas
    pandas.read_parquet(path, columns=["y"])

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

done, most = threading.Event(), anonymous()
before = most
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, anonymous())
thread = threading.Thread(target=watch)
thread.start()
try:
    if kind == "parquet":
        EnergyRegressor(**settings).fit_file(path, "y")
    else:
        EnergyRegressor(**settings).fit(np.load(path, mmap_mode="r"), np.load(targets))
finally:
    done.set()
thread.join()
print(json.dumps(most - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["memmap", "parquet"])
def test_memory_is_less_than_the_rows_in_double_precision_and_encoded(kind, tmp_path):
    """300,000 rows of 80 columns are 183 MiB in double precision and 92 MiB encoded; `fit` once held both at least."""
    rows, columns = 300_000, 80
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    y = x[:, 0] + 0.3 * rng.standard_normal(rows, dtype=np.float32)
    np.save(tmp_path / "y.npy", y)
    path = tmp_path / {"memmap": "x.npy", "parquet": "x.parquet"}[kind]
    if kind == "memmap":
        np.save(path, x)
    else:
        table = pa.table({**{f"x{i}": x[:, i] for i in range(columns)}, "y": y})
        parquet.write_table(table, path, row_group_size=10_000, compression="none", use_dictionary=False)
    command = [sys.executable, "-c", textwrap.dedent(FIT), kind, str(path), str(tmp_path / "y.npy")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "0"], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) < rows * columns * (8 + 4)
